"""Samples are texts as they stand, each run by itself, and measured as stock transformers would."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import anydepth
from anydepth.measure import samples
from anydepth.measure.samples import MIN_TOKENS, correlations, draw_samples
from tiny import byte_tokenizer, tiny_llama

LETTERS = "etaoinshrdlu"


def documents(num: int = 40) -> list[str]:
    """Texts of 20, 21, … letters, the later ones of rarer letters."""
    return [(LETTERS[: 2 + number // 4] * 40)[: 20 + number] for number in range(num)]


def router() -> anydepth.AdaptedModel:
    spec = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.5] * 4}
    return anydepth.attach(tiny_llama(), spec)


def test_documents_are_samples_and_are_spread_over_the_corpus() -> None:
    texts = documents(41)
    found = draw_samples(texts, byte_tokenizer(), limit=5, max_tokens=45)
    assert (found.unit, found.num_cut) == ("document", 2)
    assert [len(ids) for ids in found.token_ids] == [20, 30, 40, 45, 45]
    assert found.counts == Counter(byte_tokenizer()("".join(texts))["input_ids"])


def test_samples_of_a_corpus_that_is_read_in_part_are_spread_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of 200 texts is read: samples are from each quarter of them, in order."""
    texts = [f"{number:03} " + "x" * 16 for number in range(200)]
    monkeypatch.setattr(samples, "MAX_COUNTED", 40 * 20)
    tokenizer = byte_tokenizer()
    found = draw_samples(texts, tokenizer, limit=16, max_tokens=45)
    places = [int(str(tokenizer.decode(ids))[:3]) for ids in found.token_ids]
    assert places == sorted(places) and found.counts.total() == 40 * 20
    assert max(b - a for a, b in pairwise([0, *places, 199])) <= 25


def test_few_or_long_documents_are_taken_by_paragraph() -> None:
    few = ["\n\n".join(documents(20)), "short\n \n" + "x" * MIN_TOKENS]
    found = draw_samples(few, byte_tokenizer(), limit=64, max_tokens=100)
    assert found.unit == "paragraph"
    assert [len(ids) for ids in found.token_ids] == [*range(20, 40), MIN_TOKENS]  # "short" is too short
    long = ["\n\n".join([text] * 3) for text in documents()]
    assert draw_samples(long, byte_tokenizer(), limit=64, max_tokens=60).unit == "paragraph"


def test_measures_are_those_of_transformers_and_of_arithmetic() -> None:
    adapted, tokenizer, texts = router(), byte_tokenizer(), documents()
    shown: list[int] = []
    found = correlations(
        adapted, tokenizer, texts, limit=64, max_tokens=128, track=lambda steps: shown.append(len(steps)) or steps
    )
    assert found is not None and shown == [40] and found["of"] == "depth"
    model = tiny_llama()
    everything = Counter("".join(texts))
    for text, row in zip(texts, found["samples"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()
            adapted(input_ids=ids, use_cache=False)
        rarity = sum(-math.log(everything[letter] / everything.total()) for letter in text) / len(text)
        assert row["length"] == len(text)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert row["rarity"] == pytest.approx(rarity)
        assert row["depth"] == pytest.approx(adapted.last_trace.mean_depth)
    columns = {key: np.array([row[key] for row in found["samples"]]) for key in found["samples"][0]}
    assert [(row["of"], row["with"]) for row in found["rows"]] == [
        (of, beside) for of in ("depth", "layer_token_share") for beside in ("length", "perplexity", "rarity")
    ]
    for row in found["rows"]:
        wanted = np.corrcoef(columns[row["with"]], columns[row["of"]])[0, 1]
        assert row["pearson"]["r"] == pytest.approx(wanted)
    # Later texts are longer and of rarer letters; random gates know nothing of either.
    assert np.corrcoef(columns["length"], columns["rarity"])[0, 1] > 0.9


def test_a_bos_is_no_token_of_a_sample() -> None:
    tokenizer, plain = byte_tokenizer(), byte_tokenizer()
    tokenizer.bos_token = "<eos>"
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    text = documents()[:1] * 40
    limits = {"limit": 1, "max_tokens": 128}
    found, without = (correlations(router(), own, text, **limits) for own in (tokenizer, plain))
    assert found is not None and without is not None
    row = found["samples"][0]
    assert row["length"] == without["samples"][0]["length"] == 20
    ids = torch.tensor([[0, *plain(text[0])["input_ids"]]])
    with torch.no_grad():
        loss = F.cross_entropy(tiny_llama()(ids).logits[0, :-1], ids[0, 1:]).item()
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_fixed_skips_go_with_nothing() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "skip_set", "skip_layers": [2], "skip_mixers": [3]})
    found = correlations(adapted, byte_tokenizer(), documents(), limit=16, max_tokens=128)
    assert found is not None and found["of"] is None
    assert all(row["pearson"]["r"] is None for row in found["rows"] if row["of"] == "depth")


def test_tokens_that_choose_a_mixer_are_compared_by_flops() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "mixer_router", "router": "random"})
    found = correlations(adapted, byte_tokenizer(), documents(), limit=16, max_tokens=128)
    assert found is not None and found["of"] == "layer_token_share"


def test_texts_that_are_all_too_short_have_no_correlations() -> None:
    assert correlations(router(), byte_tokenizer(), ["short"] * 40, limit=16, max_tokens=128) is None
