"""Time our server and llama.cpp's on one file, under the same load: `results/serve_peers.json`.

    python benchmarks/serve_peers.py --llama-server PATH [--rounds 4] [--clients 1 4 16]

Both servers run at the same time and are asked in turn. In each round the clients send prompts of Spec-Bench that no
round before had, each its next one as soon as it has the answer to the last, and get 64 greedy tokens; no end token
ends an answer, so that both servers decode as much. Then conversations of two turns begin with a system prompt of 1,500
tokens: the seconds to the first token of both turns. llama-server is built from the source of llama-cpp-python
(`cmake --build … --target llama-server`), and decodes as many requests together as there are clients at most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from serve_load import Seen, ask, percentiles, start
from serve_lossless import prompts_of

import anydepth
from anydepth.json_io import write_json
from anydepth.measure.results import document
from anydepth.models.target import embedded_gguf
from anydepth.models.tokens import encode
from models import model_file

ALONE = {"Connection": "close"}  # llama-server closes connections that were kept, while they are used again
RESULT = Path(__file__).resolve().parent / "results" / "serve_peers.json"
NEW_TOKENS, SYSTEM_TOKENS, WINDOW = 64, 1500, 4096
WAYS: dict[str, dict[str, Any]] = {
    "ours": {"full_depth": True},
    "ours, lossless drafting": {"lossless": True},
    "llama-server": {},
}


@contextmanager
def ours(path: str, threads: int, most: int) -> Iterator[str]:
    process, address = start(threads, path, "--max-batch-size", str(most))
    try:
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


@contextmanager
def theirs(program: Path, path: str, threads: int, most: int) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = ["-np", str(most), "-c", str(WINDOW * most)]
    command = [str(program), "-m", path, "-t", str(threads), "-tb", str(threads), *size, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def body_of(way: str, model: str, **fields: Any) -> dict[str, Any]:
    own = {"anydepth": WAYS[way]} if WAYS[way] else {}
    return {
        "model": model,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        **own,
        **fields,
    }


async def load(address: str, model: str, way: str, prompts: list[str], num_clients: int) -> dict[str, Any]:
    """Send all prompts from so many clients at a time."""
    seen, waiting = Seen(), iter(prompts)

    async def one_client(client: httpx.AsyncClient) -> None:
        for prompt in waiting:
            await ask(client, body_of(way, model, prompt=prompt), seen)

    async with httpx.AsyncClient(base_url=address, timeout=600, headers=ALONE) as client:
        began = time.monotonic()
        await asyncio.gather(*(one_client(client) for _ in range(num_clients)))
        seconds = time.monotonic() - began
    return {"tokens_per_second": len(prompts) * NEW_TOKENS / seconds, "first": seen.first, "gaps": seen.gaps}


async def first_tokens(address: str, model: str, way: str, system: str) -> list[float]:
    """Return the seconds to the first token of both turns of a conversation."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What is this text about?"}]
    found = []
    async with httpx.AsyncClient(base_url=address, timeout=600, headers=ALONE) as client:
        for _ in range(2):
            began, first, text = time.monotonic(), 0.0, ""
            body = body_of(way, model, messages=messages)
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        part = json.loads(line[6:])["choices"][0]["delta"].get("content")
                        if part:
                            first, text = first or time.monotonic() - began, text + part
            found.append(first)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And who is named in it?"}]
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [run["tokens_per_second"] for run in runs]
    return {
        "tokens_per_second": median(rates),
        "range": [min(rates), max(rates)],
        "first_token_seconds": percentiles([one for run in runs for one in run["first"]]),
        "token_gap_seconds": percentiles([one for run in runs for one in run["gaps"]]),
    }


async def measure(addresses: dict[str, str], model: str, prompts: list[str], arguments: Any) -> list[dict[str, Any]]:
    rows = []
    for num_clients in arguments.clients:
        own_prompts = iter(prompts)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number in range(arguments.rounds + 1):
            own = list(islice(own_prompts, max(2 * num_clients, 4)))
            for place, way in enumerate(sorted(WAYS, reverse=bool(number % 2))):
                # Numbered, so that no server knows the beginning of a prompt from another way or number of clients.
                prompts_of_way = [f"{num_clients}.{place} {prompt}" for prompt in own]
                runs[way].append(await load(addresses[way], model, way, prompts_of_way, num_clients))
        rows.append({"clients": num_clients, "servers": {way: summary(found[1:]) for way, found in runs.items()}})
        peer = [run["tokens_per_second"] for run in runs["llama-server"][1:]]
        for way, found in rows[-1]["servers"].items():
            ratios = [run["tokens_per_second"] / other for run, other in zip(runs[way][1:], peer, strict=True)]
            found |= {"over_llama_server": median(ratios), "over_llama_server_range": [min(ratios), max(ratios)]}
        print(json.dumps(rows[-1]), flush=True)
    return rows


async def conversations(addresses: dict[str, str], model: str, systems: list[str]) -> dict[str, Any]:
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number, system in enumerate(systems):
        for place, way in enumerate(sorted(WAYS, reverse=bool(number % 2))):
            # Each way gets a system prompt of its own: two ways share a server.
            found[way].append(await first_tokens(addresses[way], model, way, f"{number}.{place} {system}"))
    return {
        way: {
            "first_turn_seconds": median(first for first, _ in own),
            "second_turn_seconds": median(second for _, second in own),
            "second_over_first": median(second / first for first, second in own),
            "range": [min(second / first for first, second in own), max(second / first for first, second in own)],
        }
        for way, own in found.items()
    }


def systems_of(number: int) -> list[str]:
    """Return texts of 1,500 tokens."""
    _, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    text = (Path(os.environ["ANYDEPTH_DATA"]) / "wikitext-2" / "valid.txt").read_text()
    ids = encode(tokenizer, text[: 12 * SYSTEM_TOKENS * number])
    return [
        str(tokenizer.decode(ids[start : start + SYSTEM_TOKENS]))
        for start in range(0, number * SYSTEM_TOKENS, SYSTEM_TOKENS)
    ]


def markdown(rows: dict[str, Any]) -> str:
    """Return the tables of the results page."""
    lines = [
        "| clients | server | tokens/s | over llama-server | first token p50, p95 | gap p50, p95 |",
        "| --- " * 6 + "|",
    ]
    for row in rows["load"]:
        for way, own in row["servers"].items():
            first, gap = own["first_token_seconds"], own["token_gap_seconds"]
            low, high = own["over_llama_server_range"]
            ratio = "" if way == "llama-server" else f"{own['over_llama_server']:.2f}× ({low:.2f}–{high:.2f})"
            cells = [row["clients"], way, f"{own['tokens_per_second']:.0f}", ratio]
            cells += [f"{1000 * one['p50']:.0f}, {1000 * one['p95']:.0f} ms" for one in (first, gap)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| conversation | first turn | second turn | second ÷ first |", "| --- " * 4 + "|"]
    for way, own in rows["conversations"].items():
        ratio = f"{own['second_over_first']:.2f} ({own['range'][0]:.2f}–{own['range'][1]:.2f})"
        seconds = [f"{1000 * own[f'{turn}_turn_seconds']:.0f} ms" for turn in ("first", "second")]
        lines.append(f"| {way} | {seconds[0]} | {seconds[1]} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, help="the program")
    parser.add_argument("--model", default="embedded", help="embedded, or one of models.py that is a .gguf file")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="print the committed results as tables, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(RESULT.read_text())["rows"]))
        return
    if arguments.llama_server is None:
        raise SystemExit("give --llama-server PATH, or --table")
    path = str(embedded_gguf() if arguments.model == "embedded" else model_file(arguments.model))
    threads, most = os.cpu_count() or 1, max(arguments.clients)
    prompts = prompts_of(max(2 * most, 4) * (arguments.rounds + 1), seed=0)
    with ours(path, threads, most) as own, theirs(arguments.llama_server, path, threads, most) as peer:
        addresses = {way: peer if way == "llama-server" else own for way in WAYS}
        model = httpx.get(f"{own}/v1/models").json()["data"][0]["id"]
        rows: dict[str, Any] = {"load": asyncio.run(measure(addresses, model, prompts, arguments))}
        rows["conversations"] = asyncio.run(conversations(addresses, model, systems_of(arguments.rounds)))
    version = subprocess.run([arguments.llama_server, "--version"], capture_output=True, text=True).stderr.split("\n")[
        0
    ]
    clients = " ".join(map(str, arguments.clients))
    config = {"model": arguments.model, "new_tokens": NEW_TOKENS, "threads": threads, "llama_server": version}
    command = f"python benchmarks/serve_peers.py --llama-server PATH --clients {clients} --rounds {arguments.rounds}"
    result = document("anydepth.serve_peers/1", seed=0, config=config, label="two servers", command=command, rows=rows)
    write_json(RESULT, result)
    print(markdown(rows))


if __name__ == "__main__":
    main()
