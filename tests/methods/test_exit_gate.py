"""The expected loss of exit gates, and the state of a token that exits."""

from __future__ import annotations

from typing import Any

import torch

import anydepth
import families
from anydepth.losses import expected_exit_loss, token_losses
from tiny import tiny_llama, windows


def test_expected_loss_is_the_sum_over_exits() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.2}).train()
    ids = windows(3)
    labels = ids.clone()
    labels[0, :9] = -100
    logits = adapted(input_ids=ids, use_cache=False).logits
    exits = adapted.exit_states()["exit_gate"]
    assert torch.stack([part.weights for part in exits]).sum(0).allclose(torch.ones(ids.shape))
    wanted = torch.zeros(())
    for part in exits:
        at = logits if part.states is None else adapted.lm_head(adapted.backbone.decoder.norm(part.states))
        wanted = wanted + (token_losses(at, labels) * part.weights).sum()
    ours = expected_exit_loss(exits, logits, labels, adapted.backbone.logits_of)
    torch.testing.assert_close(ours, wanted / (labels[:, 1:] != -100).sum())
    plain = adapted(input_ids=ids, labels=labels, use_cache=False)
    mean = token_losses(plain.logits, labels).sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(mean, plain.loss)


@torch.no_grad()
def test_a_token_that_exits_is_read_as_it_exited(family: str, model: Any) -> None:
    """With every gate shut the output is final norm and head of the state in front of the first gate."""
    states = []
    adapted = anydepth.attach(model, {"name": "exit_gate", "layers": [2, 3], "threshold": float("inf")})
    hook = adapted.backbone.layers[2].module.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    logits = adapted(input_ids=families.token_ids(), use_cache=False).logits
    hook.remove()
    assert adapted.last_trace.mean_depth == 2
    torch.testing.assert_close(logits, adapted.backbone.logits_of(states[0]), rtol=1e-5, atol=1e-5)
