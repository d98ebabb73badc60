"""The contract of a method: it lists gates.

A method never executes, copies or masks any part of the backbone. Decisions at inference are deterministic, causal and
independent of padding. A method that learns also inherits `Trained` (`training.py`), one with thresholds `Calibrated`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from anydepth.config import StrictConfig
from anydepth.gating.plan import Decider
from anydepth.gating.scores import Closed
from anydepth.gating.spec import Branch, GateSpec, KVRule
from anydepth.models.backbone import Backbone


class Method(nn.Module, Decider):
    """Base class of methods. Their parameters are in float32, and their `name` is the key in `METHODS`."""

    Config: ClassVar[type[StrictConfig]]
    summary: ClassVar[str]
    """One line for `anydepth methods`."""
    decides_in_training: ClassVar[bool] = True
    """Whether its gates skip tokens in training."""
    is_frozen: bool = False
    """Whether it decides as at inference while other methods are trained."""

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.num_layers = backbone.num_layers
        self.generator = torch.Generator()
        self.reseed(getattr(config, "seed", 0))

    @classmethod
    def has_weights(cls, config: Any) -> bool:
        """Return whether a method of this config has parameters to train."""
        return False

    @classmethod
    def is_lossless(cls) -> bool:
        """Return whether every token runs everything at inference."""
        return cls.gates is Decider.gates and cls.prompt_gates is Decider.prompt_gates

    def reseed(self, seed: int) -> None:
        """Seed the random generator; training calls this at every step, so that a resumed run repeats the draws."""
        self.generator.manual_seed(seed)

    @property
    def kv_rules(self) -> set[KVRule]:
        """The ways in which tokens that skip a mixer leave K/V where other tokens of their sequence run it."""
        return {
            spec.on_skip for spec in self._every_gate if spec.branch != "ffn" and not isinstance(spec.score, Closed)
        }

    @property
    def replaces_kv(self) -> bool:
        """Whether tokens that skip a mixer leave K/V by other projections than the layer's own."""
        return any(spec.projections is not None for spec in self._every_gate)

    @property
    def _every_gate(self) -> list[GateSpec]:
        return [*self.gates(), *self.prompt_gates(sys.maxsize)]

    @property
    def gated_layers(self) -> Sequence[int]:
        """Layers with gates that decide per token or per sequence."""
        gated: set[int] = set()
        for spec in self.gates():
            if not isinstance(spec.score, Closed):
                gated.update(range(spec.layers[0], self.num_layers) if spec.exits else spec.layers)
        return sorted(gated)

    @property
    def branches(self) -> set[Branch]:
        return {spec.branch for spec in self.gates()}

    @property
    def routes_mixers(self) -> bool:
        """Whether it has alternate mixers."""
        return any(spec.alternates is not None for spec in self.gates())

    @property
    def pool_tokens(self) -> int:
        """Number of first tokens of a sequence, all of which run, that its later decisions depend on."""
        return max((spec.score.pool_tokens for spec in self.gates()), default=0)


def closed_gates(layers: Iterable[int] = (), mixers: Iterable[int] = (), ffns: Iterable[int] = ()) -> list[GateSpec]:
    """Return gates that no token passes; they leave no K/V, because none are read there."""
    branches: list[tuple[Branch, Iterable[int]]] = [("layer", layers), ("mixer", mixers), ("ffn", ffns)]
    gates = [GateSpec(tuple(sorted(some)), branch, Closed(), on_skip="omit") for branch, some in branches]
    return [gate for gate in gates if gate.layers]


def check_exits(layers: Sequence[int], num_layers: int) -> None:
    """Raise `ValueError` unless tokens can exit before each of the sorted `layers`."""
    check_layers(layers, num_layers, "layers")
    if not layers or layers[0] == 0:
        raise ValueError(f"layers is {layers}; an exit needs at least one layer before it, so give layers from 1 on")


def check_always_keep(always_keep: int, num_layers: int) -> None:
    """Raise `ValueError` if no layer is left after the first `always_keep`."""
    if always_keep >= num_layers:
        raise ValueError(f"always_keep is {always_keep}; this model has {num_layers} layers, keep fewer")


def check_layers(layers: Sequence[int], num_layers: int, option: str) -> None:
    """Raise `ValueError` unless `layers` are distinct indices of a model with `num_layers` layers."""
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"{option} has {outside}; this model has layers 0 to {num_layers - 1}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{option} names a layer twice: {sorted(layers)}")
