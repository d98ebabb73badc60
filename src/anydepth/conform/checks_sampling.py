"""Checks of the choice of tokens: seeds, repeated and concurrent requests, and lossless decoding."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from anydepth.conform.answers import difference, differences, plural, shown, token_differences
from anydepth.conform.endpoint import Endpoint, Findings, NotApplicable, Request, optional
from anydepth.conform.prompts import PROMPTS

NUM_SEEDS = 5
LEAST_TEXTS = 2
"""Texts that the seeds of one prompt must have at least: a model may be sure of a text, and not of all of them."""
NUM_SAMPLES, SAMPLE_TOKENS, NUM_SHUFFLES = 60, 2, 2000
LEAST_P = 0.001
LOSSLESS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "anydepth": ({"anydepth": {"lossless": True}}, {"anydepth": {"full_depth": True}}),
}
"""Options of drafted answers and of those without drafts, by the field of the model's card that says there are such."""


def seed(endpoint: Endpoint) -> Findings:
    """Sample with each seed twice, for the same text, and with several seeds, for different ones."""
    different = set[int]()
    for prompt in PROMPTS[:3]:
        texts = []
        for request in endpoint.seeded([prompt] * NUM_SEEDS):
            with optional("seed"):
                texts.append(endpoint.ask(request).text)
            again = endpoint.ask(request).text
            if again != texts[-1]:
                yield f"{request.name}, sent twice: {difference(again, texts[-1])}, as at first"
        different.add(len(set(texts)))
    if max(different) < LEAST_TEXTS:
        yield f"{NUM_SEEDS} seeds at temperature 1 gave one text for each prompt; right is that they differ"
    return f"each seed gives its text again; up to {max(different)} of {NUM_SEEDS} seeds differ"


def greedy(endpoint: Endpoint) -> Findings:
    """Send greedy requests several times, for the same text."""
    for prompt in PROMPTS[:3]:
        request = Request(prompt)
        first = endpoint.ask(request)
        for changes in ({}, {}, {"top_p": 0.9}):
            again = endpoint.ask(request, **changes)
            if again.text != first.text:
                yield f"{request.name} at temperature 0, sent again: {difference(again.text, first.text)}"
    return "temperature 0 gives the same text each time"


def company(endpoint: Endpoint) -> Findings:
    """Compare answers to requests that are sent alone with those sent at the same time, greedy and sampled."""
    requests = [Request(prompt, {"max_tokens": 12 + 4 * number}) for number, prompt in enumerate(PROMPTS)]
    if endpoint.has_seeds(PROMPTS[0]):
        requests += endpoint.seeded(PROMPTS[:3])
    alone = [endpoint.ask(request) for request in requests]
    together = endpoint.together(requests)
    for request, one, other in zip(requests, alone, together, strict=True):
        yield from differences(other, one, f"{request.name} with {len(requests) - 1} others", "as alone")
    return f"{plural(len(requests), 'request')} have the same answers alone and at once"


def lossless(endpoint: Endpoint) -> Findings:
    """Compare lossless answers with those of full depth, where the server has anydepth's options for both."""
    own = next((name for name in LOSSLESS if isinstance(endpoint.card.get(name), dict)), None)
    if own is None:
        raise NotApplicable("the server has no option for lossless decoding that is known here; --against compares two")
    drafted, plain = LOSSLESS[own]
    requests = [Request(prompt) for prompt in PROMPTS] + endpoint.seeded(PROMPTS)
    with optional(f"{own}.lossless"):
        answers = endpoint.together([request.with_options(**drafted) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        right = endpoint.ask(request, **plain)
        for compare in (differences, token_differences):
            yield from compare(answer, right, f"{request.name}, lossless", "as at full depth")
    used = sum(bool((answer.usage or {}).get(own, {}).get("drafting", {}).get("used")) for answer in answers)
    return f"{plural(len(requests), 'answer')} equal full depth; {used} were drafted"


def against(endpoint: Endpoint) -> Findings:
    """Compare greedy answers with those of the server of `--against`."""
    other = _other(endpoint)
    requests = [Request(prompt, {"max_tokens": 32}) for prompt in PROMPTS]
    for request in requests:
        yield from differences(endpoint.ask(request), other.ask(request), request.name, f"as at {other.client.url}")
    return f"{plural(len(requests), 'greedy answer')} equal those of {other.client.url}"


def against_sampled(endpoint: Endpoint) -> Findings:
    """Compare sampled answers with those of that server: the texts of seeds, else the distribution of many samples."""
    other = _other(endpoint)
    requests = endpoint.seeded(PROMPTS)
    with optional("seed"):
        pairs = [(endpoint.ask(request).text, other.ask(request).text) for request in requests]
    num_equal = sum(came == right for came, right in pairs)
    if num_equal == len(pairs):
        return f"{plural(num_equal, 'sampled answer')} equal those of {other.client.url}"
    # Decoders may draw their noise in different orders, and still sample from the same distribution.
    least = 1.0
    for number, prompt in enumerate(PROMPTS[:2]):
        p, texts = _p_value(endpoint, other, prompt, number)
        least = min(least, p)
        if p < LEAST_P:
            yield f"'{prompt}', {NUM_SAMPLES} samples each: came {texts[0]}, right is {texts[1]} (p = {p:.4f})"
    return (
        f"{num_equal} of {len(pairs)} seeds give the same text; {NUM_SAMPLES} samples of a prompt show no other "
        f"distribution (p = {least:.2f})"
    )


def _other(endpoint: Endpoint) -> Endpoint:
    if endpoint.other is None:
        raise NotApplicable(f"the server to compare with has no {endpoint.name}")
    return endpoint.other


def _p_value(endpoint: Endpoint, other: Endpoint, prompt: str, number: int) -> tuple[float, list[str]]:
    """Return the p-value of a permutation test that short samples of two servers differ, and their commonest texts."""
    seeds = range(1000 * (number + 1), 1000 * (number + 1) + NUM_SAMPLES)
    # Seeds of the second server are others, so that samples with shared noise do not seem too much alike.
    request = Request(prompt, {"temperature": 1, "max_tokens": SAMPLE_TOKENS})
    texts = [
        [one.ask(request, seed=first + own).text for own in seeds] for one, first in ((endpoint, 0), (other, 10**6))
    ]
    return permutation_test(texts[0], texts[1]), [_commonest(one) for one in texts]


def permutation_test(first: Sequence[str], second: Sequence[str], num_shuffles: int = NUM_SHUFFLES) -> float:
    """Return the p-value of the hypothesis that two samples of texts have one distribution.

    The statistic is the sum over texts of the squared difference of their counts.
    """
    observed, pooled, generator = _distance(first, second), [*first, *second], random.Random(0)
    at_least = 1
    for _ in range(num_shuffles):
        generator.shuffle(pooled)
        at_least += _distance(pooled[: len(first)], pooled[len(first) :]) >= observed
    return at_least / (num_shuffles + 1)


def _distance(first: Sequence[str], second: Sequence[str]) -> float:
    one, other = Counter(first), Counter(second)
    return sum((one[text] / len(first) - other[text] / len(second)) ** 2 for text in one | other)


def _commonest(texts: Sequence[str]) -> str:
    ((text, count),) = Counter(texts).most_common(1)
    return f"{shown(text)} {count} times"
