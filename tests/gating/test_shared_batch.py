"""A batch on several processes: draws and means are those of the whole batch, gradients those of each process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from anydepth.gating import shared_batch
from anydepth.gating.shared_batch import batch_mean, batch_rows, draw_uniform


@contextmanager
def process(rank: int, every: list[Tensor]) -> Iterator[None]:
    """Run as one of several processes, which have the tensors of `every`."""

    def all_reduce(own: Tensor) -> None:
        own.copy_(torch.stack(every).sum(0))

    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        assert torch.equal(own, every[rank])
        for part, theirs in zip(parts, every, strict=True):
            part.copy_(theirs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_batch, "num_processes", lambda: len(every))
        patch.setattr(shared_batch.dist, "get_rank", lambda: rank)
        patch.setattr(shared_batch.dist, "all_reduce", all_reduce)
        patch.setattr(shared_batch.dist, "all_gather", all_gather)
        yield


@pytest.mark.parametrize("rows", [0, 1, -2])
def test_processes_draw_the_parts_of_what_one_draws(rows: int) -> None:
    whole = torch.rand(6, 6, 3, generator=torch.Generator().manual_seed(1))
    shape = [6, 6, 3]
    shape[rows] = 2
    for rank, wanted in enumerate(whole.split(2, dim=rows)):
        with process(rank, [torch.zeros(1)] * 3):
            assert torch.equal(draw_uniform(shape, torch.Generator().manual_seed(1), rows=rows), wanted)


def test_one_draw_for_a_batch_is_that_of_its_first_row_on_every_process() -> None:
    first = torch.rand(4, 4, 5, generator=torch.Generator().manual_seed(1))[:, :1]
    for rank in range(2):
        with process(rank, [torch.zeros(1)] * 2):
            own = draw_uniform((4, 2, 5), torch.Generator().manual_seed(1), rows=1, only_first=True)
        assert torch.equal(own, first.expand(4, 2, 5))


def test_a_square_of_the_mean_has_the_value_and_gradient_of_the_whole_batch() -> None:
    """(mean − 1)² is not linear in the rows: alone, each process would get another gradient."""
    weight = torch.tensor(3.0, requires_grad=True)
    inputs = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, 8.0])]
    means = [(weight * part).mean().detach() for part in inputs]
    losses = []
    for rank, part in enumerate(inputs):
        with process(rank, means):
            losses.append((batch_mean((weight * part).mean()) - 1) ** 2)
    assert [loss.item() for loss in losses] == [(3 * 4 - 1) ** 2] * 2
    (averaged,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
    assert averaged.item() == 2 * (3 * 4 - 1) * 4


def test_rows_come_in_the_order_of_the_processes() -> None:
    every = [torch.full((2, 3), float(rank)) for rank in range(3)]
    for rank in range(3):
        with process(rank, every):
            assert torch.equal(batch_rows(every[rank].clone().requires_grad_()), torch.cat(every))
    assert batch_rows(every[1]) is every[1] and batch_mean(every[1]) is every[1]  # one process alone
