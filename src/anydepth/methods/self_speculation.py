"""Self-speculative decoding: a part of the model drafts tokens, all of it verifies many of them in one pass.

Lossless: forwards run at full depth, and generated tokens are those of full depth, sampled ones too
(`speculation/speculate.py`). Other attached methods decide in drafts alone. LayerSkip (Elhoushi
et al. 2024), SWIFT (Xia et al. 2024), EAGLE (Li et al. 2024), prompt lookup (Saxena 2023).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from anydepth.config import StrictConfig, training_field
from anydepth.methods._base.method import Method, check_layers
from anydepth.methods._base.training import Trained
from anydepth.models.backbone import Backbone
from anydepth.speculation.draft_network import DraftNetwork


class DraftNetworkConfig(StrictConfig):
    """A trained drafter: one layer beside the model, and a part of its head."""

    taps: list[int] = Field(
        default=[], description="Layers, counted from 1, behind which it reads verified tokens; none is the last."
    )
    vocabulary_size: int = Field(default=8192, ge=16, description="Tokens that it can guess: those said most.")


class OnlineSearchConfig(StrictConfig):
    """A skip set to draft with, searched on the text being generated."""

    strategy: Literal["bayesian", "dynamic", "influence", "knapsack"] = Field(
        default="bayesian",
        description="As of `anydepth search`; bayesian tries one more set each time, knapsack times the layers once.",
    )
    budget: float = Field(default=0.3, gt=0, lt=1, description="Share of layers, or of time, that drafts leave out.")
    every: int = Field(default=16, ge=1, description="Tokens between two searches.")
    window: int = Field(default=32, ge=4, description="Last tokens that are searched on.")
    num_searches: int = Field(default=60, ge=1, description="After which the set stays.")
    seed: int = Field(default=0, description="Of the proposals.")


class SelfSpeculationConfig(StrictConfig):
    """Options of `self_speculation`."""

    lookup: bool = Field(default=True, description="Draft what followed the last tokens earlier in the text.")
    exit_layers: list[int] = Field(
        default=[], description="Draft with so many first layers; of several, with what is worth most at the moment."
    )
    exit_vocabulary: int | None = Field(
        default=None, ge=16, description="Tokens that drafts of first layers can be, the first ids; null is all."
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
    seed: int = training_field(initial=True, default=0, description="Seed of the trained drafter's first weights.")

    @field_validator("exit_layers", mode="before")
    @classmethod
    def _one_is_a_list(cls, layers: object) -> object:
        return [layers] if isinstance(layers, int) else layers


class SelfSpeculation(Trained, Method):
    """Gates nothing; holds how drafts are made, and the weights of a trained drafter."""

    Config = SelfSpeculationConfig
    name = "self_speculation"
    summary = "drafts tokens with a part of the model, verifies them with all of it"
    decides_in_training = False
    network: DraftNetwork | None

    def __init__(self, config: SelfSpeculationConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        check_layers(config.exit_layers, self.num_layers, "exit_layers")
        if 0 in config.exit_layers:
            raise ValueError("exit_layers has 0; a draft needs at least one layer")
        self.network = None
        if config.exit_vocabulary is not None and config.exit_vocabulary > backbone.model.config.vocab_size:
            raise ValueError(
                f"exit_vocabulary is {config.exit_vocabulary}; the model has {backbone.model.config.vocab_size} tokens"
            )
        if config.network is not None:
            taps = sorted(config.network.taps) or [self.num_layers]
            check_layers([tap - 1 for tap in taps], self.num_layers, "network.taps, less one,")
            if taps[-1] != self.num_layers:
                raise ValueError(
                    f"network.taps end with {taps[-1]}; the last must be {self.num_layers}, what the head reads"
                )
            if config.exit_layers and max(config.exit_layers) > taps[0]:
                raise ValueError(f"network.taps start with {taps[0]}; they must lie behind exit_layers")
            size = min(config.network.vocabulary_size, backbone.model.config.vocab_size)
            try:
                self.network = DraftNetwork(backbone, taps, size, self.generator)
            except RuntimeError as error:
                raise ValueError("network starts from a plain last layer; merge LoRA, and load without nf4") from error

    @classmethod
    def has_weights(cls, config: SelfSpeculationConfig) -> bool:
        return config.network is not None
