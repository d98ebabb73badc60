"""Sections of a recipe about drafting: what drafts, and how its network is trained. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

from pydantic import Field, field_validator

from anydepth.config import StrictConfig, training_field

DRAFT = "draft"
"""The section, as options name it."""
OLD_NAME = "self_speculation"
"""What drafting was called while it was a method."""
NO_METHOD = (
    "self_speculation is no method any more: write its options under draft: in a recipe, or in Python "
    "FastEngine(adapted, draft=anydepth.Draft(adapted, {...}))"
)


def split_draft(methods: Sequence[Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """Return the methods of an old recipe or checkpoint, and the options of drafting that were among them."""
    old = [one for one in methods if one == OLD_NAME or (isinstance(one, Mapping) and one.get("name") == OLD_NAME)]
    if not old:
        return list(methods), None
    options = {} if isinstance(old[0], str) else {key: value for key, value in old[0].items() if key != "name"}
    _say_once(f"methods: self_speculation is a section of its own now; write draft: {options}")
    return [one for one in methods if one not in old], options


@cache
def _say_once(line: str) -> None:
    logging.getLogger("anydepth").warning(line)


class DraftNetworkConfig(StrictConfig):
    """A trained drafter: one layer next to the model, and a part of its head."""

    taps: list[int] = Field(
        default=[],
        description="Layers, counted from 1, whose output states it reads of verified tokens; none is the last.",
    )
    vocabulary_size: int = Field(
        default=8192, ge=16, description="Tokens that it can draft: those that the model writes most often."
    )


class OnlineSearchConfig(StrictConfig):
    """A skip set to draft with, searched on the text being generated."""

    strategy: Literal["bayesian", "dynamic", "influence", "knapsack"] = Field(
        default="bayesian",
        description="As of `anydepth search`; bayesian tries one more set each time, knapsack times the layers once.",
    )
    budget: float = Field(default=0.3, gt=0, lt=1, description="Fraction of layers, or of time, that drafts leave out.")
    every: int = Field(default=16, ge=1, description="Tokens between two searches.")
    window: int = Field(default=32, ge=4, description="Last tokens that are searched on.")
    num_searches: int = Field(default=60, ge=1, description="Searches after which the set stays.")
    seed: int = Field(default=0, description="Seed of the proposals.")


class DraftConfig(StrictConfig):
    """Drafting: cheap tokens, verified by the model at full depth, many in one pass."""

    lookup: bool = Field(default=True, description="Draft what followed the last tokens earlier in the text.")
    exit_layers: list[int] = Field(
        default=[], description="Draft with so many first layers; of several, with what is worth most at the moment."
    )
    exit_vocabulary: int | None = Field(
        default=None,
        ge=16,
        description="Tokens that drafts of first layers can be, the first ids; null is all.",
    )
    search: OnlineSearchConfig | None = Field(
        default=None, description="Draft with a skip set that is searched meanwhile; null does not."
    )
    network: DraftNetworkConfig | None = Field(default=None, description="A trained drafter; null is none.")
    max_draft: int = Field(default=8, ge=1, le=32, description="Tokens drafted at a time, at most.")
    adaptive: bool = Field(
        default=True,
        description="Draft as many as pays by what was measured so far, and none where none does; false: max_draft.",
    )
    seed: int = training_field(initial=True, default=0, description="Seed of the network's first weights.")

    @field_validator("exit_layers", mode="before")
    @classmethod
    def _one_is_a_list(cls, layers: object) -> object:
        return [layers] if isinstance(layers, int) else layers


class OwnTextConfig(StrictConfig):
    """Text that the model writes itself, for the training of a drafter."""

    num_tokens: int = Field(default=1_200_000, ge=1000, description="Tokens, those of questions included.")
    temperature: float = Field(default=0.8, gt=0, description="Of questions, which the model makes up itself.")
    opened: float = Field(default=0.85, ge=0, le=1, description="Share of questions whose first words are given.")
    max_question: int = Field(default=96, ge=4, description="Tokens of a question, at most.")
    max_answer: int = Field(
        default=96,
        ge=8,
        description="Tokens of an answer, at most; answers are greedy: long ones repeat themselves.",
    )
    num_slots: int = Field(default=48, ge=1, le=64, description="Texts written at a time.")


class DrafterConfig(StrictConfig):
    """Training of a drafter's network; the model itself stays as it is."""

    own_text: OwnTextConfig = Field(default=OwnTextConfig(), description="What it learns from.")
    max_steps: int = Field(default=800, ge=1, description="Optimiser steps.")
    batch_tokens: int = Field(default=2048, ge=64, description="Tokens per step, padding included.")
    learning_rate: float = Field(default=6e-4, gt=0, description="Peak rate (warm-up, then cosine).")
    warmup_steps: int = Field(default=30, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW weight decay.")
    max_gradient_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this norm.")
    num_guesses: int = Field(default=2, ge=1, le=6, description="Guesses in a row that it is trained for.")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="bfloat16 turns autocast on.")
    save_every: int = Field(default=50, ge=1, description="Steps between states to resume from.")


class OldSelfSpeculation:
    """What `anydepth.SelfSpeculation` was: code that makes its `Config` still runs, and `attach` says what to write."""

    Config = DraftConfig
