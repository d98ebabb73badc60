"""The layout of a page: escaped texts, tables with unrounded numbers as CSV, and captions that say where from."""

from __future__ import annotations

from typing import Any

from anydepth.report.layout import Page, html, provenance_line
from anydepth.report.quality import layers
from report_documents import HOSTILE, outline_of, table_of

ESCAPED = "&lt;script&gt;"


def test_a_table_is_rounded_and_its_csv_is_not(page: Page) -> None:
    """The CSV also has errors, the ends of ranges and further columns; None and what a row lacks are empty."""
    rows: list[dict[str, Any]] = [
        {"label": HOSTILE, "loss": 12.3456789, "loss_stderr": 0.125, "speedup": 1.5, "speedup_range": [1.25, 1.75]},
        {"label": "b", "loss": 2.5, "speedup": None, "is_noise": True},
    ]
    page.begin("0-bench")
    page.table({"label": "", "loss": "the loss", "speedup": "speed-up"}, rows, "rows", also=["is_noise"])
    first, second = table_of(page, "0-bench-rows")
    assert list(first) == ["label", "loss", "speedup", "is_noise", "loss_stderr", "speedup_low", "speedup_high"]
    assert list(first.values()) == [HOSTILE, "12.3456789", "1.5", "", "0.125", "1.25", "1.75"]
    assert list(second.values()) == ["b", "2.5", "", "True", "", "", ""]
    written = "".join(page.parts)
    assert ">12.35 ± 0.12<" in written and ">1.5 (1.25 to 1.75)<" in written
    assert ESCAPED in written and "<script>" not in written and "is_noise" not in written


def test_cells_of_some_columns_are_formatted_by_their_own_function(page: Page) -> None:
    """Escaped as well."""
    page.table({"label": "", "loss": "loss"}, [{"label": "a", "loss": 2.5}], "", {"loss": lambda _: HOSTILE})
    assert f">{ESCAPED}" in page.parts[0] and ">2.5<" not in page.parts[0]


def test_sections_name_their_model_where_a_page_has_several(page: Page) -> None:
    page.section("Speed")
    page.begin("0-bench", owner=HOSTILE)
    page.section("Speed")
    page.text(HOSTILE, "lead")
    assert page.parts[0] == "<h2>Speed</h2>"
    assert page.parts[1].startswith(f"<h2>Speed <small>{ESCAPED}") and page.parts[2].startswith('<p class="lead">&lt;')


def test_a_figure_is_a_file_and_part_of_the_page(page: Page) -> None:
    page.begin("3-eval", [{"seed": 7, "commit": "abcdef0123456789", "dirty": True}])
    page.figure(layers({"per_layer": {"mixer": [1.0], "ffn": [0.5]}}), 'What "ran" & how', "layers")
    assert [path.name for path in page.written] == ["3-eval-layers.png"] and page.written[0].read_bytes()
    outline = outline_of(html("a page", page.parts))
    assert outline.open == [] and [image["alt"] for image in outline.images] == ['What "ran" & how']
    assert "Seed 7, commit abcdef0123." in page.parts[0] and "Uncommitted changes." in page.parts[0]


def test_a_caption_names_all_seeds_and_commits_of_its_documents() -> None:
    documents: list[dict[str, Any]] = [
        {"seed": 2, "commits": ["bbbbbbbbbbbbbbbb", "aaaaaaaaaaaaaaaa"]},
        {"seed": 1, "commit": None},
        {"seed": 2, "commit": "aaaaaaaaaaaaaaaa", "dirty": False},
    ]
    assert provenance_line(*documents) == "Seed 1, 2, commit aaaaaaaaaa, bbbbbbbbbb, no commit."


def test_the_title_is_escaped() -> None:
    assert f"<h1>{ESCAPED}" in html(HOSTILE, []) and f"<title>anydepth: {ESCAPED}" in html(HOSTILE, [])
