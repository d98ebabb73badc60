"""One table of ways to run a model: each row is what its way says, full depth the yardstick of all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import anydepth
from anydepth import Draft, FastEngine, HFEngine
from anydepth.calibration.guarantee import inconsistency
from anydepth.measure.compare import compare, ways_of
from anydepth.report.page import write_report
from commands import anydepth as command
from tiny import NUM_LAYERS, save_base, save_text, tiny_llama

DRAFTS = {"exit_layers": [2]}
LABELS = ["full depth", "early_exit", "lossless", "full depth, int8"]


def table(
    thresholds: object, *, fast: bool, size: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[anydepth.AdaptedModel, list[dict[str, Any]]]:
    exits = {"name": "early_exit", "layers": [2, 4], "thresholds": thresholds}
    adapted = anydepth.attach(tiny_llama().to(dtype), exits).eval()
    ids = torch.randint(3, 200, (3, size, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]
    draft = Draft(adapted, DRAFTS)
    ways = ways_of(FastEngine(adapted, draft=draft) if fast else HFEngine(adapted, draft))
    return adapted, compare(ways, batches, ids.view(3 * size, 12), 8)


def test_exits_that_stay_shut_are_full_depth() -> None:
    """And lossless drafting has its tokens; only int8 may say something else."""
    _, rows = table([math.inf, math.inf], fast=True, dtype=torch.bfloat16)
    assert [row["label"] for row in rows] == LABELS
    assert [row["weights"] for row in rows] == ["bfloat16"] * 3 + ["int8"]
    for row in rows[:3]:
        assert row["identical_tokens"] and row["rouge_l"] == 1
        assert row["adapted"]["mean_depth"] == NUM_LAYERS and row["ideal_speedup"] == 1
        assert row["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-5)
    assert rows[2]["adapted"]["mean_acceptance_length"] >= 1 and rows[3]["adapted"]["mean_depth"] == NUM_LAYERS
    assert 0 < rows[3]["rouge_l"] <= 1 and rows[3]["perplexity"] != rows[0]["perplexity"]


@pytest.mark.parametrize("fast", [False, True])
def test_open_exits_show_in_depth_rouge_and_perplexity(fast: bool) -> None:
    """Depth, texts and losses from elsewhere: all tokens take the first exit, whose head is the model's own."""
    adapted, rows = table([0.0, 0.0], fast=fast, size=2)
    assert [row["label"] for row in rows] == LABELS[:3]  # int8 is of bfloat16 models
    full, early, lossless = rows[:3]
    assert early["adapted"]["mean_depth"] == 2 and early["ideal_speedup"] > 1 and not early["identical_tokens"]
    assert lossless["identical_tokens"] and lossless["perplexity"] == full["perplexity"]
    assert full["speedup"] == 1 and full["speedup_range"] == [1, 1]
    for row in rows:
        assert row["num_runs"] == 3 and row["batch_size"] == 2 and len(row["speedups"]) == 3
        assert row["full_depth"] == {key: full["adapted"][key] for key in row["full_depth"]}
    base, cut = tiny_llama(), tiny_llama()
    cut.model.layers = cut.model.layers[:2]
    cut.config.num_hidden_layers = 2
    ids = torch.randint(3, 200, (3, 2, 12), generator=torch.Generator().manual_seed(1)).view(6, 12)
    losses = [_loss(model, ids) for model in (base, cut)]
    assert full["perplexity"] == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert early["perplexity"] == pytest.approx(math.exp(losses[1]), rel=1e-4)
    ours, wanted = ([_continue(model, row) for row in ids] for model in (cut, base))
    distances = [inconsistency(a, b) for a, b in zip(ours, wanted, strict=True)]
    assert early["rouge_l"] == pytest.approx(1 - sum(distances) / len(distances))
    assert adapted.active_methods  # as before


@torch.no_grad()
def _loss(model: Any, ids: torch.Tensor) -> float:
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@torch.no_grad()
def _continue(model: Any, ids: torch.Tensor) -> list[int]:
    """Greedy, token by token, without a cache, up to the end token."""
    found: list[int] = []
    for _ in range(8):
        token = int(model(torch.cat([ids, torch.tensor(found, dtype=torch.long)])[None]).logits[0, -1].argmax())
        if token == 0:
            break
        found.append(token)
    return found


def test_the_command_prints_it_and_the_page_shows_it(tmp_path: Path) -> None:
    base, text = save_base(tmp_path / "base"), save_text(tmp_path / "text.txt")
    shared = ("bench", base, "--compare", "--data", text, "--prompt-tokens", 8, "--new-tokens", 4, "--num-runs", 2)
    shared = (*shared, "--dtype", "bfloat16")
    exits = ("--against", "early_exit", "--set", "layers=[2, 4]", "--set", "thresholds=[.inf, 0.1]")
    done = command(*shared, *exits, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.bench/1" and [row["label"] for row in document["rows"]] == LABELS
    assert document["rows"][1]["adapted"]["mean_depth"] < NUM_LAYERS
    html = write_report([document], tmp_path / "page.html")[0].read_text()
    assert all(word in html for word in ("ROUGE-L", *LABELS))
    done = command(*shared, "--engine", "hf")  # nothing attached: two rows are left
    assert done.returncode == 0 and "ROUGE-L" in done.stdout and "no row for int8" in done.stderr
    for wrong in (("--batch-sizes", "1,2"), ("--engine", "both"), ("--requests", 2), ("--weights", "int8,int4")):
        done = command("bench", tmp_path / "none", "--compare", *wrong)
        assert done.returncode == 2 and "--compare makes one table" in done.stderr
