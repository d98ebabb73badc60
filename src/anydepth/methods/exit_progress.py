"""Which tokens of a forward have not left, from exit to exit."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from anydepth.methods.method import Gate


@dataclass
class ExitProgress:
    """One forward through a method with exits.

    Attributes:
        gate: of the last exit: the tokens that go on; None where there was none yet.
        arrived: by layer, the gate of the last exit before it.
        states: by layer, (B, T, D) in front of it, where a later exit compares with it.
    """

    gate: Gate | None = None
    arrived: dict[int, Gate | None] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)

    @property
    def any_left(self) -> bool:
        return self.gate is None or self.gate.any_kept

    def arrive(self, layer_idx: int) -> Gate | None:
        """Return the gate of the last exit before a layer, also where backward runs it again after deeper ones."""
        self.gate = self.arrived.setdefault(layer_idx, self.gate)
        return self.gate
