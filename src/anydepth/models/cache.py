"""The cache folder: what anydepth converted or compiled on this machine, and its removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anydepth.models.load import cache_folder

KINDS = {
    "embedded-*": "embedded model, converted",
    "gguf/*": "config and tokenizer of a .gguf file",
    "int4/*": "int4 weights with error feedback",
    "native/*": "compiled kernels",
    "inductor": "kernels of torch.compile",
}
"""What anydepth writes to the folder, by pattern."""


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache."""

    path: Path
    kind: str
    num_bytes: int


def entries() -> list[Entry]:
    """Return what anydepth stored in the cache folder, the largest first; files of others are not in it."""
    return sorted(_found(), key=lambda entry: -entry.num_bytes)


def _found() -> Iterator[Entry]:
    for pattern, kind in KINDS.items():
        for path in cache_folder().glob(pattern):
            files = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
            yield Entry(path, kind, sum(part.stat().st_size for part in files))


def remove(found: list[Entry]) -> None:
    """Remove entries; each is made again when it is needed."""
    for entry in found:
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
