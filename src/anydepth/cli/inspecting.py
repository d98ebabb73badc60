"""Commands that describe a model and the methods."""

from __future__ import annotations

from collections import Counter
from typing import Any

from anydepth.cli import options as opt
from anydepth.cli.application import app
from anydepth.cli.display import Printer


@app.command()
def inspect(
    target: opt.Target,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show a model's layers, their cost, and what applies to it."""
    arguments = dict(locals())
    from anydepth.measure.inspect import inspect_model
    from anydepth.measure.results import document
    from anydepth.training.checkpoint import load_target

    adapted, _ = load_target(target, dtype=dtype, device=device)
    config = opt.config_of(arguments, adapted, "target", "device")
    result = document("anydepth.inspect/1", seed=seed, config=config, **inspect_model(adapted))
    Printer(as_json, quiet).result(result, show_inspection)


@app.command()
def methods(
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.DType = "auto",
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """List every method and its options."""
    from anydepth.measure.inspect import list_methods
    from anydepth.measure.results import document

    result = document("anydepth.methods/1", seed=seed, config={}, methods=list_methods())
    Printer(as_json, quiet).result(result, show_methods)


def show_inspection(document: dict[str, Any]) -> None:
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
            + (f"; a linear mixer costs less for texts longer than {length}" if length is not None else "")
        )
    print(f"attached: {', '.join(document['attached']) or 'nothing'}")
    for title in ("engines", "methods"):
        print(f"{title}: " + ", ".join(f"{name} ({state})" for name, state in document[title].items()))
    for note in document["notes"]:
        print(f"note: {note}")


def show_methods(document: dict[str, Any]) -> None:
    for method in document["methods"]:
        print(
            f"{method['name']}: {method['summary']} ({'lossless' if method['lossless'] else 'lossy'}, "
            f"{'trained' if method['trained'] else 'not trained'})"
        )
        for key, option in method["options"].items():
            default = "required" if option["required"] else option["default"]
            print(f"    {key} = {default}: {option['help']}")
