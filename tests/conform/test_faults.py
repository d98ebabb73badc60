"""One fault at a time, planted in a server that passes without it: the check named for it finds it."""

from __future__ import annotations

import pytest

from anydepth.conform import checks_protocol
from anydepth.conform.client import Client
from anydepth.conform.run import CHECKS, NAMES, Outcome, chosen, open_servers, run
from fake_model import ScriptedModel
from fake_script import FAULTS
from fake_server import fake_server

TIMEOUT = 30.0


def outcomes(url: str, *only: str, against: str | None = None) -> list[Outcome]:
    other = None if against is None else Client(against, timeout=TIMEOUT)
    return run(
        open_servers(Client(url, timeout=TIMEOUT), None, other, seed=0), chosen(only, with_other=against is not None)
    )


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled answers take a second and not four."""
    monkeypatch.setattr(checks_protocol, "LONG_SECONDS", 1.2)


def test_a_server_without_a_fault_passes_every_check() -> None:
    with fake_server() as url, fake_server() as same:
        found = outcomes(url, against=same)
    assert {(one.check, one.endpoint) for one in found} >= {
        (check.name, name) for check in CHECKS if not check.once for name in ("completions", "chat")
    }
    assert {one.check for one in found} == set(NAMES)
    assert [(one.check, one.endpoint, one.line) for one in found if one.result != "passed"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_check(fault: str) -> None:
    with fake_server(fault) as url:
        found = outcomes(url, FAULTS[fault])
    print("\n".join(f"{one.endpoint}: {one.line}" for one in found))
    assert any(one.result == "failed" for one in found), found
    for one in found:
        assert one.result != "failed" or (one.failures and one.line.startswith(one.failures[0])), one
        assert "cannot be read" not in one.line and one.line.isprintable()


def test_every_check_has_a_fault_that_it_finds() -> None:
    assert set(NAMES) - set(FAULTS.values()) == {"against", "against-sampled"}


def test_servers_of_two_models_differ() -> None:
    with fake_server() as url, fake_server(model=ScriptedModel("another")) as other:
        greedy, _, sampled = outcomes(url, "against", "against-sampled", against=other)
    assert greedy.result == sampled.result == "failed"
    assert "right is" in greedy.line and other in greedy.line and "p = 0.0" in sampled.line


def test_another_temperature_is_another_distribution_with_the_same_greedy_text() -> None:
    """And noise that is drawn in another order is none."""

    class Shuffled(ScriptedModel):
        def choose(self, logits: list[float], temperature: float, seed: object, position: int) -> int:
            return super().choose(logits, temperature * self.factor, f"{seed} and more", position)

    for factor, result in ((1.0, "passed"), (0.2, "failed")):
        Shuffled.factor = factor  # type: ignore[attr-defined]
        with fake_server() as url, fake_server(model=Shuffled()) as other:
            greedy, _, sampled = outcomes(url, "against", "against-sampled", against=other)
        assert (greedy.result, sampled.result) == ("passed", result), (greedy, sampled)


def test_a_full_server_is_asked_again() -> None:
    with fake_server(capacity=True) as url:
        assert {one.result for one in outcomes(url, "company", "greedy")} == {"passed"}


def test_options_that_a_server_lacks_are_not_faults() -> None:
    with fake_server(chat=True, logprobs=True, seed=True, n=True, lossless=True) as url:
        found = outcomes(url)
    missing = {one.check: one.line for one in found if one.result == "not applicable"}
    assert missing.keys() == {"all", "seed", "logprobs", "echo", "lossless"}
    assert "no chat template" in missing["all"] and "logprobs is not supported" in missing["logprobs"]
    assert [one for one in found if one.result == "failed"] == []
