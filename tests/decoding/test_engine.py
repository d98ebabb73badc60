"""What every engine is asked: whether it drafts, whether drafting keeps the bits, and its last generation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import FastEngine, HFEngine
from anydepth.decoding.request import Request
from anydepth.decoding.scheduler import Scheduler
from drafts import both, drafting, prompts
from tiny import tiny_llama
from undecided import undecided


def ids(batch_size: int = 1, length: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(1, 257, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dtype", "make", "is_bitwise"),
    [
        (torch.float32, HFEngine, True),
        (torch.bfloat16, HFEngine, False),
        (torch.float32, lambda adapted: FastEngine(adapted, native=False), True),
        (torch.bfloat16, lambda adapted: FastEngine(adapted, native=False), False),
    ],
)
def test_operators_of_torch_keep_every_token_in_float32_alone(dtype: torch.dtype, make: Any, is_bitwise: bool) -> None:
    assert make(anydepth.attach(tiny_llama().to(dtype), [])).is_bitwise == is_bitwise


def test_kernels_keep_every_token() -> None:
    engine = FastEngine(anydepth.attach(tiny_llama().bfloat16(), []))
    if engine.model.why_not_native is None:
        assert engine.is_bitwise


def test_an_engine_of_fewer_bits_is_quantised() -> None:
    adapted = anydepth.attach(tiny_llama().bfloat16(), [])
    assert FastEngine(adapted, "int8").is_quantised and FastEngine(adapted, "int8").weights == "int8"
    assert not FastEngine(adapted).is_quantised and not HFEngine(adapted).is_quantised


def test_a_draft_is_used_unless_the_model_is_disabled() -> None:
    plain, engine = HFEngine(anydepth.attach(tiny_llama(), [])), drafting("hf", "lookup")
    assert not plain.drafts and not plain.differs
    assert engine.drafts and engine.differs
    with engine.adapted.disabled():
        assert not engine.drafts
    assert not engine.without_draft().drafts and not engine.without_draft().differs and engine.drafts
    assert HFEngine(undecided("ffn")).differs


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_logits_are_those_of_full_depth_with_a_draft_and_of_the_methods_without(path: str) -> None:
    engine = drafting(path, "skip set")
    own = ids(1, 9)
    with engine.adapted.disabled():
        full = engine.adapted(own, use_cache=False).logits[0]
    skipped = engine.adapted(own, use_cache=False).logits[0]
    torch.testing.assert_close(engine.logits(own[0]), full, rtol=1e-4, atol=1e-4)
    assert engine.adapted.last_trace.mean_depth == 6
    torch.testing.assert_close(engine.without_draft().logits(own[0]), skipped, rtol=1e-4, atol=1e-4)
    trace = engine.adapted.last_trace
    assert trace.mean_depth == 3.5 and trace.head_rows == [9]


def test_attached_methods_decide_outside_of_drafting() -> None:
    """`adapted.generate` and forwards are those of the attached methods; a drafted text is that of full depth."""
    engine, batch = drafting("fast", "skip set"), prompts(2)
    engine.adapted(batch["input_ids"])
    assert engine.adapted.last_trace.mean_depth == 3.5
    both(engine, batch, do_sample=False)
    assert engine.adapted.last_trace.mean_depth == 6
    plain = engine.without_draft()
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(**batch, **options), engine.adapted.generate(**batch, **options))
    assert engine.adapted.last_trace.mean_depth < 6


# --- distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_draft_counts_are_those_of_the_last_generation(path: str) -> None:
    engine = drafting(path, "first layers")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    engine.generate(ids(1), **options)
    assert engine.draft_counts is not None
    with engine.adapted.disabled():
        engine.generate(ids(1), **options)
    assert engine.draft_counts is None


def test_a_batch_and_a_generation_take_turns_on_an_engine() -> None:
    """C2, a batcher: it takes its turn as `generate` does."""
    engine = FastEngine(undecided("layer_router"))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generated(seed: int) -> list[int]:
        return engine.generate(ids(seed=seed), **options)[0].tolist()

    def batched(seed: int) -> list[int]:
        request = Request.greedy(ids(seed=seed)[0].tolist(), 12)
        Scheduler(engine, 2, 2000).run([request])
        return request.prompt + request.output

    alone = [generated(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            ours, theirs = pool.map(generated, range(4)), pool.map(batched, range(4))
            assert list(ours) == list(theirs) == alone
