"""The command that times a model against full depth, or ways to run it against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from anydepth.cli import options as opt
from anydepth.cli.display import table
from anydepth.config import refuse_training_only, validate
from anydepth.draft_sections import DRAFT, OLD_NAME
from anydepth.errors import UserError
from anydepth.report import wording
from anydepth.training.corpora import check_corpus

PROMPT_TOKENS, NUM_RUNS = "64", 5
"""Defaults of options that `--prompts` and `--compare` replace."""
COMPARED_RUNS, SCORED_TOKENS, SCORED_WINDOWS = 10, 512, 8
"""Timed runs of `--compare`, and the windows that it measures perplexity on."""


@opt.command()
def bench(
    call: opt.Call,
    target: opt.Target,
    batch_sizes: Annotated[str, Option(help="Generate this many rows together: 1,4,8.")] = "1",
    prompt_tokens: Annotated[
        str | None, Option(help=f"Use prompts of these lengths: 64,512. Default: {PROMPT_TOKENS}.")
    ] = None,
    new_tokens: Annotated[int, Option(help="Generate this many tokens per row.")] = 64,
    num_runs: Annotated[
        int | None,
        Option(help=f"Time this many pairs per row, up to thrice as many if they vary. Default: {NUM_RUNS}."),
    ] = None,
    requests: Annotated[
        int | None, Option(help="Queue this many requests too: continuous batching, batch-sizes at a time.")
    ] = None,
    engine: Annotated[
        str, Option("--engine", help="Run on hf, fast, both in turn, or auto: fast where it runs the model.")
    ] = "auto",
    weights: Annotated[
        str | None, Option("--weights", help="Run the fast engine in these precisions: bfloat16,int8.")
    ] = None,
    compiled: opt.Compiled = False,
    prompts: Annotated[
        Path | None,
        Option(help="Read prompts from JSON lines with prompt, turns (the first) or messages; one pair a batch."),
    ] = None,
    compare: Annotated[
        bool,
        Option(
            "--compare",
            help="Print one table of full depth, what is attached, lossless drafting and int8: perplexity, ROUGE-L, "
            "depth and speed.",
        ),
    ] = False,
    against: Annotated[list[str] | None, Option(help="Attach a method to a base model: skip_set.")] = None,
    options: Annotated[list[str] | None, Option("--set", help="Set its options: skip_layers=[5,9].")] = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    data: opt.Data = "embedded:valid",
) -> None:
    """Time full depth and adapted in turn, as pairs."""
    if prompts is not None and (prompt_tokens is not None or (num_runs is not None and requests is None)):
        raise UserError("--prompts sets lengths and pairs: leave out --prompt-tokens and --num-runs")
    opt.at_least(1, num_runs=num_runs, new_tokens=new_tokens, requests=requests)
    if compare:
        _check_comparison(call.arguments)
    if prompts is None:
        check_corpus(data)
    if compare:
        adapted, tokenizer, _ = _load(call)
        call.result(call.document("bench", adapted, **_compare(call, adapted, tokenizer)), show_comparison)
        return
    adapted, tokenizer, engines = _open(call)
    used = {"prompt_tokens": prompt_tokens or PROMPT_TOKENS, "num_runs": num_runs or NUM_RUNS}
    if prompts is not None:
        used = {} if requests is None else {"num_runs": used["num_runs"]}  # It is that of the queue.
    call.arguments.update(used)
    call.result(call.document("bench", adapted, **_measure(call, adapted, tokenizer, engines)), show_bench)


def _load(call: opt.Call) -> tuple[Any, Any, Any]:
    """Load the model to bench, its tokenizer and its draft, with the target's methods or those of `--against`."""
    from anydepth.hf.adapted import attach, detach
    from anydepth.methods import method_class
    from anydepth.speculation.draft import Draft
    from anydepth.training.checkpoint import load_draft

    arguments = call.arguments
    target, against, options = arguments["target"], arguments["against"] or [], arguments["options"] or []
    share = opt.wanted_share(arguments["skip_share"], arguments["capacity"])
    if options and not against:
        raise UserError("--set is for the method that --against names; --capacity and --skip-share move thresholds")
    if against in ([DRAFT], [OLD_NAME]):  # The target's methods stay and decide in drafts.
        own = {name: value for name, value in opt.method_options(DRAFT, options).items() if name != "name"}
        adapted, tokenizer = call.load(target, merge=True, skip_share=share)
        return adapted, tokenizer, Draft(adapted, own) if own else load_draft(target, adapted, lossless=True)
    specs = [opt.method_options(name, options) for name in against]
    for name, (_, *chosen), spec in zip(against, specs, specs, strict=True):
        own = {option: spec[option] for option in chosen}
        refuse_training_only(name, validate(method_class(name, "--against").Config, own, where=name), own, fresh=True)
    adapted, tokenizer = call.load(target, merge=True, skip_share=share)
    if against:
        return attach(detach(adapted), specs), tokenizer, None
    return adapted, tokenizer, load_draft(target, adapted)


def _measure(call: opt.Call, adapted: Any, tokenizer: Any, engines: list[Any]) -> dict[str, Any]:
    """Return the fields of `anydepth.bench/1`: rows for each size and engine, and the queues of requests."""
    import torch

    from anydepth.decoding.engines import label_of
    from anydepth.measure.bench import batches_of, bench, load_prompts, rows_of
    from anydepth.measure.prompts import read_prompts
    from anydepth.measure.timing import throughput
    from anydepth.models.tokens import encode

    arguments, sizes = call.arguments, opt.numbers("batch-sizes", call.arguments["batch_sizes"])
    new_tokens, num_runs, num_requests = (arguments[key] for key in ("new_tokens", "num_runs", "requests"))
    shared: dict[str, Any] = {"batch_sizes": sizes, "new_tokens": new_tokens}
    said = {"on_row": lambda row: call.progress(f"  {_title(row)}: {_speed(row)}"), "say": call.progress}
    if arguments["prompts"] is not None:
        texts = read_prompts(arguments["prompts"], tokenizer)
        groups = [batches_of(adapted, tokenizer, texts, size, new_tokens) for size in sizes]
        rows = [row for batches in groups for row in rows_of(engines, batches, new_tokens, **said)]
        ids = [torch.tensor(encode(tokenizer, text)) for text in texts]
    else:
        lengths = opt.numbers("prompt-tokens", arguments["prompt_tokens"])
        windows = load_prompts(adapted, tokenizer, arguments["data"], lengths, new_tokens)
        rows = bench(engines, windows, prompt_tokens=lengths, num_runs=num_runs, **shared, **said)
        ids = [window[: lengths[0]] for window in windows]
    queues = []
    if num_requests is not None:
        queue = {"num_requests": num_requests, "num_runs": num_runs, **shared}
        queues = [row for each in engines for row in throughput(each, ids, **queue)]
    return {"label": label_of(*engines), "rows": rows, "queues": queues}


def _open(call: opt.Call) -> tuple[Any, Any, list[Any]]:
    """Load the model to bench and its tokenizer, and open its engines."""
    from anydepth.serve.opening import as_recorded, native_first

    target, engine, weights, compiled = (call.arguments[key] for key in ("target", "engine", "weights", "compiled"))
    engine, weights = as_recorded(target, engine, weights, call.dtype, call.device)
    call.arguments["engine"] = engine

    def open_as(weights: str | None) -> tuple[Any, Any, list[Any]]:
        call.arguments["weights"] = weights
        adapted, tokenizer, draft = _load(call)
        return adapted, tokenizer, _engines(call, adapted, draft)

    how: dict[str, Any] = {"engine": engine, "dtype": call.dtype, "device": call.device, "compiled": compiled}
    return native_first(open_as, target, weights, call.progress, **how)


def _engines(call: opt.Call, adapted: Any, draft: Any) -> list[Any]:
    """Open an engine for each kind of weights, after transformers where both are timed."""
    from anydepth.decoding.engines import ENGINES, HFEngine, open_engine
    from anydepth.models.load import NATIVE

    target, engine, weights, compiled = (call.arguments[key] for key in ("target", "engine", "weights", "compiled"))
    if not adapted.methods and draft is None and engine in ("auto", "hf"):
        raise UserError(
            f"{target} has no method attached; give a folder that train or search wrote, --against METHOD, or compare "
            "engines at full depth with --engine both"
        )
    if engine not in (*ENGINES, "both"):
        raise UserError(f"engine '{engine}' is unknown; bench takes {', '.join(ENGINES)} or both")
    one = "fast" if engine == "both" else engine
    kinds = weights.split(",") if weights else [None]
    if NATIVE in kinds and engine == "both":
        raise UserError("engine hf would dequantise native weights in every forward; leave --engine both out")
    chosen = [open_engine(adapted, one, kind, call.progress, draft=draft, compiled=compiled) for kind in kinds]
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
    if row["speedup"] is None:
        return _rates(row)
    return f"speed-up {wording.speedup(row, '×')} of {row['ideal_speedup']:.2f}"


def _rates(row: dict[str, Any]) -> str:
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


def _check_comparison(arguments: dict[str, Any]) -> None:
    """Raise `UserError` for options of `bench` that make several rows."""
    for name in ("batch_sizes", "prompt_tokens", "weights"):
        if "," in (arguments[name] or ""):
            raise UserError(f"--compare makes one table; give one value to --{name.replace('_', '-')}, not several")
    if arguments["engine"] == "both" or arguments["requests"] is not None:
        raise UserError("--compare makes one table, on one engine; leave out --engine both and --requests")


def _compare(call: opt.Call, adapted: Any, tokenizer: Any) -> dict[str, Any]:
    from anydepth.decoding.engines import open_engine
    from anydepth.measure.bench import batches_of, load_prompts
    from anydepth.measure.compare import compare, ways_of
    from anydepth.measure.prompts import read_prompts
    from anydepth.measure.timing import unpadded
    from anydepth.training.checkpoint import load_draft
    from anydepth.training.data import load_windows

    arguments = call.arguments
    data, new_tokens, compiled = (arguments[name] for name in ("data", "new_tokens", "compiled"))
    options = {"draft": load_draft(arguments["target"], adapted, lossless=True), "compiled": compiled}
    engine = open_engine(adapted, arguments["engine"], arguments["weights"], call.progress, **options)
    (size,) = opt.numbers("batch-sizes", arguments["batch_sizes"])
    if arguments["prompts"] is not None:
        batches = batches_of(adapted, tokenizer, read_prompts(arguments["prompts"], tokenizer), size, new_tokens)
    else:
        lengths = opt.numbers("prompt-tokens", arguments["prompt_tokens"] or PROMPT_TOKENS)
        texts = load_prompts(adapted, tokenizer, data, lengths, new_tokens).to(adapted.device)
        count = arguments["num_runs"] or COMPARED_RUNS
        batches = [unpadded(texts[[(run * size + row) % len(texts) for row in range(size)]]) for run in range(count)]
    length = min(SCORED_TOKENS, getattr(adapted.config, "max_position_embeddings", None) or SCORED_TOKENS)
    windows = load_windows(data, tokenizer, length, max_windows=SCORED_WINDOWS)
    rows = compare(ways_of(engine, call.progress), batches, windows, new_tokens, say=call.progress)
    return {"label": adapted.label, "rows": rows, "queues": []}


def show_comparison(document: dict[str, Any]) -> None:
    first = document["rows"][0]
    table(wording.WAYS, wording.ways(document))
    print(
        f"\n{first['num_runs']} runs of {first['new_tokens']} new tokens, batch {first['batch_size']}, in turn; median "
        "of paired ratios (least–greatest); ROUGE-L against the texts of full depth"
    )
