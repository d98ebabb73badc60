"""A fixed set of layers, mixers or FFNs that no token runs.

The simplest method and *the* baseline that every learned one must beat at equal cost. Lossy; not trained. Sets are
found by `anydepth search` (`calibration/skip_search.py`). ShortGPT (Men et al. 2024), What Matters in Transformers?
(He et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field
from torch import Tensor

from anydepth.config import StrictConfig
from anydepth.methods.method import Gate, Method, PassContext, Rules, check_layers
from anydepth.models.backbone import Backbone


class SkipSetConfig(StrictConfig):
    """Options of `skip_set`."""

    skip_layers: list[int] = Field(default=[], description="Layers that no token runs, counted from 0.")
    skip_mixers: list[int] = Field(default=[], description="Layers whose mixer alone is left out.")
    skip_ffns: list[int] = Field(default=[], description="Layers whose FFN alone is left out.")


class SkipSet(Method):
    """Leaves out the same layers, mixers and FFNs for every token; nothing of them is computed or kept."""

    Config = SkipSetConfig
    name = "skip_set"
    summary = "leave out a fixed set of layers, mixers or FFNs"
    trained = False
    gates_branches = True

    def __init__(self, config: SkipSetConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        for option in ("skip_layers", "skip_mixers", "skip_ffns"):
            check_layers(getattr(config, option), self.num_layers, option)
        self.choose(config.skip_layers, config.skip_mixers, config.skip_ffns)

    def choose(self, layers: Iterable[int], mixers: Iterable[int] = (), ffns: Iterable[int] = ()) -> None:
        """Leave out these from now on; how a search tries one candidate after the other."""
        self.closed_layers = frozenset(layers)
        self.closed_mixers = frozenset(mixers)
        self.closed_ffns = frozenset(ffns)
        # Whole layers need no gates on branches, and skip a little faster without.
        self.gates_branches = bool(self.closed_mixers or self.closed_ffns)
        self.closed_rules = Rules(
            closed_layers=self.closed_layers, closed_mixers=self.closed_mixers, closed_ffns=self.closed_ffns
        )

    def reads_state(self, layer_idx: int, context: PassContext) -> bool:
        return False

    def rules(self) -> Rules:
        return self.closed_rules

    def begin(self, context: PassContext) -> Gate:
        # No token ever runs the branch, so its K/V would never be read: `omit`.
        return Gate.closed(context, "omit")

    def layer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        return context.states[self.name] if layer_idx in self.closed_layers else None

    def mixer_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        return context.states[self.name] if layer_idx in self.closed_mixers else None

    def ffn_gate(self, layer_idx: int, hidden: Tensor, context: PassContext) -> Gate | None:
        return context.states[self.name] if layer_idx in self.closed_ffns else None
