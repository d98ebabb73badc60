"""Result documents with invented numbers, for the tests of the report page, and readers of what a page has."""

from __future__ import annotations

import csv
from html.parser import HTMLParser
from typing import Any

from anydepth.report.layout import Page

HOSTILE = "<script>alert('x')</script> & \"quotes\" $x$"
ORIGIN: dict[str, Any] = {
    "seed": 7,
    "commit": "abcdef0123456789",
    "dirty": False,
    "hardware": {"cpu": "A Processor", "num_cores": 2},
    "versions": {"torch": "2.13.0"},
    "label": HOSTILE,
}
SPEED = {"tokens_per_second": 20.0, "ttft_seconds": 0.1, "tpot_seconds": 0.05, "peak_memory_bytes": 1}
PHASE = {"speedup": 1.25, "ideal_speedup": 1.5, "realised": 0.83}
DEPTH = {"mean": 1.5, "low": 1.4, "high": 1.6}
METRICS = {"fraction": 0.7, "entropy": 0.3, "entropy_of_mean": 0.6, "layer_std": 0.2, "token_std": 0.1}
GATE_METRICS = {f"layer_router/gate_{name}": value for name, value in METRICS.items()}
GATES: dict[str, Any] = {
    "method": "layer_router",
    "branch": "layer",
    "num_tokens": 100,
    **METRICS,
    "gates": [{"layer": 0, "fraction": 1.0, "entropy": 0.0}, {"layer": 1, "fraction": 0.4, "entropy": 0.67}],
    "open_gates": [0.0, 0.6, 0.4],
    "warnings": [f"layer 0 always runs: {HOSTILE}"],
}
R = {"r": 0.5, "low": 0.25, "high": 0.75}
NO_R = {"r": None, "low": None, "high": None}
LINE = {"slope": 0.1, "x": [10.0, 20.0], "y": [1.0, 2.0], "low": [0.5, 1.5], "high": [1.5, 2.5]}
CORRELATIONS: dict[str, Any] = {
    "of": "depth",
    "unit": "paragraph",
    "num_samples": 3,
    "num_cut": 1,
    "max_tokens": 25,
    "num_counted_tokens": 1000,
    "rows": [
        {"of": "depth", "with": "length", "pearson": R, "spearman": R, "line": LINE},
        {"of": "depth", "with": "perplexity", "pearson": R, "spearman": {**R, "low": None, "high": None}, "line": LINE},
        {"of": "depth", "with": "rarity", "pearson": NO_R, "spearman": NO_R, "line": None},
        {"of": "layer_token_share", "with": "length", "pearson": R, "spearman": R, "line": LINE},
    ],
    "samples": [
        {"length": size, "perplexity": 5.0 + size, "rarity": 4.0, "depth": 1.0 + size / 20, "layer_token_share": 0.5}
        for size in (10, 15, 20)
    ],
}
DOCUMENTS: list[dict[str, Any]] = [
    {
        **ORIGIN,
        "schema": "anydepth.search/1",
        "skip_layers": [1, 3],
        "skip_mixers": [],
        "skip_ffns": [],
        "agreement": 0.75,
        "seconds": 3.0,
        "trajectory": [{"step": 1, "layer": 3, "agreement": 0.9}, {"step": 2, "layer": 1, "agreement": 0.75}],
    },
    {
        **ORIGIN,
        "schema": "anydepth.fit/1",
        "static_divergence": 1.4,
        "static_skip_share": 0.37,
        "routed_divergence": 1.1,
        "skip_share": 0.36,
        "num_tokens": 100,
        "seconds": 3.0,
    },
    {
        **ORIGIN,
        "schema": "anydepth.train/1",
        "seconds": 9.0,
        "tokens_per_second": 100.0,
        "loss_history": [
            {
                "step": step,
                "lm_loss": 5.0 - step,
                "layer_router/target": 0.1,
                "mean_depth": 3.0,
                "learning_rate": 0.1,
                "figures": {"layer_router/backward_temperature": 1.0 - 0.2 * step, **GATE_METRICS},
                "layers": {"mixer": [1.0, 0.5], "ffn": [1.0, 0.5], "softmax": [1.0, 0.25]},
                **({"warnings": [f"gates are stuck: {HOSTILE}"]} if step == 2 else {}),
            }
            for step in (1, 2, 3)
        ],
        "gates": [GATES],
    },
    {
        **ORIGIN,
        "schema": "anydepth.eval/1",
        "perplexity": 13.25,
        "perplexity_interval": [12.75, 13.75],
        "gflops_per_token": 0.25,
        "full_depth": {
            "perplexity": 12.5,
            "perplexity_interval": [12.0, 13.0],
            "gflops_per_token": 0.31,
            "tasks": {"arc_easy": {"acc": 0.6, "acc_stderr": 0.05, "num_items": 4}},
        },
        "tasks": {
            "arc_easy": {"acc": 0.5, "acc_stderr": 0.06, "num_items": 4, "num_fewshot": 0, "layer_token_share": 0.75}
        },
        "num_tokens": 100,
        "mean_depth": 2.5,
        "per_layer": {"mixer": [1.0, 0.5], "ffn": [1.0, 0.25]},
    },
    {
        **ORIGIN,
        "dirty": True,
        "schema": "anydepth.bench/1",
        "rows": [
            {
                "engine": "fast",
                "weights": "bfloat16",
                "batch_size": 1,
                "prompt_tokens": 64,
                "new_tokens": 8,
                "full_depth": SPEED,
                "adapted": {**SPEED, "tokens_per_second": 25.0},
                **PHASE,
                "speedup_range": [1.2, 1.35],
                "speedup_interval": [1.21, 1.29],
                "is_noise": False,
                "prefill": PHASE,
                "decode": PHASE,
            },
        ],
    },
    {
        **ORIGIN,
        "schema": "anydepth.analyze/1",
        "num_windows": 2,
        "num_tokens": 100,
        "depth": DEPTH,
        "per_layer": [{"layer": layer, "mixer": DEPTH, "ffn": DEPTH} for layer in (0, 1)],
        "token_classes": [{"class": name, "num_tokens": 10, "depth": DEPTH} for name in ("word", "rare")],
        "positions": [{"first": first, "last": first, "num_tokens": 2, "depth": DEPTH} for first in (0, 1, 2)],
        "lengths": [{"length": 25, "num_tokens": 50, "depth": {"mean": 1.5, "low": None, "high": None}}],
        "losses": {
            "bins": [{"low": low, "high": low + 1, "num_tokens": 5, "depth": DEPTH} for low in (0.0, 1.0)],
            "rank_correlation": 0.1,
        },
        "gates": [GATES],
        "correlations": CORRELATIONS,
        "conditionality": {
            "mutual_information_bits": 0.02,
            "static_bits": 0.01,
            "p_value": 0.005,
            "num_gates": 1,
            "num_permutations": 199,
        },
        "seeds": [{"first": 0, "second": 1, "agreement": 0.9, "by_chance": 0.5, "kappa": 0.8}],
    },
    {
        **ORIGIN,
        "schema": "anydepth.generate/1",
        "prompt": HOSTILE,
        "tokens": ["a", HOSTILE, "\n", "$"],
        "depths": [2.0, 1.0, 1.5, 2.0],
        "layers": [[1.0, 1.0], [0.0, 1.0], [0.5, 1.0], [1.0, 1.0]],
        "num_layers": 2,
    },
]
SUMMARY = [
    {"label": "base model", "perplexity": 12.3456789, "agreement": 1.0, "tokens_per_second": 20.0, "speedup": 1.0},
    {"label": HOSTILE, "perplexity": 13.25, "agreement": 0.9, "tokens_per_second": 25.0, "speedup": 1.25},
]


def setting(label: str, perplexity: float, cost: float, num_seeds: int = 2) -> dict[str, Any]:
    """A row of a sweep."""
    shares = {
        "time_share": cost,
        "layer_token_share": cost,
        "speedup": 1 / cost,
        "agreement": 0.9,
        "gflops_per_token": 0.3 * cost,
    }
    return {"label": label, "values": {}, "num_seeds": num_seeds, "perplexity": perplexity, **shares}


def sweeps() -> list[dict[str, Any]]:
    return [
        {
            **ORIGIN,
            "schema": "anydepth.sweep/1",
            "label": label,
            "config": {"over": ["methods.0.target_skip=0.2,0.4"]},
            "points": [{}] * 4,
            "settings": [setting("full depth", 20.0, 1.0, 0), setting("target_skip 0.2", worse, 0.8)],
            "front": {"time": ["target_skip 0.2", "full depth"], "flops": ["target_skip 0.2", "full depth"]},
        }
        for label, worse in (("layer_router", 22.0), (HOSTILE, 24.0))
    ]


def bench_over_sizes() -> dict[str, Any]:
    bench = next(document for document in DOCUMENTS if document["schema"] == "anydepth.bench/1")
    rows = [
        {
            **bench["rows"][0],
            "batch_size": size,
            "prompt_tokens": length,
            "adapted": {**SPEED, "acceptance_by_place": [0.5, 0.4]},
        }
        for size in (1, 4)
        for length in (64, 512)
    ]
    return {**bench, "rows": rows}


def comparison() -> dict[str, Any]:
    """What `bench --compare` writes."""
    bench = bench_over_sizes()
    ways = (("full depth", 12.5, 1.0, 1.0), (HOSTILE, 13.25, 0.8, 1.25), ("lossless", 12.5, 1.0, 1.5))
    rows = [
        {
            **bench["rows"][0],
            "label": label,
            "perplexity": perplexity,
            "rouge_l": rouge_l,
            "num_runs": 5,
            "speedup": speedup,
            "adapted": {**SPEED, "tokens_per_second": 20 * speedup, "mean_depth": 2.0},
        }
        for label, perplexity, rouge_l, speedup in ways
    ]
    return {**bench, "rows": rows}


def run_document() -> dict[str, Any]:
    return {**ORIGIN, "schema": "anydepth.run/1", "stages": DOCUMENTS, "summary": SUMMARY}


def calibration(*, met: bool = True) -> dict[str, Any]:
    """Thresholds within a bound on the risk, or the most careful ones where none was shown."""
    return {
        **ORIGIN,
        "schema": "anydepth.calibrate/1",
        "thresholds": {"early_exit": [0.9, 0.95]},
        "risk": 0.02,
        "p_value": 0.01,
        "num_sequences": 200,
        "met": met,
        "config": {"max_risk": 0.05, "confidence": 0.95},
        "speedup": 1.1,
    }


def every_kind() -> list[dict[str, Any]]:
    """Documents that make every figure of the page."""
    text = {
        **DOCUMENTS[-1],
        "mixers": {"layers": [1, 3], "tokens": ["a", HOSTILE], "softmax": [[True, False], [True, True]]},
    }
    second = {**run_document(), "run": "another", "summary": []}
    return [run_document(), second, bench_over_sizes(), comparison(), text, calibration(), capacities(), *sweeps()]


def capacities() -> dict[str, Any]:
    """One checkpoint at two capacities, and the control."""
    shared = {
        "speedup": 1.2,
        "speedup_range": [1.1, 1.3],
        "speedup_interval": [1.15, 1.25],
        "is_noise": False,
        "perplexity": 13.0,
        "perplexity_increase": 0.04,
        "perplexity_increase_range": [0.02, 0.06],
    }
    rows = [
        {**shared, "label": f"capacity {value}", "capacity": value, "realised_capacity": value, "skip_share": {}}
        for value in (0.9, 0.5)
    ]
    nothing = {"speedup": None, "speedup_range": None, "speedup_interval": None, "perplexity_increase_range": None}
    rows.insert(0, {**rows[0], **nothing, "label": "capacity 1", "capacity": 1, "realised_capacity": 1.0})
    return {
        **ORIGIN,
        "schema": "anydepth.calibrate/1",
        "met": None,
        "thresholds": {"ffn_router": 0.1},
        "sweep": rows,
        "control": {**shared, "label": "full depth, int8"},
        "engine": {"engine": "fast", "weights": "bfloat16"},
    }


class Outline(HTMLParser):
    """Tags opened and closed in turn, headings, and what pictures point at."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data.strip())


def outline_of(html: str | Page) -> Outline:
    """Return the outline of a page, or of the sections of one that is not written yet."""
    outline = Outline()
    outline.feed("".join(html.parts) if isinstance(html, Page) else html)
    return outline


def table_of(page: Page, name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV of the page."""
    with (page.folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def document_of(kind: str) -> dict[str, Any]:
    """Return the document of a kind among those of the run."""
    return next(document for document in DOCUMENTS if document["schema"] == f"anydepth.{kind}/1")
