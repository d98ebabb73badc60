"""The command that times a model against full depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.cli import options as opt
from anydepth.cli.application import app
from anydepth.cli.display import Printer
from anydepth.draft_sections import DRAFT, OLD_NAME
from anydepth.errors import UserError
from anydepth.report import wording

PROMPT_TOKENS, NUM_RUNS = "64", 5
"""Defaults of options that `--prompts` and `--compare` replace."""


@app.command()
def bench(
    target: opt.Target,
    batch_sizes: Annotated[str, typer.Option(help="Generate this many rows together: 1,4,8.")] = "1",
    prompt_tokens: Annotated[
        str | None, typer.Option(help=f"Use prompts of these lengths: 64,512. Default: {PROMPT_TOKENS}.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Generate this many tokens per row.")] = 64,
    num_runs: Annotated[
        int | None,
        typer.Option(help=f"Time this many pairs per row, up to thrice as many if they vary. Default: {NUM_RUNS}."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Queue this many requests too: continuous batching, batch-sizes at a time.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Run on hf, fast, both in turn, or auto: fast where it runs the model.")
    ] = "auto",
    weights: Annotated[
        str | None, typer.Option("--weights", help="Run the fast engine in these precisions: bfloat16,int8.")
    ] = None,
    compiled: opt.Compiled = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Read prompts from JSON lines with prompt, turns (the first) or messages; one pair a batch."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Print one table of full depth, what is attached, lossless drafting and int8: perplexity, ROUGE-L, "
            "depth and speed.",
        ),
    ] = False,
    against: Annotated[list[str] | None, typer.Option(help="Attach a method to a base model: skip_set.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="Set its options: skip_layers=[5,9].")] = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    data: opt.Data = "embedded:valid",
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Time full depth and adapted in turn, as pairs."""
    arguments = dict(locals())
    from anydepth.cli.comparison import check_comparison, compare_ways, show_comparison
    from anydepth.measure.results import document
    from anydepth.training.corpora import check_corpus

    if prompts is not None and (prompt_tokens is not None or (num_runs is not None and requests is None)):
        raise UserError("--prompts sets lengths and pairs: leave out --prompt-tokens and --num-runs")
    opt.at_least(1, num_runs=num_runs, new_tokens=new_tokens, requests=requests)
    if compare:
        check_comparison(arguments)
    if prompts is None:
        check_corpus(data)
    printer = Printer(as_json, quiet)
    adapted, tokenizer, draft = _load(arguments)
    config = opt.config_of(arguments, adapted)
    if compare:
        fields, show = compare_ways(arguments, adapted, tokenizer, printer), show_comparison
    else:
        defaults = {"prompt_tokens": prompt_tokens or PROMPT_TOKENS, "num_runs": num_runs or NUM_RUNS}
        if prompts is None:
            config |= defaults
        elif requests is not None:
            config["num_runs"] = defaults["num_runs"]  # It is that of the queue.
        fields, show = _measure({**arguments, **defaults}, adapted, tokenizer, draft, printer), show_bench
    printer.result(document("anydepth.bench/1", seed=seed, config=config, **fields), show)


def _load(arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Load the model to bench, its tokenizer and its draft, with the target's methods or those of `--against`."""
    from anydepth.config import refuse_training_only, validate
    from anydepth.hf.adapted import attach, detach
    from anydepth.methods import method_class
    from anydepth.speculation.draft import Draft
    from anydepth.training.checkpoint import load_draft, load_target

    target, against, options = arguments["target"], arguments["against"] or [], arguments["options"] or []
    share = opt.wanted_share(arguments["skip_share"], arguments["capacity"])
    load: dict[str, Any] = {"dtype": arguments["dtype"], "device": arguments["device"], "skip_share": share}
    if options and not against:
        raise UserError("--set is for the method that --against names; --capacity and --skip-share move thresholds")
    if against in ([DRAFT], [OLD_NAME]):  # The target's methods stay and decide in drafts.
        own = {name: value for name, value in opt.method_options(DRAFT, options).items() if name != "name"}
        adapted, tokenizer = load_target(target, merge=True, **load)
        return adapted, tokenizer, Draft(adapted, own) if own else load_draft(target, adapted, lossless=True)
    specs = [opt.method_options(name, options) for name in against]
    for name, (_, *chosen), spec in zip(against, specs, specs, strict=True):
        own = {option: spec[option] for option in chosen}
        refuse_training_only(name, validate(method_class(name, "--against").Config, own, where=name), own, fresh=True)
    adapted, tokenizer = load_target(target, merge=True, **load)
    if against:
        return attach(detach(adapted), specs), tokenizer, None
    return adapted, tokenizer, load_draft(target, adapted)


def _measure(arguments: dict[str, Any], adapted: Any, tokenizer: Any, draft: Any, printer: Printer) -> dict[str, Any]:
    """Return the fields of `anydepth.bench/1`: rows for each size and engine, and the queues of requests."""
    import torch

    from anydepth.decoding.engines import label_of
    from anydepth.measure.bench import bench, bench_prompts, load_prompts
    from anydepth.measure.prompts import read_prompts
    from anydepth.measure.timing import throughput
    from anydepth.models.tokens import encode

    sizes, lengths = (opt.numbers(key, arguments[key.replace("-", "_")]) for key in ("batch-sizes", "prompt-tokens"))
    engines, new_tokens = _engines(arguments, adapted, draft, printer), arguments["new_tokens"]
    shared: dict[str, Any] = {"batch_sizes": sizes, "new_tokens": new_tokens}
    said = {"on_row": lambda row: printer.progress(f"  {_title(row)}: {_speed(row)}"), "say": printer.progress}
    if arguments["prompts"] is not None:
        texts = read_prompts(arguments["prompts"], tokenizer)
        rows = bench_prompts(engines, tokenizer, texts, **shared, **said)
        ids = [torch.tensor(encode(tokenizer, text)) for text in texts]
    else:
        windows = load_prompts(adapted, tokenizer, arguments["data"], lengths, new_tokens)
        runs = arguments["num_runs"]
        rows = bench(engines, windows, prompt_tokens=lengths, num_runs=runs, **shared, **said)
        ids = [window[: lengths[0]] for window in windows]
    queues, num_requests = [], arguments["requests"]
    if num_requests is not None:
        queue = {"num_requests": num_requests, "num_runs": arguments["num_runs"], **shared}
        queues = [row for each in engines for row in throughput(each, ids, **queue)]
    return {"label": label_of(*engines), "rows": rows, "queues": queues}


def _engines(arguments: dict[str, Any], adapted: Any, draft: Any, printer: Printer) -> list[Any]:
    """Open an engine for each kind of weights, after transformers where both are timed."""
    from anydepth.decoding.engines import ENGINES, HFEngine, open_engine

    engine, weights = arguments["engine"], arguments["weights"]
    if not adapted.methods and draft is None and engine in ("auto", "hf"):
        raise UserError(
            f"{arguments['target']} has no method attached; give a folder that train or search wrote, --against "
            "METHOD, or compare engines at full depth with --engine both"
        )
    if engine not in (*ENGINES, "both"):
        raise UserError(f"engine '{engine}' is unknown; bench takes {', '.join(ENGINES)} or both")
    options = {"draft": draft, "compiled": arguments["compiled"]}
    one = "fast" if engine == "both" else engine
    kinds = weights.split(",") if weights else [None]
    chosen = [open_engine(adapted, one, kind, printer.progress, **options) for kind in kinds]
    return [HFEngine(adapted, draft), *chosen] if engine == "both" else chosen


def show_bench(document: dict[str, Any]) -> None:
    for row in document["rows"]:
        print(f"{_title(row)}: {_rates(row)}")
        for name in ("total", "prefill", "decode"):
            part = row if name == "total" else row.get(name)
            if part is not None and part["speedup"] is not None:
                ideal = f"{part['ideal_speedup']:.2f}× that the skipped work allows ({part['realised']:.0%})"
                print(f"  {name:8}{wording.speedup(part, '×')} of {ideal}")
        if "over_first" in row:
            over = row["over_first"]
            print(
                f"  over {over['engine']} {over['weights']}: {over['full_depth']['total']:.2f}× at full depth, "
                f"{over['adapted']['total']:.2f}× adapted"
            )
        if "roofline" in row:
            _show_roofline(row["roofline"])
    for row in document.get("queues", []):
        speed = f", {wording.speedup(row, '×')}" if row["speedup"] is not None else ""
        title = f"{row['num_requests']} requests queued, {row['batch_size']} at a time, {row['weights']}"
        print(f"{title}: {_rates(row)}{speed}")
    if any(row["speedup"] is not None for row in document["rows"]):
        print(wording.SPREAD)


def _title(row: dict[str, Any]) -> str:
    sizes = f"batch {row['batch_size']}, prompt {row['prompt_tokens']}, new {row['new_tokens']}"
    return f"{row['engine']} {row['weights']}, {sizes}"


def _speed(row: dict[str, Any]) -> str:
    """Return the speed-up and its ideal, or tokens per second where nothing is attached."""
    if row["speedup"] is None:
        return _rates(row)
    return f"speed-up {wording.speedup(row, '×')} of {row['ideal_speedup']:.2f}"


def _rates(row: dict[str, Any]) -> str:
    """Return tokens per second of both sides, or of full depth where nothing is attached."""
    full = f"{row['full_depth']['tokens_per_second']:.1f}"
    if row["speedup"] is None:
        return f"{full} tokens/s, nothing attached"
    return f"{row['adapted']['tokens_per_second']:.1f} tokens/s adapted, {full} at full depth"


def _show_roofline(roof: dict[str, Any]) -> None:
    full, adapted = roof["full_depth"], roof["adapted"]
    print(
        f"  roofline: a step reads {full['bytes_per_step'] / 1e6:.0f} MB at full depth, {full['share']:.0%} of the "
        f"{roof['read_bytes_per_second'] / 1e9:.1f} GB/s that memory allows; adapted "
        f"{adapted['bytes_per_step'] / 1e6:.0f} MB, {adapted['share']:.0%}"
    )
