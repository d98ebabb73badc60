"""The examples, as they are, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import script
from tiny import save_base

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("examples") / "base")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fastest_setting", ["fast"], "tokens/s"),
        ("lossless", [], "tokens per verification"),
        ("train_a_router", ["3"], "layers a token"),
    ],
)
def test_an_example_runs(name: str, arguments: list[str], said: str, base: Path, tmp_path: Path) -> None:
    done = script(EXAMPLES / f"{name}.py", str(base), *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout


def test_the_notebook_runs(base: Path, tmp_path: Path) -> None:
    """Its cells in order, in one process; it is stored without outputs."""
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    (tmp_path / "notebook.py").write_text("\n".join(code).replace('"embedded"', repr(str(base))))
    done = script(tmp_path / "notebook.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens per verification" in done.stdout
