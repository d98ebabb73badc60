"""One table of ways to run a target: `bench --compare`."""

from __future__ import annotations

from typing import Any

from anydepth.cli.display import Printer, table
from anydepth.cli.options import numbers
from anydepth.errors import UserError

NUM_RUNS = 10
SCORED = 512
"""The most tokens of a window that perplexity is measured on."""
NUM_WINDOWS = 8


def check_comparison(options: dict[str, Any]) -> None:
    """Raise `UserError` for options of `bench` that make several rows."""
    for name in ("batch_sizes", "prompt_tokens", "weights"):
        if "," in (options[name] or ""):
            raise UserError(f"--compare makes one table; give one value to --{name.replace('_', '-')}, not several")
    if options["engine"] == "both" or options["requests"] is not None:
        raise UserError("--compare makes one table, on one engine; leave out --engine both and --requests")


def compare_ways(options: dict[str, Any], adapted: Any, tokenizer: Any, printer: Printer) -> dict[str, Any]:
    """Return the fields of `anydepth.bench/1`: a row for each way to run the target."""
    from anydepth.decoding.engines import open_engine
    from anydepth.measure.bench import batches_of, load_prompts
    from anydepth.measure.compare import compare, ways_of
    from anydepth.measure.prompts import read_prompts
    from anydepth.measure.timing import unpadded
    from anydepth.training.checkpoint import load_draft
    from anydepth.training.data import load_windows

    draft = load_draft(options["target"], adapted, lossless=True)
    engine = open_engine(
        adapted, options["engine"], options["weights"], printer.progress, draft=draft, compiled=options["compiled"]
    )
    (size,) = numbers("batch-sizes", options["batch_sizes"])
    new_tokens, window = options["new_tokens"], getattr(adapted.config, "max_position_embeddings", None) or SCORED
    if options["prompts"] is not None:
        batches = batches_of(adapted, tokenizer, read_prompts(options["prompts"], tokenizer), size, new_tokens)
    else:
        lengths = numbers("prompt-tokens", options["prompt_tokens"] or "64")
        texts = load_prompts(adapted, tokenizer, options["data"], lengths, new_tokens).to(adapted.device)
        count = options["num_runs"] or NUM_RUNS
        rows = [[(run * size + row) % len(texts) for row in range(size)] for run in range(count)]
        batches = [unpadded(texts[row]) for row in rows]
    windows = load_windows(options["data"], tokenizer, min(SCORED, window), max_windows=NUM_WINDOWS)
    rows = compare(ways_of(engine, printer.progress), batches, windows, new_tokens, say=printer.progress)
    return {"label": adapted.label, "rows": rows, "queues": []}


def show_comparison(document: dict[str, Any]) -> None:
    """Print the table of `bench --compare`."""
    rows = document["rows"]
    first = rows[0]
    table(
        ["", "perplexity", "ROUGE-L", "depth", "tokens/s", "× full depth"],
        [
            [
                row["label"],
                f"{row['perplexity']:.4g}",
                f"{row['rouge_l']:.3f}",
                f"{row['adapted']['mean_depth']:.1f}",
                f"{row['adapted']['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f} ({row['speedup_range'][0]:.2f}–{row['speedup_range'][1]:.2f})",
            ]
            for row in rows
        ],
    )
    print(
        f"\n{first['num_runs']} runs of {first['new_tokens']} new tokens, batch {first['batch_size']}, in turn; median "
        "of paired ratios (least–greatest); ROUGE-L against the texts of full depth"
    )
