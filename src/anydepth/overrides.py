"""YAML mappings as recipes want them: no key twice, and single keys set from the command line."""

from __future__ import annotations

from typing import Any

import yaml

from anydepth.errors import UserError


class UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that gives a key twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]  # type: ignore[reportUnknownMemberType]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def override_key(content: dict[str, Any], override: str) -> None:
    """Put `a.b=value` or `methods.0.key=value` into the recipe's mapping."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes KEY=VALUE, such as train.max_steps=20; came '{override}'")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: '{text}' is not a YAML value") from error
    parts = key.split(".")
    place: Any = content
    for part in parts[:-1]:
        place = _descend(place, part, key)
    if isinstance(place, list):
        place[_index(place, parts[-1], key)] = value
    else:
        place[parts[-1]] = value


def _descend(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, key)]
    if place.get(part) is None:
        place[part] = {}
    if not isinstance(place[part], dict | list):
        raise UserError(f"--set {key}: '{part}' holds {place[part]!r}, not a section")
    return place[part]


def _index(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        allowed = "has no entries" if not place else f"has entries 0 to {len(place) - 1}"
        raise UserError(f"--set {key}: there is no entry '{part}'; the list {allowed}")
    return int(part)
