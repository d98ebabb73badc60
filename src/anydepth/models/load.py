"""Load a base model from `embedded`, a hub name, a folder or a .gguf file (checkpoints: `training/checkpoint.py`).

The GGUF of `embedded` is converted once and cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from anydepth.errors import UserError
from anydepth.models.adapters import adapter_base, add_adapters
from anydepth.models.backbone import is_spread, unwrap
from anydepth.models.blocks import BlockLinear, BlockModule
from anydepth.models.formats import check_config, check_memory, four_bits
from anydepth.models.gguf import QUANTISED_DTYPE, from_gguf, is_in_blocks
from anydepth.models.packed import PACKED, dense_state
from anydepth.models.plain import base_modules
from anydepth.models.reading import check_whole, quiet, reading
from anydepth.models.target import (
    ALLOWED,
    CONFIG,
    EMBEDDED,
    PACKAGE,
    Target,
    cache_folder,
    embedded_gguf,
    find_target,
    gguf_of,
)
from anydepth.models.tokens import end_ids, fit_to_model

log = logging.getLogger("anydepth.models")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
"""The stored type of a checkpoint; bfloat16 for quantised GGUF files, such as the embedded model."""
SPREAD = "auto"
"""The device of a model that accelerate spreads over GPUs, memory and disk."""
DType = str | torch.dtype
NATIVE = "native"
"""Name of the weights of a .gguf file in its own blocks."""
ATTENTIONS = ("sdpa", "eager")


def load_model(
    target: str,
    *,
    dtype: DType = AUTO,
    device: str = "cpu",
    quantisation: str | None = None,
    attention: str | None = None,
    native: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in evaluation mode and its tokenizer (padding on the left, for generation).

    Args:
        target: `embedded`, a hub name (also `name@revision`), a folder, or a .gguf file (any part of several). A PEFT
            adapter, as a folder or a hub name, gives a `PeftModel` with its base model.
        dtype: float32, bfloat16 or float16, as a name or a torch type; `auto` is the stored type.
        device: cpu, cuda, cuda:1, …; `auto` spreads a model that does not fit over GPUs, memory and disk (accelerate),
            for the Hugging Face engine.
        quantisation: `nf4` packs linear layers in 4 bits (bitsandbytes), computed in `dtype`; None packs none.
        attention: `sdpa` or `eager`; None is transformers' choice.
        native: keep the blocks of a .gguf file (`embedded` is one), for the fast engine.

    Raises:
        UserError: no such target, damaged files, an unsupported family, or an unknown dtype, device, quantisation or
            attention.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in (AUTO, *DTYPES):
        raise UserError(f"dtype '{name}' is unknown; dtypes are {', '.join((AUTO, *DTYPES))}")
    torch_device = _device(device)
    options = _options(quantisation, attention, None if device == SPREAD else torch_device)
    found = find_target(target)
    base = target if found.adapter is None else adapter_base(found.adapter)
    with quiet():
        if native:
            model, tokenizer = _load_blocks(found, name, torch_device, options)
        else:
            origin = found if found.adapter is None else find_target(base)
            model, tokenizer = _load(origin, DTYPES.get(name), options, torch_device)
    if found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file():
        with reading(f"the tokenizer in {found.adapter}"):
            tokenizer = AutoTokenizer.from_pretrained(str(found.adapter))
    fit_to_model(tokenizer, int(model.get_input_embeddings().num_embeddings), base)  # type: ignore[arg-type]
    _set_end_tokens(model, tokenizer)
    model.name_or_path = base
    if is_quantised(model):
        _disable_repacking(model)
    elif not is_spread(model):
        model.to(torch_device)  # type: ignore[arg-type]
    adapted: Any = add_adapters(model, {} if found.adapter is None else {"default": found.adapter})
    return adapted.eval(), tokenizer


def _load_blocks(
    target: Target, dtype: str, device: torch.device, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a .gguf file with its blocks."""
    if target.gguf is None:
        raise UserError(f"native weights are those of a .gguf file, not of {target.name}; leave weights out")
    if dtype not in (AUTO, str(QUANTISED_DTYPE).removeprefix("torch.")):
        raise UserError(f"native weights run with bfloat16 activations, not {dtype}; leave dtype out")
    if device.type != "cpu" or options:
        raise UserError("native weights are for the fast engine on the CPU; leave out device, quantisation, attention")
    return from_gguf(target.gguf, cache_folder(), None, in_blocks=True)


def has_blocks(target: str, dtype: DType = AUTO, device: str = "cpu") -> bool:
    """Return whether a target is a .gguf file of the fast engine, in blocks, to be run as they are."""
    name = str(dtype).removeprefix("torch.")
    if name not in (AUTO, str(QUANTISED_DTYPE).removeprefix("torch.")) or device.split(":")[0] != "cpu":
        return False
    with suppress(UserError):  # a damaged file, or a full disk: the load says so
        path = gguf_of(target)
        return path is not None and is_in_blocks(path, cache_folder())
    return False


def _options(quantisation: str | None, attention: str | None, device: torch.device | None) -> dict[str, Any]:
    """Return the options of `from_pretrained`; `device` None spreads the model."""
    if attention not in (None, *ATTENTIONS):
        raise UserError(
            f"attention '{attention}' is not supported; give one of {', '.join(ATTENTIONS)} (others take no mask of "
            "single tokens)"
        )
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if device is None:
        options |= {"device_map": "auto", "offload_folder": str(cache_folder() / "offload")}
    if quantisation is None:
        return options
    if quantisation != "nf4" or device is None:
        raise UserError(f"quantisation '{quantisation}' is unknown, or not for device auto; give nf4, or leave it out")
    return options | {"quantization_config": four_bits(), "device_map": {"": device}}


def _disable_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from repacking weights at their first evaluation, for a kernel without backward."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dtype_name(model: Any) -> str:
    """Return the name of a model's float type, such as `bfloat16`."""
    return str(model.dtype).removeprefix("torch.")


def _set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end at the tokenizer's EOS too, on every engine."""
    ends, config = sorted(end_ids(model, tokenizer)), model.generation_config
    if config is not None and ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


def is_quantised(model: nn.Module) -> bool:
    """Return whether a model's linear layers are packed in 4 bits."""
    return bool(getattr(unwrap(model), "is_loaded_in_4bit", False))


def _device(device: str) -> torch.device:
    if device == SPREAD:
        return torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device '{device}' is not known; give cpu, cuda, cuda:1, mps, xpu or {SPREAD}") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' is not available ({str(error).splitlines()[0]}); try cpu") from error
    return found


def _load(
    target: Target, dtype: torch.dtype | None, options: dict[str, Any], device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target that is not an adapter; `dtype` None is the stored type."""
    if target.adapter is not None:
        raise UserError(f"{target.name} is a PEFT adapter, and so is what has it as its base; merge it first")
    if target.is_embedded:
        return _from_pretrained(Target(str(_embedded_folder())), dtype or QUANTISED_DTYPE, options, device)
    if target.gguf is not None:
        if options.keys() - {"attn_implementation"}:
            raise UserError(
                f"{target.name} is a GGUF, which is read as dense weights onto one device; leave out quantisation and "
                "device auto, or give a folder or a hub model"
            )
        return from_gguf(target.gguf, cache_folder(), dtype)
    return _from_pretrained(target, dtype, options, device)


def _from_pretrained(
    target: Target, dtype: torch.dtype | None, options: dict[str, Any], device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a folder or a hub model; `dtype` None is the stored type."""
    name = target.name
    try:
        with reading(f"'{name}'") if Path(name).exists() else contextlib.nullcontext():
            _say_fetching(target)
            config = AutoConfig.from_pretrained(name, revision=target.revision)
            model = _read_model(target, config, dtype, options, device)
            return model, AutoTokenizer.from_pretrained(name, revision=target.revision)
    except (OSError, ValueError) as error:
        named = name if target.revision is None else f"{name}@{target.revision}"
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise UserError(
                f"there is no folder '{named}', and no such model in the hub cache (HF_HUB_OFFLINE=1 fetches none); "
                "give a folder, or try 'embedded'"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"'{named}' could not be loaded ({reason}); {ALLOWED}") from error


def _say_fetching(target: Target) -> None:
    """Say that a model is fetched from the hub, which takes minutes, if it is not in the local cache."""
    if Path(target.name).exists() or constants.HF_HUB_OFFLINE:
        return
    if try_to_load_from_cache(target.name, CONFIG, revision=target.revision) is None:
        log.warning("fetching '%s' from the hub …", target.name)


def _read_model(
    target: Target, config: Any, dtype: torch.dtype | None, options: dict[str, Any], device: torch.device
) -> PreTrainedModel:
    """Read a model's weights, dequantised if they are stored in a form that nothing here runs."""
    name, reader, source = target.name, cast(Any, AutoModelForCausalLM), cast(Any, target.name)
    dequantised = check_config(name, config)
    four_bit = options.get("quantization_config")
    known = dtype or config.dtype or QUANTISED_DTYPE
    if four_bit is not None:
        four_bit.bnb_4bit_compute_dtype = known
    elif "device_map" not in options:
        check_memory(name, config, known, device)
    # Pickles are not read, because reading one can run any code in it.
    options = {"use_safetensors": True, "output_loading_info": True, "revision": target.revision, **options}
    if dequantised is not None:
        if "device_map" in options:
            raise UserError(
                f"'{name}' is quantised by {dequantised['quant_method']} and dequantised onto one device; leave out "
                "quantisation and device auto"
            )
        dtype = known
        if dequantised["quant_method"] in PACKED:
            options["state_dict"] = dense_state(name, target.revision, dequantised, known)
            reader, source = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]), None
    loaded: Any = reader.from_pretrained(source, config=config, dtype=dtype or AUTO, **options)
    model, report = loaded
    check_whole(name, report, _head_of(model), config.architectures)
    if dequantised is not None:
        model.to(known)  # the other weights too, which come in the type that they are stored in
        model._weight_conversions = None  # otherwise `save_pretrained` quantises again
    return model


def _head_of(model: PreTrainedModel) -> str | None:
    """Return the name of the weight of a model's head."""
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def _embedded_folder() -> Path:
    """Return the folder of the embedded model, converted if it does not exist."""
    source = embedded_gguf()
    folder = cache_folder() / f"embedded-{importlib.metadata.version(PACKAGE)}"
    if not (folder / "config.json").exists():
        log.warning("converting the embedded model, once …")
        try:
            save_whole(*from_gguf(source, cache_folder(), torch.float32), folder)
        except OSError as error:
            raise UserError(
                f"the embedded model could not be cached in {folder} ({error.strerror}); free space there, or set "
                "ANYDEPTH_CACHE"
            ) from error
    return folder


def source_of(target: str) -> Target:
    """Return what a target names; for `embedded` its folder, converted if it does not exist."""
    return Target(str(_embedded_folder())) if target == EMBEDDED else find_target(target)


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model and its tokenizer atomically, also if two processes do so at the same time."""
    staging = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        model.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        staging.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def base_fingerprint(model: nn.Module, *, light: bool = False, biases: bool = True) -> str:
    """Return a hash of a base model's shape and of a sample of its weights, the same in every float type and with PEFT.

    Args:
        light: count only the embedding and the norms, which quantisation does not change.
        biases: count biases too, which an adapter with PEFT's `bias` option changes in place.
    """
    causal_lm, seen = unwrap(model), set[int]()
    digest = hashlib.sha256(causal_lm.config.model_type.encode())
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for module_name, module in base_modules(causal_lm):
        is_linear = isinstance(module, nn.Linear | Conv1D)
        for name, parameter in module.named_parameters(module_name, recurse=False):
            counts = (biases or not name.endswith("bias")) and not (light and is_linear and name.endswith("weight"))
            if id(parameter) not in seen and counts:
                found[name] = module, tuple(parameter.shape)
            seen.add(id(parameter))
        if isinstance(module, BlockModule) and id(module.data) not in seen:
            seen.add(id(module.data))
            if not (light and isinstance(module, BlockLinear)):
                found[f"{module_name}.weight"] = module, module.blocks.shape
    for name, (module, shape) in sorted(found.items(), key=lambda item: item[0]):
        size = math.prod(shape)
        positions = torch.arange(0, size, max(size // 16, 1))[:16]
        values = _sample(module, name.rpartition(".")[2], positions).to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{shape}".encode() + values.tobytes())
    return digest.hexdigest()


def _sample(module: nn.Module, name: str, positions: Tensor) -> Tensor:
    """Return the weights at some positions of a flattened parameter, wherever accelerate keeps it."""
    if isinstance(module, BlockModule) and name == "weight":
        return module.blocks.sample(positions)
    with align_module_device(module):
        return module.get_parameter(name).detach().flatten()[positions]
