"""Quantised checkpoints: what their config says, and how they are read.

bitsandbytes' 4 bits stay as they are. FP8 and compressed-tensors are dequantised while transformers reads them, GPTQ
and AWQ in `packed.py`. Other kinds are refused before anything is read.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from anydepth.errors import UserError
from anydepth.models.families import family_of
from anydepth.models.packed import PACKED, check_packed

LARGE = 2**30
"""Bytes of weights that take more than two seconds to read."""
log = logging.getLogger("anydepth.models")

DEQUANTISED = {"fp8": None, "compressed-tensors": "compressed_tensors", **dict.fromkeys(PACKED)}
"""Kinds that are dequantised on loading, and the package that each needs."""
BY_PIP = {"bitsandbytes": "pip install 'anydepth[quant]'", "compressed_tensors": "pip install compressed-tensors"}


def four_bits() -> BitsAndBytesConfig:
    """Return how `nf4` packs linear layers, on loading."""
    need("bitsandbytes", "quantisation nf4")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def need(package: str, what: str) -> None:
    """Raise `UserError` if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}; install it with: {BY_PIP[package]}")


def check_config(name: str, config: Any) -> dict[str, Any] | None:
    """Raise `UserError` for an unsupported model before its weights are read.

    Returns:
        The quantisation of a model that is to be dequantised, else None. `config` then lets transformers do it, or no
        longer has it.
    """
    family_of(config.model_type)
    if config.num_hidden_layers < 1:
        raise UserError(f"the config of '{name}' has {config.num_hidden_layers} layers; it must have at least 1")
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is None:
        return None
    quantised = dict(quantised if isinstance(quantised, dict) else quantised.to_dict())
    method = quantised.get("quant_method")
    if method == "bitsandbytes" and quantised.get("load_in_4bit"):
        need("bitsandbytes", f"'{name}', which is quantised by bitsandbytes,")
        return None
    if method not in DEQUANTISED:
        method = "bitsandbytes in 8 bits" if method == "bitsandbytes" else method
        raise UserError(
            f"'{name}' is quantised by {method}, which anydepth does not read; give the original model "
            "(--weights int8 or int4 quantises it for the fast engine), or a .gguf file"
        )
    if DEQUANTISED[method] is not None:
        need(DEQUANTISED[method], f"'{name}', which is quantised by {method},")
    if method in PACKED:
        check_packed(name, quantised)
        del config.quantization_config
    else:
        config.quantization_config = {**quantised, "dequantize": True}
    log.warning("'%s' is quantised by %s: its weights are dequantised, which takes more memory …", name, method)
    return quantised


def check_memory(name: str, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `UserError` for a model with more weights than the memory of a device, before they are read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_size(name, sum(parameter.numel() for parameter in model.parameters()), dtype, device)


def check_size(name: str, num_weights: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `UserError` for more weights than the memory of a device; say so where reading them takes a while."""
    wanted, kind = num_weights * dtype.itemsize, str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available + psutil.swap_memory().free
    if wanted > free:
        raise UserError(
            f"the weights of '{name}' take {wanted / 2**30:.1f} GiB in {kind}, and "
            f"{free / 2**30:.1f} GiB are free on {device}; give --device auto (parts of it stay on the disk, engine "
            "hf), or a quantised .gguf file"
        )
    if wanted > LARGE:
        log.warning("reading '%s', %.1f GiB in %s …", name, wanted / 2**30, kind)
