"""Hooks are called by forwards of their own thread, and are removed."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from anydepth.models.hooks import Hooks


def test_hooks_hear_their_own_thread_until_they_are_removed() -> None:
    module, seen = nn.Linear(2, 2), list[str]()
    with Hooks() as hooks:
        hooks.before(module, lambda *_: seen.append("before"))
        hooks.after(module, lambda _, inputs, output: seen.append(f"after {tuple(output.shape)}"))
        module(torch.zeros(3, 2))
        other = threading.Thread(target=module, args=(torch.zeros(1, 2),))
        other.start()
        other.join()
    module(torch.zeros(3, 2))
    assert seen == ["before", "after (3, 2)"]


def test_keyword_arguments_are_passed_on() -> None:
    class Doubled(nn.Module):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    seen: list[dict[str, Any]] = []
    module = Doubled()
    with Hooks() as hooks:
        hooks.before(module, lambda _, __, options: seen.append(options), with_kwargs=True)
        module(x=torch.ones(1))
    assert seen[0]["x"].item() == 1
