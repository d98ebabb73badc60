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

import yaml

RECIPE = {
    "methods": [{"name": "layer_router", "always_keep": 2, "initial_bias": 1.0, "target_skip": 0.3}],
    "train": {"max_steps": 4, "save_every": 2, "lora": {"rank": 2}},
    "calibrate": {"skip_share": 0.3, "num_windows": 4},
    "eval": {"sequence_length": 64, "max_windows": 3},
    "bench": {"prompt_tokens": [16], "new_tokens": 4, "num_runs": 2},
    "analyze": {"sequence_length": 32, "num_windows": 2, "num_permutations": 9},
    "generate": {"prompt": "the sea", "max_new_tokens": 6},
}
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


def refused(*arguments: object, code: int = 2) -> str:
    """One line on standard error, nothing on standard output, the exit code of a mistake."""
    done = anydepth(*arguments)
    lines = [line for line in done.stderr.splitlines() if "…" not in line]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("anydepth: "), done.stderr
    assert done.stdout == ""
    return lines[0]


def write_recipe(path: Path, base: Path, text: Path, **changes: object) -> Path:
    recipe = {"model": {"target": str(base)}, "data": {"train": str(text), "sequence_length": 32}, **RECIPE}
    recipe["eval"] = {**recipe["eval"], "data": str(text)}
    path.write_text(yaml.safe_dump(recipe | changes))
    return path
