"""What commands print: documents as JSON or for people on standard output, progress on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from anydepth.processes import rank


class Printer:
    """Results to standard output, as a document or for people; progress to standard error."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet or rank() > 0

    def progress(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def track(self, steps: Iterable[Any], label: str = "working") -> Iterable[Any]:
        """The same, with a bar on standard error while somebody looks."""
        console = Console(stderr=True)
        return track(steps, label, console=console, transient=True, disable=self.quiet or not console.is_terminal)

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """A sign of life on standard error while somebody looks."""
        console = Console(stderr=True)
        with console.status(label) if console.is_terminal and not self.quiet else nullcontext():
            yield

    def result(self, document: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
        if rank() > 0:  # the first of several processes speaks for all
            return
        if self.as_json:
            from anydepth.json_io import plain

            print(json.dumps(plain(document), ensure_ascii=False))
        else:
            show(document)


def table(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width to fold labels for.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)


def show_inspection(document: dict[str, Any]) -> None:
    """For people."""
    print(
        f"{document['family']}: {document['num_layers']} layers × {document['hidden_size']}, "
        f"{document['num_parameters'] / 1e6:.1f} M parameters, {document['weight_bytes'] / 2**20:.0f} MiB, "
        f"attention by {document['attention_implementation']}"
    )
    kinds = Counter(
        tuple(layer[key] for key in ("mixer", "mixer_flops", "skipped_mixer_flops", "ffn_flops", "break_even_length"))
        for layer in document["layers"]
    )
    for (mixer, mixer_flops, skipped, ffn_flops, length), count in kinds.items():
        print(
            f"  {count} layers: {mixer} {mixer_flops / 1e6:.2f} MFLOP a token ({skipped / 1e6:.2f} where it is skipped "
            f"and leaves K/V), FFN {ffn_flops / 1e6:.2f} MFLOP"
            + (f"; a linear mixer beside it costs less for texts longer than {length}" if length is not None else "")
        )
    print(f"attached: {', '.join(document['attached']) or 'nothing'}")
    for title in ("engines", "methods"):
        print(f"{title}: " + ", ".join(f"{name} ({state})" for name, state in document[title].items()))
    for note in document["notes"]:
        print(f"note: {note}")


def show_methods(document: dict[str, Any]) -> None:
    """For people."""
    for method in document["methods"]:
        print(
            f"{method['name']}: {method['summary']} ({'lossless' if method['lossless'] else 'lossy'}, "
            f"{'trained' if method['trained'] else 'not trained'})"
        )
        for key, option in method["options"].items():
            default = "required" if option["required"] else option["default"]
            print(f"    {key} = {default}: {option['help']}")


def show_run(document: dict[str, Any], out: Path) -> None:
    keys = ("perplexity", "agreement", "mean_depth", "layer_token_share", "gflops_per_token", "tokens_per_second",
            "speedup", "ideal_speedup", "realised")  # fmt: skip
    rows = []
    for row in document["summary"]:
        cells = ["" if (number := row.get(key)) is None else f"{number:.3g}" for key in keys]
        cells[keys.index("speedup")] = _speedup(row, times="")
        rows.append([row["label"], *cells])
    titles = ["perplexity", "agreement", "depth", "FLOP share", "GFLOPs", "tokens/s", "speed-up", "ideal", "realised"]
    table(["", *titles], rows)
    print(f"\nGFLOPs are those of a token; {SPREAD}\n\n{out / 'report.html'}")


SPREAD = "in brackets the 95% interval of a speed-up; noise: it contains 1, so that no difference was shown"


def _speedup(row: dict[str, Any], times: str = "×") -> str:
    """A speed-up with its interval, and whether that is a difference at all."""
    if row.get("speedup") is None:
        return ""
    text, interval = f"{row['speedup']:.2f}{times}", row.get("speedup_interval")
    if interval is not None:
        text += f" ({interval[0]:.2f}–{interval[1]:.2f})"
    return f"{text} noise" if row.get("is_noise") else text


def show_sweep(document: dict[str, Any]) -> None:
    """For people."""
    front = document["front"]
    rows = [
        [
            row["label"],
            str(row["num_seeds"] or ""),
            _around(row["perplexity"], row.get("perplexity_range"), 4),
            _around(row["time_share"], row.get("time_share_range"), 3)
            + (" *" if row["label"] in front["time"] else "  "),
            _around(row["layer_token_share"], row.get("layer_token_share_range"), 3)
            + (" *" if row["label"] in front["flops"] else "  "),
            f"{row['gflops_per_token']:.3g}",
        ]
        for row in document["settings"]
    ]
    table(["", "seeds", "perplexity", "time", "FLOPs", "GFLOPs a token"], rows)
    print(
        "time and FLOPs as shares of full depth's; in brackets from where to where: seeds, and 95% of timed pairs\n"
        "* cheaper than all better ones with a star: the ranges do not meet"
    )


def _around(middle: float, bounds: list[float] | None, digits: int) -> str:
    if bounds is None or bounds[0] == bounds[1]:
        return f"{middle:.{digits}g}"
    low, high = (float(bound) for bound in bounds)
    return f"{middle:.{digits}g} ({low:.{digits}g}–{high:.{digits}g})"


def show_search(document: dict[str, Any]) -> None:
    for key in ("skip_layers", "skip_mixers", "skip_ffns"):
        if document[key]:
            print(f"{key}: {document[key]}")
    print(f"agreement with full depth: {document['agreement']:.3f}  ({document['seconds']:.0f} s)\n")
    found = document["held_out"]
    if found["rows"]:
        rows = [
            [row["label"], f"{row['perplexity']:.4g}", f"{row['loss']:.3f}", f"{row['weight_bytes'] / 1e6:.0f}"]
            for row in found["rows"]
        ]
        table(["", "perplexity", "loss", "MB of weights a token"], rows)
        print(f"on {found['num_tokens']} tokens that the search did not see")
    if found["warning"]:
        print(f"warning: {found['warning']}")


def show_calibration(document: dict[str, Any]) -> None:
    for name, threshold in document["thresholds"].items():
        values = threshold if isinstance(threshold, list) else [threshold]
        print(f"{name}: threshold {', '.join(f'{float(value):.4g}' for value in values)}")
    if "p_value" in document:
        if document["met"]:
            bound, confidence = document["config"]["max_risk"], document["config"]["confidence"]
            print(
                f"risk {document['risk']:.3f} on {document['num_sequences']} texts; at most {bound:g} with confidence "
                f"{confidence:g} (p {document['p_value']:.2g})"
            )
        else:
            print("no setting could be shown to keep the bound: nothing is skipped")
        return
    if "sweep" in document:
        _show_capacities(document)
        return
    for name, row in document["skip_share"].items():
        print(
            f"{name} skips {row['held_out']:.1%} of its decisions on held-out text, {row['calibration']:.1%} on the "
            f"text of calibration; {row['target']:.1%} was set"
        )
    if document["speedup"] is not None:
        print(f"speed-up: {_speedup(document)}: median of fresh pairs and its 95% interval")
    if document["perplexity_increase"] is not None:
        print(f"perplexity: {document['perplexity_increase']:+.1%} against the same model at full depth")
    held_out = document["held_out"]
    print(
        f"perplexity of held-out text: {held_out['perplexity']:.4g}, {held_out['perplexity_increase']:+.1%} against "
        f"{held_out['full_depth_perplexity']:.4g} of the same model at full depth (untouched model: "
        f"{held_out['untouched_perplexity']:.4g})"
    )


def _show_capacities(document: dict[str, Any]) -> None:
    """Show a row per capacity, and the control."""
    control = document["control"]
    rows = [
        [
            row["label"],
            "" if "realised_capacity" not in row else f"{row['realised_capacity']:.1%}",
            _speedup(row),
            f"{row['perplexity']:.4g}",
            _percent(row["perplexity_increase"], row["perplexity_increase_range"]),
        ]
        for row in (*document["sweep"], *([] if control is None else [control]))
    ]
    table(["", "run on held-out text", "speed-up", "perplexity", "increase"], rows)
    engine = document["engine"]
    print(
        f"speed-up over full depth on engine {engine['engine']} {engine['weights']}; {SPREAD}\n"
        "increase over the same model at full depth, in brackets 95%"
    )


def _percent(middle: float, bounds: list[float] | None) -> str:
    return f"{middle:+.1%}" + ("" if bounds is None else f" ({bounds[0]:+.1%} to {bounds[1]:+.1%})")


def show_eval(document: dict[str, Any]) -> None:
    keys = ("loss", "agreement", "mean_depth", "layer_token_share", "gflops_per_token")
    full, note = document["full_depth"], document.get("note")
    parts = {"untouched": full, "full depth, LoRA on": document.get("full_depth_adapted")}
    if not note:
        parts[document["label"]] = document
    rows = [
        [label, _around(float(part["perplexity"]), part["perplexity_interval"], 4)]
        + [f"{float(part[key]):.4g}" for key in keys]
        for label, part in parts.items()
        if part is not None
    ]
    table(["", "perplexity", "loss", "agreement", "depth", "FLOP share", "GFLOPs a token"], rows)
    spread = "; in brackets 95%, from how windows differ" if full["perplexity_interval"] else ""
    print(f"\n{document['num_tokens']} tokens scored{spread}" + (f"; {document['label']}: {note}" if note else ""))
    for method, share in document.get("skip_share", {}).items():
        print(f"{method} skips {share:.1%} of its decisions here")
    if "tasks" in document:
        _show_tasks(document)
    if "exits" in document:
        print()
        rows = [[str(row["layers"]), f"{row['loss']:.3f}", f"{row['agreement']:.3f}"] for row in document["exits"]]
        table(["layers", "loss", "agreement"], rows)


def _show_tasks(document: dict[str, Any]) -> None:
    """Print scores of tasks; those of the adapted model where they can differ."""
    from anydepth.measure.results import task_scores

    full = document["full_depth"]["tasks"]
    columns, rows = ["task", "metric", "items", "untouched", document["label"], "change", "FLOP share"], []
    for name, task in document["tasks"].items():
        for metric, score in task_scores(task).items():
            ours = [_with_error(*score), _change(task, metric), f"{task['layer_token_share']:.3g}"]
            rows.append([name, metric, str(task["num_items"]), _with_error(*task_scores(full[name])[metric]), *ours])
    if all("changes" not in task for task in document["tasks"].values()):
        columns, rows = columns[:4], [row[:4] for row in rows]
    print()
    table(columns, rows)
    print("± one standard error; of the change over the same items")


def _with_error(score: float, error: float | None) -> str:
    return f"{score:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _change(task: dict[str, Any], metric: str) -> str:
    change, error = task.get("changes", {}).get(metric, (None, None))
    return "" if change is None else f"{change:+.3g} ± {error:.2g}"


def bench_line(row: dict[str, Any]) -> str:
    return (
        f"  {row['engine']} {row['weights']}, batch {row['batch_size']}, prompt {row['prompt_tokens']}, "
        f"new {row['new_tokens']}: " + _told(row)
    )


def _told(row: dict[str, Any]) -> str:
    if row["speedup"] is None:
        return f"{row['full_depth']['tokens_per_second']:.1f} tokens/s, nothing attached"
    return f"speed-up {_speedup(row)} of {row['ideal_speedup']:.2f}"


def show_bench(document: dict[str, Any]) -> None:
    for row in document["rows"]:
        print(
            f"{row['engine']} {row['weights']}, batch {row['batch_size']}, prompt {row['prompt_tokens']}, new "
            f"{row['new_tokens']}: {_rates(row)}"
        )
        for name in ("total", "prefill", "decode"):
            part = row if name == "total" else row.get(name)
            if part is not None and part["speedup"] is not None:
                print(
                    f"  {name:8}{_speedup(part)} of {part['ideal_speedup']:.2f}× that the skipped work allows "
                    f"({part['realised']:.0%})"
                )
        if "over_first" in row:
            over = row["over_first"]
            print(
                f"  over {over['engine']} {over['weights']}: {over['full_depth']['total']:.2f}× at full depth, "
                f"{over['adapted']['total']:.2f}× adapted"
            )
        if "roofline" in row:
            roof = row["roofline"]
            print(
                f"  roofline: a step reads {roof['full_depth']['bytes_per_step'] / 1e6:.0f} MB at full depth, "
                f"{roof['full_depth']['share']:.0%} of the {roof['read_bytes_per_second'] / 1e9:.1f} GB/s that memory "
                f"gives; adapted {roof['adapted']['bytes_per_step'] / 1e6:.0f} MB, {roof['adapted']['share']:.0%}"
            )
    for row in document.get("queues", []):
        print(
            f"{row['num_requests']} requests queued, {row['batch_size']} at a time, {row['weights']}: {_rates(row)}"
            + (f", {_speedup(row)}" if row["speedup"] is not None else "")
        )
    if any(row["speedup"] is not None for row in document["rows"]):
        print(SPREAD)


def _rates(row: dict[str, Any]) -> str:
    """Tokens per second of both sides; of one where nothing is attached."""
    full = f"{row['full_depth']['tokens_per_second']:.1f}"
    if row["speedup"] is None:
        return f"{full} tokens/s, nothing attached"
    return f"{row['adapted']['tokens_per_second']:.1f} tokens/s adapted, {full} at full depth"


SHADES = ("#1b7837", "#7fbf7b", "#b8860b", "#d6604d", "#b2182b")
"""Of depth, shallow to deep."""


def shade_of(depth: float, num_layers: int) -> str:
    """The colour of a token that so many layers ran for."""
    return SHADES[max(math.ceil(depth / num_layers * len(SHADES)), 1) - 1]


def depth_legend(num_layers: int) -> Text:
    legend = Text("layers run: ")
    for number, shade in enumerate(SHADES):
        legend.append(f"≤{round((number + 1) * num_layers / len(SHADES))} ", style=shade)
    return legend


def show_text(document: dict[str, Any], show_depth: bool) -> None:
    if not show_depth:
        print(document["text"])
        return
    num_layers = document["num_layers"]
    text = Text()
    for token, depth in zip(document["tokens"], document["depths"], strict=True):
        text.append(token, style=shade_of(depth, num_layers))
    console = Console()
    console.print(text, soft_wrap=True)
    if console.is_terminal:
        console.print(depth_legend(num_layers))
    else:
        print("depths:", " ".join(f"{depth:g}" for depth in document["depths"]))


def show_export(document: dict[str, Any]) -> None:
    """For people."""
    print(
        f"{document['folder']}: {len(document['layers'])} of {document['num_layers']} layers, "
        f"{document['num_parameters'] / 1e6:.1f} M parameters; logits differ by {document['difference']:.1e} (relative)"
    )


NOT_IN_STEP_LINES = ("step", "learning_rate", "figures", "layers", "warnings")


def _is_minor(name: str) -> bool:
    """Tell metrics of gates that a step's line has no room for: all but their entropy."""
    metric = name.rpartition("/")[2]
    return metric.startswith("gate_") and metric != "gate_entropy"


def step_line(printer: Printer, recipe: Any) -> Callable[[dict[str, Any]], None]:
    parts = recipe.phases or [part for part in (recipe.train or recipe.drafter,) if part is not None]
    lengths = [part.max_steps for part in parts]
    total = None if None in lengths else sum(lengths) or None  # None: the number of windows will decide
    of, every = ("", 20) if total is None else (f"/{total}", max(total // 20, 1))

    first: dict[str, float] = {}

    def line(row: dict[str, Any]) -> None:
        for name, value in row.get("figures", {}).items():
            first.setdefault(name, value)
        if row["step"] % every == 0 or row["step"] == 1:
            terms = "  ".join(
                f"{name} {value:.3f}"
                for name, value in {**row, **row.get("figures", {})}.items()
                if name not in NOT_IN_STEP_LINES and not _is_minor(name) and value != first.get(name)  # moves
            )
            printer.progress(f"  step {int(row['step'])}{of}  {terms}")
        for text in row.get("warnings", []):
            printer.progress(f"  step {int(row['step'])}: warning: {text}")

    return line
