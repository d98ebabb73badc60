"""Test whether `bench` sees a difference where there is none, on a machine that is busy: `results/bench_noise.json`.

    python benchmarks/bench_noise.py [--num-repeats 10] [--num-runs 9]

SmolLM2 in bfloat16 at full depth against itself, timed as `bench` times, again and again, while another process keeps
one core busy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

import anydepth
from anydepth.cores import THREADS
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.hf.adapted import attach
from anydepth.json_io import write_json
from anydepth.measure.results import document
from anydepth.measure.timing import time_generation
from anydepth.training.data import load_windows

RESULT = Path(__file__).resolve().parent / "results" / "bench_noise.json"
BUSY = "while True: pass"
NEW_TOKENS = 48
ALLOWED = 0.03


def paired(engine: Engine, windows: torch.Tensor, num_runs: int) -> list[float]:
    """Ratios of the same generation's times, taken in turn, sides changed from pair to pair."""
    ratios = []
    for number in range(num_runs + 1):  # the first warms up
        prompt = windows[number % len(windows)][None]
        batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        first, second = (time_generation(engine, batch, NEW_TOKENS, full_depth=True).total for _ in range(2))
        ratios.append(first / second if number % 2 else second / first)
    return sorted(ratios[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-repeats", type=int, default=10)
    parser.add_argument("--num-runs", type=int, default=9)
    arguments = parser.parse_args()
    model, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    adapted = attach(model, []).eval()
    windows = load_windows("embedded:valid", tokenizer, 64, max_windows=arguments.num_runs)
    rows = []
    for name, engine in (("fast", FastEngine(adapted)), ("hf", HFEngine(adapted))):
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            time.sleep(1.0)
            for _ in range(arguments.num_repeats):
                with THREADS.fixed(print):
                    ratios = paired(engine, windows, arguments.num_runs)
                    threads = torch.get_num_threads()
                median = ratios[len(ratios) // 2]
                rows.append(
                    {"engine": name, "speedup": median, "range": [ratios[0], ratios[-1]], "num_threads": threads}
                )
                print(rows[-1], flush=True)
        finally:
            busy.kill()
            busy.wait()
        own = [row for row in rows if row["engine"] == name]
        within = sum(abs(row["speedup"] - 1) < ALLOWED for row in own)
        print(f"{name}: {within} of {len(own)} within {ALLOWED:.0%}")
    command = f"python benchmarks/bench_noise.py --num-repeats {arguments.num_repeats} --num-runs {arguments.num_runs}"
    write_json(RESULT, document("anydepth.noise/1", seed=0, config=vars(arguments), command=command, rows=rows))


if __name__ == "__main__":
    main()
