"""Test whether calibration keeps its promise, over many repetitions: `results/guarantee.json`.

    python benchmarks/run.py benchmarks/experiments/layerskip_from_scratch.yaml --until evaluate
    python benchmarks/guarantee.py [--table]

Synthetic: losses drawn from known risks, those from 0.01 to 0.1, and one harmless setting with the next one just above
the bound, which is as hard as it gets. Real: the decoder trained with LayerSkip continues texts of WikiText-2 at
every setting of its thresholds; each repetition calibrates on some of the texts and is judged by the mean loss of the
others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from anydepth.calibration.guarantee import continuations, difference, inconsistency, learn_then_test
from anydepth.calibration.shares import collect_scores, set_thresholds, thresholds_at
from anydepth.decoding.engines import FastEngine
from anydepth.hf.adapted import attach, detach
from anydepth.json_io import read_document, write_json
from anydepth.measure.results import document
from anydepth.training.checkpoint import load_target
from anydepth.training.data import load_windows

ROOT = Path(__file__).resolve().parent
TRAINED = ROOT.parent / "runs" / "layerskip_from_scratch" / "layerskip-0"
RESULT = ROOT / "results" / "guarantee.json"
MAX_RISK = CONFIDENCE_LEFT = 0.05
PROMPT, NEW = 32, 24
SHARES = [0.5 ** (9 - 0.6 * number) for number in range(14)]
"""Of decisions that exit, by setting."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", type=int, default=200)
    parser.add_argument("--num-texts", type=int, default=600)
    parser.add_argument("--num-calibration", type=int, default=200)
    parser.add_argument("--table", action="store_true", help="print the committed results as a table, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_document(RESULT)["rows"]))
        return
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for shape, risks in (("", [0.005 * (number + 2) for number in range(19)]), (", at the edge", [0.0, 0.0501])):
        rows[f"synthetic, 0 or 1{shape}"] = synthetic(2000, risks, generator, binary=True)
        rows[f"synthetic, in between{shape}"] = synthetic(2000, risks, generator, binary=False)
    for name, losses in real(arguments.num_texts).items():
        rows[name] = judged(losses, arguments.num_trials, arguments.num_calibration, generator)
        rows[f"{name}, 40 texts"] = judged(losses, arguments.num_trials, 40, generator)
    for name, row in rows.items():
        print(name, row, flush=True)
    command = f"python benchmarks/guarantee.py --num-trials {arguments.num_trials}"
    settings = {key: value for key, value in vars(arguments).items() if key != "table"}
    config = {**settings, "max_risk": MAX_RISK, "confidence": 1 - CONFIDENCE_LEFT}
    write_json(RESULT, document("anydepth.guarantee/1", seed=0, config=config, command=command, rows=rows))


def synthetic(
    num_trials: int, risks: list[float], generator: torch.Generator, *, binary: bool, num_texts: int = 200
) -> dict[str, Any]:
    """Settings of known risks, in order."""
    chosen = []
    for _ in range(num_trials):

        def losses(number: int) -> list[float]:
            drawn = torch.rand(num_texts, generator=generator)
            return ((drawn < risks[number]).double() if binary else 2 * risks[number] * drawn).tolist()

        found = learn_then_test(losses, len(risks), max_risk=MAX_RISK, confidence=1 - CONFIDENCE_LEFT)
        chosen.append(None if found.chosen is None else risks[found.chosen])
    return summary(chosen, num_texts)


def real(num_texts: int) -> dict[str, torch.Tensor]:
    """(settings, texts) losses by kind."""
    adapted, tokenizer = load_target(str(TRAINED))
    adapted = attach(detach(adapted), {"name": "early_exit", "layers": [2, 4, 6]}).eval()
    engine = FastEngine(adapted)
    windows = load_windows("wikitext-2:train", tokenizer, 256, max_windows=8)
    prompts = list(load_windows("wikitext-2:valid", tokenizer, PROMPT, max_windows=num_texts))
    scores = collect_scores(adapted, windows)
    whole = continuations(engine, prompts, NEW, full_depth=True)
    kinds: dict[str, list[list[float]]] = {"early exit, 1 − ROUGE-L": [], "early exit, any difference": []}
    for setting, share in enumerate(SHARES):
        set_thresholds(adapted, thresholds_at(scores, share))
        texts = continuations(engine, prompts, NEW, full_depth=False)
        for kind, measure in zip(kinds, (inconsistency, difference), strict=True):
            kinds[kind].append([measure(a, b) for a, b in zip(texts, whole, strict=True)])
        print(setting, [round(sum(part[-1]) / len(part[-1]), 3) for part in kinds.values()], flush=True)
    return {kind: torch.tensor(part) for kind, part in kinds.items()}


def judged(losses: torch.Tensor, num_trials: int, num_texts: int, generator: torch.Generator) -> dict[str, Any]:
    """Calibrations on random texts, each judged by those that it did not see."""
    chosen = []
    for _ in range(num_trials):
        order = torch.randperm(losses.shape[1], generator=generator)
        seen, rest = losses[:, order[:num_texts]], losses[:, order[num_texts:]]

        def of(number: int, seen: torch.Tensor = seen) -> list[float]:
            return seen[number].tolist()

        found = learn_then_test(of, len(losses), max_risk=MAX_RISK, confidence=1 - CONFIDENCE_LEFT)
        chosen.append(None if found.chosen is None else rest[found.chosen].mean().item())
    return {**summary(chosen, num_texts), "mean_loss_by_setting": losses.mean(1).tolist()}


def summary(risks: list[float | None], num_texts: int) -> dict[str, Any]:
    """How often the chosen setting's risk is above the bound; None: nothing was chosen."""
    known = [risk for risk in risks if risk is not None]
    return {
        "num_trials": len(risks),
        "num_texts": num_texts,
        "share_above": sum(risk > MAX_RISK for risk in known) / len(risks),
        "share_nothing_chosen": 1 - len(known) / len(risks),
        "mean_risk_of_chosen": sum(known) / len(known) if known else None,
    }


def markdown(rows: dict[str, Any]) -> str:
    """The docs' table."""
    lines = [
        "| losses | texts | calibrations | risk above the bound | nothing chosen | mean risk of what was chosen |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        risk = row["mean_risk_of_chosen"]
        lines.append(
            f"| {name} | {row['num_texts']} | {row['num_trials']} | {row['share_above']:.1%} | "
            f"{row['share_nothing_chosen']:.0%} | {'—' if risk is None else f'{risk:.3f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
