"""The loss of a skip set on text that its search did not see, next to full depth with quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.engine.weights import CONTROLS
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.measure.evaluate import evaluate
from anydepth.methods.skip_set import SkipSetConfig
from anydepth.models.load import is_quantised
from anydepth.recipe import TextConfig
from anydepth.search.skip_search import SkipSearchResult
from anydepth.training.data import PACKED, load_windows


def split_windows(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_windows: int,
    *,
    text: TextConfig = PACKED,
) -> tuple[Tensor, Tensor]:
    """Return (N, T) windows to search on, and up to as many of the text after them, which the search does not see."""
    windows = load_windows(data, tokenizer, sequence_length, max_windows=2 * num_windows, text=text)
    return windows[:num_windows], windows[num_windows:]


def held_out(model: nn.Module, config: SkipSetConfig, windows: Tensor) -> dict[str, Any]:
    """Return the `held_out` field of `anydepth.search/1`: losses on (N, T) windows of the skip set and of alternatives.

    Each of `rows` has `label`, `loss` in nats per token, `perplexity`, and the `weight_bytes` that a decoded token
    reads. The rows are full depth, the skip set, and full depth with int8 and int4 weights, rounded to the nearest,
    where the fast engine runs them (on the model in bfloat16). `warning` reports an alternative that reads less and
    has no more loss.
    """
    if not len(windows):
        warning = (
            "no text is left that the search did not see, so its loss is unknown; give more text, or fewer windows"
        )
        return {"num_tokens": 0, "rows": [], "warning": warning}
    adapted = attach(model, config)
    try:
        found = evaluate(HFEngine(adapted), windows)
        rows = [_row("full depth", found["full_depth"], _bytes(adapted, SkipSetConfig()))]
        rows.append(_row("skip set", found, _bytes(adapted, config)))
        with _in_bfloat16(model), adapted.deciding():  # no method decides
            rows += [row for kind in CONTROLS if (row := _packed(adapted, kind, windows)) is not None]
    finally:
        detach(adapted)
    return {"num_tokens": found["num_tokens"], "rows": rows, "warning": _warning(rows)}


def search_fields(model: nn.Module, found: SkipSearchResult, unseen: Tensor) -> dict[str, Any]:
    """Return the fields of `anydepth.search/1`: the skip set, its search, and its loss on (N, T) unseen windows."""
    return {
        **found.config.model_dump(),
        "agreement": found.agreement,
        "seconds": found.seconds,
        "trajectory": found.trajectory,
        "held_out": held_out(model, found.config, unseen),
    }


def _row(label: str, scores: dict[str, Any], weight_bytes: int) -> dict[str, Any]:
    return {"label": label, "loss": scores["loss"], "perplexity": scores["perplexity"], "weight_bytes": weight_bytes}


def _packed(adapted: AdaptedModel, kind: str, windows: Tensor) -> dict[str, Any] | None:
    """Return the row of full depth with weights of a kind; None where the fast engine does not run them."""
    try:
        engine = FastEngine(adapted, kind)
    except UserError:
        return None
    layers, head = engine.weight_bytes()
    return _row(f"{kind} weights", evaluate(engine, windows), sum(map(sum, layers)) + head)


def _bytes(adapted: AdaptedModel, config: SkipSetConfig) -> int:
    """Return the bytes of weights that a decoded token reads, without the branches that a skip set leaves out."""
    total = cost.weight_bytes(adapted.backbone.head)
    for view in adapted.backbone.layers:
        mixer, ffn = cost.branch_weight_bytes(view)
        total += mixer * (view.layer_idx not in (*config.skip_layers, *config.skip_mixers))
        total += ffn * (view.layer_idx not in (*config.skip_layers, *config.skip_ffns))
    return total


@contextmanager
def _in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Run the model with weights rounded to bfloat16; restore its own weights afterwards."""
    own = {} if is_quantised(model) else {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter, data in own.items():
            parameter.data = data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data


def _warning(rows: list[dict[str, Any]]) -> str | None:
    found = rows[1]
    better = [row for row in rows[2:] if row["loss"] <= found["loss"] and row["weight_bytes"] <= found["weight_bytes"]]
    if not better:
        return None
    best = min(better, key=lambda row: row["loss"])
    return (
        f"{best['label']} at full depth read fewer bytes and have no more loss than this skip set: perplexity "
        f"{best['perplexity']:.4g} against {found['perplexity']:.4g} (full depth {rows[0]['perplexity']:.4g}); "
        f"prefer --weights {best['label'].split()[0]}, or leave out less"
    )
