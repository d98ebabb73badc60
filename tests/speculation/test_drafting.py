"""Lossless decoding: the tokens of full depth, with every drafter and every option of `generate`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
import families
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler
from anydepth.decoding.scheduler import Scheduler
from anydepth.engine.backends.cpu.native import same_bits_until
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.speculation import drafting as policy
from drafts import ALONE, DRAFTERS, both, drafting, prompts
from tiny import byte_tokenizer, tiny_llama

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40},
    "processed": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 9},
    "penalised samples": {
        "do_sample": True,
        "temperature": 1.2,
        "repetition_penalty": 1.2,
        "bad_words_ids": [[7], [9, 3]],
    },
}


@pytest.fixture(params=DRAFTERS)
def drafter(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_gives_the_tokens_of_full_depth(drafter: str, options: str, dtype: torch.dtype) -> None:
    """Bitwise the same logits, so in bfloat16 too there are no ties to be decided otherwise."""
    engine = drafting("fast", drafter, tiny_llama().to(dtype))
    for num_rows, seed in itertools.product((1, 4), (0, 1)):
        wanted, ours = both(engine, prompts(num_rows, seed), **OPTIONS[options])
        assert torch.equal(wanted, ours)
    if not DRAFTERS[drafter][0].get("adaptive", True):
        assert engine.draft_counts is not None and engine.draft_counts.num_drafted
        assert engine.draft_counts.acceptance_rate < 1  # not all was right


def refusal(family: str, name: str) -> str | None:
    """Part of the error where a family does not take a kind of drafting."""
    names = families.names_of(family)
    if names.recurrent:
        return "recurrent layer's state cannot"
    if names.whole_layers and name in ("skip set", "mixer router"):
        return "can only be skipped as a whole"
    return "later layers .* share them" if names.shares_kv and name == "router, omit" else None


@pytest.mark.parametrize(
    "name",
    [
        "lookup",
        "first layers",
        "skip set",
        "router, omit",
        "mixer router",
        "exits",
        "exits, run later",
        "searched",
        "searched by states",
        "searched by time",
    ],
)
def test_every_family_gives_the_tokens_of_full_depth(family: str, name: str) -> None:
    batch = prompts(2)
    if why := refusal(family, name):
        with pytest.raises(UserError, match=why):
            drafting("hf", name, families.build(family))
        return
    for options in ("greedy", "sampled"):
        wanted, ours = both(drafting("hf", name, families.build(family)), batch, **OPTIONS[options])
        assert torch.equal(wanted, ours)
    if families.runs_fast(family):
        wanted, ours = both(drafting("fast", name, families.build(family)), batch, **OPTIONS["greedy"])
        assert torch.equal(wanted, ours)


def test_a_drafter_equal_to_the_model_is_always_right() -> None:
    for options in OPTIONS.values():
        engine = drafting("fast", (ALONE, [{"name": "skip_set"}]))
        both(engine, prompts(3), **options, eos_token_id=None)
        counts = engine.draft_counts
        assert counts is not None
        assert counts.acceptance_rate == 1 and counts.num_drafted["pruned model"] >= 3 * 23
        assert counts.mean_acceptance_length > 4


def test_no_token_runs_the_first_layers_twice() -> None:
    engine = drafting("fast", "first layers")
    assert engine.model is not None
    own, ran = engine.model.run_to_stops, [0] * 6

    def counted(states: Any, slots: Any, cache: Any, first: int, stops: Any) -> Any:
        for layer_idx in range(first, stops[-1]):
            ran[layer_idx] += sum(len(part) for part in states)
        return own(states, slots, cache, first, stops)

    engine.model.run_to_stops = counted  # type: ignore[method-assign]
    engine.generate(**prompts(1), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    counts = engine.draft_counts
    assert counts is not None
    drafted = sum(counts.num_drafted.values())
    assert ran == [21 + counts.num_verified + drafted] * 6
    assert counts.num_taken == 29 and drafted > counts.num_accepted["first 3 layers"]


@pytest.mark.parametrize("name", ["several exits", "everything"])
def test_dropped_draft_tokens_leave_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second draft token is dropped after the first layers have run for it."""
    asked = itertools.count()
    monkeypatch.setattr("anydepth.speculation.draft_policy.StepTimes.repays", lambda *_: next(asked) % 2)
    monkeypatch.setattr("anydepth.speculation.draft_policy.StepTimes.pays", lambda *_, **__: True)
    engines = [drafting(path, name) for path in (("fast", "hf") if name == "several exits" else ("fast",))]
    for engine, num_rows in itertools.product(engines, (1, 4)):
        wanted, ours = both(engine, prompts(num_rows), do_sample=False, eos_token_id=None)
        assert torch.equal(wanted, ours)
    assert next(asked) > 20 and engines[0].draft_counts.num_drafted  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_rows_that_draft_by_exits_and_by_a_pruned_model_in_one_round(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification continues after the exits of some rows, and must not see the K/V that pruned drafts left."""
    engine = drafting(path, ({**ALONE, "exit_layers": [2]}, [{"name": "skip_set", "skip_layers": [3]}]))
    monkeypatch.setattr(
        policy.DraftedSteps, "_drafter_for", lambda _, request, drafters: (drafters[request.row % 2], 1.0)
    )
    wanted, ours = both(engine, prompts(4), do_sample=False, eos_token_id=None)
    assert torch.equal(wanted, ours)
    assert engine.draft_counts is not None and set(engine.draft_counts.num_drafted) == {
        "first 2 layers",
        "pruned model",
    }


def test_stop_strings_and_end_tokens_inside_a_draft() -> None:
    spec = (ALONE, [{"name": "skip_set"}])  # drafts far, always right
    engine, tokenizer, batch = drafting("fast", spec), byte_tokenizer(), prompts(3)
    with engine.adapted.disabled():
        whole = engine.generate(**batch, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    ends = [int(whole[0, 21 + 6]), int(whole[2, 21 + 17])]
    said = tokenizer.decode(whole[1, 21:])
    stop = next(letter for letter in said if letter.isascii() and letter.isprintable())
    at = said.index(stop)
    for options in ({"eos_token_id": ends}, {"stop_strings": [stop], "tokenizer": tokenizer, "eos_token_id": None}):
        for runner in (engine, drafting("hf", spec)):
            wanted, ours = both(runner, batch, do_sample=False, max_new_tokens=40, **options)
            assert torch.equal(wanted, ours)
            if "stop_strings" in options:
                alone = {key: part[1:2] for key, part in batch.items()}
                first = runner.generate(**alone, do_sample=False, max_new_tokens=40, pad_token_id=0, **options)
                assert tokenizer.decode(first[0, 21:]).endswith(stop) and first.shape[1] < whole.shape[1]
    assert at < 40


def test_rows_near_a_change_of_bits_limit_all_drafts() -> None:
    """A batch has one row shortly before the length at which attention is chunked otherwise, and one far from it."""
    model = tiny_llama(max_position_embeddings=400).to(torch.bfloat16)
    engine = drafting("fast", ({**ALONE, "max_draft": 8}, [{"name": "skip_set", "skip_layers": [2]}]), model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (2, 250), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :130] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    wanted, ours = both(engine, batch, do_sample=False, max_new_tokens=60, eos_token_id=None)
    assert torch.equal(wanted, ours)


@pytest.mark.parametrize("path", ["hf", "fast"])
def test_a_failed_draft_leaves_the_model_as_it_was(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = drafting(path, "first layers")
    wanted, ours = both(runner, prompts(2), do_sample=False)
    assert torch.equal(wanted, ours)
    own, calls = Sampler.draft, itertools.count()

    def fails(self: Any, *arguments: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return own(self, *arguments)

    monkeypatch.setattr(Sampler, "draft", fails)
    with pytest.raises(KeyboardInterrupt):
        runner.generate(**prompts(2), max_new_tokens=30, do_sample=False, pad_token_id=0)
    monkeypatch.undo()
    again, ours = both(runner, prompts(2), do_sample=False)
    assert torch.equal(again, wanted) and torch.equal(ours, wanted)
    with runner.adapted.disabled():
        assert torch.isfinite(runner.adapted(prompts(1)["input_ids"]).logits).all()


def joint(engine: Engine, num_batches: int, **options: Any) -> Tensor:
    """Counts of the 3 tokens that follow a prompt, sampled: (V, V, V) of a vocabulary of 8."""
    ids = torch.tensor([[3, 5, 3, 5, 3]]).expand(12, -1)
    counts = torch.zeros(8, 8, 8)
    for seed in range(num_batches):
        torch.manual_seed(seed)
        rows = engine.generate(
            input_ids=ids, max_new_tokens=3, do_sample=True, eos_token_id=None, pad_token_id=0, **options
        )[:, 5:]
        for row in rows.tolist():
            counts[tuple(row)] += 1
    return counts


def exact(adapted: AdaptedModel, temperature: float, top_p: float) -> Tensor:
    """The same as probabilities, by enumeration."""
    from transformers import TopPLogitsWarper

    shares = torch.ones(8, 8, 8)
    warp = TopPLogitsWarper(top_p)
    with adapted.disabled():
        for first, second in itertools.product(range(8), repeat=2):
            ids: Any = torch.tensor([[3, 5, 3, 5, 3, first, second]])
            logits = adapted(ids).logits[0, 4:].float() / temperature
            steps = torch.stack([warp(ids, part[None])[0].softmax(-1) for part in logits])
            shares[first, second] = steps[0, first] * steps[1, second] * steps[2]
    return shares


def chi_square_p(counts: Tensor, shares: Tensor) -> float:
    """Of the hypothesis that counts were drawn from shares; rare cells together."""
    from math import erfc, sqrt

    wanted = shares.flatten() * counts.sum()
    seen, rare = counts.flatten(), wanted < 5
    wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    usable = wanted > 1
    statistic = float(((seen - wanted)[usable] ** 2 / wanted[usable]).sum())
    freedom = int(usable.sum()) - 1
    # Wilson and Hilferty: the cube root is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / sqrt(2 / (9 * freedom))
    return 0.5 * erfc(z / sqrt(2))


@torch.no_grad()
def test_sampled_tokens_have_the_joint_distribution_of_full_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test rejects a drafter whose tokens are accepted without verification."""
    model = tiny_llama(vocab_size=8)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    engine = drafting("fast", ({**ALONE, "exit_layers": [3]}, []), model)
    adapted, options = engine.adapted, {"temperature": 0.9, "top_p": 0.9, "top_k": 0}
    shares = exact(adapted, options["temperature"], options["top_p"])
    assert chi_square_p(joint(engine, 330, **options), shares) > 1e-3
    assert engine.draft_counts is not None and 0.1 < engine.draft_counts.acceptance_rate < 0.95
    own = policy.DraftedSteps._take

    def credulous(self: Any, requests: Any, logits: Any) -> Any:
        for row, part in zip(requests, logits, strict=True):
            for place, token in enumerate(row.draft):
                part[place] = torch.full_like(part[place], -1e4)
                part[place, token] = 0.0
        return own(self, requests, logits)

    monkeypatch.setattr(policy.DraftedSteps, "_take", credulous)
    assert chi_square_p(joint(engine, 330, **options), shares) < 1e-6


# --- bits, generators and failures ------------------------------------------------------------------------------


def test_many_rows_still_have_the_bits_of_full_depth() -> None:
    """A verification of all drafts of many rows would be a pass of many tokens, which other operators run."""
    spec = ({**ALONE, "max_draft": 8}, [{"name": "skip_set", "skip_layers": [2]}])
    engine = drafting("fast", spec, tiny_llama().to(torch.bfloat16))
    for num_rows in (8, 24):
        wanted, ours = both(engine, prompts(num_rows), do_sample=False)
        assert torch.equal(wanted, ours)


def test_passes_do_not_span_a_change_of_attention_chunks() -> None:
    """Passes end before the lengths at which the chunks double, since the bits change there."""
    ids = torch.randint(3, 100, (1, 100), generator=torch.Generator().manual_seed(0)).repeat(1, 5)[:, :490]
    model = tiny_llama(max_position_embeddings=700).to(torch.bfloat16)
    engine = drafting("fast", ({**ALONE, "max_draft": 8}, [{"name": "skip_set", "skip_layers": [2]}]), model)
    for start in range(0, 60, 7):
        batch = {"input_ids": ids[:, start:], "attention_mask": torch.ones_like(ids[:, start:])}
        wanted, ours = both(engine, batch, do_sample=False, max_new_tokens=90, eos_token_id=None)
        assert torch.equal(wanted, ours)
    assert same_bits_until(1) == same_bits_until(512) == 512 and same_bits_until(513) == 1024


@pytest.mark.parametrize("native", [True, False])
def test_drafts_leave_space_for_the_longest_sequence(native: bool) -> None:
    """Two sequences of at most 40 tokens, one of them near its end: the other's long drafts must not need more."""
    adapted = anydepth.attach(tiny_llama(), []).eval()
    draft = anydepth.Draft(adapted, {**ALONE, "exit_layers": [3], "max_draft": 8})
    engine = FastEngine(adapted, native=native, draft=draft)
    prompts_of_both = [[5, 6, 7] * 12, [5, 6, 7] * 3]
    wanted = [Request.greedy(ids, 40 - len(ids), full_depth=True) for ids in prompts_of_both]
    drafted = [Request.greedy(ids, 40 - len(ids), full_depth=True, is_drafted=True) for ids in prompts_of_both]
    for requests in (wanted, drafted):
        Scheduler(engine, max_requests=2, max_tokens=80).run(requests)
    assert [one.output for one in drafted] == [one.output for one in wanted]
    assert sum(sum(one.counts.num_drafted.values()) for one in drafted) > 0


def test_the_generator_state_is_that_of_full_depth() -> None:
    """Drafts draw noise for steps that are never taken, which must not change a second generation from one seed."""
    engine, options = drafting("fast", "first layers"), {"do_sample": True, "max_new_tokens": 11, "pad_token_id": 0}
    texts = []
    for full_depth in (True, False):
        torch.manual_seed(3)
        for _ in range(2):
            if full_depth:
                with engine.adapted.disabled():
                    texts.append(engine.generate(**prompts(2), **options))
            else:
                texts.append(engine.generate(**prompts(2), **options))
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])


def test_no_token_of_a_reduced_vocabulary_is_allowed() -> None:
    engine = drafting("fast", "first layers, few tokens")

    def allowed(_: int, ids: Tensor) -> list[int]:
        return [150, 160, 170 + len(ids) % 7]

    allowed.is_stateless = True  # type: ignore[attr-defined]
    options: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed}
    for sampling in (False, True):
        wanted, ours = both(engine, prompts(2), do_sample=sampling, **options)
        assert torch.equal(wanted, ours)


def test_a_failed_prompt_raises() -> None:
    engine = drafting("fast", "everything")
    assert engine.model is not None

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    engine.model.run_to_stops = fails  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(**prompts(2), max_new_tokens=4, do_sample=False, pad_token_id=0)


def of_growing_rotary(kind: str) -> Any:
    """A model whose rotary embedding changes at 24 tokens."""
    config = families.CONFIGS["phi3" if kind == "longrope" else "llama"]()
    if kind == "longrope":
        config.original_max_position_embeddings = 24
        scaling = {
            "short_factor": [1.0] * 4,
            "long_factor": [3.0, 5.0, 7.0, 9.0],
            "original_max_position_embeddings": 24,
        }
        config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0, **scaling}
    else:
        config.max_position_embeddings = 24
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    family = config.model_type
    before, families.CONFIGS[family] = families.CONFIGS[family], lambda: config
    try:
        return families.build(family)
    finally:
        families.CONFIGS[family] = before


@torch.no_grad()
@pytest.mark.parametrize("drafter", ["lookup", "first layers", "router, project"])
@pytest.mark.parametrize("length", [12, 24, 25])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_embeddings_that_change_with_the_length(kind: str, length: int, drafter: str) -> None:
    """C4: a pass never spans the change; the right tokens are those of stock transformers."""
    ids = families.token_ids(1, length)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = of_growing_rotary(kind).generate(ids, **options)
    engine = drafting("hf", drafter, of_growing_rotary(kind))
    assert torch.equal(engine.generate(ids, **options), wanted)


@torch.no_grad()
@pytest.mark.parametrize("padding", [[8], [0, 8], [0, 0]])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_batches_that_cross_the_change_of_rotary_embeddings_are_refused(kind: str, padding: list[int]) -> None:
    """C4, rows: the change comes for all rows at once, padding included, and rows that draft run alone."""
    ids = families.token_ids(len(padding), 12)
    mask = torch.stack([torch.arange(12) >= count for count in padding]).long()
    engine = drafting("hf", "first layers", of_growing_rotary(kind))
    options: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(UserError, match="changes at 24 tokens") as caught:
        engine.generate(ids, max_new_tokens=24, **options)
    assert "\n" not in str(caught.value)
    wanted = of_growing_rotary(kind).generate(ids, max_new_tokens=10, **options)
    assert torch.equal(engine.generate(ids, max_new_tokens=10, **options), wanted)  # not reached


@torch.no_grad()
def test_skipping_across_the_change_of_rotary_embeddings() -> None:
    """C4, without drafts: our cache is read again where the model requires it, too."""
    ids = families.token_ids(1, 20)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    shallow = of_growing_rotary("longrope")
    del shallow.model.layers[3]
    for number, layer in enumerate(shallow.model.layers):
        layer.self_attn.layer_idx = number
    shallow.config.num_hidden_layers = 4
    adapted = anydepth.attach(of_growing_rotary("longrope"), {"name": "skip_set", "skip_layers": [3]})
    assert torch.equal(adapted.generate(ids, **options), shallow.generate(ids, **options))
