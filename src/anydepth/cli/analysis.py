"""The commands that show where depth goes, and make a page from results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from anydepth.cli import options as opt
from anydepth.cli.display import table
from anydepth.errors import UserError
from anydepth.report import wording
from anydepth.training.corpora import check_corpus, load_texts


@opt.command()
def analyze(
    call: opt.Call,
    target: opt.Target,
    data: opt.Data = "embedded:valid",
    sequence_length: opt.SequenceLength = 512,
    limit: Annotated[int, Option(help="Run the first windows only.")] = 16,
    compare: Annotated[
        list[str] | None, Option(help="Compare gates with those of the same method from another seed.")
    ] = None,
    permutations: Annotated[
        int, Option(help="Test with this many permutations whether depth depends on the token.")
    ] = 199,
    samples: Annotated[
        int, Option(help="Correlate the depth of this many texts with length, perplexity and rarity; 0: none.")
    ] = 64,
    options: opt.MethodOptions = None,
) -> None:
    """Measure depth by layer, token class, position and loss.

    And test whether it depends on the token.
    """
    from anydepth.decoding.engines import label_of
    from anydepth.measure.analyze import analyze as measure
    from anydepth.training.data import load_windows

    check_corpus(data)
    opt.at_least(1, permutations=permutations, limit=limit)
    opt.at_least(0, samples=samples)
    engine, tokenizer, others = _load(call, target, compare or [], opt.by_method(options))
    windows = load_windows(data, tokenizer, sequence_length, max_windows=limit)
    texts = f", and up to {samples} texts of at most {sequence_length} tokens" if samples else ""
    call.progress(f"running {windows.numel()} tokens of {data}{texts} …")
    fields = measure(
        engine.adapted,
        tokenizer,
        windows,
        texts=load_texts(data) if samples else [],
        num_samples=samples,
        others=others,
        num_permutations=permutations,
        seed=call.seed,
        track=call.track,
    )
    call.result(call.document("analyze", engine.adapted, label=label_of(engine), **fields), show_analysis)


def _load(call: opt.Call, target: str, compare: list[str], overrides: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Load the target, its tokenizer and the models to compare with. Raise `UserError` where nothing can differ."""
    from anydepth.decoding.engines import HFEngine
    from anydepth.measure.evaluate import why_the_same
    from anydepth.training.checkpoint import load_draft

    adapted, tokenizer = call.load(target, overrides=overrides)
    engine, num_layers = HFEngine(adapted, load_draft(target, adapted)), adapted.backbone.num_layers
    if engine.differs and (why := why_the_same(engine)) is not None:
        raise UserError(f"{target} has no depth to analyze: {why}")
    others = [call.load(name)[0] for name in compare]
    for other, name in zip(others, compare, strict=True):
        if other.backbone.num_layers != num_layers:
            raise UserError(f"{name} has {other.backbone.num_layers} layers, {target} {num_layers}; compare one method")
    return engine, tokenizer, others


def show_analysis(document: dict[str, Any]) -> None:
    depth, num_layers = wording.between(document["depth"]), len(document["per_layer"])
    print(f"{depth} of {num_layers} layers a token, in brackets 95%; {document['num_tokens']} tokens")
    print(f"{wording.flops(document)}\n")
    _show_kinds(document)
    _show_correlations(document["correlations"])
    _show_layers(document["per_layer"])
    for own in document["gates"]:
        print(wording.gates(own))
    for own in document["gates"]:
        for text in own["warnings"]:
            print(f"warning: {text}")
    print(wording.conditionality(document["conditionality"]))
    names = [document["config"]["target"], *(document["config"].get("compare") or [])]
    for row in document["seeds"]:
        print(wording.agreement(row, names))


def _show_kinds(document: dict[str, Any]) -> None:
    """Print the depth by class of token, position and length of text, and its correlation with the loss."""
    correlation = document["losses"]["rank_correlation"]
    if correlation is None:
        print("every token runs the same number of layers")
        return
    for title, key, name in (
        ("tokens that are", "token_classes", lambda row: row["class"]),
        ("positions", "positions", lambda row: _from_to(row["first"] + 1, row["last"] + 1)),
        ("texts of", "lengths", lambda row: str(row["length"])),
    ):
        columns = {"name": title, "num_tokens": "tokens", "depth": "depth (95%)"}
        shown = {"name": name, "depth": lambda row: wording.between(row["depth"])}
        table(columns, document[key], shown)
        print()
    print(f"rank correlation of depth with the loss of the next token: {correlation:.2f}")


def _show_correlations(found: dict[str, Any] | None) -> None:
    if found is None or found["of"] is None:
        return
    what = "depth" if found["of"] == "depth" else "FLOP share"
    columns = {
        "with": f"{what} of {found['num_samples']} {found['unit']}s with",
        "pearson": "Pearson (95%)",
        "spearman": "Spearman (95%)",
    }
    shown = {kind: partial(wording.correlation, kind) for kind in ("pearson", "spearman")}
    print()
    table(columns, [row for row in found["rows"] if row["of"] == found["of"]], shown)


def _from_to(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _show_layers(rows: list[dict[str, Any]]) -> None:
    some = [
        {"layer": row["layer"], "mixer": f"{row['mixer']['mean']:.1%}", "ffn": f"{row['ffn']['mean']:.1%}"}
        for row in rows
        if row["mixer"]["mean"] < 1 or row["ffn"]["mean"] < 1
    ]
    if some:
        print()
        table({"layer": "layer", "mixer": "mixer runs for", "ffn": "FFN runs for"}, some)
        print()


@opt.app.command()
def report(
    results: Annotated[list[Path], Argument(help="JSON documents, or folders of runs and sweeps.")],
    out: Annotated[Path, Option("--out", help="Write this page.")] = Path("report.html"),
) -> None:
    """Write one self-contained page from result documents.

    PNG and CSV files are stored next to it.
    """
    from anydepth.json_io import read_document
    from anydepth.report.page import write_report

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the page in it, such as {out / 'report.html'}")
    documents = []
    for path, name in zip(results, _short_names(results), strict=True):
        found = _documents_in(path) if path.is_dir() else [path]
        documents += [{**read_document(one), "run" if path.is_dir() else "source": name} for one in found]
    written = write_report(documents, out)
    print(f"{out} and {len(written) - 1} files next to it")


def _short_names(paths: list[Path]) -> list[str]:
    """Return the last parts of each path, as many as make all names different."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _documents_in(folder: Path) -> list[Path]:
    for name in ("sweep.json", "run.json"):
        if (folder / name).exists():
            return [folder / name]
    if (folder / "points").is_dir():
        raise UserError(f"{folder} is a sweep that has not ended; run it again, it continues where it was")
    from anydepth.runs.run import STAGES

    found = [path for stage in ("calibrate", *STAGES) if (path := folder / f"{stage}.json").exists()]
    if not found:
        raise UserError(f"{folder} holds no results; give a folder of run, sweep or train, or files that --json wrote")
    return found
