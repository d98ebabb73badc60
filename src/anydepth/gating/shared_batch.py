"""A training batch whose rows several processes share, equally many each.

A loss that is a mean over tokens needs nothing of this: the processes' gradients are averaged. What is drawn at random,
and what is not linear in the tokens (a squared distance of a mean from its target), must be that of the whole batch, or
the number of processes would change the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """That share each batch; 1 where nobody started several."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_mean(own: Tensor) -> Tensor:
    """The mean over the processes of what is a mean over this one's rows.

    The gradient is that of `own`. Averaged over the processes it is that of the mean, and backward waits for nobody.
    """
    if num_processes() == 1:
        return own
    mean = own.detach().clone()
    dist.all_reduce(mean)
    return own + (mean / num_processes() - own.detach())


@torch.no_grad()
def batch_rows(own: Tensor) -> Tensor:
    """(W·N, …) of all processes, from (N, …) of each; no gradient."""
    if num_processes() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def draw_uniform(shape: Sequence[int], generator: torch.Generator, *, rows: int, only_first: bool = False) -> Tensor:
    """Uniform numbers in [0, 1) of `shape`, drawn for the rows of all processes.

    Args:
        rows: the dimension that has the rows; of those drawn each process takes its own.
        only_first: the numbers of the batch's first row for every row.
    """
    whole = list(shape)
    whole[rows] *= num_processes()
    drawn = torch.rand(whole, generator=generator)
    if only_first:
        return drawn.narrow(rows, 0, 1).expand(*shape)
    return drawn if num_processes() == 1 else drawn.chunk(num_processes(), rows)[dist.get_rank()]
