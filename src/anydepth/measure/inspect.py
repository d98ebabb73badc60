"""The layers of a model and their cost, and the engines and methods that apply to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from anydepth.config import StrictConfig
from anydepth.draft_sections import DRAFT, DraftConfig
from anydepth.engine.weights import CONTROLS, WEIGHTS, WeightFormat
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods import METHODS
from anydepth.methods._base.method import Method
from anydepth.methods._base.training import Trained
from anydepth.methods.ffn_router import FFNRouter
from anydepth.methods.mixer_router import MixerRouter
from anydepth.models.backbone import Backbone
from anydepth.models.blocks import BlockLinear, block_modules
from anydepth.models.delta_rule import build_delta_rule, matched_shape
from anydepth.models.layer_view import LayerView
from anydepth.models.llama_like import read_layers, weights_of
from anydepth.models.load import dtype_name

APPLIES = "applies"


def inspect_model(adapted: AdaptedModel) -> dict[str, Any]:
    """Return the fields of `anydepth.inspect/1`: family, branches, their cost, engines and methods."""
    backbone = adapted.backbone
    fast = _fast_engine(backbone)
    others = {
        name: mixer
        for router in adapted.methods.values()
        if isinstance(router, MixerRouter)
        for name, mixer in router.mixers.items()
    }
    return {
        "family": backbone.family_name,
        "num_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "num_parameters": cost.num_weights(backbone.model),
        "dtype": dtype_name(backbone.model),
        "weight_bytes": cost.weight_bytes(backbone.model),
        "dense_bytes": cost.num_weights(backbone.model) * backbone.model.dtype.itemsize,
        "in_blocks": next(block_modules(backbone.model), None) is not None,
        "attention_implementation": backbone.attention_implementation,
        "layers": [_layer(view, others.get(str(view.layer_idx))) for view in backbone.layers],
        "attached": list(adapted.methods),
        "engines": {"hf": APPLIES, "fast": fast},
        "copy_bytes": {name: _copy_bytes(backbone, WEIGHTS[name]) for name in CONTROLS if fast == APPLIES},
        "methods": {name: _method(method, backbone) for name, method in METHODS.items()},
        "notes": _remarks(backbone.layers),
    }


def _fast_engine(backbone: Backbone) -> str:
    try:
        read_layers(backbone)
        weights_of(backbone.head)
    except UserError as error:
        return f"does not apply: {error}"
    return APPLIES


def _method(method: type[Method], backbone: Backbone) -> str:
    if not issubclass(method, FFNRouter | MixerRouter):
        return APPLIES
    try:
        backbone.check_branches(method.name)
    except UserError as error:
        return f"does not apply: {error}"
    return APPLIES


def _copy_bytes(backbone: Backbone, kind: type[WeightFormat]) -> int:
    """Return the bytes of a copy in fewer bits, as the fast engine runs it or drafts with it; of all experts."""
    parts = [part for view in backbone.layers for part in view.module.modules()]
    weights = sum(part.in_features * part.out_features for part in parts if isinstance(part, nn.Linear | BlockLinear))
    stacked = (part for view in backbone.layers for part in view.module.parameters() if part.dim() == 3)
    weights += sum(part.numel() for part in stacked)
    head = backbone.model.config.vocab_size * backbone.hidden_size
    return round((kind.bits * weights + WEIGHTS[kind.head or kind.name].bits * head) / 8)


def _layer(view: LayerView, other: nn.Module | None) -> dict[str, Any]:
    if other is None and not view.is_recurrent:  # one with as many parameters
        other = build_delta_rule(view.hidden_size, matched_shape(view), torch.Generator())
    per_token = cost.layer_cost(view)
    mixer, whole = cost.num_weights(view.mixer), cost.num_weights(view.module)
    return {
        "layer_idx": view.layer_idx,
        "mixer": "recurrent" if view.is_recurrent else "attention",
        "mixer_parameters": mixer,
        "other_parameters": whole - mixer,
        "mixer_flops": per_token.mixer,
        "skipped_mixer_flops": per_token.skipped_mixer,
        "ffn_flops": per_token.ffn,
        # Over all tokens of a text, of which a token sees half on average.
        "break_even_length": None if view.is_recurrent or other is None else 2 * cost.break_even(view, other),
    }


def _remarks(views: list[LayerView]) -> list[str]:
    remarks = []
    if any(view.projects_queries for view in views):
        remarks.append("q, k and v are one matrix: under kv_rule=project a skipping token pays for all three")
    if any(view.shares_kv for view in views):
        remarks.append("layers attend to K/V of earlier layers, so kv_rule=omit does not apply")
    if any(view.is_recurrent for view in views):
        remarks.append("recurrent mixers see every token under kv_rule=project; only their FFN is saved there")
    return remarks


def list_methods() -> list[dict[str, Any]]:
    """Return every method and drafting, each with its options, for `anydepth.methods/1`."""
    listed = [
        {
            "name": name,
            "summary": method.summary,
            "lossless": method.is_lossless(),
            "trained": issubclass(method, Trained),
            "options": _options(method.Config),
        }
        for name, method in METHODS.items()
    ]
    summary = "drafts tokens with a part of the model, verifies them with all of it (a section of its own)"
    drafting = {"name": DRAFT, "summary": summary, "lossless": True, "trained": True, "options": _options(DraftConfig)}
    return [*listed, drafting]


def _options(config: type[StrictConfig]) -> dict[str, Any]:
    return {
        key: {
            "help": field.description,
            "required": field.is_required(),
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
        }
        for key, field in config.model_fields.items()
    }
