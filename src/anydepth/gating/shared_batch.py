"""A training batch with an equal number of rows on each of several processes.

A loss that is a mean over tokens needs none of this, because the processes' gradients are averaged. Random draws, and
values that are not linear in the tokens (such as the squared distance of a mean from its target), must be those of the
whole batch, or the number of processes would change the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """Return the number of processes that share each batch; 1 without parallel training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_mean(own: Tensor) -> Tensor:
    """Return the mean over all processes of `own`, a mean over this process's rows.

    The gradient is that of `own`: averaged over the processes it is that of the mean, and backward needs no
    synchronisation.
    """
    if num_processes() == 1:
        return own
    mean = own.detach().clone()
    dist.all_reduce(mean)  # pyright: ignore[reportUnknownMemberType]
    return own + (mean / num_processes() - own.detach())


@torch.no_grad()
def batch_rows(own: Tensor) -> Tensor:
    """Gather the (W·N, …) rows of W processes, from (N, …) of each, without a gradient."""
    if num_processes() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(parts, own.contiguous())  # pyright: ignore[reportUnknownMemberType]
    return torch.cat(parts)


def draw_uniform(shape: Sequence[int], generator: torch.Generator, *, rows: int, only_first: bool = False) -> Tensor:
    """Draw uniform numbers in [0, 1) for the rows of all processes, and return the (`shape`) ones of this process.

    `rows` is the dimension of the rows. With `only_first` every row has the numbers of the batch's first row.
    """
    whole = list(shape)
    whole[rows] *= num_processes()
    drawn = torch.rand(whole, generator=generator)
    if only_first:
        return drawn.narrow(rows, 0, 1).expand(*shape)
    return drawn if num_processes() == 1 else drawn.chunk(num_processes(), rows)[dist.get_rank()]
