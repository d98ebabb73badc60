"""A model that calls a tool once it is offered, and answers once it has the result; else it writes its own text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from anydepth.serve.service import Service

TOOL_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }} in <tool_call> marks\n{% endif %}"
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}"
    "{% for call in turn.tool_calls or [] %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>"
    "{% endfor %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
ARGUMENTS, ANSWER = {"city": "Paris"}, "It rains."
CALL = f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': ARGUMENTS})}\n</tool_call>"


def reply(prompt: str) -> str | None:
    """Return what the model writes after a prompt; None: its own text."""
    if "\ntool: " in prompt:
        return ANSWER
    return CALL if prompt.startswith("tools: ") else None


class Script(LogitsProcessor):
    """Lets a model write a text that depends on its prompt, and then end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], str | None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.start, self.ids = -1, None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.start < 0:
            self.start = len(input_ids[0])
            text = self.write(str(self.tokenizer.decode(input_ids[0])))
            end: Any = self.tokenizer.eos_token_id
            self.ids = None if text is None else [*self.tokenizer(text)["input_ids"], end]
        if self.ids is None:
            return scores
        scores = scores.clone().fill_(float("-inf"))
        scores[0, self.ids[len(input_ids[0]) - self.start]] = 0.0
        return scores


def script(
    patch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], str | None] = reply
) -> None:
    """Let the models of all services write what a function says."""
    own = Service.sampler

    def sampler(service: Service, options: Any, seed: int, *penalties: Any) -> Any:
        return own(service, options, seed, *penalties, Script(tokenizer, write))

    patch.setattr(Service, "sampler", sampler)
