"""Prompts from files, for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from anydepth.errors import UserError
from anydepth.training.corpora import read_lines

FORMS = {
    "prompt": "a string",
    "turns": "a list of strings",
    "messages": "a list of objects with a string `content`",
}


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the prompts of a .jsonl file, in the chat template if there is one.

    A line has `prompt`, `turns`, of which the first is used, or `messages`; any other raises `UserError`.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}; give a .jsonl file of prompts")
    prompts = [_prompt_of(row, where, tokenizer) for where, row in json_lines(path)]
    if not prompts:
        raise UserError(f"{path} has no prompt; give a .jsonl file with one prompt a line")
    return prompts


def read_references(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]] | None:
    """Return the token ids of the `reference` of a prompt file's first `count` lines; None if one has none."""
    texts = [row.get("reference") for _, row in json_lines(path)][:count]
    texts = [text[0] if isinstance(text, list) and text else text for text in texts]
    if not all(isinstance(text, str) and text for text in texts):
        return None
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]  # type: ignore[arg-type]


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each line of a .jsonl file. Raise `UserError` for a line that is not JSON."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON") from error


def _prompt_of(row: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(row, dict) or not any(row.get(key) for key in FORMS):
        raise UserError(f"{where} has none of `prompt`, `turns`, `messages`")
    for key, form in FORMS.items():
        if row.get(key) and not _is_form(key, row[key]):
            raise UserError(f"{where}: got `{key}` {json.dumps(row[key])[:80]}; it must be {form}")
    text = row.get("prompt") or (row.get("turns") or [None])[0]
    if tokenizer.chat_template is None:
        return text or row["messages"][-1]["content"]
    messages = row.get("messages") or [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _is_form(key: str, value: Any) -> bool:
    if key == "prompt":
        return isinstance(value, str)
    if not isinstance(value, list):
        return False
    if key == "messages":
        return all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value)
    return all(isinstance(turn, str) for turn in value)
