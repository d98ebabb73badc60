"""Points of a sweep that learn in processes: why one failed, with how many threads, and how all of them end."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from anydepth.errors import UserError
from anydepth.runs import learning
from anydepth.runs.learning import learn, learn_in_processes, learn_on_ray

SCRIPTS = {
    "good": "echo learned",
    "bad": "echo first; echo 'anydepth: no such file' >&2; exit 2",
    "silent": "exit 3",
    "killed": "kill -KILL $$",
    "long": "printf '%0500d' 1; exit 1",
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Points with a script as their process, which a stand-in for Python runs."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n. "$3/point.sh"\n')  # the arguments are -m, the module and the folder
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = {name: tmp_path / name for name in SCRIPTS}
    for name, folder in found.items():
        folder.mkdir()
        (folder / "point.sh").write_text(SCRIPTS[name])
    return found


def test_points_that_failed_have_the_reason(folders: dict[str, Path]) -> None:
    """The last line of what they wrote, or the signal; a point that learned has none."""
    said: list[str] = []
    assert learn_in_processes(folders, 2, said.append) == {
        "bad": "anydepth: no such file",
        "silent": "exit code 3",
        "killed": "ended by SIGKILL",
        "long": "0" * 200,
    }
    assert sorted(said) == sorted(f"{name}: learning, see {folder}/sweep.log" for name, folder in folders.items())
    assert (folders["good"] / "sweep.log").read_text() == "learned\n"


@pytest.mark.parametrize(("jobs", "own", "wanted"), [(3, None, "2"), (16, None, "1"), (3, "5", "5")])
def test_processes_share_the_cores(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, jobs: int, own: str | None, wanted: str
) -> None:
    """Of eight cores; a number that the user has set stays."""
    monkeypatch.setattr(learning, "num_cores", lambda: 8)
    if own is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    (folders["bad"] / "point.sh").write_text('echo "$OMP_NUM_THREADS"; exit 1')
    assert learn_in_processes({"bad": folders["bad"]}, jobs, lambda _: None) == {"bad": wanted}


def test_an_interrupt_ends_every_process_and_starts_no_more(folders: dict[str, Path]) -> None:
    (folders["good"] / "point.sh").write_text("exec sleep 60")
    processes = learning._Processes(2, lambda _: None)
    reasons: list[str | None] = []
    thread = threading.Thread(target=lambda: reasons.append(processes.learn("good", folders["good"])))
    thread.start()
    while not processes.running:
        time.sleep(0.001)
    processes.stop()
    thread.join(timeout=10)
    assert reasons == ["ended by SIGTERM"] and processes.running == []
    assert processes.learn("bad", folders["bad"]) == "interrupted"
    assert (folders["bad"] / "sweep.log").read_text() == ""


def test_a_point_learns_without_the_stages_that_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the recipe in its folder; its relative paths begin at `home`."""
    seen: list[Any] = []

    class Recorded:
        def __init__(self, recipe: Any, folder: Path, say: Any) -> None:
            seen.extend([recipe.seed, folder, Path.cwd()])

        def __getattr__(self, stage: str) -> Any:
            return lambda: seen.append(stage)

    monkeypatch.setattr(learning, "Runner", Recorded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"seed": 7}))
    learn(tmp_path, tmp_path / "home")
    assert seen == [7, tmp_path, tmp_path / "home", "search", "fit", "train", "evaluate"]


def test_a_cluster_needs_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'needs Ray: pip install "anydepth\[sweep\]"'):
        learn_on_ray({}, 1, lambda _: None)
