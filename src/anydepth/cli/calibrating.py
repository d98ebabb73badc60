"""The command that sets thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.cli.app import app
from anydepth.cli.display import Printer, show_calibration
from anydepth.cli.options import Data, Device, DType, Engine, Json, Out, Quiet, Seed, Target
from anydepth.errors import UserError


@app.command()
def calibrate(
    target: Target,
    out: Out,
    target_speedup: Annotated[
        float | None, typer.Option(help="Skip just enough for it, measured on this machine: 1.3.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Skip as much as it allows, against full depth: 0.03. With a speed: its bound.")
    ] = None,
    data: Data = "embedded:train",
    num_windows: Annotated[int, typer.Option(help="Windows of text to calibrate on.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length of the timed generations.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens of the timed generations.")] = 64,
    num_runs: Annotated[int, typer.Option(help="Timed pairs per try.")] = 5,
    engine: Engine = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set a router's or gate's thresholds to a speed, or a bound on quality.

    Writes a checkpoint folder; refuses what cannot be reached, and says what can.
    """
    arguments = dict(locals())
    from anydepth.calibration.budget import collect_scores, find_budget, set_thresholds, thresholds_of
    from anydepth.inference.engine import choose
    from anydepth.measure.bench import load_prompts, paired_speedups
    from anydepth.measure.evaluate import evaluate
    from anydepth.measure.results import document, write_json
    from anydepth.training.checkpoint import has_adapter, load_target, read_manifest, save
    from anydepth.training.data import load_windows

    _check_bounds(target_speedup, max_perplexity_increase)
    printer = Printer(as_json, quiet)
    adapted, tokenizer = load_target(target, dtype=dtype, device=device)
    windows = load_windows(data, tokenizer, sequence_length, max_windows=num_windows)
    scores = collect_scores(adapted, windows)
    measures: dict[str, Any] = {}
    if target_speedup is not None:
        timed = adapted  # as it would be run: with a LoRA adapter folded into the weights
        if has_adapter(adapted):
            timed, _ = load_target(target, dtype=dtype, device=device, merge=True)
        fast = choose(timed, engine, None, printer.progress)
        prompts = load_prompts(timed, tokenizer, data, [prompt_tokens], new_tokens)[:num_runs]

        def speedups() -> list[float]:
            set_thresholds(timed, thresholds_of(adapted))
            return paired_speedups(timed, prompts, new_tokens, num_runs, fast)

        measures["speedup"] = speedups
    if max_perplexity_increase is not None:

        def increase() -> float:
            found = evaluate(adapted, windows)
            return found["perplexity"] / found["full_depth"]["perplexity"] - 1

        measures["perplexity_increase"] = increase

    def say(row: dict[str, float]) -> None:
        name, value = next((name, value) for name, value in row.items() if name != "share")
        printer.progress(f"  {row['share']:.0%} skipped: {name.replace('_', ' ')} {value:.3f}")

    found = find_budget(
        adapted,
        scores,
        target_speedup=target_speedup,
        max_perplexity_increase=max_perplexity_increase,
        on_try=say,
        **measures,
    )
    config = {name: value for name, value in arguments.items() if name not in ("as_json", "quiet")}
    base = read_manifest(Path(target))["base"]["target"]
    save(adapted, out, base=base, own_base=tokenizer if base is None else None)
    result = document(
        "anydepth.calibrate/1", seed=seed, config=config, label=adapted.label, met=True, **found.to_json()
    )
    write_json(out / "calibrate.json", result)
    printer.result(result, show_calibration)


def _check_bounds(target_speedup: float | None, max_perplexity_increase: float | None) -> None:
    if target_speedup is None and max_perplexity_increase is None:
        raise UserError("calibrate to what? give --target-speedup 1.3, --max-perplexity-increase 0.03, or both")
    if target_speedup is not None and target_speedup <= 1:
        raise UserError(f"--target-speedup is a factor above 1, such as 1.3; came {target_speedup:g}")
    if max_perplexity_increase is not None and max_perplexity_increase < 0:
        raise UserError(f"--max-perplexity-increase is a share of at least 0; came {max_perplexity_increase:g}")
