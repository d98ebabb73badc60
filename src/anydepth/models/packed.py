"""Checkpoints of GPTQ and AWQ, read as dense weights: integers in 32-bit words, with a step and a zero by group.

GPTQ packs the inputs of an output into words, AWQ eight outputs of an input, in the order 0 2 4 6 1 3 5 7. A weight is
(integer − zero) × step. Their own kernels run whole linear layers on GPUs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from anydepth.errors import UserError

PACKED = GPTQ, AWQ = "gptq", "awq"
GPTQ_BITS = (2, 4, 8)
"""Bits of an integer that fill words evenly."""
AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The position in a word of each of eight outputs."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def check_packed(name: str, config: dict[str, Any]) -> None:
    """Raise `UserError` for a variant of GPTQ or AWQ that is not read."""
    method, bits = config["quant_method"], config.get("bits", config.get("w_bit"))
    form = config.get("checkpoint_format", "gptq") if method == GPTQ else config.get("version", "gemm")
    known = {GPTQ: ("gptq", "gptq_v2"), AWQ: ("gemm",)}[method]
    if bits not in (GPTQ_BITS if method == GPTQ else (4,)) or str(form).lower() not in known:
        raise UserError(
            f"'{name}' is quantised by {method} with {bits} bits in the form '{form}', which anydepth does not read; "
            "give the original model (--weights int8 or int4 quantises it for the fast engine), or a .gguf file"
        )


def dense_state(name: str, revision: str | None, config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state dict of a model with its packed weights dequantised."""
    stored = dict(_stored(name, revision))
    state = {key: value for key, value in stored.items() if key.rpartition(".")[2] not in PARTS}
    dequantise = {GPTQ: _gptq, AWQ: _awq}[config["quant_method"]]
    for key in stored:
        module, _, part = key.rpartition(".")
        if part == "qweight":
            own = {name: stored[f"{module}.{name}"] for name in PARTS if f"{module}.{name}" in stored}
            state[f"{module}.weight"] = dequantise(own, config).T.to(dtype).contiguous()
    return state


def _stored(name: str, revision: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder or a hub model."""
    files = ["*.safetensors", "*.safetensors.index.json"]
    folder = (
        Path(name) if Path(name).exists() else Path(snapshot_download(name, revision=revision, allow_patterns=files))
    )
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, a reader and no dict
                yield key, file.get_tensor(key)


def _gptq(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Return a weight (in, out)."""
    bits = config["bits"]
    integers = _unpacked(parts["qweight"].T, bits).T
    zeros = _unpacked(parts["qzeros"], bits)
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1  # the first version of the format stores zeros less one
    return _scaled(integers, zeros, parts, config["group_size"])


def _awq(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Return a weight (in, out)."""
    integers, zeros = (
        _unpacked(parts[part], 4).unflatten(1, (-1, 8))[..., AWQ_POSITIONS].flatten(1) for part in ("qweight", "qzeros")
    )
    return _scaled(integers, zeros, parts, config["group_size" if "group_size" in config else "q_group_size"])


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the integers (rows, columns × 32 / bits) of 32-bit words, those of the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & 2**bits - 1).flatten(1)


def _scaled(integers: Tensor, zeros: Tensor, parts: dict[str, Tensor], group_size: int) -> Tensor:
    """Return (integer − zero) × step, (in, out); a group is `group_size` inputs, or those that `g_idx` names."""
    num_inputs = len(integers)
    groups = parts.get("g_idx")
    if groups is None:
        groups = torch.arange(num_inputs) // (num_inputs if group_size == -1 else group_size)
    groups = groups.long()
    return (integers - zeros[groups]).float() * parts["scales"].float()[groups]
