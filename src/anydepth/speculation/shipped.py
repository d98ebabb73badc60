"""Drafters that come with the package, for base models identified by their weights.

They are stored in 8 bits with a scale per row, as the fast engine reads them: a few MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anydepth.engine.weights import Int8
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import write_json
from anydepth.models.backbone import unwrap
from anydepth.models.load import base_fingerprint
from anydepth.speculation.draft import Draft

WEIGHTS, MANIFEST = "drafter.safetensors", "drafter.json"
SCALE = ".scale"


def folder() -> Path:
    """Return the folder of the shipped drafters; each has a folder in it."""
    return Path(str(files("anydepth") / "shipped"))


def default_draft(adapted: AdaptedModel) -> Draft:
    """Return the shipped draft of a base model, else one with prompt lookup and the attached methods."""
    known = {path: json.loads(path.read_text()) for path in folder().glob(f"*/{MANIFEST}")}
    fingerprint = base_fingerprint(unwrap(adapted.model), light=True) if known else None
    for path, manifest in known.items():
        if manifest["base"] == fingerprint:
            draft = Draft(adapted, {key: value for key, value in manifest["options"].items() if key != "name"})
            assert draft.network is not None
            draft.network.load_state_dict(unpack(load_file(path.with_name(WEIGHTS))))
            return draft
    return Draft(adapted, {})


def ship(adapted: AdaptedModel, draft: Draft, out: Path, about: Mapping[str, Any]) -> None:
    """Write the trained drafter of a model as package data."""
    assert draft.network is not None
    out.mkdir(parents=True, exist_ok=True)
    save_file(pack(draft.network.state_dict()), out / WEIGHTS)
    options = draft.config.model_dump(mode="json", exclude_defaults=True)
    write_json(
        out / MANIFEST, {"base": base_fingerprint(unwrap(adapted.model), light=True), "options": options, **about}
    )


def pack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with matrices in 8 bits, other floats in bfloat16, and ids in int32."""
    packed = {}
    for name, value in weights.items():
        if value.dim() == 2 and value.is_floating_point():
            packed[name], packed[name + SCALE] = Int8.quantise(value)
        else:
            packed[name] = value.to(torch.bfloat16) if value.is_floating_point() else value.to(torch.int32)
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 weights, and int64 ids, of packed ones."""
    weights = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in packed:
            weights[name] = value.float() * packed[name + SCALE].float()[:, None]
        else:
            weights[name] = value.float() if value.is_floating_point() else value.long()
    return weights
