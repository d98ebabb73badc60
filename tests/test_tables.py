"""The tables of the page of results are those that the committed results give, and the README repeats some rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import commands
from anydepth.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "router_vs_controls": ["benchmarks/run.py", "benchmarks/experiments/router_vs_controls.yaml", "--table"],
    "router_at_equal_time": ["benchmarks/run.py", "benchmarks/experiments/router_at_equal_time.yaml", "--table"],
    "variants_from_scratch": ["benchmarks/run.py", "benchmarks/experiments/variants_from_scratch.yaml", "--table"],
    "engine": ["benchmarks/engine.py", "--table"],
    "tune": ["benchmarks/tuning.py", "--table"],
    "map": ["benchmarks/map.py", "--table"],
    "hat": ["benchmarks/hat.py", "--table"],
    "speculation": ["benchmarks/speculation.py", "--table"],
    "layerskip": ["benchmarks/layerskip.py", "--table"],
    "mixers": ["benchmarks/mixers.py", "--table"],
    "guarantee": ["benchmarks/guarantee.py", "--table"],
    "serve_load": ["benchmarks/serve_load.py", "--table"],
    "serve_peers": ["benchmarks/serve_peers.py", "--table"],
    "fronts": ["benchmarks/fronts.py", "--table"],
    "capacities": ["benchmarks/capacities.py", "--table"],
    "task_scores": ["benchmarks/task_scores.py", "--table"],
    "exit_table": ["benchmarks/exit_table.py", "--table"],
    "drafter_choices": ["benchmarks/drafter_choices.py", "--table"],
}
PAGE, OTHERS = "docs/results.md", {"map": "docs/when-it-pays.md"}


@pytest.mark.parametrize("name", TABLES)
def test_a_page_has_the_table(name: str) -> None:
    path, *arguments = TABLES[name]
    done = commands.script(ROOT / path, *arguments, folder=ROOT)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip()
    page = (ROOT / OTHERS.get(name, PAGE)).read_text(encoding="utf-8")
    for line in printed.splitlines():
        assert line in page, f"{name}: the page lacks {line!r} of `{' '.join(TABLES[name])}`"


def test_the_readme_repeats_rows_of_the_page() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- tune:start -->\n(.*?)<!-- tune:end -->", readme, re.DOTALL)
    rows = [line for line in (table[1] if table else "").splitlines() if line.startswith("|")]
    assert len(rows) > 3
    assert [row for row in rows if row not in page] == []


def test_the_readme_lists_every_method() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"[`{name}`](docs/methods/{name}.md)" not in readme] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_no_committed_result_is_of_a_dirty_tree(path: Path) -> None:
    """And each says with which commit, seed and machine it was measured."""

    def dirty(part: Any, where: str = "") -> list[str]:
        if isinstance(part, list):
            part = dict(enumerate(part))
        if not isinstance(part, dict):
            return []
        own = [where or "the document"] if part.get("dirty") else []
        return own + [place for key, inner in part.items() for place in dirty(inner, f"{where}/{key}")]

    document = json.loads(path.read_text())
    assert dirty(document) == []
    assert document["commit"] and document["hardware"]["cpu"] and document["seed"] is not None
