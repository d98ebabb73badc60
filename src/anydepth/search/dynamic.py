"""Search layers to skip by dynamic programming over the states (CLaSp, Chen et al. 2025).

Before layer i, best[j] is the state with j skipped layers that is nearest to that of full depth: layer i−1 is either
run on the former best[j], or skipped from best[j−1]. States are those of all windows, and the nearness is the mean
cosine similarity over their tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.errors import UserError
from anydepth.models.backbone import first_output, recorded_inputs
from anydepth.search.problem import Candidate, Problem


@torch.no_grad()
def choose(problem: Problem) -> list[Candidate]:
    """Return the `num_out` layers that the best last state skips.

    Raises:
        UserError: the candidates are branches instead of layers.
    """
    if any(kind != "layer" for kind, _ in problem.candidates):
        raise UserError("strategy dynamic selects layers, not branches; leave --branches out, or use another strategy")
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
                options = []
                if skipped < len(best):
                    options.append((ran[skipped], best[skipped][1]))
                if skipped:
                    options.append((best[skipped - 1][0], [*best[skipped - 1][1], layer_idx]))
                reached.append(max(options, key=lambda option: _nearness(option[0], wanted[layer_idx])))
            best = reached
    return [("layer", layer_idx) for layer_idx in best[problem.num_out][1]]


def _nearness(states: Tensor, wanted: Tensor) -> float:
    return F.cosine_similarity(states.float(), wanted.float(), dim=-1).mean().item()
