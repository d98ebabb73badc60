"""A decoder layer of a Hugging Face model: its modules by role, and the K/V of tokens that skip its mixer.

There is no forward of any model here: only the model's modules run.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from torch import Tensor, nn

from anydepth.errors import UserError
from anydepth.models.families import Family
from anydepth.models.plain import chosen_module

Positions = tuple[Tensor, ...]
"""What a mixer gets about positions: cosines and sines of the rotary embedding, or the position of each token."""


class _Projected(Exception):
    """An exception that ends an attention forward once its K/V are known, before attention runs."""


class KVCapture:
    """A cache that captures the K/V that an attention module has projected, and ends its forward if `stop`."""

    kv: tuple[Tensor, Tensor]

    def __init__(self, *, stop: bool) -> None:
        self.stop = stop

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.kv = key_states, value_states
        if self.stop:
            raise _Projected
        return self.kv


class _NoQueries(nn.Module):
    """Zeros in place of a query projection, of the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.width)


class LayerView:
    """A decoder layer: its modules by role, and the K/V projection of tokens that skip its mixer.

    Attributes:
        kv_source: the earlier layer of which this one attends to the K/V, as it has none of its own.
        kv_readers: indices of the later layers that attend to the K/V of this one.
    """

    def __init__(self, module: nn.Module, layer_idx: int, family: Family, hidden_size: int) -> None:
        self.module = module
        self.hidden_size = hidden_size
        self.layer_idx = layer_idx
        self.family = family
        self.kv_source: LayerView | None = None
        self.kv_readers: list[int] = []
        name, self.mixer = self._first(family.mixer)
        self.is_recurrent = name in family.recurrent
        self.kv_norm = self._first(family.kv_norm)[1] if family.kv_norm else None
        self.mixer_out = self._first(family.mixer_out)[1] if family.mixer_out else self.mixer
        self.ffn_in = self._first(family.ffn_in)[1]
        self.ffn_out = self._first(family.ffn_out)[1]
        # Names after (self, hidden_states), because GPT-2 passes some arguments by position.
        self.argument_names = list(inspect.signature(type(module).forward).parameters)[2:]

    def _first(self, names: tuple[str, ...]) -> tuple[str, nn.Module]:
        for name in names:
            child = getattr(self.module, name, None)
            if child is not None:
                return name, child
        raise UserError(
            f"layer {self.layer_idx} ({type(self.module).__name__}) has none of {', '.join(names)}: anydepth "
            "does not support this variant of the family"
        )

    @property
    def branch_factor(self) -> float:
        """The constant by which the layer multiplies what its branches add."""
        name = self.family.branch_factor
        return float(getattr(self.module, name)) if name else 1.0

    @property
    def kv_projections(self) -> list[nn.Module]:
        """The linear layers that run for a skipping token: those of K and V, or the fused one of queries too."""
        return list(self._parts_of_mixer(self.family.kv_projections).values())

    @property
    def kv_expansions(self) -> list[nn.Module]:
        """The linear layers that compute K/V from what the cache has, in each forward and for each of its tokens."""
        return list(self._parts_of_mixer(self.family.kv_expansions).values())

    @property
    def kv_values(self) -> int:
        """Number of values of a token in the K/V cache; 0 for a recurrent layer."""
        if self.is_recurrent:
            return 0
        if self.family.kv_expansions:
            return sum(_outputs(part) for part in self.kv_projections)
        queries, kv_heads, width = self.heads
        repeats = bool(self.family.repeats_kv) and getattr(self.mixer, self.family.repeats_kv)
        return 2 * (queries if repeats else kv_heads) * width

    @property
    def values_per_pair(self) -> int:
        """Number of multiply-adds of attention for each pair of a query and a key."""
        attention: Any = self.mixer
        queries, _, width = self.heads
        return queries * (width + getattr(attention, "v_head_dim", width))

    @property
    def shares_kv(self) -> bool:
        return self.kv_source is not None or bool(self.kv_readers)

    @property
    def projects_queries(self) -> bool:
        """Whether a skipping token pays for queries too, because q, k and v are one matrix."""
        return not self.is_recurrent and not self._parts_of_mixer(self.family.query_projections)

    def _parts_of_mixer(self, names: tuple[str, ...]) -> dict[str, nn.Module]:
        parts = chosen_module(self.mixer)._modules
        return {name: part for name in names if (part := parts.get(name)) is not None}

    @property
    def heads(self) -> tuple[int, int, int]:
        """Number of query heads, number of key/value heads, and the width of a head."""
        attention: Any = self.mixer
        queries = attention.config.num_attention_heads if hasattr(attention, "config") else attention.num_heads
        widths = (getattr(attention, name, None) for name in ("qk_head_dim", "head_dim"))
        width = next(filter(None, widths), self.hidden_size // queries)
        heads = _outputs(self.kv_projections[0]) // width if self.kv_projections else 0
        return queries, (heads - queries) // 2 if self.projects_queries else heads, width

    def normalise(self, hidden: Tensor) -> Tensor:
        """Apply the norm before the K/V projection to the (..., D) residual stream."""
        return hidden if self.kv_norm is None else self.kv_norm(hidden)

    def positions_of(self, arguments: dict[str, Any]) -> Positions | None:
        """Return what the arguments of a layer or mixer say about the positions of its tokens."""
        values = [arguments.get(name) for name in self.family.position_arguments]
        flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        return tuple(part for part in flat if part is not None) or None

    def _position_arguments(self, positions: Positions) -> dict[str, Any]:
        """Return the arguments from which `positions_of` took these."""
        first, *others = self.family.position_arguments
        split = len(positions) - len(others)
        arguments: dict[str, Any] = dict(zip(others, positions[split:], strict=True))
        return arguments | {
            first: positions[:split] if split > 1 else positions[0]
        }  # DeepSeek-V2 has one complex tensor

    def project_kv(
        self, normed: Tensor, positions: Positions | None, projections: Sequence[nn.Module] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the mixer writes to its cache for (B, T, D) normed states.

        The mixer's own forward runs, up to its cache and without queries.

        Args:
            projections: modules in place of `kv_projections`.
        """
        capture = KVCapture(stop=True)
        arguments: dict[str, Any] = {self.family.cache_argument: capture, "attention_mask": None}
        arguments |= dict.fromkeys(self.family.unused_arguments)
        arguments |= {} if positions is None else self._position_arguments(positions)
        mixer = self._without_queries(projections)
        with suppress(_Projected):
            type(mixer).forward(mixer, normed, **arguments)
        return capture.kv

    def _without_queries(self, projections: Sequence[nn.Module]) -> nn.Module:
        """Return a mixer that shares everything with the layer's own but its query projections, and `projections`.

        It is made for each call: other threads run the layer's own mixer, and adapters may come and go.
        """
        queries = self._parts_of_mixer(self.family.query_projections)
        if not queries:
            return self.mixer
        mixer = chosen_module(self.mixer)
        twin = object.__new__(type(mixer))
        twin.__dict__.update(mixer.__dict__)
        twin._modules = {**mixer._modules, **{name: _no_queries(_outputs(part)) for name, part in queries.items()}}
        if projections:
            twin._modules |= dict(zip(self.family.kv_projections, projections, strict=True))
        return twin


@cache
def _no_queries(width: int) -> nn.Module:
    """Return a module without state, which is made once, since that takes as long as a projection."""
    return _NoQueries(width)


def _outputs(projection: Any) -> int:
    return projection.nf if hasattr(projection, "nf") else projection.out_features


def first_output(output: Any) -> Tensor:
    """Return the output of a layer or branch, the first of a tuple if it returns one."""
    return output[0] if isinstance(output, tuple) else output
