"""Commands that run or train a recipe, or search a skip set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anydepth.cli.application import app
from anydepth.cli.display import Printer, show_run, show_search, show_sweep, step_line
from anydepth.cli.options import (
    Data,
    Device,
    DType,
    Json,
    Out,
    Overrides,
    Quiet,
    RecipeDevice,
    RecipeDType,
    RecipePath,
    RecipeSeed,
    Seed,
    Target,
    at_least,
    check_out,
    recipe_overrides,
    seed_numbers,
)
from anydepth.errors import RunError, UserError


@app.command()
def run(
    recipe: RecipePath,
    out: Out,
    overrides: Overrides = None,
    seed: RecipeSeed = None,
    device: RecipeDevice = None,
    dtype: RecipeDType = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A recipe, start to end.

    Search, train, calibrate, eval, bench, a sample, report.html. Goes on where it was interrupted.
    """
    _run(recipe, out, recipe_overrides(overrides, seed, device, dtype), Printer(as_json, quiet))


@app.command()
def demo(
    out: Out = Path("demo"),
    overrides: Overrides = None,
    seed: RecipeSeed = None,
    device: RecipeDevice = None,
    dtype: RecipeDType = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole path on the embedded model, in minutes.

    Ends with a table and report.html.
    """
    from importlib.resources import as_file, files

    with as_file(files("anydepth") / "demo.yaml") as path:
        _run(path, out, recipe_overrides(overrides, seed, device, dtype), Printer(as_json, quiet))


def _run(recipe: Path, out: Path, overrides: list[str], printer: Printer) -> None:
    runner = _runner(recipe, out, overrides, printer)
    runner.on_step = step_line(printer, runner.recipe)
    printer.result(runner.run(), lambda document: show_run(document, out))


@app.command()
def train(
    recipe: RecipePath,
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    overrides: Overrides = None,
    seed: RecipeSeed = None,
    device: RecipeDevice = None,
    dtype: RecipeDType = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train what a recipe names; write a checkpoint folder.

    Also under `accelerate launch`, in several processes: recipes/parallel/ has the configurations.
    """
    from anydepth.training.parallel import first_alone, together

    printer = Printer(as_json, quiet)
    with together():
        runner = _runner(recipe, out, recipe_overrides(overrides, seed, device, dtype), printer)
        runner.on_step = step_line(printer, runner.recipe)
        if not resume:
            with first_alone():
                runner.forget()
        runner.check(("search", "fit", "train"))
        runner.search()
        runner.fit()
        printer.result(runner.train(), lambda document: print(f"checkpoint: {document['checkpoint']}"))


@app.command()
def search(
    target: Target,
    out: Out,
    strategy: Annotated[str, typer.Option(help="influence, greedy, bayesian, dynamic or knapsack.")] = "influence",
    budget: Annotated[float, typer.Option(help="Share of layers, or of branches, to leave out.")] = 0.25,
    branches: Annotated[bool, typer.Option("--branches", help="Choose among mixers and FFNs.")] = False,
    data: Data = "embedded:train",
    num_windows: Annotated[int, typer.Option(help="Windows of text.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DType = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the layers or branches that a model misses least.

    Writes a checkpoint folder with the skip set.
    """
    from anydepth.hf.adapted import attach, detach
    from anydepth.json_io import write_json
    from anydepth.measure.held_out import held_out, split_windows
    from anydepth.measure.results import document
    from anydepth.models.load import dtype_name, load_model
    from anydepth.search.skip_search import check_strategy
    from anydepth.search.skip_search import search as search_skip_set
    from anydepth.training.checkpoint import save
    from anydepth.training.corpora import check_corpus

    check_strategy(strategy)
    check_out(out)
    at_least("num-windows", num_windows, 1)
    at_least("sequence-length", sequence_length, 2)
    check_corpus(data)
    printer = Printer(as_json, quiet)
    options = {
        "target": target,
        "strategy": strategy,
        "budget": budget,
        "branches": branches,
        "data": data,
        "num_windows": num_windows,
        "sequence_length": sequence_length,
    }
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    options["dtype"] = dtype_name(model)
    windows, unseen = split_windows(data, tokenizer, sequence_length, num_windows)
    printer.progress(f"searching by {strategy} on {windows.numel()} tokens of {data} …")
    with printer.busy(f"searching by {strategy} …"):
        found = search_skip_set(model, windows, strategy=strategy, budget=budget, branches=branches, seed=seed)
    adapted = attach(model, found.config)
    save(adapted, out)
    with printer.busy("scoring text that the search did not see …"):
        unseen_loss = held_out(detach(adapted), found.config, unseen)
    result = document(
        "anydepth.search/1",
        seed=seed,
        config=options,
        **found.config.model_dump(),
        agreement=found.agreement,
        seconds=found.seconds,
        trajectory=found.trajectory,
        held_out=unseen_loss,
    )
    write_json(out / "search.json", result)
    printer.result(result, show_search)


@app.command()
def sweep(
    recipe: RecipePath,
    out: Out,
    over: Annotated[
        list[str] | None, typer.Option(help="KEY=V1,V2: methods.0.target_skip=0.2,0.4; repeatable.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="One run of each for every seed: 0,1,2.")] = "0",
    backend: Annotated[str, typer.Option(help="local processes, or ray: a cluster that runs.")] = "local",
    jobs: Annotated[int, typer.Option(help="Points that learn at a time; they are timed one by one.")] = 1,
    overrides: Overrides = None,
    device: RecipeDevice = None,
    dtype: RecipeDType = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A recipe over values of its keys.

    Quality against measured time and against FLOPs. Goes on where it was interrupted.
    """
    if backend not in ("local", "ray"):
        raise UserError(f"backend '{backend}' is unknown; it is local or ray")
    if jobs < 1:
        raise UserError(f"--jobs is a number of at least 1; came {jobs}")
    chosen = seed_numbers(seeds)
    flags = recipe_overrides(overrides, None, device, dtype)
    config = {"recipe": str(recipe), "over": over or [], "seeds": chosen, "overrides": flags, "backend": backend}
    from anydepth.runs.sweep import Sweep, plan, sweep_document

    printer = Printer(as_json, quiet)
    found = Sweep(plan(recipe, over or [], chosen, flags), out, printer.progress)
    result = sweep_document(found, config, found.run(backend, jobs))
    printer.result(result, show_sweep)
    if result["failed"]:
        reasons = "; ".join(f"{point['name']}: {point['reason']}" for point in result["failed"])
        raise RunError(f"{len(result['failed'])} of {len(found.points)} points failed ({reasons})")


def _runner(recipe: Path, out: Path, overrides: list[str], printer: Printer) -> Any:
    from anydepth.methods.of_recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from anydepth.runs.run import Runner

    return Runner(loaded, out, printer.progress)
