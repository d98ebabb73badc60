"""Commands that describe a model, the methods and the cache, and the one that scores: perplexity, and tasks."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from typer import Option

from anydepth.cli import options as opt
from anydepth.cli.display import table
from anydepth.config import validate
from anydepth.errors import UserError
from anydepth.recipe import TextConfig
from anydepth.report import wording
from anydepth.training.corpora import check_corpus


@opt.command()
def inspect(call: opt.Call, target: opt.Target, device: opt.Device = "cpu", dtype: opt.DType = "auto") -> None:
    """Show a model's layers, their cost, and what applies to it."""
    from anydepth.measure.inspect import inspect_model
    from anydepth.serve.opening import open_to_inspect
    from anydepth.training.checkpoint import run_options

    adapted = open_to_inspect(target, dtype=dtype, device=device)
    fields = {**inspect_model(adapted), "run": run_options(target)}
    call.result(call.document("inspect", adapted, **fields), show_inspection)


@opt.command(without=("seed", "device", "dtype", "threads"))
def methods(call: opt.Call) -> None:
    """List every method and its options."""
    from anydepth.measure.inspect import list_methods
    from anydepth.measure.results import document

    call.result(document("anydepth.methods/1", seed=call.seed, config={}, methods=list_methods()), show_methods)


@opt.command(without=("seed", "device", "dtype", "threads"))
def cache(
    call: opt.Call,
    clear: Annotated[
        bool, Option("--clear", help="Remove what is made again when it is needed; downloads and other files stay.")
    ] = False,
) -> None:
    """List all that is in the cache folder: models and kernels that are kept on this machine."""
    from dataclasses import asdict

    from anydepth.measure.results import document
    from anydepth.models.cache import entries, remove
    from anydepth.models.target import cache_folder

    found = entries()
    if clear:
        found = remove(found)
    rows = [{**asdict(entry), "path": str(entry.path)} for entry in found]
    fields = {"folder": str(cache_folder()), "entries": rows, "cleared": clear}
    call.result(document("anydepth.cache/1", seed=call.seed, config={"clear": clear}, **fields), show_cache)


def show_cache(document: dict[str, Any]) -> None:
    by_kind = Counter[str]()
    for entry in document["entries"]:
        by_kind[entry["kind"]] += entry["num_bytes"]
    for kind, size in by_kind.most_common():
        count = sum(entry["kind"] == kind for entry in document["entries"])
        stays = next(entry for entry in document["entries"] if entry["kind"] == kind)["stays"]
        print(f"  {kind}: {count}, {size / 2**20:.0f} MiB{', which --clear leaves' if stays else ''}")
    state = "removed from" if document["cleared"] else "in"
    print(f"{sum(by_kind.values()) / 2**20:.0f} MiB {state} {document['folder']}")


def show_inspection(document: dict[str, Any]) -> None:
    print(
        f"{document['family']}: {document['num_layers']} layers × {document['hidden_size']}, "
        f"{document['num_parameters'] / 1e6:.1f} M parameters, attention by {document['attention_implementation']}"
    )
    print(f"  weights: {_memory(document)}")
    kinds = Counter(
        tuple(layer[key] for key in ("mixer", "mixer_flops", "skipped_mixer_flops", "ffn_flops", "break_even_length"))
        for layer in document["layers"]
    )
    for (mixer, mixer_flops, skipped, ffn_flops, length), count in kinds.items():
        print(
            f"  {count} layers: {mixer} {mixer_flops / 1e6:.2f} MFLOP a token ({skipped / 1e6:.2f} where it is skipped "
            f"and leaves K/V), FFN {ffn_flops / 1e6:.2f} MFLOP"
            + (f"; a linear mixer costs less for texts longer than {length}" if length is not None else "")
        )
    print(f"attached: {', '.join(document['attached']) or 'nothing'}")
    if run := {key: value for key, value in document["run"].items() if value is not None}:
        print(
            "runs with: " + ", ".join("drafting" if key == "draft" else f"{key} {value}" for key, value in run.items())
        )
    for title in ("engines", "methods"):
        print(f"{title}: " + ", ".join(f"{name} ({state})" for name, state in document[title].items()))
    copies = [f"{kind} {size / 2**20:.0f} MiB" for kind, size in document["copy_bytes"].items()]
    if copies:
        print(f"in fewer bits, to run or to draft: {', '.join(copies)}")
    for note in document["notes"]:
        print(f"note: {note}")


def _memory(document: dict[str, Any]) -> str:
    """Return what the weights take in memory, as they are run and dense."""
    stored, dense = (f"{document[key] / 2**20:.0f} MiB" for key in ("weight_bytes", "dense_bytes"))
    if document["in_blocks"]:
        return (
            f"{stored} as they run, in the file's own blocks (--weights native); {dense} dense, in {document['dtype']}"
        )
    return f"{stored} in {document['dtype']}"


def show_methods(document: dict[str, Any]) -> None:
    for method in document["methods"]:
        print(
            f"{method['name']}: {method['summary']} ({'lossless' if method['lossless'] else 'lossy'}, "
            f"{'trained' if method['trained'] else 'not trained'})"
        )
        for key, option in method["options"].items():
            default = "required" if option["required"] else option["default"]
            print(f"    {key} = {default}: {option['help']}")


@opt.command("eval")
def evaluate(
    call: opt.Call,
    target: opt.Target,
    data: opt.Data = "embedded:valid",
    sequence_length: opt.SequenceLength = 1024,
    tasks: Annotated[
        str | None, Option(help="Score lm-eval tasks as well: arc_easy,mmlu; local ones need no network.")
    ] = None,
    num_fewshot: Annotated[
        int | None, Option(help="Put this many examples into the prompts of tasks; default: each task's own.")
    ] = None,
    limit: Annotated[int | None, Option(help="Score only the first windows, and items of each task.")] = None,
    full_depth: Annotated[bool, Option("--full-depth", help="Score only the base model.")] = False,
    exits: Annotated[bool, Option("--exits", help="Score each layer too, as if it were the last.")] = False,
    bos: Annotated[
        str,
        Option(help="Begin each window or document with a BOS if the model has one: per_window, per_document."),
    ] = "per_window",
    isolate_documents: Annotated[
        bool, Option("--isolate-documents", help="Score each document without those before it.")
    ] = False,
    prompt_tokens: Annotated[
        int, Option(help="Read this many tokens of each window as a prompt, and score those after it.")
    ] = 0,
    options: opt.MethodOptions = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    engine: Annotated[
        str | None, Option("--engine", help="Score on hf, fast, or auto. Default: as the folder records, else hf.")
    ] = None,
    weights: opt.WeightKind = None,
) -> None:
    """Score perplexity with routing on, next to the base model."""
    from anydepth.decoding.engines import label_of
    from anydepth.measure import evaluate as scoring
    from anydepth.training.data import load_windows, num_tokens

    text = validate(TextConfig, {"bos": bos, "isolate_documents": isolate_documents}, where="eval")
    check_corpus(data)
    opt.at_least(1, limit=limit)
    opt.at_least(0, num_fewshot=num_fewshot, prompt_tokens=prompt_tokens)
    scoring.check_prompt(prompt_tokens, sequence_length)
    names, load = _task_names(tasks), opt.load_options(call.arguments)
    scorer, tokenizer = _scorer(call, load)
    _check_windows(scorer, tokenizer, names)
    label = "full depth" if full_depth else label_of(scorer)
    windows = load_windows(data, tokenizer, sequence_length, max_windows=limit, text=text)
    call.progress(f"scoring {num_tokens(windows)} tokens of {data} …")
    fields = scoring.evaluate(
        scorer, windows, full_depth_only=full_depth, prompt_tokens=prompt_tokens, track=call.track
    )
    if exits:
        fields["exits"] = scoring.exit_losses(scorer.adapted, windows)
    if names:
        say = None if call.quiet else call.progress
        shared = {"tokenizer": tokenizer, "names": names, "num_fewshot": num_fewshot, "limit": limit, "say": say}
        _add_tasks(fields, scorer, label, full_depth, {**shared, "seed": call.seed})
    changes = {"skip_share": load["skip_share"], "engine": scorer.name, "weights": scorer.weights}
    call.result(call.document("eval", scorer.adapted, changes, label=label, **fields), show_eval)


def _scorer(call: opt.Call, load: dict[str, Any]) -> tuple[Any, Any]:
    """Open the engine that scores, and return it with the tokenizer: as given, as the folder records, else hf."""
    from anydepth.decoding.engines import open_engine
    from anydepth.serve.opening import as_recorded
    from anydepth.training.checkpoint import load_draft

    target, given, exits = (call.arguments[name] for name in ("target", "engine", "exits"))
    default = "hf" if exits else "auto"
    engine, weights = as_recorded(target, given or default, call.arguments["weights"], call.dtype, call.device)
    if given is None and engine == "auto" and weights is None:
        engine = "hf"
    call.arguments["weights"] = weights
    adapted, tokenizer = call.load(target, **load)
    scorer = open_engine(adapted, engine, weights, call.progress, draft=load_draft(target, adapted))
    if scorer.name != "hf" and exits:
        raise UserError("--exits runs the Hugging Face model; leave out --engine and --weights")
    return scorer, tokenizer


def _task_names(tasks: str | None) -> list[str]:
    """Return the names of lm-eval tasks. Raise `UserError` for an unknown one before anything is loaded."""
    if not tasks:
        return []
    try:
        from anydepth.measure.lm_eval import check_tasks
    except ImportError as error:
        raise UserError(f'--tasks needs lm-eval ({error}): pip install "anydepth[eval]"') from error

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    check_tasks(names)
    return names


def _check_windows(engine: Any, tokenizer: Any, names: list[str]) -> None:
    """Raise `UserError` for tasks with requests that do not fit the model's window, before text is scored."""
    if names:
        from anydepth.measure.lm_eval import check_windows

        check_windows(engine, tokenizer, names)


def _add_tasks(fields: dict[str, Any], engine: Any, label: str, full_depth: bool, options: dict[str, Any]) -> None:
    from anydepth.measure.evaluate import engine_of_base, why_the_same
    from anydepth.measure.lm_eval import add_changes, score_tasks

    full = fields["full_depth"]
    with engine.adapted.untouched():
        full["tasks"] = score_tasks(engine_of_base(engine), **options, who="base model")
    fields["tasks"] = full["tasks"]
    if not full_depth and why_the_same(engine) is None:
        fields["tasks"] = score_tasks(engine, **options, who=label)
    add_changes(fields["tasks"], full["tasks"])


def show_eval(document: dict[str, Any]) -> None:
    full, note = document["full_depth"], document.get("note")
    parts = {"base model": full, "full depth, LoRA on": document.get("full_depth_adapted")}
    if not note:
        parts[document["label"]] = document
    rows = [{**part, "label": label} for label, part in parts.items() if part is not None]
    columns = wording.columns("label perplexity loss agreement mean_depth layer_token_share gflops_per_token")
    table(columns, rows)
    spread = "; in brackets 95%, from how windows differ" if full["perplexity_interval"] else ""
    print(f"\n{document['num_tokens']} tokens scored{spread}" + (f"; {document['label']}: {note}" if note else ""))
    for method, share in document.get("skip_share", {}).items():
        print(f"{method} skips {share:.1%} of its decisions here")
    if "tasks" in document:
        _show_tasks(document)
    if "exits" in document:
        print()
        table(wording.columns("layers loss agreement"), document["exits"])


def _show_tasks(document: dict[str, Any]) -> None:
    from anydepth.measure.results import task_rows

    changed = any("changes" in task for task in document["tasks"].values())
    keys = "task metric num_items full" + (" score change layer_token_share" if changed else "")
    print()
    table(wording.columns(keys, full="base model", score=document["label"]), task_rows(document))
    print("± one standard error; of the change over the same items")
