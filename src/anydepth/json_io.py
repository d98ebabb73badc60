"""Read and write JSON files: a write is atomic, an error of a read is one line."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from anydepth.errors import UserError


def write_json(path: str | Path, values: Any) -> None:
    """Write strict JSON atomically."""
    write_text(path, json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file so that `path` holds either what it held before or all of `text`, even after a power cut."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a result of anydepth, or raise `UserError`."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read result '{path}': {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}); give a file that anydepth wrote with --json") from error
    if not isinstance(values, dict) or not str(values.get("schema")).startswith("anydepth."):
        raise UserError(f"'{path}' is JSON, not a result of anydepth: it has no `schema` of the form anydepth.NAME/1")
    return values


def plain(value: Any) -> Any:
    """Convert `value` to JSON's types; non-finite numbers become the strings "Infinity", "-Infinity" and "NaN".

    JSON has no such numbers; Python's `float`, pydantic and JavaScript convert the strings back.
    """
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Path):
        return str(value)
    assert value is None or isinstance(value, str | bool | int | float), f"{type(value).__name__} has no JSON type"
    return value
