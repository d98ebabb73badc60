"""Weight formats: how linear layers store and multiply their weights. A new format is one registered class.

For the kernels weights are packed in the order in which they are read: panels of 16 outputs. A panel has the same few
inputs of its 16 outputs in 64 bytes: 1 float32, 2 bfloat16, 4 int8 or 8 int4 of each. `kernels/product.h` reads them;
the two files must agree. Weights in the blocks of a GGUF file are repacked by the kernels themselves (`native`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.engine.backends.torch.layer import Int8Linear, Linear, PrepackedLinear, joined
from anydepth.errors import UserError
from anydepth.models.backbone import Backbone
from anydepth.models.gguf import BLOCK_KINDS
from anydepth.models.llama_like import Weights
from anydepth.models.load import NATIVE

PANEL = 16
SAMPLED_ROWS = 32
"""Outputs of a linear layer by which `lost_in_int4` estimates its error."""
GROUP = 32
"""Inputs that are together in a panel of integers, and have the same step in int4."""


class WeightFormat:
    """Dense weights in the model's own precision; the base of all formats."""

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]  # of the activations
    num_together: ClassVar[int] = 1  # inputs of an output that are neighbours in a panel
    kernel_id: ClassVar[int | None] = None  # number of its product in `product.h`; None: PyTorch's operators run it
    is_quantised: ClassVar[bool] = False  # whether the weights are a copy with fewer bits than the model's
    bits: ClassVar[float] = 16  # of a weight, its scales included
    needs_kernels: ClassVar[bool] = False  # whether only the kernels run it
    head: ClassVar[str | None] = None  # name of the head's format; None: the same
    block_kinds: ClassVar[Collection[str]] = ()  # types of the blocks that the kernels run as they are

    @classmethod
    def dense(cls, weight: Tensor) -> Tensor:
        """Return the (out, in) weights that products are made with."""
        return weight

    @classmethod
    def pack(cls, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the panels that the kernels read, (panels, in / num_together, 16, num_together), and their scales."""
        return _panels(cls.dense(weight), cls.num_together), None

    @classmethod
    def linear(cls, parts: Sequence[Weights]) -> Linear:
        """Return layers of the same input as one, by PyTorch's operators."""
        return Linear([Weights(cls.dense(part.weight).to(part.weight.dtype), part.bias) for part in parts])


Registered = TypeVar("Registered", bound=WeightFormat)
WEIGHTS: dict[str, type[WeightFormat]] = {}
"""All formats by name."""
WEIGHT_ONLY: dict[str, type[WeightFormat]] = {}
"""Those with fewer bits than the model."""
CONTROLS = ("int8", "int4")
"""Those that adaptive depth is compared with."""


def register(weight_format: type[Registered]) -> type[Registered]:
    """Make a format available by its name."""
    WEIGHTS[weight_format.name] = weight_format
    if weight_format.is_quantised:
        WEIGHT_ONLY[weight_format.name] = weight_format
    return weight_format


@register
class Float32(WeightFormat):
    name, dtype, kernel_id = "float32", torch.float32, 0


@register
class BFloat16(WeightFormat):
    name, dtype, num_together, kernel_id = "bfloat16", torch.bfloat16, 2, 1

    @classmethod
    def linear(cls, parts: Sequence[Weights]) -> Linear:
        linear = super().linear(parts)
        on_cpu = parts[0].weight.device.type == "cpu"
        return PrepackedLinear(linear.parts) if on_cpu and torch.backends.mkldnn.is_available() else linear


@register
class Float16(WeightFormat):
    name, dtype = "float16", torch.float16


@register
class Int8(WeightFormat):
    """Symmetric int8 with a scale per output; packed as bytes b for (b − 128) · scale."""

    name, dtype, num_together, kernel_id, is_quantised = "int8", torch.bfloat16, 4, 2, True
    bits = 8

    @staticmethod
    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, in) int8 and (out,) bfloat16 scales: weight = int8 · scale."""
        # The scales are rounded before the weights are: else every row would be off by the rounding of its scale.
        scales = (weight.float().abs().amax(1) / 127).clamp_min(1e-12).to(torch.bfloat16)
        return (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales

    @classmethod
    def dense(cls, weight: Tensor) -> Tensor:
        steps, scales = cls.quantise(weight)
        return steps.float() * scales.float()[:, None]

    @classmethod
    def pack(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        steps, scales = cls.quantise(weight)
        # 128 is zero; padded inputs are multiplied with zeros, and padded outputs are not read.
        bytes_ = F.pad((steps.to(torch.int16) + 128).to(torch.uint8), (0, -steps.shape[1] % GROUP))
        packed = _panels(bytes_, cls.num_together)
        return packed, F.pad(scales, (0, packed.shape[0] * PANEL - len(scales)))

    @classmethod
    def linear(cls, parts: Sequence[Weights]) -> Linear:
        whole = joined(parts)
        if whole.weight.device.type != "cpu":
            raise UserError(f"int8 weights are for the CPU; on {whole.weight.device.type} use bfloat16")
        return Int8Linear(*cls.quantise(whole.weight), whole.bias)


@register
class Int4(WeightFormat):
    """4 bits with a step and an offset per group of inputs; packed as bytes of two, scales (panels, groups, 2, 16).

    Weights in Q4_1 blocks, rounded with error feedback (`models/gptq.py`), are taken as they are.
    The head stays in int8, as it is the part of a model that 4 bits cost most: 5.9% perplexity of the embedded model,
    all of int4's loss.
    """

    name, dtype, num_together, kernel_id, is_quantised = "int4", torch.bfloat16, 4, 3, True
    needs_kernels, head, bits, block_kinds = True, "int8", 5, ("Q4_1",)

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return s, (out, groups, 32) uint8 below 16, and float16 steps and offsets.

        The weight is s · step + offset; the last group is padded with its last weight.
        """
        last = weight[:, -1:].expand(-1, -weight.shape[1] % GROUP)  # inputs there are 0, so that any weight will do
        groups = torch.cat([weight, last], dim=1).float().view(len(weight), -1, GROUP)
        low, high = groups.amin(2), groups.amax(2)
        steps = ((high - low) / 15).clamp_min(1e-7).to(torch.float16)
        offsets = low.to(torch.float16)
        quantised = ((groups - offsets.float()[..., None]) / steps.float()[..., None]).round().clamp(0, 15)
        return quantised.to(torch.uint8), steps, offsets

    @classmethod
    def dense(cls, weight: Tensor) -> Tensor:
        steps, step, offset = cls.quantise(weight)
        whole = steps.float() * step.float()[..., None] + offset.float()[..., None]
        return whole.flatten(1)[:, : weight.shape[1]]

    @classmethod
    def pack(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        steps, step, offset = cls.quantise(weight)
        halves = _panels(steps.flatten(1), cls.num_together)  # (panels, in / 4, 16, 4)
        halves = halves.view(len(halves), -1, GROUP // 8, 2, PANEL, 4)
        packed = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
        return packed, torch.stack([_panels(part, 1)[..., 0] for part in (step, offset)], dim=2)


@register
class Int4Nearest(Int4):
    """4 bits, each weight rounded to the nearest."""

    name, block_kinds = "int4-nearest", ()


@register
class Native(BFloat16):
    """The blocks of a GGUF file as they are stored; tensors that are not in blocks are in bfloat16."""

    name, needs_kernels, block_kinds = NATIVE, True, BLOCK_KINDS


def kind_of(name: str) -> type[WeightFormat]:
    """Return the weight format of a name; raise `UserError` for another name."""
    if name not in WEIGHTS:
        raise UserError(f"weights '{name}' are unknown; weights are {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def lost_in_int4(backbone: Backbone) -> float:
    """Return the error of int4 weights, rounded to the nearest, relative to the weights; from some rows of each layer.

    Weights that were in 4 bits before come back up to bfloat16's own rounding (0.003); Gaussian ones lose 0.08.
    """
    lost = total = 0.0
    for view in backbone.layers:
        for part in view.module.modules():
            if isinstance(part, nn.Linear):
                weight = part.weight.detach()[:SAMPLED_ROWS].float()
                lost += float((Int4.dense(weight) - weight).square().sum()) * len(part.weight) / len(weight)
                total += float(weight.square().sum()) * len(part.weight) / len(weight)
    return (lost / total) ** 0.5 if total else 0.0


def _panels(matrix: Tensor, num_together: int) -> Tensor:
    """Return (out, in) as (panels, in / num_together, 16, num_together), padded with zeros."""
    num_outputs, num_inputs = matrix.shape
    padded = F.pad(matrix, (0, -num_inputs % num_together, 0, -num_outputs % PANEL))
    return padded.view(-1, PANEL, padded.shape[1] // num_together, num_together).transpose(1, 2)
