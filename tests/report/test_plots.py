"""Plots: lines that differ, error bars by arithmetic, and pictures for dark pages."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from anydepth.report import plots, quality


def test_lines_differ_in_colour_or_dash() -> None:
    """24 of them: six colours in four dashes."""
    found = plots.styles(24)
    assert len({(style["color"], style["linestyle"]) for style in found}) == 24
    assert len({style["color"] for style in found[:6]}) == 6


def test_error_bars_are_distances_to_the_ends() -> None:
    """No range is no bar, and an end on the wrong side of the middle is none."""
    assert plots.error_bars([2.0, 3.0, 1.0], [[1.5, 2.25], None, [1.25, 1.5]]) == [[0.5, 0.0, 0.0], [0.25, 0.0, 0.5]]
    means = [{"mean": 2.0, "low": 1.0, "high": 2.5}, {"mean": 4.0, "low": None, "high": None}]
    assert plots.intervals(means) == ([2.0, 4.0], [[1.0, 0.0], [0.5, 0.0]])


def test_speed_ups_of_old_documents_have_the_range_of_their_pairs() -> None:
    assert plots.bounds({"speedup_interval": [1.0, 1.5], "speedup_range": [0.5, 2.0]}) == [1.0, 1.5]
    assert plots.bounds({"speedup_range": [0.5, 2.0]}) == [0.5, 2.0]
    assert plots.bounds({"speedup_interval": None}) is None


def test_labels_are_short_and_start_no_formula() -> None:
    assert plots.short("$x$") == r"\$x\$"
    assert plots.short("a" * 40) == "a" * 32


def test_the_first_bar_is_at_the_top() -> None:
    figure, axes = plots.new_figure("bars")
    axes.barh([0, 1], [1.0, 2.0])
    plots.name_rows(axes, ["first", "second"])
    low, high = axes.get_ylim()
    assert low > high and [tick.get_text() for tick in axes.get_yticklabels()] == ["first", "second"]
    assert figure.get_figwidth() == plots.WIDTH


def test_pictures_for_dark_pages_are_dark() -> None:
    figure = quality.layers({"per_layer": {"mixer": [0.5, 1.0], "ffn": [1.0, 1.0]}})
    light, dark = (
        np.asarray(Image.open(BytesIO(data)).convert("L")) for data in (plots.png(figure), plots.dark_png(figure))
    )
    assert light.shape == dark.shape and np.median(light) > 240 and np.median(dark) < 40
    assert dark.max() > 200  # the ink
