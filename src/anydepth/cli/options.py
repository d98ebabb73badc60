"""Arguments and options that several commands have, and the functions that read their values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from anydepth.draft_sections import DRAFT, OLD_NAME
from anydepth.errors import UserError

Target = Annotated[
    str,
    typer.Argument(
        help="Model: embedded, a hub name, a folder (a model, a PEFT adapter, or a checkpoint), or a .gguf file."
    ),
]
RecipePath = Annotated[Path, typer.Argument(help="YAML recipe; recipes/ has one per method.")]
Out = Annotated[Path, typer.Option("--out", help="Write to this folder.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed everything random.")]
Device = Annotated[str, typer.Option("--device", help="Run on cpu, cuda, cuda:1, …")]
DType = Annotated[
    str, typer.Option("--dtype", help="Run in float32, bfloat16 or float16; auto: the type of the stored weights.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: train.max_steps=20.")]
Data = Annotated[str, typer.Option("--data", help="Read NAME:SPLIT (embedded:valid, wikitext-2:valid) or a text file.")]
Engine = Annotated[str, typer.Option("--engine", help="Run on hf, fast, or auto: fast where it runs the model.")]
WeightKind = Annotated[
    str | None, typer.Option("--weights", help="Run the fast engine in int8, int4, or the model's own precision.")
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile the fast engine with torch; the first start takes a minute.")
]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--set", help="Override an option of a method: early_exit.thresholds=0.9.")
]
GenerationDefaults = Annotated[
    str,
    typer.Option(
        "--generation-config",
        help="auto: sample with the defaults in the model's generation_config.json. none: ignore them.",
    ),
]
SkipShare = Annotated[
    float | None,
    typer.Option("--skip-share", help="Skip this fraction of the decisions of routers and gates, in [0, 1): 0.4."),
]
Capacity = Annotated[
    float | None, typer.Option("--capacity", help="Run this fraction of them, in (0, 1]: 1 − --skip-share.")
]
SequenceLength = Annotated[int, typer.Option("--sequence-length", help="Cut text into windows of this many tokens.")]
NumWindows = Annotated[int, typer.Option("--num-windows", help="Read this many windows of text.")]
Temperature = Annotated[float, typer.Option("--temperature", help="Sample at this temperature; 0 is greedy.")]
RecipeSeed = Annotated[int | None, typer.Option("--seed", help="Override the recipe's seed.")]
RecipeDevice = Annotated[str | None, typer.Option("--device", help="Run on cpu, cuda, cuda:1, …")]
RecipeDType = Annotated[str | None, typer.Option("--dtype", help="Run in auto, float32, bfloat16 or float16.")]


def recipe_overrides(overrides: list[str] | None, seed: int | None, device: str | None, dtype: str | None) -> list[str]:
    """Return the options that every command has, as recipe overrides."""
    flags = (("seed", seed), ("model.device", device), ("model.dtype", dtype))
    return [*(overrides or []), *(f"{key}={value}" for key, value in flags if value is not None)]


def load_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return how to load a target, from the arguments of a command that has `MethodOptions` and `SkipShare`."""
    return {
        "dtype": arguments["dtype"],
        "device": arguments["device"],
        "overrides": by_method(arguments["options"]),
        "skip_share": wanted_share(arguments["skip_share"], arguments["capacity"]),
    }


def config_of(arguments: Mapping[str, Any], model: Any, *names: str, **changes: Any) -> dict[str, Any]:
    """Return the `config` of a result document: arguments of the command, and the precision that the model has.

    Args:
        names: arguments to record; all but those of the output where none are given.
        changes: values that differ from the arguments, such as the engine that `auto` selected.
    """
    from anydepth.models.load import dtype_name

    chosen = names or [name for name in arguments if name not in ("as_json", "quiet")]
    return {**{name: arguments[name] for name in chosen}, "dtype": dtype_name(model), **changes}


def method_options(name: str, options: list[str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set takes OPTION=VALUE, such as skip_layers=[5,9]; got '{option}'")
        chosen[key] = yaml.safe_load(value)
    return chosen


def by_method(options: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return `METHOD.OPTION=VALUE` overrides by method, those of drafting under `draft`."""
    found: dict[str, dict[str, Any]] = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        method, dot, name = key.partition(".")
        if not equals or not dot or not name:
            raise UserError(f"--set takes METHOD.OPTION=VALUE, such as early_exit.thresholds=0.9; got '{option}'")
        found.setdefault(DRAFT if method == OLD_NAME else method, {})[name] = yaml.safe_load(value)
    return found


def wanted_share(skip_share: float | None, capacity: float | None) -> float | None:
    """Return the fraction to skip that `--skip-share` or `--capacity` sets; None: neither was given.

    Raises:
        UserError: both were given, or one is outside its range.
    """
    if skip_share is not None and capacity is not None:
        raise UserError("--capacity is 1 − --skip-share; give one of them")
    if skip_share is not None and not 0 <= skip_share < 1:
        raise UserError(f"--skip-share is a fraction from 0 to less than 1, such as 0.4; got {skip_share:g}")
    return skip_share if capacity is None else skipped_by("capacity", capacity)


def skipped_by(option: str, capacity: float) -> float:
    """Return the fraction that a capacity skips."""
    if not 0 < capacity <= 1:
        raise UserError(f"--{option} takes fractions above 0 up to 1, such as 0.6; got {capacity:g}")
    return round(1 - capacity, 9)


def capacities_of(text: str) -> list[float]:
    """Return the capacities of `--sweep`, largest first."""
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError as error:
        raise UserError(f"--sweep takes fractions with commas, such as 0.9,0.7,0.5; got '{text}'") from error
    for capacity in found:
        skipped_by("sweep", capacity)
    return sorted(found, reverse=True)


def at_least(least: int, **values: int | None) -> None:
    """Raise `UserError` for an option below its least value; None is an option that was not given."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is a number of at least {least}; got {value}")


def check_temperature(temperature: float | None) -> None:
    if temperature is not None and temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")


def check_out(out: Path) -> None:
    """Raise `UserError` where `--out` is a file, or the folder of a run, which has results of other weights."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is a folder to write to; {out} is a file")
    if (out / "recipe.yaml").exists():
        raise UserError(f"{out} holds the run of a recipe, with results of other weights; give another --out")


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) >= least for part in parts):
        raise UserError(f"--{option} takes numbers of at least {least} with commas, such as {least},4,8; got '{text}'")
    return [int(part) for part in parts]
