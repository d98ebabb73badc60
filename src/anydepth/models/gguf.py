"""Read a model and its tokenizer from a GGUF file: dequantised, or with its weights in blocks as they are stored."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from anydepth.errors import UserError
from anydepth.models.blocks import BlockEmbedding, BlockLinear, Blocks
from anydepth.models.formats import check_size
from anydepth.models.gguf_tokenizer import SLOW_MERGES, num_merges, read_tokenizer
from anydepth.models.llama_like import FAMILIES, MIXTURES
from anydepth.models.parts import DENSE, parts_of, read_parts, weights_by_kind
from anydepth.models.reading import check_whole, reading

log = logging.getLogger("anydepth.models")
QUANTISED_DTYPE = torch.bfloat16
"""The type of a model that is stored with quantised weights."""
BLOCK_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types of blocks that the fast engine reads as they are; tensors of others are dequantised."""
TENSORS = "tensors.json"
"""In the cached metadata of a file: type, shape and position of every tensor."""
LAYOUT = 2
"""Number of the form of that metadata; another number converts files again."""


def from_gguf(
    path: Path, cache: Path, dtype: torch.dtype | None, *, in_blocks: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a model and its tokenizer from a GGUF file, or the first of its parts.

    Args:
        cache: folder for the metadata of files, which take seconds to convert; stored at the first call.
        dtype: type of the dequantised weights; None: that of the file's largest tensor, or bfloat16 if it is quantised.
        in_blocks: keep the blocks of linear layers and the embedding, mapped from the file.

    Raises:
        UserError: no such file, a damaged one, or a family without GGUF names.
    """
    parts = parts_of(path)
    with reading(f"GGUF file {path}"):
        folder = _metadata(path, cache)
        table = json.loads((folder / TENSORS).read_text())
        config, dtype = AutoConfig.from_pretrained(str(folder)), dtype or _own_dtype(table["tensors"])
        _say_dequantised(path, table["tensors"], dtype)
        if not in_blocks:
            num_weights = sum(weights_by_kind(table["tensors"]).values())
            check_size(path.name, num_weights, dtype, torch.device("cpu"))
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        missing = _fill(model, path, table, dtype, in_blocks=in_blocks)
        if missing and in_blocks:
            raise UserError(f"GGUF file {path} lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}")
        if missing and len(parts) > 1:
            raise UserError(
                f"{path} has tensors that are read from one file only ({missing[0]}); join its {len(parts)} parts "
                "with: llama-gguf-split --merge FIRST_PART OUT.gguf"
            )
        if missing:
            model = _by_transformers(path, dtype)
        return model, AutoTokenizer.from_pretrained(str(folder))


def _by_transformers(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Read a model with tensors that a file joins or splits, which is slower."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        # Without `dequantize` the dense model is flagged as quantised and can be neither saved nor trained.
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        output_loading_info=True,
    )
    model, report = loaded
    check_whole(str(path), report)
    return model


def _own_dtype(tensors: list[dict[str, Any]]) -> torch.dtype:
    """Return the type of a file's largest tensor, or bfloat16 if that is quantised."""
    dense = {"F32": torch.float32, "F16": torch.float16}
    return dense.get(_largest(tensors)["kind"], QUANTISED_DTYPE)


def _largest(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    return max(tensors, key=lambda tensor: math.prod(tensor["shape"]))


def _say_dequantised(path: Path, tensors: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Say which quantised weights run dense because the fast engine has no kernels for their type."""
    kinds = weights_by_kind(tensors)
    others = {kind: count for kind, count in kinds.items() if kind not in (*BLOCK_KINDS, *DENSE)}
    if others:
        size = sum(others.values()) * dtype.itemsize / 2**20
        log.warning(
            "%s: the fast engine has no kernels for %s, %.0f%% of its weights: dequantised to %s, %.0f MiB …",
            *(path.name, ", ".join(sorted(others)), 100 * sum(others.values()) / sum(kinds.values())),
            *(str(dtype).removeprefix("torch."), size),
        )


def is_in_blocks(path: Path, cache: Path) -> bool:
    """Return whether most weights of a file are in blocks that the fast engine reads, of a family that it runs.

    Experts are dequantised, as the engine has them in stacked tensors.
    """
    with reading(f"GGUF file {path}"):
        folder = _metadata(path, cache)
        kinds = weights_by_kind(json.loads((folder / TENSORS).read_text())["tensors"])
        in_blocks = sum(kinds[kind] for kind in BLOCK_KINDS) > sum(kinds.values()) / 2
        return in_blocks and AutoConfig.from_pretrained(str(folder)).model_type in {*FAMILIES} - {*MIXTURES}


def _metadata(path: Path, cache: Path) -> Path:
    """Return the folder of a file's config, tokenizer and table of tensors, converted if it does not exist."""
    states = [part.stat() for part in parts_of(path)]
    made_of = f"{path.resolve()} {[(state.st_size, state.st_mtime_ns) for state in states]} "
    made_of += f"{version('anydepth')} {version('transformers')} {LAYOUT}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    folder = cache / "gguf" / f"{path.stem}-{key}"
    if (folder / TENSORS).exists():
        return folder
    reader, tensors = read_parts(path)
    merges = num_merges(reader)
    if merges > SLOW_MERGES:
        log.warning("%s: converting its tokenizer of %s merges, once …", path.name, f"{merges:,}")
    tokenizer = read_tokenizer(path, reader)
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    if len(states) > 1:  # transformers sees the tensors of the first part only
        config.tie_word_embeddings = all(tensor["name"] != "output.weight" for tensor in tensors)
    architecture = reader.fields["general.architecture"].contents()
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent))
        config.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        (staging / TENSORS).write_text(json.dumps({"architecture": architecture, "tensors": tensors}))
        if not (folder / TENSORS).exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a version that stored less
        staging.rename(folder)
    except OSError as error:
        if not (folder / TENSORS).exists():  # otherwise another process was first
            raise UserError(
                f"the config and tokenizer of {path} could not be cached in {folder} ({error.strerror}); "
                "free space there, or set ANYDEPTH_CACHE"
            ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    if merges > SLOW_MERGES:
        size = sum(file.stat().st_size for file in folder.iterdir())
        log.warning("%s: %.0f MB are kept in %s", path.name, size / 1e6, folder)
    return folder


def _fill(
    model: PreTrainedModel, path: Path, table: dict[str, Any], dtype: torch.dtype, *, in_blocks: bool
) -> list[str]:
    """Give a model the tensors of a file: blocks where they are wanted and the fast engine reads them, else dense.

    Returns:
        The names of parameters that the file lacks.
    """
    # Copy on write, since PyTorch asks for memory that could be written.
    files = {part.name: np.memmap(part, mode="c") for part in parts_of(path)}
    named = {value: key for key, value in MODEL_ARCH_NAMES.items()}[table["architecture"]]
    names = get_tensor_name_map(named, model.config.num_hidden_layers)
    processor = TENSOR_PROCESSORS.get(table["architecture"], TensorProcessor)(config=model.config.to_dict())
    by_name = {tensor["name"]: tensor for tensor in table["tensors"]}
    head, is_tied = model.get_output_embeddings(), model.config.tie_word_embeddings
    missing: list[str] = []
    found: list[tuple[str, nn.Module, str, dict[str, Any]]] = []
    for name, module in model.named_modules():
        for suffix in sorted(suffix for suffix, _ in module.named_parameters(recurse=False)):  # biases first
            tensor = by_name.get(f"{names.get_name(name)}.{suffix}")
            if tensor is None:
                missing += [] if module is head and is_tied else [f"{name}.{suffix}"]
            elif tensor["shape"] == list(module.get_parameter(suffix).shape):
                found.append((name, module, suffix, tensor))
            elif in_blocks:
                raise UserError(f"{tensor['name']} of {path} is {tensor['shape']}, and its config says otherwise")
            else:  # stored in another form, such as GPT-2's transposed weights
                missing.append(f"{name}.{suffix}")

    def read(module: nn.Module, tensor: dict[str, Any]) -> Tensor | Blocks:
        stored = files[tensor["file"]][tensor["offset"] : tensor["offset"] + tensor["bytes"]]
        kind = GGMLQuantizationType[tensor["kind"]]
        keeps = in_blocks and kind.name in BLOCK_KINDS and isinstance(module, nn.Linear | nn.Embedding)
        values = stored.reshape(tensor["stored"]) if keeps else _dense(stored, kind, tensor["shape"])
        values = torch.from_numpy(processor.process(weights=values, name=tensor["name"], parsed_parameters={}).weights)
        return Blocks(values, kind) if keeps else values.to(dtype)

    if missing:
        return missing
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy dequantises on one core
        values = pool.map(read, [module for _, module, _, _ in found], [tensor for *_, tensor in found])
        for (name, module, suffix, _), value in zip(found, values, strict=True):
            if isinstance(value, Blocks):
                _replace(model, name, _block_module(module, value))
            else:
                module.get_parameter(suffix).data = value
    embedding = model.get_input_embeddings()
    if is_tied and isinstance(embedding, BlockEmbedding):
        model.set_output_embeddings(BlockLinear(embedding.blocks, None, QUANTISED_DTYPE))
    elif is_tied:
        model.tie_weights()
    return missing


def _dense(stored: np.ndarray, kind: GGMLQuantizationType, shape: list[int]) -> np.ndarray:
    """Return a tensor of a file in float32."""
    dense = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    values = dequantize(stored, kind) if dense is None else stored.view(dense)
    return np.array(values, dtype=np.float32).reshape(shape)


def _block_module(module: nn.Module, blocks: Blocks) -> nn.Module:
    """Return a module over blocks in place of a dense one."""
    if isinstance(module, nn.Embedding):
        scale: Any = getattr(module, "scalar_embed_scale", None)
        return BlockEmbedding(blocks, QUANTISED_DTYPE, scale)
    bias: Any = module.bias
    return BlockLinear(blocks, bias, QUANTISED_DTYPE)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
