"""Map when adaptive depth pays: what is fastest by phase, batch and context at equal quality: `results/map.json`.

    python benchmarks/map.py [--target embedded] [--out FILE]     measure, and print the table
    python benchmarks/map.py --table | --picture [--out FILE]     print or draw the committed result again

A cell is a batch and a number of prompt tokens. In each, all settings run the same prompts in turn in one process, and
both phases are timed: reading the prompt, and answering with 16 more tokens. Settings are the weights of the engine
alone, with prompts that leave early, with skip sets that grow by the branch that costs least for its bytes, and with
lossless drafting. Quality is the perplexity of the 128 tokens after such a prompt, on two texts, relative to full depth
in the model's own precision; what chose a setting is other text.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib import pyplot, rc_context
from matplotlib.patches import Rectangle

import anydepth
from anydepth.cores import THREADS
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import open_engine
from anydepth.errors import UserError
from anydepth.json_io import read_document, write_json
from anydepth.measure.calibrate import increase_of
from anydepth.measure.race import Entrant, Setting
from anydepth.measure.results import document
from anydepth.measure.timing import Timing, unpadded
from anydepth.models.load import has_blocks
from anydepth.report import wording
from anydepth.report.plots import STYLE
from anydepth.runs.candidates import Skipping, scored
from anydepth.speculation.draft import Draft, default_draft
from anydepth.statistics import ratio_interval
from anydepth.training.data import load_windows
from models import model_file

RESULT = Path(__file__).resolve().parent / "results" / "map.json"
CELLS = {(1, 64): 8, (1, 512): 8, (1, 2048): 5, (4, 64): 8, (4, 512): 5, (8, 64): 8, (8, 512): 4}
"""Batches and tokens of a prompt, and how many are timed."""
SCORED = {64: 16, 512: 12, 2048: 6}
"""Windows of each text that score what follows, by tokens of a prompt."""
PHASES = {"reading": ("weights", "skip set", "prompt exit"), "answering": ("weights", "skip set", "drafting")}
"""Kinds of settings that change the time of a phase."""
STATIC = ("weights", "skip set")
"""Kinds in which every token runs the same layers."""
NEW, AFTER = 16, 128
"""Tokens that a cell generates after the first, and tokens after a prompt that are scored."""
TEXTS = ("wikitext-2:valid", "embedded:valid")
FIT_TEXTS, FITTED = ("wikitext-2:train", "embedded:train"), 24
"""Texts of which so many windows fit the K/V projections of prompts that leave early."""
BOUNDS = (0.01, 0.03, 0.10)
SKIP_SECONDS = 60


@dataclass(eq=False)
class Way:
    """A setting, the seconds of its runs by cell, and its loss on each window by prompt tokens and text."""

    entrant: Entrant
    timings: dict[tuple[int, int], list[Timing]] = field(default_factory=dict[tuple[int, int], "list[Timing]"])
    losses: dict[tuple[int, str], Sequence[float]] = field(default_factory=dict[tuple[int, str], "Sequence[float]"])

    def seconds(self, cell: tuple[int, int], phase: str) -> list[float]:
        return [one.ttft if phase == "reading" else one.decode for one in self.timings[cell]]


def settings(target: str) -> tuple[list[Way], Any]:
    """Return all ways, full depth in the model's own precision first, and the tokenizer."""
    path = target if target == "embedded" or Path(target).exists() else str(model_file(target))
    native = has_blocks(path, "auto", "cpu")
    model, tokenizer = anydepth.load_model(path, native=native, dtype="auto")
    skipping = Skipping(anydepth.attach(model, []).eval(), is_lossless=False)
    adapted = skipping.adapted
    own = open_engine(adapted, "fast", "native" if native else None, print)
    engines: dict[str, Engine] = {own.weights: own}
    for kind in ("int8",) if native else ("int8", "int4"):
        engines[kind] = open_engine(adapted, "fast", kind, print)
    chosen = torch.cat([load_windows(text, tokenizer, 512, max_windows=FITTED) for text in FIT_TEXTS])
    plain = Setting(own.name, own.weights)
    found = [plain, *skipping.exit_prompts(own, chosen, math.inf, print)]
    found += skipping.settings(own, chosen[:4], BOUNDS[-1], time.monotonic() + SKIP_SECONDS, print)
    every = [replace(one, weights=kind) for kind in engines for one in found]
    ways = [Way(Entrant(one, engines[one.weights], partial(skipping.running, one))) for one in every]
    with adapted.deciding():
        drafts = {"prompt lookup": Draft(adapted, {}), "lookup and a trained network": default_draft(adapted)}
    if not native:
        drafts["lookup and a copy in int4 or int8"] = Draft(adapted, {"quantised": "auto"})
    for name, draft in drafts.items():
        if "network" in name and draft.network is None:
            continue
        setting = replace(plain, draft=name)
        with adapted.deciding():
            ways.append(Way(Entrant(setting, own.with_draft(draft), partial(skipping.running, setting))))
    return ways, tokenizer


def measure(target: str) -> dict[str, Any]:
    """Return the rows of all cells."""
    ways, tokenizer = settings(target)
    print(f"{len(ways)} settings in {len(CELLS)} cells", flush=True)
    for (batch_size, size), rounds in CELLS.items():
        prompts = load_windows("wikitext-2:train", tokenizer, size, max_windows=batch_size * (rounds + 1))
        with THREADS.fixed(print):
            time_cell(ways, (batch_size, size), prompts.split(batch_size))
    for size, count in SCORED.items():
        for text in TEXTS:
            windows = load_windows(text, tokenizer, size + AFTER, max_windows=count)
            for way in ways:
                same = ways[0] if way.entrant.setting.draft else way
                if (size, text) not in same.losses:
                    with same.entrant.on():
                        same.losses[size, text], _ = scored(same.entrant.engine, windows, size)
                way.losses[size, text] = same.losses[size, text]
            print(f"scored after {size} tokens of {text}", flush=True)
    return {"rows": [row(way, ways[0], cell) for cell in CELLS for way in ways]}


def time_cell(ways: Sequence[Way], cell: tuple[int, int], prompts: Sequence[torch.Tensor]) -> None:
    """Run all ways on the same prompts in turn; the first prompt warms up."""
    started = time.monotonic()
    for number, prompt in enumerate(prompts):
        for place in range(len(ways)):
            way = ways[(place + number) % len(ways)]
            way.timings.setdefault(cell, []).append(way.entrant.run(unpadded(prompt), NEW + 1))
    for way in ways:
        del way.timings[cell][0]
    seconds = time.monotonic() - started
    print(f"batch {cell[0]}, {cell[1]} tokens: {len(prompts) - 1} rounds in {seconds:.0f} s", flush=True)


def row(way: Way, full: Way, cell: tuple[int, int]) -> dict[str, Any]:
    """Return the fields of a setting in a cell."""
    setting = way.entrant.setting
    found: dict[str, Any] = {"batch_size": cell[0], "prompt_tokens": cell[1], "label": setting.label}
    found["setting"] = setting.to_json()
    for phase in PHASES:
        own, other = way.seconds(cell, phase), full.seconds(cell, phase)
        ratios = [before / after for before, after in zip(other, own, strict=True)]
        found[phase] = {"seconds": median(own), "speedup": median(ratios), "speedup_interval": ratio_interval(ratios)}
    found["quality"] = {text: increase_of(way.losses[cell[1], text], full.losses[cell[1], text]) for text in TEXTS}
    return found


# --- what wins -------------------------------------------------------------------------------------------------------


def kind_of(setting: dict[str, Any]) -> str:
    """Return what a setting is: full depth, weights, skip set, prompt exit or drafting."""
    if setting["draft"] is not None:
        return "drafting"
    if setting["prompt_layers"] is not None:
        return "prompt exit"
    if any(setting.get(kind) for kind in ("skip_layers", "skip_mixers", "skip_ffns")):
        return "skip set"
    return "weights"


def fastest(rows: Sequence[dict[str, Any]], phase: str, bound: float, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the fastest row of these kinds with a perplexity within a bound on every text.

    It is full depth, the first row, where none is faster beyond noise.
    """
    allowed = [
        one
        for one in rows
        if kind_of(one["setting"]) in kinds
        and one[phase]["speedup_interval"][0] > 1
        and all(own["perplexity_increase"] <= bound for own in one["quality"].values())
    ]
    return max(allowed, key=lambda one: one[phase]["speedup"], default=rows[0])


def cells_of(found: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for one in found["rows"]:
        cells.setdefault((one["batch_size"], one["prompt_tokens"]), []).append(one)
    return cells


def short(one: dict[str, Any], weights: str) -> str:
    """Return a setting's name in a cell; `weights` are the model's own."""
    setting = one["setting"]
    skipped = sum(len(setting.get(kind, ())) for kind in ("skip_layers", "skip_mixers", "skip_ffns"))
    name = {
        "weights": "full depth",
        "skip set": f"{skipped} part{'s' if skipped > 1 else ''} less",
        "prompt exit": f"prompts by {setting['prompt_layers']}",
        "drafting": "drafting",
    }[kind_of(setting)]
    return name if setting["weights"] == weights else f"{setting['weights']}, {name}".removesuffix(", full depth")


def markdown(found: dict[str, Any]) -> str:
    """Return the table of the docs: by phase and cell, the fastest within each bound, and the fastest static one.

    Cells in which nothing is faster than full depth are left out.
    """
    heads = [f"at most +{bound:.0%} | without adaptive depth" for bound in BOUNDS]
    lines = [f"| phase | batch | prompt | {' | '.join(heads)} |", "| --- | --- | --- |" + " --- |" * (2 * len(BOUNDS))]
    for phase in PHASES:
        for (batch_size, size), rows in cells_of(found).items():
            best = [fastest(rows, phase, bound, kinds) for bound in BOUNDS for kinds in (PHASES[phase], STATIC)]
            if all(one is rows[0] for one in best):
                continue
            own = rows[0]["setting"]["weights"]
            cells = [f"{short(one, own)} {wording.speedup(one[phase])}" for one in best]
            lines.append(f"| {' | '.join((phase, str(batch_size), str(size), *cells))} |")
    return "\n".join(lines)


def every_setting(found: dict[str, Any]) -> str:
    """Return a table of all settings at batch 1: answering after the shortest prompt, and reading the others."""
    (_, shortest), *others = cells = [cell for cell in cells_of(found) if cell[0] == 1]
    heads = [f"answering after {shortest}", *(f"reading {size}" for _, size in others)]
    heads += [f"after {size} of {text}" for _, size in others for text in TEXTS]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for first, *rows in zip(*(cells_of(found)[cell] for cell in cells), strict=True):
        texts = [first["label"].removeprefix("engine "), wording.speedup(first["answering"])]
        texts += [wording.speedup(one["reading"]) for one in rows]
        texts += [wording.cell("perplexity_increase", one["quality"][text]) for one in rows for text in TEXTS]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


COLOURS = {"weights": "#9aa5b1", "skip set": "#d9a441", "prompt exit": "#3b7dd8", "drafting": "#3a9d6e"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw what is fastest: a panel for each phase and bound, with a field for each batch and context."""
    cells = cells_of(found)
    batches, sizes = (sorted({cell[place] for cell in cells}) for place in (0, 1))
    with rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(PHASES), len(BOUNDS), figsize=(11, 5), sharex=True, sharey=True, layout="constrained"
        )
        for panel, (phase, bound) in zip(panels.flat, [(p, b) for p in PHASES for b in BOUNDS], strict=True):
            for (batch_size, size), rows in cells.items():
                best = fastest(rows, phase, bound, PHASES[phase])
                x, y = sizes.index(size), batches.index(batch_size)
                colour = COLOURS[kind_of(best["setting"])]
                panel.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour, alpha=0.7))
                text = f"{short(best, rows[0]['setting']['weights'])}\n{best[phase]['speedup']:.2f}×"
                panel.text(x, y, text, ha="center", va="center", fontsize=7)
            panel.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(batches) - 0.5))
            panel.set_xticks(range(len(sizes)), map(str, sizes))
            panel.set_yticks(range(len(batches)), map(str, batches))
            panel.set_title(f"{phase}, perplexity at most +{bound:.0%}", fontsize=9)
            panel.grid(visible=False)
        for panel in panels[-1]:
            panel.set_xlabel("tokens of the prompt")
        for panel in panels[:, 0]:
            panel.set_ylabel("batch")
        handles = [Rectangle((0, 0), 1, 1, color=colour, alpha=0.7) for colour in COLOURS.values()]
        names = ["weights alone", "skip set", "prompts that leave early", "lossless drafting"]
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(path)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded", help="embedded, a name of models.py, or a path")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed result, run nothing")
    parser.add_argument("--picture", type=Path, help="draw the committed result to this file, run nothing")
    arguments = parser.parse_args()
    if not (arguments.table or arguments.picture):
        cells = [[*cell, rounds] for cell, rounds in CELLS.items()]
        config = {"target": arguments.target, "cells": cells, "scored": SCORED, "new_tokens": NEW}
        fields = measure(arguments.target)
        write_json(arguments.out, document("anydepth.map/1", seed=0, config=config, **fields))
    found = read_document(arguments.out)
    if arguments.picture:
        draw(found, arguments.picture)
    else:
        print(markdown(found), every_setting(found), sep="\n\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"map.py: {error}") from error
