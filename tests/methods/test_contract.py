"""The contract that every method keeps on every family; the numbers are those of `style.md`.

A new method joins by a line in `CASES`; without one the tests fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel
from transformers.models.qwen3_next import modeling_qwen3_next

import anydepth
import families
from anydepth import FastEngine
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.gating.context import PassContext
from anydepth.gating.plan import Decisions, Plan, Sample
from anydepth.gating.scores import Score
from anydepth.gating.spec import GateSpec
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods import METHODS
from anydepth.methods._base.method import Method
from reference import relative_rms, replay

Spec = dict[str, Any] | list[dict[str, Any]]
RATES = [0.6, 0.3, 0.8, 0.5]
CASES: dict[str, Spec] = {
    "skip_layers": {"name": "skip_set", "skip_layers": [1, 3]},
    "skip_first_layer": {"name": "skip_set", "skip_layers": [0, 1]},
    "skip_branches": {"name": "skip_set", "skip_layers": [3], "skip_mixers": [0, 2], "skip_ffns": [1, 2]},
    "prompt_exit": {
        "name": "prompt_exit",
        "layer": 3,
        "first": 2,
        "last": 4,
    },  # of prompts that are generated from alone
    "router_project": {"name": "layer_router", "always_keep": 1, "kv_rule": "project"},
    "router_omit": {"name": "layer_router", "always_keep": 1, "kv_rule": "omit"},
    "random_project": {"name": "layer_router", "always_keep": 1, "router": "random", "rates": RATES},
    "random_omit": {"name": "layer_router", "always_keep": 1, "router": "random", "rates": RATES, "kv_rule": "omit"},
    "stochastic_depth": {"name": "stochastic_depth", "max_probability": 0.5},
    "router_sequence": {"name": "layer_router", "always_keep": 1, "granularity": "sequence", "pool_tokens": 5},
    "router_reads_each": {"name": "layer_router", "always_keep": 1, "reads": "sequential", "widths": []},
    "attention_project": {"name": "layer_router", "always_keep": 1, "branch": "mixer"},
    "attention_omit": {
        "name": "layer_router",
        "always_keep": 1,
        "branch": "mixer",
        "kv_rule": "omit",
        "reads": "sequential",
        "widths": [],
    },
    "attention_sequence": {
        "name": "layer_router",
        "always_keep": 1,
        "branch": "mixer",
        "granularity": "sequence",
        "pool_tokens": 5,
        "reads": "sequential",
        "widths": [],
    },
    "attention_random": {
        "name": "layer_router",
        "always_keep": 1,
        "branch": "mixer",
        "router": "random",
        "rates": RATES,
    },
    "mixture_of_depths": {"name": "mixture_of_depths"},
    "exit_gate": {"name": "exit_gate", "layers": [1, 3], "widths": [4]},
    "exit_recompute": {"name": "exit_gate", "layers": [1, 3], "widths": [4], "kv_rule": "recompute"},
    "early_exit": {"name": "early_exit", "layers": [1, 3], "thresholds": [0.14, 0.12]},
    "early_exit_cosine": {"name": "early_exit", "layers": [2, 3], "confidence": "cosine", "thresholds": 0.8},
    "early_exit_recompute": {
        "name": "early_exit",
        "layers": [2, 4],
        "confidence": "margin",
        "thresholds": 0.06,
        "kv_rule": "recompute",
    },
    "early_exit_classifier": {"name": "early_exit", "layers": [1, 3], "confidence": "classifier", "thresholds": 0.5},
    "hat": [{"name": "exit_gate", "layers": [2, 4]}, {"name": "ffn_router", "layers": [0, 1, 3]}],
    "branches_and_router": [
        {"name": "skip_set", "skip_mixers": [2], "skip_ffns": [1]},
        {"name": "layer_router", "always_keep": 1, "kv_rule": "omit"},
    ],
    "mixers_routed": {"name": "mixer_router"},
    "mixers_all": {"name": "mixer_router", "state": "all", "layers": [1, 3]},
}
COVERED = {spec["name"] for case in CASES.values() for spec in (case if isinstance(case, list) else [case])}
CASES |= {name: {"name": name} for name in METHODS if name not in COVERED}  # a new method: by its defaults
FULL_BUDGET: dict[str, dict[str, Any]] = {
    "skip_set": {"name": "skip_set"},
    "layer_router": {"name": "layer_router", "always_keep": 1, "threshold": float("-inf")},
    "router_omit": {"name": "layer_router", "always_keep": 1, "threshold": float("-inf"), "kv_rule": "omit"},
    "attention_project": {"name": "layer_router", "always_keep": 1, "threshold": float("-inf"), "branch": "mixer"},
    "attention_omit": {
        "name": "layer_router",
        "always_keep": 1,
        "threshold": float("-inf"),
        "branch": "mixer",
        "kv_rule": "omit",
        "reads": "sequential",
    },
    "random": {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [1.0] * 4},
    "stochastic_depth": {"name": "stochastic_depth", "max_probability": 0.9},
    "mixture_of_depths": {"name": "mixture_of_depths", "weigh": False, "threshold": float("-inf")},
    "exit_gate": {"name": "exit_gate", "threshold": float("-inf")},
    "exit_recompute": {"name": "exit_gate", "threshold": float("-inf"), "kv_rule": "recompute"},
    "ffn_router": {"name": "ffn_router"},
    "early_exit": {"name": "early_exit"},
    "mixers_routed": {"name": "mixer_router", "threshold": float("-inf")},
    "mixers_all": {"name": "mixer_router", "threshold": float("-inf"), "state": "all"},
}
TOLERANCE = 1e-5


def tolerance(family: str) -> float:
    """Recurrences by chunks round otherwise where chunks begin elsewhere."""
    return (2 if families.has_recurrence(family) else 1) * TOLERANCE


def test_every_method_has_a_case() -> None:
    """C21: a method that is registered has one at once, by its defaults."""
    specs = [spec for case in CASES.values() for spec in (case if isinstance(case, list) else [case])]
    assert {spec["name"] for spec in specs} == set(METHODS)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def refusal(model: PreTrainedModel, spec: Spec) -> str | None:
    """Part of the error where a family does not take a method."""
    names, specs = families.names_of(families.family_of(model)), spec if isinstance(spec, list) else [spec]
    branches = {"skip_mixers", "skip_ffns"}
    if names.whole_layers and any(
        part["name"] in ("ffn_router", "mixer_router") or part.get("branch") == "mixer" or branches & set(part)
        for part in specs
    ):
        return "can only be skipped as a whole"
    if names.shares_kv and any(
        part.get("kv_rule", "omit" if part["name"] == "mixture_of_depths" else None) == "omit" for part in specs
    ):
        return "later layers .* share them"
    return None


def attach(model: PreTrainedModel, spec: Spec, *, as_built: bool = False) -> AdaptedModel:
    """Attached, with a router whose decisions really differ between tokens; skips where the family refuses, as it
    should.
    """
    if why := refusal(model, spec):
        with pytest.raises(UserError, match=why):
            anydepth.attach(model, spec)
        pytest.skip(why)
    adapted = anydepth.attach(model, spec)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in [] if as_built else adapted.methods.named_parameters():
            if "out." in name or "direct." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name.startswith("exit_gate") and name.endswith("direct.bias"):
                parameter.fill_(3.0)  # most go on at each gate
        for name, buffer in [] if as_built else adapted.methods.named_buffers():
            if name.endswith("thresholds"):
                buffer.zero_()
    return adapted


@pytest.fixture
def adapted(model: PreTrainedModel, case: str) -> AdaptedModel:
    return attach(model, CASES[case])


def logits_of(adapted: AdaptedModel, ids: Tensor, **options: Any) -> Tensor:
    return adapted(input_ids=ids, use_cache=False, **options).logits


def assert_mixed(adapted: AdaptedModel) -> None:
    """Router cases decide differently for different tokens; else the checks below would prove little."""
    whole_sequences = getattr(adapted.attached[-1].config, "granularity", "token") == "sequence"
    if {"layer_router", "mixture_of_depths", "exit_gate", "early_exit"} & set(adapted.methods):
        share = adapted.last_trace.mixer_keep.float().mean((1, 2))
        assert ((share > 0.01) & (share < 0.99)).sum() >= (1 if whole_sequences else 2), share
    if "mixer_router" in adapted.methods:
        share = adapted.last_trace.other_keep.float().mean((1, 2))
        assert ((share > 0.05) & (share < 0.95)).sum() >= 2, share


def layers_of(model: PreTrainedModel, family: str) -> list[nn.Module]:
    return list(model.get_submodule(families.names_of(family).layers))


def others_of(adapted: AdaptedModel) -> Any:
    """The second mixers, where a method has some."""
    return adapted.methods["mixer_router"].mixers if "mixer_router" in adapted.methods else None


def weights_of(adapted: AdaptedModel) -> dict[int, Tensor] | None:
    """What layers are multiplied with, where a method weighs them."""
    return adapted.last_run.decisions.weights


# --- 1, 2: off and full budget are the backbone -----------------------------------------------------------


@torch.no_grad()
def test_disabled_and_detached_are_the_backbone(family: str, model: PreTrainedModel, case: str) -> None:
    ids, state = families.token_ids(), {name: value.clone() for name, value in model.state_dict().items()}
    before = {id(module): set(module.__dict__) for module in model.modules()}
    stock = model(ids).logits
    adapted = attach(model, CASES[case])
    adapted(ids)
    with adapted.disabled():
        assert torch.equal(adapted(ids).logits, stock)
    assert set(model.state_dict()) == set(state)
    assert anydepth.detach(adapted) is model
    assert torch.equal(model(ids).logits, stock)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(set(module.__dict__) == before[id(module)] for module in model.modules())
    attach(model, CASES[case])  # and it can be attached again


@torch.no_grad()
@pytest.mark.parametrize("spec", FULL_BUDGET)
def test_full_budget_is_the_backbone(family: str, model: PreTrainedModel, spec: str) -> None:
    ids = families.token_ids()
    padding = torch.ones_like(ids)
    padding[0, :9] = 0
    stock, stock_padded = model(ids).logits, model(ids, attention_mask=padding).logits
    adapted = attach(model, FULL_BUDGET[spec], as_built=True)
    assert torch.equal(adapted(ids).logits, stock)
    assert torch.equal(adapted(ids, attention_mask=padding).logits, stock_padded)
    with adapted.masked():
        assert torch.equal(adapted(ids).logits, stock)
    assert adapted.last_trace.mean_depth == 5


# --- 3: sparse = masked = reference, values and gradients -------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_sparse_and_masked_are_the_reference(family: str, adapted: AdaptedModel, case: str, padded: bool) -> None:
    ids = families.token_ids()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = mask[2, :20] = 0
    mask_option = {"attention_mask": mask} if padded else {}
    probe = torch.randn(3, 40, families.VOCABULARY, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    parameters = [
        *(part for part in adapted.backbone.model.parameters() if part.requires_grad),
        *(() if others_of(adapted) is None else others_of(adapted).parameters()),
    ]

    def value_and_gradients(logits: Tensor) -> tuple[Tensor, list[Tensor]]:
        real = logits * mask[..., None]
        gradients = torch.autograd.grad((real * probe).sum(), parameters, allow_unused=True)
        return real, [torch.zeros(1) if part is None else part.flatten() for part in gradients]

    sparse = value_and_gradients(logits_of(adapted, ids, **mask_option))
    trace, weights, others = adapted.last_trace, weights_of(adapted), others_of(adapted)
    assert_mixed(adapted)
    with adapted.masked():
        masked = value_and_gradients(logits_of(adapted, ids, **mask_option))
    assert torch.equal(adapted.last_trace.mixer_keep, trace.mixer_keep)
    model = anydepth.detach(adapted)
    if padded:  # a stock model computes its padding; what happens there is nobody's business
        keep = trace.mixer_keep | ~trace.token_mask
        trace = dataclasses.replace(trace, mixer_keep=keep, ffn_keep=trace.ffn_keep | ~trace.token_mask)
    replayed = replay(model, family, ids, trace, weights=weights, others=others, **mask_option)
    wanted = value_and_gradients(replayed)
    for values, gradients in (sparse, masked):
        assert relative_rms(values, wanted[0]) <= TOLERANCE
        for ours, theirs in zip(gradients, wanted[1], strict=True):
            if others is not None:  # the rule by chunks rounds otherwise than token by token, and sums cancel
                assert (ours - theirs).norm() <= 100 * TOLERANCE * theirs.norm() + 1e-4
            elif theirs.norm() > 1e-4:
                assert relative_rms(ours, theirs) <= 10 * tolerance(family)
            else:
                assert ours.norm() <= 1e-3


@torch.no_grad()
def test_sparse_is_masked_in_bfloat16(family: str, case: str) -> None:
    adapted = attach(families.build(family).to(torch.bfloat16), CASES[case])
    ids = families.token_ids()
    sparse, trace = logits_of(adapted, ids), adapted.last_trace
    with adapted.masked():
        masked = logits_of(adapted, ids)
    # A score near its threshold may round to its other side, so that the row goes on differently.
    same = (adapted.last_trace.mixer_keep == trace.mixer_keep).all(2).all(0)
    assert same.any()
    if families.has_experts(adapted.backbone.model):  # so may a router's, of single tokens
        errors = [
            relative_rms(*pair) for pair in zip(sparse[same].flatten(0, 1), masked[same].flatten(0, 1), strict=True)
        ]
        assert sorted(errors)[len(errors) // 2] <= 2e-2
    else:
        assert relative_rms(sparse[same], masked[same]) <= 2e-2


class FixedGates(Method):
    """Gates given from outside, with weights that are leaves of the graph."""

    Config = anydepth.SkipSet.Config
    name = "fixed_gates"
    kv_rule: Any = "project"
    branch: Any = "layer"

    def gates(self) -> list[GateSpec]:
        return [GateSpec((i,), self.branch, Given(i), 0.5, self.kv_rule) for i in range(5)]

    def samples(self, context: PassContext) -> bool:
        return True

    def sample(self, spec: GateSpec, scores: Tensor, hidden: Tensor, context: PassContext) -> Sample:
        given = self.given[spec.layers[0]]
        return Sample(given[None].detach() > 0.5, given[None])


class Given(Score):
    """Asked at each layer, although the answer does not depend on its state."""

    def __init__(self, layer_idx: int) -> None:
        self.reads_at = layer_idx

    def evaluate(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden[None, ..., 0]


@pytest.mark.parametrize("branch", ["layer", "mixer"])
@pytest.mark.parametrize("kv_rule", ["project", "omit"])
def test_gradient_of_the_gates(
    family: str, model: PreTrainedModel, kv_rule: str, branch: str, monkeypatch: Any
) -> None:
    """dL/dg is that of h' = g·f(h) + (1 − g)·h, or of h + g·mixer(h): for all tokens when masked, for kept ones when
    sparse.
    """
    monkeypatch.setitem(METHODS, "fixed_gates", FixedGates)
    monkeypatch.setattr(FixedGates, "Config", type("FixedConfig", (anydepth.SkipSet.Config,), {}))
    ids = families.token_ids()
    drawn = torch.rand(5, 3, 40, generator=torch.Generator().manual_seed(4)) < 0.6
    probe = torch.randn(3, 40, families.VOCABULARY, generator=torch.Generator().manual_seed(2))

    def given() -> list[Tensor]:
        return [part.float().requires_grad_() for part in drawn]

    if refusal(model, {"name": "fixed_gates", "branch": branch, "kv_rule": kv_rule}):
        pytest.skip("refused")
    adapted = anydepth.attach(model, FixedGates.Config())
    method: Any = adapted.methods["fixed_gates"]
    method.kv_rule, method.branch = kv_rule, branch
    gradients = {}
    for execution in ("masked", "sparse"):
        method.given = given()
        if execution == "masked":
            with adapted.masked():
                logits = logits_of(adapted, ids)
        else:
            logits = logits_of(adapted, ids)
        gradients[execution] = torch.stack(torch.autograd.grad((logits * probe).sum(), method.given))
    trace = adapted.last_trace
    model = anydepth.detach(adapted)
    leaves = given()
    given_as = {"layer": "weights", "mixer": "mixer_weights"}[branch]
    logits = replay(model, family, ids, trace, **{given_as: dict(enumerate(leaves))})
    wanted = torch.stack(torch.autograd.grad((logits * probe).sum(), leaves))
    recurrent = torch.tensor([families.is_recurrent(family, layer) for layer in layers_of(model, family)])
    if kv_rule == "project" or not recurrent.any():  # a recurrence that omits a token has no f(h) for it
        assert relative_rms(gradients["masked"], wanted) <= 10 * TOLERANCE
    recurrent = recurrent & (kv_rule == "project")
    kept = drawn & ~recurrent[:, None, None]
    assert relative_rms(gradients["sparse"] * kept, wanted * kept) <= 10 * TOLERANCE
    assert (gradients["sparse"] * (~drawn & ~recurrent[:, None, None])).abs().max() == 0


# --- 4, 5, 6: cache, padding, causality -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 63])
def test_cached_is_uncached(family: str, adapted: AdaptedModel, case: str, chunk: int) -> None:
    ids = families.token_ids(length=70 if chunk == 63 else 30)
    wanted = logits_of(adapted, ids)
    trace = adapted.last_trace
    cache = adapted.new_cache()
    parts = [adapted(input_ids=part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
    assert torch.equal(adapted.last_trace.mixer_keep, trace.mixer_keep)
    assert torch.equal(adapted.last_trace.ffn_keep, trace.ffn_keep)
    assert relative_rms(torch.cat(parts, 1), wanted) <= (
        5 * TOLERANCE if families.has_recurrence(family) else TOLERANCE
    )


@torch.no_grad()
def test_masked_cached_is_uncached(family: str, adapted: AdaptedModel, case: str) -> None:
    ids = families.token_ids(length=30)
    wanted = logits_of(adapted, ids)
    cache = adapted.new_cache()
    with adapted.masked():
        parts = [adapted(input_ids=part, past_key_values=cache).logits for part in ids.split([9, 1, 20], dim=1)]
    assert relative_rms(torch.cat(parts, 1), wanted) <= (
        5 * TOLERANCE if families.has_recurrence(family) else TOLERANCE
    )


@torch.no_grad()
def test_rewound_cache_continues_as_if_never_forward(family: str, adapted: AdaptedModel, case: str) -> None:
    ids, other = families.token_ids(length=30), families.token_ids(length=30, seed=8)
    wanted = logits_of(adapted, ids)[:, 17:]
    cache = adapted.new_cache()
    adapted(input_ids=ids[:, :17], past_key_values=cache)
    for part in other[:, 17:26].split([1, 1, 7], dim=1):
        adapted(input_ids=part, past_key_values=cache)
    if families.has_recurrence(family) or "mixer_router" in adapted.methods:
        with pytest.raises(RuntimeError, match="recurrent (layer|mixer)'s state cannot be rewound"):
            cache.crop(-9)
        return
    cache.crop(-9)
    ours = torch.cat(
        [adapted(input_ids=part, past_key_values=cache).logits for part in ids[:, 17:].split([1, 12], 1)], 1
    )
    assert relative_rms(ours, wanted) <= TOLERANCE


# --- 13: engines agree ------------------------------------------------------------------------------------


@torch.no_grad()
def test_gates_that_do_not_read_the_state(
    model: PreTrainedModel, adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a method says that it does not look at the state, any state gives the same gates."""
    ids = families.token_ids()
    wanted = logits_of(adapted, ids)
    trace = adapted.last_trace
    monkeypatch.setattr(Decisions, "gate", blindfolded(Decisions.gate))
    assert torch.equal(logits_of(adapted, ids), wanted)
    assert torch.equal(adapted.last_trace.mixer_keep, trace.mixer_keep)


def blindfolded(own: Callable[..., Any]) -> Callable[..., Any]:
    """Decide with NaN where the decisions say that they do not look at the state."""

    def gate(self: Decisions, branch: Any, layer_idx: int, hidden: Tensor) -> Any:
        seen = hidden if self.reads(layer_idx) else torch.full_like(hidden, float("nan"))
        return own(self, branch, layer_idx, seen)

    return gate


@torch.no_grad()
@pytest.mark.parametrize("how", ["long parts by operators", "decided in kernels", "asked layer by layer"])
def test_fast_engine_is_the_model(
    family: str, adapted: AdaptedModel, case: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not families.runs_fast(family) or "mixer_router" in adapted.methods:
        with pytest.raises(UserError, match="fast engine (does not run|lacks)"):
            FastEngine(adapted)
        return
    if how == "long parts by operators":  # the longest part below is then one of many tokens, the others are of few
        monkeypatch.setattr("anydepth.engine.backends.cpu.backend.MAX_TOKENS", 16)
    if how == "asked layer by layer":
        monkeypatch.setattr("anydepth.engine.backends.cpu.backend.KernelBackend.fused", lambda *_: None)
    assert_engine_is_the_model(FastEngine(adapted), adapted)


@torch.no_grad()
@pytest.mark.parametrize("case", ["skip_branches", "router_project", "router_omit"])
def test_fast_engine_without_kernels_is_the_model(family: str, adapted: AdaptedModel, case: str) -> None:
    if families.runs_fast(family):
        assert_engine_is_the_model(FastEngine(adapted, native=False), adapted)


def assert_engine_is_the_model(engine: FastEngine, adapted: AdaptedModel) -> None:
    """Logits of prefill, of single tokens and of several behind a past; then tokens and trace of a padded batch."""
    ids = families.token_ids()
    wanted, before = logits_of(adapted, ids[:1]), adapted.last_trace
    cache, plan = engine.model.new_cache(2), Plan.of(adapted.active_methods)
    cache.take_slot()
    slot = cache.take_slot()
    parts = ids[:1].split([25, 1, 7, 6, 1], dim=1)
    hidden = [engine.model.forward(part, [slot], cache, plan)[0] for part in parts]
    assert relative_rms(engine.model.head(torch.cat(hidden, 1)), wanted) <= TOLERANCE
    cache.rewind(slot, 17)
    hidden = [engine.model.forward(ids[:1, 17:], [slot], cache, plan)[0]]
    assert relative_rms(engine.model.head(torch.cat(hidden, 1)), wanted[:, 17:]) <= TOLERANCE
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[2, :23] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    tokens = adapted.generate(input_ids=ids * mask, **options)
    trace = adapted.last_trace
    assert torch.equal(engine.generate(input_ids=ids * mask, **options), tokens)
    ours = adapted.last_trace
    assert torch.equal(ours.token_mask, trace.token_mask) and before.num_tokens == 40
    for name in ("mixer_keep", "ffn_keep"):
        assert torch.equal(getattr(ours, name) & ours.token_mask, getattr(trace, name) & trace.token_mask), name


@torch.no_grad()
def test_padded_batch_is_its_singles(family: str, adapted: AdaptedModel, case: str) -> None:
    ids, lengths = families.token_ids(), (40, 31, 17)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 40 - length :] = 1
    # GPT-2 counts absolute positions from the first column unless it is told, as generate does.
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = logits_of(adapted, ids * mask, attention_mask=mask, position_ids=positions)
    trace = adapted.last_trace
    assert trace.num_tokens == sum(lengths)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = adapted.generate(input_ids=ids * mask, attention_mask=mask, **options)[:, 40:]
    for row, length in enumerate(lengths):
        single_ids = ids[row : row + 1, 40 - length :]
        single = logits_of(adapted, single_ids)
        assert torch.equal(adapted.last_trace.mixer_keep[:, 0], trace.mixer_keep[:, row, 40 - length :])
        assert relative_rms(batch[row, 40 - length :], single[0]) <= 5 * tolerance(family)
        alone = adapted.generate(input_ids=single_ids, attention_mask=torch.ones_like(single_ids), **options)
        assert torch.equal(alone[0, length:], generated[row])


@torch.no_grad()
def test_later_tokens_and_other_rows_change_nothing(family: str, adapted: AdaptedModel, case: str) -> None:
    ids = families.token_ids()
    wanted = logits_of(adapted, ids)
    trace = adapted.last_trace
    changed = ids.clone()
    changed[0, 25:] = (changed[0, 25:] + 13) % 90 + 3
    changed[1] = (changed[1] + 29) % 90 + 3
    ours = logits_of(adapted, changed)
    for row, length in ((0, 25), (2, 40)):
        assert torch.equal(adapted.last_trace.mixer_keep[:, row, :length], trace.mixer_keep[:, row, :length])
        assert relative_rms(ours[row, :length], wanted[row, :length]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_documents_of_a_batch_are_the_documents_alone(
    family: str, adapted: AdaptedModel, case: str, execution: str
) -> None:
    """C29. Padded on the right, as documents are in training and eval."""
    adapted.eval()
    ids, lengths = families.token_ids(length=23), (23, 9, 16)
    mask = torch.stack([torch.arange(23) < length for length in lengths]).long()
    with adapted.masked() if execution == "masked" else contextlib.nullcontext():
        batch = logits_of(adapted, ids, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = logits_of(adapted, ids[row : row + 1, :length])
            assert relative_rms(batch[row : row + 1, :length], alone) <= TOLERANCE


# --- 8 … 12 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("kv_rule", ["project", "omit"])
def test_every_gate_gets_a_gradient(family: str, model: PreTrainedModel, execution: str, kv_rule: str) -> None:
    spec = {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "kv_rule": kv_rule}
    model.requires_grad_(False)
    adapted = attach(model, spec, as_built=True).train()
    ids = families.token_ids()
    if execution == "masked":
        with adapted.masked():
            loss = adapted(input_ids=ids, labels=ids).loss
    else:
        loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    for name, parameter in adapted.methods.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    auxiliary = adapted.auxiliary_losses()
    assert set(auxiliary) == {"layer_router/target"}
    sum(auxiliary.values()).backward()
    assert all(parameter.grad is None for parameter in adapted.backbone.model.parameters())


def uncounted_recurrence(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Hides recurrences from torch's counter, which sees chunked, padded algorithms.

    The returned function gives the recurrences' own FLOPs since it was asked last. For each token the gated delta rule
    reads, writes and queries a (dk, dv) state per head, Mamba-2 writes and queries one, and all channels are convolved.
    """
    flops = taps = 0

    def hide(module: Any, name: str, per_token: Callable[..., tuple[int, int]] | None) -> None:
        own = getattr(module, name, None)

        def hidden(*args: Any, **kwargs: Any) -> Any:
            nonlocal flops, taps
            if per_token is None:
                taps = next(part for part in args[1:] if part.dim() == 2).numel()
            else:
                tokens, state = per_token(*args)
                flops += tokens * 2 * (state + taps)
            with _disable_current_modes():
                return own(*args, **kwargs)

        if own is not None:
            monkeypatch.setattr(module, name, hidden)

    def delta_rule(_: Tensor, keys: Tensor, values: Tensor, *__: Any) -> tuple[int, int]:
        (rows, length, _, dk), (heads, dv) = keys.shape, values.shape[2:]
        return rows * length, 3 * heads * dk * dv

    def scan(inputs: Tensor, _: Tensor, __: Tensor, queries: Tensor, *___: Any) -> tuple[int, int]:
        rows, length, heads, width = inputs.shape
        return rows * length, 2 * heads * width * queries.shape[-1]

    def update(_: Tensor, inputs: Tensor, *args: Tensor) -> tuple[int, int]:
        rows, heads, width = inputs.shape
        return rows, 2 * heads * width * args[2].shape[-1]

    def short_convolution(taps: int, hidden: Tensor) -> None:  # one without a recurrence after it
        nonlocal flops
        flops += hidden.shape[0] * hidden.shape[1] * 2 * taps

    for part in model.modules():
        if type(part).__name__.endswith("ShortConv"):
            taps_of_layer = part.conv.weight.numel()
            part.in_proj.register_forward_pre_hook(lambda _, args, taps=taps_of_layer: short_convolution(taps, args[0]))

    for module in {sys.modules[type(part).__module__] for part in model.modules()} | {modeling_qwen3_next}:
        for name in ("causal_conv1d_fn", "causal_conv1d_update"):
            hide(module, name, None)
        for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            hide(module, name, delta_rule)
        hide(module, "mamba2_chunk_scan", scan)
        hide(module, "mamba2_selective_state_update", update)

    def since() -> int:
        nonlocal flops
        found, flops = flops, 0
        return found

    return since


@torch.no_grad()
def test_cost_is_what_torch_counts(family: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As integers, prefill and cached decoding, whole batches without padding."""
    adapted = attach(families.build(family, attention="eager"), CASES[case])  # torch does not count sdpa on CPU
    adapted.config._experts_implementation = "eager"  # nor grouped products
    recurrence = uncounted_recurrence(adapted.backbone.model, monkeypatch)
    ids = families.token_ids()
    with FlopCounterMode(display=False) as counter:
        logits_of(adapted, ids)
    measured = counter.get_total_flops() + recurrence()
    counted = cost.flops(adapted.backbone, adapted.last_trace)
    assert counted.total == measured
    with FlopCounterMode(display=False) as counter:
        adapted.generate(input_ids=ids[:, :12], max_new_tokens=9, min_new_tokens=9, do_sample=False)
    generated = cost.flops(adapted.backbone, adapted.last_trace)
    assert generated.total == counter.get_total_flops() + recurrence()
    with adapted.disabled(), FlopCounterMode(display=False) as counter:
        logits_of(adapted, ids)
    assert counted.full_depth == counter.get_total_flops() + recurrence()
    # Those run what one needs for all; a linear mixer costs more than attention over so few tokens.
    if not case.startswith(("stochastic_depth", "prompt_exit", "exit_recompute", "early_exit_recompute", "mixers")):
        assert counted.layers < counted.full_depth_layers


@pytest.mark.parametrize("spec", [CASES["router_project"], CASES["stochastic_depth"]])
def test_same_seed_same_bits(family: str, spec: dict[str, Any]) -> None:
    ids = families.token_ids()

    def train_logits(seed: int) -> Tensor:
        adapted = anydepth.attach(families.build(family), {**spec, "seed": seed}).train()
        return logits_of(adapted, ids)

    assert torch.equal(train_logits(0), train_logits(0))
    assert not torch.equal(train_logits(0), train_logits(1))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "layer_ruoter"}, "did you mean 'layer_router'"),
    ({"name": "layer_router", "treshold": 1}, "did you mean 'threshold'"),
    ({"name": "layer_router", "kv_rule": "keep"}, "keep"),
    ({"name": "layer_router", "kv_rule": "recompute"}, "recompute"),
    ({"name": "mixture_of_depths", "kv_rule": "recompute"}, "recompute"),
    ({"name": "layer_router", "always_keep": 5}, "5"),
    ({"name": "layer_router", "always_keep": 0}, "0"),
    ({"name": "layer_router", "router": "random"}, "rates"),
    ({"name": "layer_router", "router": "random", "rates": [0.5]}, "4 layers are routed|1 layers"),
    ({"name": "layer_router", "router": "random", "rates": [1.5] * 4}, "1.5"),
    ({"name": "layer_router", "rates": [0.5] * 4}, "random"),
    ({"name": "layer_router", "threshold": float("nan")}, "nan"),
    ({"name": "layer_router", "target_skip": 1.0}, "1.0"),
    ({"name": "layer_router", "branch": "ffn"}, "ffn"),
    ({"name": "layer_router", "reads": "sequential", "input": "embeddings"}, "input=embeddings"),
    ({"name": "layer_router", "reads": "sequential", "router": "random", "rates": [0.5] * 4}, "router=random"),
    ({"name": "layer_router", "initial_skip_layers": [9]}, "9"),
    ({"name": "layer_router", "backward_temperature": 0}, "0"),
    ({"name": "skip_set", "skip_layers": [5]}, "5"),
    ({"name": "skip_set", "skip_layers": [-1]}, "-1"),
    ({"name": "skip_set", "skip_mixers": [2, 2]}, "twice"),
    ({"name": "skip_set", "skip_layers": "all"}, "all"),
    ({"name": "stochastic_depth", "max_probability": 1.5}, "1.5"),
    ({"name": "stochastic_depth", "schedule": "cubic"}, "cubic"),
    ({"name": "stochastic_depth", "per": "token"}, "token"),
    ({"name": "mixer_router", "layers": [0, 2]}, "layer 0"),
    ({"name": "mixer_router", "layers": [7]}, "7"),
    ({"name": "mixer_router", "target": 1.5}, "1.5"),
]


@pytest.mark.parametrize(("spec", "named"), BAD)
def test_bad_config_is_one_line_that_names_the_value(spec: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        anydepth.attach(families.build("llama"), {"always_keep": 1, **spec} if "rates" in spec else spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", [*CASES.values(), *FULL_BUDGET.values()], ids=[*CASES, *FULL_BUDGET])
def test_configs_say_whether_there_are_weights_to_train(spec: Spec) -> None:
    """C16."""
    adapted = anydepth.attach(families.build("llama"), spec)
    for method in adapted.active_methods:
        assert method.has_weights(method.config) == any(part.requires_grad for part in method.parameters())


# --- faults of earlier code that no check above names -----------------------------------------------------


@torch.no_grad()
def test_noise_is_off_at_evaluation() -> None:
    adapted = attach(families.build("llama"), CASES["router_project"])
    ids = families.token_ids()
    assert torch.equal(logits_of(adapted, ids), logits_of(adapted, ids))
    adapted.train()
    assert not torch.equal(logits_of(adapted, ids), logits_of(adapted, ids))


@torch.no_grad()
def test_padding_is_never_counted() -> None:
    adapted = attach(families.build("llama"), CASES["router_project"])
    ids, mask = families.token_ids(), torch.ones(3, 40, dtype=torch.long)
    mask[:, :30] = 0
    logits_of(adapted, ids, attention_mask=mask)
    padded = adapted.last_trace
    logits_of(adapted, ids[:, 30:])
    assert padded.num_tokens == 30
    assert padded.mean_depth == pytest.approx(adapted.last_trace.mean_depth)
    assert padded.executed_share() == adapted.last_trace.executed_share()


@torch.no_grad()
def test_a_foreign_cache_is_refused() -> None:
    adapted = attach(families.build("llama"), CASES["router_omit"])
    with pytest.raises(UserError, match="new_cache"):
        adapted(input_ids=families.token_ids(), past_key_values=DynamicCache())


@torch.no_grad()
def test_gated_layers_are_those_that_have_gates(case: str) -> None:
    """Diagnostics look at the layers that a method names; a skip set names none, since its choice is fixed."""
    adapted = attach(families.build("llama"), CASES[case])
    logits_of(adapted, families.token_ids())
    record = adapted.records[0]
    named = {layer_idx for method in adapted.active_methods for layer_idx in method.gated_layers}
    gated = set() if set(adapted.methods) == {"skip_set"} else set(record.mixer_keep) | set(record.ffn_keep)
    assert named == gated


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_is_greedy_over_the_uncached_model(case: str, num_beams: int) -> None:
    """transformers' own generate, beams included, on our cache."""
    adapted = attach(families.build("llama"), CASES[case])
    ids = families.token_ids()[:, :12]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": num_beams}
    cached = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    if case == "prompt_exit":  # a forward without cache knows no prompt
        assert adapted.last_trace.mean_depth < 5
        return
    uncached = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, uncached)
