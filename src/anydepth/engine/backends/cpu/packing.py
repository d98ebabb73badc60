"""Memory of the kernels, and weights in the order in which they read them: panels of 16 outputs.

A panel has the same few inputs of its 16 outputs in 64 bytes: 1 float32, 2 bfloat16, 4 int8 or 8 int4 of each.
`kernels/product.h` reads them; the two files must agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anydepth.engine.huge_pages import huge
from anydepth.engine.weights import INT4_GROUP, quantise_int4, quantise_int8
from anydepth.models.llama_like import Weights

PANEL = 16
CHUNK_BYTES = 2**26


class Memory:
    """What the kernels of a model use: packed weights, on huge pages, and scratch.

    Attributes:
        scratch: float32, shared by all calls.
    """

    def __init__(self) -> None:
        self.scratch = torch.empty(0)
        self.chunk = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to here, contiguous, on a cache line of its own."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self.used + num_bytes > len(self.chunk):
            self.chunk, self.used = huge(max(CHUNK_BYTES, num_bytes)), 0
        kept = self.chunk[self.used : self.used + num_bytes].view(tensor.dtype).view(tensor.shape)
        self.used += -(-num_bytes // 64) * 64
        return kept.copy_(tensor)

    def reserve(self, num_floats: int) -> None:
        """Make the scratch large enough for a call that needs so much."""
        if num_floats > self.scratch.numel():
            self.scratch = torch.empty(num_floats)


@dataclass(frozen=True)
class PackedWeights:
    """A linear layer (num_outputs, num_inputs) in panels.

    Attributes:
        weight: float32 (panels, in, 16); bfloat16 (panels, in / 2, 16, 2); int8 (panels, in / 4, 16, 4) bytes b for
            (b − 128) · scale; int4 (panels, in / 32, 4, 16, 4) bytes of two halves s for (s − 8) · step + offset.
        scales: int8: (panels · 16,); int4: (panels, in / 32, 2, 16), steps and offsets; bfloat16.
        kind: one of `weights.WEIGHTS`.
    """

    weight: Tensor
    scales: Tensor | None
    bias: Tensor | None
    kind: str
    num_outputs: int
    num_inputs: int

    @property
    def num_bytes(self) -> int:
        """Bytes that one product reads."""
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.weight.numel() * self.weight.element_size() + scales


def pack_panels(weights: Weights, kind: str, memory: Memory) -> PackedWeights:
    """Quantise if `kind` is quantised, and pack.

    Raises:
        UserError: int4 for inputs that are not whole groups.
    """
    scales = None
    if kind == "int8":
        steps, scale = quantise_int8(weights.weight)
        # 128 is zero; padded inputs are multiplied with zeros, and padded outputs are not read.
        packed = panels((steps.to(torch.int16) + 128).to(torch.uint8), 4)
        scales = torch.nn.functional.pad(scale, (0, packed.shape[0] * PANEL - len(scale)))
    elif kind == "int4":
        steps, step, offset = quantise_int4(weights.weight)
        halves = panels(steps.flatten(1), 4)  # (panels, in / 4, 16, 4)
        halves = halves.view(len(halves), -1, INT4_GROUP // 8, 2, PANEL, 4)
        packed = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
        scales = torch.stack([panels(part, 1)[..., 0] for part in (step, offset)], dim=2)
    else:
        packed = panels(weights.weight, 2 if kind == "bfloat16" else 1)
    return PackedWeights(
        memory.keep(packed),
        None if scales is None else memory.keep(scales),
        weights.bias,
        kind,
        len(weights.weight),
        weights.weight.shape[1],
    )


def panels(matrix: Tensor, num_together: int) -> Tensor:
    """Return (out, in) as (panels, in / num_together, 16, num_together), padded with zeros."""
    num_outputs, num_inputs = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -num_inputs % num_together, 0, -num_outputs % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // num_together, num_together).transpose(1, 2)
