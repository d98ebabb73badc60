"""Time a server with four clients at a time, at full depth and lossless in turn: `results/serve_lossless.json`.

    python benchmarks/serve_lossless.py [--num-rounds 16] [--clients 4]

A real `anydepth serve` process. In each round the same prompts of Spec-Bench are sent at the same time, once with
`full_depth` and once with `lossless`; texts must be the same. Tokens per second are those of all clients together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from serve_load import MAX_PROMPT, Seen, ask, start

import anydepth
from anydepth.json_io import write_json
from anydepth.measure.prompts import read_prompts
from anydepth.measure.results import document
from anydepth.models.tokens import encode
from models import OFF_GRID, model_file

RESULT = Path(__file__).resolve().parent / "results" / "serve_lossless.json"
NEW_TOKENS = 64
SERVERS = {
    "embedded, native": ("embedded",),
    "embedded, bfloat16": ("embedded", "--weights", "bfloat16"),
    "off the grid, bfloat16": (str(model_file(OFF_GRID)),),
}


def prompts_of(number: int, seed: int) -> list[str]:
    _, tokenizer = anydepth.load_model("embedded", dtype="bfloat16")
    path = Path(os.environ["ANYDEPTH_DATA"]) / "spec_bench" / "question.jsonl"
    texts = [text for text in read_prompts(path, tokenizer) if len(encode(tokenizer, text)) <= MAX_PROMPT]
    return random.Random(seed).sample(texts, number)


async def together(client: httpx.AsyncClient, model: str, prompts: list[str], how: dict[str, Any]) -> dict[str, Any]:
    """Send all prompts at the same time."""
    seen = [Seen() for _ in prompts]
    body = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True, "anydepth": how}
    started = time.monotonic()
    texts = await asyncio.gather(
        *(ask(client, {**body, "prompt": prompt}, own) for prompt, own in zip(prompts, seen, strict=True))
    )
    seconds = time.monotonic() - started
    return {"texts": texts, "seconds": seconds, "first": median(own.first[0] for own in seen)}


async def measure(address: str, prompts: list[str], num_clients: int) -> dict[str, Any]:
    pairs = []
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        ways = {"full_depth": {"full_depth": True}, "lossless": {"lossless": True}}
        for number, start_at in enumerate(range(0, len(prompts), num_clients)):
            own, pair = prompts[start_at : start_at + num_clients], {}
            for name in sorted(ways, reverse=bool(number % 2)):
                pair[name] = await together(client, model, own, ways[name])
            pairs.append(pair)
    pairs = pairs[1:]  # the first is a warm-up
    ratios = [pair["full_depth"]["seconds"] / pair["lossless"]["seconds"] for pair in pairs]
    return {
        "num_rounds": len(pairs),
        "speedup": median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "of_total_time": sum(pair["full_depth"]["seconds"] for pair in pairs)
        / sum(pair["lossless"]["seconds"] for pair in pairs),
        "first_token_over_full_depth": median(
            pair["lossless"]["first"] / pair["full_depth"]["first"] for pair in pairs
        ),
        "same_texts": sum(pair["full_depth"]["texts"] == pair["lossless"]["texts"] for pair in pairs),
        **{f"{name}_seconds": median(pair[name]["seconds"] for pair in pairs) for name in ("full_depth", "lossless")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=16)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=list(SERVERS), help=f"of {', '.join(SERVERS)}")
    arguments = parser.parse_args()
    prompts, known = prompts_of((arguments.num_rounds + 1) * arguments.clients, seed=0), {}
    for name in arguments.only:
        process, address = start(torch.get_num_threads(), *SERVERS[name])
        try:
            row = asyncio.run(measure(address, prompts, arguments.clients))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
        print(name, json.dumps(row), flush=True)
        command = (
            f"python benchmarks/serve_lossless.py --num-rounds {arguments.num_rounds} --clients {arguments.clients}"
        )
        config = {"clients": arguments.clients, "new_tokens": NEW_TOKENS}
        part = document("anydepth.serve_lossless/1", seed=0, config=config, command=command, rows=[])
        known = json.loads(RESULT.read_text())["servers"] if RESULT.exists() else {}
        known[f"{name}, {arguments.clients} clients"] = row | {"commit": part["commit"], "dirty": part["dirty"]}
        write_json(RESULT, {**part, "servers": known})


if __name__ == "__main__":
    main()
