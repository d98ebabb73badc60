"""Load a GGUF file in its own blocks in new processes, and measure seconds and memory; a part of engine.py.

    python benchmarks/engine_loading.py NAME

prints the numbers of one load as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from engine_inputs import Chosen, say

from anydepth.decoding.engines import open_engine
from anydepth.hf.adapted import attach


def loaded(name: str, num_runs: int) -> dict[str, Any]:
    """Medians over processes; `first` is the one that converts what is not in the cache folder yet."""
    rows = []
    for _ in range(num_runs + 1):
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        say(rows[-1], *rows[-1])
    first, *later = rows
    return {"first": first, **{key: median(one[key] for one in later) for key in first}}


def load_once(name: str) -> dict[str, float]:
    """Load and generate; memory in bytes above that of the imports, pages of the file apart."""
    chosen = Chosen(name)
    before, _ = memory()
    started = time.perf_counter()
    model, tokenizer = chosen.load(native=True)
    engine = open_engine(attach(model, []), "fast", "native")
    seconds = time.perf_counter() - started
    batch = dict(tokenizer("The lake was", return_tensors="pt"))
    engine.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    own, mapped = memory()
    return {
        "seconds": seconds,
        "file_bytes": chosen.file().stat().st_size,
        "own_bytes": own - before,
        "mapped_bytes": mapped,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def memory() -> tuple[int, int]:
    """Bytes of this process's own memory, and of files that are mapped into it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, shared, mapped = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "RssFile"))
    return own + shared, mapped


if __name__ == "__main__":
    print(json.dumps(load_once(sys.argv[1])))
