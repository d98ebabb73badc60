"""Whether `bench` sees a difference where there is none, on a machine that is busy: `results/bench_noise.json`.

    python benchmarks/bench_noise.py [--num-repeats 10] [--num-runs 9]

SmolLM2 in bfloat16 with nothing attached, so that "full depth" and "adapted" are the same: whole benches one after the
other, while another process keeps one core busy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import anydepth
from anydepth.execution.adapted import attach
from anydepth.inference.engine.decode import FastEngine
from anydepth.measure.bench import paired_speedups
from anydepth.measure.results import document, write_json
from anydepth.training.data import load_windows

RESULT = Path(__file__).resolve().parent / "results" / "bench_noise.json"
BUSY = "while True: pass"
NEW_TOKENS = 48
ALLOWED = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-repeats", type=int, default=10)
    parser.add_argument("--num-runs", type=int, default=9)
    arguments = parser.parse_args()
    model, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    adapted = attach(model, []).eval()
    windows = load_windows("embedded:valid", tokenizer, 64, max_windows=arguments.num_runs)
    rows = []
    for name, engine in (("fast", FastEngine(adapted)), ("hf", None)):
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            for _ in range(arguments.num_repeats):
                ratios = sorted(paired_speedups(adapted, windows, NEW_TOKENS, arguments.num_runs, engine))
                rows.append({"engine": name, "speedup": ratios[len(ratios) // 2], "range": [ratios[0], ratios[-1]]})
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
