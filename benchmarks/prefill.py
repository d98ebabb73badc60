"""Time the reading of prompts against its quality: tokens that leave early, skip sets, weights: `results/prefill.json`.

    python benchmarks/prefill.py [--target embedded] [--table]

Each setting reads prompts of 512 and 2,048 tokens and generates one token, all settings in turn in one process.
Quality is the perplexity of the 128 tokens after such a prompt, on two texts, relative to full depth in the file's own
precision. Skip sets grow by the branch that costs least for its bytes (`runs/candidates.py`), on other text.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch

import anydepth
from anydepth.cores import THREADS
from anydepth.decoding.engines import FastEngine
from anydepth.errors import UserError
from anydepth.json_io import read_document, write_json
from anydepth.measure.calibrate import increase_of
from anydepth.measure.race import Entrant, Race, Setting
from anydepth.measure.results import document
from anydepth.measure.timing import unpadded
from anydepth.report import wording
from anydepth.runs.candidates import Skipping, scored
from anydepth.statistics import ratio_interval
from anydepth.training.data import load_windows

RESULT = Path(__file__).resolve().parent / "results" / "prefill.json"
WEIGHTS = ("native", "int8")
LENGTHS = {512: 16, 2048: 6}
"""Tokens of a prompt, and windows of each text that score what follows."""
TEXTS = ("wikitext-2:valid", "embedded:valid")
FIT_TEXTS, FITTED = ("wikitext-2:train", "embedded:train"), 24
"""Texts of which so many windows fit the K/V projections of prompts that leave early."""
AFTER = 128
"""Tokens after a prompt that are scored."""
ROUNDS, SKIP_SECONDS, MOST = 8, 60, 0.3
"""Timed prompts of each length; seconds of the search of skip sets; their greatest increase of perplexity."""


def measure(target: str) -> list[dict[str, Any]]:
    """Return a row for each setting."""
    model, tokenizer = anydepth.load_model(target, native=True)
    skipping = Skipping(anydepth.attach(model, []).eval(), is_lossless=False)
    engines = {kind: FastEngine(skipping.adapted, kind) for kind in WEIGHTS}
    own = engines[WEIGHTS[0]]
    plain = Setting(own.name, own.weights)
    chosen = torch.cat([load_windows(text, tokenizer, 512, max_windows=FITTED) for text in FIT_TEXTS])
    exits = skipping.exit_prompts(own, chosen, math.inf, print)
    found = list(skipping.settings(own, chosen[:4], MOST, time.monotonic() + SKIP_SECONDS, print))
    settings = [replace(one, weights=kind) for kind in WEIGHTS for one in (plain, *exits)]
    settings += found
    entrants = [Entrant(one, engines[one.weights], partial(skipping.running, one)) for one in settings]
    timed, speed = entrants[1:], Race(entrants[0], iter(()), len(LENGTHS), 1)
    prompts = {size: load_windows("wikitext-2:train", tokenizer, size, max_windows=ROUNDS + 1) for size in LENGTHS}
    batches = [
        (f"{size} tokens", unpadded(rows[n : n + 1])) for n in range(ROUNDS + 1) for size, rows in prompts.items()
    ]
    speed.prompts = cycle(batches)
    with THREADS.fixed(print):
        speed.warm_up(entrants)
        for number in range(ROUNDS):
            speed.round(timed, 1)
            print(f"{number + 1} of {ROUNDS} prompts of each length", flush=True)
    rows = [_times(one, entrants) for one in entrants]
    for size, count in LENGTHS.items():
        for text in TEXTS:
            windows = load_windows(text, tokenizer, size + AFTER, max_windows=count)
            full: Sequence[float] = []
            for one, row in zip(entrants, rows, strict=True):
                with one.on():
                    losses, _ = scored(one.engine, windows, size)
                full = full or losses
                row["quality"][f"{size} tokens"][text] = increase_of(losses, full)
            print(f"scored after {size} tokens of {text}", flush=True)
    return rows


def _times(entrant: Entrant, everything: Sequence[Entrant]) -> dict[str, Any]:
    """Return the fields of a setting: times, and speed-ups over the file's precision and over its own weights."""
    reference = everything[0]
    same = next(one for one in everything if one.setting.weights == entrant.setting.weights)
    row: dict[str, Any] = {"label": entrant.setting.label, "setting": entrant.setting.to_json(), "speed": {}}
    for shape, ratios in entrant.ratios.items():
        over = [own / other for own, other in zip(ratios, same.ratios[shape], strict=True)]
        row["speed"][shape] = {
            "seconds": median(reference.full[shape]) / median(ratios),
            "speedup": median(ratios),
            "speedup_interval": ratio_interval(ratios),
            "over_same_weights": median(over),
            "over_same_weights_interval": ratio_interval(over),
        }
    return {**row, "quality": {shape: {} for shape in entrant.ratios}}


def markdown(found: dict[str, Any]) -> str:
    """Return the table of the docs."""
    shapes = list(found["rows"][0]["speed"])
    heads = [f"{shape}: speed-up | {' | '.join(TEXTS)}" for shape in shapes]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * (len(shapes) * (1 + len(TEXTS)))]
    for row in found["rows"]:
        kinds = ("skip_layers", "skip_mixers", "skip_ffns")
        num_skipped = sum(len(row["setting"].get(kind, ())) for kind in kinds)
        weights = row["setting"]["weights"]
        cells = [f"{weights}, without {num_skipped} mixers or FFNs" if num_skipped else row["label"].split(" ", 1)[1]]
        for shape in shapes:
            cells.append(wording.speedup(row["speed"][shape]))
            cells += [wording.cell("perplexity_increase", row["quality"][shape][text]) for text in TEXTS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded", help="a .gguf file")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed result as a table, run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        rows = measure(arguments.target)
        config = {"target": arguments.target, "after": AFTER, "rounds": ROUNDS, "skip_seconds": SKIP_SECONDS}
        write_json(arguments.out, document("anydepth.prefill/1", seed=0, config=config, rows=rows))
    print(markdown(read_document(arguments.out)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"prefill.py: {error}") from error
