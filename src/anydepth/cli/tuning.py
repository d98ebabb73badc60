"""The command that finds the fastest setting of a model within a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from anydepth.cli import options as opt
from anydepth.cli.display import table
from anydepth.errors import UserError
from anydepth.report import wording
from anydepth.training.corpora import check_corpus


@opt.command(without="seed")
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
    new_tokens: Annotated[int, Option(help="Generate this many tokens a prompt.")] = 64,
    batch_sizes: Annotated[str, Option(help="Be fast with batches of these sizes.")] = "1",
    minutes: Annotated[float, Option(help="End after about this many minutes.")] = 10.0,
    prompts: Annotated[
        Path | None, Option(help="Be fast with these prompts: JSON lines with prompt, turns (the first) or messages.")
    ] = None,
    data: opt.Data = "embedded:train",
) -> None:
    """Find the fastest way to run a model within a bound.

    Tries weights, drafting and what can be skipped, measures the fastest again on other prompts, and writes a folder
    that generate, chat, serve, bench and eval run as it is.
    """
    opt.check_out(out)
    opt.at_least(1, new_tokens=new_tokens)
    sizes = opt.numbers("batch-sizes", batch_sizes)
    lengths = opt.numbers("prompt-tokens", prompt_tokens or "64,512")
    if prompts is not None and prompt_tokens is not None:
        raise UserError("--prompts sets lengths; leave out --prompt-tokens")
    if minutes <= 0:
        raise UserError(f"--minutes is a number above 0, such as 10; got {minutes:g}")
    bounds = {"--lossless": lossless or None, "--max-perplexity-increase": max_perplexity_increase}
    bounds |= {"--max-risk": max_risk}
    given = [name for name, value in bounds.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} are different bounds; give one of them")
    if max_perplexity_increase is not None and not max_perplexity_increase > 0:
        raise UserError(f"--max-perplexity-increase is above 0, such as 0.02; got {max_perplexity_increase:g}")
    if max_risk is not None and not 0 < max_risk < 1:
        raise UserError(f"--max-risk is between 0 and 1, such as 0.05; got {max_risk:g}")
    check_corpus(data)
    from anydepth.runs.candidates import Bound
    from anydepth.runs.tune import Tuner

    bound = Bound(max_perplexity_increase, max_risk)
    shapes: dict[str, Any] = {"prompt_tokens": lengths, "new_tokens": new_tokens, "batch_sizes": sizes}
    shared = {"prompts": prompts, "dtype": call.dtype, "device": call.device, "say": call.progress}
    with call.busy(f"loading {target} …"):
        tuner = Tuner(target, bound, minutes=minutes, data=data, **shapes, **shared)
    fields = tuner.run()
    changes = {"lossless": bound.is_lossless, "prompt_tokens": lengths, "batch_sizes": sizes}
    result = call.document("tune", tuner.adapted, changes, **fields)
    tuner.write(out, result)
    call.result(result, lambda document: show_tuning(document, out))


SHOWN = wording.columns("label tokens_per_second speedup perplexity_increase agreement left", left="why not")


def show_tuning(document: dict[str, Any], out: Path) -> None:
    table(SHOWN, document["candidates"], {"speedup": lambda row: wording.speedup(row, "×")})
    chosen, confirmed, others = (document[key] for key in ("chosen", "confirmed", "baselines"))
    rate, speed = confirmed["tokens_per_second"], wording.speedup(confirmed, "×")
    print(
        f"\nfastest: {chosen['label']}, {wording.speedup(chosen, '×') or '1×'} full depth on the prompts that chose it"
    )
    print(f"on other prompts: {speed or '1×'}, {rate:.0f} tokens/s")
    if others["engine"] is not None:
        plain = others["transformers"]
        times = (confirmed["speedup"] or 1.0) / plain["speedup"]
        print(f"{times:.1f}× transformers, which has {plain['tokens_per_second']:.0f} tokens/s")
    print(f"{out} runs like this: anydepth chat {out}, anydepth serve {out}")
