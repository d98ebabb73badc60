"""Races: halving by paired times, of simulated engines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from anydepth.measure import race
from anydepth.measure.race import Entrant, Race, Setting
from anydepth.measure.timing import Timing

Seconds = Callable[[int], float]


class Simulated:
    """An engine that takes `seconds(run)` for its runs, and writes `text`."""

    def __init__(self, seconds: Seconds, text: list[int] | None = None) -> None:
        self.seconds, self.text, self.runs = seconds, text or [1, 2, 3, 4], 0


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(engine: Simulated, batch: Any, new_tokens: int, *, full_depth: bool) -> Timing:
        engine.runs += 1
        return Timing(0.0, engine.seconds(engine.runs), torch.tensor([engine.text]), 0)

    monkeypatch.setattr(race, "time_generation", timed)


def entrant(name: str, seconds: Seconds, text: list[int] | None = None) -> Entrant:
    engine: Any = Simulated(seconds, text)
    return Entrant(Setting("fast", name), engine, nullcontext)


def prepared(most_distance: float | None = None, num_shapes: int = 1) -> Race:
    shapes: Any = itertools.cycle([(f"shape {number}", {}) for number in range(num_shapes)])
    return Race(entrant("full depth", lambda run: 1.0), shapes, num_shapes, 4, most_distance)


def test_the_fastest_is_first_and_the_slow_leave_early() -> None:
    seconds = {"a": 0.9, "b": 0.5, "c": 1.4, "d": 0.7, "e": 2.0, "f": 1.1}
    entrants = [entrant(name, lambda run, own=own: own) for name, own in seconds.items()]
    left = prepared().run(entrants, time.monotonic() + 60)
    assert [one.setting.weights for one in left] == ["b", "d"]
    assert left[0].speedup == pytest.approx(2.0)
    runs = {one.setting.weights: one.num_runs for one in entrants}
    assert runs["b"] == runs["d"] > runs["a"] > runs["e"] >= 1
    assert all(one.dropped is not None for one in entrants if one not in left)


def test_none_is_dropped_that_is_nearly_as_fast() -> None:
    entrants = [
        entrant(name, lambda run, own=own: own) for name, own in zip("abcd", (0.5, 0.51, 0.505, 0.9), strict=True)
    ]
    assert len(prepared().run(entrants, time.monotonic() + 60)) == 3


def test_the_fastest_that_keeps_the_text_stays() -> None:
    """Drafts for the same weights keep the text; those for others do not."""
    seconds = {"a": 0.4, "b": 0.5, "c": 0.6, "d": 0.7}
    entrants = [entrant(name, lambda run, own=own: own) for name, own in seconds.items()]
    for weights, own in (("full depth", 0.95), ("full depth", 0.9), ("a", 1.2)):
        one = entrant(weights, lambda run, own=own: own)
        entrants.append(Entrant(Setting("fast", weights, draft=f"{own}"), one.engine, nullcontext))
    left = prepared().run(entrants, time.monotonic() + 60)
    assert [one.setting.draft for one in left if one.setting.draft] == ["0.9"] and left[0].setting.weights == "a"
    assert left[-1].num_runs == left[0].num_runs


def test_a_race_ends_when_speeds_are_known() -> None:
    """Ratios of 0.5 and 4 in turn need more runs than those that are all 2; a race ends also if none is ever known."""
    steady, unsteady = entrant("a", lambda run: 0.5), entrant("b", lambda run: 2.0 if run % 2 else 0.25)
    prepared().run([steady], time.monotonic() + 60)
    assert steady.num_runs == sum(range(1, race.ROUNDS + 1)) and steady.error == pytest.approx(0, abs=1e-9)
    prepared().run([unsteady], time.monotonic() + 60)
    assert unsteady.num_runs == sum(min(number, race.ROUNDS) for number in range(1, race.MOST_ROUNDS + 1))
    assert unsteady.error > race.KNOWN and not unsteady.is_known
    same = entrant("c", lambda run: 1.0)
    prepared().run([same], time.monotonic() + 60)
    assert same.num_runs == unsteady.num_runs and same.error < race.KNOWN and not same.is_known


def test_a_late_race_ends_after_its_first_round() -> None:
    entrants = [entrant(name, lambda run: 0.5) for name in "abc"]
    prepared().run(entrants, time.monotonic() - 1)
    assert [one.num_runs for one in entrants] == [1, 1, 1]


def test_shapes_count_alike() -> None:
    """The geometric mean of 4 and 1 is 2, however many tokens a shape has."""
    found, race = entrant("a", lambda run: 0.25 if run % 2 else 1.0), prepared(num_shapes=2)
    race.round([found], 3)
    assert found.fields(race.reference)["by_prompt"] == {"shape 0": 4.0, "shape 1": 1.0}
    assert found.speedup == pytest.approx(2.0)


def test_tokens_per_second_agree_with_the_speed_up() -> None:
    """Full depth slows down between two races; both entrants are twice as fast, and no faster than each other."""
    race = prepared()
    first, second = (entrant(name, lambda run: 0.5) for name in "ab")
    race.round([first], 3)
    race.reference.engine.seconds = lambda run: 2.0
    second.engine.seconds = lambda run: 1.0
    race.round([second], 2)
    full, *speeds = (one.fields(race.reference)["tokens_per_second"] for one in (race.reference, first, second))
    assert speeds == [2 * full, 2 * full] and full == 4.0  # 4 tokens in 1 s, the median


@pytest.mark.parametrize(
    ("most_distance", "left"), [(0.0, ["same"]), (0.3, ["same", "near"]), (None, ["same", "near", "far"])]
)
def test_a_text_too_far_from_full_depth_leaves(most_distance: float | None, left: list[str]) -> None:
    """One of four tokens differs: ROUGE-L is 0.75. One text shows nothing yet, unless none may differ."""
    texts = {"same": [1, 2, 3, 4], "near": [1, 2, 3, 9], "far": [5, 6, 7, 8]}
    entrants = [entrant(name, lambda run: 0.5, text) for name, text in texts.items()]
    prepared(most_distance).run(entrants, time.monotonic() + 60)
    assert [one.setting.weights for one in entrants if one.dropped is None] == left
    assert [one.fields(one)["identical_tokens"] for one in entrants] == [True, False, False]
    if most_distance:
        one = entrant("far", lambda run: 0.5, texts["far"])
        prepared(most_distance).round([one], 1)
        assert one.dropped is None


def test_everyone_is_first_in_turn() -> None:
    order: list[str] = []

    def noting(name: str) -> Seconds:
        return lambda run: (order.append(name), 1.0)[1]

    entrants = [entrant(name, noting(name)) for name in "ab"]
    prepared().round(entrants, 3)
    assert [order.index(name) for name in "ab"] == [0, 1] and order[2:4] == ["a", "b"] and order[4] == "b"
