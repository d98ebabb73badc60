"""Passes whose gates the kernels decide against the same gates asked one by one: states, K/V, records and costs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import families
from anydepth import FastEngine, FFNRouter, attach
from anydepth.engine.backends.cpu import native
from anydepth.engine.backends.cpu.backend import KernelBackend
from anydepth.engine.backends.cpu.kernel_gates import KernelGates
from anydepth.engine.backends.cpu.kernel_pass import KernelPass, passes_of
from anydepth.engine.kv_cache import EngineCache
from anydepth.gating import scores
from anydepth.gating.gate_network import GateNetwork
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord
from tiny import tiny_llama

pytestmark = pytest.mark.skipif(
    native.why_not(torch.float32, torch.device("cpu")) is not None, reason="no C++ compiler on this machine"
)

ROUTER: dict[str, Any] = {"name": "layer_router", "always_keep": 2, "initial_bias": 0.0}
MIXERS: dict[str, Any] = {**ROUTER, "branch": "mixer", "reads": "sequential", "widths": []}
EXITS: dict[str, Any] = {"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.0}
LEAVE: dict[str, Any] = {"name": "early_exit", "layers": [2, 4]}
FFNS: dict[str, Any] = {"name": "ffn_router", "layers": [1, 2, 5]}
METHODS: dict[str, list[dict[str, Any]]] = {
    "full depth": [],
    "skip_set": [{"name": "skip_set", "skip_layers": [2], "skip_mixers": [1], "skip_ffns": [4]}],
    "token router": [ROUTER],
    "router on embeddings": [{**ROUTER, "input": "embeddings"}],
    "random router": [{"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.5, 0.0, 1.0, 0.6]}],
    "sequence router": [{**ROUTER, "granularity": "sequence", "pool_tokens": 5}],
    "mixer router": [{**ROUTER, "branch": "mixer"}],
    "mixer router on embeddings": [{**ROUTER, "branch": "mixer", "input": "embeddings"}],
    "mixer router, each layer's own, beside FFN gates": [{**MIXERS, "always_keep": 1}, FFNS],
    "mixer router of sequences": [{**MIXERS, "granularity": "sequence", "pool_tokens": 5}],
    "random mixer router": [
        {"name": "layer_router", "always_keep": 2, "router": "random", "rates": 0.4, "branch": "mixer"}
    ],
    "mixer router behind an exit": [{**EXITS, "layers": [2]}, {**MIXERS, "always_keep": 3}],
    "mixer router and a skip set": [
        {**MIXERS, "always_keep": 3},
        {"name": "skip_set", "skip_mixers": [1], "skip_ffns": [4]},
    ],
    "router, each layer's own": [{**ROUTER, "reads": "sequential", "widths": []}],
    "exit_gate": [EXITS],
    "early_exit": [{**LEAVE, "thresholds": [0.05, 0.06]}],
    "early_exit, at one of its layers": [{**LEAVE, "thresholds": [2.0, 0.06]}],
    "early_exit, margin of some tokens": [{**LEAVE, "confidence": "margin", "vocabulary": 50, "thresholds": 0.1}],
    "early_exit, entropy, beside FFN gates": [{**LEAVE, "confidence": "entropy", "thresholds": 0.12}, FFNS],
    "early_exit, classifier": [{**LEAVE, "confidence": "classifier", "thresholds": 0.5}],
    "early_exit, cosine": [{**LEAVE, "confidence": "cosine", "thresholds": 0.95}],
    "early_exit, stricter at first": [{**LEAVE, "thresholds": 0.03, "decay": 51.2}],
    "early_exit, classifier, stricter at first": [
        {**LEAVE, "confidence": "classifier", "thresholds": 0.45, "decay": 51.2}
    ],
    "mixture_of_depths": [{"name": "mixture_of_depths"}],
    "mixture_of_depths, unscaled, beside FFN gates": [
        {"name": "mixture_of_depths", "weigh": False, "kv_rule": "project"},
        FFNS,
    ],
    "router, omit": [{**ROUTER, "kv_rule": "omit"}],
    "mixer router, omit": [{**MIXERS, "kv_rule": "omit"}],
    "ffn_router": [FFNS],
    "hat": [EXITS, FFNS],
    "exits around a skip set": [
        EXITS,
        {"name": "skip_set", "skip_layers": [1, 3], "skip_mixers": [5], "skip_ffns": [4]},
    ],
    "ffn_router and a skip set": [{"name": "skip_set", "skip_mixers": [2], "skip_ffns": [3]}, FFNS],
}
STEPS = [([0, 1], 7), ([1], 1), ([0], 1), ([1, 0], 1), ([0], 5), ([1, 0], 3), ([0], 1), ([1], 1)]


def engine_of(methods: list[dict[str, Any]]) -> FastEngine:
    adapted = attach(tiny_llama(), methods)
    generator = torch.Generator().manual_seed(1)
    for method in adapted.active_methods:
        for network in method.modules():
            if isinstance(network, GateNetwork):  # trained ones: who runs depends on the token
                torch.nn.init.normal_(network.direct.weight, std=0.3, generator=generator)
        if isinstance(method, FFNRouter):
            method.thresholds.zero_()
    return FastEngine(adapted)


def decode(engine: FastEngine, steps: list[tuple[list[int], int]]) -> tuple[list[torch.Tensor], list[PassRecord], Any]:
    """States and records of steps of some rows and tokens each; the last token is forgotten and said again."""
    cache, generator = engine.model.new_cache(2), torch.Generator().manual_seed(2)
    plan = Plan.of(engine.adapted.active_methods)
    states, records = [], []
    for slots, num_tokens in steps:
        ids = torch.randint(1, 256, (len(slots), num_tokens), generator=generator)
        for _ in range(2):
            hidden, record = engine.model.forward(ids, slots, cache, plan)
            states.append(hidden)
            records.append(record)
            for slot in slots:
                cache.rewind(slot, cache.lengths[slot] - 1)
    return states, records, cache


def known_of(cache: EngineCache) -> list[tuple[int, int, torch.Tensor]]:
    """What the layers hold and keep waiting."""
    return [
        (kv.counts[slot], kv.num_deferred[slot], kv.states[slot, :, : kv.counts[slot]])
        for kv in cache.layers
        for slot in range(2)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_kernels_decide_as_the_methods_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(METHODS[name])
    runs: list[int] = []
    run = KernelPass.run
    monkeypatch.setattr(KernelPass, "run", lambda self, *args: runs.append(1) or run(self, *args))
    ours, our_records, our_cache = decode(engine, STEPS)
    wanted_runs = 2 * len(STEPS) - ("sequence" in name)  # their first tokens' plan is not made yet
    assert len(runs) == wanted_runs
    monkeypatch.setattr(KernelBackend, "fused", lambda *_: None)
    theirs, their_records, their_cache = decode(engine, STEPS)
    some_skip = False
    for own, wanted, own_record, record in zip(ours, theirs, our_records, their_records, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
        for own_keep, keep in zip(own_record.stacked(), record.stacked(), strict=True):
            assert torch.equal(own_keep, keep)
            some_skip = some_skip or not bool(keep.all())
        if "behind an exit" in name:  # layer by layer networks are asked even where every token has left
            assert own_record.router_flops <= record.router_flops
        else:
            assert own_record.router_flops == record.router_flops
        assert own_record.kv_rules == record.kv_rules
    assert some_skip == (name != "full depth")
    for own, other in zip(known_of(our_cache), known_of(their_cache), strict=True):
        assert own[:2] == other[:2]
        torch.testing.assert_close(own[2], other[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "dtype", "weights"),
    [
        ("llama", torch.bfloat16, None),
        ("llama", torch.bfloat16, "int8"),
        ("gemma2", torch.float32, None),
        ("gemma2", torch.bfloat16, None),  # a soft cap, which rounds thrice
    ],
)
def test_the_head_is_as_sure_in_the_kernels(
    family: str, dtype: torch.dtype, weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same states: confidences of all tokens, and who leaves."""
    model, sure = families.build(family).to(dtype), []
    adapted = attach(model, {"name": "early_exit", "layers": [2], "thresholds": 1.0})
    engine, ids = FastEngine(adapted, weights=weights), families.token_ids(batch_size=1)[:, :25]
    (method,) = adapted.active_methods
    note, confidence = KernelGates.record, scores.confidence

    def run() -> torch.Tensor:
        return engine.model.forward(ids, [0], engine.model.new_cache(1), Plan.of([method]))[1].stacked()[0]

    monkeypatch.setattr(
        KernelGates, "record", lambda self, flat, record: sure.append(-flat) or note(self, flat, record)
    )
    run()
    method.threshold = -float(sure.pop().median())  # halfway between tokens, but for the one
    ours = run()
    monkeypatch.setattr(KernelBackend, "fused", lambda *_: None)
    monkeypatch.setattr(scores, "confidence", lambda *a: sure.append(confidence(*a)) or sure[-1])
    theirs = run()
    torch.testing.assert_close(*sure, rtol=1e-5, atol=1e-6)
    assert (ours != theirs).sum() <= len(ours) and ours[2].sum() in (11, 12, 13)  # the one may go either way


@pytest.mark.parametrize(
    "methods",
    [
        [ROUTER, EXITS],  # two gates of one layer
        [ROUTER, {"name": "skip_set", "skip_layers": [3]}],  # a gate of a layer that is closed
    ],
)
def test_others_are_asked_layer_by_layer(methods: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(methods)
    runs: list[int] = []
    monkeypatch.setattr(KernelPass, "run", lambda *_: runs.append(1))
    states, records, _ = decode(engine, STEPS[:3])
    assert not runs and all(part.isfinite().all() for part in states)
    assert not all(bool(keep.all()) for record in records for keep in record.stacked())


def test_records_do_not_hold_the_cache_and_rows_are_noted_later() -> None:
    engine = engine_of([ROUTER])
    cache = engine.model.new_cache(2)
    states = weakref.ref(cache.states)
    ids = torch.arange(1, 7).view(2, 3)
    record = engine.model.forward(ids, [0, 1], cache, Plan.of(engine.adapted.active_methods))[1]
    own = record.row(1)
    assert not {"mixer_keep", "router_flops"} & (vars(record).keys() | vars(own).keys())
    del cache
    gc.collect()
    assert states() is None
    assert own.num_real == 3 and own.router_flops * 2 == record.router_flops > 0
    for layer_idx, keep in record.mixer_keep.items():
        assert torch.equal(own.mixer_keep[layer_idx], keep[1:])


def test_gates_that_move_are_found_again() -> None:
    """A compiled pass points to their weights."""
    engine = engine_of([ROUTER])
    cache, methods = engine.model.new_cache(1), engine.adapted.active_methods
    ids, plan = torch.ones(1, 1, dtype=torch.long), Plan.of(methods)
    engine.model.forward(ids, [0], cache, plan)
    network = methods[0].network
    assert isinstance(network, GateNetwork)
    for name, value in (("weight", torch.zeros_like(network.direct.weight)), ("bias", torch.full((4,), -9.0))):
        setattr(network.direct, name, torch.nn.Parameter(value))
    record = engine.model.forward(ids, [0], cache, plan)[1]
    assert [bool(record.mixer_keep[layer_idx].any()) for layer_idx in range(2, 6)] == [False] * 4


def test_passes_are_kept_until_the_plan_or_memory_changes() -> None:
    engine = engine_of([ROUTER])
    cache, methods = engine.model.new_cache(1), engine.adapted.active_methods
    plan = Plan.of(methods)

    def step(plan: Plan) -> object:
        engine.model.forward(torch.ones(1, 1, dtype=torch.long), [0], cache, plan)
        return [*passes_of(plan, cache).by_shape.values()][-1]

    first = step(plan)
    assert first is not None and step(plan) is first and len(passes_of(plan, cache).by_shape) == 1
    methods[0].config = methods[0].config.model_copy(update={"threshold": 5.0})
    assert step(Plan.of(methods)) is not first and step(plan) is first
    for _ in range(cache.capacity):
        step(plan)
    assert step(plan) is not first  # the K/V have moved


def test_a_plan_does_not_hold_the_caches_it_was_compiled_for() -> None:
    engine = engine_of([ROUTER])
    cache, plan = engine.model.new_cache(1), Plan.of(engine.adapted.active_methods)
    engine.model.forward(torch.ones(1, 1, dtype=torch.long), [0], cache, plan)
    states = weakref.ref(cache.states)
    del cache
    gc.collect()
    assert states() is None


@pytest.mark.parametrize("kind", ["random router", "sequence router"])
def test_scores_that_are_known_survive_a_move_of_what_waits(kind: str) -> None:
    """Layers that no token runs outgrow their first room; the plan made for the new place must decide the same."""
    engine = engine_of(METHODS[kind])
    ids = torch.randint(1, 257, (1, 9), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    ours = engine.generate(input_ids=ids, **options)
    kept = engine.adapted.last_trace
    assert torch.equal(ours, engine.adapted.generate(input_ids=ids, **options))
    assert torch.equal(kept.mixer_keep, engine.adapted.last_trace.mixer_keep)
