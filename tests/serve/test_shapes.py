"""Answers: their bytes, log-probabilities, ends and prompts, and how they are sampled and drafted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import anydepth
from anydepth import Draft, FastEngine, HFEngine
from anydepth.decoding.generate import generate_text
from anydepth.measure.prompts import read_prompts
from anydepth.models.tokens import encode
from anydepth.serve.service import Service
from anydepth.serve.talk import Talk
from anydepth.serve.text_stream import TextStream, TokenText
from commands import anydepth as command
from serving_here import DRAFTS, TEMPLATE, chat, complete, fallback_tokenizer, serving
from tiny import byte_tokenizer, save_base, tiny_llama

TEXT = "the sea – “größer”, 海 and 🌊👩‍🚀"


def shares_of(model: PreTrainedModel, prompt: list[int], said: list[int]) -> torch.Tensor:
    """Return (N, V) log-probabilities of stock transformers for an answer."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + said])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


# --- bytes and log-probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), fallback_tokenizer()], ids=["byte-level", "byte-fallback"])
def test_the_bytes_of_tokens_join_to_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """S7: a token of half a character has its own bytes, a space at the beginning of a token is one."""
    texts, ids = TokenText(tokenizer), encode(tokenizer, f"a {TEXT}")
    assert b"".join(map(texts.bytes_of, ids)).decode().strip() == f"a {TEXT}"
    names = [texts.name_of(token_id) for token_id in tokenizer("🌊", add_special_tokens=False)["input_ids"]]
    assert names[-4:] == [f"bytes:\\x{byte:02x}" for byte in "🌊".encode()]
    assert all(texts.bytes_of(one) == b"" and texts.name_of(one) for one in tokenizer.all_special_ids)
    assert texts.bytes_of(10**6) == b""  # a row of the embedding that the tokenizer does not know


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_chat_returns_exact_bytes_and_all_log_probabilities(kind: str, stream: bool) -> None:
    """S7: at temperature 1.2 a random model generates mostly halves of characters."""
    tokenizer = byte_tokenizer() if kind == "byte-level" else fallback_tokenizer()
    options: dict[str, Any] = {"temperature": 1.2, "seed": 5, "logprobs": True, "top_logprobs": 4, "max_tokens": 60}
    with serving(tokenizer=tokenizer, model=tiny_llama(vocab_size=len(tokenizer))) as client:
        if stream:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, **options}
            events = client.post("/v1/chat/completions", json=body).text.removesuffix("data: [DONE]\n\n").split("\n\n")
            choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events if event]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            tokens = [token for choice in choices for token in choice["logprobs"]["content"]]
        else:
            choice = chat(client, "hi", **options)["choices"][0]
            text, tokens = choice["message"]["content"], choice["logprobs"]["content"]
    joined = bytes(byte for token in tokens for byte in token["bytes"])
    assert "\N{REPLACEMENT CHARACTER}" in text and len(tokens) == 60
    if kind == "byte-level":  # the other's decoder puts marks for every byte of a run that is no text, letters as well
        assert joined.decode(errors="replace") == text
    for token in tokens:
        top = [(one["token"], one["logprob"]) for one in token["top_logprobs"]]
        assert len(top) == (4 if (token["token"], token["logprob"]) in top[:4] else 5)
        assert (token["token"], token["logprob"]) in top and [one for _, one in top] == sorted(
            (one for _, one in top), reverse=True
        )


@pytest.mark.parametrize("num_top", [0, 3, 5])
def test_completions_return_k_or_one_more_and_right_offsets(num_top: int) -> None:
    """S7: tokens with one text have different names; values are stock transformers' for the tokens of the answer."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with serving(model=model) as client:
        answer = complete(client, temperature=1.2, seed=1, logprobs=num_top, max_tokens=40)["choices"][0]
    told, texts = answer["logprobs"], TokenText(tokenizer)
    by_name = {texts.name_of(token_id): token_id for token_id in range(257)}
    said = [by_name[name] for name in told["tokens"]]
    wanted = shares_of(model, encode(tokenizer, "the sea"), said)
    for place, (token_id, own, top) in enumerate(zip(said, told["token_logprobs"], told["top_logprobs"], strict=True)):
        likeliest = wanted[place].topk(num_top).indices.tolist()
        assert own == pytest.approx(float(wanted[place, token_id]), abs=1e-4)
        assert {by_name[name] for name in top} == {*likeliest, token_id}
        before = b"".join(map(texts.bytes_of, said[:place]))
        assert told["text_offset"][place] <= len(before.decode(errors="replace"))
    ascii_places = [place for place, name in enumerate(told["tokens"]) if name.isascii() and len(name) == 1]
    assert len(ascii_places) > 9  # some of them after halves of characters, which become U+FFFD
    for place in ascii_places:
        assert answer["text"][told["text_offset"][place]] == told["tokens"][place]


def test_tokens_with_the_same_text_are_all_returned() -> None:
    """S7: `a` and the byte token of `a` are two tokens of one text; a dictionary by text needs a name for both."""
    tokenizer = fallback_tokenizer()
    with serving(tokenizer=tokenizer, model=tiny_llama(vocab_size=len(tokenizer))) as client:
        for seed in range(4):
            answer = complete(client, temperature=1.5, seed=seed, logprobs=5)["choices"][0]
            assert all(len(top) in (5, 6) for top in answer["logprobs"]["top_logprobs"])


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Path, int]:
    """A folder whose tokenizer alone names the token that ends a turn: one that greedy decoding reaches."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ids = torch.tensor([encode(tokenizer, "the sea")])
    said = model.generate(input_ids=ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    end = next(token for place, token in enumerate(said) if place > 3 and token not in said[:place])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, end


def test_an_answer_ends_at_the_end_token_of_the_tokenizer_and_of_the_config(ended: tuple[Path, int]) -> None:
    """S8: on the server, in `chat` and in `generate` on both engines, from files and from objects."""
    folder, end = ended
    stock = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([encode(byte_tokenizer(), "the sea")])
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    wanted = stock.generate(prompt, eos_token_id=[0, end], **options)[0, prompt.shape[1] :].tolist()
    assert wanted[-1] == end and len(wanted) < 30
    model, tokenizer = anydepth.load_model(str(folder))
    adapted = anydepth.attach(model, [])
    draft = Draft(adapted, DRAFTS)
    for engine in (HFEngine(adapted, draft), FastEngine(adapted, draft=draft)):
        assert engine.generate(prompt, **options)[0, prompt.shape[1] :].tolist() == wanted
    fresh = anydepth.attach(AutoModelForCausalLM.from_pretrained(folder), [])
    for one in (HFEngine(fresh), FastEngine(fresh)):
        assert generate_text(one, tokenizer, "the sea", max_new_tokens=30)["token_ids"] == wanted
    with serving(model=AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer) as client:
        for lossless in (False, True):
            answer = complete(client, temperature=0, max_tokens=30, anydepth={"lossless": lossless})
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == len(wanted)
        assert chat(client, temperature=0, max_tokens=30)["usage"]["completion_tokens"] == len(wanted)
    service = Service(anydepth.FastEngine(fresh), tokenizer)
    try:
        said = "".join(text for text, _ in Talk(service, tokenizer, None, 30, 0.0).answer("the sea"))
        assert said == tokenizer.decode(wanted[:-1])
    finally:
        service.close()


def test_a_special_token_in_stop_ends_the_text() -> None:
    """S21: it is not part of the text, but is matched nevertheless, alone and together with letters."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    ids = [*tokenizer("one two")["input_ids"], *tokenizer("<turn>")["input_ids"], *tokenizer("three")["input_ids"]]
    for stop, wanted in (
        ("<turn>", "one two"),
        ("two<turn>", "one "),
        ("<turn>th", "one two"),
        ("four", "one twothree"),
    ):
        stream, said = TextStream(tokenizer, [], [stop]), ""
        for token_id in ids:
            said += stream.push(token_id)
            if stream.is_stopped:
                break
        assert said + stream.finish() == wanted and stream.is_stopped == (stop != "four")


def test_the_server_stops_at_a_special_token() -> None:
    """S21: `stop` names a special token that does not end texts by itself."""
    tokenizer = byte_tokenizer()
    with serving(tokenizer=tokenizer) as client:
        whole = complete(client, temperature=0, max_tokens=30, logprobs=0)["choices"][0]
        names = whole["logprobs"]["tokens"]
    place = next(place for place, name in enumerate(names) if place > 3 and name not in names[:place])
    letter = tokenizer.convert_ids_to_tokens(
        [one for one in range(257) if TokenText(tokenizer).name_of(one) == names[place]]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": letter})
    with serving(tokenizer=tokenizer) as client:
        answer = complete(client, temperature=0, max_tokens=30, stop=letter)
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == place + 1


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_from_a_template_has_one_bos(tmp_path: Path) -> None:
    """S21: wherever such text is encoded: prompts of a file, `generate`, and both endpoints."""
    tokenizer = fallback_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "the sea"}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "the sea"}))
    (text,) = read_prompts(path, tokenizer)
    assert encode(tokenizer, text) == wanted
    model = tiny_llama(vocab_size=len(tokenizer))
    stock = model.generate(torch.tensor([wanted]), max_new_tokens=6, do_sample=False, pad_token_id=2)
    adapted = anydepth.attach(model, [])
    fields = generate_text(HFEngine(adapted), tokenizer, text, max_new_tokens=6)
    assert fields["token_ids"] == stock[0, len(wanted) :].tolist()
    anydepth.detach(adapted)
    with serving(model=model, tokenizer=tokenizer) as client:
        said = [complete(client, text, temperature=0), chat(client, temperature=0)]
    assert [answer["usage"]["prompt_tokens"] for answer in said] == [len(wanted)] * 2
    assert said[0]["choices"][0]["text"] == said[1]["choices"][0]["message"]["content"]


def test_a_prompt_counts_once_whatever_n() -> None:
    """S9: as OpenAI counts: each prompt once, each answer's tokens."""
    with serving() as client:
        for prompt, read in (("abcd", 4), (["abcd", "ab"], 6)):
            usage = complete(client, prompt, n=3, max_tokens=2, temperature=0)["usage"]
            said = 6 * (1 if isinstance(prompt, str) else len(prompt))
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (read, said)
            assert usage["total_tokens"] == read + said
        assert (
            chat(client, n=2, max_tokens=2)["usage"]["prompt_tokens"]
            == chat(client, max_tokens=2)["usage"]["prompt_tokens"]
        )


# --- sampling defaults -----------------------------------------------------------------------------------------------


def with_defaults(**options: Any) -> PreTrainedModel:
    model = tiny_llama()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0, **options)
    return model


def test_requests_have_the_models_own_sampling_defaults() -> None:
    """S22: temperature, top_k, top_p and min_p of the generation config, unless a request sets them."""
    with serving() as plain:
        greedy = complete(plain, temperature=0)["choices"][0]["text"]
        sampled = complete(plain, seed=3)["choices"][0]["text"]
        hot = complete(plain, seed=3, temperature=1.9)["choices"][0]["text"]
    assert len({greedy, sampled, hot}) == 3
    with serving(model=with_defaults(do_sample=True, temperature=1.9)) as client:
        assert complete(client, seed=3)["choices"][0]["text"] == hot
        assert complete(client, seed=3, temperature=None)["choices"][0]["text"] == hot
        assert complete(client, seed=3, temperature=1)["choices"][0]["text"] == sampled
    for option in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        with serving(model=with_defaults(do_sample=True, **option)) as client:
            assert complete(client, seed=3)["choices"][0]["text"] == greedy, option
    with serving(model=with_defaults(do_sample=True, top_p=1e-6)) as client:
        assert complete(client, seed=3, top_p=1)["choices"][0]["text"] == sampled


@pytest.mark.parametrize("lossless", [False, True])
def test_the_repetition_penalty_is_that_of_transformers(lossless: bool) -> None:
    """S22: on the server and in `chat`, drafted or not; the text is stock transformers'."""
    model = with_defaults(repetition_penalty=1.6)
    tokenizer = byte_tokenizer()
    ids = torch.tensor([encode(tokenizer, "the sea")])
    stock = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    plain = tiny_llama().generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    wanted = tokenizer.decode(stock, skip_special_tokens=True)
    assert stock.tolist() != plain.tolist()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    with serving(draft=DRAFTS, model=model, tokenizer=tokenizer) as client:
        answer = complete(client, temperature=0, anydepth={"lossless": lossless})
        assert answer["choices"][0]["text"] == wanted
    adapted = anydepth.attach(with_defaults(repetition_penalty=1.6), []).eval()
    service = Service(FastEngine(adapted, draft=Draft(adapted, DRAFTS)), tokenizer)
    try:
        talk = Talk(service, tokenizer, None, 24, 0.0, lossless=lossless)
        assert "".join(text for text, _ in talk.answer("the sea")) == wanted
    finally:
        service.close()


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("fast", [False, True], ids=["hf", "fast"])
def test_generate_keeps_to_the_generation_config(fast: bool, drafts: bool) -> None:
    """S22: `generate` of both engines, drafted or not, has stock transformers' tokens with the model's own defaults."""
    defaults = {"do_sample": True, "temperature": 0.8, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.3}
    ids = torch.tensor([encode(byte_tokenizer(), "the sea")])
    stock = with_defaults(**defaults)
    torch.manual_seed(4)
    wanted = stock.generate(ids, max_new_tokens=24)
    adapted = anydepth.attach(with_defaults(**defaults), []).eval()
    draft = Draft(adapted, DRAFTS) if drafts else None
    ours = FastEngine(adapted, draft=draft) if fast else HFEngine(adapted, draft)
    torch.manual_seed(4)
    assert ours.generate(ids, max_new_tokens=24).tolist() == wanted.tolist()


def test_commands_report_the_generation_config(tmp_path: Path) -> None:
    """S22: one line on standard error; `--generation-config none` drops it; another value is refused."""
    save_base(tmp_path)
    path = tmp_path / "generation_config.json"
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.6, "no_repeat_ngram_size": 3}
    path.write_text(json.dumps({**config, "eos_token_id": 0, "pad_token_id": 0}))
    shared = ["generate", tmp_path, "--prompt", "the sea", "--max-new-tokens", 12, "--json"]
    done = [command(*shared, *more) for more in ([], ["--generation-config", "none"], ["--temperature", 0.5])]
    assert all(one.returncode == 0 for one in done), done[0].stderr
    greedy, none, sampled = (one.stderr for one in done)
    assert "repetition_penalty 1.6, no_repeat_ngram_size 3 applied" in greedy
    assert "temperature 0.7, top_k 20 not applied" in greedy and "generation_config.json" not in none
    assert "temperature 0.5" in sampled and "top_k 20" in sampled
    ids = torch.tensor([encode(byte_tokenizer(), "the sea")])
    plain = tiny_llama().generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    said = [json.loads(one.stdout)["token_ids"] for one in done]
    assert said[1] == plain != said[0]
    wrong = command(*shared, "--generation-config", "vllm")
    assert wrong.returncode == 2 and "auto or none" in wrong.stderr
    talked = command("chat", tmp_path, "--generation-config", "vllm")
    assert talked.returncode == 2 and "auto or none" in talked.stderr


# --- drafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.1, "seed": 7}, {"seed": 9, "top_p": 0.8}])
def test_log_probabilities_and_sampling_are_drafted(sampling: dict[str, Any]) -> None:
    """S23, C30: the same tokens and log-probabilities as without drafts, with drafts, and `usage` says so."""
    options = {**sampling, "logprobs": 3, "max_tokens": 40}
    with serving() as client:
        plain = complete(client, **options)
    with serving(draft=DRAFTS) as client:
        drafted = complete(client, **options, anydepth={"lossless": True})
    assert drafted["usage"]["anydepth"]["drafting"] == {"used": True, "answers": 1, "reason": None}
    assert 0 < drafted["usage"]["anydepth"]["acceptance_rate"] <= 1 and "drafting" not in plain["usage"]["anydepth"]
    (ours,), (theirs,) = drafted["choices"], plain["choices"]
    assert ours["text"] == theirs["text"]
    for key in ("tokens", "text_offset"):
        assert ours["logprobs"][key] == theirs["logprobs"][key]
    for a, b in zip(ours["logprobs"]["top_logprobs"], theirs["logprobs"]["top_logprobs"], strict=True):
        assert set(a) == set(b) and all(math.isclose(a[name], b[name], abs_tol=1e-4) for name in a)


def test_usage_has_the_reason_why_an_answer_was_not_drafted(caplog: pytest.LogCaptureFixture) -> None:
    """S23: several answers are drafted together; without a drafter none is, which is logged once."""
    with serving() as client:
        told = complete(client, anydepth={"lossless": True})["usage"]["anydepth"]["drafting"]
        complete(client, anydepth={"lossless": True})
    assert not told["used"] and told["answers"] == 0 and "no drafter is attached" in told["reason"]
    assert len([record for record in caplog.records if "no drafter" in record.message]) == 1
    with serving(draft=DRAFTS) as client:
        answer = complete(client, n=3, temperature=0, anydepth={"lossless": True})
        told = answer["usage"]["anydepth"]["drafting"]
        assert told == {"used": True, "answers": 3, "reason": None}
        assert len({choice["text"] for choice in answer["choices"]}) == 1


def test_sampled_conversations_are_the_same_drafted_or_not() -> None:
    """S23: `chat --lossless` at its default temperature drafts; every answer is the same as without drafts."""
    said = []
    for lossless in (False, True):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        adapted = anydepth.attach(tiny_llama(), []).eval()
        draft = Draft(adapted, DRAFTS) if lossless else None
        service = Service(FastEngine(adapted, draft=draft), tokenizer)
        talk = Talk(service, tokenizer, None, 12, 0.7, lossless=lossless, seed=2)
        said.append(["".join(text for text, _ in talk.answer(line)) for line in ("hi", "so", "go")])
        service.close()
    assert said[0] == said[1]
