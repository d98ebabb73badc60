"""The draft policy on simulated drafters: its estimates, its decisions, and its regret against the best length."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from anydepth.speculation.draft_policy import FEW, NUM_BINS, RARELY, Acceptance, DraftPolicy, StepTimes


@dataclass
class Simulated:
    """A drafter whose tokens are right with the probability of their confidence bin.

    Attributes:
        right: probability by bin.
        bins: that its tokens are drawn from.
        seconds: of a token.
    """

    right: dict[int, float]
    seconds: float
    name: str = "simulated"
    is_free: bool = False
    random: Random = field(default_factory=lambda: Random(0))

    def draw(self) -> tuple[int, bool]:
        number = self.random.choice(list(self.right))
        return number, self.random.random() < self.right[number]


PLAIN, PER_TOKEN = 10.0, 0.5
"""Milliseconds of a verification of one token, and of each further one."""


def simulate(policy: DraftPolicy, drafter: Simulated, num_tokens: int, fixed: int | None = None) -> float:
    """Return the milliseconds per token of a generation, by the policy or with drafts of a fixed length."""
    times, seconds, taken = policy.times(1), 0.0, 0
    noise = Random(1)
    while taken < num_tokens:
        bins: list[int] = []
        rights: list[bool] = []
        reached = 1.0
        due = policy.due_trial([drafter], 1) is not None
        known = policy.is_known(drafter)
        rate = policy.rate(drafter, 1) if known and times.plain is not None else 0.0
        wants = times.plain is not None and not times.needs_plain_step and (due or not known or rate > 1 / times.plain)
        while len(bins) < 16 if fixed is None else len(bins) < fixed:
            first = not bins and (due or not known)
            pays = times.pays(drafter.name, [reached * policy.next_right(drafter, bins)], rate)
            if fixed is None and not (wants and (first or pays)):
                break
            number, right = drafter.draw()
            cost = drafter.seconds * noise.uniform(0.8, 1.2)
            seconds += cost
            times.observe_draft(drafter.name, cost)
            reached *= policy.statistics(drafter).by_bin.of(number)
            if fixed is None and not first and not times.repays(reached, rate):
                policy.observe_none(drafter, bins)
                break
            bins.append(number)
            rights.append(right)
        num_right = rights.index(False) if False in rights else len(rights)
        cost = (PLAIN + PER_TOKEN * len(bins)) * noise.uniform(0.95, 1.05)
        seconds += cost
        times.observe_verification(1 + len(bins), cost)
        policy.observe(drafter, bins, num_right, num_right + 1, 1)
        taken += num_right + 1
    return seconds / taken


DRAFTERS = {
    "often right": {7: 0.85, 9: 0.95},
    "half right": {3: 0.4, 6: 0.6},
    "sure or not": {1: 0.1, 9: 0.97},
    "never right": {4: 0.0},
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("seconds", [0.5, 2.0, 6.0])
def test_regret_against_the_best_fixed_length(name: str, seconds: float) -> None:
    """The policy learns while it drafts, and stays within 4% of the best of all fixed lengths."""

    def drafter() -> Simulated:
        return Simulated(DRAFTERS[name], seconds)

    best = min(simulate(DraftPolicy(), drafter(), 3000, fixed=length) for length in range(9))
    assert simulate(DraftPolicy(), drafter(), 3000) <= 1.04 * best


def test_a_drafter_that_never_pays_costs_little() -> None:
    """Trials end, and are repeated rarely."""
    plain = simulate(DraftPolicy(), Simulated({5: 0.0}, 5.0), 3000, fixed=0)
    assert simulate(DraftPolicy(), Simulated({5: 0.0}, 5.0), 3000) <= 1.06 * plain


def test_acceptance_is_the_frequency_of_recent_tokens() -> None:
    acceptance = Acceptance.prior([0.5] * NUM_BINS)
    random = Random(2)
    for _ in range(2000):
        acceptance.observe(3, right=random.random() < 0.8)
    assert acceptance.of(3) == pytest.approx(0.8, abs=0.06) and acceptance.of(4) == 0.5
    for _ in range(400):
        acceptance.observe(3, right=False)
    assert acceptance.of(3) < 0.2, "texts change"


def test_step_times_are_a_line_through_medians() -> None:
    """10 ms and 0.5 ms for each further token, with one pass in five ten times as slow."""
    times, random = StepTimes(num_rows=2), Random(3)
    times.observe_verification(4, 1.0)
    assert times.plain is None, "a plain step comes first"
    times = StepTimes(num_rows=2)
    for number in range(200):
        further = 0 if number % 3 == 0 else random.randrange(1, 9)
        slow = 10.0 if number % 5 == 4 else 1.0
        times.observe_verification(2 + further, slow * (10 + 0.5 * further))
    assert times.plain == pytest.approx(10, rel=0.1) and times.per_token == pytest.approx(0.5, abs=0.3)


def test_drafts_of_one_length_do_not_blur_what_a_plain_step_costs() -> None:
    """Four sequences that all draft 3 tokens: 7 ms, and 0.6 ms for each of 12."""
    times = StepTimes(num_rows=4)
    times.observe_verification(4, 7.0)
    for number in range(300):
        times.observe_verification(4 if times.needs_plain_step else 16, 7.0 + (0.0 if times.needs_plain_step else 7.2))
        assert times.plain == pytest.approx(7.0)
        assert number < 3 or times.per_token == pytest.approx(0.6), number
    for _ in range(RARELY - 1):
        times.observe_verification(4, 7.0)
    assert times.per_token == pytest.approx(0.6), "known also when drafts have stopped"


def test_rounds_in_which_no_draft_can_pay_are_plain_steps() -> None:
    """Four sequences: a plain step gives a token in 1 ms; a further token that costs 1.1 ms never pays, 0.9 ms may."""
    for per_token, rests in ((1.1, True), (0.9, False)):
        times = StepTimes(num_rows=4)
        times.observe_verification(4, 4.0)
        assert not times.rests, "not measured yet"
        for _ in range(FEW):
            times.observe_verification(8, 4.0 + 4 * per_token)
        assert times.rests == rests


def test_slow_first_drafts_do_not_rule_out_drafts_for_ever() -> None:
    """The first drafts took ten times as long as later ones would: they are forgotten, and drafts are measured anew."""
    times = StepTimes(num_rows=4)
    for _ in range(FEW):
        times.observe_verification(8, 40.0)
    for number in range(RARELY):
        assert times.rests == (number > 0), "resting, once a plain step is known"
        times.observe_verification(4, 4.0)
    assert not times.rests and times.repays(0.1)
    times.observe_verification(8, 5.0)
    assert times.per_token == pytest.approx(0.25)


def test_a_drafter_is_not_tried_where_it_did_not_pay_with_fewer_sequences() -> None:
    policy, drafter = DraftPolicy(), Simulated({5: 0.5}, 1.0)
    policy.times(1).observe_verification(1, 4.0)
    policy.times(1).observe_draft(drafter.name, 3.0)
    for _ in range(40):
        policy.observe(drafter, [5], 0, 1, 1)
    policy.times(4).observe_verification(4, 5.0)
    assert policy.rate(drafter, 4) == pytest.approx(1 / 5.0), "a plain step"
    policy.times(4).observe_draft(drafter.name, 0.1)
    for _ in range(60):
        policy.observe(drafter, [5, 5], 2, 3, 1)
    assert policy.rate(drafter, 4) > 1 / 5.0


def test_a_draft_continues_while_it_saves_more_than_it_costs() -> None:
    """By hand: a step of 10, draft tokens of 2, further tokens of 1: pays from a probability of 0.3 on."""
    times = StepTimes(num_rows=1, plain=10.0, per_token=1.0)
    times.observe_draft("one", 2.0)
    assert times.pays("one", [0.31]) and not times.pays("one", [0.29])
    assert times.repays(0.11) and not times.repays(0.09)
    # Where drafts already give a token in 5, a further one must give one in 5 as well: from 0.6 on.
    assert times.pays("one", [0.61], 1 / 5) and not times.pays("one", [0.59], 1 / 5)
    assert times.repays(0.21, 1 / 5) and not times.repays(0.19, 1 / 5)
    # Two tokens at 0.9 and 0.8: 1 + 0.9 + 0.72 in 10 + 2·3; of all lengths the best.
    lengths = [(1 + sum(0.9 * 0.8**i for i in range(n))) / (10 + 3 * n) for n in range(1, 17)]
    assert times.rate(2.0, 0.9, 0.8) == pytest.approx(max(lengths))
    assert times.rate(2.0, 0.0, 0.0) == pytest.approx(0.1), "a plain step"


def test_sequences_together_share_the_cost_of_a_step() -> None:
    times = StepTimes(num_rows=4, plain=20.0, per_token=1.0)
    times.observe_draft("one", 2.0)
    assert times.pays("one", [0.9, 0.9, 0.3, 0.0]) == (2.1 * 20 / 4 > 2 + 4)
    assert not times.pays("one", [0.3])


def test_free_drafters_need_no_trial() -> None:
    policy = DraftPolicy()
    lookup, model = Simulated({5: 0.5}, 0.0, "lookup", is_free=True), Simulated({5: 0.5}, 1.0, "model")
    assert policy.is_known(lookup) and not policy.is_known(model)
    due = [policy.due_trial([lookup, model], 1) for _ in range(200)]
    assert lookup not in due
    assert [number for number, one in enumerate(due) if one is model] == [24, 73, 170], "rarer, while it does not pay"
    policy.observe(model, [5], 1, 2, 1)
    assert [policy.due_trial([model], 1) for _ in range(25)][-1] is model, "as often as at first, once it has paid"


def test_a_drafter_sleeps_between_trials_that_did_not_pay() -> None:
    policy, model = DraftPolicy(), Simulated({5: 0.5}, 1.0, "model")
    asleep = []
    for _ in range(170):
        policy.due_trial([model], 1)
        asleep.append(policy.sleeps(model, 1))
    rounds = [number for number, one in enumerate(asleep) if one]
    # Idle for 24 rounds, 48, 96: asleep after 16 idle rounds, awake for the 16 before the next trial.
    assert rounds == [*range(41, 56), *range(90, 153)]


def test_a_drafter_with_passes_must_be_clearly_faster_than_plain_steps() -> None:
    policy = DraftPolicy()
    free, costly = Simulated({5: 0.5}, 0.0, "lookup", is_free=True), Simulated({5: 0.5}, 1.0, "model")
    assert policy.gains(costly, 1, 0.1), "nothing is measured yet"
    policy.times(1).plain = 10.0
    assert policy.gains(costly, 1, 0.12) and not policy.gains(costly, 1, 0.105) and policy.gains(free, 1, 0.105)


def test_waits_are_for_a_number_of_sequences() -> None:
    """A drafter that sleeps with four sequences drafts for one."""
    policy, model = DraftPolicy(), Simulated({5: 0.5}, 1.0, "model")
    for _ in range(20):
        policy.due_trial([model], 4)
    assert policy.sleeps(model, 4) is False, "its first trial is near"
    for _ in range(30):
        policy.due_trial([model], 4)
    assert policy.sleeps(model, 4) and not policy.sleeps(model, 1)


def test_trials_take_a_hundredth_of_the_time() -> None:
    policy, model = DraftPolicy(), Simulated({5: 0.5}, 1.0, "model")
    policy.times(4).observe_verification(4, 5.0)
    policy.observe_trial(model, 4, 12.5)
    assert policy.wait(model, 4).patience == 150, "7.5 ms more than a plain step of 5 ms"
    policy.observe_trial(model, 4, 5.1)
    assert policy.wait(model, 4).patience == 150, "never more often than before"
