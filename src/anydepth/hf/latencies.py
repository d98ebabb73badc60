"""Time each layer and branch of the Hugging Face model in a decoding step."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from statistics import median
from typing import Any

import torch

from anydepth.hf.adapted import AdaptedModel
from anydepth.models.clock import STEPS, now
from anydepth.models.hooks import Hooks


@torch.no_grad()
def latencies(adapted: AdaptedModel, windows: torch.Tensor) -> dict[tuple[str, int], float]:
    """Measure the median seconds of each layer, mixer and FFN in a decoding step of one token, at full depth."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    started: dict[tuple[str, int], float] = {}

    def begin(candidate: tuple[str, int], *_: Any) -> None:
        started[candidate] = now(adapted.device)

    def end(candidate: tuple[str, int], *_: Any) -> None:
        found[candidate].append(now(adapted.device) - started[candidate])

    ids = windows[:1].to(adapted.device)
    with adapted.disabled(), Hooks() as hooks:
        for view in adapted.backbone.layers:
            ends = [("layer", view.module, view.module)]
            if not view.family.whole_layers:
                ends += [("mixer", view.mixer, view.mixer_out), ("ffn", view.ffn_in, view.ffn_out)]
            for kind, first, last in ends:
                hooks.before(first, partial(begin, (kind, view.layer_idx)))
                hooks.after(last, partial(end, (kind, view.layer_idx)))
        # The steps stay within the window, since some rotary embeddings keep the greatest length so far.
        num_first = max(ids.shape[1] - STEPS, 1)
        cache = adapted(input_ids=ids[:, :num_first], use_cache=True).past_key_values
        found.clear()
        for _ in range(STEPS):
            cache = adapted(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
    return {candidate: median(times) for candidate, times in found.items()}
