"""Learn-then-Test: its p-values against known ones, its promise over repeated trials, and that it fails closed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anydepth
from anydepth import HFEngine
from anydepth.calibration.guarantee import (
    TESTS,
    RiskTable,
    bound_risk,
    difference,
    inconsistency,
    learn_then_test,
    least_sequences,
    p_value,
    quality_loss,
    shared_settings,
)
from anydepth.calibration.shares import collect_scores, set_options, thresholds_of
from anydepth.errors import UserError
from anydepth.json_io import plain
from tiny import tiny_llama

EPSILON, DELTA = 0.1, 0.1


def test_binary_losses_have_the_exact_tail() -> None:
    wanted = sum(math.comb(50, k) * 0.1**k * 0.9 ** (50 - k) for k in range(3))
    assert p_value([1.0, 1.0] + [0.0] * 48, 0.1) == pytest.approx(wanted, rel=1e-9)
    assert p_value([0.0] * 59, 0.05) < 0.05 < p_value([0.0] * 58, 0.05)
    assert least_sequences(0.05, 0.95) == 59


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), st.floats(0.01, 0.99))
def test_p_values_are_shares_and_high_risk_is_never_shown_to_be_low(losses: list[float], bound: float) -> None:
    p = p_value(losses, bound)
    assert 0 <= p <= 1
    if sum(losses) / len(losses) >= bound:
        assert p > 0.3


def test_fixed_sequence_stops_at_the_first_that_fails() -> None:
    risks = [0.0, 0.0, 0.5, 0.0]
    tested = []
    found = learn_then_test(lambda i: [risks[i]] * 200, 4, max_risk=0.1, confidence=0.9, on_test=tested.append)
    assert found.chosen == 1 and found.met and len(tested) == 3
    nothing = learn_then_test(lambda i: [0.5] * 200, 4, max_risk=0.1, confidence=0.9)
    assert nothing.chosen is None and not nothing.met and nothing.p_value == 1


def test_bonferroni_tests_all_at_a_part_of_the_error() -> None:
    """Of 60 sequences without a loss p is 0.95⁶⁰ = 0.046: enough for one test at 0.05, not for one of two."""
    risks, tested = [0.0, 0.5, 0.0], []
    shared: dict[str, Any] = {"max_risk": 0.05, "confidence": 0.95}
    assert learn_then_test(lambda i: [0.0] * 60, 1, **shared, test="bonferroni").met
    assert not learn_then_test(lambda i: [0.0] * 60, 2, **shared, test="bonferroni").met
    assert least_sequences(0.05, 0.95, 2) == math.ceil(math.log(0.025) / math.log(0.95))
    found = learn_then_test(lambda i: [risks[i]] * 200, 3, **shared, test="bonferroni", on_test=tested.append)
    assert found.chosen == 2 and len(tested) == 3  # the failure between does not end it
    with pytest.raises(UserError, match="tests are fixed-sequence, bonferroni"):
        learn_then_test(lambda i: [0.0], 1, **shared, test="t")


def test_losses_in_between_have_the_smaller_of_two_bounds() -> None:
    """Hoeffding: (ε/r)^{nr} ((1−ε)/(1−r))^{n(1−r)}; Bentkus: e·P(Bin(n, ε) ≤ ⌈nr⌉), both by powers and binomials."""
    for losses in ([0.5, 0.25] + [0.0] * 98, [0.05] * 100, [0.3] * 10):
        n, r, bound = len(losses), sum(losses) / len(losses), 0.1
        hoeffding = (bound / r) ** (n * r) * ((1 - bound) / (1 - r)) ** (n * (1 - r)) if r < bound else 1.0
        most = math.ceil(round(sum(losses), 9))
        bentkus = math.e * sum(math.comb(n, k) * bound**k * (1 - bound) ** (n - k) for k in range(most + 1))
        assert p_value(losses, bound) == pytest.approx(min(hoeffding, bentkus, 1), rel=1e-9)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("risks", [[0.02, 0.101, 0.03], [0.101] * 16, [0.0] + [0.101] * 15])
def test_rarely_is_any_setting_above_the_bound_chosen(test: str, risks: list[float]) -> None:
    """The family-wise error, at its hardest: risks just above the bound, in any order; losses of one draw for all."""
    generator, trials, broken = torch.Generator().manual_seed(5), 200, 0
    for _ in range(trials):
        drawn = torch.rand(100, generator=generator)

        def losses(number: int, drawn: torch.Tensor = drawn) -> list[float]:
            return (drawn < risks[number]).double().tolist()

        found = learn_then_test(losses, len(risks), max_risk=EPSILON, confidence=1 - DELTA, test=test)
        broken += found.chosen is not None and risks[found.chosen] > EPSILON
    assert broken <= trials * DELTA + 3 * math.sqrt(trials * DELTA * (1 - DELTA))


@pytest.mark.parametrize("binary", [True, False])
def test_the_promise_holds_over_repeated_calibrations(binary: bool) -> None:
    """True risks rise with the setting and cross the bound; rarely is one chosen above it, yet some are chosen."""
    generator = torch.Generator().manual_seed(3)
    true_risks = [0.01 * (number + 1) for number in range(20)]
    broken, chosen = 0, []
    for _ in range(300):

        def losses(number: int) -> list[float]:
            drawn = torch.rand(150, generator=generator)
            if binary:
                return (drawn < true_risks[number]).double().tolist()
            return (drawn * 2 * true_risks[number]).tolist()  # the same mean

        found = learn_then_test(losses, 20, max_risk=EPSILON, confidence=1 - DELTA)
        risk = 0.0 if found.chosen is None else true_risks[found.chosen]
        broken += risk > EPSILON
        chosen.append(risk)
    assert broken <= 300 * DELTA + 3 * math.sqrt(300 * DELTA * (1 - DELTA))
    assert sum(chosen) / len(chosen) > 0.02


def test_distances_between_texts() -> None:
    assert inconsistency([1, 2, 3, 4], [1, 2, 3, 4]) == 0
    assert inconsistency([1, 2], [3, 4]) == 1
    assert inconsistency([1, 9, 2, 3], [1, 2, 3]) == pytest.approx(1 - 6 / 7)
    assert inconsistency([], [1]) == 1 and inconsistency([], []) == 0
    assert quality_loss([1, 2], [1, 2, 3], [1, 2, 3]) == pytest.approx(0.2)
    assert quality_loss([1, 2, 3], [1, 2], [1, 2, 3]) == 0  # better than full depth is no loss
    assert difference([1, 2], [1, 2]) == 0 and difference([1, 2], [1, 3]) == 1


@pytest.mark.parametrize(("max_risk", "confidence"), [(0.0, 0.9), (1.5, 0.9), (0.1, 1.0), (0.1, 0.0)])
def test_bounds_are_named(max_risk: float, confidence: float) -> None:
    with pytest.raises(UserError, match="must be between 0 and 1"):
        learn_then_test(lambda i: [0.0], 1, max_risk=max_risk, confidence=confidence)


# --- on generated text ------------------------------------------------------------------------------------------


def calibrated(num_prompts: int, max_risk: float, **options: Any) -> tuple[Any, Any, list[Any]]:
    adapted = anydepth.attach(tiny_llama(), {"name": "early_exit", "layers": [3, 5]}).eval()
    ids = torch.randint(3, 200, (num_prompts, 12), generator=torch.Generator().manual_seed(1))
    scores, rows = collect_scores(adapted, ids[:8]), []
    found = bound_risk(
        HFEngine(adapted),
        shared_settings(scores),
        list(ids),
        new_tokens=6,
        max_risk=max_risk,
        confidence=0.9,
        on_test=rows.append,
        **options,
    )
    return adapted, found, rows


def test_a_loose_bound_lets_tokens_leave() -> None:
    adapted, found, rows = calibrated(40, 0.9)
    assert found.met and found.risk < 0.9 and len(rows) >= 1
    adapted(torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(2)))
    assert adapted.last_trace.mean_depth < 6


@pytest.mark.parametrize("num_prompts", [40, 5])
def test_it_fails_closed(num_prompts: int) -> None:
    """Random weights: whoever leaves early says something else. And too few texts show nothing, whatever they show."""
    adapted, found, rows = calibrated(num_prompts, 0.06)
    assert not found.met and len(rows) == (1 if num_prompts == 40 else 0)
    assert thresholds_of(adapted) == {"early_exit": -math.inf}
    adapted(torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(2)))
    assert adapted.last_trace.mean_depth == 6


def test_quality_needs_references() -> None:
    with pytest.raises(UserError, match="needs references"):
        calibrated(40, 0.5, risk="quality")
    with pytest.raises(UserError, match="risks are consistency, quality, difference"):
        calibrated(40, 0.5, risk="beauty")
    _, found, _ = calibrated(40, 0.5, risk="quality", references=[[1, 2, 3]] * 40)
    assert found.met


@pytest.mark.parametrize("test", ["fixed-sequence", "bonferroni"])
def test_other_bounds_select_from_the_risk_table_as_a_calibration_would(test: str) -> None:
    """Each bound has its own tests of the same losses; those of a bound above the calibration's select no more."""
    _, found, _ = calibrated(40, 0.95, test=test)
    document = plain({"trajectory": found.trajectory, "config": {"confidence": 0.9, "test": test}})
    tested = RiskTable.of(json.loads(json.dumps(document)))
    assert tested is not None
    for max_risk in (0.999, 0.95, 0.9, 0.8, 0.6, 0.06):
        adapted, own, _ = calibrated(40, max_risk, test=test)
        selected = tested.select(max_risk)
        if not own.met:
            assert selected is None
        else:
            assert selected is not None
            row, expected = tested.rows[selected], thresholds_of(adapted)
            risk = row["risk"]
            set_options(adapted, row["thresholds"])
            assert (risk == own.risk and thresholds_of(adapted) == expected) or (max_risk > 0.95 and risk < own.risk)


def test_documents_without_losses_have_no_risk_table() -> None:
    old = {"trajectory": [{"setting": 0, "thresholds": {}}], "config": {"confidence": 0.9, "test": None}}
    assert RiskTable.of(old) is None and RiskTable.of({"share": 0.4, "config": {}}) is None
