"""The rank of this process, from the environment that `accelerate launch` and `torchrun` set."""

from __future__ import annotations

import os


def rank() -> int:
    """Return the rank of this process; rank 0 writes and prints."""
    return int(os.environ.get("RANK", "0")) if is_parallel() else 0


def is_parallel() -> bool:
    """Return whether several processes were started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def shards_weights() -> bool:
    """Return whether the processes shard the weights (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
