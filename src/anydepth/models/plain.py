"""Modules without PEFT's wrappers: those that compute the same, and those of the base model.

Only this module knows these wrappers (LoRA and the other tuner layers, `modules_to_save`, `trainable_token_indices`).
Code that reads a weight of a model calls this module, because `.weight` of a wrapper is the base model's weight.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anydepth.errors import UserError
from anydepth.models.blocks import BlockModule

if TYPE_CHECKING:
    from peft import PeftModel

TUNER, AUXILIARY = "BaseTunerLayer", "AuxiliaryTrainingWrapper"


def is_peft(module: nn.Module, kind: str = "PeftModel") -> bool:
    """Return whether a module is of a class of PEFT, by its name: importing PEFT takes longer than PyTorch."""
    return any(cls.__name__ == kind and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def base_module(module: nn.Module) -> nn.Module:
    """Return the module of the base model inside PEFT's wrappers; without a wrapper, the module itself."""
    while is_peft(module, AUXILIARY) or is_peft(module, TUNER):
        inner: Any = module
        module = inner.original_module if is_peft(module, AUXILIARY) else inner.get_base_layer()
    return module


def base_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base model under the names that they have without PEFT."""
    base = base_module(module)
    yield name, base
    for child_name, child in base.named_children():
        yield from base_modules(child, f"{name}.{child_name}" if name else child_name)


def chosen_module(module: nn.Module) -> nn.Module:
    """Return the module that runs in place of `module`, inside wrappers that only select a module.

    Adapters that are off or merged select the base module, `modules_to_save` selects its copy. Adapters that add to
    their base module, such as LoRA, are returned unchanged.
    """
    inner: Any = module
    if is_peft(module, "TrainableTokensWrapper"):
        return chosen_module(inner.token_adapter)
    if is_peft(module, "ModulesToSaveWrapper"):
        active = inner.active_adapters
        is_off = inner.disable_adapters or not active or any(name not in inner.modules_to_save for name in active)
        return chosen_module(inner.original_module if is_off else inner.modules_to_save[active[0]])
    # An adapter that is off and merged is unmerged by `plain_module`.
    if is_peft(module, TUNER) and inner.disable_adapters != inner.merged:
        return chosen_module(inner.base_layer)
    return module


def running_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that run inside `module`, itself first, without inactive adapters."""
    chosen = chosen_module(module)
    yield chosen
    inner: Any = chosen
    children = list(chosen.children())
    if is_peft(chosen, TUNER):
        by_adapter = [getattr(inner, name, {}) for name in inner.adapter_layer_names]
        active = [layers[name] for layers in by_adapter for name in inner.active_adapters if name in layers]
        children = [inner.base_layer, *(layer for layer in active if isinstance(layer, nn.Module))]
    for child in children:
        yield from running_modules(child)


@torch.no_grad()
def plain_module(module: nn.Module) -> nn.Module:
    """Return a module without wrappers that computes what `module` computes in evaluation mode.

    Adapters are folded into a copy of the weight, so that a tied weight changes in one place only; `UserError` is
    raised for one that another weight cannot replace.
    """
    chosen = chosen_module(module)
    if not is_peft(chosen, TUNER):
        return chosen
    twin: Any = _without_hooks(chosen).eval()
    if twin.disable_adapters:
        twin.unmerge()
        return plain_module(twin.base_layer)
    base = base_module(chosen)
    inputs = _probe(base)
    kind = type(chosen).__name__
    refusal = f"the adapter on a {type(base).__name__} (PEFT's {kind}) cannot be folded into its weight"
    advice = "use engine hf on a target that is not merged"
    try:
        wanted = None if inputs is None else type(twin).forward(twin, inputs)
        twin.merge()
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{refusal} ({reason}); {advice}") from error
    plain = plain_module(twin.base_layer)
    if wanted is not None:
        difference = (plain(inputs) - wanted).float().norm() / wanted.float().norm().clamp_min(1e-9)
        if not difference <= (1e-4 if wanted.dtype == torch.float32 else 5e-2):
            raise UserError(f"{refusal} (relative error {difference:.1e}); {advice}")
    return plain


def plain_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of `module` without PEFT, with its adapters folded in."""
    plain, state = plain_module(module), {}
    plain._save_to_state_dict(state, prefix, False)
    if isinstance(plain, BlockModule):
        state[f"{prefix}weight"] = plain.weight
    for name, child in plain.named_children():
        state |= plain_state(child, f"{prefix}{name}.")
    return state


def check_adapters(model: nn.Module) -> None:
    """Raise `UserError` for adapters that do more than change weights, which only PEFT's forward can run."""
    wrapped: Any = model
    for config in wrapped.peft_config.values() if is_peft(model) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "alora_invocation_tokens", None):
            kind = "aLoRA"
        if config.is_prompt_learning or kind in ("ADAPTION_PROMPT", "XLORA", "aLoRA"):
            raise UserError(
                f"PEFT's {kind} changes the model's input or selects adapters by token; use an adapter that changes "
                "weights, such as LoRA"
            )


def fold_adapters(model: PeftModel) -> PreTrainedModel:
    """Fold the active adapters into the weights, in place, and return the causal LM without PEFT.

    If the head and the embedding then differ, they are untied, also in the config.
    """
    causal_lm: Any = model.get_base_model()
    _fold_children(causal_lm)
    if hasattr(causal_lm, "peft_config"):
        del causal_lm.peft_config
    if causal_lm.config.tie_word_embeddings:
        head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
        if torch.equal(head.weight, embedding.weight):
            head.weight = embedding.weight
        else:
            causal_lm.config.tie_word_embeddings = False
            causal_lm.all_tied_weights_keys = causal_lm.get_expanded_tied_weights_keys(all_submodels=True)
    return causal_lm


def _fold_children(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        plain = plain_module(child)
        if plain is not child:
            setattr(parent, name, plain)
        _fold_children(plain)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Copy a module without its hooks and gates, which refer to the whole model."""
    # Tensors are copied by value, because deepcopy refuses the views by which PEFT ties them.
    memo: dict[int, Any] = {id(part): nn.Parameter(part.data.clone(), False) for part in module.parameters()}
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name.endswith("_hooks"):
                memo[id(value)] = OrderedDict()
            elif name in ("forward", "kwargs"):  # `kwargs` has the arguments of PEFT, with tied tensors
                memo[id(value)] = None
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        part.__dict__.pop("forward", None)
    return twin


def _probe(base: nn.Module) -> Tensor | None:
    """Return a few inputs of a module to compare outputs on; None where their shape is not known."""
    weight: Any = getattr(base, "weight", None)
    if isinstance(base, nn.Embedding):
        return torch.arange(min(8, len(weight)), device=weight.device)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() < 3:
        width = weight.shape[0 if isinstance(base, Conv1D) else -1]
        generator = torch.Generator().manual_seed(0)
        return torch.randn(4, width, generator=generator).to(weight)
    return None
