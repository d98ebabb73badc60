"""The report page: self-contained, every text escaped, the numbers those of the documents."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anydepth.errors import UserError
from anydepth.report.page import write_report

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
                "figures": {"layer_router/backward_temperature": 1.0 - 0.2 * step},
                "layers": {"mixer": [1.0, 0.5], "ffn": [1.0, 0.5]},
            }
            for step in (1, 2, 3)
        ],
    },
    {
        **ORIGIN,
        "schema": "anydepth.eval/1",
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
                "batch_size": 1,
                "prompt_tokens": 64,
                "new_tokens": 8,
                "full_depth": SPEED,
                "adapted": {**SPEED, "tokens_per_second": 25.0},
                **PHASE,
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
        "lengths": [],
        "losses": {
            "bins": [{"low": low, "high": low + 1, "num_tokens": 5, "depth": DEPTH} for low in (0.0, 1.0)],
            "rank_correlation": 0.1,
        },
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
    {"label": "untouched", "perplexity": 12.3456789, "agreement": 1.0, "tokens_per_second": 20.0, "speedup": 1.0},
    {"label": HOSTILE, "perplexity": 13.25, "agreement": 0.9, "tokens_per_second": 25.0, "speedup": 1.25},
]


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
        elif tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    run = {**ORIGIN, "schema": "anydepth.run/1", "stages": DOCUMENTS, "summary": SUMMARY}
    return write_report([run], tmp_path_factory.mktemp("report") / "page.html")


def test_the_page_is_whole_and_self_contained(written: list[Path]) -> None:
    html = written[0].read_text()
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    assert outline.headings == [
        "What it buys", "Skip set", "The router before training", "Training", "Which layers run", "Speed",
        "Where depth goes", "A text, token by token", "How it was made",
    ]  # fmt: skip
    assert len(outline.images) == 11
    for image in outline.images:
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert image["alt"]
    assert not re.search(r"(src|href)=.?(https?:)?//", html)
    assert "Uncommitted changes." in html


def test_tables_are_the_numbers(written: list[Path]) -> None:
    path = next(path for path in written if path.name == "summary.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert float(rows[0]["perplexity"]) == 12.3456789
    assert rows[1]["label"] == HOSTILE
    assert "12.35" in written[0].read_text()


def test_every_file_named_was_written(written: list[Path]) -> None:
    assert all(path.stat().st_size > 0 for path in written)
    assert sum(path.suffix == ".png" for path in written) == 11


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_mixers_are_shown_and_trainings_compared(tmp_path: Path) -> None:
    train = {
        **ORIGIN,
        "schema": "anydepth.train/1",
        "seconds": 9.0,
        "tokens_per_second": 100.0,
        "loss_history": [
            {"step": step, "lm_loss": 5.0, "figures": {"mixer_router/softmax_share": 0.5}} for step in (1, 2)
        ],
    }
    text = {
        **DOCUMENTS[-1],
        "mixers": {
            "layers": [1, 3],
            "tokens": ["a", HOSTILE, "b"],
            "softmax": [[True, False], [True, True], [False] * 2],
        },
    }
    share = {"layer": 1, "softmax_share": 0.25, "entropy": 0.811}
    runs: list[dict[str, Any]] = [
        {
            **ORIGIN,
            "schema": "anydepth.run/1",
            "run": name,
            "stages": [train, {**DOCUMENTS[3], "mixers": [share]}, text],
        }
        for name in ("dynamic", "dynamic", HOSTILE)
    ]
    written = write_report(runs, tmp_path / "page.html")
    outline = Outline()
    outline.feed(written[0].read_text())
    assert outline.headings[0] == "Trainings side by side"
    assert outline.headings.count("Which mixer, token by token") == 3
    names = [path.name for path in written]
    assert {"losses.png", "0-train-figures.png", "1-eval-mixers.csv", "2-generate-mixers.png"} <= set(names)
    assert "softmax in 2 of 2 layers" in written[0].read_text()


def test_sweeps_stand_side_by_side(tmp_path: Path) -> None:
    def setting(label: str, perplexity: float, cost: float, num_seeds: int = 2) -> dict[str, Any]:
        shares = {"time_share": cost, "layer_token_share": cost, "speedup": 1 / cost, "agreement": 0.9}
        return {"label": label, "values": {}, "num_seeds": num_seeds, "perplexity": perplexity, **shares}

    sweeps = [
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
    outline = Outline()
    written = write_report(sweeps, tmp_path / "page.html")
    outline.feed(written[0].read_text())
    assert outline.headings[0] == "Quality against cost"
    assert outline.headings[1] == "Sweep: layer_router"
    assert {"fronts.png", "0-sweep.csv", "1-sweep.csv"} <= {path.name for path in written}


def test_speed_over_sizes_and_drafts_by_place(tmp_path: Path) -> None:
    bench = next(document for document in DOCUMENTS if document["schema"] == "anydepth.bench/1")
    rows = [
        {**bench["rows"][0], "batch_size": size, "prompt_tokens": length,
         "adapted": {**SPEED, "acceptance_by_place": [0.5, 0.4]}}
        for size in (1, 4) for length in (64, 512)
    ]  # fmt: skip
    written = write_report([{**bench, "rows": rows}], tmp_path / "page.html")
    assert {"0-bench-lines.png", "0-bench-acceptance.png"} <= {path.name for path in written}
