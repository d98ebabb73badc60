"""Prompt files: each form is read, and what is of another form is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anydepth.errors import UserError
from anydepth.measure.prompts import read_prompts
from tiny import byte_tokenizer


def read(tmp_path: Path, *rows: Any) -> list[str]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_prompts(path, byte_tokenizer())


def test_each_form_is_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "first"}, {"role": "user", "content": "last"}]
    rows = ({"prompt": "the sea"}, {"turns": ["one", "two"]}, {"messages": messages})
    assert read(tmp_path, *rows) == ["the sea", "one", "last"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": 5}, "line 1: got `prompt` 5; it must be a string"),
        ({"prompt": ["a"]}, "it must be a string"),
        ({"turns": "a"}, "it must be a list of strings"),
        ({"turns": [5]}, "it must be a list of strings"),
        ({"turns": 5}, "it must be a list of strings"),
        ({"messages": [{"role": "user"}]}, "a string `content`"),
        ({"messages": ["a"]}, "a string `content`"),
        ({"messages": {"role": "user", "content": "a"}}, "a string `content`"),
        ({"text": "a"}, "has none of `prompt`"),
        (["a"], "has none of `prompt`"),
    ],
)
def test_another_form_is_refused(tmp_path: Path, row: Any, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        read(tmp_path, row)
    assert "\n" not in str(error.value)
