"""Numbers and sentences of results: how values of each kind are written, and where nothing was shown."""

from __future__ import annotations

from typing import Any

import pytest

from anydepth.report import wording

SPEEDUP: dict[str, Any] = {"speedup": 1.254, "speedup_interval": [1.2, 1.31], "is_noise": False}
RISK: dict[str, Any] = {
    "met": True,
    "risk": 0.0217,
    "num_sequences": 200,
    "p_value": 0.0123,
    "config": {"max_risk": 0.05, "confidence": 0.9},
}


@pytest.mark.parametrize(
    ("value", "key", "wanted"),
    [
        (None, "loss", ""),
        (12.34567, "perplexity", "12.35"),
        (12, "num_tokens", "12"),
        (0.0391, "perplexity_increase", "+3.9%"),
        (-0.0391, "perplexity_increase", "-3.9%"),
        (1_540_000, "weight_bytes", "1.5 MB"),
        ("bfloat16", "weights", "bfloat16"),
    ],
)
def test_a_number_is_written_by_the_kind_of_its_key(value: Any, key: str, wanted: str) -> None:
    assert wording.number(value, key) == wanted


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({}, ""),
        ({"loss": 2.5}, "2.5"),
        ({"loss": 2.5, "loss_stderr": 0.125}, "2.5 ± 0.12"),
        ({"loss": 2.5, "loss_half_range": 0.25}, "2.5 ± 0.25"),
        ({"loss": 2.5, "loss_range": [2.25, 2.75], "loss_interval": [0, 9]}, "2.5 (2.25 to 2.75)"),
        ({"loss": 2.5, "loss_interval": [2.0, 3.5]}, "2.5 (2 to 3.5)"),
        ({"loss": 2.5, "loss_range": [2.5, 2.5], "loss_half_range": 0.0}, "2.5"),  # one seed
    ],
)
def test_a_cell_has_the_error_or_the_range_of_its_value(row: dict[str, Any], wanted: str) -> None:
    assert wording.cell("loss", row) == wanted


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "1.25× (1.20–1.31)"),
        ({"is_noise": True}, "1.25× (1.20–1.31) noise"),
        ({"speedup_interval": None}, "1.25×"),
        ({"speedup": None}, ""),
    ],
)
def test_a_speed_up_has_its_interval_and_noise_is_marked(change: dict[str, Any], wanted: str) -> None:
    assert wording.speedup({**SPEEDUP, **change}, "×") == wanted


def test_columns_are_titled_by_their_keys_unless_they_have_a_title() -> None:
    found = wording.columns("label mean_depth gflops_per_token", gflops_per_token="cost", low="from")
    assert found == {"label": "", "mean_depth": "mean depth", "gflops_per_token": "cost", "low": "from"}
    assert list(found)[-1] == "low"
    assert wording.columns("gflops_per_token") == {"gflops_per_token": "GFLOPs a token"}


def test_results_of_the_same_name_are_numbered() -> None:
    documents: list[dict[str, Any]] = [
        {"run": "wide", "label": "a"},
        {"run": None, "label": "a"},
        {"run": "deep", "label": "b"},
        {"label": "a"},
    ]
    named = wording.named(documents)
    assert list(named) == ["wide", "a (2)", "deep", "a (4)"] and list(named.values()) == documents


def test_a_bound_is_stated_with_its_confidence_or_not_at_all() -> None:
    assert wording.risk(RISK) == "risk 0.022 on 200 texts; at most 0.05 with confidence 0.9 (p 0.012)"
    assert wording.risk({**RISK, "met": False}).endswith("nothing is skipped")


def test_dependence_on_the_token_has_its_least_p_value_named() -> None:
    """Of 199 permutations none reaches the gates: 1/200 is the least that can come out."""
    found = {"num_gates": 3, "mutual_information_bits": 0.1, "static_bits": 0.01, "num_permutations": 199}
    least, more = (wording.conditionality({**found, "p_value": number / 200}) for number in (1, 2))
    assert "p 0.005 (the least that" in least and more.endswith("p 0.01")
    assert "does not depend on the token" in wording.conditionality({"num_gates": 0})


def test_correlations_of_a_constant_have_no_number() -> None:
    row = {"pearson": {"r": 0.5, "low": 0.25, "high": 0.75}, "spearman": {"r": None, "low": None, "high": None}}
    assert wording.correlation("pearson", row) == "0.50 (0.25 to 0.75)"
    assert wording.correlation("spearman", row) == "constant"
    assert wording.correlation("pearson", {"pearson": {"r": 0.5, "low": None, "high": None}}) == "0.50"


def test_ways_and_capacities_are_rows_of_one_table() -> None:
    """What a way measured itself is next to what it is compared by; the control is the last row."""
    way = {"speedup": 1.5, "label": "lossless", "adapted": {"mean_depth": 2.0, "speedup": 9.0}}
    (row,) = wording.ways({"rows": [way]})
    assert (row["mean_depth"], row["speedup"]) == (2.0, 1.5)
    assert wording.capacities({"sweep": [{"capacity": 1}], "control": {"label": "int8"}})[-1] == {"label": "int8"}
    assert wording.capacities({"sweep": [{"capacity": 1}], "control": None}) == [{"capacity": 1}]


def test_skipped_fractions_are_measured_next_to_the_one_that_was_set() -> None:
    row = {"held_out": 0.412, "calibration": 0.398, "target": 0.4}
    (line,) = wording.skipped({"skip_share": {"ffn_router": row}})
    assert line.startswith("ffn_router skips 41.2% of its decisions on held-out text, 39.8% on the")
    assert line.endswith("40.0% was set") and wording.skipped({}) == []
