"""Put a trained drafter into the package.

anydepth train recipes/drafter.yaml --out runs/drafter
python benchmarks/ship_drafter.py runs/drafter smollm2-135m
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anydepth.json_io import read_document
from anydepth.speculation.shipped import folder, ship
from anydepth.training.checkpoint import load_draft, load_target


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
