"""Where depth goes: by layer, class of token, position, length and loss; and whether it depends on the token at all.

A token's depth is what ran for it as an input; its loss is that of the untouched model for the token behind it.
Intervals are 95% bootstraps over windows, whose tokens are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from anydepth.execution.adapted import AdaptedModel
from anydepth.measure.conditionality import conditionality

NUM_RESAMPLES = 1000
NUM_BINS = 8
STOP_WORDS = (
    "a about after all also an and any are as at be been before but by can could did do does for from had has have he "
    "her his how i if in into is it its may more most no not of on one only or other our out over s she so some such "
    "t than that the their them then there these they this those to under up was we were what when where which who "
    "will with would you your"
)


@dataclass(frozen=True)
class Observed:
    """What ran for the tokens of (W, T) windows.

    Attributes:
        keep: (2L, W, T) bool, mixers of all layers, then FFNs. depths: (W, T), layers.
        losses: (W, T), nats, of the token behind at full depth; NaN at the last place.
    """

    token_ids: Tensor
    keep: Tensor
    depths: Tensor
    losses: Tensor


@torch.no_grad()
def observe(adapted: AdaptedModel, windows: Tensor) -> Observed:
    """Run each of (W, T) windows by itself, with routing on and untouched."""
    adapted.eval()
    keeps, depths, losses = [], [], []
    for window in windows:
        ids = window[None].to(adapted.device)
        with adapted.untouched():
            logits = adapted(input_ids=ids, use_cache=False).logits[0, :-1].float()
        behind = F.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()
        losses.append(F.pad(behind, (0, 1), value=float("nan")))
        adapted(input_ids=ids, use_cache=False)
        trace = adapted.last_trace
        keeps.append(torch.cat([trace.mixer_keep[:, 0], trace.ffn_keep[:, 0]]).cpu())
        depths.append(trace.depths[0].cpu())
    return Observed(windows.cpu(), torch.stack(keeps, dim=1), torch.stack(depths), torch.stack(losses))


def analyze(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    *,
    others: Sequence[AdaptedModel] = (),
    num_permutations: int = 199,
    seed: int = 0,
) -> dict[str, Any]:
    """The fields of `anydepth.analyze/1` for (W, T) windows.

    Args:
        others: the same method from other seeds, whose gates are compared on the same text.
    """
    seen = observe(adapted, windows)
    resample = Bootstrap(len(windows), seed)
    num_layers = len(seen.keep) // 2
    everywhere = torch.ones_like(seen.depths, dtype=torch.bool)
    rows = [
        {
            "layer": layer_idx,
            **{
                branch: resample.mean(seen.keep[layer_idx + offset].float(), everywhere)
                for branch, offset in (("mixer", 0), ("ffn", num_layers))
            },
        }
        for layer_idx in range(num_layers)
    ]
    return {
        "num_windows": len(windows),
        "num_tokens": windows.numel(),
        "depth": resample.mean(seen.depths, everywhere),
        "per_layer": rows,
        "token_classes": _by_class(seen, tokenizer, resample),
        "positions": _by_position(seen, resample),
        "lengths": _by_length(adapted, windows, seed),
        "losses": _by_loss(seen, resample),
        "conditionality": _conditionality(seen, num_permutations, seed),
        "seeds": _seeds([seen, *(observe(other, windows) for other in others)]),
    }


class Bootstrap:
    """Means over tokens with intervals from resampled windows, the same resamples for all of them."""

    def __init__(self, num_windows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(num_windows, (NUM_RESAMPLES, num_windows), generator=generator)
        self.weights = torch.zeros(NUM_RESAMPLES, num_windows).scatter_add_(1, drawn, torch.ones(drawn.shape)).double()

    def mean(self, values: Tensor, among: Tensor) -> dict[str, float]:
        """`mean`, `low` and `high` of (W, T) values where `among` is true."""
        sums, counts = torch.where(among, values, 0).double().sum(1), among.double().sum(1)
        totals = self.weights @ counts
        means = (self.weights @ sums)[totals > 0] / totals[totals > 0]
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
        return {"mean": float(sums.sum() / counts.sum()), "low": low, "high": high}


def _row(seen: Observed, among: Tensor, resample: Bootstrap) -> dict[str, Any]:
    return {"num_tokens": int(among.sum()), "depth": resample.mean(seen.depths, among)}


def _by_class(seen: Observed, tokenizer: PreTrainedTokenizerBase, resample: Bootstrap) -> list[dict[str, Any]]:
    classes = token_classes(seen.token_ids, tokenizer)
    known = ~seen.losses.isnan()
    hard = seen.losses >= torch.quantile(seen.losses[known], 0.9)
    return [
        {"class": name, **_row(seen, among, resample)}
        for name, among in {**classes, "high-loss": hard & known}.items()
        if among.any()
    ]


def token_classes(token_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Of (W, T) token ids, (W, T) bool by class.

    Each token is one of `whitespace`, `punctuation`, `numeric`, `stop word`, `sub-word` (goes on with a word that has
    begun) and `word`; any of them may be `rare`, too: among the rarest ids that make up a tenth of this text.
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
    """A token as it reads behind another one: alone, many tokenizers drop the space in front of a word."""
    alone = str(tokenizer.decode([token_id]))
    if before is None:
        return alone
    first, both = str(tokenizer.decode([before])), str(tokenizer.decode([before, token_id]))
    return both.removeprefix(first) if both.startswith(first) else alone


def _kind(text: str, before: str) -> str:
    """The class of a token from its text and that of the token before it."""
    word = text.strip()
    if not word:
        return "whitespace"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    if not any(letter.isalpha() for letter in word):
        return "numeric"
    if text[0].isalpha() and before[-1:].isalpha():
        return "sub-word"
    return "stop word" if word.lower() in STOP_WORDS.split() else "word"


def _by_position(seen: Observed, resample: Bootstrap) -> list[dict[str, Any]]:
    """Bins that double in length: what happens, happens early."""
    num_tokens = seen.depths.shape[1]
    starts = [0, *(2**power for power in range(num_tokens.bit_length()) if 2**power < num_tokens)]
    place = torch.arange(num_tokens).expand_as(seen.depths)
    return [
        {"first": first, "last": end - 1, **_row(seen, (place >= first) & (place < end), resample)}
        for first, end in zip(starts, [*starts[1:], num_tokens], strict=True)
    ]


def _by_length(adapted: AdaptedModel, windows: Tensor, seed: int) -> list[dict[str, Any]]:
    """The same texts, cut at several lengths: a router that pools over its sequence decides otherwise for each."""
    rows = []
    for length in sorted({windows.shape[1] // share for share in (1, 4, 16)} - {0, 1}):
        seen = observe(adapted, windows[:, :length])
        everywhere = torch.ones_like(seen.depths, dtype=torch.bool)
        rows.append({"length": length, **_row(seen, everywhere, Bootstrap(len(windows), seed))})
    return rows


def _by_loss(seen: Observed, resample: Bootstrap) -> dict[str, Any]:
    """Depth of tokens in bins of equally many by loss, and the rank correlation of the two."""
    known = ~seen.losses.isnan()
    losses, depths = seen.losses[known], seen.depths[known]
    edges = torch.quantile(losses, torch.linspace(0, 1, NUM_BINS + 1))
    place = torch.bucketize(seen.losses, edges[1:-1], right=True).masked_fill(~known, -1)
    bins = [
        {"low": float(edges[number]), "high": float(edges[number + 1]), **_row(seen, place == number, resample)}
        for number in range(NUM_BINS)
        if (place == number).any()
    ]
    return {"bins": bins, "rank_correlation": _rank_correlation(losses, depths)}


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, ties at their mean rank; 0 where one of the two is constant."""
    if a.min() == a.max() or b.min() == b.max():
        return 0.0
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts - 1) / 2).double()[inverse]


def _conditionality(seen: Observed, num_permutations: int, seed: int) -> dict[str, Any]:
    keep = seen.keep.flatten(1)
    windows = torch.arange(len(seen.token_ids)).repeat_interleave(seen.token_ids.shape[1])
    distinct = torch.unique(keep, dim=0)  # a layer's gate counts once, not for its mixer and its FFN
    return conditionality(
        distinct, seen.token_ids.flatten(), groups=windows, num_permutations=num_permutations, seed=seed
    ).to_json()


def _seeds(runs: list[Observed]) -> list[dict[str, Any]]:
    """Of each pair: how often their gates agree, how often they would by chance at these rates, and Cohen's kappa."""
    rows = []
    for (first, a), (second, b) in combinations(enumerate(runs), 2):
        ours, theirs = a.keep.flatten(1), b.keep.flatten(1)
        rates = ours.double().mean(1), theirs.double().mean(1)
        agreement = float((ours == theirs).double().mean())
        chance = float((rates[0] * rates[1] + (1 - rates[0]) * (1 - rates[1])).mean())
        kappa = (agreement - chance) / (1 - chance) if chance < 1 else 1.0
        rows.append({"first": first, "second": second, "agreement": agreement, "by_chance": chance, "kappa": kappa})
    return rows
