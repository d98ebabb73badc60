"""The structure of a Hugging Face decoder: its layers, mixers, FFNs, norms and K/V projections.

There is no forward of any model here: only the model's submodules run. A new family is one line in `families.py`, which
`Backbone.verify` checks against the model on attach.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from anydepth.errors import UserError
from anydepth.models.blocks import BlockLinear
from anydepth.models.families import family_of
from anydepth.models.hooks import Hooks
from anydepth.models.layer_view import KVCapture, LayerView, first_output
from anydepth.models.plain import check_adapters, chosen_module


@dataclass(frozen=True)
class RotarySwitch:
    """The length at which the rotary embedding of a model changes for all tokens.

    Attributes:
        length: tokens of the longest sequence before the change.
        again: whether it changes with every further token too (`dynamic`).
        restarts: whether the model then reads the whole sequence again (Phi-3).
    """

    length: int
    again: bool
    restarts: bool


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face causal LM inside a PEFT wrapper, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if get_base is not None else model  # type: ignore[return-value]


def is_spread(model: nn.Module) -> bool:
    """Return whether accelerate moves a model's weights to where they are needed."""
    return len(set(getattr(unwrap(model), "hf_device_map", {}).values())) > 1


class Backbone:
    """The structure of a causal LM. Raises `UserError` with the list of families for any other model."""

    def __init__(self, model: nn.Module) -> None:
        check_adapters(model)
        causal_lm = unwrap(model)
        self.model = causal_lm
        self.family_name = getattr(getattr(causal_lm, "config", None), "model_type", type(model).__name__)
        self.family = family_of(self.family_name)
        self._refuse_variants(causal_lm.config)
        if self.attention_implementation not in ("sdpa", "eager"):
            # Other implementations take no mask of (query, key), so kept tokens would attend to the wrong ones.
            raise UserError(
                f"attention by '{self.attention_implementation}' cannot run a part of the tokens; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        self.decoder: nn.Module = causal_lm.get_submodule(self.family.decoder)
        modules = list(getattr(self.decoder, self.family.layers))
        self.layers = [LayerView(module, i, self.family, self.hidden_size) for i, module in enumerate(modules)]
        self._find_shared_kv()

    def _find_shared_kv(self) -> None:
        """Find the layer of which each layer without its own K/V has them: the last one of its type that has some."""
        last: dict[Any, LayerView] = {}
        for view in self.layers if self.family.shared_kv_argument else ():
            kind = self._layer_type(view)
            if view.kv_projections:
                last[kind] = view
            else:
                view.kv_source = last[kind]
                last[kind].kv_readers.append(view.layer_idx)

    @property
    def shares_kv(self) -> bool:
        """Whether layers attend to K/V of other layers."""
        return any(view.shares_kv for view in self.layers)

    def check_branches(self, what: str) -> None:
        """Raise `UserError` if `what`, which skips mixers or FFNs alone, does not fit the family."""
        if self.family.whole_layers:
            raise UserError(
                f"{what} skips mixers or FFNs alone, and layers of {self.family_name} can only be skipped as a whole: "
                f"{self.family.whole_layers}"
            )

    def _layer_type(self, view: LayerView) -> str | None:
        types = getattr(self.model.config, "layer_types", None)
        return types[view.layer_idx] if types else None

    def _refuse_variants(self, config: Any) -> None:
        for refusal in self.family.refused:
            if getattr(config, refusal.attribute, None) == refusal.value:
                raise UserError(
                    f"this {self.family_name} model has {refusal.attribute}={refusal.value}, which anydepth does not "
                    f"support: {refusal.why}"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        embedding = self.decoder.get_submodule(self.family.embedding)
        found = next(chain(embedding.parameters(), embedding.buffers())).device
        # Weights that accelerate keeps on the disk are on the meta device until they are needed.
        return torch.device(cast(Any, embedding)._hf_hook.execution_device) if found.type == "meta" else found

    @property
    def head(self) -> nn.Module:
        """The module that turns the last hidden state into logits."""
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal LM has an output embedding"
        return head

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head; an identity in some OPT models."""
        return getattr(self.decoder, self.family.final_norm, None) or nn.Identity()

    @contextmanager
    def layer_outputs(self) -> Iterator[dict[int, Tensor]]:
        """Yield a mapping of layer index to the (B, T, D) output of the layer in the last forward."""
        outputs: dict[int, Tensor] = {}

        def keep(layer_idx: int, _: nn.Module, __: Any, output: Any) -> None:
            outputs[layer_idx] = first_output(output)

        with Hooks() as hooks:
            for view in self.layers:
                hooks.after(view.module, partial(keep, view.layer_idx))
            yield outputs

    def logits_of(self, states: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """Return (..., V) logits of (..., D) residual states, or those of a (V',) vocabulary."""
        states = self.final_norm(states)
        project_out = getattr(self.decoder, "project_out", None)  # in some OPT models
        states = states if project_out is None else project_out(states)
        head = chosen_module(self.head)
        if vocabulary is None:
            logits = self.head(states)
        elif isinstance(head, BlockLinear):
            bias = None if head.bias is None else head.bias[vocabulary]
            logits = F.linear(states, head.blocks[vocabulary].dense().to(states.dtype), bias)
        elif type(head) is nn.Linear:
            bias = None if head.bias is None else head.bias[vocabulary]
            logits = F.linear(states, head.weight[vocabulary], bias)
        else:  # only a forward of the adapter gives its effect
            logits = self.head(states)[..., vocabulary]
        logits = logits if self.logits_scale == 1 else logits * self.logits_scale
        return logits if self.logits_softcap is None else torch.tanh(logits / self.logits_softcap) * self.logits_softcap

    @property
    def logits_scale(self) -> float:
        """The factor of the logits after the head, before the soft-cap."""
        config = self.model.config
        factor = getattr(config, self.family.logits_factor) if self.family.logits_factor else 1.0
        return factor / getattr(config, self.family.logits_divisor) if self.family.logits_divisor else factor

    @property
    def embedding_scale(self) -> float:
        """The factor of the embedding that its module does not apply."""
        name = self.family.embedding_factor
        return float(getattr(self.model.config, name)) if name else 1.0

    @property
    def logits_softcap(self) -> float | None:
        """The c of c·tanh(logits / c); None if the family's head has no such cap."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    @property
    def rope_parameters(self) -> list[dict[str, Any]]:
        """The parameters of each kind of rotary embedding."""
        parameters: Any = getattr(self.model.config, "rope_parameters", None) or {}
        return [part for part in parameters.values() if isinstance(part, dict)] or [parameters]

    @property
    def rotary_switch(self) -> RotarySwitch | None:
        """The switch of a rotary embedding that depends on the length of the sequence; None if it does not."""
        config: Any = self.model.config
        found = []
        for kind in self.rope_parameters:
            if kind.get("rope_type") == "longrope":
                length = kind.get("original_max_position_embeddings") or config.original_max_position_embeddings
                found.append(RotarySwitch(length, again=False, restarts=self.family.restarts_at_switch))
            elif kind.get("rope_type") == "dynamic":
                found.append(RotarySwitch(config.max_position_embeddings, again=True, restarts=False))
        return min(found, key=lambda switch: switch.length, default=None)

    @property
    def attention_implementation(self) -> str:
        return str(self.model.config._attn_implementation)

    def layer_types(self) -> list[str]:
        """Return `recurrent` or `attention` for each layer."""
        return ["recurrent" if view.is_recurrent else "attention" for view in self.layers]

    @torch.no_grad()
    def verify(self) -> None:
        """Check `project_kv` of each kind of layer, and `logits_of`, against the model's own forward on six tokens."""
        own = [view for view in self.layers if not view.is_recurrent and view.kv_source is None]
        kinds = {self._kind(view): view for view in reversed(own)}
        checked = list(kinds.values())
        token_ids = torch.arange(6, device=self.device)[None] % self.model.config.vocab_size
        with recorded_inputs(checked) as records, self.layer_outputs() as outputs, _evaluating(self.model):
            logits = self.model(input_ids=token_ids, use_cache=False).logits
            self._refuse_difference("computes logits", "", self.logits_of(outputs[self.num_layers - 1]), logits)
        for view in checked:
            self._check_projection(view, *records[view.layer_idx])

    def _kind(self, view: LayerView) -> tuple[Any, ...]:
        """Return what decides how a layer projects its K/V."""
        return type(view.mixer), self._layer_type(view), bool(getattr(view.mixer, "use_rope", True))

    def _check_projection(self, view: LayerView, hidden: Tensor, arguments: dict[str, Any]) -> None:
        projected = view.project_kv(view.normalise(hidden), view.positions_of(arguments))
        capture = KVCapture(stop=False)
        with _evaluating(self.model):
            view.module.forward(hidden, **{**arguments, view.family.cache_argument: capture})
        for ours, own in zip(projected, capture.kv, strict=True):
            self._refuse_difference("projects K/V", f"layer {view.layer_idx} of ", ours, own)

    def _refuse_difference(self, what: str, where: str, ours: Tensor, own: Tensor) -> None:
        error = float("inf")
        if ours.shape == own.shape:
            error = float((ours - own).norm() / own.norm().clamp_min(1e-9))
        if not error <= (1e-4 if own.dtype == torch.float32 else 3e-2):
            raise UserError(
                f"{where}this {self.family_name} model {what} differently from anydepth (relative error {error:.1e}); "
                "please report it with your transformers version"
            )


@contextmanager
def recorded_inputs(views: list[LayerView]) -> Iterator[dict[int, tuple[Tensor, dict[str, Any]]]]:
    """Yield a mapping of layer index to the states and other arguments that the layer gets in the last forward."""
    records: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def keep(view: LayerView, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        records[view.layer_idx] = (args[0], {**dict(zip(view.argument_names, args[1:], strict=False)), **kwargs})

    with Hooks() as hooks:
        for view in views:
            hooks.before(view.module, partial(keep, view), with_kwargs=True)
        yield records


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore the mode of each submodule afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
