"""Generation on an engine: options, stop rules and streams of transformers' `generate`, and texts with their depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList, TextStreamer

import anydepth
from anydepth import FastEngine, HFEngine
from anydepth.decoding.generate import check_window, full_depth_records, generate_text
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from drafts import ALONE, both, drafting, prompts
from tiny import byte_tokenizer, tiny_llama
from undecided import undecided

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


def ids(batch_size: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 257, (batch_size, length), generator=torch.Generator().manual_seed(3))


def routed() -> AdaptedModel:
    return anydepth.attach(tiny_llama(), ROUTER)


OPTIONS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "minimum": {"do_sample": False, "min_new_tokens": 10, "eos_token_id": 5},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_generate_have_the_same_effect(options: dict[str, Any]) -> None:
    adapted = routed()
    settings = {"max_new_tokens": 16, "pad_token_id": 0, **options}
    torch.manual_seed(1)
    wanted = adapted.generate(ids(), **settings)
    torch.manual_seed(1)
    assert torch.equal(FastEngine(adapted).generate(ids(), **settings), wanted)


def test_rows_end_at_their_own_end_token() -> None:
    adapted = routed()
    free = adapted.generate(ids(), max_new_tokens=16, do_sample=False, pad_token_id=0)
    ends = int(free[0, 15])  # what the first row says fourth
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    wanted = adapted.generate(ids(), **settings)
    assert torch.equal(FastEngine(adapted).generate(ids(), **settings), wanted)


class Ids(TextStreamer):
    """Keeps the ids instead of printing their text."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_every_token_once() -> None:
    streamer = Ids()
    output = FastEngine(routed()).generate(ids(1), max_new_tokens=8, do_sample=False, pad_token_id=0, streamer=streamer)
    assert streamer.seen == output[0].tolist() and streamer.ended


class Puts:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_every_step_in_order() -> None:
    engine, batch, streams = drafting("fast", "everything"), prompts(3), []
    for full_depth in (True, False):
        streams.append(Puts())
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "streamer": streams[-1]}
        if full_depth:
            with engine.adapted.disabled():
                engine.generate(**batch, **options)
        else:
            engine.generate(**batch, **options)
    assert [value.tolist() for value in streams[0].values] == [value.tolist() for value in streams[1].values]
    assert streams[0].ended == streams[1].ended == 1


def test_stop_strings() -> None:
    adapted, tokenizer = routed(), byte_tokenizer()
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "tokenizer": tokenizer}
    said = [tokenizer.decode([token]) for token in adapted.generate(ids(1), **settings)[0, 12:].tolist()]
    stops = {"stop_strings": [next(text for text in said if text.isascii() and text.isprintable())], **settings}
    wanted = adapted.generate(ids(1), **stops)
    assert wanted.shape[1] < 28 and torch.equal(FastEngine(adapted).generate(ids(1), **stops), wanted)
    with pytest.raises(UserError, match="tokenizer="):
        FastEngine(adapted).generate(ids(1), stop_strings=["a"])


def test_full_depth_while_disabled() -> None:
    adapted = routed()
    engine = FastEngine(adapted)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with adapted.disabled():
        ours = engine.generate(ids(), **settings)
    assert torch.equal(ours, tiny_llama().generate(ids(), **settings))


def test_long_texts_outgrow_the_first_cache() -> None:
    adapted = routed()
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    long = ids(2, 240)
    assert torch.equal(FastEngine(adapted).generate(long, **settings), adapted.generate(long, **settings))


def test_rows_that_ended_continue_without_an_end_token() -> None:
    """As in transformers: without an end token rows are not padded, and the batch ends with its last row."""
    batch = prompts(3)

    class Ends(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            lengths = torch.tensor([6, 14, 9])[: len(input_ids)] + 21
            if len(input_ids) == 1:  # called row by row, identified by the prompt
                row = next(i for i, ids in enumerate(batch["input_ids"]) if torch.equal(ids, input_ids[0, :21]))
                lengths = torch.tensor([[6, 14, 9][row] + 21])
            return torch.full((len(input_ids),), input_ids.shape[1]) >= lengths

    for path in ("fast", "hf"):
        options: Any = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
        engine = drafting(path, (ALONE, [{"name": "skip_set", "skip_layers": [2]}]))
        wanted, ours = both(engine, batch, stopping_criteria=[Ends()], **options)
        assert torch.equal(wanted, ours) and ours.shape[1] == 21 + 14


def test_a_maximum_length_below_the_prompt_ends_at_once() -> None:
    for path in ("fast", "hf"):
        limit = StoppingCriteriaList([MaxLengthCriteria(10)])
        wanted, ours = both(drafting(path, "first layers"), prompts(2), do_sample=False, stopping_criteria=limit)
        assert torch.equal(wanted, ours) and ours.shape[1] == 22


def test_unsupported_options_are_refused() -> None:
    batch = prompts(2)
    right = {**batch, "attention_mask": torch.tensor([[1] * 20 + [0], [1] * 21])}
    for runner in (drafting("fast", "first layers"), drafting("hf", "first layers")):
        with pytest.raises(UserError, match="pad on the left"):
            runner.generate(**right, max_new_tokens=3)
        with pytest.raises(UserError, match="assistant_model is not supported"):
            runner.generate(**batch, assistant_model=runner.adapted.model, max_new_tokens=3)


def test_unsupported_modes_are_refused() -> None:
    for runner in (FastEngine(routed()), drafting("hf", "lookup"), drafting("fast", "lookup")):
        with pytest.raises(UserError, match="greedily or samples"):
            runner.generate(**prompts(1), max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("mask", [[[1, 1, 0, 1]], [[0, 0, 0, 0]], [[1, 1, 1, 0]], [[[[True] * 4] * 4]]])
def test_masks_other_than_left_padding_are_refused(mask: Any) -> None:
    with pytest.raises(UserError, match="zeros before the tokens"):
        FastEngine(routed()).generate(ids(1, 4), attention_mask=torch.tensor(mask), max_new_tokens=2)


def test_options_that_the_loop_would_ignore_are_refused() -> None:
    engine, options = FastEngine(routed()), {"max_new_tokens": 2, "pad_token_id": 0}
    with pytest.raises(UserError, match="guidance_scale 1.5"):
        engine.generate(ids(1), guidance_scale=1.5, **options)
    with pytest.raises(UserError, match="return_dict_in_generate"):
        engine.generate(ids(1), return_dict_in_generate=True, **options)
    with pytest.raises(UserError, match="past_key_values is not supported"):
        engine.generate(ids(1), past_key_values=engine.adapted.new_cache(), **options)


# --- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [HFEngine, FastEngine])
def test_a_text_says_which_layers_predicted_each_token(engine: Any) -> None:
    """The last token of the prompt predicts the first new one; depths are those of a forward without a cache."""
    adapted, tokenizer = routed(), byte_tokenizer()
    fields = generate_text(engine(adapted), tokenizer, "the sea", max_new_tokens=6)
    prompt = tokenizer("the sea", return_tensors="pt")["input_ids"]
    wanted = adapted.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 7:]
    assert fields["token_ids"] == wanted.tolist() and len(wanted) == 6
    assert fields["text"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert fields["tokens"] == [tokenizer.decode([token]) for token in wanted.tolist()]
    adapted(torch.cat([prompt[0], wanted])[None], use_cache=False)
    ran = adapted.last_trace.mixer_keep[:, 0, 6:12].T.float()
    assert fields["layers"] == ran.tolist() and fields["depths"] == ran.sum(1).tolist()
    assert fields["num_layers"] == 6 and len(set(fields["depths"])) > 1
    assert fields["tokens_per_second"] > 0 and "mixers" not in fields and "acceptance_rate" not in fields


def test_a_branch_alone_is_half_a_layer() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_mixers": [1], "skip_ffns": [1, 2]})
    fields = generate_text(FastEngine(adapted), byte_tokenizer(), "the sea", max_new_tokens=2)
    assert fields["layers"] == [[1, 0, 0.5, 1, 1, 1]] * 2 and fields["depths"] == [4.5] * 2


def test_a_drafted_text_has_full_depth_and_draft_counts() -> None:
    engine = drafting("fast", (ALONE, [{"name": "skip_set"}]))  # always right
    fields = generate_text(engine, byte_tokenizer(), "the sea", max_new_tokens=9)
    assert fields["depths"] == [6.0] * 9 and fields["acceptance_rate"] == 1
    with engine.adapted.disabled():
        assert "acceptance_rate" not in generate_text(engine, byte_tokenizer(), "the sea", max_new_tokens=2)


def test_a_text_says_which_tokens_took_softmax() -> None:
    """The last token has not run."""
    adapted, tokenizer = undecided("mixers"), byte_tokenizer()
    fields = generate_text(HFEngine(adapted), tokenizer, "the sea", max_new_tokens=4)
    layers, tokens = fields["mixers"]["layers"], fields["mixers"]["tokens"]
    assert layers == [1, 2, 3, 4] and "".join(tokens) == "the sea" + "".join(fields["tokens"][:-1])
    whole = torch.tensor([[*tokenizer("the sea")["input_ids"], *fields["token_ids"][:-1]]])
    adapted(whole, use_cache=False)
    assert fields["mixers"]["softmax"] == adapted.last_trace.mixer_keep[layers, 0].T.tolist()


def test_a_temperature_samples_by_the_seed() -> None:
    stock, tokenizer = tiny_llama(), byte_tokenizer()
    engine = FastEngine(anydepth.attach(tiny_llama(), []))
    found = [
        generate_text(engine, tokenizer, "the sea", max_new_tokens=9, temperature=0.9, seed=seed) for seed in (1, 1, 2)
    ]
    prompt = tokenizer("the sea", return_tensors="pt")["input_ids"]
    torch.manual_seed(1)
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.9, "pad_token_id": 0}
    wanted = stock.generate(prompt, **options)[0, 7:].tolist()
    assert found[0]["token_ids"] == found[1]["token_ids"] == wanted != found[2]["token_ids"]


@pytest.mark.parametrize(
    ("num_prompt", "num_new", "says"),
    [
        (0, 5, "the prompt is empty"),
        (5, 0, "at least 1; got 0"),
        (100, 29, "window of 128; shorten the prompt to 99 tokens"),
        (5, 500, "shorten the prompt to 0 tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(num_prompt: int, num_new: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_window(tiny_llama(), num_prompt, num_new)
    check_window(tiny_llama(), 100, 28)


def test_records_of_a_drafted_text_are_those_of_one_token_at_a_time() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    records = full_depth_records(torch.zeros(2, 6, dtype=torch.long), mask, 3, num_layers=6)
    assert [record.token_mask.int().tolist() for record in records] == [mask.tolist(), [[1], [1]], [[1], [1]]]
    assert [record.past_length for record in records] == [0, 3, 4]  # the last token has not run
    assert [record.head_rows for record in records] == [2, 2, 2] and not records[1].mixer_keep
