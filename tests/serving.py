"""A server of a tiny model, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

import anydepth
from tiny import save_base, save_text


def tiny_router(folder: Path) -> Path:
    """A folder with a base and a router with a threshold, so that budgets can be set."""
    save_base(folder / "base")
    model, _ = anydepth.load_model(str(folder / "base"))
    adapted = anydepth.attach(model, {"name": "layer_router", "always_keep": 2, "initial_bias": 0.0})
    generator = torch.Generator().manual_seed(3)
    for name, part in adapted.methods.named_parameters():
        if "direct" in name:
            part.data.normal_(generator=generator)
    anydepth.save(adapted, folder / "router", base=str(folder / "base"))
    save_text(folder / "text.txt")
    return folder


def start(target: Path, *options: object) -> tuple[subprocess.Popen[str], str]:
    """A server of the router in a folder, and its address."""
    port = () if "--port" in options else ("--port", 0)
    shared = ("--dtype", "float32", *port, "--data", target / "text.txt", "--name", "tiny")
    serve = (target / "router", *shared, *options)
    command = [sys.executable, "-m", "anydepth.cli", "serve", *map(str, serve)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if " at http" in line:
            address = line.split(" at ")[1].split()[0]
            break
    else:
        raise AssertionError("the server did not start")
    threading.Thread(target=process.stderr.read, daemon=True).start()
    for _ in range(100):
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return process, address
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


@contextmanager
def running(target: Path, *options: object) -> Iterator[str]:
    """The address of a server that ends with the block."""
    process, address = start(target, *options)
    try:
        yield address
    finally:
        end(process)
