"""State of a forward belongs to its call: threads, copies, and layers that backward recomputes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anydepth
import families
from anydepth import Draft, FastEngine, HFEngine
from anydepth.hf.adapted import AdaptedModel
from undecided import spread_gates

SPECS: dict[str, Any] = {
    "none": [],
    "skip_set": {"name": "skip_set", "skip_layers": [1], "skip_ffns": [3]},
    "stochastic_depth": {"name": "stochastic_depth", "max_probability": 0.5, "per": "sample"},
    "layer_router": {"name": "layer_router", "always_keep": 1},
    "layer_router_sequence": {"name": "layer_router", "always_keep": 1, "granularity": "sequence", "pool_tokens": 5},
    "mixture_of_depths": {"name": "mixture_of_depths"},
    "exit_gate": {"name": "exit_gate", "layers": [1, 3], "widths": [4]},
    "exit_gate_recompute": {"name": "exit_gate", "layers": [1, 3], "widths": [4], "kv_rule": "recompute"},
    "ffn_router": {"name": "ffn_router"},
    "early_exit": {"name": "early_exit", "layers": [1, 3], "thresholds": [0.14, 0.12]},
    "early_exit_cosine": {"name": "early_exit", "layers": [2, 3], "confidence": "cosine", "thresholds": 0.8},
    "mixer_router": {"name": "mixer_router"},
    "hat": [{"name": "exit_gate", "layers": [2, 4]}, {"name": "ffn_router", "layers": [0, 1, 3]}],
}
DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "first_layers": ("none", {"exit_layers": [2]}),
    "by_router": ("layer_router", {}),
}
"""Methods and options of drafting."""
NUM_THREADS = 4


def attached(spec: str, family: str = "llama") -> AdaptedModel:
    """Attach methods with gates that differ between tokens."""
    return spread_gates(anydepth.attach(families.build(family), SPECS[spec]), 11)


def written(generate: Callable[..., Tensor], seed: int) -> list[int]:
    ids = families.token_ids(1, 12, seed=seed)
    return generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()


# --- threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_threads_generate_as_each_would_alone(spec: str) -> None:
    """C2: four threads on one model, prompts of one length, on the model itself."""
    adapted = attached(spec)
    seeds = range(8)
    alone = [written(adapted.generate, seed) for seed in seeds]
    assert len({tuple(ids) for ids in alone}) == len(seeds)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(lambda seed: written(adapted.generate, seed), seeds)) == alone


@pytest.mark.parametrize("path", ["hf", "fast"])
@pytest.mark.parametrize("spec", [*(spec for spec in SPECS if spec != "mixer_router"), *DRAFTS])
def test_threads_share_an_engine(spec: str, path: str) -> None:
    """C2, another engine: kernels and drafters have one scratch memory for all."""
    methods, options = DRAFTS.get(spec, (spec, None))
    adapted = attached(methods)
    draft = None if options is None else Draft(adapted, options)
    engine = FastEngine(adapted, draft=draft) if path == "fast" else HFEngine(adapted, draft)
    seeds = range(8)
    alone = [written(engine.generate, seed) for seed in seeds]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(lambda seed: written(engine.generate, seed), seeds)) == alone


@pytest.mark.parametrize("strategy", ["influence", "dynamic", "knapsack", "bayesian"])
def test_threads_search_what_they_draft_with(strategy: str) -> None:
    """C2, hooks: a search listens to forwards of its own thread alone."""
    search = {"strategy": strategy, "window": 8, "every": 4}
    adapted = anydepth.attach(families.build("llama"), [])
    engine = HFEngine(adapted, Draft(adapted, {"search": search}))
    seeds = range(8)
    alone = [written(adapted.generate, seed) for seed in seeds]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(lambda seed: written(engine.generate, seed), seeds)) == alone


def test_settings_of_one_thread_do_not_affect_others() -> None:
    """C2, the context managers: full depth in one thread is no full depth in another."""
    adapted = attached("skip_set")
    routed = written(adapted.generate, 0)
    with adapted.disabled():
        whole = written(adapted.generate, 0)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(written, adapted.generate, 0).result() == routed != whole
        assert written(adapted.generate, 0) == whole


def test_each_thread_has_its_trace() -> None:
    """C2, traces: the trace is that of the caller's own last sequence."""
    adapted = attached("layer_router")
    written(adapted.generate, 0)
    before = adapted.last_trace
    with ThreadPoolExecutor(1) as pool:
        pool.submit(written, adapted.generate, 1).result()
    assert torch.equal(adapted.last_trace.mixer_keep, before.mixer_keep)


# --- copies ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_is_equal_and_independent(spec: str, family: str) -> None:
    """C3: `copy.deepcopy` of an adapted model, as TRL and EMA make them."""
    if spec == "mixer_router" and family == "gpt2":
        pytest.skip("its attention has no separate width that a matching linear mixer is made of")
    ids, other = families.token_ids(2, 20), families.token_ids(2, 13, seed=9)
    adapted = attached(spec, family)
    wanted, wanted_other = adapted(ids).logits, adapted(other).logits
    duplicate = copy.deepcopy(adapted)
    assert torch.equal(duplicate(other).logits, wanted_other)  # before the original, and of another length
    adapted(ids)
    before = adapted.last_trace
    assert torch.equal(duplicate(other).logits, wanted_other)
    assert torch.equal(adapted.last_trace.mixer_keep, before.mixer_keep)
    assert duplicate.last_trace.num_tokens == other.numel()
    for parameter in duplicate.parameters():
        parameter.zero_()
    assert torch.equal(adapted(ids).logits, wanted)
    base = anydepth.detach(duplicate)
    assert all("forward" not in vars(module) for module in base.modules())
    assert torch.equal(adapted(ids).logits, wanted)  # `detach` of the copy has left it attached


@torch.no_grad()
@pytest.mark.parametrize("spec", ["skip_set", "layer_router", "hat"])
def test_a_copy_of_the_base_while_attached(spec: str) -> None:
    """C3, the base model: a copy runs as the original, without calling it."""
    ids = families.token_ids(2, 20)
    adapted = attached(spec)
    base: nn.Module = adapted.model
    wanted = base(ids).logits
    duplicate = copy.deepcopy(base)
    adapted(families.token_ids(2, 13, seed=9))
    assert torch.equal(duplicate(ids).logits, wanted)
    assert adapted.last_trace.num_tokens == 26
    anydepth.detach(adapted)
    assert torch.equal(duplicate(ids).logits, wanted)


@torch.no_grad()
def test_a_copy_made_while_disabled_is_enabled() -> None:
    """C3, a copy made at full depth: no context manager would enable it again."""
    ids = families.token_ids(2, 20)
    adapted = attached("layer_router")
    wanted = adapted(ids).logits
    with adapted.disabled():
        duplicate = copy.deepcopy(adapted)
        assert torch.equal(duplicate(ids).logits, wanted)


@torch.no_grad()
def test_moving_average_of_an_adapted_model() -> None:
    """C3, EMA: the average of one model is that model."""
    adapted = attached("ffn_router")
    average = torch.optim.swa_utils.AveragedModel(adapted)
    average.update_parameters(adapted)
    ids = families.token_ids(2, 20)
    assert torch.equal(average(ids).logits, adapted(ids).logits)


# --- checkpointing -----------------------------------------------------------------------------------------


def gradients(
    spec: str, execution: str, checkpointing: dict[str, bool] | None, family: str, *, base_alone: bool = False
) -> list[Tensor]:
    """Return gradients of two forwards before one backward; with `base_alone` the gates decide as at inference."""
    adapted = attached(spec, family).train()
    if base_alone:
        adapted.eval().backbone.model.train()
    if checkpointing is not None:
        adapted.backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        adapted.backbone.model.enable_input_require_grads()
    for method in adapted.methods.values():
        method.reseed(5)  # type: ignore[operator]
    losses = []
    for seed, length in ((1, 20), (2, 13)):
        ids = families.token_ids(2, length, seed=seed)
        if execution == "masked":
            with adapted.masked():
                output = adapted(ids, labels=ids)
        else:
            output = adapted(ids, labels=ids)
        losses += [output.loss, *adapted.auxiliary_losses().values()]
    torch.stack(losses).sum().backward()
    return [torch.zeros(1) if part.grad is None else part.grad.flatten() for part in adapted.parameters()]


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("spec", SPECS)
def test_recomputed_layers_belong_to_their_own_forward(spec: str, execution: str) -> None:
    """C6: two forwards before one backward give the gradients that they give without checkpointing.

    Reentrant checkpointing is replaced by the other kind, so that both run the same code from there on.
    """
    wanted = gradients(spec, execution, None, "llama")
    ours = gradients(spec, execution, {"use_reentrant": True}, "llama")
    for own, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)


def test_checkpointing_that_is_not_reentrant_stays_so() -> None:
    wanted = gradients("hat", "sparse", None, "llama")
    ours = gradients("hat", "sparse", {"use_reentrant": False}, "llama")
    for own, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("gpt2", "ffn_router"),
        ("gemma3_text", "ffn_router"),
        ("qwen3_next", "ffn_router"),
        ("gpt_oss", "ffn_router"),
        ("gemma4_text", "layer_router"),
        ("bloom", "layer_router"),
    ],
)
def test_recomputed_layers_of_other_families(family: str, spec: str) -> None:
    """C6, other families: layers with positional arguments, norms after branches, recurrent mixers, an FFN that returns
    a tuple, K/V that later layers share, a bias of keys.
    """
    wanted = gradients(spec, "sparse", None, family)
    ours = gradients(spec, "sparse", {"use_reentrant": True}, family)
    for own, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["skip_set", "layer_router", "ffn_router", "mixer_router", "hat", "exit_gate_recompute"]
)
def test_a_base_that_trains_under_gates_that_do_not(spec: str) -> None:
    """C6, different modes: transformers checkpoints by the mode of the layer, not of the adapted model."""
    wanted = gradients(spec, "sparse", None, "llama", base_alone=True)
    ours = gradients(spec, "sparse", {"use_reentrant": True}, "llama", base_alone=True)
    for own, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)


def test_frozen_exits_decide_the_same_again() -> None:
    """C6, a method that is attached while others learn: it decides as at inference, layer by layer."""

    def of(checkpointing: bool) -> list[Tensor]:
        adapted = anydepth.attach(
            families.build("llama"),
            [SPECS["early_exit_cosine"], {"name": "ffn_router", "layers": [1, 2, 3, 4]}],
        ).train()
        if checkpointing:
            adapted.backbone.model.gradient_checkpointing_enable()
        adapted.methods["early_exit"].is_frozen = True  # type: ignore[assignment]
        ids = [families.token_ids(2, length) for length in (20, 13)]
        sum(adapted(part, labels=part).loss for part in ids).backward()
        return [torch.zeros(1) if part.grad is None else part.grad.flatten() for part in adapted.parameters()]

    for own, theirs in zip(of(True), of(False), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)


def test_detach_restores_checkpointing() -> None:
    """The functions that transformers set are restored."""
    adapted = attached("ffn_router").train()
    model: Any = adapted.backbone.model
    model.gradient_checkpointing_enable()
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    adapted(families.token_ids(1, 5))
    anydepth.detach(adapted)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == before
