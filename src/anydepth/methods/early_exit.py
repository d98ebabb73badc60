"""Early exit by confidence: a token exits at the first of the chosen layers where its state is confident enough.

Exits follow Confident Adaptive Language Modeling (Schuster et al. 2022), training follows LayerSkip (Elhoushi et al.
2024): no token exits, and the loss is Σ_l e(l)·CE_l over the exits that a curriculum selects, with e(l) =
e_scale·Σ_{i≤l} i and (L−1) + e_scale·Σ_{i≤L−2} i for the last layer. Lossy; `anydepth calibrate --max-risk` sets
thresholds with a guarantee.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.config import StrictConfig, training_field
from anydepth.gating.context import PassContext
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.scores import ClassifierConfidence, HeadConfidence, Score, StateDelta
from anydepth.gating.spec import GateSpec, KVRule
from anydepth.methods._base.calibration import Calibrated, Thresholds, one_per_layer
from anydepth.methods._base.method import check_exits, check_layers
from anydepth.methods._base.training import ExitState, Trained
from anydepth.models.backbone import Backbone


class EarlyExitConfig(StrictConfig):
    constants: ClassVar[Mapping[str, Any]] = {"decay_length": 512, "classifier_weight": 1.0}

    layers: list[int] | None = Field(
        default=None, description="Layers before which tokens may exit; null is half and three quarters of all."
    )
    confidence: Literal["max_probability", "margin", "entropy", "cosine", "classifier"] = Field(
        default="max_probability",
        description="Measure of confidence: probability of the top token, its margin over the next one, 1 − entropy ÷ "
        "log V, cosine similarity of the states before and after the last layer, or a trained classifier's.",
    )
    thresholds: Thresholds = Field(
        default=math.inf,
        description="A token exits if its confidence is at least this: one number, one per layer from the first on, or "
        "a JSON file that holds either, such as the thresholds.json of `calibrate`. Above 1 no token exits.",
    )
    decay: float | None = Field(
        default=None,
        gt=0,
        description="τ of 0.9·λ + 0.1·exp(−τ·position ÷ 512), stricter at the start; null is none.",
    )
    vocabulary: int | None = Field(
        default=None, ge=2, description="Compute confidence over this many first token ids only; null is all."
    )
    kv_rule: Literal["propagate", "recompute"] = Field(
        default="propagate",
        description="Deeper layers project K/V from the state at the exit (propagate), or run later (recompute).",
    )
    loss_scale: float = training_field(
        default=0.1, ge=0, description="e_scale of the loss over exits in training; 0 is no loss."
    )
    loss_layers: list[int] | None = training_field(
        default=None, description="Layers before which the loss has an exit; null is all but the first."
    )
    curriculum: Literal["none", "rotational", "gradual"] = training_field(
        default="rotational",
        description="Exits in the loss of a step: all; every rotation-th, shifting; or ever more, last one first.",
    )
    rotation: int = training_field(default=4, ge=1, description="R of the rotational curriculum.")
    seed: int = training_field(initial=True, default=0, description="Seed of the classifier.")

    @field_validator("thresholds", mode="before")
    @classmethod
    def _from_file(cls, value: object, info: ValidationInfo) -> object:
        """Return what the JSON file at a path holds; anything that is not a path stays as it is."""
        if not isinstance(value, str):
            return value
        with suppress(ValueError):
            return float(value)  # JSON documents write "Infinity"
        thresholds, layers = _read_thresholds(value)
        wanted = info.data.get("layers")
        if wanted is not None and layers is not None and layers != sorted(wanted):
            raise ValueError(f"the file has thresholds for exits at layers {layers}; the exits are at {sorted(wanted)}")
        return thresholds


def _read_thresholds(path: str) -> tuple[Any, Any]:
    """Return the thresholds in a JSON file, and their layers; None where the file names none."""
    try:
        read: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"the file is not JSON ({error})") from error
    named = cast("dict[str, Any]", read) if isinstance(read, dict) else {"thresholds": read}
    found = named.get("thresholds")
    values = cast("list[Any]", found) if isinstance(found, list) else [found]
    if not all(value == "Infinity" or type(value) in (int, float) for value in values):
        raise ValueError(
            'the file must hold a number, a list with a number or "Infinity" for each exit, or an object with either '
            "under `thresholds`"
        )
    return named.get("thresholds"), named.get("layers")


class EarlyExit(Trained, Calibrated):
    """A method that exits tokens before chosen layers, by the confidence of the head or of a classifier."""

    Config = EarlyExitConfig
    name = "early_exit"
    summary = "tokens exit at chosen layers once the head is confident"
    budget_option = "thresholds"
    decides_in_training = False
    vocabulary: Tensor | None

    def __init__(self, config: EarlyExitConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        half = {max(round(self.num_layers * share), 1) for share in (0.5, 0.75)}
        self.layers = sorted(half if config.layers is None else config.layers)
        check_exits(self.layers, self.num_layers)
        self.thresholds_of(config)
        self.loss_layers = list(range(1, self.num_layers)) if config.loss_layers is None else config.loss_layers
        check_layers(self.loss_layers, self.num_layers, "loss_layers")
        size: int = backbone.model.config.vocab_size
        size = size if config.vocabulary is None else min(config.vocabulary, size)
        self.vocabulary = None if config.vocabulary is None else torch.arange(size)
        self.head_flops = 2 * backbone.hidden_size * size
        self.networks: dict[int, GateNetwork] = {}
        if config.confidence == "classifier":
            start = torch.zeros(1)
            self.networks = {i: GateNetwork(backbone.hidden_size, [], start, self.generator) for i in self.layers}
        self.by_layer = nn.ModuleDict({str(layer_idx): part for layer_idx, part in self.networks.items()})
        self.captured_layers = sorted({*self.loss_layers, *self.layers})
        self.progress = 0.0
        self.step = 0

    @classmethod
    def has_weights(cls, config: EarlyExitConfig) -> bool:
        return config.confidence == "classifier"

    def thresholds_of(self, config: EarlyExitConfig) -> dict[int, float]:
        """Return λ by layer, in order; raise `ValueError` for a list that does not fit the layers."""
        if isinstance(config.thresholds, list) and config.layers not in (None, self.layers):
            raise ValueError(f"layers is {config.layers}; with a list of thresholds give them in order, {self.layers}")
        return one_per_layer(config.thresholds, self.layers, "thresholds")

    @property
    def threshold(self) -> float | list[float]:
        """Threshold, or one per layer, above which minus the confidence lets a token continue."""
        value: float | list[float] = self.config.thresholds
        return [-limit for limit in value] if isinstance(value, list) else -value

    @threshold.setter
    def threshold(self, value: float | list[float]) -> None:
        thresholds = [-limit for limit in value] if isinstance(value, list) else -value
        self.config = self.config.model_copy(update={"thresholds": thresholds})

    def set_progress(self, progress: float, step: int = 0) -> None:
        self.progress, self.step = progress, step

    def gates(self) -> list[GateSpec]:
        rule: KVRule = "recompute" if self.config.kv_rule == "recompute" else "project"
        return [
            GateSpec((i,), "layer", self._score(i), -limit, rule, decay=self.config.decay, exits=True)
            for i, limit in self.thresholds_of(self.config).items()
        ]

    def _score(self, layer_idx: int) -> Score:
        kind = self.config.confidence
        if kind == "classifier":
            return ClassifierConfidence(self.networks[layer_idx], layer_idx)
        if kind == "cosine":
            return StateDelta(layer_idx)
        return HeadConfidence(kind, self.vocabulary, layer_idx, self.head_flops)

    def training_gates(self, context: PassContext) -> list[GateSpec]:
        return []  # no token exits

    def capture(self, layer_idx: int, hidden: Tensor, context: PassContext) -> None:
        self.seen(context)[layer_idx] = hidden

    def weights(self) -> dict[int, float]:
        """Return e(l) of the exits in the loss of this step, relative to that of the last layer.

        Exit l reads the input of layer l, which is the output of the first l layers.
        """
        scale, last = self.config.loss_scale, self.num_layers - 1
        last_weight = last + scale * sum(range(last))
        return {i: scale * sum(range(i)) / last_weight for i in self.loss_layers if self._has_loss(i)}

    def _has_loss(self, layer_idx: int) -> bool:
        if self.config.curriculum == "rotational":
            return layer_idx % self.config.rotation == self.step % self.config.rotation
        if self.config.curriculum == "gradual":  # from the last to the first exit, by half of training
            return layer_idx >= self.num_layers * (1 - 2 * self.progress)
        return True

    def exit_states(self, context: PassContext) -> list[ExitState]:
        states, ones = self.seen(context), context.token_mask.float()
        return [ExitState(states[i], weight * ones) for i, weight in self.weights().items() if weight and i in states]

    def outcome_losses(self, context: PassContext, logits: Tensor) -> dict[str, Tensor]:
        """Return `classifier`, the cross-entropy of whether an exit's top token differs from the last layer's.

        It is a mean over real tokens and exits.
        """
        states = self.seen(context)
        if not self.networks or not states or context.logits_of is None:
            return {}
        real = context.token_mask
        losses: list[Tensor] = []
        with torch.no_grad():
            final = logits.argmax(-1)
        for layer_idx, network in self.networks.items():
            hidden = states[layer_idx].detach()
            with torch.no_grad():
                differs = (context.logits_of(hidden, None).argmax(-1) != final).float()
            logit = context.evaluate(network, hidden)[..., 0]
            losses.append(F.binary_cross_entropy_with_logits(logit[real], differs[real]))
        return {"classifier": torch.stack(losses).mean()}
