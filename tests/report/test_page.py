"""The report page: self-contained, every text escaped, the numbers those of the documents."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

from anydepth.errors import UserError
from anydepth.report import plots
from anydepth.report.page import write_report
from report_documents import document_of, every_kind, outline_of, run_document, sweeps


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_report([run_document()], tmp_path_factory.mktemp("report") / "page.html")


def test_the_page_is_whole_and_self_contained(written: list[Path]) -> None:
    html = written[0].read_text()
    outline = outline_of(html)
    assert outline.open == []
    assert outline.headings == [
        "Quality and speed", "Skip set", "The router before training", "Training", "Which layers run", "Tasks", "Speed",
        "Where depth goes", "Depth of whole texts", "A text, token by token", "How it was made",
    ]  # fmt: skip
    assert len(outline.images) == 16
    for image in outline.images:
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert image["alt"]
    assert not re.search(r"(src|href)=.?(https?:)?//", html)
    assert "Uncommitted changes." in html


def test_every_file_named_was_written(written: list[Path]) -> None:
    """Named by the place and the kind of the document, and what it shows of it."""
    assert all(path.stat().st_size > 0 for path in written)
    assert sum(path.suffix == ".png" for path in written) == 16
    names = {path.name for path in written}
    assert {"2-train-gates.png", "5-analyze-gates-layer_router.png", "5-analyze-samples.png", "4-bench.csv"} <= names


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_comparisons_of_several_results_are_first(tmp_path: Path) -> None:
    search, fit, train = (document_of(kind) for kind in ("search", "fit", "train"))
    runs = [{**run_document(), "run": name, "stages": [search, fit]} for name in ("wide", "deep")]
    written = write_report([*runs, train, train, sweeps()[0]], tmp_path / "page.html")
    headings = outline_of(written[0].read_text()).headings
    assert headings[:4] == ["Quality and speed", "Quality against cost", "Trainings side by side", "Skip set"]
    assert headings.count("Skip set") == 2 and headings[-1] == "How it was made"


@pytest.mark.usefixtures("undrawn")
def test_files_of_an_earlier_report_are_gone(tmp_path: Path) -> None:
    """Others in the folder stay."""
    write_report([document_of("search")], tmp_path / "page.html")
    (tmp_path / "page_files" / "notes.txt").write_text("mine")
    written = write_report([document_of("fit")], tmp_path / "page.html")
    left = {path.name for path in (tmp_path / "page_files").iterdir()}
    assert left == {path.name for path in written[1:]} | {"notes.txt"}


@pytest.mark.slow
def test_every_axis_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of axes says what it shows; one that shares its axis is named by the panel that it shares with."""
    seen: list[Any] = []
    draw = plots.png
    monkeypatch.setattr(plots, "png", lambda figure, *paper: seen.append(figure) or draw(figure, *paper))
    write_report(every_kind(), tmp_path / "page.html")
    for figure in seen:
        title = [axes.get_title(loc="left") for axes in figure.axes]
        for name, labels in (
            ("x", [axes.get_xlabel() for axes in figure.axes]),
            ("y", [*(axes.get_ylabel() for axes in figure.axes), figure.get_supylabel()]),
        ):
            ticks = [tick.get_text() for axes in figure.axes for tick in getattr(axes, f"get_{name}ticklabels")()]
            words = any(any(letter.isalpha() for letter in tick) for tick in ticks)
            assert any(labels) or words, f"{title} has no name on {name}"


def test_every_committed_result_has_its_place_on_a_page(tmp_path: Path) -> None:
    """One by one and all together; of experiments the variants, and their losses."""
    paths = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
    documents = [json.loads(path.read_text()) for path in paths]
    assert {"anydepth.experiment/1"} < {document["schema"] for document in documents}
    write_report(documents, tmp_path / "all.html")
    experiment = next(document for document in documents if document["schema"] == "anydepth.experiment/1")
    page = write_report([experiment], tmp_path / "one.html")[0].read_text()
    assert all(str(row["variant"]) in page for row in experiment["rows"])
    everything = (tmp_path / "all.html").read_text()
    for document in documents:
        if "sweep" in document:  # capacities have a table and a figure
            assert all(row["label"] in everything for row in document["sweep"])
        else:  # others have no figures, but are named
            assert str(document["schema"]) in everything and escape(str(document.get("command") or "")) in everything
    assert "Language loss alone" in page


@pytest.mark.usefixtures("undrawn")
def test_several_models_have_different_labels(tmp_path: Path) -> None:
    """Each section says whose it is; of a single one there is nothing to say."""
    bench = document_of("bench")
    two = [{**bench, "source": "a.json", "label": "skip_set"}, {**bench, "run": "routers", "label": "layer_router"}]
    page = write_report(two, tmp_path / "two.html")[0].read_text()
    assert "<h2>Speed <small>a.json, skip_set</small></h2>" in page and "<h2>Speed <small>routers</small></h2>" in page
    assert "<h1>2 results</h1>" in page
    page = write_report(two[:1], tmp_path / "one.html")[0].read_text()
    assert "<h1>skip_set</h1>" in page and "<h2>Speed</h2>" in page
