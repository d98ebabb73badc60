"""The command that finds the fastest setting of a model within a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from anydepth.cli import options as opt
from anydepth.cli.display import table
from anydepth.config import validate
from anydepth.errors import UserError
from anydepth.recipe import TuneConfig
from anydepth.report import wording
from anydepth.training.corpora import check_corpus

DEFAULTS = TuneConfig()


@opt.command(without=("seed",))
def tune(
    call: opt.Call,
    target: opt.Target,
    out: opt.Out,
    lossless: Annotated[
        bool, Option("--lossless", help="Keep every token of full depth in the file's own precision. The default.")
    ] = False,
    max_perplexity_increase: Annotated[
        float | None, Option(help="Allow this relative increase of perplexity: 0.02.")
    ] = None,
    max_risk: Annotated[
        float | None, Option(help="Allow texts this far from full depth (1 − ROUGE-L), shown at 95%: 0.05.")
    ] = None,
    prompt_tokens: Annotated[str | None, Option(help="Be fast with prompts of these lengths. Default: 64,512.")] = None,
    new_tokens: Annotated[int, Option(help="Generate this many tokens a prompt.")] = DEFAULTS.new_tokens,
    batch_sizes: Annotated[str, Option(help="Be fast with batches of these sizes.")] = "1",
    minutes: Annotated[float, Option(help="End after about this many minutes.")] = DEFAULTS.minutes,
    prompts: Annotated[
        Path | None, Option(help="Be fast with these prompts: JSON lines with prompt, turns (the first) or messages.")
    ] = None,
    data: opt.Data = DEFAULTS.data,
) -> None:
    """Find the fastest way to run a model within a bound.

    Tries weights, drafting and what can be skipped, measures the fastest again on other prompts, and writes a folder
    that generate, chat, serve, bench and eval run as it is.
    """
    opt.check_out(out)
    if lossless and (max_perplexity_increase is not None or max_risk is not None):
        raise UserError("--lossless allows nothing to differ; leave out the other bound")
    if prompts is not None and prompt_tokens is not None:
        raise UserError("--prompts sets lengths; leave out --prompt-tokens")
    given: dict[str, Any] = {
        "max_perplexity_increase": max_perplexity_increase,
        "max_risk": max_risk,
        "new_tokens": new_tokens,
        "batch_sizes": opt.numbers("batch-sizes", batch_sizes),
        "minutes": minutes,
        "data": data,
        "dtype": call.dtype,
        "prompts": None if prompts is None else str(prompts),
    }
    if prompt_tokens is not None:
        given["prompt_tokens"] = opt.numbers("prompt-tokens", prompt_tokens)
    config = validate(TuneConfig, given, where="tune")
    check_corpus(data)
    from anydepth.json_io import write_json
    from anydepth.runs.tune import Tuner

    with call.busy(f"loading {target} …"):
        tuner = Tuner(target, config, device=call.device, say=call.progress)
    result = call.document("tune", tuner.adapted, config.model_dump(), label=tuner.adapted.label, **tuner.run())
    tuner.write(out)
    write_json(out / "tune.json", result)
    call.result(result, lambda document: show_tuning(document, out))


def show_tuning(document: dict[str, Any], out: Path) -> None:
    table(wording.SETTINGS, wording.tuned(document), {"speedup": lambda row: wording.speedup(row, "×")})
    print()
    for line in wording.tuning(document):
        print(line)
    print(f"{out} runs like this: anydepth chat {out}, anydepth serve {out}")
