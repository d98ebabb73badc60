"""Commands that serve a model over HTTP, or export it as a checkpoint for other engines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.cli import options as opt
from anydepth.cli.application import app as commands
from anydepth.cli.display import Printer
from anydepth.errors import UserError


@commands.command()
def serve(
    target: opt.Target,
    host: Annotated[
        str, typer.Option(help="Bind this address; guard any that other machines can reach.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Bind this port; 0 is any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="ANYDEPTH_API_KEY", help="Require this key of every request; default: none."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name the model; default: its folder or target.")] = None,
    max_batch_size: Annotated[int, typer.Option(help="Decode at most this many requests together.")] = 8,
    max_queue: Annotated[
        int, typer.Option(help="Queue at most this many requests; refuse more with a retry time.")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option(help="Keep the K/V of this many tokens, of all requests together.")
    ] = 32768,
    timeout: Annotated[float, typer.Option(help="End a request after this many seconds.")] = 600.0,
    data: opt.Data = "embedded:train",
    options: opt.MethodOptions = None,
    skip_share: opt.SkipShare = None,
    capacity: opt.Capacity = None,
    weights: opt.WeightKind = None,
    generation_config: opt.GenerationDefaults = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed requests that have no seed; default: a new one each time.")
    ] = None,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    quiet: opt.Quiet = False,
) -> None:
    """Serve an OpenAI-compatible API, and a page to try it.

    Depth budgets are set on the text of --data.
    """
    arguments = dict(locals())
    from anydepth.decoding.sampling_options import check_source, told

    check_source(generation_config)
    try:
        from anydepth.serve.api import Settings, create_app
        from anydepth.serve.http import bind, listen
        from anydepth.serve.opening import open_service
    except ImportError as error:
        raise UserError(f'serve needs: pip install "anydepth[serve]" ({error})') from error

    printer, load = Printer(False, quiet), opt.load_options(arguments)
    bound = bind(host, port)
    passed = ("max_batch_size", "max_tokens", "max_queue", "generation_config", "data", "weights")
    with printer.busy(f"loading {target} …"):
        service, tokenizer = open_service(target, **{name: arguments[name] for name in passed}, **load)
    if defaults := told(service.engine.adapted.generation_config):
        printer.progress(defaults)
    settings = Settings(name or Path(target).name, api_key=api_key, request_seconds=timeout, seed=seed)
    logging.getLogger("anydepth.serve").setLevel(logging.INFO)
    line = f"{settings.name} at http://{host}:{bound.getsockname()[1]} (Ctrl-C ends it)"
    app = create_app(service, tokenizer, settings)
    listen(app, bound, grace=timeout, ready=lambda: printer.progress(line))


@commands.command()
def export(
    target: opt.Target,
    kind: Annotated[str, typer.Option("--as", help="Export as static, draft or merged.")],
    out: opt.Out,
    exit_layer: Annotated[int | None, typer.Option(help="static, draft: keep only the first N layers.")] = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Export a plain Hugging Face checkpoint, for other engines.

    static: the layers that a skip set leaves. draft: the first layers, as a draft model. merged: LoRA merged.
    """
    arguments = dict(locals())
    from anydepth.measure.results import document
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
    config = opt.config_of(arguments, adapted, "target", **{"as": kind, "exit_layer": exit_layer})
    printer.result(document("anydepth.export/1", seed=seed, config=config, **fields), show_export)


def show_export(document: dict[str, Any]) -> None:
    print(
        f"{document['folder']}: {len(document['layers'])} of {document['num_layers']} layers, "
        f"{document['num_parameters'] / 1e6:.1f} M parameters; logits differ by {document['difference']:.1e} (relative)"
    )
