"""Measure what skipping costs on tasks, trained and not, next to full depth: `results/task_scores.json`.

    python benchmarks/run.py benchmarks/experiments/router_vs_controls.yaml --until train
    python benchmarks/run.py benchmarks/experiments/hat_trained.yaml --until train
    python benchmarks/task_scores.py [--row LABEL=FOLDER] [--limit N] [--table]

SmolLM2 in bfloat16 on the fast engine, LoRA folded into the weights. ARC-Challenge and MMLU with 5 examples (the first
items of each subject, about 500 in all), GSM8K with none. Each score has the standard error of its items, its change
from full depth that of the differences over the same items. A row is kept in `--rows` task by task, so that a run that
was interrupted continues. With `--row`, full depth and the named rows are scored; other rows of the result stay as they
are, if full depth still scores what it did when they were measured.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from anydepth.decoding.engines import FastEngine
from anydepth.errors import UserError
from anydepth.json_io import read_document, write_json
from anydepth.measure.lm_eval import add_changes, score_tasks
from anydepth.measure.results import document, task_scores
from anydepth.training.checkpoint import is_checkpoint, load_target, read_manifest

ROOT = Path(__file__).resolve().parent
RESULT = ROOT / "results" / "task_scores.json"
SCHEMA = "anydepth.task_scores/1"
RUNS = ROOT.parent / "runs"
FULL_DEPTH = "full depth"
ROWS = {
    FULL_DEPTH: "embedded",
    "skip set": str(RUNS / "router_vs_controls" / "skip_set-0"),
    "random gates": str(RUNS / "router_vs_controls" / "random_gates-0"),
    "layer router": str(RUNS / "router_vs_controls" / "layer_router-0"),
    "HAT": str(RUNS / "hat_trained" / "hat-0"),
}
TASKS = {
    "arc_challenge": {"num_fewshot": 5, "limit": None},
    "mmlu": {"num_fewshot": 5, "limit": 9},  # of each of 57 subjects
    "gsm8k": {"num_fewshot": 0, "limit": 50},
}
SHOWN = {"arc_challenge": "acc_norm", "mmlu": "acc", "gsm8k": "exact_match,flexible-extract"}
NORMAL = 1.96
"""Standard errors on both sides that a 95% interval has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", default=[], metavar="LABEL=FOLDER", help="in place of the five rows")
    parser.add_argument("--limit", type=int, help="items of each task, or of each subject, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, default=RUNS / "task_scores", help="folder that keeps each row's JSON")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the committed result as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(arguments.out)["rows"]))
        return
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Score every row, full depth first: the others are told by their change from it."""
    rows = {FULL_DEPTH: ROWS[FULL_DEPTH], **named(arguments.row)} if arguments.row else ROWS
    for target in rows.values():
        if target != ROWS[FULL_DEPTH] and not is_checkpoint(target):
            raise UserError(f"{target} holds no checkpoint; train it first, or give --row LABEL=FOLDER")
    documents = [scored(label, target, arguments) for label, target in rows.items()]
    full, *changed = with_changes(documents)
    told = [full, *unchanged_rows(arguments, documents, rows), *changed]
    command = "python benchmarks/task_scores.py" + "".join(f" --row '{row}'" for row in arguments.row)
    command += f" --limit {arguments.limit}" if arguments.limit else ""
    config = {"tasks": TASKS, "limit": arguments.limit, "rows": {row["label"]: row["target"] for row in told}}
    result = document(SCHEMA, seed=arguments.seed, config=config, command=command, rows=told)
    result |= {
        "commits": sorted({str(row["commit"]) for row in told}),
        "dirty": any(row["dirty"] for row in told),
    }
    write_json(arguments.out, result)
    print(f"{markdown(told)}\n\n{arguments.out}")


def unchanged_rows(
    arguments: argparse.Namespace, documents: list[dict[str, Any]], measured: dict[str, str]
) -> list[dict[str, Any]]:
    """Return the rows of the result not measured by this run. Raises `UserError` if full depth scores otherwise."""
    known = read_document(arguments.out) if arguments.row and arguments.out.exists() else {"rows": []}
    others = [row for row in known["rows"] if row["label"] not in measured]
    if not others:
        return []
    before = next(row for row in known["rows"] if row["label"] == FULL_DEPTH)
    for name, task in documents[0]["tasks"].items():
        then, now = task_scores(before["tasks"][name]), task_scores(task)
        if then[SHOWN[name]] != now[SHOWN[name]]:
            raise UserError(
                f"full depth scores {now[SHOWN[name]]} in {name}, {then[SHOWN[name]]} in {arguments.out}: "
                "its other rows are of another state; score all rows, or give another --out"
            )
    return others


def named(rows: list[str]) -> dict[str, str]:
    """Return the folders by label. Raises `UserError` for a row without both."""
    pairs = [row.partition("=") for row in rows]
    for row, (label, _, folder) in zip(rows, pairs, strict=True):
        if not label or not folder:
            raise UserError(f"--row takes LABEL=FOLDER, such as 'skip set=runs/skip'; came '{row}'")
    return {label: folder for label, _, folder in pairs}


def scored(label: str, target: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a row's document: what it has of tasks already is kept, if it is of the same weights and items."""
    path = arguments.rows / f"{re.sub(r'[^0-9A-Za-z]+', '_', label)}.json"
    weights = read_manifest(Path(target))["weights"] if is_checkpoint(target) else target
    config = {"target": target, "weights": weights, "limit": arguments.limit, "tasks": TASKS}
    config |= {"seed": arguments.seed} if arguments.seed else {}  # rows from before it was kept are of seed 0
    known = read_document(path) if path.exists() else {}
    row = known if known.get("config") == config else {}
    missing = [name for name in TASKS if name not in row.get("tasks", {})]
    if not missing:
        print(f"{label}: done already, kept ({path})", flush=True)
        return row
    adapted, tokenizer = load_target(target, dtype="bfloat16", merge=True)
    engine = FastEngine(adapted)
    for name in missing:
        limits = [limit for limit in (TASKS[name]["limit"], arguments.limit) if limit is not None]
        options: dict[str, Any] = {"num_fewshot": TASKS[name]["num_fewshot"], "limit": min(limits, default=None)}
        tasks = score_tasks(engine, tokenizer, [name], seed=arguments.seed, say=print, who=label, **options)
        done = {**row.get("tasks", {}), **tasks}
        row = document(SCHEMA, seed=arguments.seed, config=config, label=label, attached=adapted.label, tasks=done)
        write_json(path, row)
    return row


def with_changes(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with their changes from the first, over the same items, and without the items."""
    full = documents[0]["tasks"]
    rows = []
    for row in documents:
        tasks = {name: dict(task) for name, task in row["tasks"].items()}
        if row is not documents[0]:
            add_changes(tasks, {name: dict(task) for name, task in full.items()})
        for task in tasks.values():
            task.pop("items", None)
            task["intervals"] = {
                metric: [score - NORMAL * error, score + NORMAL * error]
                for metric, (score, error) in task_scores(task).items()
                if error is not None
            }
        kept = {key: row[key] for key in ("label", "attached", "commit", "dirty")}
        rows.append({**kept, "target": row["config"]["target"], "tasks": tasks})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return one line per row: percent right ± half a 95% interval, and in brackets the paired change likewise."""
    tasks = rows[0]["tasks"]
    titles = [f"{name} ({task['num_fewshot']}-shot, {task['num_items']} items)" for name, task in tasks.items()]
    lines = [f"| | {' | '.join([*titles, 'FLOP share'])} |", "| --- |" + " --- |" * (len(titles) + 1)]
    for row in rows:
        cells = [cell(task, SHOWN[name]) for name, task in row["tasks"].items()]
        shares = [task["layer_token_share"] for task in row["tasks"].values()]
        lines.append(f"| {' | '.join([row['label'], *cells, f'{min(shares):.2f}–{max(shares):.2f}'])} |")
    return "\n".join(lines)


def cell(task: dict[str, Any], metric: str) -> str:
    score, error = task_scores(task)[metric]
    text = f"{100 * score:.1f}" + ("" if error is None else f" ± {100 * NORMAL * error:.1f}")
    if metric not in task.get("changes", {}):
        return text
    change, error = task["changes"][metric]
    return f"{text} ({100 * change:+.1f} ± {100 * NORMAL * error:.1f})"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"task_scores.py: {error}") from error
