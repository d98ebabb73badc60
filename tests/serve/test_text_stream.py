"""Streams of text: whole characters, no text after a stop string, and at the end all of it."""

from __future__ import annotations

import random

import pytest

from anydepth.serve.text_stream import TextStream
from tiny import byte_tokenizer

TEXT = "The sea is wide – “größer”, 海 and 🌊; STOP here."


def pieces(text: str, *stop: str) -> tuple[list[str], TextStream]:
    tokenizer = byte_tokenizer()
    stream, said = TextStream(tokenizer, tokenizer("A prompt. ")["input_ids"], stop), []
    for token_id in tokenizer(text)["input_ids"]:
        said.append(stream.push(token_id))
        if stream.is_stopped:
            break
    return [*said, stream.finish()], stream


def test_characters_are_complete_and_none_is_lost() -> None:
    said, _ = pieces(TEXT)
    assert "".join(said) == TEXT
    assert all("�" not in part for part in said)


@pytest.mark.parametrize("stop", ["STOP", "ST", "s", "🌊", "nowhere"])
def test_a_stop_string_ends_it_and_is_not_part_of_it(stop: str) -> None:
    said, stream = pieces(TEXT, stop, "also nowhere")
    assert "".join(said) == TEXT.split(stop)[0]
    assert stream.is_stopped == (stop in TEXT)


def test_no_part_of_a_stop_string_is_ever_released() -> None:
    """Random texts of few letters: released text ends before the first stop, and at most its beginning is held."""
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices("abc", k=30))
        stop = "".join(generator.choices("abc", k=generator.randint(1, 4)))
        said, stream = pieces(text, stop)
        assert "".join(said) == text.split(stop)[0]
        assert stream.is_stopped == (stop in text)
