"""A hub without a network: repositories as the local cache has them."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from anydepth.models.target import forget_snapshots

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Make a folder the hub's local cache, and forbid the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_snapshots()
    return cache


def add(cache: Path, name: str, files: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    """Put the files of a folder into the cache as a repository; return its snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(files, snapshot)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return snapshot
