"""The analysis says of planted decisions what was planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import HFEngine
from anydepth.gating.scores import Known
from anydepth.gating.spec import GateSpec
from anydepth.measure.analyze import analyze, observe, token_classes
from anydepth.measure.evaluate import evaluate
from anydepth.methods._base.method import Method
from tiny import byte_tokenizer, tiny_llama

TEXT = "The sea is 12 miles wide, and the night is long.\n\nIt was a light that came back 3 times (or so). " * 4


class ByLetter(Method):
    """Skips layers 2 and 3 for the letter e."""

    Config = anydepth.SkipSet.Config
    name = "by_letter"

    def gates(self) -> list[GateSpec]:
        score = Known(2, lambda context: (self.letters_of(context) != ord("e")).float().expand(2, -1, -1))
        return [GateSpec((2, 3), "layer", score, 0.5)]


def windows(length: int = 60) -> Tensor:
    ids = byte_tokenizer()(TEXT, return_tensors="pt")["input_ids"][0]
    return ids[: len(ids) // length * length].view(-1, length)


@pytest.fixture
def by_letter(monkeypatch: pytest.MonkeyPatch) -> anydepth.AdaptedModel:
    from anydepth.methods import METHODS

    monkeypatch.setitem(METHODS, "by_letter", ByLetter)
    monkeypatch.setattr(ByLetter, "Config", type("LetterConfig", (anydepth.SkipSet.Config,), {}))
    adapted = anydepth.attach(tiny_llama(), {"name": "by_letter"})
    seen: dict[str, Tensor] = {}

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen["ids"] = args[0] if args else kwargs["input_ids"]

    adapted.model.register_forward_pre_hook(note, with_kwargs=True)
    letter = byte_tokenizer()("e")["input_ids"][0]
    adapted.methods["by_letter"].letters_of = lambda context: torch.where(seen["ids"] == letter, ord("e"), 0)
    return adapted


def test_depth_that_depends_on_the_token_is_found(by_letter: anydepth.AdaptedModel) -> None:
    result = analyze(by_letter, byte_tokenizer(), windows(), num_permutations=49)
    share = float((windows() == byte_tokenizer()("e")["input_ids"][0]).float().mean())
    assert result["depth"]["mean"] == pytest.approx(6 - 2 * share)
    assert result["depth"]["low"] <= result["depth"]["mean"] <= result["depth"]["high"]
    rows = result["per_layer"]
    assert [row["mixer"]["mean"] for row in rows] == pytest.approx([1, 1, 1 - share, 1 - share, 1, 1])
    assert rows[2]["ffn"] == rows[2]["mixer"]
    found = result["conditionality"]
    assert found["p_value"] == 0.02 and found["num_gates"] == 1
    assert found["mutual_information_bits"] > 5 * found["static_bits"]


def test_sums_over_bins_are_all_tokens(by_letter: anydepth.AdaptedModel) -> None:
    result = analyze(by_letter, byte_tokenizer(), windows(), num_permutations=9)
    for rows in (
        result["positions"],
        [row for row in result["token_classes"] if row["class"] not in ("rare", "high-loss")],
    ):
        assert sum(row["num_tokens"] for row in rows) == windows().numel()
        total = sum(row["num_tokens"] * row["depth"]["mean"] for row in rows)
        assert total == pytest.approx(windows().numel() * result["depth"]["mean"])
    assert sum(row["num_tokens"] for row in result["losses"]["bins"]) == windows()[:, 1:].numel()
    assert [row["length"] for row in result["lengths"]] == [3, 15, 60]


@torch.no_grad()
def test_losses_are_those_of_full_depth(by_letter: anydepth.AdaptedModel) -> None:
    seen = observe(by_letter, windows())
    logits = tiny_llama()(windows()).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows()[:, 1:], reduction="none")
    assert torch.allclose(seen.losses[:, :-1], wanted, atol=1e-5)
    assert seen.losses[:, -1].isnan().all()


def test_static_skips_depend_on_nothing() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [2]})
    result = analyze(adapted, byte_tokenizer(), windows(), num_permutations=9)
    assert result["conditionality"]["num_gates"] == 0
    assert result["losses"]["rank_correlation"] is None
    assert {row["depth"]["mean"] for row in result["token_classes"]} == {5.0}


def test_seeds_are_compared_beyond_chance() -> None:
    def random_router(seed: int) -> anydepth.AdaptedModel:
        spec = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.5] * 4, "seed": seed}
        return anydepth.attach(tiny_llama(), spec)

    others = [random_router(seed) for seed in (0, 1)]
    rows = analyze(random_router(0), byte_tokenizer(), windows(), others=others, num_permutations=9)["seeds"]
    assert [(row["first"], row["second"]) for row in rows] == [(0, 1), (0, 2), (1, 2)]
    assert rows[0]["agreement"] == rows[0]["kappa"] == 1.0
    assert abs(rows[1]["kappa"]) < 0.25 and abs(rows[1]["agreement"] - rows[1]["by_chance"]) < 0.1


def test_classes_of_tokens_by_what_they_are() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("an 1,\n a", return_tensors="pt")["input_ids"]
    classes = token_classes(ids, tokenizer)
    named = [next(name for name, among in classes.items() if among[0, place]) for place in range(ids.shape[1])]
    assert named == [
        "stop word", "sub-word", "whitespace", "numeric", "punctuation", "whitespace", "whitespace", "stop word",
    ]  # fmt: skip


def test_flops_a_token_are_next_to_those_of_full_depth() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [2]})
    windows = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    found = analyze(adapted, byte_tokenizer(), windows, num_permutations=9)
    scored = evaluate(HFEngine(adapted), windows)
    assert found["gflops_per_token"] == pytest.approx(scored["gflops_per_token"])
    assert found["full_depth"]["gflops_per_token"] == pytest.approx(scored["full_depth"]["gflops_per_token"])
