"""Training by several processes, which `accelerate launch` or `torchrun` start.

All processes read, and the first one writes.
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
"""The time that processes wait for each other, also during a search or a download."""


@contextmanager
def together() -> Iterator[None]:
    """Join the process group for the body, if several processes were started."""
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
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    if num_processes() > 1:
        dist.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """Run the body in the first process, then in the others, which see its results.

    If it fails in the first process, which reports the reason, the others raise `RunError`.
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
    """Return whether a module's weights are sharded (FSDP2)."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(values: Tensor, like: Tensor) -> Tensor:
    """Return `values`, sharded as `like` is."""
    return distribute_tensor(values, like.device_mesh, like.placements) if isinstance(like, DTensor) else values


@torch.no_grad()
def copy_into(weight: Tensor, values: Tensor) -> None:
    """Copy the values of a full tensor into a weight, sharded or not."""
    weight.copy_(part_of(values.to(weight.device, weight.dtype), weight))


def check_kind(accelerator: Any) -> None:
    """Raise `UserError` for kinds of sharding that training cannot save."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UserError("FSDP of version 1 is not supported; set fsdp_version: 2, as recipes/parallel/fsdp2.yaml does")
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise UserError(
            "DeepSpeed is not supported; use recipes/parallel/fsdp2.yaml, which shards weights, gradients and optimiser"
        )


def shards_on_cpu(accelerator: Any) -> bool:
    """Let an `Accelerator` shard on CPUs if FSDP is configured, and return whether it does.

    By itself it shards on accelerators only, but its `fully_shard` works on CPUs too.
    """
    if torch.cuda.is_available() or not shards_weights():
        return False
    from accelerate.state import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    return True
