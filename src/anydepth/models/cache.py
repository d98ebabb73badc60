"""The cache folder: what is in it, and the removal of what anydepth makes again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anydepth.models.target import cache_folder

KINDS = {
    "embedded-*/": "embedded model, converted",
    "gguf/*": "config and tokenizer of a .gguf file",
    "int4/*": "int4 weights with error feedback",
    "native/*": "compiled kernels",
    "inductor/": "kernels of torch.compile",
    "offload/": "weights that --device auto keeps on the disk",
}
"""What anydepth writes to the folder, by pattern, and makes again when it is needed."""
OTHER = "other files"


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache.

    Attributes:
        kind: a value of `KINDS`, or `OTHER` with the name of the folder.
        stays: whether it is not removed, because anydepth does not make it again.
    """

    path: Path
    kind: str
    num_bytes: int
    stays: bool = False


def entries() -> list[Entry]:
    """Return everything in the cache folder, the largest first."""
    found = {path: Entry(path, kind, _size(path)) for path, kind in _own()}
    others = {path: Entry(path, kind, _size(path), stays=True) for path, kind in _others(set(found))}
    return sorted([*found.values(), *others.values()], key=lambda entry: -entry.num_bytes)


def remove(found: list[Entry]) -> list[Entry]:
    """Remove the entries that are made again when they are needed, and return them."""
    removed = [entry for entry in found if not entry.stays]
    for entry in removed:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    return removed


def _own() -> Iterator[tuple[Path, str]]:
    for pattern, kind in KINDS.items():
        yield from ((path, kind) for path in cache_folder().glob(pattern))


def _others(known: set[Path]) -> Iterator[tuple[Path, str]]:
    """Yield what is not in `KINDS`: files at the top, and files and folders one level below."""
    folder = cache_folder()
    kept = {pattern.split("/")[0] for pattern in KINDS}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path in known:
            continue
        if path.is_dir() and path.name not in kept:
            yield from ((part, f"{OTHER} in {path.name}/") for part in sorted(path.iterdir()))
        elif path.is_file():
            yield path, OTHER


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
    return sum(part.stat().st_size for part in files)
