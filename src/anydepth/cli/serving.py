"""Commands that hand a model on: over HTTP, or as a checkpoint for other engines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.cli.application import app as commands
from anydepth.cli.display import Printer, show_export
from anydepth.cli.options import (
    Capacity,
    Data,
    Device,
    DType,
    GenerationDefaults,
    Json,
    MethodOptions,
    Out,
    Quiet,
    Seed,
    SkipShare,
    Target,
    WeightKind,
    by_method,
    wanted_share,
)
from anydepth.errors import UserError


@commands.command()
def serve(
    target: Target,
    host: Annotated[
        str, typer.Option(help="Address to bind; others than this machine's are yours to guard.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 is any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="ANYDEPTH_API_KEY", help="Asked of every request; none asks for none."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model; its folder or target when left out.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Requests that are decoded together.")] = 8,
    max_queue: Annotated[int, typer.Option(help="Requests that wait; the next one is told to come again.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Tokens of K/V that are kept, all requests together.")] = 32768,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 600.0,
    data: Data = "embedded:train",
    options: MethodOptions = None,
    skip_share: SkipShare = None,
    capacity: Capacity = None,
    weights: WeightKind = None,
    generation_config: GenerationDefaults = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of requests that bring none; another one each time when left out.")
    ] = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    quiet: Quiet = False,
) -> None:
    """An OpenAI-compatible API, and a page to play with it.

    --data is text that depth budgets are set on.
    """
    from anydepth.decoding.sampling_options import check_source, told

    check_source(generation_config)
    try:
        from anydepth.serve.api import Settings, create_app
        from anydepth.serve.http import bind, listen
        from anydepth.serve.opening import open_service
    except ImportError as error:
        raise UserError(f'serve needs: pip install "anydepth[serve]" ({error})') from error

    printer, share = Printer(False, quiet), wanted_share(skip_share, capacity)
    bound = bind(host, port)
    limits: dict[str, Any] = {"max_batch_size": max_batch_size, "max_tokens": max_tokens, "max_queue": max_queue}
    limits |= {
        "generation_config": generation_config,
        "data": data,
        "weights": weights,
        "device": device,
        "dtype": dtype,
        "overrides": by_method(options),
        "skip_share": share,
    }
    with printer.busy(f"loading {target} …"):
        service, tokenizer = open_service(target, **limits)
    if defaults := told(service.engine.adapted.generation_config):
        printer.progress(defaults)
    settings = Settings(name or Path(target).name, api_key=api_key, request_seconds=timeout, seed=seed)
    logging.getLogger("anydepth.serve").setLevel(logging.INFO)
    line = f"{settings.name} at http://{host}:{bound.getsockname()[1]} (Ctrl-C ends it)"
    app = create_app(service, tokenizer, settings)
    listen(app, bound, grace=timeout, ready=lambda: printer.progress(line))


@commands.command()
def export(
    target: Target,
    kind: Annotated[str, typer.Option("--as", help="static, draft or merged.")],
    out: Out,
    exit_layer: Annotated[int | None, typer.Option(help="static, draft: no layer behind so many first ones.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A plain Hugging Face checkpoint, for other engines.

    static: what a skip set leaves. draft: the first layers, to draft for the whole. merged: LoRA folded in.
    """
    from anydepth.measure.results import document
    from anydepth.models.load import dtype_name
    from anydepth.serve.export import check
    from anydepth.serve.export import export as write
    from anydepth.training.checkpoint import load_draft, load_target

    check(kind, out)
    printer = Printer(as_json, quiet)
    with printer.busy(f"exporting {target} …"):
        adapted, tokenizer = load_target(target, dtype=dtype, device=device, merge=True)
        draft = load_draft(target, adapted)
        if kind == "draft" and exit_layer is None and draft is not None:
            exit_layer = max(draft.config.exit_layers, default=None)
        fields = write(adapted, tokenizer, kind, out, exit_layer=exit_layer, seed=seed)
    config = {"target": target, "as": kind, "exit_layer": exit_layer, "dtype": dtype_name(adapted)}
    printer.result(document("anydepth.export/1", seed=seed, config=config, **fields), show_export)
