"""The report page: self-contained, every text escaped, the numbers those of the documents."""

from __future__ import annotations

import csv
import json
import re
from html import escape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anydepth.errors import UserError
from anydepth.report import depth, plots, quality
from anydepth.report.page import write_report
from report_documents import (
    CORRELATIONS,
    DOCUMENTS,
    HOSTILE,
    LINE,
    ORIGIN,
    bench_over_sizes,
    comparison,
    every_kind,
    run_document,
    sweeps,
)


class Outline(HTMLParser):
    """Tags opened and closed in turn, headings, and what pictures point at."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_report([run_document()], tmp_path_factory.mktemp("report") / "page.html")


def test_the_page_is_whole_and_self_contained(written: list[Path]) -> None:
    html = written[0].read_text()
    outline = Outline()
    outline.feed(html)
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


def test_tables_are_the_numbers(written: list[Path]) -> None:
    path = next(path for path in written if path.name == "summary.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert float(rows[0]["perplexity"]) == 12.3456789
    assert rows[1]["label"] == HOSTILE
    assert "12.35" in written[0].read_text()


def test_every_file_named_was_written(written: list[Path]) -> None:
    assert all(path.stat().st_size > 0 for path in written)
    assert sum(path.suffix == ".png" for path in written) == 16


def test_a_comparison_of_ways_is_a_table_and_a_picture(tmp_path: Path) -> None:
    written = write_report([comparison()], tmp_path / "page.html")
    outline = Outline()
    outline.feed(written[0].read_text())
    assert outline.headings == ["Full depth, early exit, lossless", "How it was made"] and len(outline.images) == 1
    path = next(path for path in written if path.name == "0-bench-ways.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [float(row["rouge_l"]) for row in rows] == [1.0, 0.8, 1.0]
    assert [row["speedup_low"] for row in rows] == ["1.2"] * 3 and rows[1]["label"] == HOSTILE


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_mixers_are_shown_and_trainings_compared(tmp_path: Path) -> None:
    train = {
        **ORIGIN,
        "schema": "anydepth.train/1",
        "seconds": 9.0,
        "tokens_per_second": 100.0,
        "loss_history": [
            {"step": step, "lm_loss": 5.0, "figures": {"mixer_router/softmax_share": 0.5}} for step in (1, 2)
        ],
    }
    text = {
        **DOCUMENTS[-1],
        "mixers": {
            "layers": [1, 3],
            "tokens": ["a", HOSTILE, "b"],
            "softmax": [[True, False], [True, True], [False] * 2],
        },
    }
    share = {"layer": 1, "softmax_share": 0.25, "entropy": 0.811}
    runs: list[dict[str, Any]] = [
        {
            **ORIGIN,
            "schema": "anydepth.run/1",
            "run": name,
            "stages": [train, {**DOCUMENTS[3], "mixers": [share]}, text],
        }
        for name in ("dynamic", "dynamic", HOSTILE)
    ]
    written = write_report(runs, tmp_path / "page.html")
    outline = Outline()
    outline.feed(written[0].read_text())
    assert outline.headings[0] == "Trainings side by side"
    assert outline.headings.count("Which mixer, token by token") == 3
    names = [path.name for path in written]
    assert {"losses.png", "0-train-metrics.png", "1-eval-mixers.csv", "2-generate-mixers.png"} <= set(names)
    assert "softmax in 2 of 2 layers" in written[0].read_text()


def test_sweeps_are_side_by_side(tmp_path: Path) -> None:
    outline = Outline()
    written = write_report(sweeps(), tmp_path / "page.html")
    outline.feed(written[0].read_text())
    assert outline.headings[0] == "Quality against cost"
    assert outline.headings[1] == "Sweep: layer_router"
    assert {"fronts.png", "0-sweep.csv", "1-sweep.csv"} <= {path.name for path in written}


def test_speed_over_sizes_and_drafts_by_place(tmp_path: Path) -> None:
    written = write_report([bench_over_sizes()], tmp_path / "page.html")
    assert {"0-bench-lines.png", "0-bench-acceptance.png"} <= {path.name for path in written}


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


def test_several_models_have_different_labels(tmp_path: Path) -> None:
    """Each section says whose it is; of a single one there is nothing to say."""
    bench = next(document for document in every_kind() if document["schema"] == "anydepth.bench/1")
    two = [{**bench, "source": "a.json", "label": "skip_set"}, {**bench, "run": "routers", "label": "layer_router"}]
    page = write_report(two, tmp_path / "two.html")[0].read_text()
    assert "<h2>Speed <small>a.json, skip_set</small></h2>" in page and "<h2>Speed <small>routers</small></h2>" in page
    assert "<h1>2 results</h1>" in page
    page = write_report(two[:1], tmp_path / "one.html")[0].read_text()
    assert "<h1>skip_set</h1>" in page and "<h2>Speed</h2>" in page


def test_gates_and_whole_texts_have_their_place(written: list[Path]) -> None:
    """Warnings are escaped sentences; correlations are those of the document, in the table and as points."""
    names = {path.name: path for path in written}
    assert {"2-train-gates.png", "5-analyze-gates-layer_router.png", "5-analyze-samples.png"} <= set(names)
    html = written[0].read_text()
    assert "Warning at step 2: gates are stuck: &lt;script&gt;" in html
    assert html.count("Warning: layer 0 always runs: &lt;script&gt;") == 2
    rows = list(csv.DictReader(names["5-analyze-correlations.csv"].read_text(encoding="utf-8").splitlines()))
    assert [(row["of"], row["with"]) for row in rows[:2]] == [
        ("layers per token", "length"), ("layers per token", "perplexity"),
    ]  # fmt: skip
    assert (rows[0]["pearson_r"], rows[0]["pearson_low"], rows[2]["spearman_r"]) == ("0.5", "0.25", "")
    assert "0.50 (0.25 to 0.75)" in html and ">constant<" in html


def test_points_of_texts_are_where_the_document_has_them() -> None:
    figure = depth.scatter(CORRELATIONS)
    assert len(figure.axes) == 2  # rarity is constant
    points = figure.axes[0].collections[-1].get_offsets().tolist()
    assert points == [[row["length"], row["depth"]] for row in CORRELATIONS["samples"]]
    assert list(figure.axes[0].lines[0].get_ydata()) == LINE["y"]


def test_pictures_for_dark_pages_are_dark(tmp_path: Path) -> None:
    figure = quality.layers({"per_layer": {"mixer": [0.5, 1.0], "ffn": [1.0, 1.0]}})
    light, dark = (
        np.asarray(Image.open(BytesIO(data)).convert("L")) for data in (plots.png(figure), plots.dark_png(figure))
    )
    assert light.shape == dark.shape and np.median(light) > 240 and np.median(dark) < 40
    assert dark.max() > 200  # the ink
