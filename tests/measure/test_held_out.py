"""The price of a skip set on text that its search did not see, beside int8 and int4 weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anydepth.engine.backends.cpu import native
from anydepth.measure.held_out import _warning, held_out, split_windows
from anydepth.methods.skip_set import SkipSetConfig
from tiny import byte_tokenizer, save_text, tiny_llama

NO_KERNELS = native.why_not(torch.bfloat16, torch.device("cpu")) is not None


def model(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_llama(intermediate_size=64, vocab_size=272).to(dtype)


def windows() -> Tensor:
    return torch.randint(1, 257, (3, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def loss_of(stock: Any) -> float:
    """Of stock transformers, window by window."""
    return sum(stock(input_ids=row[None], labels=row[None]).loss.item() for row in windows()) / 3


def without(stock: Any, layers: list[int]) -> Any:
    stock = copy.deepcopy(stock)
    stock.model.layers = nn.ModuleList(layer for number, layer in enumerate(stock.model.layers) if number not in layers)
    return stock


def linear_bytes(stock: Any) -> int:
    """Of the layers' weights and the head's, as stored."""
    parts = [*stock.model.layers.parameters(), *stock.lm_head.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)


@torch.no_grad()
def rounded(stock: Any, high: int) -> Any:
    """Linear layers on a symmetric grid for each row: what int8 weights are."""
    stock = copy.deepcopy(stock).bfloat16()
    for part in stock.modules():
        if isinstance(part, nn.Linear):
            scale = (part.weight.float().abs().amax(1, keepdim=True) / high).bfloat16().float()
            part.weight.copy_((part.weight.float() / scale).round().clamp(-high, high) * scale)
    return stock


def test_losses_are_those_of_stock_models_on_the_text() -> None:
    """C27: the set's own loss, and what int8 at full depth would cost, whatever type the model has."""
    for dtype in (torch.float32, torch.bfloat16):
        stock = model(dtype)
        before = {name: part.clone() for name, part in stock.state_dict().items()}
        found = held_out(stock, SkipSetConfig(skip_layers=[2, 4]), windows())
        assert all(torch.equal(part, before[name]) for name, part in stock.state_dict().items())
        rows = {row["label"]: row for row in found["rows"]}
        near = 1e-4 if dtype == torch.float32 else 0.03
        assert rows["full depth"]["loss"] == pytest.approx(loss_of(stock), abs=near)
        assert rows["skip set"]["loss"] == pytest.approx(loss_of(without(stock, [2, 4])), abs=near)
        assert rows["int8 weights"]["loss"] == pytest.approx(loss_of(rounded(stock, 127)), abs=0.05)
        assert ("int4 weights" in rows) is not NO_KERNELS
        assert rows["full depth"]["weight_bytes"] == linear_bytes(stock)
        assert rows["skip set"]["weight_bytes"] == linear_bytes(without(stock, [2, 4]))
        assert rows["int8 weights"]["weight_bytes"] < 0.6 * rows["full depth"]["weight_bytes"]
        assert found["num_tokens"] == 3 * 39


def test_a_warning_where_fewer_bits_are_better() -> None:
    """C27: random layers are worth much, bits are not."""
    found = held_out(model(), SkipSetConfig(skip_layers=[1, 2, 3]), windows())
    rows = {row["label"]: row["loss"] for row in found["rows"]}
    assert rows["int8 weights"] < rows["skip set"]
    assert "at full depth read fewer bytes and have no more loss than this skip set" in found["warning"]
    keys = ("label", "loss", "perplexity", "weight_bytes")
    parts = (("full depth", 2.0, 7.4, 100), ("skip set", 2.1, 8.2, 90), ("int8 weights", 2.2, 9.0, 50))
    assert _warning([dict(zip(keys, part, strict=True)) for part in parts]) is None  # that reads less, and loses more


def test_the_text_is_not_the_one_that_was_searched(tmp_path: Path) -> None:
    text = str(save_text(tmp_path / "text.txt"))
    seen, unseen = split_windows(text, byte_tokenizer(), 32, 4)
    assert seen.shape == unseen.shape == (4, 32)
    whole, _ = split_windows(text, byte_tokenizer(), 32, 8)
    assert torch.equal(torch.cat([seen, unseen]), whole)
    few, none = split_windows(text, byte_tokenizer(), 32, 100_000)
    found = held_out(model(), SkipSetConfig(skip_layers=[1]), none)
    assert len(few) > 8 and len(none) == 0
    assert found["rows"] == [] and "no text is left" in found["warning"]
