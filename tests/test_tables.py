"""The README's tables are those that the committed results give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "router_vs_controls": ["benchmarks/run.py", "benchmarks/experiments/router_vs_controls.yaml", "--table"],
    "router_at_equal_time": ["benchmarks/run.py", "benchmarks/experiments/router_at_equal_time.yaml", "--table"],
    "variants_from_scratch": ["benchmarks/run.py", "benchmarks/experiments/variants_from_scratch.yaml", "--table"],
    "engine": ["benchmarks/engine.py", "--table"],
    "hat": ["benchmarks/hat.py", "--table"],
    "speculation": ["benchmarks/speculation.py", "--table"],
}


@pytest.mark.parametrize("name", TABLES)
def test_readme_has_the_table(name: str) -> None:
    command = [sys.executable, *TABLES[name]]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in printed.splitlines():
        assert line in readme, f"{name}: the README lacks {line!r}; copy what `{' '.join(TABLES[name])}` prints"
