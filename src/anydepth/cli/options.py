"""The application, arguments and options that several commands have, and the functions that read their values."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Exit, Option

from anydepth import __version__
from anydepth.cli.display import Printer
from anydepth.config import assignment
from anydepth.draft_sections import DRAFT, OLD_NAME
from anydepth.errors import UserError

app = typer.Typer(
    name="anydepth",
    help="Make a pretrained language model spend less compute on easy tokens, and measure what that buys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise Exit


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", help="Show the version and exit.", callback=_say_version)] = False,
) -> None:
    pass


Target = Annotated[
    str,
    Argument(
        help="Model: embedded, a hub name (user/model, user/model@revision), a folder, or a .gguf file; a model, a "
        "PEFT adapter, or a checkpoint."
    ),
]
RecipePath = Annotated[Path, Argument(help="YAML recipe; recipes/ has one per method.")]
Out = Annotated[Path, Option("--out", help="Write to this folder.")]
Device = Annotated[
    str, Option("--device", help="Run on cpu, cuda, cuda:1, …; auto: spread over GPUs, memory and disk, on engine hf.")
]
DType = Annotated[
    str, Option("--dtype", help="Run in float32, bfloat16 or float16; auto: the type of the stored weights.")
]
NumThreads = Annotated[
    int | None, Option("--threads", help="Compute with this many threads. Default: one for each core that is free.")
]
Json = Annotated[bool, Option("--json", help="Print one JSON document on standard output, nothing else.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print no progress.")]
Data = Annotated[str, Option("--data", help="Read NAME:SPLIT (embedded:valid, wikitext-2:valid) or a text file.")]
Engine = Annotated[str, Option("--engine", help="Run on hf, fast, or auto: fast where it runs the model.")]
WeightKind = Annotated[
    str | None,
    Option(
        "--weights",
        help="Run the fast engine in int8, int4, int4-nearest, native (a .gguf file's) or the model's own.",
    ),
]
Compiled = Annotated[
    bool, Option("--compile", help="Compile the fast engine with torch; the first start takes a minute.")
]
MethodOptions = Annotated[
    list[str] | None, Option("--set", help="Override an option of a method: early_exit.thresholds=0.9.")
]
GenerationDefaults = Annotated[
    str,
    Option(
        "--generation-config",
        help="auto: sample with the defaults in the model's generation_config.json. none: ignore them.",
    ),
]
SkipShare = Annotated[
    float | None,
    Option("--skip-share", help="Skip this fraction of the decisions of routers and gates, in [0, 1): 0.4."),
]
Capacity = Annotated[float | None, Option("--capacity", help="Run this fraction of them, in (0, 1]: 1 − --skip-share.")]
SequenceLength = Annotated[int, Option("--sequence-length", help="Cut text into windows of this many tokens.")]
NumWindows = Annotated[int, Option("--num-windows", help="Read this many windows of text.")]
Temperature = Annotated[float, Option("--temperature", help="Sample at this temperature; 0 is greedy.")]


@dataclass
class Call(Printer):
    """The options that every command has, and all arguments of one call."""

    seed: Annotated[int, Option("--seed", help="Seed everything random.")] = 0
    device: Device = "cpu"
    dtype: DType = "auto"
    threads: NumThreads = None
    as_json: Json = False
    quiet: Quiet = False
    arguments: dict[str, Any] = field(default_factory=dict, init=False)

    def load(self, target: str, **options: Any) -> tuple[Any, Any]:
        """Load a target and its tokenizer; `options` are those of `load_target`."""
        from anydepth.models.load import NATIVE
        from anydepth.training.checkpoint import load_target

        native = NATIVE in (self.arguments.get("weights") or "").split(",")
        return load_target(target, dtype=self.dtype, device=self.device, native=native, **options)

    def document(self, name: str, model: Any, changes: Mapping[str, Any] = {}, **fields: Any) -> dict[str, Any]:
        """Return a result document; its `config` holds the arguments, the model's precision, and then `changes`."""
        from anydepth.measure.results import document
        from anydepth.models.load import dtype_name

        given = {name: value for name, value in self.arguments.items() if name not in ("as_json", "quiet")}
        config = {**given, "dtype": dtype_name(model), **changes}
        return document(f"anydepth.{name}/1", seed=self.seed, config=config, **fields)


@dataclass
class RecipeCall(Printer):
    """The options of every command that runs a recipe."""

    overrides: Annotated[list[str] | None, Option("--set", help="Override a recipe key: train.max_steps=20.")] = None
    seed: Annotated[int | None, Option("--seed", help="Override the recipe's seed.")] = None
    device: Annotated[str | None, Option("--device", help="Run on cpu, cuda, cuda:1, …")] = None
    dtype: Annotated[str | None, Option("--dtype", help="Run in auto, float32, bfloat16 or float16.")] = None
    threads: NumThreads = None
    as_json: Json = False
    quiet: Quiet = False
    arguments: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def recipe_overrides(self) -> list[str]:
        flags = (("seed", self.seed), ("model.device", self.device), ("model.dtype", self.dtype))
        return [*(self.overrides or []), *(f"{key}={value}" for key, value in flags if value is not None)]


def command(
    name: str | None = None, *, without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; its first parameter is a `Call` or a `RecipeCall`.

    The options of the call follow those of the command, but for `without` and those that the command has itself.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        call, *own = inspect.signature(function, eval_str=True).parameters.values()
        shared = inspect.signature(call.annotation, eval_str=True).parameters
        names = [parameter.name for parameter in own]
        added = [option for name, option in shared.items() if name not in (*names, *without)]

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            made = call.annotation(**{name: arguments[name] for name in shared if name in arguments})
            made.arguments = arguments
            _check(arguments)
            function(made, **{name: arguments[name] for name in names})

        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        app.command(name)(run)
        return function

    return register


def _check(arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for a value that no command takes, before anything is loaded; fix the number of threads."""
    if arguments.get("out") is not None:
        check_writable(arguments["out"])
    at_least(1, **{name: arguments.get(name) for name in ("threads", "max_new_tokens", "new_tokens")})
    if arguments.get("weights"):
        from anydepth.engine.weights import kind_of

        for name in arguments["weights"].split(","):
            kind_of(name)
    if arguments.get("threads"):
        from anydepth.cores import THREADS

        THREADS.fix(arguments["threads"])


def load_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `load_target` from the arguments of a command that has `MethodOptions` and `SkipShare`."""
    return {
        "overrides": by_method(arguments["options"]),
        "skip_share": wanted_share(arguments["skip_share"], arguments["capacity"]),
    }


def method_options(name: str, options: list[str]) -> dict[str, Any]:
    return {"name": name, **dict(assignment(option, "OPTION=VALUE, such as skip_layers=[5,9]") for option in options)}


def by_method(options: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return `METHOD.OPTION=VALUE` overrides by method, those of drafting under `draft`."""
    form, found = "METHOD.OPTION=VALUE, such as early_exit.thresholds=0.9", dict[str, dict[str, Any]]()
    for option in options or []:
        key, value = assignment(option, form)
        method, _, name = key.partition(".")
        if not name:
            raise UserError(f"--set takes {form}; got '{option}'")
        found.setdefault(DRAFT if method == OLD_NAME else method, {})[name] = value
    return found


def wanted_share(skip_share: float | None, capacity: float | None) -> float | None:
    """Return the fraction that `--skip-share` or `--capacity` skips, None without one; raise `UserError` for both."""
    if skip_share is not None and capacity is not None:
        raise UserError("--capacity is 1 − --skip-share; give one of them")
    if skip_share is not None and not 0 <= skip_share < 1:
        raise UserError(f"--skip-share is a fraction from 0 to less than 1, such as 0.4; got {skip_share:g}")
    return skip_share if capacity is None else skipped_by("capacity", capacity)


def skipped_by(option: str, capacity: float) -> float:
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


def check_writable(out: Path) -> None:
    """Raise `UserError` where nothing can be written to `--out`; nothing is left there."""
    folder = out if out.is_dir() else out.parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}: {folder}); give another folder") from error


def check_out(out: Path) -> None:
    """Raise `UserError` where `--out` is not a folder for a checkpoint: new, empty, or with a checkpoint to replace."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is a folder to write to; {out} is a file")
    if (out / "recipe.yaml").exists():
        raise UserError(f"{out} holds the run of a recipe, with results of other weights; give another --out")
    if out.exists() and any(out.iterdir()) and not (out / "anydepth.json").exists():
        raise UserError(f"{out} has other files and no anydepth checkpoint; give a new or empty folder as --out")


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) >= least for part in parts):
        raise UserError(f"--{option} takes numbers of at least {least} with commas, such as {least},4,8; got '{text}'")
    return [int(part) for part in parts]
