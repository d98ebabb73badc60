"""The commands `tune` and `cache`: mistakes at once, one document, a folder that other commands run as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anydepth.cli.options import app
from commands import anydepth
from tiny import save_base, save_text

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    save_base(folder / "base")
    save_text(folder / "text.txt", 30000)
    return folder


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--lossless", "--max-risk", "0.1"], "--lossless allows nothing to differ; leave out the other bound"),
        (["--max-risk", "0.1", "--max-perplexity-increase", "0.1"], "are different bounds; give one of them"),
        (["--max-perplexity-increase", "-0.1"], "max_perplexity_increase"),
        (["--max-risk", "2"], "max_risk"),
        (["--minutes", "0"], "minutes"),
        (["--prompts", "none.jsonl", "--prompt-tokens", "64"], "leave out --prompt-tokens"),
        (["--batch-sizes", "one"], "--batch-sizes takes numbers"),
        (["--data", "no-such.txt"], "no-such.txt"),
    ],
)
def test_a_mistake_is_one_line_before_anything_loads(options: list[str], line: str, tmp_path: Path) -> None:
    done = anydepth("tune", "no-such-model", "--out", tmp_path / "out", *options)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_it_writes_a_folder_that_runs_as_it_found(folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", folder / "text.txt"
    sizes = ["--prompt-tokens", "8,16", "--new-tokens", 8, "--minutes", 0.3]
    done = anydepth("tune", folder / "base", "--out", out, "--data", data, *sizes, "--dtype", "bfloat16", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.tune/1" and document == json.loads((out / "tune.json").read_text())
    assert document["chosen"]["identical_tokens"] and document["config"]["prompt_tokens"] == [8, 16]
    run = json.loads((out / "anydepth.json").read_text())["run"]
    assert (run["dtype"], run["engine"], run["weights"]) == ("bfloat16", "fast", "bfloat16")
    shown = anydepth("inspect", out)
    assert "runs with: dtype bfloat16, engine fast, weights bfloat16" in shown.stdout
    text = json.loads(anydepth("generate", out, "--prompt", "the sea", "--max-new-tokens", 4, "--json").stdout)
    assert text["config"]["engine"] == "fast" and text["config"]["weights"] == "bfloat16"


def test_a_recipe_tunes_first_and_shows_it_on_the_page(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = str(folder / "text.txt")
    recipe.write_text(
        f"model: {{target: {folder / 'base'}}}\n"
        "methods: [{name: skip_set, skip_layers: [3]}]\n"
        f"tune: {{data: {data}, prompt_tokens: [8], new_tokens: 4, minutes: 0.2, max_perplexity_increase: 0.1}}\n"
        f"data: {{train: {data}}}\n"
        f"eval: {{data: {data}, sequence_length: 32, max_windows: 2}}\n"
        "bench: {prompt_tokens: [8], new_tokens: 4, num_runs: 2}\n"
        "analyze: {sequence_length: 32, num_windows: 2, num_permutations: 9, num_samples: 0}\n"
        "generate: {prompt: the sea, max_new_tokens: 4}\n"
    )
    done = anydepth("run", recipe, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Ways to run the base model:" in done.stdout and "fastest:" in done.stdout
    assert (tmp_path / "run" / "tuned" / "anydepth.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Ways to run the base model" in page and "Documents without figures" not in page
    again = anydepth("run", recipe, "--out", tmp_path / "run")
    assert "tune: done already" in again.stderr


def test_the_cache_is_listed_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "kernels-1.so").write_bytes(b"x" * 2**20)
    monkeypatch.setenv("ANYDEPTH_CACHE", str(tmp_path))

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["cache", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    found = json.loads(said("--json"))
    assert [entry["num_bytes"] for entry in found["entries"]] == [2**20] and found["folder"] == str(tmp_path)
    assert "compiled kernels: 1, 1 MiB" in said()
    assert "removed from" in said("--clear")
    assert json.loads(said("--json"))["entries"] == []
