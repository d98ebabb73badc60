"""Commands that write text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from anydepth.cli.app import app
from anydepth.cli.display import Printer, show_text
from anydepth.cli.options import (
    Compiled,
    Device,
    DType,
    Engine,
    Json,
    MethodOptions,
    Quiet,
    Seed,
    Target,
    WeightKind,
    by_method,
)
from anydepth.errors import UserError


@app.command()
def generate(
    target: Target,
    prompt: Annotated[str, typer.Option(help="Text to go on from, or - for standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    show_depth: Annotated[bool, typer.Option("--show-depth", help="Colour each token by the layers it ran.")] = False,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="The text of full depth, faster: what the target's methods draft is verified."),
    ] = False,
    options: MethodOptions = None,
    engine: Engine = "auto",
    weights: WeightKind = None,
    compiled: Compiled = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Text, with the depth of every token."""
    from anydepth.inference.engine import choose
    from anydepth.inference.generate import generate as write
    from anydepth.measure.results import document
    from anydepth.training.checkpoint import load_target

    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    text = sys.stdin.read() if prompt == "-" else prompt
    adapted, tokenizer = load_target(
        target, dtype=dtype, device=device, merge=True, lossless=lossless, overrides=by_method(options)
    )
    printer = Printer(as_json, quiet)
    fast = choose(adapted, engine, weights, printer.progress, compiled=compiled)
    fields = write(
        adapted, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, engine=fast
    )
    config = {
        "target": target,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "dtype": dtype,
        "lossless": lossless,
        "options": options,
    }
    result = document("anydepth.generate/1", seed=seed, config=config, label=adapted.label, **fields)
    printer.result(result, lambda document: show_text(document, show_depth))
