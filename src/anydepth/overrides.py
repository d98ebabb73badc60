"""YAML mappings without duplicate keys, and keys set from the command line."""

from __future__ import annotations

from typing import Any

import yaml

from anydepth.errors import UserError


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
