"""Time a server with four clients at a time, at full depth and lossless in turn: `results/serve_lossless.json`.

    python benchmarks/serve_lossless.py [--num-rounds 7] [--clients 4] [--each 5]

A real `anydepth serve` process. In each round the clients send the same prompts of Spec-Bench, each its next one as
soon as it has the answer to the last, once with `full_depth` and once with `lossless`; texts must be the same. Tokens
per second are those of all clients together. The first round is a warm-up.
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
NEW_TOKENS, OPTIONS = 64, ("num_rounds", "clients", "each")
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


async def answered(
    client: httpx.AsyncClient, model: str, prompts: list[str], num_clients: int, how: dict[str, Any]
) -> dict[str, Any]:
    """Send all prompts, from so many clients at a time."""
    seen, texts, waiting = [Seen() for _ in prompts], dict[int, str](), iter(range(len(prompts)))
    body = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True, "anydepth": how}

    async def one_client() -> None:
        for number in waiting:
            texts[number] = await ask(client, {**body, "prompt": prompts[number]}, seen[number])

    started = time.monotonic()
    await asyncio.gather(*(one_client() for _ in range(num_clients)))
    seconds = time.monotonic() - started
    return {"texts": texts, "seconds": seconds, "first": median(own.first[0] for own in seen)}


async def measure(address: str, prompts: list[str], num_clients: int, num_rounds: int) -> dict[str, Any]:
    pairs, size = [], len(prompts) // (num_rounds + 1)
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        ways = {"full_depth": {"full_depth": True}, "lossless": {"lossless": True}}
        for number in range(num_rounds + 1):
            own, pair = prompts[number * size : (number + 1) * size], {}
            for name in sorted(ways, reverse=bool(number % 2)):
                pair[name] = await answered(client, model, own, num_clients, ways[name])
            pairs.append(pair)
    pairs = pairs[1:]
    ratios = [pair["full_depth"]["seconds"] / pair["lossless"]["seconds"] for pair in pairs]
    return {
        "num_rounds": len(pairs),
        "prompts_per_round": size,
        "speedup": median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "of_total_time": sum(pair["full_depth"]["seconds"] for pair in pairs)
        / sum(pair["lossless"]["seconds"] for pair in pairs),
        "first_token_over_full_depth": median(
            pair["lossless"]["first"] / pair["full_depth"]["first"] for pair in pairs
        ),
        "same_texts": sum(
            pair["full_depth"]["texts"][i] == text for pair in pairs for i, text in pair["lossless"]["texts"].items()
        ),
        **{f"{name}_seconds": median(pair[name]["seconds"] for pair in pairs) for name in ("full_depth", "lossless")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=7)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--each", type=int, default=5, help="prompts of each client and round")
    parser.add_argument("--only", nargs="*", default=list(SERVERS), help=f"of {', '.join(SERVERS)}")
    arguments = parser.parse_args()
    prompts, known = prompts_of((arguments.num_rounds + 1) * arguments.clients * arguments.each, seed=0), {}
    for name in arguments.only:
        process, address = start(torch.get_num_threads(), *SERVERS[name], "--prefix-tokens", "0")
        try:
            row = asyncio.run(measure(address, prompts, arguments.clients, arguments.num_rounds))
        finally:
            if process.poll() is not None:
                assert process.stderr is not None
                print(f"the server ended with {process.returncode}: {process.stderr.read()[-4000:]}", flush=True)
            process.send_signal(signal.SIGINT)
            process.wait()
        print(name, json.dumps(row), flush=True)
        options = " ".join(f"--{key.replace('_', '-')} {getattr(arguments, key)}" for key in OPTIONS)
        command = f"python benchmarks/serve_lossless.py {options}"
        config = {"clients": arguments.clients, "new_tokens": NEW_TOKENS}
        part = document("anydepth.serve_lossless/1", seed=0, config=config, command=command, rows=[])
        known = json.loads(RESULT.read_text())["servers"] if RESULT.exists() else {}
        known[f"{name}, {arguments.clients} clients"] = row | {"commit": part["commit"], "dirty": part["dirty"]}
        write_json(RESULT, {**part, "servers": known})


if __name__ == "__main__":
    main()
