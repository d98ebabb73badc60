"""Put a trained drafter into the package.

anydepth train recipes/drafter.yaml --out runs/drafter
python benchmarks/ship_drafter.py runs/drafter smollm2-135m
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anydepth.engine.weights import Int8
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import read_document, write_json
from anydepth.models.backbone import unwrap
from anydepth.models.load import base_fingerprint
from anydepth.speculation.draft import MANIFEST, SCALE, WEIGHTS, Draft, folder
from anydepth.training.checkpoint import load_draft, load_target


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    trained = read_document(arguments.checkpoint / "train.json")
    about = {key: trained[key] for key in ("commit", "dirty", "seed", "num_own_tokens", "writing_seconds", "seconds")}
    adapted, _ = load_target(str(arguments.checkpoint), dtype="bfloat16")
    draft = load_draft(str(arguments.checkpoint), adapted)
    if draft is None:
        raise SystemExit(f"{arguments.checkpoint} has no draft section; train recipes/drafter.yaml")
    ship(adapted, draft, folder() / arguments.name, about)
    print(folder() / arguments.name)


if __name__ == "__main__":
    main()
