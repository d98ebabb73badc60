"""A model's own text, and drafters that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anydepth
from anydepth import Draft, FastEngine
from anydepth.decoding.request import DraftCounts, Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.draft_sections import DrafterConfig, OwnTextConfig
from anydepth.engine.session import FastSession
from anydepth.speculation.drafter_training import DraftTraining, batches_of, collate, train_drafter
from anydepth.speculation.self_generated import Template, Text, Writer, own_texts
from anydepth.speculation.shipped import default_draft, pack, ship, unpack
from anydepth.speculation.trained_drafter import TrainedDrafter
from tiny import byte_tokenizer, tiny_llama

CONFIG = OwnTextConfig(num_tokens=1200, max_question=6, max_answer=12, num_slots=5)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def drafting() -> Draft:
    """Return a draft with nothing but an untrained network."""
    network = {"taps": [2, 6], "vocabulary_size": 60}
    return Draft(anydepth.attach(tiny_llama(), []).eval(), {"lookup": False, "adaptive": False, "network": network})


def network_of(draft: Draft) -> Any:
    assert draft.network is not None
    return draft.network


def texts_of(folder: Path, *, chat: bool = True) -> list[Text]:
    tokenizer = byte_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT
    adapted = anydepth.attach(tiny_llama(), []).eval()
    texts, seconds = own_texts(adapted, tokenizer, [2, 6], CONFIG, folder)
    assert seconds > 0
    return texts


@torch.no_grad()
@pytest.mark.parametrize("chat", [True, False])
def test_states_are_those_of_the_model_and_answers_are_greedy(chat: bool, tmp_path: Path) -> None:
    texts = texts_of(tmp_path, chat=chat)
    assert sum(len(text.ids) for text in texts) >= 1200
    assert len({tuple(text.ids.tolist()) for text in texts}) == len(texts)
    model: Any = tiny_llama()
    for text in texts[:8]:
        output = model(text.ids[None], output_hidden_states=True)
        assert torch.allclose(text.states[:, 0], output.hidden_states[2][0], atol=1e-4)
        assert torch.allclose(model.model.norm(text.states[:, 1]), output.hidden_states[-1][0], atol=1e-4)
        said = output.logits[0].argmax(-1)[text.completion - 1 : -1]
        assert torch.equal(said, text.ids[text.completion :])
        if chat:
            assert byte_tokenizer().decode(text.ids[: text.prompt]) == "<user>"
            shown = byte_tokenizer().decode(text.ids[: text.completion])
            assert shown.startswith("<user>") and shown.endswith("|<bot>") and shown.count("<bot>") == 1


def test_writing_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.self_generated.SHARD_TOKENS", 400)
    whole = texts_of(tmp_path / "whole")
    own, calls = Writer.step, []

    def stops(self: Writer) -> Any:
        calls.append(0)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return own(self)

    monkeypatch.setattr(Writer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        texts_of(tmp_path / "stopped")
    monkeypatch.setattr(Writer, "step", own)
    again = texts_of(tmp_path / "stopped")
    assert len(list((tmp_path / "stopped").iterdir())) == 3
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(whole, again, strict=True))


def test_templates() -> None:
    tokenizer = byte_tokenizer()
    assert Template.of(tokenizer) == Template([0], [], frozenset([0]))
    tokenizer.chat_template = CHAT
    template = Template.of(tokenizer)
    assert tokenizer.decode(template.start) == "<user>" and tokenizer.decode(template.between) == "|<bot>"
    assert template.ends == frozenset([0, template.between[0]])


def planted(engine: FastEngine, states: torch.Tensor, ids: list[int]) -> tuple[FastSession, Request]:
    """Return a session that has captured (N, taps, D) states, and the request that they are of."""
    session = engine.new_session(1)
    request = Request(ids, Sampler(), Stops.at(len(ids) + 9), sequence=session.open())
    session.states[request.kv] = list(states.unbind(1))
    return session, request


@torch.no_grad()
def test_training_sees_what_the_engine_computes(tmp_path: Path) -> None:
    """The guesses of a whole text at once are those that the drafter makes behind each of its tokens."""
    draft, adapted = drafting(), anydepth.attach(tiny_llama(), []).eval()
    engine = FastEngine(adapted)
    text = max(texts_of(tmp_path), key=lambda one: len(one.ids))
    network = network_of(draft)
    torch.nn.init.normal_(network.join.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    network.vocabulary.copy_(torch.arange(40, 100))
    seen: list[torch.Tensor] = []
    training = DraftTraining(network, adapted.backbone, num_drafted=3)
    own = torch.nn.functional.linear

    def noted(inputs: Any, weight: Any, *rest: Any) -> Any:
        output = own(inputs, weight, *rest)
        if weight is training.head:
            seen.append(output)
        return output

    torch.nn.functional.linear = noted
    try:
        training(*collate([text]))
    finally:
        torch.nn.functional.linear = own
    guesses = seen[1:]  # the first are the teacher's
    drafter = TrainedDrafter(engine.model, network)
    for end in range(2, len(text.ids) - 3):
        session, row = planted(engine, text.states[:end], text.ids[: end + 1].tolist())
        drafter.observe(session, [row])
        for number in range(3):
            found: list[torch.Tensor] = []

            def choose(rows: Any, logits: torch.Tensor, vocabulary: Any, found: Any = found) -> Any:
                found.append(logits[0])
                return [0], [0.5]

            drafter.propose(session, [row], choose)
            wanted = guesses[number][0, end - 1]
            assert torch.allclose(found[0], wanted, atol=1e-4, rtol=1e-4)
            row.draft.append(int(text.ids[end + 1 + number]))


@torch.no_grad()
def test_the_drafter_reads_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths as well: what it has read is what the model has seen."""
    adapted = anydepth.attach(tiny_llama(), []).eval()
    engine, seen = FastEngine(adapted, draft=drafting()), []
    own = TrainedDrafter._inputs

    def recorded(self: TrainedDrafter, request: Request, cache: Any) -> Any:
        num_read, inputs = self._state(request).num_read, own(self, request, cache)
        if not request.draft:
            seen.append((request.kv, num_read, len(inputs), request.num_seen))
        return inputs

    monkeypatch.setattr(TrainedDrafter, "_inputs", recorded)
    ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    engine.generate(input_ids=ids * mask, attention_mask=mask, **options)
    assert {slot: number for slot, before, number, _ in seen if not before} == {0: 14, 1: 9}
    assert all(before + number == known for _, before, number, known in seen)


@torch.no_grad()
def test_the_drafter_reads_the_end_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.trained_drafter.LOOK_BACK", 9)
    engine = FastEngine(anydepth.attach(tiny_llama(), []).eval())
    drafter, found = TrainedDrafter(engine.model, network_of(drafting())), []
    ids = torch.randint(3, 200, (30,), generator=torch.Generator().manual_seed(0)).tolist()

    def choose(requests: Any, logits: torch.Tensor, vocabulary: Any) -> Any:
        found.append(logits)
        return [0], [0.5]

    size = engine.adapted.backbone.hidden_size
    states = torch.randn(29, 2, size, generator=torch.Generator().manual_seed(1))
    for own in (states, states * (torch.arange(29) >= 20)[:, None, None]):
        session, request = planted(engine, own, ids)
        drafter.observe(session, [request])
        drafter.propose(session, [request], choose)
    assert torch.equal(*found)


def test_a_drafter_learns_and_resumes_bitwise(tmp_path: Path) -> None:
    config = DrafterConfig(max_steps=30, batch_tokens=256, warmup_steps=3, save_every=10, precision="float32")
    backbone = anydepth.attach(tiny_llama(), []).backbone
    draft, texts = drafting(), texts_of(tmp_path / "text")
    history = train_drafter(network_of(draft), backbone, texts, config, tmp_path / "a")
    first, last = (sum(row["loss"] for row in part) / 5 for part in (history[:5], history[-5:]))
    assert last < 0.8 * first and len(history) == 30
    other = drafting()
    stopped: list[int] = []

    def stop(row: dict[str, float]) -> None:
        stopped.append(0)
        if len(stopped) == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_drafter(network_of(other), backbone, texts, config, tmp_path / "b", on_step=stop)
    again = drafting()
    resumed = train_drafter(network_of(again), backbone, texts, config, tmp_path / "b", resume=True)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in history]
    for ours, theirs in zip(
        network_of(again).state_dict().values(), network_of(draft).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_it_learned_is_used(tmp_path: Path) -> None:
    draft, adapted = drafting(), anydepth.attach(tiny_llama(), []).eval()
    texts, rates = texts_of(tmp_path / "text"), []
    for steps in (1, 120):
        config = DrafterConfig(max_steps=steps, batch_tokens=512, warmup_steps=3, learning_rate=3e-3)
        train_drafter(network_of(draft), adapted.backbone, texts, config, tmp_path / str(steps))
        engine, counts = FastEngine(adapted, draft=draft), DraftCounts()
        for number in range(12):  # texts that it has seen
            prompt = texts[number].ids[None, : texts[number].completion]
            engine.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
            assert engine.draft_counts is not None
            counts.add(engine.draft_counts)
        rates.append(counts.mean_acceptance_length)
    assert rates[1] > rates[0]


def test_batches_hold_every_text_once() -> None:
    texts = [Text(torch.zeros(length, dtype=torch.long), torch.zeros(length, 1, 4), 1, 1) for length in range(5, 60)]
    batches = batches_of(texts, 200, torch.Generator().manual_seed(0))
    assert sorted(number for batch in batches for number in batch) == list(range(55))
    assert all(len(batch) * max(len(texts[i].ids) for i in batch) <= 200 for batch in batches)


def test_a_shipped_drafter_is_found_by_the_weights_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.shipped.folder", lambda: tmp_path)
    draft, adapted = drafting(), anydepth.attach(tiny_llama(), [])
    network_of(draft).vocabulary.copy_(torch.arange(7, 67))
    ship(adapted, draft, tmp_path / "tiny", {"seed": 0})
    packed = load_file(tmp_path / "tiny" / "drafter.safetensors")
    assert sum(part.dtype == torch.int8 for part in packed.values()) == 9  # two linear layers, seven of the layer
    found = default_draft(anydepth.attach(tiny_llama(), []))
    assert found.config.network is not None and found.config.network.taps == [2, 6]
    assert default_draft(anydepth.attach(tiny_llama(seed=5), [])).network is None
    for name, value in network_of(draft).state_dict().items():
        ours = network_of(found).state_dict()[name]
        if value.dtype == torch.long:
            assert torch.equal(ours, value)
        else:
            assert (ours - value).norm() <= 0.02 * value.norm()
    assert set(unpack(pack(network_of(draft).state_dict()))) == set(network_of(draft).state_dict())
