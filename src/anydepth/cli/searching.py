"""The command that searches a skip set."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from anydepth.cli import options as opt
from anydepth.cli.application import app
from anydepth.cli.display import Printer, table


@app.command()
def search(
    target: opt.Target,
    out: opt.Out,
    strategy: Annotated[
        str, typer.Option(help="Search by influence, greedy, bayesian, dynamic or knapsack.")
    ] = "influence",
    budget: Annotated[float, typer.Option(help="Leave out this fraction of layers, or of branches.")] = 0.25,
    branches: Annotated[bool, typer.Option("--branches", help="Choose among mixers and FFNs.")] = False,
    data: opt.Data = "embedded:train",
    num_windows: opt.NumWindows = 4,
    sequence_length: opt.SequenceLength = 256,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Find the layers or branches that change a model's output least.

    Writes a checkpoint folder with the skip set.
    """
    arguments = dict(locals())
    from anydepth.hf.adapted import attach, detach
    from anydepth.json_io import write_json
    from anydepth.measure.held_out import search_fields, split_windows
    from anydepth.measure.results import document
    from anydepth.models.load import load_model
    from anydepth.search.skip_search import check_strategy
    from anydepth.search.skip_search import search as search_skip_set
    from anydepth.training.checkpoint import save
    from anydepth.training.corpora import check_corpus

    check_strategy(strategy)
    opt.check_out(out)
    opt.at_least(1, num_windows=num_windows)
    opt.at_least(2, sequence_length=sequence_length)
    check_corpus(data)
    printer = Printer(as_json, quiet)
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    recorded = ("target", "strategy", "budget", "branches", "data", "num_windows", "sequence_length")
    config = opt.config_of(arguments, model, *recorded)
    windows, unseen = split_windows(data, tokenizer, sequence_length, num_windows)
    printer.progress(f"searching by {strategy} on {windows.numel()} tokens of {data} …")
    with printer.busy(f"searching by {strategy} …"):
        found = search_skip_set(model, windows, strategy=strategy, budget=budget, branches=branches, seed=seed)
    adapted = attach(model, found.config)
    save(adapted, out)
    with printer.busy("scoring text that the search did not see …"):
        fields = search_fields(detach(adapted), found, unseen)
    result = document("anydepth.search/1", seed=seed, config=config, **fields)
    write_json(out / "search.json", result)
    printer.result(result, show_search)


def show_search(document: dict[str, Any]) -> None:
    """Print the document of `search`."""
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
