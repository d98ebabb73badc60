"""Commands that hand a model on: over HTTP, or as a checkpoint for other engines."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from anydepth.cli.app import app
from anydepth.cli.display import Printer, show_export
from anydepth.cli.options import (
    Data,
    Device,
    DType,
    Json,
    MethodOptions,
    Out,
    Quiet,
    Seed,
    Target,
    WeightKind,
    by_method,
)
from anydepth.errors import UserError

BUDGET_WINDOWS = 16


@app.command()
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
    weights: WeightKind = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "bfloat16",
    quiet: Quiet = False,
) -> None:
    """An OpenAI-compatible API, and a page to play with it.

    --data is text that depth budgets are set on.
    """
    try:
        import uvicorn

        from anydepth.serve.app import Settings, create_app
        from anydepth.serve.service import Budgets, Service
    except ImportError as error:
        raise UserError(f'serve needs: pip install "anydepth[serve]" ({error})') from error
    import torch

    from anydepth.inference.engine.decode import FastEngine
    from anydepth.training.checkpoint import load_target
    from anydepth.training.data import load_windows

    printer = Printer(False, quiet)
    torch.manual_seed(seed)
    bound = _bind(host, port)
    adapted, tokenizer = load_target(
        target, dtype=dtype, device=device, merge=True, lossless=True, overrides=by_method(options)
    )
    engine = FastEngine(adapted.eval(), weights)
    budgets = None
    if adapted.draft_methods:
        budgets = Budgets.of(engine, load_windows(data, tokenizer, 128, max_windows=BUDGET_WINDOWS))
    limits = {"max_batch_size": max_batch_size, "max_tokens": max_tokens, "max_queue": max_queue}
    service = Service(engine, tokenizer, budgets=budgets, **limits)
    settings = Settings(name or Path(target).name, api_key=api_key, request_seconds=timeout)
    logging.getLogger("anydepth.serve").setLevel(logging.INFO)
    config = uvicorn.Config(
        create_app(service, tokenizer, settings),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(int(timeout), 1),
        timeout_keep_alive=30,
    )
    printer.progress(f"{settings.name} at http://{host}:{bound.getsockname()[1]} (Ctrl-C ends it)")
    uvicorn.Server(config).run(sockets=[bound])


def _bind(host: str, port: int) -> socket.socket:
    """Before anything is loaded: a port that is taken is told at once."""
    if not 0 <= port < 65536:
        raise UserError(f"--port is a number from 0 to 65535; came {port}")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or os.strerror(error.errno or 0)
        raise UserError(f"cannot bind {host}:{port} ({reason}); choose another --host or --port") from error
    bound.set_inheritable(True)
    return bound


@app.command()
def export(
    target: Target,
    kind: Annotated[str, typer.Option("--as", help="static, draft or merged.")],
    out: Out,
    exit_layer: Annotated[int | None, typer.Option(help="static, draft: no layer behind so many first ones.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A plain Hugging Face checkpoint, for other engines.

    static: what a skip set leaves. draft: the first layers, to draft for the whole. merged: LoRA folded in.
    """
    from anydepth.measure.results import document
    from anydepth.serve.export import export as write
    from anydepth.training.checkpoint import load_target

    printer = Printer(as_json, quiet)
    adapted, tokenizer = load_target(target, dtype=dtype, device=device, merge=True)
    fields = write(adapted, tokenizer, kind, out, exit_layer=exit_layer, seed=seed)
    config = {"target": target, "as": kind, "exit_layer": exit_layer, "dtype": dtype}
    printer.result(document("anydepth.export/1", seed=seed, config=config, **fields), show_export)
