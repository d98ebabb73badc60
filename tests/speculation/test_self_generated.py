"""Self-generated text: its states, its templates, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anydepth.speculation.self_generated import Template, Writer
from drafts import CHAT, texts_of
from tiny import byte_tokenizer, tiny_llama


@torch.no_grad()
@pytest.mark.parametrize("chat", [True, False])
def test_states_are_those_of_the_model_and_completions_are_greedy(chat: bool, tmp_path: Path) -> None:
    texts = texts_of(tmp_path, chat=chat)
    assert sum(len(text.ids) for text in texts) >= 1200
    assert len({tuple(text.ids.tolist()) for text in texts}) == len(texts)
    model: Any = tiny_llama()
    for text in texts[:8]:
        output = model(text.ids[None], output_hidden_states=True)
        assert torch.allclose(text.states[:, 0], output.hidden_states[2][0], atol=1e-4)
        assert torch.allclose(model.model.norm(text.states[:, 1]), output.hidden_states[-1][0], atol=1e-4)
        said = output.logits[0].argmax(-1)[text.completion - 1 : -1]
        assert torch.equal(said, text.ids[text.completion :])
        if chat:
            assert byte_tokenizer().decode(text.ids[: text.prompt]) == "<user>"
            shown = byte_tokenizer().decode(text.ids[: text.completion])
            assert shown.startswith("<user>") and shown.endswith("|<bot>") and shown.count("<bot>") == 1


def test_an_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.self_generated.SHARD_TOKENS", 400)
    whole = texts_of(tmp_path / "whole")
    own, calls = Writer.step, []

    def stops(self: Writer) -> Any:
        calls.append(0)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return own(self)

    monkeypatch.setattr(Writer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        texts_of(tmp_path / "stopped")
    monkeypatch.setattr(Writer, "step", own)
    again = texts_of(tmp_path / "stopped")
    assert len(list((tmp_path / "stopped").iterdir())) == 3
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(whole, again, strict=True))


def test_templates() -> None:
    tokenizer = byte_tokenizer()
    assert Template.of(tokenizer) == Template([0], [], frozenset([0]))
    tokenizer.chat_template = CHAT
    template = Template.of(tokenizer)
    assert tokenizer.decode(template.start) == "<user>" and tokenizer.decode(template.between) == "|<bot>"
    assert template.ends == frozenset([0, template.between[0]])
