"""Commands that look at a model and measure it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.cli.analysis import show_analysis
from anydepth.cli.application import app
from anydepth.cli.display import (
    Printer,
    bench_line,
    show_bench,
    show_eval,
    show_inspection,
    show_methods,
)
from anydepth.cli.options import (
    Capacity,
    Compiled,
    Data,
    Device,
    DType,
    Engine,
    Json,
    MethodOptions,
    Quiet,
    Seed,
    SkipShare,
    Target,
    WeightKind,
    at_least,
    by_method,
    method_options,
    numbers,
    wanted_share,
)
from anydepth.draft_sections import DRAFT, OLD_NAME
from anydepth.errors import UserError


@app.command()
def inspect(
    target: Target,
    device: Device = "cpu",
    dtype: DType = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a model is made of, and what applies to it."""
    from anydepth.measure.inspect import inspect_model
    from anydepth.measure.results import document
    from anydepth.models.load import dtype_name
    from anydepth.training.checkpoint import load_target

    adapted, _ = load_target(target, dtype=dtype, device=device)
    fields = inspect_model(adapted)
    config = {"target": target, "dtype": dtype_name(adapted), "device": device}
    Printer(as_json, quiet).result(document("anydepth.inspect/1", seed=seed, config=config, **fields), show_inspection)


@app.command()
def methods(
    seed: Seed = 0, device: Device = "cpu", dtype: DType = "auto", as_json: Json = False, quiet: Quiet = False
) -> None:
    """Every method and its options."""
    from anydepth.measure.inspect import list_methods
    from anydepth.measure.results import document

    result = document("anydepth.methods/1", seed=seed, config={}, methods=list_methods())
    Printer(as_json, quiet).result(result, show_methods)


@app.command(name="eval")
def evaluate(
    target: Target,
    data: Data = "embedded:valid",
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    tasks: Annotated[
        str | None, typer.Option(help="Score lm-eval tasks as well: arc_easy,mmlu; local ones need no network.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompts of tasks; each has its own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first windows, and items of each task.")] = None,
    full_depth: Annotated[bool, typer.Option("--full-depth", help="Score the untouched model only.")] = False,
    exits: Annotated[bool, typer.Option("--exits", help="Score each layer too, as if it were the last.")] = False,
    bos: Annotated[
        str, typer.Option(help="What begins with a BOS if the tokenizer has one: per_window or per_document.")
    ] = "per_window",
    isolate_documents: Annotated[
        bool, typer.Option("--isolate-documents", help="Score each document without those before it.")
    ] = False,
    options: MethodOptions = None,
    skip_share: SkipShare = None,
    capacity: Capacity = None,
    engine: Engine = "hf",
    weights: WeightKind = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity with routing on, beside the untouched model."""
    from anydepth.config import validate
    from anydepth.decoding.engines import label_of, open_engine
    from anydepth.measure.evaluate import evaluate as score
    from anydepth.measure.evaluate import exit_losses
    from anydepth.measure.results import document
    from anydepth.models.load import dtype_name
    from anydepth.recipe import TextConfig
    from anydepth.training.checkpoint import load_draft, load_target
    from anydepth.training.corpora import check_corpus
    from anydepth.training.data import load_windows, num_tokens

    text = validate(TextConfig, {"bos": bos, "isolate_documents": isolate_documents}, where="eval")
    check_corpus(data)
    at_least("limit", limit, 1)
    at_least("num-fewshot", num_fewshot, 0)
    printer = Printer(as_json, quiet)
    names, share = _task_names(tasks) if tasks else [], wanted_share(skip_share, capacity)
    load: dict[str, Any] = {"dtype": dtype, "device": device, "overrides": by_method(options), "skip_share": share}
    adapted, tokenizer = load_target(target, **load)
    scorer = open_engine(adapted, engine, weights, printer.progress, draft=load_draft(target, adapted))
    if scorer.name != "hf" and exits:
        raise UserError("--exits runs the Hugging Face model; leave out --engine and --weights")
    if names:
        _check_windows(scorer, tokenizer, names)
    label = "full depth" if full_depth else label_of(scorer)
    windows = load_windows(data, tokenizer, sequence_length, max_windows=limit, text=text)
    printer.progress(f"scoring {num_tokens(windows)} tokens of {data} …")
    config = {
        "target": target,
        "data": data,
        "sequence_length": sequence_length,
        **text.model_dump(include={"bos", "isolate_documents"}),
        "limit": limit,
        "tasks": tasks,
        "num_fewshot": num_fewshot,
        "dtype": dtype_name(adapted),
        "full_depth": full_depth,
        "options": options,
        "skip_share": share,
        "engine": scorer.name,
        "weights": scorer.weights,
    }
    fields = score(scorer, windows, full_depth_only=full_depth, track=printer.track)
    if exits:
        fields["exits"] = exit_losses(adapted, windows)
    if names:
        say = None if quiet else printer.progress
        shared = {"num_fewshot": num_fewshot, "limit": limit, "seed": seed, "say": say}
        _add_tasks(fields, scorer, tokenizer, names, label, full_depth, **shared)
    printer.result(document("anydepth.eval/1", seed=seed, config=config, label=label, **fields), show_eval)


def _task_names(tasks: str) -> list[str]:
    """Names of lm-eval tasks; a mistake is told before anything is loaded."""
    try:
        from anydepth.measure.lm_eval import check_tasks
    except ImportError as error:
        raise UserError(f'--tasks needs lm-eval ({error}): pip install "anydepth[eval]"') from error

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    check_tasks(names)
    return names


def _check_windows(engine: Any, tokenizer: Any, names: list[str]) -> None:
    """Raise `UserError` for a task that the model's window is too small for; before anything is scored."""
    from anydepth.measure.lm_eval import check_windows

    check_windows(engine, tokenizer, names)


def _add_tasks(
    fields: dict[str, Any],
    engine: Any,
    tokenizer: Any,
    names: list[str],
    label: str,
    full_depth: bool,
    **options: Any,
) -> None:
    """Add scores of tasks, as attached and, under `full_depth`, of the untouched model."""
    from anydepth.measure.evaluate import engine_of_base, why_the_same
    from anydepth.measure.lm_eval import add_changes, score_tasks

    full = fields["full_depth"]
    with engine.adapted.untouched():
        full["tasks"] = score_tasks(engine_of_base(engine), tokenizer, names, **options, who="untouched")
    fields["tasks"] = full["tasks"]
    if not full_depth and why_the_same(engine) is None:
        fields["tasks"] = score_tasks(engine, tokenizer, names, **options, who=label)
    add_changes(fields["tasks"], full["tasks"])


@app.command()
def bench(
    target: Target,
    batch_sizes: Annotated[str, typer.Option(help="Rows generated together: 1,4,8.")] = "1",
    prompt_tokens: Annotated[str | None, typer.Option(help="Prompt lengths: 64,512; 64 if left out.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per row.")] = 64,
    num_runs: Annotated[
        int | None, typer.Option(help="Pairs per row, 5 if left out; up to three times as many while they vary.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Queue so many at once too: continuous batching, batch-sizes at a time.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="hf, fast, both in turn, or auto: fast if it can.")] = "auto",
    weights: Annotated[
        str | None, typer.Option("--weights", help="Of the fast engine, several with commas: bfloat16,int8.")
    ] = None,
    compiled: Compiled = False,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt, turns (the first) or messages; each batch is a pair.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Print one table of full depth, what is attached, lossless drafting and int8: perplexity, ROUGE-L, "
            "depth and speed.",
        ),
    ] = False,
    against: Annotated[list[str] | None, typer.Option(help="Bench a method on a base model: 'skip_set'.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="Its options: skip_layers=[5,9].")] = None,
    skip_share: SkipShare = None,
    capacity: Capacity = None,
    data: Data = "embedded:valid",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Paired wall-clock, full depth and adapted in turn."""
    arguments = dict(locals())
    import torch

    from anydepth.cli.comparison import check_comparison, compare_ways, show_comparison
    from anydepth.decoding.engines import label_of
    from anydepth.measure.bench import bench as time_pairs
    from anydepth.measure.bench import bench_prompts, load_prompts
    from anydepth.measure.prompts import read_prompts
    from anydepth.measure.results import document
    from anydepth.measure.throughput import throughput
    from anydepth.models.load import dtype_name
    from anydepth.models.tokens import encode
    from anydepth.training.corpora import check_corpus

    if prompts is not None and (prompt_tokens is not None or (num_runs is not None and requests is None)):
        raise UserError("--prompts brings lengths and pairs: leave out --prompt-tokens and --num-runs")
    at_least("num-runs", num_runs, 1)
    at_least("new-tokens", new_tokens, 1)
    if compare:
        check_comparison(arguments)
    prompt_tokens = "64" if prompt_tokens is None else prompt_tokens
    num_runs = 5 if num_runs is None else num_runs
    if prompts is None:
        check_corpus(data)
    printer = Printer(as_json, quiet)
    load: dict[str, Any] = {"dtype": dtype, "device": device, "skip_share": wanted_share(skip_share, capacity)}
    adapted, tokenizer, draft = _with_methods(target, against or [], options or [], load)
    config = {name: value for name, value in arguments.items() if name not in ("as_json", "quiet")}
    config["dtype"] = dtype_name(adapted)
    if compare:
        fields = compare_ways(arguments, adapted, tokenizer, printer)
        printer.result(document("anydepth.bench/1", seed=seed, config=config, **fields), show_comparison)
        return
    if not adapted.methods and draft is None and engine in ("auto", "hf"):
        raise UserError(
            f"{target} has no method attached; give a folder that train or search wrote, --against METHOD, or compare "
            "engines at full depth with --engine both"
        )
    sizes, lengths = numbers("batch-sizes", batch_sizes), numbers("prompt-tokens", prompt_tokens)
    engines = _engines(adapted, draft, engine, weights, compiled, printer.progress)
    at_least("requests", requests, 1)
    if prompts is None:
        config |= {"prompt_tokens": prompt_tokens, "num_runs": num_runs}
    elif requests is not None:
        config["num_runs"] = num_runs  # of the queue

    shared: dict[str, Any] = {
        "batch_sizes": sizes,
        "new_tokens": new_tokens,
        "on_row": lambda row: printer.progress(bench_line(row)),
        "say": printer.progress,
    }
    if prompts is not None:
        texts = read_prompts(prompts, tokenizer)
        rows = bench_prompts(engines, tokenizer, texts, **shared)
        ids = [torch.tensor(encode(tokenizer, text)) for text in texts]
    else:
        windows = load_prompts(adapted, tokenizer, data, lengths, new_tokens)
        rows = time_pairs(engines, windows, prompt_tokens=lengths, num_runs=num_runs, **shared)
        ids = [window[: lengths[0]] for window in windows]
    queue: dict[str, Any] = {"batch_sizes": sizes, "new_tokens": new_tokens, "num_runs": num_runs}
    queues = []
    if requests is not None:
        queues = [row for fast in engines for row in throughput(fast, ids, num_requests=requests, **queue)]
    result = document("anydepth.bench/1", seed=seed, config=config, label=label_of(*engines), rows=rows, queues=queues)
    printer.result(result, show_bench)


def _with_methods(target: str, against: list[str], options: list[str], load: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Load the model to bench, its tokenizer and what it drafts with: its own, or methods of the command line."""
    from anydepth.config import refuse_training_only, validate
    from anydepth.hf.adapted import attach, detach
    from anydepth.methods import method_class
    from anydepth.speculation.draft import Draft
    from anydepth.training.checkpoint import load_draft, load_target

    if options and not against:
        raise UserError("--set is for the method that --against names; --capacity and --skip-share move thresholds")
    if against in ([DRAFT], [OLD_NAME]):  # drafts with what the target has
        own = {name: value for name, value in method_options(DRAFT, options).items() if name != "name"}
        adapted, tokenizer = load_target(target, merge=True, **load)
        return adapted, tokenizer, Draft(adapted, own) if own else load_draft(target, adapted, lossless=True)
    specs = [method_options(name, options) for name in against]
    for name, (_, *chosen), spec in zip(against, specs, specs, strict=True):
        own = {option: spec[option] for option in chosen}
        refuse_training_only(name, validate(method_class(name, "--against").Config, own, where=name), own, fresh=True)
    adapted, tokenizer = load_target(target, merge=True, **load)
    draft = load_draft(target, adapted)
    if against:
        adapted, draft = attach(detach(adapted), specs), None
    return adapted, tokenizer, draft


def _engines(
    adapted: Any, draft: Any, engine: str, weights: str | None, compiled: bool, say: Callable[[str], None]
) -> list[Any]:
    """Open the engines to bench with: one for each kind of weights, after transformers where both are asked for."""
    from anydepth.decoding.engines import ENGINES, HFEngine, open_engine

    if engine not in (*ENGINES, "both"):
        raise UserError(f"engine '{engine}' is unknown; bench takes {', '.join(ENGINES)} or both")
    kinds = weights.split(",") if weights else [None]
    one = "fast" if engine == "both" else engine
    chosen = [open_engine(adapted, one, kind, say, draft=draft, compiled=compiled) for kind in kinds]
    return [HFEngine(adapted, draft), *chosen] if engine == "both" else chosen


@app.command()
def analyze(
    target: Target,
    data: Data = "embedded:valid",
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    limit: Annotated[int, typer.Option(help="Look at the first windows.")] = 16,
    compare: Annotated[
        list[str] | None, typer.Option(help="The same method from another seed: do their gates agree?")
    ] = None,
    permutations: Annotated[int, typer.Option(help="Of the test whether depth depends on the token.")] = 199,
    samples: Annotated[
        int, typer.Option(help="Correlate the depth of so many texts with length, perplexity and rarity; 0: leave out.")
    ] = 64,
    options: MethodOptions = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Depth by layer, token class, position and loss.

    And whether it depends on the token at all.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("as_json", "quiet")}
    from anydepth.decoding.engines import HFEngine, label_of
    from anydepth.measure.analyze import analyze as look
    from anydepth.measure.evaluate import why_the_same
    from anydepth.measure.results import document
    from anydepth.models.load import dtype_name
    from anydepth.training.checkpoint import load_draft, load_target
    from anydepth.training.corpora import check_corpus, load_texts
    from anydepth.training.data import load_windows

    check_corpus(data)
    at_least("permutations", permutations, 1)
    at_least("samples", samples, 0)
    at_least("limit", limit, 1)
    printer = Printer(as_json, quiet)
    adapted, tokenizer = load_target(target, dtype=dtype, device=device, overrides=by_method(options))
    arguments["dtype"] = dtype_name(adapted)
    engine = HFEngine(adapted, load_draft(target, adapted))
    if engine.differs and (why := why_the_same(engine)) is not None:
        raise UserError(f"{target} has no depth to analyze: {why}")
    others = [load_target(other, dtype=dtype, device=device)[0] for other in compare or []]
    for other, name in zip(others, compare or [], strict=True):
        if other.backbone.num_layers != adapted.backbone.num_layers:
            raise UserError(f"{name} has {other.backbone.num_layers} layers, {target} {adapted.backbone.num_layers}")
    windows = load_windows(data, tokenizer, sequence_length, max_windows=limit)
    texts = load_texts(data) if samples else []
    printer.progress(
        f"looking at {windows.numel()} tokens of {data}"
        + (f", and at up to {samples} texts of at most {sequence_length} tokens …" if samples else " …")
    )
    fields = look(
        adapted,
        tokenizer,
        windows,
        texts=texts,
        num_samples=samples,
        others=others,
        num_permutations=permutations,
        seed=seed,
        track=printer.track,
    )
    result = document("anydepth.analyze/1", seed=seed, config=arguments, label=label_of(engine), **fields)
    printer.result(result, show_analysis)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON documents, or folders of runs and sweeps.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """One self-contained page out of result documents.

    PNG and CSV stand beside it.
    """
    from anydepth.json_io import read_document
    from anydepth.report.page import write_report

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the page in it, such as {out / 'report.html'}")
    documents = []
    for path, name in zip(results, _told_apart(results), strict=True):
        found = _documents_in(path) if path.is_dir() else [path]
        documents += [{**read_document(one), "run" if path.is_dir() else "source": name} for one in found]
    written = write_report(documents, out)
    print(f"{out} and {len(written) - 1} files beside it")


def _told_apart(paths: list[Path]) -> list[str]:
    """The last parts of each path, as many as it takes."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _documents_in(folder: Path) -> list[Path]:
    """The whole of a sweep or run, or the stages that are there."""
    for whole in (folder / "sweep.json", folder / "run.json"):
        if whole.exists():
            return [whole]
    if (folder / "points").is_dir():
        raise UserError(f"{folder} is a sweep that has not come to its end; run it again, it goes on where it was")
    from anydepth.runs.run import STAGES

    found = [folder / f"{stage}.json" for stage in ("calibrate", *STAGES)]
    found = [path for path in found if path.exists()]
    if not found:
        raise UserError(f"{folder} holds no results; give a folder of run, sweep or train, or files that --json wrote")
    return found
