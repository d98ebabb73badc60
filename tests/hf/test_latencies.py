"""Times of layers and branches in a decoding step, by a clock of which every reading is one second after the last."""

from __future__ import annotations

import itertools

import pytest
import torch

import anydepth
from anydepth.hf import latencies as module
from anydepth.hf.latencies import latencies
from anydepth.models.clock import STEPS
from tiny import tiny_llama, windows


def test_a_layer_takes_the_time_of_its_branches_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a layer the clock is read before and after each branch, and after the layer: at full depth, mixer first."""
    clock = itertools.count()
    monkeypatch.setattr(module, "now", lambda _: float(next(clock)))
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [2]})
    found = latencies(adapted, windows(3, 40))
    wanted = {"layer": 5.0, "mixer": 1.0, "ffn": 1.0}
    assert found == {(kind, i): seconds for kind, seconds in wanted.items() for i in range(6)}
    assert next(clock) == 6 * 6 * (1 + STEPS)  # the first tokens, and each step


@pytest.mark.parametrize(("length", "num_first"), [(40, 40 - STEPS), (STEPS, 1), (3, 1)])
def test_steps_stay_within_the_window(length: int, num_first: int) -> None:
    adapted, seen = anydepth.attach(tiny_llama(), []), list[int]()
    adapted.backbone.layers[0].module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    latencies(adapted, windows(1, length))
    assert seen == [num_first, *[1] * STEPS]


def test_the_median_is_taken_and_the_first_tokens_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take one second or three in turn, and far longer in the first forward: of 24 steps the median is two."""
    adapted = anydepth.attach(tiny_llama(), [])
    forwards = itertools.count()
    length, clock = torch.zeros(()), torch.zeros(())

    def before(*_: object) -> None:
        number = next(forwards)
        length.fill_(1.0 + number % 2 * 2 if number else 100.0)

    adapted.backbone.decoder.register_forward_pre_hook(before)
    monkeypatch.setattr(module, "now", lambda _: float(clock.add_(length)))
    assert latencies(adapted, windows(1, 40))["mixer", 3] == 2.0
