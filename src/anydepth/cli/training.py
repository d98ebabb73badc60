"""Commands that run or train a recipe, search a skip set, or sweep over values of a recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from anydepth.cli import options as opt
from anydepth.cli.display import step_line, table
from anydepth.cli.tuning import show_tuning
from anydepth.errors import RunError, UserError
from anydepth.recipe import TUNED
from anydepth.report import wording
from anydepth.training.corpora import check_corpus


@opt.command()
def run(call: opt.RecipeCall, recipe: opt.RecipePath, out: opt.Out) -> None:
    """Run a recipe from start to end.

    Search, train, calibrate, eval, bench, a sample, report.html. Continues where it was interrupted.
    """
    call.result(_runner(call, recipe, out).run(), lambda document: show_run(document, out))


@opt.command()
def demo(call: opt.RecipeCall, out: opt.Out = Path("demo")) -> None:
    """Tune the embedded model, and train a router for it, in minutes.

    Ends with tables and report.html.
    """
    from importlib.resources import as_file, files

    with as_file(files("anydepth") / "demo.yaml") as recipe:
        run(call, recipe, out)
    call.progress("your own model: anydepth tune MODEL --out fast (a folder, a hub name or a .gguf file)")


def _runner(call: opt.RecipeCall, recipe: Path, out: Path) -> Any:
    from anydepth.methods.compose import load_recipe

    loaded = load_recipe(recipe, call.recipe_overrides)  # A mistake in the recipe is reported before the slow import.
    from anydepth.runs.run import Runner

    return Runner(loaded, out, call.progress, step_line(call, loaded))


@opt.command()
def train(
    call: opt.RecipeCall,
    recipe: opt.RecipePath,
    out: opt.Out,
    resume: Annotated[bool, Option("--resume", help="Continue where training stopped.")] = False,
) -> None:
    """Train what a recipe names; write a checkpoint folder.

    Also under `accelerate launch`, in several processes: recipes/parallel/ has the configurations.
    """
    from anydepth.training.parallel import first_alone, together

    with together():
        runner = _runner(call, recipe, out)
        if not resume:
            with first_alone():
                runner.forget()
        runner.check(("search", "fit", "train"))
        runner.search()
        runner.fit()
        call.result(runner.train(), lambda document: print(f"checkpoint: {document['checkpoint']}"))


@opt.command()
def search(
    call: opt.Call,
    target: opt.Target,
    out: opt.Out,
    strategy: Annotated[str, Option(help="Search by influence, greedy, bayesian, dynamic or knapsack.")] = "influence",
    budget: Annotated[float, Option(help="Leave out this fraction of layers, or of branches.")] = 0.25,
    branches: Annotated[bool, Option("--branches", help="Choose among mixers and FFNs.")] = False,
    data: opt.Data = "embedded:train",
    num_windows: opt.NumWindows = 4,
    sequence_length: opt.SequenceLength = 256,
) -> None:
    """Find the layers or branches that change a model's output least.

    Writes a checkpoint folder with the skip set.
    """
    import torch

    from anydepth.engine.backends.cpu.native import why_not
    from anydepth.hf.adapted import attach, detach
    from anydepth.json_io import write_json
    from anydepth.measure.held_out import search_fields, split_windows
    from anydepth.models.load import NATIVE, has_blocks, load_model
    from anydepth.search.skip_search import check_strategy
    from anydepth.search.skip_search import search as search_skip_set
    from anydepth.training.checkpoint import save

    check_strategy(strategy)
    opt.check_out(out)
    opt.at_least(1, num_windows=num_windows)
    opt.at_least(2, sequence_length=sequence_length)
    check_corpus(data)
    model, tokenizer = load_model(target, dtype=call.dtype, device=call.device)
    windows, unseen = split_windows(data, tokenizer, sequence_length, num_windows)
    call.progress(f"searching by {strategy} on {windows.numel()} tokens of {data} …")
    with call.busy(f"searching by {strategy} …"):
        found = search_skip_set(model, windows, strategy=strategy, budget=budget, branches=branches, seed=call.seed)
    adapted = attach(model, found.config)
    in_blocks = has_blocks(target, call.dtype, call.device) and why_not(torch.bfloat16, torch.device("cpu")) is None
    save(adapted, out, run={"engine": "fast", "weights": NATIVE} if in_blocks else None)
    with call.busy("scoring text that the search did not see …"):
        fields = search_fields(detach(adapted), found, unseen)
    result = call.document("search", model, **fields)
    write_json(out / "search.json", result)
    call.result(result, show_search)


@opt.command(without=("seed",))
def sweep(
    call: opt.RecipeCall,
    recipe: opt.RecipePath,
    out: opt.Out,
    over: Annotated[
        list[str] | None, Option(help="Run over KEY=V1,V2: methods.0.target_skip=0.2,0.4; repeatable.")
    ] = None,
    seeds: Annotated[str, Option(help="Run each setting with every seed: 0,1,2.")] = "0",
    backend: Annotated[str, Option(help="Learn in local processes, or on ray: an existing cluster.")] = "local",
    jobs: Annotated[int, Option(help="Learn this many points at a time; they are timed one by one.")] = 1,
) -> None:
    """Run a recipe over values of its keys.

    Compares quality with measured time and with FLOPs. Continues where it was interrupted.
    """
    if backend not in ("local", "ray"):
        raise UserError(f"backend '{backend}' is unknown; it is local or ray")
    opt.at_least(1, jobs=jobs)
    chosen = opt.numbers("seeds", seeds, least=0)
    flags = call.recipe_overrides
    config = {"recipe": str(recipe), "over": over or [], "seeds": chosen, "overrides": flags, "backend": backend}
    from anydepth.runs.sweep import Sweep, plan, sweep_document

    found = Sweep(plan(recipe, over or [], chosen, flags), out, call.progress)
    result = sweep_document(found, config, found.run(backend, jobs))
    call.result(result, show_sweep)
    if result["failed"]:
        reasons = "; ".join(f"{point['name']}: {point['reason']}" for point in result["failed"])
        raise RunError(f"{len(result['failed'])} of {len(found.points)} points failed ({reasons})")


def show_run(document: dict[str, Any], out: Path) -> None:
    table(wording.SUMMARY, document["summary"], {"speedup": wording.speedup})
    print(f"\n{wording.SPREAD}")
    for stage in document["stages"]:
        if stage["schema"] == "anydepth.tune/1":
            print("\nWays to run the base model:")
            show_tuning(stage, out / TUNED)
    print(f"\n{out / 'report.html'}")


def show_search(document: dict[str, Any]) -> None:
    for key in ("skip_layers", "skip_mixers", "skip_ffns"):
        if document[key]:
            print(f"{key}: {document[key]}")
    print(f"agreement with full depth: {document['agreement']:.3f}  ({document['seconds']:.0f} s)\n")
    found = document["held_out"]
    if found["rows"]:
        table(wording.UNSEEN, found["rows"])
        print(f"on {found['num_tokens']} tokens that the search did not see")
    if found["warning"]:
        print(f"warning: {found['warning']}")


def show_sweep(document: dict[str, Any]) -> None:
    def cost(key: str, axis: str, row: dict[str, Any]) -> str:
        return wording.cell(key, row) + (" *" if row["label"] in document["front"][axis] else "  ")

    shown = {
        "num_seeds": lambda row: str(row["num_seeds"] or ""),
        "time_share": partial(cost, "time_share", "time"),
        "layer_token_share": partial(cost, "layer_token_share", "flops"),
    }
    keys = "label num_seeds perplexity time_share layer_token_share gflops_per_token"
    table(wording.columns(keys, time_share="time", layer_token_share="FLOPs"), document["settings"], shown)
    print(
        "time and FLOPs as fractions of full depth's; in brackets their range over seeds, and 95% of timed pairs\n"
        "* on the Pareto front: cheaper than all better ones with a star, by ranges that do not meet"
    )
