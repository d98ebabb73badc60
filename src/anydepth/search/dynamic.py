"""Search of layers to skip by dynamic programming over the states (CLaSp, Chen et al. 2025).

best[j] is, in front of layer i, the state with j layers skipped that is nearest to that of full depth: the better of
running layer i−1 on best[j] of before, and of skipping it from best[j−1]. All states are those of whole windows; how
near, the mean cosine over their tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.errors import UserError
from anydepth.models.backbone import first_output, recorded_inputs
from anydepth.search.skip_search import Candidate, Problem


@torch.no_grad()
def choose(problem: Problem) -> list[Candidate]:
    """The layers that the best last state with `num_out` skipped was reached without.

    Raises:
        UserError: branches instead of layers.
    """
    if any(kind != "layer" for kind, _ in problem.candidates):
        raise UserError("strategy dynamic chooses whole layers; leave --branches out, or use another strategy")
    adapted, views = problem.adapted, problem.adapted.backbone.layers
    with adapted.disabled(), recorded_inputs(views) as inputs, adapted.backbone.layer_outputs() as outputs:
        adapted(input_ids=problem.windows.to(adapted.device), use_cache=False, logits_to_keep=1)
    wanted = [outputs[layer_idx] for layer_idx in range(len(views))]
    best: list[tuple[Tensor, list[int]]] = [(inputs[0][0], [])]
    with adapted.disabled():
        for layer_idx, view in enumerate(views):
            arguments = inputs[layer_idx][1]
            ran = [first_output(view.module(states, **arguments)) for states, _ in best]
            reached: list[tuple[Tensor, list[int]]] = []
            for skipped in range(min(layer_idx + 1, problem.num_out) + 1):
                ways = []
                if skipped < len(best):
                    ways.append((ran[skipped], best[skipped][1]))
                if skipped:
                    ways.append((best[skipped - 1][0], [*best[skipped - 1][1], layer_idx]))
                reached.append(max(ways, key=lambda way: _nearness(way[0], wanted[layer_idx])))
            best = reached
    return [("layer", layer_idx) for layer_idx in best[problem.num_out][1]]


def _nearness(states: Tensor, wanted: Tensor) -> float:
    return F.cosine_similarity(states.float(), wanted.float(), dim=-1).mean().item()
