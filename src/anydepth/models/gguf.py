"""Read a model and its tokenizer from a GGUF file, dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from anydepth.errors import UserError
from anydepth.models.reading import check_whole, reading

QUANTISED_DTYPE = torch.bfloat16
"""The type of a model that is stored with quantised weights."""


def from_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise UserError(f"no file at {path}; give the path of a .gguf file")
    options: dict[str, Any] = {"gguf_file": path.name}
    with reading(f"GGUF file {path}"):
        reader = GGUFReader(path)
        # Without `dequantize` the dense model is flagged as quantised and can be neither saved nor trained.
        dequantised = GgufConfig(dequantize=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            **options,
            quantization_config=dequantised,
            dtype=dtype or _own_dtype(reader),
            output_loading_info=True,
        )
        model, report = loaded
        check_whole(str(path), report)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
        _repair_digits(tokenizer, reader)
        return model, tokenizer


def _own_dtype(reader: GGUFReader) -> torch.dtype:
    """Return the type of a GGUF's largest tensor, or bfloat16 if that is quantised."""
    largest = max(reader.tensors, key=lambda tensor: int(tensor.n_elements))
    dense = {"F32": torch.float32, "F16": torch.float16}
    return dense.get(largest.tensor_type.name, QUANTISED_DTYPE)


def _repair_digits(tokenizer: PreTrainedTokenizerBase, reader: GGUFReader) -> None:
    """Restore the digit splitting of GGUF's `smollm` pre-tokeniser, which transformers drops."""
    field = reader.get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)  # type: ignore[attr-defined]
