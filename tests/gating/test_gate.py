"""Gates of executions: what is kept, what both of two gates keep, and which K/V rule holds."""

from __future__ import annotations

import torch

from anydepth.gating.context import PassContext
from anydepth.gating.gate import Gate
from anydepth.gating.spec import KVRule


def forward(mask: list[list[int]]) -> PassContext:
    real = torch.tensor(mask).bool()
    return PassContext(real, real.cumsum(1) - 1, training=False)


def gate(keep: list[list[int]], rule: KVRule = "project", mask: list[list[int]] | None = None) -> Gate:
    (made,) = Gate.stack(torch.tensor([keep]).bool(), forward(mask or [[1] * len(keep[0])] * len(keep)), rule)
    return made


def test_padding_is_never_kept_and_never_asked_for() -> None:
    made = gate([[1, 1, 1]], mask=[[0, 1, 1]])
    assert made.keep.int().tolist() == [[0, 1, 1]] and made.all_kept and made.any_kept
    assert not gate([[1, 0, 0]], mask=[[0, 1, 1]]).any_kept


def test_a_step_of_one_token_has_the_same_gates() -> None:
    context = forward([[1]])
    opened, closed = Gate.stack(torch.tensor([[[1]], [[0]]]).bool(), context, "project")
    assert (opened.any_kept, opened.all_kept, opened.keep.item()) == (True, True, True)
    assert (closed.any_kept, closed.all_kept, closed.keep.item()) == (False, False, False)


def test_both_of_two_gates() -> None:
    first, second = gate([[1, 1, 0]]), gate([[0, 1, 1]])
    both = Gate.both(first, second)
    assert both is not None and both.keep.int().tolist() == [[0, 1, 0]] and both.any_kept and not both.all_kept
    assert Gate.both(None, second) is second and Gate.both(first, None) is first and Gate.both(None, None) is None
    disjoint = Gate.both(gate([[1, 0]]), gate([[0, 1]]))
    assert disjoint is not None and not disjoint.any_kept


def test_no_kv_are_left_where_no_token_runs_an_omitting_mixer() -> None:
    closed = gate([[0, 0]], "omit")
    assert Gate.both(gate([[1, 0]]), closed) is closed and Gate.both(closed, gate([[1, 0]])) is closed


def test_weights_multiply() -> None:
    keep = torch.tensor([[[True, True]]])
    context = forward([[1, 1]])
    (first,) = Gate.stack(keep, context, "project", torch.tensor([[[0.5, 2.0]]]))
    (second,) = Gate.stack(keep, context, "project", torch.tensor([[[3.0, 4.0]]]))
    both, plain = Gate.both(first, second), Gate.both(first, gate([[1, 0]]))
    assert both is not None and both.weight is not None and both.weight.tolist() == [[1.5, 8.0]]
    assert plain is not None and plain.weight is not None and plain.weight.tolist() == [[0.5, 0.0]]
