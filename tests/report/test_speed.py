"""Sections about speed: the summary, paired timings next to their ideal, and models without a speed-up."""

from __future__ import annotations

from typing import Any

import pytest

from anydepth.report import speed
from anydepth.report.layout import Page
from report_documents import HOSTILE, bench_over_sizes, comparison, document_of, outline_of, run_document, table_of


def test_the_summary_has_the_numbers_of_the_run(page: Page) -> None:
    speed.summary(page, [run_document(), document_of("train")])
    rows = table_of(page, "summary")
    assert float(rows[0]["perplexity"]) == 12.3456789 and [row["label"] for row in rows] == ["base model", HOSTILE]
    assert ">12.35<" in "".join(page.parts) and "tradeoff.png" in {path.name for path in page.written}


def test_rows_of_several_runs_are_named_by_their_run(page: Page) -> None:
    """Two runs of one method would have equal labels."""
    results = [{**run_document(), "run": "wide"}, run_document()]
    speed.summary(page, results)
    labels = [row["label"] for row in table_of(page, "summary")]
    assert labels == ["wide: base model", f"wide: {HOSTILE}", f"{HOSTILE}: base model", f"{HOSTILE}: {HOSTILE}"]
    assert results[0]["summary"][0]["label"] == "base model"  # documents stay as they are


@pytest.mark.parametrize("summary", [None, [{"label": "a", "perplexity": 12.5}]])
def test_a_run_that_was_not_timed_has_no_picture_of_speed(page: Page, summary: Any) -> None:
    speed.summary(page, [{**run_document(), "summary": summary}])
    assert outline_of(page).headings == (["Quality and speed"] if summary else [])
    assert [path.suffix for path in page.written] == ([".csv"] if summary else [])


def test_a_comparison_of_ways_is_a_table_and_a_picture(page: Page) -> None:
    page.begin("0-bench")
    speed.bench(page, comparison())
    assert outline_of(page).headings == ["Full depth, early exit, lossless"] and len(outline_of(page).images) == 1
    rows = table_of(page, "0-bench-ways")
    assert [float(row["rouge_l"]) for row in rows] == [1.0, 0.8, 1.0]
    assert [row["speedup_low"] for row in rows] == ["1.2"] * 3 and rows[1]["label"] == HOSTILE


def test_speed_over_sizes_and_drafts_by_place(page: Page) -> None:
    page.begin("0-bench")
    speed.bench(page, bench_over_sizes())
    names = {path.name for path in page.written}
    assert names == {"0-bench.png", "0-bench-lines.png", "0-bench-acceptance.png", "0-bench.csv"}


def test_a_model_with_nothing_attached_has_no_speed_up(page: Page) -> None:
    """Tokens per second alone, and nothing drawn."""
    bench = document_of("bench")
    rows = [{**bench["rows"][0], "speedup": None, "prefill": None, "decode": None}]
    page.begin("0-bench")
    speed.bench(page, {**bench, "rows": rows})
    assert "Nothing is attached" in "".join(page.parts)
    assert [path.name for path in page.written] == ["0-bench.csv"]
    (row,) = table_of(page, "0-bench")
    assert (row["full"], row["adapted_rate"], row["speedup"]) == ("20.0", "25.0", "")


def test_measured_speed_ups_are_next_to_their_ideal() -> None:
    """Of prefill, decoding and both; intervals where there are some."""
    (axes,) = speed.speedups(document_of("bench")).axes
    assert [bar.get_width() for bar in axes.patches] == [1.25] * 3
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["fast bfloat16 batch 1, 64 + 8 tokens: all", "prefill", "decode"]
    segments = [own.get_segments() for own in axes.collections]
    (intervals,) = (found for found in segments if len(found) == 1)
    assert [x for x, _ in intervals[0]] == pytest.approx([1.21, 1.29])
    (ideals,) = (found for found in segments if len(found) == 3)
    assert [line[0][0] for line in ideals] == [1.5] * 3


def test_lines_are_drawn_along_one_size_for_each_value_of_the_other() -> None:
    """Sorted by size, whatever the order of the document."""
    document = bench_over_sizes()
    rows = [{**row, "speedup": 1 + row["batch_size"] / 10 + row["prompt_tokens"] / 1000} for row in document["rows"]]
    by_batch, by_prompt = speed.lines({"rows": rows[::-1]}).axes
    drawn = [line for line in by_batch.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in drawn] == [[1, 4]] * 2
    assert list(drawn[0].get_ydata()) == pytest.approx([1.164, 1.464])
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (by_batch, by_prompt)]
    assert labels == [
        ["fast bfloat16 prompt 64", "fast bfloat16 prompt 512"], ["fast bfloat16 batch 1", "fast bfloat16 batch 4"],
    ]  # fmt: skip


def test_acceptance_is_by_position_from_one() -> None:
    document = bench_over_sizes()
    plain = {**document["rows"][0], "adapted": {"tokens_per_second": 1.0}}
    (axes,) = speed.acceptance({"rows": [plain, document["rows"][1]]}).axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [([1, 2], [0.5, 0.4])]


def test_labels_of_points_are_towards_the_middle() -> None:
    """They would leave the figure otherwise."""
    rows = [{"label": str(rate), "tokens_per_second": rate, "perplexity": 10.0} for rate in (10.0, 20.0, 90.0)]
    (axes,) = speed.tradeoff(rows).axes
    assert [text.get_ha() for text in axes.texts] == ["left", "left", "right"]  # the mean is 40


def test_noise_is_not_as_wide_as_the_picture() -> None:
    rows = [{"label": name, "tokens_per_second": x, "perplexity": 12.0} for name, x in (("a", 81.2), ("b", 82.0))]
    low, high = speed.tradeoff(rows).axes[0].get_xlim()
    assert low < 74 and high > 89
