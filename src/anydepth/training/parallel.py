"""Training by several processes, as `accelerate launch` or `torchrun` start them.

All of them read; the first one writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from anydepth.errors import RunError, UserError
from anydepth.gating.shared_batch import num_processes
from anydepth.processes import is_parallel, rank, shards_weights

PATIENCE = timedelta(hours=24)
"""How long processes wait for each other: for a search or a download as well."""


@contextmanager
def together() -> Iterator[None]:
    """Joined with the other processes, and parted from them behind it. Alone nothing happens."""
    if not is_parallel():
        yield
        return
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    try:
        yield
    finally:
        part()


def part() -> None:
    """From here on this process is alone."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Until every process is here."""
    if num_processes() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through, then the others: they find what it left.

    Raises:
        RunError: in the others, if the first one failed; it says why.
    """
    if num_processes() == 1:
        yield
        return
    failed = [True]
    if rank() > 0:
        dist.broadcast_object_list(failed)
        if failed[0]:
            raise RunError("the first process failed")
        yield
        return
    try:
        yield
        failed = [False]
    finally:
        dist.broadcast_object_list(failed)


def is_sharded(module: nn.Module) -> bool:
    """Whether no process has all of a module's weights (FSDP2)."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(values: Tensor, like: Tensor) -> Tensor:
    """`values`, sharded as `like` is."""
    return distribute_tensor(values, like.device_mesh, like.placements) if isinstance(like, DTensor) else values


@torch.no_grad()
def copy_into(weight: Tensor, values: Tensor) -> None:
    """Give a weight, sharded or not, the values of a whole tensor."""
    weight.copy_(part_of(values.to(weight.device, weight.dtype), weight))


def check_kind(accelerator: Any) -> None:
    """Raise `UserError` for ways to share a model that this training cannot save."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UserError("FSDP of version 1 is not supported; set fsdp_version: 2, as recipes/parallel/fsdp2.yaml does")
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise UserError(
            "DeepSpeed is not supported; recipes/parallel/fsdp2.yaml shares weights, gradients and optimiser"
        )


def shards_on_cpu(accelerator: Any) -> bool:
    """Whether an `Accelerator` now shards although there are only CPUs, as `accelerate launch` was asked to.

    By itself it shards on accelerators alone. What it does is `fully_shard`, which CPUs can do as well.
    """
    if torch.cuda.is_available() or not shards_weights():
        return False
    from accelerate.state import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    return True
