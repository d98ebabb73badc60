"""A mixture of experts over a list of N tokens: each expert runs for the tokens that chose it, others not at all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anydepth.engine.backends.torch.layer import Linear
from anydepth.models.experts import Experts, sigmoid
from anydepth.models.llama_like import LayerParts, Weights

MakeLinear = Callable[[Weights], Linear]


class GatedFFN:
    """down(activation(gate(x)) · up(x)), (N, D) to (N, D), or with the clamped inner part of `Experts.swiglu`."""

    def __init__(
        self, gate: Linear, up: Linear, down: Linear, activation: str, swiglu: tuple[float, float] | None = None
    ) -> None:
        self.gate, self.up, self.down, self.activation, self.swiglu = gate, up, down, activation, swiglu

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.up.num_bytes + self.down.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        if self.swiglu is None:
            return self.down(self.up.times(x, self.gate.activate(x, self.activation)))
        limit, slope = self.swiglu
        gate, up = self.gate(x).clamp_(max=limit), self.up(x).clamp_(-limit, limit)
        return self.down(up.add_(1).mul_(gate * sigmoid(slope * gate)))


class Mixture:
    """A router with its experts, and a shared expert that every token runs, if there is one.

    Args:
        parts: of a layer with these experts.
        linear: makes the linear layers of experts.
        exact: makes those of router and gate, in the precision of their weights.
    """

    def __init__(self, parts: LayerParts, experts: Experts, linear: MakeLinear, exact: MakeLinear) -> None:
        router, activation = experts.router, parts.activation
        self.choose, self.top_k, self.router_dtype = router.choose, router.top_k, router.weight.dtype
        self.router = exact(Weights(router.weight, router.bias))
        self.experts = [
            GatedFFN(linear(Weights(*gate)), linear(Weights(*up)), linear(Weights(*down)), activation, experts.swiglu)
            for gate, up, down in zip(experts.gate, experts.up, experts.down, strict=True)
        ]
        self.shared_gate = None if experts.shared_gate is None else exact(Weights(experts.shared_gate, None))
        self.shared: GatedFFN | None = None
        if parts.gate is not None and parts.up is not None and parts.down is not None:
            self.shared = GatedFFN(linear(parts.gate), linear(parts.up), linear(parts.down), activation)

    @property
    def num_bytes(self) -> int:
        """The bytes that a token reads: those of the experts it chooses, and of what every token runs."""
        always = [part for part in (self.router, self.shared_gate, self.shared) if part is not None]
        return sum(part.num_bytes for part in always) + self.top_k * self.expert_bytes

    @property
    def expert_bytes(self) -> int:
        return self.experts[0].num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return (N, D) outputs of (N, D) inputs."""
        weights, chosen = self.choose(self.router(x.to(self.router_dtype)))
        output = (self._run_experts(x, chosen).float() * weights[..., None]).sum(1).to(x.dtype)
        if self.shared is None:
            return output
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared *= sigmoid(self.shared_gate(x))
        return output.add_(shared)

    def _run_experts(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return (N, K, D) outputs of the experts that each token has chosen."""
        if len(x) == 1:
            return torch.stack([self.experts[expert](x) for expert in chosen[0].tolist()], dim=1)
        flat = chosen.flatten()
        experts, counts = flat.unique(return_counts=True)
        outputs = x.new_empty(len(flat), x.shape[1])
        groups = flat.argsort(stable=True).split(counts.tolist())
        for expert, index in zip(experts.tolist(), groups, strict=True):
            outputs[index] = self.experts[expert](x[index // chosen.shape[1]])
        return outputs.view(*chosen.shape, -1)
