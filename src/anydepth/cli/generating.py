"""Commands that generate text."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from anydepth.cli import options as opt
from anydepth.cli.application import app
from anydepth.cli.display import Printer
from anydepth.errors import UserError

CHAT_TEMPERATURE = 0.7
SHADES = ("#1b7837", "#7fbf7b", "#b8860b", "#d6604d", "#b2182b")
"""Colours of tokens, from shallow to deep."""


@app.command()
def generate(
    target: opt.Target,
    prompt: Annotated[str, typer.Option(help="Continue this text; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 64,
    temperature: opt.Temperature = 0.0,
    show_depth: Annotated[bool, typer.Option("--show-depth", help="Colour each token by the layers it ran.")] = False,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", help="Generate the text of full depth, faster: the target's methods draft, all layers verify."
        ),
    ] = False,
    options: opt.MethodOptions = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    engine: opt.Engine = "auto",
    weights: opt.WeightKind = None,
    generation_config: opt.GenerationDefaults = "auto",
    compiled: opt.Compiled = False,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Generate text, with the depth of every token."""
    arguments = dict(locals())
    from anydepth.decoding.engines import label_of, open_engine
    from anydepth.decoding.generate import generate_text
    from anydepth.decoding.sampling_options import check_source, told_of_generate, use_defaults
    from anydepth.measure.results import document
    from anydepth.training.checkpoint import load_draft, load_target

    opt.check_temperature(temperature)
    check_source(generation_config)
    text = sys.stdin.read() if prompt == "-" else prompt
    printer, load = Printer(as_json, quiet), opt.load_options(arguments)
    with printer.busy(f"loading {target} …"):
        adapted, tokenizer = load_target(target, merge=True, **load)
        draft = load_draft(target, adapted, lossless=lossless, options=load["overrides"].get("draft"))
        use_defaults(adapted.generation_config, generation_config)
        writer = open_engine(adapted, engine, weights, printer.progress, draft=draft, compiled=compiled)
    if writer.drafts and not writer.is_bitwise:
        printer.progress(
            "verified by transformers' operators, where rounding can decide a near tie differently than at full depth; "
            "--dtype float32 or --engine fast always gives the same tokens"
        )
    if line := told_of_generate(adapted.generation_config, temperature):
        printer.progress(line)
    shared: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with printer.busy("generating …"):
        fields = generate_text(writer, tokenizer, text, **shared)
    recorded = ("target", "max_new_tokens", "temperature", "lossless", "generation_config", "options")
    measured = {"engine": writer.name, "weights": writer.weights, "skip_share": load["skip_share"]}
    config = opt.config_of(arguments, adapted, *recorded, **measured)
    result = document("anydepth.generate/1", seed=seed, config=config, label=label_of(writer), **fields)
    printer.result(result, lambda document: show_text(document, show_depth))
    drafted = result.get("mean_acceptance_length")
    accepted = f", {drafted:.2f} a verification" if drafted else ""
    printer.progress(f"{len(result['token_ids'])} tokens, {result['tokens_per_second']:.1f} per second{accepted}")


@app.command()
def chat(
    target: opt.Target,
    system: Annotated[str | None, typer.Option(help="Begin with this system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            help=f"Sample at this temperature; 0 is greedy. Default: the model's own, else {CHAT_TEMPERATURE}."
        ),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Draft and verify, for the answers of full depth.")
    ] = False,
    generation_config: opt.GenerationDefaults = "auto",
    options: opt.MethodOptions = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    weights: opt.WeightKind = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    quiet: opt.Quiet = False,
) -> None:
    """Talk with a model, each word coloured by its depth.

    An empty line or Ctrl-D ends it; Ctrl-C ends an answer.
    """
    arguments = dict(locals())
    from anydepth.decoding.engines import open_engine
    from anydepth.decoding.sampling_options import check_source, defaults_of, told, use_defaults
    from anydepth.serve.service import Service
    from anydepth.serve.talk import Talk
    from anydepth.training.checkpoint import load_draft, load_target

    opt.check_temperature(temperature)
    check_source(generation_config)
    opt.at_least(1, max_new_tokens=max_new_tokens)
    printer, load = Printer(False, quiet), opt.load_options(arguments)
    with printer.busy(f"loading {target} …"):
        adapted, tokenizer = load_target(target, merge=True, **load)
        if tokenizer.chat_template is None:
            raise UserError(f"{target} has no chat template; use generate for models that are not trained for chat")
        use_defaults(adapted.generation_config, generation_config)
        draft = load_draft(target, adapted, lossless=lossless, options=load["overrides"].get("draft"))
        engine = open_engine(adapted.eval(), "auto", weights, printer.progress, draft=draft)
        service = Service(engine, tokenizer, max_batch_size=1)
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
    """Return a typed line; an empty one at the end of the input."""
    try:
        return (console.input("[bold]> [/bold]") if console.is_terminal else sys.stdin.readline()).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def shade_of(depth: float, num_layers: int) -> str:
    """Return the colour of a token by its number of layers."""
    return SHADES[max(math.ceil(depth / num_layers * len(SHADES)), 1) - 1]


def depth_legend(num_layers: int) -> Text:
    """Return the colours with their depths."""
    legend = Text("layers run: ")
    for number, shade in enumerate(SHADES):
        legend.append(f"≤{round((number + 1) * num_layers / len(SHADES))} ", style=shade)
    return legend


def show_text(document: dict[str, Any], show_depth: bool) -> None:
    """Print the text of `generate`, coloured or followed by its depths if `show_depth`."""
    if not show_depth:
        print(document["text"])
        return
    num_layers = document["num_layers"]
    text = Text()
    for token, depth in zip(document["tokens"], document["depths"], strict=True):
        text.append(token, style=shade_of(depth, num_layers))
    console = Console()
    console.print(text, soft_wrap=True)
    if console.is_terminal:
        console.print(depth_legend(num_layers))
    else:
        print("depths:", " ".join(f"{depth:g}" for depth in document["depths"]))
