"""Commands in processes of their own that start at once: forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PRELOADED = ["anydepth.cli", "anydepth.measure.run", "anydepth.serve.export", "anydepth.report.page", "commands"]
SECONDS = 300
# As the command line sets them before it imports anything; here that was done already.
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def anydepth(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
    """What `anydepth ARGUMENTS` writes, and its exit code."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "stdin").write_text(input)
        process = _server.Process(target=_command, args=(words, folder, Path.cwd()))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS)
        outputs = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(words, process.exitcode, *outputs)


def _command(words: Sequence[str], folder: Path, place: Path) -> None:
    import torch

    from anydepth.cli import main

    ways = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_CREAT, "stderr": os.O_WRONLY | os.O_CREAT}
    for number, (name, way) in enumerate(ways.items()):
        os.dup2(os.open(folder / name, way), number)
    sys.stdin = os.fdopen(0)  # multiprocessing gives its children none
    os.chdir(place)
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "70"}
    torch.set_num_threads(1)
    sys.argv = ["anydepth", *words]
    main()
