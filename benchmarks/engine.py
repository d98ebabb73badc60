"""Compare the fast engine with transformers, llama.cpp and OpenVINO at full depth: `results/engine.json`.

    python benchmarks/engine.py [SECTION ...] [--model NAME] [--num-runs 7]

Sections are run in turn and kept one by one; without names, all. `peers` needs the benchmark extra and the exports of
openvino_peer.py. Other models than `embedded` are those of models.py, with results of their own.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_inputs import GREEDY, MODEL, learned_router, prompts_of, random_router, say
from engine_loading import loaded
from engine_table import markdown
from torch import Tensor

from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, open_engine
from anydepth.decoding.request import Request
from anydepth.decoding.scheduler import Scheduler
from anydepth.engine.kv_cache import EngineCache
from anydepth.hf.adapted import attach, detach
from anydepth.json_io import read_document, write_json
from anydepth.measure.bench import bench
from anydepth.measure.prompts import read_prompts
from anydepth.measure.results import document
from anydepth.measure.timing import read_bandwidth, time_generation, unpadded
from models import MODELS, NAMES

RESULT = Path(__file__).resolve().parent / "results" / "engine.json"
ROUTERS = RESULT.with_name("routers.json")
NEW_TOKENS = 64
# Branches alone, spread over the later layers: without the fifteen FFNs that greedy search names, or without the
# second layer's, bfloat16 is too inexact for the self-check (0.11 apart by rounding alone; 6e-6 in float32).
SPREAD = {5: range(3, 30, 6), 10: [*range(3, 30, 3), 28], 15: range(14, 29)}
OVER_HF = "decode_over hf bfloat16"


# --- sections --------------------------------------------------------------------------------------------------------


def peers(num_runs: int) -> dict[str, Any]:
    """Full depth, batch 1: transformers, this engine, llama.cpp and OpenVINO in turn, the same prompts."""
    engines, tokenizer = MODEL.engines()
    device = engines["bfloat16"].adapted.device
    ours: dict[str, Engine] = {"hf bfloat16": open_engine(engines["bfloat16"].adapted, "hf")}
    ours |= {f"fast {kind}": engine for kind, engine in engines.items()}
    others = MODEL.peers(torch.get_num_threads())
    names = [*ours, *others]
    rows = []
    for length in (64, 512):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        bandwidth, agreeing = [], dict.fromkeys(others, 0)
        for number, window in enumerate(prompts_of(tokenizer, length, num_runs + 1)):
            tokens = {}
            for place in range(len(names)):
                name = names[(place + number) % len(names)]
                bandwidth.append(read_bandwidth(device))
                if name in others:
                    first, total, tokens[name] = others[name].generate(window.tolist(), NEW_TOKENS)
                else:
                    timing = time_generation(ours[name], unpadded(window[None]), NEW_TOKENS, full_depth=True)
                    first, total, tokens[name] = timing.ttft, timing.total, timing.token_ids[0].tolist()
                if number:  # the first window warms up
                    times[name].append((first, (total - first) / (NEW_TOKENS - 1)))
            for name in others:
                agreeing[name] += tokens[name] == tokens.get(f"fast {name.split()[1]}")
        speed = median(bandwidth)
        for name in names:
            row = {"engine": name, "prompt_tokens": length, **peer_speeds(name, times)}
            if name.startswith("fast"):
                row |= roofline(engines[name.removeprefix("fast ")], speed, row["tpot_seconds"])
            if name in others:
                row["same_tokens_as_fast"] = f"{agreeing[name]} of {num_runs + 1} prompts"
            rows.append(row)
            say(row, "engine", "prompt_tokens", "ttft_seconds", "tpot_seconds", OVER_HF, "roofline_share")
        rows.append({"read_bytes_per_second": speed, "prompt_tokens": length})
    return {"rows": rows}


def roofline(engine: FastEngine, bytes_per_second: float, seconds: float) -> dict[str, float]:
    """Bytes of weights that a step reads, and the share of its seconds that reading them must take."""
    branches, head = engine.weight_bytes()
    read = head + sum(map(sum, branches))
    return {"bytes_per_step": read, "roofline_share": read / bytes_per_second / seconds}


def weights(num_runs: int) -> dict[str, Any]:
    """Full depth, batch 1, by kinds of weights in turn, the same prompts."""
    engines, tokenizer = MODEL.engines()
    kinds, rows = list(engines), []
    for length in (64, 512):
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        bandwidth = []
        for number, window in enumerate(prompts_of(tokenizer, length, num_runs + 1)):
            for place in range(len(kinds)):
                kind = kinds[(place + number) % len(kinds)]
                bandwidth.append(read_bandwidth(engines[kind].adapted.device))
                timing = time_generation(engines[kind], unpadded(window[None]), NEW_TOKENS, full_depth=True)
                if number:  # the first window warms up
                    times[kind].append((timing.ttft, (timing.total - timing.ttft) / (NEW_TOKENS - 1)))
        for kind, engine in engines.items():
            row = {"weights": kind, "prompt_tokens": length, **peer_speeds(kind, times)}
            row |= roofline(engine, median(bandwidth), row["tpot_seconds"])
            rows.append(row)
            say(
                row,
                "weights",
                "prompt_tokens",
                "ttft_seconds",
                "tpot_seconds",
                "decode_over bfloat16",
                "roofline_share",
            )
    return {"rows": rows}


def peer_speeds(name: str, times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians of one engine's seconds to the first and for each next token, and every other's over them, in pairs."""
    first, each = zip(*times[name], strict=True)
    row = {"ttft_seconds": median(first), "tpot_seconds": median(each), "tpot_range": [min(each), max(each)]}
    for other in times:
        row[f"decode_over {other}"] = paired(times[other], times[name], 1)
        row[f"prefill_over {other}"] = paired(times[other], times[name], 0)
    return row


def paired(theirs: list[tuple[float, ...]], ours: list[tuple[float, ...]], part: int) -> float:
    return median(their[part] / our[part] for their, our in zip(theirs, ours, strict=True))


def skipping(num_runs: int) -> dict[str, Any]:
    """How much of what is skipped becomes time, in decode and in prefill; fill of K/V and routers included."""
    methods: dict[str, dict[str, Any]] = {}
    for number in (5, 10, 15):
        for option in ("skip_layers", "skip_mixers", "skip_ffns"):
            skipped = sorted(GREEDY[:number]) if option == "skip_layers" else list(SPREAD[number])
            methods[f"{option} {number}"] = {"name": "skip_set", option: skipped}
    for share in (0.2, 0.35, 0.5):
        methods[f"router, fixed plan {share}"] = learned_router(share)
        methods[f"router, random {share}"] = random_router(share)
    model, tokenizer = MODEL.load()
    windows, rows = prompts_of(tokenizer, 512, num_runs), []
    for name, method in methods.items():
        adapted = attach(model, method)
        for row in bench(
            [FastEngine(adapted)],
            windows,
            batch_sizes=[1],
            prompt_tokens=[64, 512],
            new_tokens=NEW_TOKENS,
            num_runs=num_runs,
        ):
            rows.append({"method": name, **row})
            decode, prefill = row["decode"], row["prefill"]
            print(
                f"{name} {row['prompt_tokens']}: decode {decode['speedup']:.2f} ({decode['realised']:.3f}), "
                f"prefill {prefill['speedup']:.2f} ({prefill['realised']:.3f})",
                flush=True,
            )
        detach(adapted)
    return {"rows": rows}


def verify(num_runs: int) -> dict[str, Any]:
    """One pass over several tokens behind a past, against a pass over one."""
    rows, counts = [], (1, 2, 4, 5, 8, 16)
    for kind, opened in MODEL.engines()[0].items():
        engine = opened.model
        cache = engine.new_cache(1)
        slot = cache.take_slot()
        ids = torch.arange(1, 145)[None]
        engine.forward(ids[:, :128], [slot], cache)
        times: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(20 * num_runs):
            for count in counts:
                started = time.perf_counter()
                engine.head(engine.forward(ids[:, 128 : 128 + count], [slot], cache)[0])
                times[count].append(time.perf_counter() - started)
                cache.rewind(slot, 128)
        for count in counts:
            ratio = median(some / one for some, one in zip(times[count], times[1], strict=True))
            rows.append({"weights": kind, "tokens": count, "seconds": median(times[count]), "over_one": ratio})
            say(rows[-1], "weights", "tokens", "seconds", "over_one")
    return {"rows": rows}


def batches(num_runs: int) -> dict[str, Any]:
    """Throughput over batch size, at full depth and with rows of mixed depths; and with requests that wait."""
    model, tokenizer = MODEL.load()
    rows, windows = [], prompts_of(tokenizer, NEW_TOKENS, 64)
    for name, method in (("full depth", []), ("router, random 0.35", random_router(0.35))):
        adapted = attach(model, method)
        engine = FastEngine(adapted)
        alone: dict[int, list[int]] = {}
        single = 0.0
        for batch_size in (1, 2, 4, 8, 16, 32):
            seconds, tokens = [], 0
            for _ in range(max(num_runs // 2, 2)):
                requests = [Request.greedy(window.tolist(), NEW_TOKENS) for window in windows[:batch_size]]
                scheduler = Scheduler(engine, batch_size)
                for request in requests:
                    scheduler.add(request)
                while scheduler.waiting:
                    scheduler.step()
                started, before = time.perf_counter(), sum(len(request.output) for request in requests)
                while not scheduler.is_idle:
                    scheduler.step()
                tokens = sum(len(request.output) for request in requests) - before
                seconds.append(time.perf_counter() - started)
                for number, request in enumerate(requests):
                    alone.setdefault(number, request.output)
            if batch_size == 1:
                single = tokens / median(seconds)
            same = sum(request.output == alone[number] for number, request in enumerate(requests))
            rows.append(
                {
                    "method": name,
                    "batch_size": batch_size,
                    "decode_tokens_per_second": tokens / median(seconds),
                    "ideal_tokens_per_second": batch_size * single,
                    "same_as_smaller_batches": f"{same} of {batch_size}",
                }
            )
            say(rows[-1], *rows[-1])
        detach(adapted)
    adapted = attach(model, [])
    engine = FastEngine(adapted)
    for queued in (8, 16, 32, 64):
        scheduler = Scheduler(engine, 8)
        requests = [Request.greedy(window.tolist(), 32) for window in windows[:queued]]
        for request in requests:
            scheduler.add(request)
        decode, steps = 0.0, 0
        while not scheduler.is_idle:
            full = len(scheduler.running) == 8 and scheduler.session.is_full
            started = time.perf_counter()
            scheduler.step()
            if full:
                decode, steps = decode + time.perf_counter() - started, steps + 1
        rows.append({"queued": queued, "seconds_per_step_of_8": decode / steps, "steps": steps})
        say(rows[-1], *rows[-1])
    return {"rows": rows}


def filled_bytes(cache: EngineCache) -> int:
    """Return the bytes of K/V that are filled."""
    return sum(sum(kv.counts) * kv.states[0, :, 0].numel() * kv.states.element_size() for kv in cache.layers)


def context(num_runs: int) -> dict[str, Any]:
    """Seconds per token over the length of the past, beside the bytes that are read for it."""
    model, tokenizer = MODEL.load()
    adapted = attach(model, [])
    engine = FastEngine(adapted).model
    ids = prompts_of(tokenizer, 4096, 1)
    lengths = (64, 512, 1024, 2048, 4064)
    caches = {length: engine.new_cache(1) for length in lengths}
    for length, cache in caches.items():
        engine.forward(ids[:, :length], [cache.take_slot()], cache)
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(5 * num_runs):
        for length, cache in caches.items():
            started = time.perf_counter()
            for place in range(length, length + 4):
                engine.head(engine.forward(ids[:, place : place + 1], [0], cache)[0])
            times[length].append((time.perf_counter() - started) / 4)
            cache.rewind(0, length)
    weights = sum(layer.mixer_bytes + layer.ffn_bytes for layer in engine.layers) + engine.head.num_bytes
    rows = []
    for length in lengths:
        kv = filled_bytes(caches[length])
        seconds = median(times[length])
        over = median(long / short for long, short in zip(times[length], times[lengths[0]], strict=True))
        extra = kv - filled_bytes(caches[lengths[0]])
        rows.append(
            {
                "past_tokens": length,
                "tpot_seconds": seconds,
                "kv_bytes": kv,
                "weight_bytes": weights,
                "time_over_64": over,
                "bytes_over_64": (weights + kv) / (weights + filled_bytes(caches[lengths[0]])),
                "extra_bytes_per_extra_second": extra / (seconds - median(times[lengths[0]])) if extra else None,
            }
        )
        say(rows[-1], "past_tokens", "tpot_seconds", "time_over_64", "bytes_over_64", "extra_bytes_per_extra_second")
    return {"rows": rows}


def identical(num_runs: int) -> dict[str, Any]:
    """float32: token for token the Hugging Face engine's, 50 prompts, every method."""
    model, tokenizer = MODEL.load("float32")
    prompts = read_prompts(Path(os.environ["ANYDEPTH_DATA"]) / "spec_bench" / "question.jsonl", tokenizer)[::4][:50]
    methods: dict[str, Any] = {
        "full depth": [],
        "skip_set": {"name": "skip_set", "skip_layers": [7, 14], "skip_mixers": [4], "skip_ffns": [17, 26]},
        "layer_router project": random_router(0.2),
        "layer_router omit": {**random_router(0.2), "kv_rule": "omit"},
        "stochastic_depth": {"name": "stochastic_depth"},
    }
    rows = []
    for name, method in methods.items():
        adapted = attach(model, method)
        engine, same = FastEngine(adapted), 0
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            inputs = {key: value[:, -128:] for key, value in inputs.items()}
            options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
            same += torch.equal(engine.generate(**inputs, **options), adapted.generate(**inputs, **options))
        rows.append({"method": name, "num_prompts": len(prompts), "identical": same})
        say(rows[-1], *rows[-1])
        detach(adapted)
    return {"rows": rows}


def quality(num_runs: int) -> dict[str, Any]:
    """Perplexity on WikiText-2 valid by the kinds of weights, and next tokens that equal those of bfloat16."""
    rows: list[dict[str, Any]] = []
    chosen: dict[int, Tensor] = {}
    engines, tokenizer = MODEL.engines()
    for kind, engine in engines.items():
        losses, agreeing = [], []
        for number, window in enumerate(prompts_of(tokenizer, 1024, MODEL.num_windows)):
            logits = engine.logits(window)[:-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
            agreeing.append(logits.argmax(-1) == chosen.setdefault(number, logits.argmax(-1)))
        loss, agreement = torch.cat(losses).double().mean(), torch.cat(agreeing).double().mean().item()
        row = {"weights": kind, "perplexity": loss.exp().item(), "loss": loss.item(), "agreement": agreement}
        rows.append({**row, "num_tokens": sum(map(len, losses))})
        rows[-1]["over_bfloat16"] = rows[-1]["perplexity"] / rows[0]["perplexity"]
        say(rows[-1], *rows[-1])
    return {"rows": rows}


def loading(num_runs: int) -> dict[str, Any]:
    """Seconds and memory from a file to its first tokens, in its own blocks, each in a new process."""
    return {"rows": [loaded(MODEL.name, num_runs)]}


SECTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    section.__name__: section
    for section in (peers, weights, loading, skipping, verify, batches, context, identical, quality)
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default all")
    parser.add_argument("--model", default="embedded", help=f"embedded or of {', '.join(NAMES)}")
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="print the committed result as tables, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        files = {name: RESULT.with_stem(f"{RESULT.stem}_{name}") for name in MODELS}
        others = {name: read_document(path)["sections"] for name, path in files.items() if path.exists()}
        print(markdown(read_document(RESULT)["sections"], read_document(ROUTERS)["rows"], others))
        return
    MODEL.name, model_option, path = arguments.model, "", RESULT
    if MODEL.name != "embedded":
        model_option, path = f" --model {MODEL.name}", RESULT.with_stem(f"engine_{MODEL.name}")
    for name in arguments.sections or SECTIONS:
        print(f"--- {name}", flush=True)
        command = f"python benchmarks/engine.py {name}{model_option} --num-runs {arguments.num_runs}"
        result = SECTIONS[name](arguments.num_runs)
        known = read_document(path)["sections"] if path.exists() else {}
        own = document(
            f"anydepth.engine_{name}/1", seed=0, config={"num_runs": arguments.num_runs}, command=command, **result
        )
        whole = document("anydepth.engine/1", seed=0, config={}, sections={**known, name: own})
        write_json(path, whole)


if __name__ == "__main__":
    main()
