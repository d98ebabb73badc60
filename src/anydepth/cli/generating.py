"""Commands that run a model: for text, in a chat, as a server, or as a checkpoint for other engines."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.text import Text
from typer import Option

from anydepth.cli import options as opt
from anydepth.errors import UserError

CHAT_TEMPERATURE = 0.7
SHADES = ("#1b7837", "#7fbf7b", "#b8860b", "#d6604d", "#b2182b")


@opt.command()
def generate(
    call: opt.Call,
    target: opt.Target,
    prompt: Annotated[str, Option(help="Continue this text; - reads standard input.")],
    max_new_tokens: Annotated[int, Option(help="Generate at most this many tokens.")] = 64,
    temperature: opt.Temperature = 0.0,
    show_depth: Annotated[bool, Option("--show-depth", help="Colour each token by the layers it ran.")] = False,
    lossless: Annotated[
        bool,
        Option(
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
) -> None:
    """Generate text, with the depth of every token."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UserError("the prompt is empty; give at least one word")
    writer, tokenizer = _open(call)
    from anydepth.decoding.engines import label_of
    from anydepth.decoding.generate import generate_text
    from anydepth.decoding.sampling_options import told_of_generate

    if writer.drafts and not writer.is_bitwise:
        call.progress(
            "verified by transformers' operators, where rounding can decide a near tie differently than at full depth; "
            "--dtype float32 or --engine fast always gives the same tokens"
        )
    adapted = writer.adapted
    if line := told_of_generate(adapted.generation_config, temperature):
        call.progress(line)
    with call.busy("generating …"):
        fields = generate_text(
            writer, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=call.seed
        )
    share = opt.wanted_share(skip_share, capacity)
    changes = {"engine": writer.name, "weights": writer.weights, "skip_share": share}
    result = call.document("generate", adapted, changes, label=label_of(writer), **fields)
    call.result(result, lambda document: show_text(document, show_depth))
    drafted = result.get("mean_acceptance_length")
    accepted = f", {drafted:.2f} a verification" if drafted else ""
    call.progress(f"{len(result['token_ids'])} tokens, {result['tokens_per_second']:.1f} per second{accepted}")


def _open(call: opt.Call) -> tuple[Any, Any]:
    arguments = call.arguments
    target, temperature, source = arguments["target"], arguments["temperature"], arguments["generation_config"]
    if temperature is not None and temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    names = ("engine", "weights", "compiled", "lossless", "generation_config", "dtype", "device")
    given = {name: arguments[name] for name in names if name in arguments} | opt.load_options(arguments)
    with call.busy(f"loading {target} …"):
        from anydepth.decoding.sampling_options import check_source
        from anydepth.serve.opening import open_target

        check_source(source)
        return open_target(target, say=call.progress, **given)


@opt.command(without=("as_json",))
def chat(
    call: opt.Call,
    target: opt.Target,
    system: Annotated[str | None, Option(help="Begin with this system prompt.")] = None,
    max_new_tokens: Annotated[int, Option(help="Generate at most this many tokens an answer.")] = 512,
    temperature: Annotated[
        float | None,
        Option(help=f"Sample at this temperature; 0 is greedy. Default: the model's own, else {CHAT_TEMPERATURE}."),
    ] = None,
    lossless: Annotated[bool, Option("--lossless", help="Draft and verify, for the answers of full depth.")] = False,
    generation_config: opt.GenerationDefaults = "auto",
    options: opt.MethodOptions = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    weights: opt.WeightKind = None,
) -> None:
    """Talk with a model, each word coloured by its depth.

    An empty line or Ctrl-D ends it; Ctrl-C ends an answer.
    """
    engine, tokenizer = _open(call)
    from anydepth.decoding.sampling_options import defaults_of, told
    from anydepth.serve.service import Service
    from anydepth.serve.talk import Talk

    logging.getLogger("anydepth.serve").setLevel(logging.ERROR)  # a warning would appear within an answer
    adapted = engine.adapted
    if tokenizer.chat_template is None:
        raise UserError(f"{target} has no chat template; use generate for models that are not trained for chat")
    service = Service(engine, tokenizer, max_batch_size=1)
    if line := told(adapted.generation_config):
        call.progress(line)
    if temperature is None:
        temperature = defaults_of(adapted.generation_config).get("temperature", CHAT_TEMPERATURE)
    drafts = engine.drafting is not None  # because of --lossless, or since the folder records it
    talk = Talk(service, tokenizer, system, max_new_tokens, temperature, lossless=drafts, seed=call.seed)
    console, num_layers = Console(highlight=False), adapted.backbone.num_layers
    if console.is_terminal and not call.quiet:
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
    return SHADES[max(math.ceil(depth / num_layers * len(SHADES)), 1) - 1]


def depth_legend(num_layers: int) -> Text:
    legend = Text("layers run: ")
    for number, shade in enumerate(SHADES):
        legend.append(f"≤{round((number + 1) * num_layers / len(SHADES))} ", style=shade)
    return legend


def show_text(document: dict[str, Any], show_depth: bool) -> None:
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


@opt.command(without=("as_json",))
def serve(
    call: opt.Call,
    target: opt.Target,
    host: Annotated[str, Option(help="Bind this address; guard any that other machines can reach.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Bind this port; 0 is any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        Option("--api-key", envvar="ANYDEPTH_API_KEY", help="Require this key of every request; default: none."),
    ] = None,
    name: Annotated[str | None, Option("--name", help="Name the model; default: its folder or target.")] = None,
    max_batch_size: Annotated[int, Option(help="Decode at most this many requests together.")] = 8,
    max_queue: Annotated[int, Option(help="Queue at most this many requests; refuse more with a retry time.")] = 64,
    max_tokens: Annotated[int | None, Option(help="Hold K/V of this many tokens; default: a window each.")] = None,
    prefix_tokens: Annotated[int | None, Option(help="Keep K/V of this many tokens of earlier prompts.")] = None,
    timeout: Annotated[float, Option(help="End a request after this many seconds.")] = 600.0,
    allowed_host: Annotated[
        list[str] | None, Option(help="Answer to this host name too; on loopback the default is its own names.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, Option(help="Let web pages of this origin use it: https://my.page; repeatable.")
    ] = None,
    strict: Annotated[bool, Option("--strict", help="Refuse a max_tokens that does not fit; default: cut it.")] = False,
    data: opt.Data = "embedded:train",
    options: opt.MethodOptions = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    weights: opt.WeightKind = None,
    generation_config: opt.GenerationDefaults = "auto",
    seed: Annotated[
        int | None, Option("--seed", help="Seed requests that have no seed; default: a new one each time.")
    ] = None,
) -> None:
    """Serve an OpenAI-compatible API, and a page to try it.

    Depth budgets are set on the text of --data.
    """
    from anydepth.decoding.sampling_options import check_source, told

    check_source(generation_config)
    try:
        from anydepth.serve.api import Settings, create_app
        from anydepth.serve.http import bind, hosts_of, listen
        from anydepth.serve.opening import open_service
    except ImportError as error:
        raise UserError(f'serve needs: pip install "anydepth[serve]" ({error})') from error

    load = opt.load_options(call.arguments)
    bound = bind(host, port)
    limits = ("max_batch_size", "max_tokens", "max_queue", "prefix_tokens")
    names = (*limits, "generation_config", "data", "weights", "dtype", "device")
    with call.busy(f"loading {target} …"):
        service, tokenizer = open_service(target, **{name: call.arguments[name] for name in names}, **load)
    if defaults := told(service.engine.adapted.generation_config):
        call.progress(defaults)
    reach = {"hosts": hosts_of(host, allowed_host or []), "origins": tuple(cors_origin or [])}
    settings = Settings(name or Path(target).name, api_key, timeout, seed, strict, **reach)
    logging.getLogger("anydepth.serve").setLevel(logging.INFO)
    line = f"{settings.name} at http://{host}:{bound.getsockname()[1]} (Ctrl-C ends it)"
    app = create_app(service, tokenizer, settings)
    listen(app, service, bound, grace=timeout, ready=lambda: call.progress(line), say=call.progress)


@opt.command()
def export(
    call: opt.Call,
    target: opt.Target,
    kind: Annotated[str, Option("--as", help="Export as static, draft or merged.")],
    out: opt.Out,
    exit_layer: Annotated[int | None, Option(help="static, draft: keep only the first N layers.")] = None,
) -> None:
    """Export a plain Hugging Face checkpoint, for other engines.

    static: the layers that a skip set leaves. draft: the first layers, as a draft model. merged: LoRA merged.
    """
    from anydepth.serve.export import check
    from anydepth.serve.export import export as write
    from anydepth.training.checkpoint import load_draft

    check(kind, out)
    with call.busy(f"exporting {target} …"):
        adapted, tokenizer = call.load(target, merge=True)
        draft = load_draft(target, adapted)
        if kind == "draft" and exit_layer is None and draft is not None:
            exit_layer = max(draft.config.exit_layers, default=None)
        fields = write(adapted, tokenizer, kind, out, exit_layer=exit_layer, seed=call.seed)
    changes = {"as": kind, "exit_layer": exit_layer}
    call.result(call.document("export", adapted, changes, **fields), show_export)


def show_export(document: dict[str, Any]) -> None:
    print(
        f"{document['folder']}: {len(document['layers'])} of {document['num_layers']} layers, "
        f"{document['num_parameters'] / 1e6:.1f} M parameters; logits differ by {document['difference']:.1e} (relative)"
    )
