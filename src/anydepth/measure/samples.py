"""The depth of each text, next to its length, its perplexity and the rarity of its tokens.

A sample is a document of the corpus, never a packed window; where documents are few or long, a paragraph.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from anydepth.gating import cost
from anydepth.hf.adapted import AdaptedModel
from anydepth.statistics import correlation
from anydepth.training.data import bos_of, tokenise

MIN_TOKENS = 16
"""Tokens of the shortest sample: the perplexity of fewer tokens says nothing."""
MIN_DOCUMENTS = 32
"""Documents of the smallest corpus that is not split into paragraphs."""
MAX_COUNTED = 500_000
"""The most tokens of the corpus that are read, from texts spread evenly over it."""
GOLDEN = (math.sqrt(5) - 1) / 2
BETWEEN_PARAGRAPHS = re.compile(r"\n\s*\n")
Track = Callable[[Iterable[Any]], Iterable[Any]]
"""Yields the elements of an iterable and shows the progress."""


@dataclass(frozen=True)
class Samples:
    """Texts of a corpus, spread evenly over it."""

    unit: str
    token_ids: list[list[int]]
    num_cut: int
    """Number of samples that were cut to the greatest length."""
    counts: Counter[int]
    """Occurrences of each token in the part of the corpus that was read."""
    bos: int | None

    def own(self, ids: list[int]) -> list[int]:
        """Return the tokens of a sample without the BOS before them."""
        return ids[1:] if ids[0] == self.bos else ids


def draw_samples(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, limit: int, max_tokens: int) -> Samples:
    """Draw up to `limit` samples of at most `max_tokens` tokens from the documents of a corpus."""
    documents, counts = _read(texts, tokenizer)
    unit, found = "document", documents
    longer = sum(len(ids) > max_tokens for ids in documents)
    if len(documents) < MIN_DOCUMENTS or 2 * longer > len(documents):
        parts = [part for text in texts for part in BETWEEN_PARAGRAPHS.split(text) if part.strip()]
        unit, (found, counts) = "paragraph", _read(parts, tokenizer)
    step = max((len(found) - 1) / max(limit - 1, 1), 1)
    chosen = [found[round(number * step)] for number in range(min(limit, len(found)))]
    num_cut = sum(len(ids) > max_tokens for ids in chosen)
    return Samples(unit, [ids[:max_tokens] for ids in chosen], num_cut, counts, bos_of(tokenizer))


def _read(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], Counter[int]]:
    """Return the token ids of texts that are long enough, and the counts of tokens over all texts that were read."""
    counts, found, num_read = Counter[int](), list[tuple[int, list[int]]](), 0
    # Every prefix of this order is spread evenly over the corpus.
    order = sorted(range(len(texts)), key=lambda place: place * GOLDEN % 1)
    for place, ids in zip(order, tokenise([texts[place] for place in order], tokenizer), strict=False):
        counts.update(ids)
        if len(ids) >= MIN_TOKENS:
            found.append((place, ids))
        num_read += len(ids)
        if num_read >= MAX_COUNTED:
            break
    return [ids for _, ids in sorted(found)], counts


@torch.no_grad()
def _measured(adapted: AdaptedModel, samples: Samples, ids: list[int]) -> dict[str, float]:
    """Run a sample through the base model, for its perplexity, and with routing on."""
    token_ids = torch.tensor([ids], device=adapted.device)
    loss = full_depth_losses(adapted, token_ids).mean().item()
    adapted(input_ids=token_ids, use_cache=False)
    trace, own, total = adapted.last_trace, samples.own(ids), samples.counts.total()
    return {
        "length": len(own),
        "perplexity": perplexity_of(loss),
        # The mean over the tokens of −log of their frequency in the corpus, in nats.
        "rarity": sum(-math.log(samples.counts[token_id] / total) for token_id in own) / len(own),
        "depth": trace.depths[0, -len(own) :].double().mean().item(),
        "layer_token_share": cost.flops(adapted.backbone, trace).layer_token_share,
    }


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a loss in nats per token, finite for any."""
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def full_depth_losses(adapted: AdaptedModel, token_ids: Tensor) -> Tensor:
    """Return the base model's (T − 1,) losses in nats, for each of (1, T) tokens but the first."""
    with adapted.untouched():
        logits = adapted(input_ids=token_ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, token_ids[0, 1:], reduction="none").cpu()


def correlations(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limit: int,
    max_tokens: int,
    track: Track = iter,
) -> dict[str, Any] | None:
    """Return the correlations of a text's depth with its length, perplexity and rarity; None if all are too short."""
    samples = draw_samples(texts, tokenizer, limit=limit, max_tokens=max_tokens)
    if not samples.token_ids:
        return None
    adapted.eval()
    measured = [_measured(adapted, samples, ids) for ids in track(samples.token_ids)]
    columns = {key: torch.tensor([row[key] for row in measured], dtype=torch.double) for key in measured[0]}
    # With mixer routing alone, every token runs every layer, and only FLOPs vary.
    chooses = any(method.routes_mixers for method in adapted.active_methods)
    is_constant = bool(columns["depth"].min() == columns["depth"].max())
    return {
        "of": ("layer_token_share" if chooses else None) if is_constant else "depth",
        "unit": samples.unit,
        "num_samples": len(measured),
        "num_cut": samples.num_cut,
        "max_tokens": max_tokens,
        "num_counted_tokens": samples.counts.total(),
        "rows": [
            {"of": of, "with": property, **correlation(columns[property], columns[of])}
            for of in ("depth", "layer_token_share")
            for property in ("length", "perplexity", "rarity")
        ],
        "samples": measured,
    }
