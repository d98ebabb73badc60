"""Jobs out of requests: special tokens of prompts and of answers."""

from __future__ import annotations

import pytest
import torch

from anydepth.serve.text_stream import TokenText
from serving_here import chat, complete, fallback_tokenizer, serving
from tiny import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("adds", [None, True, False])
def test_special_tokens_are_added_to_a_prompt_or_not(adds: bool | None) -> None:
    """S21: by default to the prompt of a completion, as in vLLM; the tokens are those of stock transformers."""
    tokenizer = fallback_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    ids = tokenizer("the sea", add_special_tokens=adds is not False)["input_ids"]
    said = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=2, eos_token_id=2)
    with serving(tokenizer=tokenizer, model=model) as client:
        answer = complete(client, temperature=0, max_tokens=8, add_special_tokens=adds, logprobs=0)
    assert (ids[0] == tokenizer.bos_token_id) == (adds is not False)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    names = TokenText(tokenizer)
    assert answer["choices"][0]["logprobs"]["tokens"] == [names.name_of(one) for one in said[0, len(ids) :].tolist()]


@pytest.mark.parametrize("adds", [None, True, False])
def test_special_tokens_are_added_to_a_chat_where_they_are_asked_for(adds: bool | None) -> None:
    """S21: by default the template's own alone, as in vLLM."""
    tokenizer = fallback_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    wanted = tokenizer("the sea", add_special_tokens=bool(adds))["input_ids"]
    with serving(tokenizer=tokenizer, model=tiny_llama(vocab_size=len(tokenizer))) as client:
        assert chat(client, max_tokens=2, add_special_tokens=adds)["usage"]["prompt_tokens"] == len(wanted)


@pytest.mark.parametrize("skips", [None, True, False])
@pytest.mark.parametrize("talks", [False, True])
def test_special_tokens_are_part_of_an_answer_where_they_are_asked_for(skips: bool | None, talks: bool) -> None:
    """S21: those that end no answer; the bias lets the model write nothing else."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    options = {"max_tokens": 3, "skip_special_tokens": skips, "logit_bias": {str(len(tokenizer) - 1): 100}}
    with serving(tokenizer=tokenizer, model=tiny_llama(vocab_size=len(tokenizer))) as client:
        answer = chat(client, **options) if talks else complete(client, **options)
    (choice,) = answer["choices"]
    text = choice["message"]["content"] if talks else choice["text"]
    assert text == ("<turn>" * 3 if skips is False else "") and answer["usage"]["completion_tokens"] == 3
