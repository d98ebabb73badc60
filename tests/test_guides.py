"""The guides for contributors, followed step by step in a scratch copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import anydepth
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.decoding.scheduler import Scheduler
from tiny import tiny_llama

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"


def blocks_of(guide: str) -> list[str]:
    """Return the Python of a guide: whole files and lines to add."""
    return re.findall(r"^```py(?:thon)?\n(.*?)^```", (GUIDES / guide).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and of the tests' helpers."""
    shutil.copytree(ROOT / "src" / "anydepth", tmp_path / "anydepth", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("families.py", "tiny.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / name)
    return tmp_path


def insert(path: Path, lines: str, *, before: str) -> None:
    """Put lines before the only line that begins with `before`."""
    text = path.read_text()
    found = re.findall(rf"^{re.escape(before)}", text, re.MULTILINE)
    assert len(found) == 1, f"{path.name} has {len(found)} lines that begin with {before!r}"
    path.write_text(re.sub(rf"^{re.escape(before)}", lambda line: lines + line[0], text, flags=re.MULTILINE))


def run(code: str, folder: Path) -> str:
    """Run code with the copy in place of the package."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


DRAFT = """
import torch
import anydepth
from tiny import tiny_llama

ids = torch.arange(5, 45)[None] % 9 + 5
adapted = anydepth.attach(tiny_llama(), []).eval()
draft = anydepth.Draft(adapted, {"bigram": True, "lookup": False, "adaptive": False})
for engine in (anydepth.FastEngine(adapted, draft=draft), anydepth.HFEngine(adapted, draft)):
    for options in ({"do_sample": False}, {"do_sample": True}):
        torch.manual_seed(1)
        drafted = engine.generate(input_ids=ids, max_new_tokens=24, **options)
        counts = engine.draft_counts
        torch.manual_seed(1)
        plain = engine.without_draft().generate(input_ids=ids, max_new_tokens=24, **options)
        assert torch.equal(drafted, plain), (engine.name, options)
        print(engine.name, sorted(counts.num_drafted), counts.num_accepted["bigram"])
"""


def test_the_drafter_of_the_guide_drafts_in_the_package(copy: Path) -> None:
    """The class as a file, the option and the line: greedy and sampled text of both engines is that of full depth."""
    file, _, option, line = blocks_of("add-a-drafter.md")
    package = copy / "anydepth"
    (package / "speculation" / "bigram.py").write_text(file)
    insert(package / "draft_sections.py", option, before="    exit_layers: list[int]")
    drafters = package / "speculation" / "draft.py"
    insert(drafters, line, before="        if config.search is not None:")
    insert(
        drafters,
        "from anydepth.speculation.bigram import BigramDrafter\n",
        before="from anydepth.speculation.drafters import (",
    )
    rows = [line.split() for line in run(DRAFT, copy).splitlines()]
    assert [row[:2] for row in rows] == [["fast", "['bigram']"]] * 2 + [["hf", "['bigram']"]] * 2
    assert sum(int(row[2]) for row in rows) > 0


def test_the_family_of_the_guide_runs_on_both_engines(copy: Path) -> None:
    """The line, the name for the engine and the tiny config: sparse, masked and engine agree."""
    family, names, config, check = blocks_of("add-a-model-family.md")
    models = copy / "anydepth" / "models"
    insert(models / "families.py", family, before='    "phi3": Family(')
    text = (models / "llama_like.py").read_text()
    (models / "llama_like.py").write_text(text.replace("\n)\n", f"\n{names}", 1))  # the end of the list
    insert(copy / "families.py", config, before='    "gpt2": lambda')
    assert run(f"{check}\nprint(adapted.backbone.family_name)", copy).split() == ["seed_oss"]


def test_a_decode_step_takes_the_path_of_the_figure() -> None:
    """Each function of the figure is called, in its order; those of the other branch are not."""
    figure = re.search(r"^```text\n(.*?)^```", (GUIDES / "fast-engine.md").read_text(), re.MULTILINE | re.DOTALL)
    assert figure is not None
    path = re.findall(r"(\w[\w/]*\.py) +(\w+(?:\.\w+)?): ", figure[1])
    adapted = anydepth.attach(tiny_llama(), {"name": "layer_router", "always_keep": 2}).eval()
    engine = anydepth.FastEngine(adapted)
    if engine.model.why_not_native is not None:
        pytest.skip(engine.model.why_not_native)
    scheduler = Scheduler(engine, 2)
    scheduler.add(Request(list(range(5, 20)), Sampler(), Stops.at(30)))
    for _ in range(3):
        scheduler.step()
    called: list[tuple[str, str]] = []

    def record(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and "/anydepth/" in file:
            called.append((file.rpartition("/anydepth/")[2], frame.f_code.co_qualname))

    sys.setprofile(record)
    try:
        scheduler.step()
    finally:
        sys.setprofile(None)
    assert len(path) == 7
    assert [step for step in dict.fromkeys(called) if step in path] == path
    assert not any(file == "engine/step.py" for file, _ in called)
