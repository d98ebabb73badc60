"""A fixed set of layers, mixers or FFNs that no token runs.

The simplest method, and the baseline that every learned one must beat at equal cost. Lossy; not trained. `anydepth
search` (`search/skip_search.py`) finds sets. See ShortGPT (Men et al. 2024) and What Matters in Transformers? (He et
al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from anydepth.config import StrictConfig
from anydepth.gating.spec import GateSpec
from anydepth.methods._base.method import Method, check_layers, closed_gates
from anydepth.models.backbone import Backbone


class SkipSetConfig(StrictConfig):
    skip_layers: list[int] = Field(default=[], description="Layers that no token runs, counted from 0.")
    skip_mixers: list[int] = Field(default=[], description="Layers of which only the mixer is left out.")
    skip_ffns: list[int] = Field(default=[], description="Layers of which only the FFN is left out.")


class SkipSet(Method):
    """A method that leaves out the same layers, mixers and FFNs for every token, without any K/V there."""

    Config = SkipSetConfig
    name = "skip_set"
    summary = "leave out a fixed set of layers, mixers or FFNs"

    def __init__(self, config: SkipSetConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        for option in ("skip_layers", "skip_mixers", "skip_ffns"):
            check_layers(getattr(config, option), self.num_layers, option)
        self.choose(config.skip_layers, config.skip_mixers, config.skip_ffns)

    def choose(self, layers: Iterable[int], mixers: Iterable[int] = (), ffns: Iterable[int] = ()) -> None:
        """Set the layers, mixers and FFNs to leave out; a search calls this for each candidate."""
        self.closed = closed_gates(layers, mixers, ffns)

    def gates(self) -> list[GateSpec]:
        return self.closed
