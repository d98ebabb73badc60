"""Sections about depth: shades of tokens, gates, and correlations of whole texts, as the documents have them."""

from __future__ import annotations

from typing import Any

import pytest

from anydepth.report import depth
from anydepth.report.layout import Page
from report_documents import CORRELATIONS, DEPTH, GATES, HOSTILE, LINE, document_of, outline_of, table_of

MIXERS = {"layers": [1, 3], "tokens": ["a", HOSTILE, "b"], "softmax": [[True, False], [True, True], [False] * 2]}


def shades_of(part: str) -> list[tuple[int, str]]:
    """The number of the shade and the title of each token."""
    spans = part.split("<span ")[1:]
    return [(depth.SHADES.index(span.split('"')[1].removeprefix("background:")), span.split('"')[3]) for span in spans]


# --- a text, token by token ------------------------------------------------------------------------------------------


def test_tokens_are_shaded_by_their_depth(page: Page) -> None:
    """Five shades of ten layers: fifths of the depth; full depth has the darkest."""
    depths = [0.0, 1.9, 2.0, 5.0, 9.5, 10.0]
    rows = [[1.0] * 10] * len(depths)
    tokens = ["a", "b", HOSTILE, "d", "e", "f"]
    depth.text(page, {"prompt": "x", "num_layers": 10, "depths": depths, "tokens": tokens, "layers": rows})
    (part,) = (part for part in page.parts if 'class="tokens"' in part)
    shaded = shades_of(part)
    assert [shade for shade, _ in shaded] == [0, 0, 1, 2, 4, 4]
    assert shaded[1][1] == "1.9 of 10 layers" and "<script>" not in part
    legend = next(part for part in page.parts if 'class="legend"' in part)
    assert all(f"≤ {layers}&" in legend for layers in (2, 4, 6, 8, 10))


def test_tokens_of_mixer_routing_are_shaded_by_softmax(page: Page) -> None:
    depth.text(page, {**document_of("generate"), "mixers": MIXERS})
    assert outline_of(page).headings == ["Which mixer, token by token", "A text, token by token"]
    part = next(part for part in page.parts if 'class="tokens"' in part)
    wanted = [(2, "softmax in 1 of 2 layers"), (4, "softmax in 2 of 2 layers"), (0, "softmax in 0 of 2 layers")]
    assert shades_of(part) == wanted
    assert "mixers.png" in {path.name for path in page.written}


def test_a_text_without_tokens_has_no_picture(page: Page) -> None:
    depth.text(page, {**document_of("generate"), "tokens": [], "depths": [], "layers": []})
    assert outline_of(page).headings == ["A text, token by token"] and page.written == []


def test_labels_of_tokens_are_visible_and_start_no_formula() -> None:
    document = {"tokens": ["\n", "a\tb", "$", "\x07", "w" * 20], "layers": [[1.0, 0.0]] * 5}
    (axes,) = depth.heat_map(document).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["⏎", "a⇥b", r"\$", "·", "w" * 16]


# --- analysis --------------------------------------------------------------------------------------------------------


def test_gates_and_whole_texts_have_their_place(page: Page) -> None:
    """Warnings are escaped sentences; correlations are those of the document, in the table and as points."""
    depth.analysis(page, document_of("analyze"))
    assert outline_of(page).headings == ["Where depth goes", "Depth of whole texts"]
    assert {"gates-layer_router.png", "samples.png"} <= {path.name for path in page.written}
    written = "".join(page.parts)
    assert "Warning: layer 0 always runs: &lt;script&gt;" in written
    rows = table_of(page, "correlations")
    assert [(row["of"], row["with"]) for row in rows[:2]] == [
        ("layers per token", "length"), ("layers per token", "perplexity"),
    ]  # fmt: skip
    assert (rows[0]["pearson_r"], rows[0]["pearson_low"], rows[2]["spearman_r"]) == ("0.5", "0.25", "")
    assert "0.50 (0.25 to 0.75)" in written and ">constant<" in written
    assert [row["mean"] for row in table_of(page, "lengths")] == ["1.5"]
    assert "Run 1 and run 2 agree in 90.0% of gates, 50.0% by chance (kappa 0.80)." in written


@pytest.mark.parametrize("found", [None, {**CORRELATIONS, "of": None}])
def test_depth_that_is_constant_has_no_correlations(page: Page, found: Any) -> None:
    """As where all texts run the same layers, or none were asked for."""
    depth.analysis(page, {**document_of("analyze"), "correlations": found, "gates": [], "seeds": []})
    assert outline_of(page).headings == ["Where depth goes"]
    assert not any(path.name.startswith(("correlations", "samples", "gates")) for path in page.written)


def test_points_of_texts_are_where_the_document_has_them() -> None:
    figure = depth.scatter(CORRELATIONS)
    assert len(figure.axes) == 2  # rarity is constant
    points = figure.axes[0].collections[-1].get_offsets().tolist()
    assert points == [[row["length"], row["depth"]] for row in CORRELATIONS["samples"]]
    assert list(figure.axes[0].lines[0].get_ydata()) == LINE["y"]


def test_depth_over_position_and_loss_is_at_the_middle_of_each_group() -> None:
    """Positions are counted from 0 in documents and from 1 in the plot."""
    groups = [{"first": first, "last": last, "depth": DEPTH} for first, last in ((0, 0), (1, 2), (3, 6))]
    bins = [{"low": low, "high": low + 0.5, "depth": DEPTH} for low in (0.0, 2.0)]
    left, right = depth.curves({"positions": groups, "losses": {"bins": bins}}).axes
    assert list(left.lines[0].get_xdata()) == [1.0, 2.5, 5.5]
    assert list(right.lines[0].get_xdata()) == [0.25, 2.25]


def test_bars_of_gates_are_their_fractions_and_means_are_lines() -> None:
    by_layer, by_token = depth.gates(GATES).axes
    assert [(bar.get_x() + 0.4, bar.get_height()) for bar in by_layer.patches] == [(0.0, 1.0), (1.0, 0.4)]
    assert [bar.get_height() for bar in by_token.patches] == GATES["open_gates"]
    assert by_layer.lines[0].get_ydata()[0] == 0.7
    assert by_token.lines[0].get_xdata()[0] == pytest.approx(1.4)  # 0.7 of two gates
