"""Metrics of a server: what is counted at the first piece of an answer, and what at each."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from anydepth.serve import metrics as module
from anydepth.serve.metrics import Metrics


@pytest.fixture
def service() -> Any:
    return SimpleNamespace(observers=[], num_waiting=3, num_running=2)


def values_of(metrics: Metrics) -> dict[str, float]:
    """Return the samples of the page, without those of the process's clock."""
    page = asyncio.run(metrics.page())
    assert page.media_type.startswith("text/plain")
    lines = [line for line in bytes(page.body).decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("anydepth_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_prompts_count_once_and_tokens_with_each_piece(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds to the first token from the request, then between pieces."""
    metrics = Metrics(service)
    (observe,) = service.observers
    job = SimpleNamespace(request=SimpleNamespace(prompt=[5, 6, 7], num_known=2), arrived=10.0, last_token=None)
    with monkeypatch.context() as patch:
        for now, num_tokens in ((10.5, 1), (10.75, 4)):
            patch.setattr(module.time, "monotonic", lambda now=now: now)
            observe(job, num_tokens)
            job.last_token = now
    found = values_of(metrics)
    assert (found["prompt_tokens_total"], found["generated_tokens_total"]) == (3, 5)
    assert (found["first_token_seconds_count"], found["first_token_seconds_sum"]) == (1, 0.5)
    assert (found["token_gap_seconds_count"], found["token_gap_seconds_sum"]) == (1, 0.25)
    assert found['token_gap_seconds_bucket{le="0.2"}'] == 0 and found['token_gap_seconds_bucket{le="0.5"}'] == 1


def test_requests_are_counted_when_the_page_is_read(service: Any) -> None:
    metrics = Metrics(service)
    service.num_waiting = 5
    found = values_of(metrics)
    assert (found["waiting_requests"], found["running_requests"]) == (5, 2)


def test_services_of_one_process_count_apart(service: Any) -> None:
    first, second = Metrics(service), Metrics(SimpleNamespace(observers=[], num_waiting=0, num_running=0))  # type: ignore[arg-type]
    service.observers[0](
        SimpleNamespace(request=SimpleNamespace(prompt=[5], num_known=0), arrived=0.0, last_token=None), 2
    )
    assert [values_of(one)["generated_tokens_total"] for one in (first, second)] == [2, 0]
