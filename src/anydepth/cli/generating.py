"""Commands that write text."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from anydepth.cli.application import app
from anydepth.cli.display import Printer, depth_legend, shade_of, show_text
from anydepth.cli.options import (
    Capacity,
    Compiled,
    Device,
    DType,
    Engine,
    GenerationDefaults,
    Json,
    MethodOptions,
    Quiet,
    Seed,
    SkipShare,
    Target,
    WeightKind,
    by_method,
    wanted_share,
)
from anydepth.errors import UserError

CHAT_TEMPERATURE = 0.7


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
    skip_share: SkipShare = None,
    capacity: Capacity = None,
    engine: Engine = "auto",
    weights: WeightKind = None,
    generation_config: GenerationDefaults = "auto",
    compiled: Compiled = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Text, with the depth of every token."""
    from anydepth.decoding.engines import label_of, open_engine
    from anydepth.decoding.sampling_options import check_source, told_of_generate, use_defaults
    from anydepth.decoding.text import generate_text
    from anydepth.measure.results import document
    from anydepth.models.load import dtype_name
    from anydepth.training.checkpoint import load_draft, load_target

    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    check_source(generation_config)
    text = sys.stdin.read() if prompt == "-" else prompt
    printer, share = Printer(as_json, quiet), wanted_share(skip_share, capacity)
    own = by_method(options)
    load: dict[str, Any] = {"dtype": dtype, "device": device, "overrides": own, "skip_share": share}
    with printer.busy(f"loading {target} …"):
        adapted, tokenizer = load_target(target, merge=True, **load)
        draft = load_draft(target, adapted, lossless=lossless, options=own.get("draft"))
        use_defaults(adapted.generation_config, generation_config)
        writer = open_engine(adapted, engine, weights, printer.progress, draft=draft, compiled=compiled)
    if writer.drafts and not writer.is_bitwise:
        printer.progress(
            "verified by transformers' operators, where rounding can decide a near tie otherwise than at full depth; "
            "for the same tokens in any case: --dtype float32, or --engine fast"
        )
    if line := told_of_generate(adapted.generation_config, temperature):
        printer.progress(line)
    shared: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with printer.busy("writing …"):
        fields = generate_text(writer, tokenizer, text, **shared)
    config = {
        "target": target,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "dtype": dtype_name(adapted),
        "lossless": lossless,
        "generation_config": generation_config,
        "options": options,
        "engine": writer.name,
        "weights": writer.weights,
        "skip_share": share,
    }
    result = document("anydepth.generate/1", seed=seed, config=config, label=label_of(writer), **fields)
    printer.result(result, lambda document: show_text(document, show_depth))
    drafted = result.get("mean_acceptance_length")
    a_round = f", {drafted:.2f} a verification" if drafted else ""
    printer.progress(f"{len(result['token_ids'])} tokens, {result['tokens_per_second']:.1f} per second{a_round}")


@app.command()
def chat(
    target: Target,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help=f"0 is greedy. Default: the model's own, else {CHAT_TEMPERATURE}.")
    ] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Draft and verify: the answers of full depth.")] = False,
    generation_config: GenerationDefaults = "auto",
    options: MethodOptions = None,
    skip_share: SkipShare = None,
    capacity: Capacity = None,
    weights: WeightKind = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk with a model, each word coloured by its depth.

    An empty line or Ctrl-D ends it; Ctrl-C ends an answer.
    """
    from anydepth.decoding.engines import FastEngine
    from anydepth.decoding.sampling_options import check_source, defaults_of, told, use_defaults
    from anydepth.serve.service import Service
    from anydepth.serve.talk import Talk
    from anydepth.training.checkpoint import load_draft, load_target

    if temperature is not None and temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    check_source(generation_config)
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens is {max_new_tokens}; it must be at least 1")
    share = wanted_share(skip_share, capacity)
    own = by_method(options)
    load: dict[str, Any] = {"dtype": dtype, "device": device, "overrides": own, "skip_share": share}
    printer = Printer(False, quiet)
    with printer.busy(f"loading {target} …"):
        adapted, tokenizer = load_target(target, merge=True, **load)
        if tokenizer.chat_template is None:
            raise UserError(f"{target} has no chat template; use generate for models that were not trained to talk")
        use_defaults(adapted.generation_config, generation_config)
        draft = load_draft(target, adapted, lossless=lossless, options=own.get("draft"))
        service = Service(FastEngine(adapted.eval(), weights, draft=draft), tokenizer, max_batch_size=1)
    if line := told(adapted.generation_config):
        printer.progress(line)
    if temperature is None:
        temperature = defaults_of(adapted.generation_config).get("temperature", CHAT_TEMPERATURE)
    talk = Talk(service, tokenizer, system, max_new_tokens, temperature, lossless=lossless, seed=seed)
    console, num_layers = Console(highlight=False), adapted.backbone.num_layers
    if console.is_terminal and not quiet:
        console.print(depth_legend(num_layers))
    try:
        while line := _line(console):
            try:
                for text, depth in talk.answer(line):
                    console.print(Text(text, style=shade_of(depth, num_layers)), end="", soft_wrap=True)
            except KeyboardInterrupt:
                console.print(" …", end="")
            console.print()
    finally:
        service.close()


def _line(console: Console) -> str:
    """What somebody types; empty at the end."""
    try:
        return (console.input("[bold]> [/bold]") if console.is_terminal else sys.stdin.readline()).strip()
    except (EOFError, KeyboardInterrupt):
        return ""
