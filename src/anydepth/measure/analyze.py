"""Depth by layer, class of token, position, length and loss, and whether it depends on the token at all.

A token's depth counts the layers that ran for it as an input; its loss is the base model's for the next token.
Intervals are 95%, from how windows differ from each other: tokens of one window are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from anydepth.gating import cost
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.conditionality import conditionality
from anydepth.measure.samples import Track, correlations, full_depth_losses
from anydepth.statistics import mean_of, rank_correlation
from anydepth.training.diagnostics import GateDecisions, described, gate_decisions, joined

NUM_BINS = 8
COMMON = (
    "a about after all also an and any are as at be been before but by can could did do does for from had has have he "
    "her his how i if in into is it its may more most no not of on one only or other our out over s she so some such t "
    "than that the their them then there these they this those to under up was we were what when where which will with "
    "would you your"
)
STOP_WORDS = {*COMMON.split(), "who"}


@dataclass(frozen=True)
class Observed:
    """The branches that ran for the tokens of (W, T) windows.

    Attributes:
        gates: (2L, W, T) bool, mixers of all layers, then FFNs. keep: true too where a token took an alternate mixer.
        losses: (W, T), nats, of the next token under the base model; NaN at the last position.
    """

    token_ids: Tensor
    gates: Tensor
    keep: Tensor
    depths: Tensor
    flops: int
    losses: Tensor
    decisions: list[GateDecisions]


@torch.no_grad()
def observe(adapted: AdaptedModel, windows: Tensor, track: Track = iter) -> Observed:
    """Run each of (W, T) windows by itself, with routing on and through the base model."""
    adapted.eval()
    gates, keeps, depths, losses, decisions, flops = [], [], [], [], [], 0
    for window in track(windows):
        token_ids = window[None].to(adapted.device)
        losses.append(F.pad(full_depth_losses(adapted, token_ids), (0, 1), value=float("nan")))
        adapted(input_ids=token_ids, use_cache=False)
        trace = adapted.last_trace
        gates.append(torch.cat([trace.mixer_keep[:, 0], trace.ffn_keep[:, 0]]).cpu())
        keeps.append(torch.cat([(trace.mixer_keep | trace.other_keep)[:, 0], trace.ffn_keep[:, 0]]).cpu())
        depths.append(trace.depths[0].cpu())
        decisions.append(gate_decisions(trace, adapted.active_methods))
        flops += cost.flops(adapted.backbone, trace).total
    by_layer = torch.stack(gates, dim=1), torch.stack(keeps, dim=1)
    return Observed(windows.cpu(), *by_layer, torch.stack(depths), flops, torch.stack(losses), joined(decisions))


def analyze(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    *,
    texts: Sequence[str] = (),
    num_samples: int = 64,
    others: Sequence[AdaptedModel] = (),
    num_permutations: int = 199,
    seed: int = 0,
    track: Track = iter,
) -> dict[str, Any]:
    """Return the fields of `anydepth.analyze/1` for (W, T) windows.

    For `correlations`, `num_samples` of the texts are run by themselves, at most T tokens each. `others` are the same
    method from other seeds; its gates are compared on the same text.
    """
    seen = observe(adapted, windows, track)
    limits: dict[str, Any] = {"limit": num_samples, "max_tokens": windows.shape[1], "track": track}
    by_sample = correlations(adapted, tokenizer, texts, **limits) if texts and num_samples else None
    num_tokens = windows.shape[1]
    full_depth = cost.flops(adapted.backbone, cost.full_depth_trace(adapted.backbone, num_tokens)).total
    everywhere = torch.ones_like(seen.depths, dtype=torch.bool)
    return {
        "num_windows": len(windows),
        **_row(seen, everywhere),
        "gflops_per_token": seen.flops / windows.numel() / 1e9,
        "full_depth": {"gflops_per_token": full_depth / num_tokens / 1e9},
        "per_layer": _by_layer(seen, everywhere),
        "token_classes": _by_class(seen, tokenizer),
        "positions": _by_position(seen),
        "lengths": _by_length(adapted, seen),
        "losses": _by_loss(seen),
        "gates": described(seen.decisions, adapted.active_methods),
        "correlations": by_sample,
        "conditionality": _conditionality(seen, num_permutations, seed),
        "seeds": _seeds([seen, *(observe(other, windows) for other in others)]),
    }


def _row(seen: Observed, among: Tensor) -> dict[str, Any]:
    return {"num_tokens": int(among.sum()), "depth": mean_of(seen.depths, among, most=len(seen.keep) // 2)}


def _by_layer(seen: Observed, everywhere: Tensor) -> list[dict[str, Any]]:
    num_layers = len(seen.keep) // 2
    mixers, ffns = ([mean_of(keep.float(), everywhere, most=1) for keep in half] for half in seen.keep.chunk(2))
    return [{"layer": i, "mixer": mixers[i], "ffn": ffns[i]} for i in range(num_layers)]


def _by_class(seen: Observed, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    classes = token_classes(seen.token_ids, tokenizer)
    known = ~seen.losses.isnan()
    hard = seen.losses >= torch.quantile(seen.losses[known], 0.9)
    return [
        {"class": name, **_row(seen, among)}
        for name, among in {**classes, "high-loss": hard & known}.items()
        if among.any()
    ]


def token_classes(token_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return for each class which of (W, T) token ids belong to it, as (W, T) bool.

    Each token is one of `whitespace`, `punctuation`, `numeric`, `stop word`, `sub-word` (continues a word) and `word`;
    any of them can also be `rare`: among the rarest ids that make up a tenth of this text.
    """
    names = ("whitespace", "punctuation", "numeric", "stop word", "sub-word", "word")
    kinds = torch.zeros_like(token_ids)
    for row, ids in enumerate(token_ids.tolist()):
        before = ""
        for column, token_id in enumerate(ids):
            text = _text(tokenizer, ids[column - 1] if column else None, token_id)
            kinds[row, column] = names.index(_kind(text, before))
            before = text
    ids, inverse, counts = token_ids.unique(return_inverse=True, return_counts=True)
    order = counts.argsort()
    rarest = torch.zeros(len(ids), dtype=torch.bool)
    rarest[order] = counts[order].cumsum(0) <= token_ids.numel() / 10
    return {**{name: kinds == number for number, name in enumerate(names)}, "rare": rarest[inverse]}


def _text(tokenizer: PreTrainedTokenizerBase, before: int | None, token_id: int) -> str:
    """Return a token's text after another token: many tokenizers drop a leading space when they decode one alone."""
    alone = str(tokenizer.decode([token_id]))
    if before is None:
        return alone
    first, both = str(tokenizer.decode([before])), str(tokenizer.decode([before, token_id]))
    return both.removeprefix(first) if both.startswith(first) else alone


def _kind(text: str, before: str) -> str:
    word = text.strip()
    if not word:
        return "whitespace"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    if not any(letter.isalpha() for letter in word):
        return "numeric"
    if text[0].isalpha() and before[-1:].isalpha():
        return "sub-word"
    return "stop word" if word.lower() in STOP_WORDS else "word"


def _by_position(seen: Observed) -> list[dict[str, Any]]:
    """Return the depth in bins of positions that double in length, because depth changes most at the start."""
    num_tokens = seen.depths.shape[1]
    starts = [0, *(2**power for power in range(num_tokens.bit_length()) if 2**power < num_tokens)]
    position = torch.arange(num_tokens).expand_as(seen.depths)
    return [
        {"first": first, "last": end - 1, **_row(seen, (position >= first) & (position < end))}
        for first, end in zip(starts, [*starts[1:], num_tokens], strict=True)
    ]


def _by_length(adapted: AdaptedModel, seen: Observed) -> list[dict[str, Any]]:
    """Return the depth of the same texts cut at several lengths, which a router that pools over its sequence sees."""
    full_length = seen.token_ids.shape[1]
    rows = []
    for length in sorted({full_length // part for part in (1, 4, 16)} - {0, 1}):
        depths = seen.depths if length == full_length else _depths(adapted, seen.token_ids[:, :length])
        everywhere = torch.ones_like(depths, dtype=torch.bool)
        rows.append({"length": length, **_row(replace(seen, depths=depths), everywhere)})
    return rows


@torch.no_grad()
def _depths(adapted: AdaptedModel, windows: Tensor) -> Tensor:
    depths = []
    for window in windows:
        adapted(input_ids=window[None].to(adapted.device), use_cache=False)
        depths.append(adapted.last_trace.depths[0].cpu())
    return torch.stack(depths)


def _by_loss(seen: Observed) -> dict[str, Any]:
    """Return the depth in bins of equally many tokens by loss, and the rank correlation of depth and loss."""
    known = ~seen.losses.isnan()
    losses, depths = seen.losses[known], seen.depths[known]
    edges = torch.quantile(losses, torch.linspace(0, 1, NUM_BINS + 1))
    bin_idx = torch.bucketize(seen.losses, edges[1:-1], right=True).masked_fill(~known, -1)
    bins = [
        {"low": float(edges[number]), "high": float(edges[number + 1]), **_row(seen, bin_idx == number)}
        for number in range(NUM_BINS)
        if (bin_idx == number).any()
    ]
    return {"bins": bins, "rank_correlation": rank_correlation(losses, depths)}


def _conditionality(seen: Observed, num_permutations: int, seed: int) -> dict[str, Any]:
    gates = seen.gates.flatten(1)
    windows = torch.arange(len(seen.token_ids)).repeat_interleave(seen.token_ids.shape[1])
    distinct = torch.unique(gates, dim=0)  # a layer's gate counts once, not for its mixer and its FFN
    return asdict(
        conditionality(distinct, seen.token_ids.flatten(), groups=windows, num_permutations=num_permutations, seed=seed)
    )


def _seeds(runs: list[Observed]) -> list[dict[str, Any]]:
    """Return for each pair of runs how often their gates agree, the chance level at these rates, and Cohen's kappa."""
    rows = []
    for (first, a), (second, b) in combinations(enumerate(runs), 2):
        ours, theirs = a.gates.flatten(1), b.gates.flatten(1)
        rates = ours.double().mean(1), theirs.double().mean(1)
        agreement = float((ours == theirs).double().mean())
        chance = float((rates[0] * rates[1] + (1 - rates[0]) * (1 - rates[1])).mean())
        kappa = (agreement - chance) / (1 - chance) if chance < 1 else 1.0
        rows.append({"first": first, "second": second, "agreement": agreement, "by_chance": chance, "kappa": kappa})
    return rows
