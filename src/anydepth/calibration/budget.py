"""Setting a router's threshold so that it skips a wanted share, on text, with the gates of inference."""

from __future__ import annotations

import torch
from torch import Tensor

from anydepth.errors import RunError
from anydepth.execution.adapted import AdaptedModel
from anydepth.methods.layer_router import LayerRouter


@torch.no_grad()
def set_skip_share(adapted: AdaptedModel, windows: Tensor, target_skip: float) -> float:
    """Move `layer_router`'s threshold to the quantile of its logits that skips `target_skip` of routed layer-tokens.

    The router reads a state in front of every routed layer, so its logits do not depend on the threshold and one
    pass over (N, T) `windows` is exact. Returns the share that those windows skip then.

    Raises:
        RunError: the adapted model has no learned router.
    """
    router = adapted.methods["layer_router"] if "layer_router" in adapted.methods else None  # noqa: SIM401 - a ModuleDict has no get
    if not isinstance(router, LayerRouter) or router.network is None:
        raise RunError("a skip share can be set for a learned layer_router only; this model has none")
    adapted.eval()
    logits = []
    for window in windows:
        adapted(input_ids=window[None].to(adapted.device), use_cache=False, logits_to_keep=1)
        logits.append(adapted.context.notes["layer_router"]["router_logits"].flatten())
    scores = torch.cat(logits)
    # torch.quantile takes at most 16M values; a sorted index has no such end and is an actual logit.
    threshold = scores.sort().values[round(target_skip * (scores.numel() - 1))].item()
    router.config = router.config.model_copy(update={"threshold": threshold})
    return (scores <= threshold).double().mean().item()
