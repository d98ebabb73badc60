"""Which of several processes this is, as `accelerate launch` and `torchrun` tell it in the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """0 is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) if is_parallel() else 0


def is_parallel() -> bool:
    """Whether several were started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def shards_weights() -> bool:
    """Whether they were asked to share the weights too (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
