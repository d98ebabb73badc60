"""analyze and report as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

from commands import anydepth, refused


def test_analysis_of_a_run_and_of_another_seed(finished: Path, text: Path) -> None:
    options = ["--data", text, "--sequence-length", 32, "--limit", 3, "--permutations", 9]
    done = anydepth("analyze", finished, *options, "--compare", finished, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.analyze/1"
    assert document["num_tokens"] == 3 * 32
    assert document["seeds"][0]["agreement"] == 1.0
    for_people = anydepth("analyze", finished, *options, "--quiet")
    assert "tokens that are" in for_people.stdout and "rank correlation" in for_people.stdout
    assert "layer_router: 4 gates let" in for_people.stdout


def test_analysis_of_whole_texts(finished: Path) -> None:
    options = ["--data", "embedded:valid", "--sequence-length", 32, "--limit", 2, "--permutations", 1]
    done = anydepth("analyze", finished, *options, "--samples", 5, "--json", "--quiet")
    found = json.loads(done.stdout)["correlations"]
    assert (found["unit"], found["num_samples"], len(found["samples"])) == ("paragraph", 5, 5)
    assert all(row["length"] <= 32 for row in found["samples"])
    none = anydepth("analyze", finished, *options, "--samples", 0, "--json", "--quiet")
    assert json.loads(none.stdout)["correlations"] is None
    assert "--samples is a number of at least 0; got -1" in refused("analyze", finished, "--samples", -1, "--quiet")
    for_people = anydepth("analyze", finished, *options, "--samples", 5)
    assert "of 5 paragraphs with" in for_people.stdout and "up to 5 texts of at most 32 tokens" in for_people.stderr


def test_report_reads_results(tmp_path: Path, finished: Path) -> None:
    done = anydepth("report", finished, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page_files" / "summary.csv").is_file()
