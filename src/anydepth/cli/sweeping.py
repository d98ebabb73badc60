"""The command that runs a recipe over values of its keys."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from anydepth.cli import options as opt
from anydepth.cli.application import app
from anydepth.cli.display import Printer, around, table
from anydepth.errors import RunError, UserError


@app.command()
def sweep(
    recipe: opt.RecipePath,
    out: opt.Out,
    over: Annotated[
        list[str] | None, typer.Option(help="Run over KEY=V1,V2: methods.0.target_skip=0.2,0.4; repeatable.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Run each setting with every seed: 0,1,2.")] = "0",
    backend: Annotated[str, typer.Option(help="Learn in local processes, or on ray: an existing cluster.")] = "local",
    jobs: Annotated[int, typer.Option(help="Learn this many points at a time; they are timed one by one.")] = 1,
    overrides: opt.Overrides = None,
    device: opt.RecipeDevice = None,
    dtype: opt.RecipeDType = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run a recipe over values of its keys.

    Compares quality with measured time and with FLOPs. Continues where it was interrupted.
    """
    if backend not in ("local", "ray"):
        raise UserError(f"backend '{backend}' is unknown; it is local or ray")
    opt.at_least(1, jobs=jobs)
    chosen = opt.numbers("seeds", seeds, least=0)
    flags = opt.recipe_overrides(overrides, None, device, dtype)
    config = {"recipe": str(recipe), "over": over or [], "seeds": chosen, "overrides": flags, "backend": backend}
    from anydepth.runs.sweep import Sweep, plan, sweep_document

    printer = Printer(as_json, quiet)
    found = Sweep(plan(recipe, over or [], chosen, flags), out, printer.progress)
    result = sweep_document(found, config, found.run(backend, jobs))
    printer.result(result, show_sweep)
    if result["failed"]:
        reasons = "; ".join(f"{point['name']}: {point['reason']}" for point in result["failed"])
        raise RunError(f"{len(result['failed'])} of {len(found.points)} points failed ({reasons})")


def show_sweep(document: dict[str, Any]) -> None:
    """Print the document of `sweep`."""

    def cost(row: dict[str, Any], key: str, axis: str) -> str:
        mark = " *" if row["label"] in document["front"][axis] else "  "
        return around(row[key], row.get(f"{key}_range"), 3) + mark

    rows = [
        [
            row["label"],
            str(row["num_seeds"] or ""),
            around(row["perplexity"], row.get("perplexity_range"), 4),
            cost(row, "time_share", "time"),
            cost(row, "layer_token_share", "flops"),
            f"{row['gflops_per_token']:.3g}",
        ]
        for row in document["settings"]
    ]
    table(["", "seeds", "perplexity", "time", "FLOPs", "GFLOPs a token"], rows)
    print(
        "time and FLOPs as fractions of full depth's; in brackets their range over seeds, and 95% of timed pairs\n"
        "* on the Pareto front: cheaper than all better ones with a star, by ranges that do not meet"
    )
