"""A .gguf file, or its parts (`name-00001-of-00003.gguf`): metadata of the first, tensors of all."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from anydepth.errors import UserError
from anydepth.models.families import FAMILIES

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
DENSE = ("F32", "F16", "BF16")
ARCHITECTURES = [name for name in GGUF_SUPPORTED_ARCHITECTURES if name in FAMILIES or f"{name}_text" in FAMILIES]
"""Architectures of GGUF files that transformers reads, of the families that are supported here."""


def first_part(path: Path) -> Path:
    """Return the first part of a file that is one of several, else the file itself."""
    found = PART.fullmatch(path.name)
    return path if found is None else path.with_name(f"{found['stem']}-00001-of-{found['count']}.gguf")


def parts_of(path: Path) -> list[Path]:
    """Return a file, or all parts of it; raise `UserError` for one that is missing."""
    if not path.is_file() and PART.fullmatch(path.name) is None:
        raise UserError(f"no file at {path}; give the path of a .gguf file")
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    parts = [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"{path.parent} lacks {missing[0]}, one of {count} parts of a model; put all into one folder")
    return parts


def read_parts(path: Path) -> tuple[GGUFReader, list[dict[str, Any]]]:
    """Return the reader of a file's first part, and the table of tensors of all parts."""
    parts = parts_of(path)
    readers = [GGUFReader(part) for part in parts]
    first = readers[0]
    expected = first.get_field("split.count")
    if expected is not None and int(expected.contents()) != len(parts):
        raise UserError(f"{path} is one of {int(expected.contents())} parts; keep their names, …-00001-of-0000N.gguf")
    tensors = [
        {
            "name": tensor.name,
            "kind": tensor.tensor_type.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "stored": [int(size) for size in tensor.data.shape],
            "offset": int(tensor.data_offset),
            "bytes": int(tensor.n_bytes),
            "file": part.name,
        }
        for part, reader in zip(parts, readers, strict=True)
        for tensor in reader.tensors
    ]
    _check(path, first, tensors)
    return first, tensors


def _check(path: Path, reader: GGUFReader, tensors: list[dict[str, Any]]) -> None:
    """Raise `UserError` for a file that holds no model, or one that no loader here reads."""
    field = reader.get_field("general.architecture")
    architecture = None if field is None else field.contents()
    kind = reader.get_field("general.type")
    if kind is not None and kind.contents() != "model":
        raise UserError(f"{path} is a GGUF of type '{kind.contents()}', not a model; give the file of the model itself")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{path} has the architecture '{architecture}', which is not supported; supported are {known}")
    unknown = [kind for kind in sorted({tensor["kind"] for tensor in tensors}) if not _is_readable(kind)]
    if unknown:
        raise UserError(f"{path} has tensors of type {unknown[0]}, which is not supported; give it in another type")
    if not tensors:
        raise UserError(f"{path} holds no tensors, only a vocabulary; give the file of the model itself")


def _is_readable(kind: str) -> bool:
    """Return whether the gguf package dequantises a type."""
    own = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[own][1]), np.uint8), own)
    except NotImplementedError:
        return False
    return True


def weights_by_kind(tensors: list[dict[str, Any]]) -> Counter[str]:
    """Return the number of weights of each type of a file's tensors."""
    found = Counter[str]()
    for tensor in tensors:
        found[tensor["kind"]] += math.prod(tensor["shape"])
    return found
