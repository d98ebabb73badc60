"""Weights as a GGUF file stores them: blocks of integers with their steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight (out, in) in blocks.

    Attributes:
        data: (out, bytes) uint8.
        kind: the type of its blocks, such as Q4_1.
    """

    data: Tensor
    kind: GGMLQuantizationType

    @property
    def shape(self) -> tuple[int, int]:
        inputs, num_bytes = GGML_QUANT_SIZES[self.kind]
        return len(self.data), self.data.shape[1] // num_bytes * inputs

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Tensor) -> Blocks:
        """Return some rows."""
        return Blocks(self.data[rows], self.kind)

    def split(self, sizes: list[int]) -> list[Blocks]:
        """Return consecutive rows, of these sizes."""
        return [Blocks(part, self.kind) for part in self.data.split(sizes)]

    def dense(self) -> Tensor:
        """Return the weight (out, in) in float32."""
        return torch.from_numpy(dequantize(self.data.numpy(), self.kind))

    def sample(self, positions: Tensor) -> Tensor:
        """Return the weights at some positions of the flattened weight."""
        rows, columns = positions // self.shape[1], positions % self.shape[1]
        return self[rows].dense()[torch.arange(len(rows)), columns]


class BlockModule(nn.Module):
    """A module over blocks; the fast engine reads them as they are, a forward dequantises them."""

    data: Tensor

    def __init__(self, blocks: Blocks, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = blocks.kind, dtype
        self.register_buffer("data", blocks.data, persistent=False)

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.data, self.kind)

    @property
    def weight(self) -> Tensor:
        """The weight in the model's float type, dequantised at each access."""
        return self.blocks.dense().to(self.dtype)


class BlockLinear(BlockModule):
    """A linear layer over blocks."""

    def __init__(self, blocks: Blocks, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(blocks, dtype)
        self.bias = bias
        self.out_features, self.in_features = blocks.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class BlockEmbedding(BlockModule):
    """An embedding over blocks.

    Args:
        scale: factor of the embedding, as in Gemma.
    """

    def __init__(self, blocks: Blocks, dtype: torch.dtype, scale: float | None = None) -> None:
        super().__init__(blocks, dtype)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = blocks.shape

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.scaled(self.blocks[token_ids.flatten()].dense()).view(*token_ids.shape, -1)

    def scaled(self, rows: Tensor) -> Tensor:
        """Return rows of the weight as the embedding gives them."""
        rows = rows.to(self.dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=self.dtype)


def block_modules(module: nn.Module) -> Iterator[BlockModule]:
    """Yield the modules with weights in blocks."""
    return (part for part in module.modules() if isinstance(part, BlockModule))
