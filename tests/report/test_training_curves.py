"""Training on the page: which plots a training has, and that their lines are the numbers of its steps."""

from __future__ import annotations

from typing import Any

import pytest

from anydepth.report import training_curves
from anydepth.report.layout import Page
from report_documents import HOSTILE, ORIGIN, document_of, outline_of, table_of


def training(num_steps: int, **fields: Any) -> dict[str, Any]:
    """A training with a loss of n at step n."""
    history = [{"step": step, "lm_loss": float(step), **fields} for step in range(1, num_steps + 1)]
    return {**ORIGIN, "schema": "anydepth.train/1", "seconds": 9.0, "tokens_per_second": 100.0, "loss_history": history}


def names_of(page: Page) -> set[str]:
    return {path.stem for path in page.written}


def test_a_training_has_every_plot_that_its_steps_have_numbers_for(page: Page) -> None:
    page.begin("train")
    training_curves.training(page, document_of("train"))
    assert names_of(page) == {"train", "train-depth", "train-metrics", "train-layers", "train-gates"}
    written = "".join(page.parts)
    assert "Warning at step 2: gates are stuck: &lt;script&gt;" in written
    assert "Warning: layer 0 always runs: &lt;script&gt;" in written


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {"train"}),
        ({"layers": {"mixer": [1.0], "ffn": [1.0]}}, {"train"}),  # every token ran every layer
        ({"layers": {"mixer": [1.0], "ffn": [0.5]}}, {"train", "train-layers"}),
        ({"figures": {"router/gate_entropy": 0.5}}, {"train", "train-gates"}),
    ],
)
def test_plots_that_would_show_nothing_are_left_out(page: Page, fields: dict[str, Any], wanted: set[str]) -> None:
    page.begin("train")
    training_curves.training(page, training(2, **fields))
    assert names_of(page) == wanted


def test_a_training_without_steps_has_no_section(page: Page) -> None:
    training_curves.training(page, training(0))
    assert page.parts == []


def test_lines_of_losses_are_the_terms_of_the_steps() -> None:
    """The language loss first; a term that begins late begins at its step, and what is no loss has no line."""
    document = training(3, learning_rate=0.1, mean_depth=3.0, seconds=1.0)
    document["loss_history"][2]["distillation"] = 0.25
    (axes,) = training_curves.losses(document).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {"lm_loss": ([1, 2, 3], [1.0, 2.0, 3.0]), "distillation": ([3], [0.25])}
    assert axes.lines[0].get_label() == "lm_loss"


def test_trainings_are_compared_by_means_of_ten_steps() -> None:
    """25 steps are three points, the last one the mean of five."""
    (axes,) = training_curves.loss_curves({"a": training(25)}).axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [10, 20, 25] and list(line.get_ydata()) == [5.5, 15.5, 23.0]


def test_trainings_are_side_by_side_where_there_are_several(page: Page) -> None:
    """Of language models: a drafter's loss is another one."""
    drafter = {**training(2), "loss_history": [{"step": 1, "loss": 3.0}]}
    untrained = training(0)
    for documents in ([training(2), untrained], [training(2), drafter]):
        training_curves.comparison(page, documents)
        assert page.parts == []
    training_curves.comparison(page, [{**training(2), "run": name} for name in ("dynamic", "dynamic", HOSTILE)])
    assert outline_of(page).headings == ["Trainings side by side"] and names_of(page) == {"losses"}


def test_metrics_of_methods_and_of_gates_are_apart() -> None:
    document = document_of("train")
    assert training_curves.own_metrics(document) == ["layer_router/backward_temperature"]
    gates = training_curves.own_metrics(document, of_gates=True)
    assert len(gates) == 5 and all(name.startswith("layer_router/gate_") for name in gates)
    (axes,) = training_curves.metrics(document).axes
    assert axes.get_title() == "layer_router: backward temperature"
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.8, 0.6, 0.4])


def test_gates_of_several_methods_are_named() -> None:
    both = {f"{name}/gate_{key}": 0.5 for name in ("a", "b") for key in ("entropy", "entropy_of_mean")}
    entropy, spread = training_curves.gates(training(2, figures=both)).axes
    labels = [text.get_text() for text in entropy.get_legend().get_texts()]
    assert labels == [f"{name}: {label}" for name in ("a", "b") for label in ("mean over gates", "of the mean gate")]
    assert list(entropy.lines[0].get_ydata()) == [0.5, 0.5] and list(spread.lines[0].get_ydata()) == []


def test_layers_are_rows_and_steps_are_columns() -> None:
    """Steps without numbers of layers are left out."""
    document = training(3)
    for row, fractions in zip(document["loss_history"][1:], ([1.0, 0.5], [1.0, 0.25]), strict=True):
        row["layers"] = {"ffn": fractions, "softmax": [1.0, 1.0]}
    ffn, softmax, _ = training_curves.layers(document).axes  # and the bar of colours
    assert ffn.images[0].get_array().tolist() == [[1.0, 1.0], [0.5, 0.25]]
    assert ffn.images[0].get_extent() == [1.5, 3.5, -0.5, 1.5]
    assert softmax.get_title() == "Training: softmax"


# --- searches and fits -----------------------------------------------------------------------------------------------


def test_a_search_names_what_it_leaves_out_and_how_that_does_on_other_text(page: Page) -> None:
    rows = [{"label": "skip set", "perplexity": 13.5, "loss": 2.6, "weight_bytes": 1000}]
    held_out = {"rows": rows, "num_tokens": 94, "warning": "int8 loses less"}
    page.begin("search")
    training_curves.search(page, {**document_of("search"), "held_out": held_out})
    written = "".join(page.parts)
    assert "skip_layers: 1, 3" in written and "skip_mixers" not in written
    assert "75.0% of next tokens as at full depth" in written and "Warning: int8 loses less." in written
    assert [row["perplexity"] for row in table_of(page, "search-unseen")] == ["13.5"]
    assert names_of(page) == {"search", "search-unseen"}


def test_the_trajectory_of_a_search_names_the_layers() -> None:
    (axes,) = training_curves.trajectory(document_of("search")).axes
    assert [text.get_text() for text in axes.texts] == ["3", "1"]
    assert list(axes.lines[0].get_ydata()) == [0.9, 0.75]


def test_a_fitted_router_is_next_to_a_static_skip_set(page: Page) -> None:
    page.begin("fit")
    training_curves.fit(page, document_of("fit"))
    rows = [(row["choice"], row["skip_share"], row["divergence"]) for row in table_of(page, "fit")]
    assert rows == [("static", "0.37", "1.4"), ("routed", "0.36", "1.1")]
