"""Sections of a recipe about drafting: the drafters, and the training of a drafter's network. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from anydepth.config import StrictConfig, training_field

DRAFT = "draft"
OLD_NAME = "self_speculation"
"""Name of drafting while it was a method."""
NO_METHOD = (
    "self_speculation is not a method any more; write its options under draft: in a recipe, or in Python "
    "FastEngine(adapted, draft=anydepth.Draft(adapted, {...}))"
)


def split_draft(methods: Sequence[Any]) -> tuple[list[Any], dict[str, Any] | None]:
    """Return the methods of a recipe or checkpoint, and the draft options that older ones have among them, or None."""
    old = [one for one in methods if one == OLD_NAME or (isinstance(one, Mapping) and one.get("name") == OLD_NAME)]
    if not old:
        return list(methods), None
    options = {} if isinstance(old[0], str) else {key: value for key, value in old[0].items() if key != "name"}
    _warn_once(f"methods: self_speculation is now a section; write draft: {options}")
    return [one for one in methods if one not in old], options


@cache
def _warn_once(line: str) -> None:
    logging.getLogger("anydepth").warning(line)


class DraftNetworkConfig(StrictConfig):
    """A trained drafter: one more layer, and a part of the model's head."""

    taps: list[int] = Field(
        default=[], description="Layers, counted from 1, with output states that it reads; empty is the last."
    )
    vocabulary_size: int = Field(
        default=8192, ge=16, description="Tokens that it can draft: the most frequent ones of the model."
    )


class OnlineSearchConfig(StrictConfig):
    """A skip set for drafting, searched on the text being generated."""

    constants: ClassVar[Mapping[str, Any]] = {"num_searches": 60}

    strategy: Literal["bayesian", "dynamic", "influence", "knapsack"] = Field(
        default="bayesian",
        description="As in `anydepth search`; bayesian tries one more set each time, knapsack times layers once.",
    )
    budget: float = Field(default=0.3, gt=0, lt=1, description="Fraction of layers, or of time, that drafts skip.")
    every: int = Field(default=16, ge=1, description="Tokens between two searches.")
    window: int = Field(default=32, ge=4, description="Last tokens to search on.")
    seed: int = Field(default=0, description="Seed of the proposals.")


class DraftConfig(StrictConfig):
    """Drafting: cheap draft tokens, which the model verifies at full depth, many in one forward."""

    lookup: bool = Field(default=True, description="Draft the tokens that followed the last ones earlier.")
    exit_layers: list[int] = Field(
        default=[],
        description="Draft with this many first layers; of several numbers, with the one that pays most now.",
    )
    exit_vocabulary: int | None = Field(
        default=None, ge=16, description="First token ids that drafts of exit_layers are limited to; null is all."
    )
    quantised: Literal["auto", "int8", "int4"] | None = Field(
        default=None,
        description="Draft with a copy in int8 or int4, which lookup, network and exit_layers draft for; auto: int4 "
        "where it mostly says what the model says, else int8, and none of a quantised model; null is none.",
    )
    search: OnlineSearchConfig | None = Field(
        default=None, description="Draft with a skip set that is searched meanwhile; null is none."
    )
    network: DraftNetworkConfig | None = Field(default=None, description="A trained drafter; null is none.")
    max_draft: int = Field(default=8, ge=1, le=32, description="Most tokens drafted at a time.")
    adaptive: bool = Field(
        default=True, description="Draft as many tokens as measurements show to pay, or none; false: max_draft."
    )
    seed: int = training_field(initial=True, default=0, description="Seed of the network's first weights.")

    @field_validator("exit_layers", mode="before")
    @classmethod
    def _one_is_a_list(cls, layers: object) -> object:
        return [layers] if isinstance(layers, int) else layers


class OwnTextConfig(StrictConfig):
    """Self-generated text for the training of a drafter."""

    constants: ClassVar[Mapping[str, Any]] = {"opened": 0.85, "max_question": 96, "max_answer": 96, "num_slots": 48}

    num_tokens: int = Field(default=1_200_000, ge=1000, description="Tokens, those of prompts included.")
    temperature: float = Field(default=0.8, gt=0, description="Temperature of prompts, which the model writes.")


class DrafterConfig(StrictConfig):
    """Training of a drafter's network; the model does not change."""

    constants: ClassVar[Mapping[str, Any]] = {"max_gradient_norm": 1.0, "num_guesses": 2}

    own_text: OwnTextConfig = Field(default=OwnTextConfig(), description="Training text.")
    max_steps: int = Field(default=800, ge=1, description="Optimiser steps.")
    batch_tokens: int = Field(default=2048, ge=64, description="Tokens per step, padding included.")
    learning_rate: float = Field(default=6e-4, gt=0, description="Peak rate (warm-up, then cosine).")
    warmup_steps: int = Field(default=30, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW weight decay.")
    precision: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="bfloat16 turns autocast on.")
    save_every: int = Field(default=50, ge=1, description="Steps between states to resume from.")


class OldSelfSpeculation:
    """The former `anydepth.SelfSpeculation`: its `Config` can be built, and `attach` refuses it with advice."""

    Config = DraftConfig
