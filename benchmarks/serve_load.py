"""Load a server of SmolLM2 with many clients, some of which disconnect: `results/serve_load.json`.

    python benchmarks/serve_load.py [--clients 64] [--seconds 180]

A real `anydepth serve` process in bfloat16. Each request of a fixed set (Spec-Bench prompts of many lengths; greedy,
sampled with a seed, lossless; streamed or not) is answered alone first. Then all clients send them at random; every
answer must be the one that the request got alone. A tenth of the clients disconnects in the middle; a client that gets
429 tries again after `Retry-After`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

import anydepth
from anydepth.json_io import write_json
from anydepth.measure.prompts import read_prompts
from anydepth.measure.results import document
from anydepth.models.tokens import encode

RESULT = Path(__file__).resolve().parent / "results" / "serve_load.json"
NUM_REQUESTS = 40
MAX_PROMPT = 400
MAX_QUEUE = 32
GOES_AWAY = 0.1


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        gaps: between tokens of a stream.
    """

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[int] = field(default_factory=list)
    num_tokens: int = 0


def requests_of(seed: int) -> list[dict[str, Any]]:
    """Bodies of completions, every one another."""
    _, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    path = Path(os.environ["ANYDEPTH_DATA"]) / "spec_bench" / "question.jsonl"
    texts = [text for text in read_prompts(path, tokenizer) if len(encode(tokenizer, text)) <= MAX_PROMPT]
    chance = random.Random(seed)
    bodies = []
    for number, text in enumerate(chance.sample(texts, NUM_REQUESTS)):
        body: dict[str, Any] = {"model": "embedded", "prompt": text, "max_tokens": chance.choice([8, 16, 32, 64, 96])}
        if number % 4 == 0:
            body |= {"temperature": 0.8, "seed": number}
        else:
            body |= {"temperature": 0, "anydepth": {"lossless": number % 4 == 1}}
        bodies.append(body | {"stream": number % 3 != 0})
    return bodies


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], seen: Seen, leave_after: int | None = None
) -> str | None:
    """The text of an answer; None where the client went away. Raises `httpx.HTTPStatusError` for a refusal."""
    last = time.monotonic()
    text, num_chunks = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.is_error:
            await answer.aread()
            answer.raise_for_status()
        if not body["stream"]:
            if leave_after is not None:
                return None
            told = json.loads(await answer.aread())
            seen.num_tokens += told["usage"]["completion_tokens"]
            return told["choices"][0]["text"]
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now = time.monotonic()
            (seen.gaps if num_chunks else seen.first).append(now - last)
            last, num_chunks = now, num_chunks + 1
            text += json.loads(line[6:])["choices"][0]["text"]
            if num_chunks == leave_after:
                return None
    seen.num_tokens += num_chunks
    return text


async def be_a_client(
    number: int, address: str, bodies: list[dict[str, Any]], wanted: list[str], until: float, seen: Seen
) -> None:
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        while time.monotonic() < until:
            place = chance.randrange(len(bodies))
            leave_after = chance.randint(1, 6) if chance.random() < GOES_AWAY else None
            try:
                text = await ask(client, bodies[place], seen, leave_after)
            except httpx.HTTPStatusError as refused:
                if refused.response.status_code != 429:
                    raise
                seen.counts["told to come again"] += 1
                await asyncio.sleep(int(refused.response.headers["Retry-After"]))
                continue
            if text is None:
                seen.counts["went away"] += 1
            elif text == wanted[place]:
                seen.counts["answered"] += 1
            else:
                seen.wrong.append(place)


async def watch(address: str, pid: int, until: float) -> dict[str, list[float]]:
    """Memory of the server, in bytes, and its queue, every second."""
    found: dict[str, list[float]] = {"memory": [], "waiting": [], "running": []}
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        while time.monotonic() < until:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found["memory"].append(pages * os.sysconf("SC_PAGE_SIZE"))
            lines = (await client.get("/metrics")).text.splitlines()
            for which in ("waiting", "running"):
                found[which].append(
                    next(float(line.split()[1]) for line in lines if line.startswith(f"anydepth_{which}_requests "))
                )
            await asyncio.sleep(1)
    return found


def start(threads: int, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "anydepth.cli", "serve", *(options or ("embedded",)), "--port", "0"]
    command += ["--max-queue", str(MAX_QUEUE)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if " at http" in line:
            return process, line.split(" at ")[1].split()[0]
    raise SystemExit("the server did not start")


async def run(address: str, pid: int, bodies: list[dict[str, Any]], num_clients: int, seconds: float) -> dict[str, Any]:
    alone, seen = Seen(), Seen()
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        wanted = [await ask(client, body, alone) or "" for body in bodies]
    began = time.monotonic()
    until = began + seconds
    clients = [be_a_client(number, address, bodies, wanted, until, seen) for number in range(num_clients)]
    *_, watched = await asyncio.gather(*clients, watch(address, pid, until))
    took = time.monotonic() - began
    memory, third = watched["memory"], max(len(watched["memory"]) // 3, 1)
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        after = [await ask(client, body, Seen()) for body in bodies]
    return {
        "counts": dict(seen.counts),
        "wrong": seen.wrong,
        "same_afterwards": after == wanted,
        "tokens_per_second": seen.num_tokens / took,
        "first_token_seconds": percentiles(seen.first),
        "token_gap_seconds": percentiles(seen.gaps),
        "alone": {"first_token_seconds": percentiles(alone.first), "token_gap_seconds": percentiles(alone.gaps)},
        "memory_bytes": {
            "middle_third": median(memory[third : 2 * third]),
            "last_third": median(memory[-third:]),
            "most": max(memory),
        },
        "most_waiting": max(watched["waiting"]),
        "most_running": max(watched["running"]),
        "seconds": took,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {f"p{share}": ranked[min(int(share / 100 * len(ranked)), len(ranked) - 1)] for share in (50, 95, 99)}


def markdown(rows: dict[str, Any]) -> str:
    """The table of the results page."""

    def line(name: str, figures: dict[str, float]) -> str:
        return f"| {name} | " + " | ".join(f"{1000 * figures[share]:.0f}" for share in ("p50", "p95", "p99")) + " |"

    counts, memory = rows["counts"], rows["memory_bytes"]
    words = [
        f"{counts['answered']} answers, each the same as alone ({len(rows['wrong'])} not);",
        f"{counts.get('went away', 0)} clients went away in the middle,",
        f"{counts.get('told to come again', 0)} got 429 with `Retry-After`.",
        f"At most {rows['most_waiting']:.0f} waited. {rows['tokens_per_second']:.0f} tokens a second in all.",
        f"Memory of the server: {memory['middle_third'] / 2**20:.0f} MiB in the middle third of the time,",
        f"{memory['last_third'] / 2**20:.0f} MiB in the last.",
    ]
    return "\n".join(
        [
            "| milliseconds | p50 | p95 | p99 |",
            "| --- | --- | --- | --- |",
            line("first token, one client", rows["alone"]["first_token_seconds"]),
            line("token gap, one client", rows["alone"]["token_gap_seconds"]),
            line("first token, all clients", rows["first_token_seconds"]),
            line("token gap, all clients", rows["token_gap_seconds"]),
            "",
            *words,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed results as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(arguments.out.read_text())["rows"]))
        return
    bodies = requests_of(arguments.seed)
    # Every request was answered before, alone: its prompt is to be read again.
    process, address = start(arguments.threads, "embedded", "--prefix-tokens", "0")
    try:
        rows = asyncio.run(run(address, process.pid, bodies, arguments.clients, arguments.seconds))
    finally:
        process.terminate()
        process.wait()
    config = {"clients": arguments.clients, "seconds": arguments.seconds, "max_queue": MAX_QUEUE}
    config |= {"num_requests": NUM_REQUESTS, "max_prompt": MAX_PROMPT, "threads": arguments.threads}
    command = f"python benchmarks/serve_load.py --clients {arguments.clients} --seconds {arguments.seconds:g}"
    result = document(
        "anydepth.serve_load/1",
        seed=arguments.seed,
        config=config,
        label="server under load",
        command=command,
        rows=rows,
    )
    write_json(arguments.out, result)
    print(json.dumps(rows, indent=1))
    print(markdown(rows))


if __name__ == "__main__":
    main()
