"""No two files of the package import each other, also not by way of others, lazily or for type checking."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
KNOWN = []
"""Circles that are still there; a change that removes one removes its line."""


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in SOURCE.rglob("*.py")}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the files of the package that a file imports, in functions and under TYPE_CHECKING as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def circles() -> list[set[str]]:
    """Return the sets of files that reach each other by imports. The package itself imports only for type checking."""
    graph = {name: {one for one in imports_of(path) if one in FILES} for name, path in FILES.items()}
    graph["anydepth"] = set()
    reached = {name: reachable(name, graph) for name in graph}
    found = [{other for other in reached[name] if name in reached[other]} for name in sorted(graph)]
    return [circle for number, circle in enumerate(found) if circle and circle not in found[:number]]


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def test_files_import_each_other_in_no_circle() -> None:
    assert len(FILES) > 100
    assert circles() == []


def test_peft_is_imported_by_models_with_adapters_alone() -> None:
    """Its import takes longer than PyTorch's, before the first line that a command prints."""
    code = "import sys, anydepth.serve.opening, anydepth.measure.evaluate; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
