"""Sections about quality: two models next to each other, or one where nothing can differ."""

from __future__ import annotations

from typing import Any

import pytest

from anydepth.report import quality
from anydepth.report.layout import Page
from report_documents import HOSTILE, document_of, outline_of, table_of

NOTE = {"note": "nothing is attached"}


def test_an_evaluation_has_layers_perplexity_and_tasks(page: Page) -> None:
    share = {"layer": 1, "softmax_share": 0.25, "entropy": 0.811}
    skipped = {"skip_share": {"ffn_router": 0.375}}
    quality.evaluation(page, {**document_of("eval"), **skipped, "mixers": [share]})
    assert outline_of(page).headings == ["Which layers run", "Tasks"]
    written = "".join(page.parts)
    assert "Perplexity 13.25, the same model at full depth 12.5." in written
    assert "ffn_router skips 37.5% of its decisions here." in written
    assert table_of(page, "mixers") == [{"layer": "1", "softmax_share": "0.25", "entropy": "0.811"}]
    (row,) = table_of(page, "tasks")
    assert (row["full"], row["score"], row["full_stderr"], row["score_stderr"]) == ("0.6", "0.5", "0.05", "0.06")


def test_full_depth_is_the_same_model_where_an_adapter_is_on(page: Page) -> None:
    """The base model without the adapter is named as such."""
    quality.evaluation(page, {**document_of("eval"), "full_depth_adapted": {"perplexity": 11.75}})
    wanted = "Perplexity 13.25, the same model at full depth 11.75; the base model without LoRA 12.5."
    assert wanted in "".join(page.parts)


def test_one_model_is_shown_where_nothing_can_differ(page: Page) -> None:
    quality.evaluation(page, {**document_of("eval"), **NOTE})
    assert outline_of(page).headings == ["Perplexity", "Tasks"]
    written = "".join(page.parts)
    assert ": nothing is attached." in written and ">Perplexity 13.25.<" in written and "adapted" not in written
    (row,) = table_of(page, "tasks")
    assert "score" not in row and row["full"] == "0.6"


@pytest.mark.parametrize(("note", "wanted"), [({}, [12.5, 13.25]), (NOTE, [12.5])])
def test_bars_of_perplexity_have_the_intervals_of_the_document(note: dict[str, Any], wanted: list[float]) -> None:
    (axes,) = quality.perplexity({**document_of("eval"), **note, "label": HOSTILE}).axes
    assert [bar.get_width() for bar in axes.patches] == wanted
    ends = axes.collections[0].get_segments()
    assert [[x for x, _ in bar] for bar in ends] == [[12.0, 13.0], [12.75, 13.75]][: len(wanted)]


@pytest.mark.parametrize("same", [False, True])
def test_bars_of_scores_are_95_percent(same: bool) -> None:
    """1.96 standard errors to each side; none where the document has no error."""
    rows = [
        {"task": "arc", "metric": "acc", "full": 0.5, "full_stderr": 0.05, "score": 0.25, "score_stderr": 0.025},
        {"task": "sums", "metric": "exact_match", "full": 0.75, "full_stderr": None, "score": 1.0},
    ]
    (axes,) = quality.scores(rows, same=same).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [0.5, 0.75, *([] if same else [0.25, 1.0])]
    ends = [[x for x, _ in bar] for own in axes.collections for bar in own.get_segments()]
    wanted = [[0.402, 0.598], [0.75, 0.75], *([] if same else [[0.201, 0.299], [1.0, 1.0]])]
    assert ends == [pytest.approx(pair) for pair in wanted]
    positions = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert positions == pytest.approx([0, 1] if same else [-0.2, 0.8, 0.2, 1.2])


def test_tasks_with_metrics_that_are_no_means_have_a_table_and_no_picture(page: Page) -> None:
    """Perplexity of words has no place on an axis from 0 to 1."""
    task = {"word_perplexity,none": 20.5, "num_items": 4, "num_fewshot": 0}
    document = {**document_of("eval"), "tasks": {"text": task}}
    quality.evaluation(page, {**document, "full_depth": {**document["full_depth"], "tasks": {"text": task}}})
    assert [row["metric"] for row in table_of(page, "tasks")] == ["word_perplexity,none"]
    assert "scores.png" not in {path.name for path in page.written}
