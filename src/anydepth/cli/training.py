"""Commands that run or train a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.cli import options as opt
from anydepth.cli.application import app
from anydepth.cli.display import Printer, step_line, table
from anydepth.report import wording

COLUMNS = {
    "perplexity": "perplexity",
    "agreement": "agreement",
    "mean_depth": "depth",
    "layer_token_share": "FLOP share",
    "gflops_per_token": "GFLOPs",
    "tokens_per_second": "tokens/s",
    "speedup": "speed-up",
    "ideal_speedup": "ideal",
    "realised": "efficiency",
}


@app.command()
def run(
    recipe: opt.RecipePath,
    out: opt.Out,
    overrides: opt.Overrides = None,
    seed: opt.RecipeSeed = None,
    device: opt.RecipeDevice = None,
    dtype: opt.RecipeDType = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run a recipe from start to end.

    Search, train, calibrate, eval, bench, a sample, report.html. Continues where it was interrupted.
    """
    _run(recipe, out, opt.recipe_overrides(overrides, seed, device, dtype), Printer(as_json, quiet))


@app.command()
def demo(
    out: opt.Out = Path("demo"),
    overrides: opt.Overrides = None,
    seed: opt.RecipeSeed = None,
    device: opt.RecipeDevice = None,
    dtype: opt.RecipeDType = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run every stage on the embedded model, in minutes.

    Ends with a table and report.html.
    """
    from importlib.resources import as_file, files

    with as_file(files("anydepth") / "demo.yaml") as path:
        _run(path, out, opt.recipe_overrides(overrides, seed, device, dtype), Printer(as_json, quiet))


def _run(recipe: Path, out: Path, overrides: list[str], printer: Printer) -> None:
    printer.result(_runner(recipe, out, overrides, printer).run(), lambda document: show_run(document, out))


def _runner(recipe: Path, out: Path, overrides: list[str], printer: Printer) -> Any:
    from anydepth.methods.of_recipe import load_recipe

    loaded = load_recipe(recipe, overrides)  # A mistake in the recipe is reported before the slow import.
    from anydepth.runs.run import Runner

    return Runner(loaded, out, printer.progress, step_line(printer, loaded))


@app.command()
def train(
    recipe: opt.RecipePath,
    out: opt.Out,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where training stopped.")] = False,
    overrides: opt.Overrides = None,
    seed: opt.RecipeSeed = None,
    device: opt.RecipeDevice = None,
    dtype: opt.RecipeDType = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train what a recipe names; write a checkpoint folder.

    Also under `accelerate launch`, in several processes: recipes/parallel/ has the configurations.
    """
    from anydepth.training.parallel import first_alone, together

    printer = Printer(as_json, quiet)
    with together():
        runner = _runner(recipe, out, opt.recipe_overrides(overrides, seed, device, dtype), printer)
        if not resume:
            with first_alone():
                runner.forget()
        runner.check(("search", "fit", "train"))
        runner.search()
        runner.fit()
        printer.result(runner.train(), lambda document: print(f"checkpoint: {document['checkpoint']}"))


def show_run(document: dict[str, Any], out: Path) -> None:
    """Print the summary of a run."""
    rows = []
    for row in document["summary"]:
        cells = {key: "" if row.get(key) is None else f"{row[key]:.3g}" for key in COLUMNS}
        rows.append([row["label"], *{**cells, "speedup": wording.speedup(row)}.values()])
    table(["", *COLUMNS.values()], rows)
    print(f"\nGFLOPs are those of a token; {wording.SPREAD}\n\n{out / 'report.html'}")
