"""Commands in processes of their own that start at once: forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PRELOADED = ["anydepth.cli", "anydepth.runs.run", "anydepth.serve.export", "anydepth.report.page", "commands"]
SECONDS = 300
# As the command line sets them before it imports anything; here that was done already.
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def anydepth(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
    """What `anydepth ARGUMENTS` writes, and its exit code."""
    return _run([str(argument) for argument in arguments], Path.cwd(), input, _anydepth)


def _run(
    words: list[str], place: Path, input: str, run: Callable[[list[str]], None]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "stdin").write_text(input)
        process = _server.Process(target=_in_child, args=(words, folder, place, run))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS)
        outputs = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(words, process.exitcode, *outputs)


def script(path: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What `python PATH ARGUMENTS` writes in a folder, and its exit code."""
    return _run([str(path), *arguments], folder, "", _script)


def _script(words: list[str]) -> None:
    sys.path.insert(0, str(Path(words[0]).parent))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _anydepth(words: list[str]) -> None:
    from anydepth.cli import main

    sys.argv = ["anydepth", *words]
    main()


def _in_child(words: list[str], folder: Path, place: Path, run: Callable[[list[str]], None]) -> None:
    import torch

    ways = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_CREAT, "stderr": os.O_WRONLY | os.O_CREAT}
    for number, (name, way) in enumerate(ways.items()):
        os.dup2(os.open(folder / name, way), number)
    sys.stdin = os.fdopen(0)  # multiprocessing gives its children none
    os.chdir(place)
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "70"}
    torch.set_num_threads(1)
    run(words)
