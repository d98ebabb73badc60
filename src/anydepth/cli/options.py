"""Arguments and options that several commands take, and the readers of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from anydepth.draft_sections import DRAFT, OLD_NAME
from anydepth.errors import UserError

Target = Annotated[
    str,
    typer.Argument(
        help="embedded, a hub name, a folder (a model, a PEFT adapter, or what train wrote), or a .gguf file."
    ),
]
RecipePath = Annotated[Path, typer.Argument(help="YAML recipe; recipes/ has one per method.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …")]
DType = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16 or float16; auto: the type that the weights are stored in.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: train.max_steps=20.")]
Data = Annotated[str, typer.Option("--data", help="NAME:SPLIT (embedded:valid, wikitext-2:valid) or a text file.")]
Engine = Annotated[str, typer.Option("--engine", help="hf, fast, or auto: fast where it runs the model.")]
WeightKind = Annotated[
    str | None, typer.Option("--weights", help="Of the fast engine: int8, int4, or the model's own precision.")
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="torch.compile in the fast engine; the first start takes a minute.")
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
    typer.Option("--skip-share", help="Skip this share of what routers and gates decide about, in [0, 1): 0.4."),
]
Capacity = Annotated[
    float | None, typer.Option("--capacity", help="Run this share of it, in (0, 1]; 1 less --skip-share.")
]
RecipeSeed = Annotated[int | None, typer.Option("--seed", help="The recipe's seed.")]
RecipeDevice = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …")]
RecipeDType = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


def recipe_overrides(overrides: list[str] | None, seed: int | None, device: str | None, dtype: str | None) -> list[str]:
    """The flags that every command takes, as recipe overrides."""
    flags = list(overrides or [])
    for key, value in (("seed", seed), ("model.device", device), ("model.dtype", dtype)):
        if value is not None:
            flags.append(f"{key}={value}")
    return flags


def method_options(name: str, options: list[str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {"name": name}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set takes OPTION=VALUE, such as skip_layers=[5,9]; came '{option}'")
        chosen[key] = yaml.safe_load(value)
    return chosen


def by_method(options: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return `METHOD.OPTION=VALUE` overrides by method, those of drafting under `draft`."""
    found: dict[str, dict[str, Any]] = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        method, dot, name = key.partition(".")
        if not equals or not dot or not name:
            raise UserError(f"--set takes METHOD.OPTION=VALUE, such as early_exit.thresholds=0.9; came '{option}'")
        found.setdefault(DRAFT if method == OLD_NAME else method, {})[name] = yaml.safe_load(value)
    return found


def wanted_share(skip_share: float | None, capacity: float | None) -> float | None:
    """Return the share to skip that `--skip-share` or `--capacity` asks for; None: neither was given.

    Raises:
        UserError: both were given, or one lies outside its range.
    """
    if skip_share is not None and capacity is not None:
        raise UserError("--capacity is 1 less --skip-share; give one of them")
    if skip_share is not None and not 0 <= skip_share < 1:
        raise UserError(f"--skip-share is a share from 0 to less than 1, such as 0.4; came {skip_share:g}")
    return skip_share if capacity is None else skipped_by("capacity", capacity)


def skipped_by(option: str, capacity: float) -> float:
    """Return the share that a capacity skips."""
    if not 0 < capacity <= 1:
        raise UserError(f"--{option} takes shares above 0 up to 1, such as 0.6; came {capacity:g}")
    return round(1 - capacity, 9)


def capacities_of(text: str) -> list[float]:
    """Return the capacities of `--sweep`, largest first."""
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError as error:
        raise UserError(f"--sweep takes shares with commas, such as 0.9,0.7,0.5; came '{text}'") from error
    for capacity in found:
        skipped_by("sweep", capacity)
    return sorted(found, reverse=True)


def at_least(option: str, value: int | None, least: int) -> None:
    """Raise `UserError` for less; None is an option that was not given."""
    if value is not None and value < least:
        raise UserError(f"--{option} is a number of at least {least}; came {value}")


def check_out(out: Path) -> None:
    """Raise `UserError` where `--out` is a file, or the folder of a run, whose results would be of other weights."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is a folder to write to; {out} is a file")
    if (out / "recipe.yaml").exists():
        raise UserError(f"{out} holds the run of a recipe, whose results would be of other weights; give another --out")


def numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--{option} takes positive numbers with commas, such as 1,4,8; came '{text}'")
    return [int(part) for part in parts]


def seed_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--seeds takes numbers with commas, such as 0,1,2; came '{text}'")
    return [int(part) for part in parts]
