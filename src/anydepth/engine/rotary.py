"""Rotations of queries and keys by their places: one table for each kind that the model has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anydepth.engine.backends.cpu.native import rotation_structs
from anydepth.engine.kv_cache import GROWTH
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import rotations


class Rotation:
    """Cosines and sines (N, R) of N tokens."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def take(self, index: Tensor) -> Rotation:
        return Rotation(self.cos[index], self.sin[index])

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(N, 1, R) each; the sines carry the sign of the half that they rotate."""
        half = self.sin.shape[-1] // 2
        return self.cos[:, None], torch.cat([-self.sin[:, :half], self.sin[:, half:]], dim=-1)[:, None]

    def turn(self, heads: Tensor) -> None:
        """Rotate (N, H, head_dim) in place; only the first R of each head where the model rotates a part."""
        (cos, sin), size = self.factors, self.cos.shape[-1]
        turned = heads if size == heads.shape[-1] else heads[..., :size]
        swapped = turned.roll(size // 2, dims=-1)
        turned.mul_(cos).addcmul_(swapped, sin)


class Rotations:
    """Tables of all kinds of rotation, by the model itself, that grow with the longest sequence.

    Args:
        kinds: by number, as the kernels name them.
        like: a tensor of the activations' type, where they lie.
    """

    def __init__(self, backbone: Backbone, kinds: Sequence[str], like: Tensor) -> None:
        self.backbone, self.kinds, self.like = backbone, list(kinds), like
        self.num_places = 0
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}
        self.structs: Any = None

    def make_room(self, length: int) -> None:
        """Tables for the places up to `length`."""
        if length > self.num_places:
            self.num_places = length + GROWTH
            tables = rotations(self.backbone, self.num_places, self.kinds, self.like)
            self.tables = {kind: (cos.contiguous(), sin.contiguous()) for kind, (cos, sin) in tables.items()}
            self.structs = rotation_structs([self.tables[kind] for kind in self.kinds])

    def at(self, kind: str, places: Tensor | slice) -> Rotation:
        """Of a kind, for tokens at these places."""
        cos, sin = self.tables[kind]
        return Rotation(cos[places], sin[places])
