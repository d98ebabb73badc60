"""Strict options: an unknown key is an error that names the nearest known one; keys set from the command line.

This module imports neither torch nor transformers, so that `anydepth --help` and a misspelt recipe answer at once.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from anydepth.errors import UserError


class StrictConfig(BaseModel):
    """Base class of configs: unknown keys are errors, and values are frozen.

    `constants` has former options that are constants now, by name; files that give them this value still load.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)
    constants: ClassVar[Mapping[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_constants(cls, options: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        return {key: value for key, value in options.items() if key not in cls.constants or value != cls.constants[key]}

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `max_steps: yes`, which pydantic would read as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & set(_alternatives(annotation)):
            raise ValueError("must be a number, not yes or no")
        return value


ConfigT = TypeVar("ConfigT", bound=StrictConfig)

RETRAIN = "train with it"
SHARE_AT_INFERENCE = "--capacity and --skip-share set it at inference, and `anydepth calibrate` for good"
CONTROL_ALONE = ("router", "random")


def training_field(
    *, way: str = RETRAIN, initial: bool = False, unless: tuple[str, str] | None = None, **own: Any
) -> Any:
    """Declare a field that is read in training only, so that overriding it at inference is refused.

    Args:
        way: advice what to do instead.
        initial: whether it shapes the first weights, so that a method without a checkpoint reads it.
        unless: another field and its value with which this field is read at inference too.
    """
    mark: Any = {"way": way, "initial": initial, "unless": unless}
    return Field(json_schema_extra={"training_only": mark}, **own)


def refuse_training_only(name: str, config: StrictConfig, options: Iterable[str], *, fresh: bool = False) -> None:
    """Raise `UserError` for the first of a method's `options` that changes nothing at inference.

    The config has these options. A `fresh` method has no checkpoint, so that options of the first weights count.
    """
    for option in options:
        field = type(config).model_fields.get(option)
        extra = field.json_schema_extra if field is not None else None
        mark: Any = extra.get("training_only") if isinstance(extra, dict) else None
        if mark is None or (fresh and mark["initial"]):
            continue
        if mark["unless"] is None or getattr(config, mark["unless"][0]) != mark["unless"][1]:
            raise UserError(f"{name}.{option} is read in training alone and changes nothing here; {mark['way']}")


def validate(config: type[ConfigT], options: Mapping[str, Any], *, where: str) -> ConfigT:
    """Return `config(**options)`, or raise `UserError` with the first problem in one line that starts with `where`."""
    try:
        return config(**options)
    except (ValidationError, TypeError) as error:
        raise UserError(f"{where}: {_explain(config, error)}") from error


def _explain(config: type[StrictConfig], error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed, key = list(_owner(config, first["loc"]).model_fields), str(first["loc"][-1])
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"keys are {', '.join(allowed)}"
        return f"unknown key '{path}'; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path + ': ' if path else ''}{message[0].lower() + message[1:]}, got {first['input']!r}"


def _owner(config: type[StrictConfig], location: tuple[int | str, ...]) -> type[StrictConfig]:
    """Return the config class that got the last key of `location`."""
    owner = config
    for part in location[:-1]:
        field = owner.model_fields.get(str(part))
        if field is not None:
            kinds = (kind for kind in _alternatives(field.annotation) if isinstance(kind, type))
            owner = next((kind for kind in kinds if issubclass(kind, StrictConfig)), owner)
    return owner


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


class UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]  # type: ignore[reportUnknownMemberType]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def assignment(text: str, form: str) -> tuple[str, Any]:
    """Return the key and the YAML value of `KEY=VALUE`. Raise `UserError` with the `form` that `--set` takes."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes {form}; got '{text}'")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: '{value}' is not a YAML value") from error


def override_key(content: dict[str, Any], override: str) -> None:
    """Set `a.b=value` or `methods.0.key=value` in the mapping of a recipe."""
    key, value = assignment(override, "KEY=VALUE, such as train.max_steps=20")
    parts = key.split(".")
    section: Any = content
    for part in parts[:-1]:
        section = _descend(section, part, key)
    if isinstance(section, list):
        section[_index(section, parts[-1], key)] = value
    else:
        section[parts[-1]] = value


def _descend(section: Any, part: str, key: str) -> Any:
    if isinstance(section, list):
        return section[_index(section, part, key)]
    if section.get(part) is None:
        section[part] = {}
    if not isinstance(section[part], dict | list):
        raise UserError(f"--set {key}: '{part}' holds {section[part]!r}, not a section")
    return section[part]


def _index(entries: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(entries):
        allowed = f"has entries 0 to {len(entries) - 1}" if entries else "has no entries"
        raise UserError(f"--set {key}: there is no entry '{part}'; the list {allowed}")
    return int(part)
