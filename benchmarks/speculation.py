"""Measure lossless decoding on the 240 prompts of spec_bench: `results/speculation.json`.

    python benchmarks/speculation.py [speed|peers|lossless|bfloat16 …] [--model NAME] [--limit N] [--drafters NAME …]

speed: full depth and lossless in turn on the fast engine, batch 1, 64 tokens, by category; with the drafters that
`--lossless` chooses, and with each of them; sampled, in batches, or with other weights where asked for. Other models
than `embedded` are those of models.py, with results of their own. peers: transformers' own ways, on two prompts of each
category, each against its own plain decoding. lossless: float32, every kind of drafter, batch 1 and 4, token for token.
bfloat16: the same, and where tokens first differ, how far the two are apart at full depth in units of the last place.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from anydepth.decoding.engines import FastEngine
from anydepth.decoding.request import DraftCounts
from anydepth.hf.adapted import attach, detach
from anydepth.json_io import write_json
from anydepth.measure.prompts import read_prompts
from anydepth.measure.results import document
from anydepth.measure.timing import TokenTimes
from anydepth.models.tokens import padded
from anydepth.speculation.draft import Draft, default_draft
from models import NAMES, load

RESULT = Path(__file__).resolve().parent / "results" / "speculation.json"
SCHEMA = "anydepth.speculation/1"
NEW_TOKENS = 64
ALONE: dict[str, Any] = {"lookup": False, "adaptive": False, "max_draft": 4}
DRAFTERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "lookup": ({}, []),
    "first 20 layers": ({**ALONE, "exit_layers": [20]}, []),
    "first 26 layers, 8192 tokens": ({**ALONE, "exit_layers": [26], "exit_vocabulary": 8192}, []),
    "skip set": (ALONE, [{"name": "skip_set", "skip_layers": [11, 13, 19]}]),
    "searched": ({**ALONE, "search": {}}, []),
    "router": (ALONE, [{"name": "layer_router", "router": "random", "rates": [0.9] * 26}]),
    "exits": (ALONE, [{"name": "early_exit", "layers": [24, 27], "thresholds": 0.5, "vocabulary": 8192}]),
}
"""Options of drafting, and methods that prune the model in drafts."""
COPIES: dict[str, dict[str, Any]] = {
    "int8 copy": {"lookup": False, "quantised": "int8"},
    "int4 copy": {"lookup": False, "quantised": "int4"},
    "int8 copy, lookup": {"quantised": "int8"},
    "int4 copy, lookup": {"quantised": "int4"},
}
"""Options of drafting with copies of a 16-bit model."""
SHIPPED = "shipped"
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 0}
Row = tuple[str, dict[str, Any]]


def prompts_of(tokenizer: Any, limit: int | None) -> dict[str, list[str]]:
    """By category, `limit` of each."""
    path = Path(os.environ["ANYDEPTH_DATA"]) / "spec_bench" / "question.jsonl"
    categories = [json.loads(line)["category"] for line in path.read_text().splitlines()]
    by_category: dict[str, list[str]] = defaultdict(list)
    for category, text in zip(categories, read_prompts(path, tokenizer), strict=True):
        if limit is None or len(by_category[category]) < limit:
            by_category[category].append(text)
    return by_category


def generate(runner: Any, batch: dict[str, Any], **options: Any) -> tuple[torch.Tensor, float, float]:
    """New tokens, up to the end of the text, seconds, and those after the first token (of one row)."""
    first = TokenTimes() if len(batch["input_ids"]) == 1 else None
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2, "streamer": first, **options}
    torch.manual_seed(0)
    started = time.perf_counter()
    ids = runner.generate(**batch, **options)
    ended = time.perf_counter()
    return ids[:, batch["input_ids"].shape[1] :], ended - started, ended - (first.times[1] if first else started)


def drafting(model: Any, name: str, weights: str | None = None) -> FastEngine:
    """Return an engine that drafts so; its model is detached by the caller."""
    options, methods = (COPIES[name], []) if name in COPIES else DRAFTERS.get(name, ({}, []))
    adapted = attach(model, methods).eval()
    draft = default_draft(adapted) if name == SHIPPED else Draft(adapted, options)
    return FastEngine(adapted, weights, draft=draft)


def speed(arguments: argparse.Namespace) -> Iterator[Row]:
    weights = arguments.weights
    model, tokenizer = load(arguments.model, native=weights == "native")
    by_category = prompts_of(tokenizer, arguments.limit)
    for name in arguments.drafters or [SHIPPED, "lookup"]:
        engine = drafting(model, name, weights)
        label = ", ".join(
            [name, *([weights] if weights else []), *(["sampled"] if arguments.sampled else [])]
            + ([f"batch {arguments.batch}"] if arguments.batch > 1 else [])
        )
        options = {"pad_token_id": tokenizer.pad_token_id, **(SAMPLED if arguments.sampled else {})}
        yield label, timed(engine, tokenizer, by_category, label, arguments.batch, options)
        detach(engine.adapted)


def timed(
    engine: FastEngine,
    tokenizer: Any,
    by_category: dict[str, list[str]],
    name: str,
    batch_size: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Full depth and lossless in turn, prompt by prompt: the fields of a drafter."""
    adapted, rows, together = engine.adapted, {}, DraftCounts()
    warm = padded(tokenizer, next(iter(by_category.values()))[:batch_size])
    for _ in range(3):
        generate(engine, warm, **options)
    for category, texts in by_category.items():
        pairs, num_tokens, counts, num_same = [], 0, DraftCounts(), 0
        for number, start in enumerate(range(0, len(texts), batch_size)):
            batch = padded(tokenizer, texts[start : start + batch_size])
            pair = {}
            for full_depth in (True, False) if number % 2 else (False, True):
                if full_depth:
                    with adapted.disabled():
                        pair[full_depth] = generate(engine, batch, **options)
                else:
                    pair[full_depth] = generate(engine, batch, **options)
                    counts.add(engine.draft_counts)
            num_tokens += int((pair[True][0] != tokenizer.pad_token_id).sum())
            num_same += torch.equal(pair[True][0], pair[False][0])
            pairs.append((pair[True], pair[False]))
        ratios = [full[1] / ours[1] for full, ours in pairs]
        decoding = [full[2] / ours[2] for full, ours in pairs if full[2] > 0 and ours[2] > 0]
        seconds = [sum(pair[side][1] for pair in pairs) for side in (0, 1)]
        rows[category] = {
            "num_prompts": len(texts),
            "speedup": mean(ratios),
            "median_speedup": median(ratios),
            "decoding_speedup": mean(decoding),
            "of_total_time": seconds[0] / seconds[1],
            "full_depth_tokens_per_second": num_tokens / seconds[0],
            "tokens_per_second": num_tokens / seconds[1],
            "identical_tokens": num_same == len(pairs),
            **counts.to_json(),
        }
        together.add(counts)
        print(
            f"{name} {category}: {mean(ratios):.3f}, decoding {mean(decoding):.3f}, accepts "
            f"{counts.mean_acceptance_length:.2f}, same {num_same} of {len(pairs)} {dict(counts.num_drafted)} "
            f"{dict(counts.num_accepted)}",
            flush=True,
        )
    weights = [row["num_prompts"] for row in rows.values()]
    overall = {
        key: sum(row[key] * weight for row, weight in zip(rows.values(), weights, strict=True)) / sum(weights)
        for key in ("speedup", "decoding_speedup")
    }
    worst = min(row["speedup"] for row in rows.values())
    print(
        f"{name}: {overall['speedup']:.3f}, decoding {overall['decoding_speedup']:.3f}, worst {worst:.3f}", flush=True
    )
    return {**overall, "categories": rows, **together.to_json()}


def peers(arguments: argparse.Namespace) -> Iterator[Row]:
    """transformers' own ways on the same prompts."""
    model, tokenizer = load("embedded")
    by_category = prompts_of(tokenizer, arguments.limit or 2)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"prompt_lookup_num_tokens": 10},
        "assistant_early_exit 20": {"assistant_early_exit": 20},
        "assistant_early_exit 27": {"assistant_early_exit": 27},
    }
    engine = drafting(model, SHIPPED)
    adapted = engine.adapted
    seconds: dict[str, list[float]] = defaultdict(list)
    num_tokens: dict[str, int] = defaultdict(int)
    warm = dict(tokenizer(next(iter(by_category.values()))[0], return_tensors="pt"))
    for _ in range(3):  # as `speed` does
        generate(engine, warm)
        with adapted.disabled():
            generate(model, warm)

    def note(way: str, runner: Any, batch: dict[str, Any], **options: Any) -> None:
        ids, spent, _ = generate(runner, batch, **options)
        seconds[way].append(spent)
        num_tokens[way] += ids.shape[1]

    for number, text in enumerate(text for texts in by_category.values() for text in texts):
        batch = padded(tokenizer, [text])
        with adapted.disabled():
            for way, options in ways.items():
                if way.startswith("assistant"):
                    model.generation_config.num_assistant_tokens = 1
                    model.generation_config.assistant_confidence_threshold = 0.0
                note(way, model, batch, **options)
            note("anydepth, full depth", engine, batch)
        note("anydepth, lossless", engine, batch)
        print(number, {way: round(times[-1], 2) for way, times in seconds.items()}, flush=True)
    plain, ours = seconds["plain"], seconds["anydepth, full depth"]
    for way, times in seconds.items():
        own = ours if way.startswith("anydepth") else plain
        yield (
            way,
            {
                "tokens_per_second": num_tokens[way] / sum(times),
                "over_its_own_plain": mean(base / spent for base, spent in zip(own, times, strict=True)),
                "over_transformers": mean(base / spent for base, spent in zip(plain, times, strict=True)),
                "num_prompts": len(times),
            },
        )


def lossless(arguments: argparse.Namespace, dtype: str = "float32") -> Iterator[Row]:
    model, tokenizer = load(arguments.model, dtype)
    texts = [text for texts in prompts_of(tokenizer, arguments.limit).values() for text in texts]
    batches = {}
    for size in (1, 4):
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        batches[size] = [
            dict(tokenizer(part, return_tensors="pt", padding=True, padding_side="left")) for part in parts
        ]
    plain = FastEngine(attach(model, []))
    pad = tokenizer.pad_token_id
    wanted = {size: [generate(plain, batch, pad_token_id=pad)[0] for batch in parts] for size, parts in batches.items()}
    detach(plain.adapted)
    copies = COPIES if dtype == "bfloat16" else {}
    for name in arguments.drafters or [*DRAFTERS, *copies, SHIPPED]:
        engine = drafting(model, name)
        adapted = engine.adapted
        for size, parts in batches.items():
            together, apart = DraftCounts(), []
            for batch, full_depth in zip(parts, wanted[size], strict=True):
                ids, *_ = generate(engine, batch, pad_token_id=pad)
                together.add(engine.draft_counts)
                with adapted.disabled():
                    apart += divergences(adapted, batch, full_depth, ids)
            print(f"{dtype} {name} batch {size}: {len(apart)} of {len(texts)} differ {apart}", flush=True)
            yield (
                f"{name}, batch {size}",
                {"num_prompts": len(texts), "divergences": apart, **together.to_json()},
            )
        detach(adapted)


def divergences(model: Any, batch: dict[str, Any], wanted: torch.Tensor, found: torch.Tensor) -> list[dict[str, Any]]:
    """Where a row first differs: how far the two tokens' logits at full depth are apart there.

    In units of the last place of the larger one: a difference of rounding is a few of them, an error of any kind many.
    """
    width = max(wanted.shape[1], found.shape[1])
    both = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=2) for ids in (wanted, found)]
    rows = []
    for row in (both[0] != both[1]).any(-1).nonzero().flatten().tolist():
        at = int((both[0][row] != both[1][row]).nonzero()[0])
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        ids = torch.cat([prompt, both[0][row, :at]])[None]
        logits = model(input_ids=ids).logits[0, -1]
        pair = logits[[int(both[0][row, at]), int(both[1][row, at])]]
        unit = torch.finfo(logits.dtype).eps * 2.0 ** pair.abs().max().float().log2().floor().item()
        rows.append(
            {
                "token": at,
                "logit": pair[0].item(),
                "units_apart": abs((pair[0].float() - pair[1].float()).item()) / unit,
            }
        )
    return rows


def bfloat16(arguments: argparse.Namespace) -> Iterator[Row]:
    return lossless(arguments, "bfloat16")


SECTIONS = {"speed": speed, "peers": peers, "lossless": lossless, "bfloat16": bfloat16}


def markdown(sections: dict[str, Any]) -> str:
    """The README's table."""
    speeds, lines = sections["speed"]["rows"], []
    shipped, looked = speeds[SHIPPED], speeds.get("lookup")
    lines += [
        "| prompts | tokens per verification | × full depth | decoding alone | by lookup alone | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for category, row in shipped["categories"].items():
        alone = "" if looked is None else f"{looked['categories'][category]['speedup']:.2f}"
        lines.append(
            f"| {category.replace('_', ' ')} ({row['num_prompts']}) | {row['mean_acceptance_length']:.2f} | "
            f"{row['speedup']:.2f} | {row['decoding_speedup']:.2f} | {alone} | {row['tokens_per_second']:.0f} |"
        )
    count = sum(row["num_prompts"] for row in shipped["categories"].values())
    alone = "" if looked is None else f"{looked['speedup']:.2f}"
    lines.append(
        f"| all ({count}) | {shipped['mean_acceptance_length']:.2f} | {shipped['speedup']:.2f} | "
        f"{shipped['decoding_speedup']:.2f} | {alone} | |"
    )
    lines += ["", *other_ways(speeds)]
    if "peers" in sections:
        peers = sections["peers"]["rows"]
        count = next(iter(peers.values()))["num_prompts"]
        lines += [
            "",
            f"On {count} of these prompts, two of each kind:",
            "",
            "| | tokens/s | × its own plain decoding | × transformers |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {way} | {row['tokens_per_second']:.1f} | {row['over_its_own_plain']:.2f} | "
            f"{row['over_transformers']:.2f} |"
            for way, row in peers.items()
        ]
    return "\n".join(lines)


def other_ways(speeds: dict[str, Any]) -> list[str]:
    """A table of other drafters, weights and models: overall speed-ups."""
    by_model = {"SmolLM2": speeds}
    for path in sorted(RESULT.parent.glob(f"{RESULT.stem}_*.json")):
        rows = json.loads(path.read_text())["sections"].get("speed", {"rows": {}})["rows"]
        by_model[path.stem.removeprefix(f"{RESULT.stem}_")] = rows
    lines = ["| model | drafts by, weights | × full depth | decoding alone | worst kind | prompts, of the same text |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for model, rows in by_model.items():
        for name, row in rows.items():
            kinds = list(row["categories"].values())
            count = sum(kind["num_prompts"] for kind in kinds)
            same = "all" if all(kind["identical_tokens"] for kind in kinds) else "not all"
            decoding = "" if "batch" in name else f"{row['decoding_speedup']:.2f}"
            worst = min(kind["speedup"] for kind in kinds)
            lines.append(f"| {model} | {name} | {row['speedup']:.2f} | {decoding} | {worst:.2f} | {count}, {same} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--model", default="embedded", help=f"embedded or of {', '.join(NAMES)}")
    parser.add_argument("--weights", help="of the engine in speed, such as native; bfloat16 when left out")
    parser.add_argument("--sampled", action="store_true", help="speed at temperature 0.7")
    parser.add_argument("--batch", type=int, default=1, help="rows of a batch in speed")
    parser.add_argument("--limit", type=int, help="prompts of each category")
    parser.add_argument("--drafters", nargs="*", help="by name; all when left out")
    parser.add_argument("--out", type=Path, help="default: results/speculation.json, of other models with their name")
    parser.add_argument("--table", action="store_true", help="print the committed results as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.out is None:
        arguments.out = RESULT if arguments.model == "embedded" else RESULT.with_stem(f"speculation_{arguments.model}")
    if arguments.table:
        print(markdown(json.loads(arguments.out.read_text())["sections"]))
        return
    for section in arguments.sections:
        command = shlex.join(["python", "benchmarks/speculation.py", *sys.argv[1:]])
        for name, row in SECTIONS[section](arguments):  # written one by one: drafters can be measured by themselves
            known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
            sections = known.get("sections", {})
            part = document(SCHEMA, seed=0, config={"new_tokens": NEW_TOKENS}, command=command, rows={})
            rows = sections.get(section, {}).get("rows", {})
            rows[name] = row | {"commit": part["commit"], "dirty": part["dirty"]}
            sections[section] = {"command": command, "hardware": part["hardware"], "rows": rows}
            write_json(arguments.out, {**part, "sections": sections, "rows": []})


if __name__ == "__main__":
    main()
