"""The command line. The one place that prints errors: one line, exit code 2 for a mistake, 1 for a failed run.

Commands import what they need when they run, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.errors import RunError, UserError

app = typer.Typer(
    name="anydepth",
    help="Make a pretrained language model spend less compute on easy tokens, and measure what that buys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Annotated[str, typer.Argument(help="embedded, a hub name, a folder, a .gguf file, or a folder train wrote.")]
RecipePath = Annotated[Path, typer.Argument(help="YAML recipe; recipes/ has one per method.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …")]
DType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: train.max_steps=20.")]
Data = Annotated[str, typer.Option("--data", help="NAME:SPLIT (embedded:valid, wikitext-2:valid) or a text file.")]


INTERRUPTED = 128 + signal.SIGINT


class Printer:
    """Results to standard output, as a document or for people; progress to standard error."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def progress(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def result(self, document: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
        if self.as_json:
            from anydepth.measure.results import plain

            print(json.dumps(plain(document), ensure_ascii=False))
        else:
            show(document)


@app.command()
def inspect(
    target: Target,
    device: Device = "cpu",
    dtype: DType = "float32",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a model is made of, and which engines and methods apply to it."""
    from anydepth.measure.inspect import inspect_model, show_inspection
    from anydepth.measure.results import document
    from anydepth.training.checkpoint import load_target

    adapted, _ = load_target(target, dtype=dtype, device=device)
    fields = inspect_model(adapted)
    config = {"target": target, "dtype": dtype, "device": device}
    Printer(as_json, quiet).result(document("anydepth.inspect/1", seed=seed, config=config, **fields), show_inspection)


@app.command()
def methods(
    seed: Seed = 0, device: Device = "cpu", dtype: DType = "float32", as_json: Json = False, quiet: Quiet = False
) -> None:
    """Every method: its idea, lossless or lossy, trained or not, its options."""
    from anydepth.measure.inspect import list_methods, show_methods
    from anydepth.measure.results import document

    result = document("anydepth.methods/1", seed=seed, config={}, methods=list_methods())
    Printer(as_json, quiet).result(result, show_methods)


@app.command()
def run(
    recipe: RecipePath,
    out: Out,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The recipe's seed.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A recipe from start to end: search, train, eval, bench, sample, report. Goes on where it was interrupted."""
    _run(recipe, out, _flags(overrides, seed, device, dtype), Printer(as_json, quiet))


@app.command()
def demo(
    out: Out = Path("demo"),
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The recipe's seed.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole path on the embedded model and corpus, in minutes; ends with a table and report.html."""
    from importlib.resources import as_file, files

    with as_file(files("anydepth") / "demo.yaml") as path:
        _run(path, out, _flags(overrides, seed, device, dtype), Printer(as_json, quiet))


def _run(recipe: Path, out: Path, overrides: list[str], printer: Printer) -> None:
    runner = _runner(recipe, out, overrides, printer)
    runner.on_step = _step_line(printer, runner.recipe)
    printer.result(runner.run(), lambda document: _show_run(document, out))


@app.command()
def train(
    recipe: RecipePath,
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The recipe's seed.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train what a recipe names; writes a checkpoint folder."""
    printer = Printer(as_json, quiet)
    runner = _runner(recipe, out, _flags(overrides, seed, device, dtype), printer)
    runner.on_step = _step_line(printer, runner.recipe)
    if not resume:
        runner.forget("search", "train")
    runner.search()
    printer.result(runner.train(), lambda document: print(f"checkpoint: {document['checkpoint']}"))


@app.command()
def search(
    target: Target,
    out: Out,
    strategy: Annotated[str, typer.Option(help="influence or greedy.")] = "influence",
    budget: Annotated[float, typer.Option(help="Share of layers, or of branches, to leave out.")] = 0.25,
    branches: Annotated[bool, typer.Option("--branches", help="Choose among mixers and FFNs.")] = False,
    data: Data = "embedded:train",
    num_windows: Annotated[int, typer.Option(help="Windows of text.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the layers or branches a model misses least; writes a checkpoint folder with the skip set."""
    from anydepth.calibration.skip_search import search as search_skip_set
    from anydepth.execution.adapted import attach
    from anydepth.measure.results import document, write_json
    from anydepth.models.load import load_model
    from anydepth.training.checkpoint import save
    from anydepth.training.data import load_windows

    printer = Printer(as_json, quiet)
    options = {
        "target": target,
        "strategy": strategy,
        "budget": budget,
        "branches": branches,
        "data": data,
        "num_windows": num_windows,
        "sequence_length": sequence_length,
        "dtype": dtype,
    }
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    windows = load_windows(data, tokenizer, sequence_length, max_windows=num_windows)
    printer.progress(f"searching by {strategy} on {windows.numel()} tokens of {data} …")
    found = search_skip_set(model, windows, strategy=strategy, budget=budget, branches=branches)
    save(attach(model, found.config), out, base=target)
    result = document(
        "anydepth.search/1",
        seed=seed,
        config=options,
        **found.config.model_dump(),
        agreement=found.agreement,
        seconds=found.seconds,
        trajectory=found.trajectory,
    )
    write_json(out / "search.json", result)
    printer.result(result, _show_search)


@app.command(name="eval")
def evaluate(
    target: Target,
    data: Data = "embedded:valid",
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    limit: Annotated[int | None, typer.Option(help="Score only the first windows.")] = None,
    full_depth: Annotated[bool, typer.Option("--full-depth", help="Score the untouched model only.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity with routing on, beside the untouched model."""
    from anydepth.measure.evaluate import evaluate as score
    from anydepth.measure.results import document
    from anydepth.training.checkpoint import load_target
    from anydepth.training.data import load_windows

    printer = Printer(as_json, quiet)
    adapted, tokenizer = load_target(target, dtype=dtype, device=device)
    windows = load_windows(data, tokenizer, sequence_length, max_windows=limit)
    printer.progress(f"scoring {windows.numel()} tokens of {data} …")
    config = {
        "target": target,
        "data": data,
        "sequence_length": sequence_length,
        "limit": limit,
        "dtype": dtype,
        "full_depth": full_depth,
    }
    fields = score(adapted, windows, full_depth_only=full_depth)
    printer.result(document("anydepth.eval/1", seed=seed, config=config, label=_label(adapted), **fields), _show_eval)


@app.command()
def bench(
    target: Target,
    batch_sizes: Annotated[str, typer.Option(help="Rows generated together: 1,4,8.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths: 64,512.")] = "64",
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per row.")] = 64,
    num_runs: Annotated[int, typer.Option(help="Measured pairs per row.")] = 5,
    engine: Annotated[str, typer.Option(help="hf; the fast engine comes later.")] = "hf",
    prompts: Annotated[Path | None, typer.Option(help="JSON lines with prompt, turns or messages.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Bench a method on a base model: 'skip_set'.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="Its options: skip_layers=[5,9].")] = None,
    data: Data = "embedded:valid",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Paired wall-clock: full depth and adapted in turn in one process."""
    from anydepth.execution.adapted import attach, detach
    from anydepth.measure.bench import bench as time_pairs
    from anydepth.measure.bench import bench_prompts, load_prompts, read_prompts
    from anydepth.measure.results import document
    from anydepth.training.checkpoint import load_target

    if engine != "hf":
        raise UserError(f"engine '{engine}' is not there yet; use --engine hf")
    printer = Printer(as_json, quiet)
    adapted, tokenizer = load_target(target, dtype=dtype, device=device, merge=True)
    if against:
        adapted = attach(detach(adapted), [_method_options(name, options or []) for name in against])
    if not adapted.methods:
        raise UserError(
            f"{target} has no method attached; give a folder that train or search wrote, or --against METHOD"
        )
    sizes, lengths = _numbers("batch-sizes", batch_sizes), _numbers("prompt-tokens", prompt_tokens)
    config = {
        "target": target,
        "batch_sizes": batch_sizes,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "num_runs": num_runs,
        "dtype": dtype,
        "data": data,
        "against": against,
        "prompts": prompts,
        "options": options,
    }

    def say(row: dict[str, Any]) -> None:
        printer.progress(_bench_line(row))

    if prompts is not None:
        texts = read_prompts(prompts, tokenizer)
        rows = bench_prompts(adapted, tokenizer, texts, batch_sizes=sizes, new_tokens=new_tokens, on_row=say)
    else:
        windows = load_prompts(adapted, tokenizer, data, lengths, new_tokens)
        rows = time_pairs(
            adapted,
            windows,
            batch_sizes=sizes,
            prompt_tokens=lengths,
            new_tokens=new_tokens,
            num_runs=num_runs,
            on_row=say,
        )
    result = document("anydepth.bench/1", seed=seed, config=config, label=_label(adapted), rows=rows)
    printer.result(result, _show_bench)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON documents, or folders of runs.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """One self-contained page out of result documents, with PNG and CSV beside it."""
    from anydepth.measure.results import read_document
    from anydepth.report.page import write_report

    paths = [path / "run.json" if path.is_dir() else path for path in results]
    written = write_report([read_document(path) for path in paths], out)
    print(f"{out} and {len(written) - 1} files beside it")


@app.command()
def generate(
    target: Target,
    prompt: Annotated[str, typer.Option(help="Text to go on from, or - for standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    show_depth: Annotated[bool, typer.Option("--show-depth", help="Colour each token by the layers it ran.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Text, with the depth of every token."""
    from anydepth.inference.generate import generate as write
    from anydepth.measure.results import document
    from anydepth.training.checkpoint import load_target

    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    text = sys.stdin.read() if prompt == "-" else prompt
    adapted, tokenizer = load_target(target, dtype=dtype, device=device, merge=True)
    fields = write(adapted, tokenizer, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    config = {"target": target, "max_new_tokens": max_new_tokens, "temperature": temperature, "dtype": dtype}
    result = document("anydepth.generate/1", seed=seed, config=config, label=_label(adapted), **fields)
    Printer(as_json, quiet).result(result, lambda document: _show_text(document, show_depth))


# --- shared by commands -----------------------------------------------------------------------------------


def _runner(recipe: Path, out: Path, overrides: list[str], printer: Printer) -> Any:
    from anydepth.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    from anydepth.measure.run import Runner

    return Runner(loaded, out, printer.progress)


def _flags(overrides: list[str] | None, seed: int | None, device: str | None, dtype: str | None) -> list[str]:
    """The flags that every command takes, as recipe overrides. A seed is the recipe's and the training's."""
    flags = list(overrides or [])
    for key, value in (("seed", seed), ("model.device", device), ("model.dtype", dtype)):
        if value is not None:
            flags.append(f"{key}={value}")
    return flags


def _step_line(printer: Printer, recipe: Any) -> Callable[[dict[str, float]], None]:
    total = recipe.train.max_steps if recipe.train is not None else 0
    every = max(total // 20, 1)

    def line(row: dict[str, float]) -> None:
        if row["step"] % every == 0 or row["step"] == 1:
            terms = "  ".join(
                f"{name} {value:.3f}" for name, value in row.items() if name not in ("step", "learning_rate")
            )
            printer.progress(f"  step {int(row['step'])}/{total}  {terms}")

    return line


def _method_options(name: str, options: list[str]) -> dict[str, Any]:
    import yaml

    chosen: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set takes OPTION=VALUE, such as skip_layers=[5,9]; came '{option}'")
        chosen[key] = yaml.safe_load(value)
    return chosen


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--{option} takes positive numbers with commas, such as 1,4,8; came '{text}'")
    return [int(part) for part in parts]


def _label(adapted: Any) -> str:
    return " + ".join(adapted.methods) or "full depth"


# --- for people -------------------------------------------------------------------------------------------


def _table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _show_run(document: dict[str, Any], out: Path) -> None:
    rows = []
    for row in document["summary"]:
        numbers = [
            row.get(key)
            for key in (
                "perplexity",
                "agreement",
                "mean_depth",
                "layer_token_share",
                "speedup",
                "ideal_speedup",
                "realised",
            )
        ]
        rows.append([row["label"], *("" if number is None else f"{number:.3g}" for number in numbers)])
    _table(["", "perplexity", "agreement", "depth", "FLOP share", "speed-up", "ideal", "realised"], rows)
    print(f"\n{out / 'report.html'}")


def _show_search(document: dict[str, Any]) -> None:
    for key in ("skip_layers", "skip_mixers", "skip_ffns"):
        if document[key]:
            print(f"{key}: {document[key]}")
    print(f"agreement with full depth: {document['agreement']:.3f}  ({document['seconds']:.0f} s)")


def _show_eval(document: dict[str, Any]) -> None:
    keys = ("perplexity", "loss", "agreement", "mean_depth", "layer_token_share")
    full = document["full_depth"]
    rows = [
        [label, *(f"{part[key]:.4g}" for key in keys)]
        for label, part in (("untouched", full), (document["label"], document))
    ]
    _table(["", "perplexity", "loss", "agreement", "depth", "FLOP share"], rows)
    print(f"\n{document['num_tokens']} tokens scored")


def _bench_line(row: dict[str, Any]) -> str:
    return (
        f"  batch {row['batch_size']}, prompt {row['prompt_tokens']}, new {row['new_tokens']}: "
        f"speed-up {row['speedup']:.2f} of {row['ideal_speedup']:.2f}"
    )


def _show_bench(document: dict[str, Any]) -> None:
    rows = []
    for row in document["rows"]:
        numbers = [
            row["full_depth"]["tokens_per_second"],
            row["adapted"]["tokens_per_second"],
            row["speedup"],
            row["ideal_speedup"],
            row["realised"],
            row["prefill"]["realised"],
            row.get("decode", {}).get("realised"),
        ]
        rows.append(
            [
                f"{row['batch_size']} × {row['prompt_tokens']}+{row['new_tokens']}",
                *("" if number is None else f"{number:.3g}" for number in numbers),
            ]
        )
    _table(["batch", "full tok/s", "adapted tok/s", "speed-up", "ideal", "realised", "prefill", "decode"], rows)


def _show_text(document: dict[str, Any], show_depth: bool) -> None:
    if not show_depth:
        print(document["text"])
        return
    from rich.console import Console
    from rich.text import Text

    num_layers = document["num_layers"]
    shades = ("#1b7837", "#7fbf7b", "#b8860b", "#d6604d", "#b2182b")
    text = Text()
    for token, depth in zip(document["tokens"], document["depths"], strict=True):
        text.append(token, style=shades[min(int(depth / num_layers * len(shades)), len(shades) - 1)])
    console = Console()
    console.print(text)
    legend = Text("layers run: ")
    for number, shade in enumerate(shades):
        legend.append(f"≤{round((number + 1) * num_layers / len(shades))} ", style=shade)
    console.print(legend)
    if not console.is_terminal:
        print("depths:", " ".join(f"{depth:g}" for depth in document["depths"]))


def main() -> None:
    """Entry point: runs a command and turns every error into one line and an exit code."""
    sys.exit(_exit_code(sys.argv[1:]))


def _exit_code(arguments: list[str]) -> int:
    # Libraries warn each other of coming versions; no user of a command can act on that.
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    interrupted = "interrupted; `train --resume` and `run` go on where they were"
    try:
        # typer turns Ctrl-C into a returned 130.
        if app(arguments or ["--help"], prog_name="anydepth", standalone_mode=False) == INTERRUPTED:
            return _fail(interrupted, INTERRUPTED)
    except typer.TyperException as error:
        return _fail(f"{error} (see anydepth --help)", 2)
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(interrupted, INTERRUPTED)
    except BrokenPipeError:
        # The reader went away, as `head` does: not our failure. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("ANYDEPTH_DEBUG") == "1":
            raise
        reason = " ".join(str(error).split())[:300]
        return _fail(f"failed with {type(error).__name__}: {reason} (ANYDEPTH_DEBUG=1 shows where)", 1)
    return 0


def _fail(line: str, code: int) -> int:
    print(f"anydepth: {' '.join(line.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
