"""A model's own text, and drafters that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anydepth
from anydepth import FastEngine
from anydepth.engine.model import EngineModel
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods.self_speculation import SelfSpeculation
from anydepth.recipe import DrafterConfig, OwnTextConfig
from anydepth.speculation.drafter_training import DraftTraining, batches_of, collate, train_drafter
from anydepth.speculation.drafters import Trained
from anydepth.speculation.self_generated import Template, Text, Writer, own_texts
from anydepth.speculation.shipped import load_shipped, pack, ship, shipped_drafter, unpack
from anydepth.speculation.speculate import Counts
from anydepth.speculation.targets import EngineTarget, Row
from tiny import byte_tokenizer, tiny_llama

CONFIG = OwnTextConfig(num_tokens=1200, max_question=6, max_answer=12, num_slots=5)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def speculating(taps: list[int] | None = None) -> AdaptedModel:
    network = {"taps": taps or [2, 6], "vocabulary_size": 60}
    return anydepth.attach(
        tiny_llama(), {"name": "self_speculation", "lookup": False, "adaptive": False, "network": network}
    ).eval()


def network_of(adapted: AdaptedModel) -> Any:
    method = adapted.methods["self_speculation"]
    assert isinstance(method, SelfSpeculation) and method.network is not None
    return method.network


def texts_of(adapted: AdaptedModel, folder: Path, *, chat: bool = True) -> list[Text]:
    tokenizer = byte_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT
    texts, seconds = own_texts(adapted, tokenizer, network_of(adapted).taps, CONFIG, folder)
    assert seconds > 0
    return texts


@torch.no_grad()
@pytest.mark.parametrize("chat", [True, False])
def test_states_are_those_of_the_model_and_answers_are_greedy(chat: bool, tmp_path: Path) -> None:
    adapted = speculating()
    texts = texts_of(adapted, tmp_path, chat=chat)
    assert sum(len(text.ids) for text in texts) >= 1200
    assert len({tuple(text.ids.tolist()) for text in texts}) == len(texts)
    model: Any = adapted.model
    for text in texts[:8]:
        output = model(text.ids[None], output_hidden_states=True)
        assert torch.allclose(text.states[:, 0], output.hidden_states[2][0], atol=1e-4)
        assert torch.allclose(model.model.norm(text.states[:, 1]), output.hidden_states[-1][0], atol=1e-4)
        said = output.logits[0].argmax(-1)[text.answer - 1 : -1]
        assert torch.equal(said, text.ids[text.answer :])
        if chat:
            assert byte_tokenizer().decode(text.ids[: text.question]) == "<user>"
            shown = byte_tokenizer().decode(text.ids[: text.answer])
            assert shown.startswith("<user>") and shown.endswith("|<bot>") and shown.count("<bot>") == 1


def test_writing_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.self_generated.SHARD_TOKENS", 400)
    adapted = speculating()
    whole = texts_of(adapted, tmp_path / "whole")
    own, calls = Writer.step, []

    def stops(self: Writer) -> Any:
        calls.append(0)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return own(self)

    monkeypatch.setattr(Writer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        texts_of(adapted, tmp_path / "stopped")
    monkeypatch.setattr(Writer, "step", own)
    again = texts_of(adapted, tmp_path / "stopped")
    assert len(list((tmp_path / "stopped").iterdir())) == 3
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(whole, again, strict=True))


def test_templates() -> None:
    tokenizer = byte_tokenizer()
    assert Template.of(tokenizer) == Template([0], [], frozenset([0]))
    tokenizer.chat_template = CHAT
    template = Template.of(tokenizer)
    assert tokenizer.decode(template.opening) == "<user>" and tokenizer.decode(template.between) == "|<bot>"
    assert template.ends == frozenset([0, template.between[0]])


@torch.no_grad()
def test_training_sees_what_the_engine_computes(tmp_path: Path) -> None:
    """The guesses of a whole text at once are those that the drafter makes behind each of its tokens."""
    adapted = speculating()
    engine = EngineModel(adapted.backbone)
    text = max(texts_of(adapted, tmp_path), key=lambda one: len(one.ids))
    network = network_of(adapted)
    torch.nn.init.normal_(network.join.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    network.vocabulary.copy_(torch.arange(40, 100))
    seen: list[torch.Tensor] = []
    training = DraftTraining(network, adapted.backbone, num_guesses=3)
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
    drafter = Trained(engine, network)
    for end in range(2, len(text.ids) - 3):
        target = EngineTarget(engine, 1, network.taps)
        drafter.start(target, 1)
        row = Row(text.ids[: end + 1].tolist(), slot=0)
        row.fresh = list(text.states[:end].unbind(1))
        drafter.settle([row])
        for number in range(3):
            found: list[torch.Tensor] = []

            def choose(rows: Any, logits: torch.Tensor, vocabulary: Any, found: Any = found) -> Any:
                found.append(logits[0])
                return [0], [0.5]

            drafter.guess([row], choose)
            wanted = guesses[number][0, end - 1]
            assert torch.allclose(found[0], wanted, atol=1e-4, rtol=1e-4)
            row.draft.append(int(text.ids[end + 1 + number]))


@torch.no_grad()
def test_the_drafter_reads_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths as well: what it has read is what the model has seen."""
    adapted = speculating()
    engine, seen = FastEngine(adapted), []
    own = Trained._inputs

    def noted(self: Trained, row: Row, cache: Any) -> Any:
        inputs = own(self, row, cache)
        if not row.draft:
            seen.append((row.slot, self.rows[row.slot].num_read, len(inputs), row.num_seen))
        return inputs

    monkeypatch.setattr(Trained, "_inputs", noted)
    ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    engine.generate(input_ids=ids * mask, attention_mask=mask, **options)
    assert {slot: number for slot, before, number, _ in seen if not before} == {0: 14, 1: 9}
    assert all(before + number == known for _, before, number, known in seen)


@torch.no_grad()
def test_the_drafter_reads_the_end_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.drafters.LOOK_BACK", 9)
    engine = EngineModel(speculating().backbone)
    network = network_of(speculating())
    drafter, guesses = Trained(engine, network), []
    ids = torch.randint(3, 200, (30,), generator=torch.Generator().manual_seed(0)).tolist()

    def choose(rows: Any, logits: torch.Tensor, vocabulary: Any) -> Any:
        guesses.append(logits)
        return [0], [0.5]

    for states in (torch.randn(29, 2, engine.backbone.hidden_size, generator=torch.Generator().manual_seed(1)),) * 2:
        drafter.start(EngineTarget(engine, 1, network.taps), 1)
        row = Row(ids, slot=0)
        row.fresh = list((states if not guesses else states * (torch.arange(29) >= 20)[:, None, None]).unbind(1))
        drafter.settle([row])
        drafter.guess([row], choose)
        drafter.stop()
    assert torch.equal(*guesses)


def test_a_drafter_learns_and_resumes_bitwise(tmp_path: Path) -> None:
    config = DrafterConfig(max_steps=30, batch_tokens=256, warmup_steps=3, save_every=10, precision="float32")
    adapted = speculating()
    texts = texts_of(adapted, tmp_path / "text")
    history = train_drafter(network_of(adapted), adapted.backbone, texts, config, tmp_path / "a")
    first, last = (sum(row["loss"] for row in part) / 5 for part in (history[:5], history[-5:]))
    assert last < 0.8 * first and len(history) == 30
    other = speculating()
    stopped: list[int] = []

    def stop(row: dict[str, float]) -> None:
        stopped.append(0)
        if len(stopped) == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_drafter(network_of(other), other.backbone, texts, config, tmp_path / "b", on_step=stop)
    again = speculating()
    resumed = train_drafter(network_of(again), again.backbone, texts, config, tmp_path / "b", resume=True)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in history]
    for ours, theirs in zip(
        network_of(again).state_dict().values(), network_of(adapted).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_it_learned_is_used(tmp_path: Path) -> None:
    adapted = speculating()
    texts = texts_of(adapted, tmp_path / "text")
    rates = []
    for steps in (1, 120):
        config = DrafterConfig(max_steps=steps, batch_tokens=512, warmup_steps=3, learning_rate=3e-3)
        train_drafter(network_of(adapted), adapted.backbone, texts, config, tmp_path / str(steps))
        engine, counts = FastEngine(adapted), Counts()
        for number in range(12):  # texts that it has seen
            prompt = texts[number].ids[None, : texts[number].answer]
            engine.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
            counts.add(adapted.draft_counts)
        rates.append(counts.mean_acceptance_length)
    assert rates[1] > rates[0]


def test_batches_hold_every_text_once() -> None:
    texts = [Text(torch.zeros(length, dtype=torch.long), torch.zeros(length, 1, 4), 1, 1) for length in range(5, 60)]
    batches = batches_of(texts, 200, torch.Generator().manual_seed(0))
    assert sorted(number for batch in batches for number in batch) == list(range(55))
    assert all(len(batch) * max(len(texts[i].ids) for i in batch) <= 200 for batch in batches)


def test_a_shipped_drafter_is_found_by_the_weights_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.shipped.folder", lambda: tmp_path)
    adapted = speculating()
    network_of(adapted).vocabulary.copy_(torch.arange(7, 67))
    ship(adapted, tmp_path / "tiny", {"seed": 0})
    packed = load_file(tmp_path / "tiny" / "drafter.safetensors")
    assert sum(part.dtype == torch.int8 for part in packed.values()) == 9  # two maps, seven of the layer
    found = shipped_drafter(tiny_llama())
    assert found is not None and found.options["network"]["taps"] == [2, 6]
    assert shipped_drafter(tiny_llama(seed=5)) is None
    again = anydepth.attach(tiny_llama(), found.options)
    load_shipped(again, found)
    for name, value in network_of(adapted).state_dict().items():
        ours = network_of(again).state_dict()[name]
        if value.dtype == torch.long:
            assert torch.equal(ours, value)
        else:
            assert (ours - value).norm() <= 0.02 * value.norm()
    assert set(unpack(pack(network_of(adapted).state_dict()))) == set(network_of(adapted).state_dict())
