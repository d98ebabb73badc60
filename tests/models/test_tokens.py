"""Token ids of texts: one BOS, padding as the tokenizer pads, and the tokens that end a text."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anydepth.errors import UserError
from anydepth.models.load import load_model
from anydepth.models.tokens import drop_tokens, encode, encode_batch, end_ids, fit_to_model, padded
from serving_here import TEMPLATE, fallback_tokenizer
from tiny import byte_tokenizer, save_base, tiny_llama


def test_a_prompt_from_a_template_has_one_bos() -> None:
    """S21: the template writes the BOS into the text, and the tokenizer adds none."""
    tokenizer = fallback_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "the sea"}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert wanted[0] == 1 != wanted[1] and tokenizer(text)["input_ids"] == [1, *wanted]
    assert encode_batch(tokenizer, [text, "sea"]) == [wanted, tokenizer("sea")["input_ids"]]
    assert encode(tokenizer, "<s><s>sea")[:3] == tokenizer("<s><s>sea", add_special_tokens=False)["input_ids"][:3]
    tokenizer.padding_side = "left"
    batch = padded(tokenizer, [text, "a"])
    assert batch["input_ids"][0].tolist() == wanted and (batch["input_ids"] == 1).sum(1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(wanted), int((batch["input_ids"][1] != 2).sum())]


def test_a_tokenizer_that_adds_no_bos_loses_none() -> None:
    """The text itself begins with two, and the model gets both."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<eos>"
    assert encode(tokenizer, "<eos><eos>a")[:2] == [0, 0]


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "wanted"),
    [([0, 7], 5, {0, 5, 7}), (3, 3, {3}), (None, 5, {5}), (3, None, {3}), (None, None, set())],
)
def test_a_text_ends_at_the_tokens_of_the_model_and_of_the_tokenizer(
    of_model: Any, of_tokenizer: Any, wanted: set[int]
) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=of_model))
    tokenizer: Any = SimpleNamespace(eos_token_id=of_tokenizer)
    assert end_ids(model, tokenizer) == wanted
    assert end_ids(model) == wanted - ({of_tokenizer} if of_tokenizer == 5 else set())


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and no special token."""
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_texts_are_padded_without_a_pad_token() -> None:
    """Nothing becomes a special token for it, which decoding would leave out."""
    tokenizer = bare_tokenizer()
    fit_to_model(tokenizer, 256, "model")
    batch = padded(tokenizer, ["abc", "d"])
    a, b, c, d = tokenizer("abcd")["input_ids"]  # type: ignore[misc]
    assert batch["input_ids"].tolist() == [[a, b, c], [0, 0, d]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    tokenizer.padding_side = "right"
    assert padded(tokenizer, ["abc", "d"])["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert not tokenizer.all_special_tokens


@torch.no_grad()
def test_a_model_without_pad_and_end_tokens_generates(tmp_path: Path) -> None:
    model = tiny_llama()
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = config.bos_token_id = None  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    bare_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    batch = padded(tokenizer, ["the sea", "a"])
    out = loaded.generate(**batch, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert out.shape == (2, 12)
    for row, text in enumerate(["the sea", "a"]):
        alone = loaded.generate(**padded(tokenizer, [text]), max_new_tokens=5, do_sample=False)  # type: ignore[operator]
        assert torch.equal(out[row, -5:], alone[0, -5:])


def test_a_vocabulary_smaller_than_the_embedding(tmp_path: Path) -> None:
    """Models are padded to a round number of embeddings: such an id is no text."""
    tiny_llama(vocab_size=320).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    _, tokenizer = load_model(str(tmp_path))
    assert len(tokenizer) == 257 and tokenizer.decode([tokenizer("a")["input_ids"][0], 300]) == "a"  # type: ignore[index]


def test_added_tokens_without_an_embedding_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as a pad token that was added to the tokenizer only."""
    save_base(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        _, loaded = load_model(str(tmp_path))
    assert "has no embedding of <tool>: its text is read in pieces" in caplog.text and "<pad>" not in caplog.text
    assert (len(loaded), loaded.pad_token, loaded.decode(loaded("<tool>")["input_ids"])) == (257, "<eos>", "<tool>")
    assert max(loaded("<pad>a<tool>")["input_ids"]) < 257  # type: ignore[arg-type]
    loaded.save_pretrained(tmp_path / "again")
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")) == 257


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_llama(vocab_size=200).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 257 tokens and the model 200 embeddings: they are of two models"):
        load_model(str(tmp_path))


def test_tokens_are_dropped_from_an_id_on() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    drop_tokens(tokenizer, 258)
    assert tokenizer.get_added_vocab().keys() == {"<eos>", "<a>"}
    assert tokenizer("<a>")["input_ids"] == [257] and len(tokenizer("<b>")["input_ids"]) == 3  # type: ignore[arg-type]
