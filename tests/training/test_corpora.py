"""Corpora: the documents of names and files, and WikiText without its marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anydepth.errors import UserError
from anydepth.training.corpora import load_texts


def test_embedded_splits_are_disjoint_and_stable() -> None:
    train, valid = load_texts("embedded:train"), load_texts("embedded:valid")
    assert train == load_texts("embedded") and not set(train) & set(valid) and len(train) > len(valid) > 0


def test_files(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\ntwo")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in "ab"))
    assert "".join(load_texts(str(tmp_path / "x.txt"))).startswith("one")
    assert load_texts(str(tmp_path / "x.jsonl")) == ["a", "b"]


@pytest.mark.parametrize("content", ["", "  \n \n"])
def test_empty_corpus(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(UserError):
        load_texts(str(tmp_path / "x.txt"))


def test_wrong_record_names_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "hi"}\n')
    with pytest.raises(UserError, match="prompt"):
        load_texts(str(tmp_path / "x.jsonl"))


def test_wikitext_marks_are_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext-2").mkdir()
    # One article with every mark, one without.
    text = ' \n = One = \n \n It weighs 1 @,@ 000 @.@ 5 kg ( 2 lb ) , a well @-@ known " <unk> " . \n'
    text += " Born in 1916 @,@ \n"  # as in six lines of wikitext-2
    text += " \n = Two = \n \n B . \n"
    (tmp_path / "wikitext-2" / "valid.txt").write_text(text)
    monkeypatch.setenv("ANYDEPTH_DATA", str(tmp_path))
    one, two = load_texts("wikitext-2:valid")
    assert 'It weighs 1,000.5 kg (2 lb), a well-known "<unk>".\nBorn in 1916,' in one and "B." in two
    assert "@" not in one


def test_the_lines_of_wikitext_103_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line is one sample: those of more than so many characters, the first so many of them, marks and all."""
    (tmp_path / "wikitext-103").mkdir()
    long = [f" Line {number} weighs 1 @,@ 000 kg ." for number in range(5)]
    text = "\n".join([" ", " = One = ", " ", *long[:2], " short ", *long[2:]])
    (tmp_path / "wikitext-103" / "train.txt").write_text(text)
    monkeypatch.setenv("ANYDEPTH_DATA", str(tmp_path))
    assert load_texts("wikitext-103:train", lines=True, min_chars=20, max_documents=3) == long[:3]
    (article,) = load_texts("wikitext-103:train")
    assert "1,000 kg." in article and "short" in article
    with pytest.raises(UserError, match="more than 900 characters"):
        load_texts("wikitext-103", lines=True, min_chars=900)


def test_lines_and_lengths_of_any_corpus(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "one\n\nthree"}) + "\n" + json.dumps({"text": "four4"}))
    assert load_texts(str(tmp_path / "x.jsonl"), lines=True) == ["one", "three", "four4"]
    assert load_texts(str(tmp_path / "x.jsonl"), lines=True, min_chars=3, max_documents=1) == ["three"]
