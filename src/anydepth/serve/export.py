"""Export of plain Hugging Face checkpoints, for engines without anydepth.

`static`: the layers that a skip set keeps. `draft`: the first layers, as a draft model for the whole one. `merged`: a
LoRA adapter folded into the weights. Each checkpoint is loaded again and compared before it is moved into place.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from anydepth.errors import RunError, UserError
from anydepth.gating.plan import Plan
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.models.backbone import Backbone, is_spread
from anydepth.models.load import is_quantised
from anydepth.models.plain import plain_state

KINDS = ("static", "draft", "merged")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
NUM_COMPARED = 48


def check(kind: str, out: Path) -> None:
    """Raise `UserError` for an unknown kind or an output folder that cannot be written, before a model is loaded."""
    if kind not in KINDS:
        raise UserError(f"export kind '{kind}' is unknown; kinds are {', '.join(KINDS)}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out must be a folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out, or remove it first")


@torch.no_grad()
def export(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    out: Path,
    *,
    exit_layer: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the checkpoint into a new folder; return the fields of `anydepth.export/1`.

    Raise `UserError` if there is nothing of that kind to export, `RunError` if the checkpoint's logits differ.

    Args:
        adapted: its adapters are folded into the weights.
        exit_layer: number of first layers to keep; `static` also leaves out those of the skip set.
    """
    check(kind, out)
    if is_quantised(adapted.model):
        raise UserError("the base model is quantised to 4 bits, which is not a plain checkpoint; load it without nf4")
    if is_spread(adapted.model):
        raise UserError("device auto leaves weights on the disk, of which no checkpoint is made; load on one device")
    backbone = adapted.eval().backbone
    if exit_layer is not None and not 1 <= exit_layer <= backbone.num_layers:
        raise UserError(f"--exit-layer is a number from 1 to {backbone.num_layers}; got {exit_layer}")
    kept = {"static": _static, "draft": _draft, "merged": _merged}[kind](adapted, exit_layer)
    model = with_layers(backbone, kept)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (2, NUM_COMPARED), generator=generator).to(adapted.device)
    wanted = _logits_of(adapted, kept, ids)
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        again = AutoModelForCausalLM.from_pretrained(str(staging), dtype=adapted.dtype).to(adapted.device).eval()
        difference = ((again(ids).logits - wanted).float().norm() / wanted.float().norm()).item()
        if not difference <= TOLERANCE[adapted.dtype]:
            raise RunError(f"the checkpoint's logits differ by {difference:.1e} (relative); please report this model")
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "kind": kind,
        "folder": str(out),
        "layers": kept,
        "num_layers": backbone.num_layers,
        "num_parameters": sum(part.numel() for part in again.parameters()),
        "difference": difference,
    }


def _static(adapted: AdaptedModel, exit_layer: int | None) -> list[int]:
    others = [name for name in adapted.methods if name != SkipSet.name]
    if others:
        raise UserError(f"{others[0]} is not a fixed set of layers, as a plain checkpoint needs; export a skip_set")
    closed = Plan.of(adapted.attached).closed
    if closed["mixer"] or closed["ffn"]:
        raise UserError("a plain checkpoint has whole layers; search without --branches for a set of whole layers")
    last = exit_layer or adapted.backbone.num_layers
    kept = [layer_idx for layer_idx in range(last) if layer_idx not in closed["layer"]]
    if len(kept) == adapted.backbone.num_layers:
        raise UserError("no layer is left out; give a folder that search wrote, or --exit-layer")
    if not kept:
        raise UserError("all layers are left out; keep at least one")
    return kept


def _draft(adapted: AdaptedModel, exit_layer: int | None) -> list[int]:
    if exit_layer is None:
        raise UserError(
            "draft writes the first layers as a separate model: give --exit-layer, or a target that drafts with "
            "exit_layers (a trained drafter reads states of the whole model, and cannot run without it)"
        )
    return list(range(exit_layer))


def _merged(adapted: AdaptedModel, exit_layer: int | None) -> list[int]:
    if exit_layer is not None:
        raise UserError("merged is the whole model; leave --exit-layer out")
    deciding = [method.name for method in adapted.attached if not method.is_lossless()]
    if deciding:
        raise UserError(
            f"{deciding[0]} skips work, but a plain checkpoint runs every layer and would be another model; merge a "
            "target without it"
        )
    return list(range(adapted.backbone.num_layers))


def with_layers(backbone: Backbone, kept: Sequence[int]) -> PreTrainedModel:
    """Return a model of the same family with the kept layers, in order; weights are copied, adapters folded in.

    Raise `UserError` for a family with layers that depend on their index, or an adapter that cannot be folded in.
    """
    source, before = backbone.model, f"{backbone.family.decoder}.{backbone.family.layers}."
    config = shortened(source.config, kept)
    numbers = {str(layer_idx): str(number) for number, layer_idx in enumerate(kept)}
    weights = {}
    for name, tensor in plain_state(source).items():
        if name.startswith(before):
            layer, _, rest = name.removeprefix(before).partition(".")
            if layer not in numbers:
                continue
            name = f"{before}{numbers[layer]}.{rest}"
        weights[name] = tensor
    tied = source.all_tied_weights_keys.items()
    if any(not torch.equal(weights[one], weights[other]) for one, other in tied if {one, other} <= weights.keys()):
        config.tie_word_embeddings = False  # an adapter changed one of them
    model = AutoModelForCausalLM.from_config(config, dtype=source.dtype, attn_implementation="eager").to(
        backbone.device
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{backbone.family_name} decides by a layer's index what it has, which a shorter model would change; keep "
            "the skip set as a method"
        ) from error
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists with one entry per layer in the configs of `FAMILIES`."""


def shortened(config: Any, kept: Sequence[int]) -> Any:
    """Return a model's configuration for the kept layers, lists per layer included.

    Raise `UserError` if the model depends on a layer's index in a way that no configuration describes.
    """
    config, num_layers = copy.deepcopy(config), config.num_hidden_layers
    if len(kept) == num_layers:
        return config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError("this model's attention depends on the layer's index, which a shorter model would change")
    if hasattr(config, "num_kv_shared_layers"):  # Gemma 4
        raise UserError("layers of this model have widths or K/V by their index, which a shorter model would change")
    if getattr(config, "attn_layer_indices", None) is not None:  # Bamba, which derives the types of layers
        attends = config.attn_layer_indices
        config.attn_layer_indices = [number for number, layer_idx in enumerate(kept) if layer_idx in attends]
    else:
        for name in PER_LAYER:
            if getattr(config, name, None) is not None:
                setattr(config, name, [getattr(config, name)[layer_idx] for layer_idx in kept])
    if getattr(config, "first_k_dense_replace", None) is not None:
        config.first_k_dense_replace = sum(layer_idx < config.first_k_dense_replace for layer_idx in kept)
    if hasattr(config, "decoder_sparse_step"):  # every n-th layer has experts: list the others instead
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        is_dense = [layer_idx in dense or (layer_idx + 1) % step != 0 for layer_idx in kept]
        config.mlp_only_layers = [number for number, is_plain in enumerate(is_dense) if is_plain]
        config.decoder_sparse_step = 1
    types = getattr(config, "layer_types", None) or ()
    if "linear_attention" in types and set(types) == {"linear_attention"}:
        raise UserError(
            "only recurrent layers would be left, and transformers does not know the length of such a model's cache; "
            "keep a layer with softmax attention"
        )
    config.num_hidden_layers = len(kept)
    return config


def _logits_of(adapted: AdaptedModel, kept: Sequence[int], ids: Tensor) -> Tensor:
    """Run the kept layers by anydepth's own execution; return (B, T, V) logits."""
    skipped = [layer_idx for layer_idx in range(adapted.backbone.num_layers) if layer_idx not in kept]
    with adapted.deciding(SkipSet(SkipSetConfig(skip_layers=skipped), adapted.backbone)):
        return adapted(input_ids=ids, use_cache=False).logits
