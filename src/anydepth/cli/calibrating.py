"""The command that sets thresholds."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from anydepth.cli import options as opt
from anydepth.cli.display import table
from anydepth.errors import UserError
from anydepth.report import wording
from anydepth.training.corpora import check_corpus, validation_of

# Options of `--max-risk`.
MaxRisk = Annotated[
    float | None,
    Option(help="Skip as much as keeps the risk on generated text below this bound, with confidence: 0.05."),
]
Risk = Annotated[str, Option(help="Bound the risk of consistency, quality (prompts with references) or difference.")]
PerExit = Annotated[bool, Option("--per-exit", help="With --max-risk: give each exit of early_exit its own threshold.")]
Test = Annotated[
    str | None,
    Option(help="With --max-risk: test by fixed-sequence (default), to the first failure, or by bonferroni, all."),
]


@opt.command()
def calibrate(
    call: opt.Call,
    target: opt.Target,
    out: opt.Out,
    target_speedup: Annotated[
        float | None, Option(help="Skip just enough for this speed-up, measured on this machine: 1.3.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        Option(help="Skip as much as this bound allows, against full depth: 0.03. Bounds --target-speedup too."),
    ] = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    sweep: Annotated[
        str | None,
        Option(help="Measure speed and perplexity at these capacities, and leave the thresholds: 0.9,0.7,0.5."),
    ] = None,
    max_risk: MaxRisk = None,
    confidence: Annotated[float, Option(help="Keep the bound with this confidence: 0.95.")] = 0.95,
    risk: Risk = "consistency",
    per_exit: PerExit = False,
    test: Test = None,
    prompts: Annotated[
        Path | None, Option(help="Bound the risk on these prompts, JSON lines; default: prompts cut from --data.")
    ] = None,
    num_prompts: Annotated[int, Option(help="Bound the risk on this many prompts.")] = 100,
    data: opt.Data = "embedded:train",
    held_out: Annotated[
        str | None,
        Option(help="Measure quality on this text; default: the valid split of --data, or its text after the windows."),
    ] = None,
    num_windows: opt.NumWindows = 8,
    sequence_length: opt.SequenceLength = 256,
    prompt_tokens: Annotated[int, Option(help="Time generations from prompts of this length.")] = 64,
    new_tokens: Annotated[int, Option(help="Time generations of this many tokens.")] = 64,
    num_runs: Annotated[int, Option(help="Time this many pairs per try.")] = 5,
    engine: opt.Engine = "auto",
) -> None:
    """Set thresholds by a speed, a bound or a skipped fraction.

    Writes a checkpoint folder; fails where a bound is out of reach, and reports what is within reach. With --max-risk
    nothing is skipped where no setting can be shown to keep the bound. The folder keeps score quantiles, so that any
    --capacity can be set later; thresholds of early_exit are written to its thresholds.json as well.
    """
    opt.check_out(out)
    counts = {"num_prompts": num_prompts, "num_windows": num_windows, "num_runs": num_runs}
    opt.at_least(1, **counts, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    opt.at_least(2, sequence_length=sequence_length)
    check_corpus(data)
    if max_risk is None:
        _meet_bounds(call)
        return
    if any(value is not None for value in (target_speedup, max_perplexity_increase, skip_share, capacity, sweep)):
        raise UserError("--max-risk is a bound of its own; give it without --target-speedup and the other bounds")
    _bound_risk(call)


def _meet_bounds(call: opt.Call) -> None:
    """Calibrate to a speed, a bound on perplexity or a skipped fraction, or measure several capacities."""
    arguments = call.arguments
    if arguments["per_exit"] or arguments["test"] is not None:
        raise UserError("--per-exit and --test belong to --max-risk; add it, or leave them out")
    share = opt.wanted_share(arguments["skip_share"], arguments["capacity"])
    capacities = None if arguments["sweep"] is None else opt.capacities_of(arguments["sweep"])
    bounds = {name: arguments[name] for name in ("target_speedup", "max_perplexity_increase")}
    _check_bounds(**bounds, num_others=(share is not None) + (capacities is not None))
    arguments["held_out"] = arguments["held_out"] or validation_of(arguments["data"])
    if arguments["held_out"] is not None:
        check_corpus(arguments["held_out"])
    from anydepth.measure.calibrate import Calibration

    calibration = Calibration.load(arguments, call.progress)
    if capacities is not None:
        fields = calibration.sweep(capacities)
    elif share is not None:
        fields = calibration.to_share(share)
    else:
        fields = calibration.to_bounds(**bounds)
    for line in fields["warnings"]:
        call.progress(f"warning: {line}")
    _finish(call, calibration.adapted, calibration.tokenizer, fields)


def _finish(call: opt.Call, adapted: Any, tokenizer: Any, fields: dict[str, Any]) -> None:
    from anydepth.calibration.shares import options_of
    from anydepth.json_io import write_json
    from anydepth.methods.early_exit import EarlyExit
    from anydepth.training.checkpoint import is_checkpoint, load_draft, own_base, run_options, save

    target, out = call.arguments["target"], call.arguments["out"]
    has_own_base = is_checkpoint(target) and own_base(target) is not None
    draft = load_draft(target, adapted)
    save(adapted, out, own_base=tokenizer if has_own_base else None, draft=draft, run=run_options(target))
    thresholds, exits_file = options_of(adapted), out / "thresholds.json"
    exits_file.unlink(missing_ok=True)  # An earlier calibration can have left one.
    if EarlyExit.name in thresholds:
        exits: Any = adapted.methods[EarlyExit.name]
        limits = exits.thresholds_of(exits.config)
        write_json(exits_file, {"layers": list(limits), "thresholds": list(limits.values())})
    fields |= {"thresholds": thresholds, "label": adapted.label}
    result = call.document("calibrate", adapted, **fields)
    write_json(out / "calibrate.json", result)
    call.result(result, show_calibration)


def _bound_risk(call: opt.Call) -> None:
    from anydepth.calibration.exits import collect_exit_scores, exit_settings
    from anydepth.calibration.guarantee import TESTS, bound_risk, check_bounds, least_sequences, shared_settings
    from anydepth.calibration.shares import collect_scores, keep_scores, set_thresholds, thresholds_of
    from anydepth.decoding.engines import open_engine
    from anydepth.measure.calibrate import check_decides
    from anydepth.training.checkpoint import has_adapter, load_draft

    options, target = call.arguments, call.arguments["target"]
    bounds: dict[str, Any] = {name: options[name] for name in ("max_risk", "confidence", "risk")}
    bounds["test"] = options["test"] or TESTS[0]
    check_bounds(**bounds)
    adapted, tokenizer = call.load(target)
    check_decides(load_draft(target, adapted), target)
    # Risk is measured with a LoRA adapter merged, as the model is run, but the adapter is saved unmerged.
    merged = call.load(target, merge=True)[0] if has_adapter(adapted) else adapted
    windows, prompts, references = _risk_texts(options, tokenizer)
    scores = collect_scores(merged, windows)
    keep_scores(adapted, scores)
    per_exit = options["per_exit"]
    settings = exit_settings(collect_exit_scores(merged, windows)) if per_exit else shared_settings(scores)
    found = bound_risk(
        open_engine(merged, options["engine"], None, call.progress),
        settings,
        prompts,
        new_tokens=options["new_tokens"],
        **bounds,
        references=references,
        on_test=lambda row: call.progress(
            f"  setting {row['setting']:.0f}: risk {row['risk']:.3f}, p {row['p_value']:.3g}"
        ),
    )
    set_thresholds(adapted, thresholds_of(merged))
    if not found.met:
        num_tests = len(settings) if bounds["test"] == "bonferroni" else 1
        least = least_sequences(options["max_risk"], options["confidence"], num_tests)
        why = f"{len(prompts)} sequences are fewer than the {least} that any bound of this kind needs"
        few = len(prompts) < least
        call.progress(f"nothing is skipped: {why if few else 'no setting could be shown to keep the bound'}")
    risk = None if math.isnan(found.risk) else found.risk
    _finish(call, adapted, tokenizer, {**asdict(found), "met": found.met, "risk": risk})


def _risk_texts(options: dict[str, Any], tokenizer: Any) -> tuple[Any, list[Any], list[list[int]] | None]:
    """Return windows for scores, and prompts drawn at random from other text, with their references if any."""
    import torch

    from anydepth.measure.prompts import read_prompts, read_references
    from anydepth.models.tokens import encode
    from anydepth.training.data import load_windows

    generator = torch.Generator().manual_seed(options["seed"])
    data, count, num_windows = options["data"], options["num_prompts"], options["num_windows"]
    if options["prompts"] is not None:
        texts = read_prompts(options["prompts"], tokenizer)
        order = torch.randperm(len(texts), generator=generator)[:count].tolist()
        references = read_references(options["prompts"], tokenizer, len(texts))
        prompts = [torch.tensor(encode(tokenizer, texts[i])) for i in order]
        windows = load_windows(data, tokenizer, options["sequence_length"], max_windows=num_windows)
        return windows, prompts, None if references is None else [references[i] for i in order]
    length = options["prompt_tokens"]
    pieces = load_windows(data, tokenizer, length)
    num_scored = max(num_windows * options["sequence_length"] // length, 1)
    pieces = pieces[torch.randperm(len(pieces), generator=generator)]
    if len(pieces) <= num_scored:
        raise UserError(
            f"{data} has {len(pieces)} pieces of {length} tokens, and {num_scored + 1} are needed; give more text"
        )
    return pieces[:num_scored], list(pieces[num_scored : num_scored + count]), None


def _check_bounds(target_speedup: float | None, max_perplexity_increase: float | None, num_others: int) -> None:
    is_bounded = target_speedup is not None or max_perplexity_increase is not None
    if is_bounded + num_others != 1:
        raise UserError(
            "calibrate takes --target-speedup 1.3, --max-perplexity-increase 0.03 or both; or one of --skip-share 0.4, "
            "--sweep 0.9,0.7,0.5 and --max-risk 0.05"
        )
    if target_speedup is not None and not 1 < target_speedup < math.inf:
        raise UserError(f"--target-speedup is a factor above 1, such as 1.3; got {target_speedup:g}")
    if max_perplexity_increase is not None and not 0 <= max_perplexity_increase < math.inf:
        raise UserError(f"--max-perplexity-increase is a fraction of at least 0; got {max_perplexity_increase:g}")


def show_calibration(document: dict[str, Any]) -> None:
    for name, threshold in document["thresholds"].items():
        values = threshold if isinstance(threshold, list) else [threshold]
        print(f"{name}: threshold {', '.join(f'{float(value):.4g}' for value in values)}")
    if "p_value" in document:
        print(wording.risk(document))
        return
    if "sweep" in document:
        _show_capacities(document)
        return
    for text in wording.skipped(document):
        print(text)
    if document["speedup"] is not None:
        print(f"speed-up: {wording.speedup(document, '×')}: median of new pairs and its 95% interval")
    if document["perplexity_increase"] is not None:
        print(f"perplexity: {document['perplexity_increase']:+.1%} against the same model at full depth")
    held_out = document["held_out"]
    print(
        f"perplexity of held-out text: {held_out['perplexity']:.4g}, {held_out['perplexity_increase']:+.1%} against "
        f"{held_out['full_depth_perplexity']:.4g} of the same model at full depth (base model: "
        f"{held_out['untouched_perplexity']:.4g})"
    )


def _show_capacities(document: dict[str, Any]) -> None:
    table(wording.CAPACITIES, wording.capacities(document), {"speedup": wording.speedup})
    engine = document["engine"]
    print(
        f"speed-up over full depth on engine {engine['engine']} {engine['weights']}; {wording.SPREAD}\n"
        "increase over the same model at full depth, in brackets 95%"
    )
