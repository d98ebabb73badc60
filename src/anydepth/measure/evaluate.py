"""Perplexity and agreement with routing on, next to the base model, over real tokens only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, HFEngine
from anydepth.errors import UserError
from anydepth.gating import cost
from anydepth.gating.plan import Plan
from anydepth.gating.trace import Trace
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.samples import Track, perplexity_of
from anydepth.methods._base.calibration import comparing
from anydepth.models.backbone import Backbone
from anydepth.models.load import NATIVE
from anydepth.statistics import mean_of_sums
from anydepth.training.checkpoint import has_adapter
from anydepth.training.data import rows_of
from anydepth.training.diagnostics import binary_entropy


class Tally:
    """Sums over the windows seen so far."""

    def __init__(self, num_layers: int) -> None:
        self.losses: list[float] = []
        """Summed loss of each window, in nats."""
        self.counts: list[int] = []
        """Scored tokens of each window."""
        self.kept = torch.zeros(3, num_layers, dtype=torch.double)
        """Tokens that ran each layer's mixer, FFN and alternate mixer."""
        self.flops = cost.FlopCount()
        self.num_agreeing = self.num_placed = 0
        self.depth = 0.0

    def add(self, backbone: Backbone, token_ids: Tensor, logits: Tensor, reference: Tensor, trace: Trace) -> None:
        """Add a window of (1, T) tokens; their last ones are predicted by (1, N, V) logits of N ≤ T tokens."""
        targets = token_ids[0, 1 - logits.shape[1] :]
        self.losses.append(F.cross_entropy(logits[0, :-1].float(), targets, reduction="sum").item())
        self.counts.append(targets.numel())
        shares = torch.tensor([*trace.executed_share(), trace.other_share()], dtype=torch.double)
        self.kept += token_ids.numel() * shares
        self.flops += cost.flops(backbone, trace)
        self.num_agreeing += _num_agreeing(logits, reference)
        self.num_placed += token_ids.numel()
        self.depth += trace.mean_depth * token_ids.numel()

    def fields(self) -> dict[str, Any]:
        """Return the fields of `anydepth.eval/1`; `loss` is in nats per scored token, LM loss only."""
        found = mean_of_sums(torch.tensor(self.losses).double(), torch.tensor(self.counts).double())
        loss, num_tokens = sum(self.losses) / sum(self.counts), sum(self.counts)
        bounds = [bound for bound in (found["low"], found["high"]) if bound is not None]
        return {
            "perplexity": perplexity_of(loss),
            "perplexity_interval": [perplexity_of(bound) for bound in bounds] or None,
            "loss": loss,
            "num_tokens": num_tokens,
            "mean_depth": self.depth / self.num_placed,
            "layer_token_share": self.flops.layer_token_share,
            "gflops_per_token": self.flops.total / self.num_placed / 1e9,
            "agreement": self.num_agreeing / num_tokens,
            "per_layer": dict(zip(("mixer", "ffn"), self.shares(), strict=False)),
        }

    def shares(self) -> list[list[float]]:
        return (self.kept / self.num_placed).tolist()

    def mixers(self) -> list[dict[str, float]]:
        """Return `layer`, `softmax_share` and the routing's `entropy` in bits for each layer with mixer routing."""
        others = self.kept[2] / self.num_placed
        bits = (binary_entropy(others) / math.log(2)).tolist()
        return [
            {"layer": layer_idx, "softmax_share": 1 - other, "entropy": entropy}
            for layer_idx, (other, entropy) in enumerate(zip(others.tolist(), bits, strict=True))
            if other > 0
        ]


def check_prompt(prompt_tokens: int, sequence_length: int) -> None:
    """Raise `UserError` if a prompt leaves nothing of a window to score."""
    if prompt_tokens > sequence_length - 2:
        raise UserError(
            f"prompt-tokens {prompt_tokens} leaves nothing to score of windows of {sequence_length} tokens; give at "
            f"most {sequence_length - 2}"
        )


def why_the_same(engine: Engine, prompt_tokens: int = 0) -> str | None:
    """Return why an engine's scores are those of the base model; None where something can change them."""
    adapted = engine.adapted
    if has_adapter(adapted) or engine.is_quantised:
        return None
    if engine.drafts:
        return "drafting does not change scores: full depth verifies every token"
    plan = Plan.of(adapted.active_methods)
    if plan.is_empty and plan.gates_prompts and not prompt_tokens:
        return f"{adapted.label} changes how prompts are read; give --prompt-tokens to score what follows them"
    if any(not method.is_lossless() for method in adapted.active_methods):
        return None
    return f"{' + '.join(adapted.methods) or 'nothing'} is attached, and every token runs every layer"


def engine_of_base(engine: Engine) -> Engine:
    """Return an engine that runs the base model in its own precision, without an adapter."""
    if has_adapter(engine.adapted):
        return HFEngine(engine.adapted)
    return FastEngine(engine.adapted) if engine.is_quantised else engine


@torch.no_grad()
def evaluate(
    engine: Engine, windows: Tensor, *, full_depth_only: bool = False, prompt_tokens: int = 0, track: Track = iter
) -> dict[str, Any]:
    """Score (N, T) windows independently: loss, depth and agreement; what follows `prompt_tokens` of each, if given.

    Returns the fields of `anydepth.eval/1` for the adapted model, with those of the base model (gates and LoRA off, in
    its own precision whatever the engine's) under `full_depth`. With a LoRA adapter, those of the same model at full
    depth (gates off, LoRA on) are under `full_depth_adapted`, and `agreement_adapted` is the agreement with it. Where
    nothing can differ, text is scored once, and `note` gives the reason.
    """
    adapted, why = engine.adapted.eval(), why_the_same(engine, prompt_tokens)
    backbone = adapted.backbone
    ours, base, full = (Tally(backbone.num_layers) for _ in range(3))
    at_once = full_depth_only or (engine.name == "hf" and why is not None)
    has_lora = has_adapter(adapted) and not at_once
    num_agreeing = 0
    for row in track(rows_of(windows)):
        token_ids = row.to(adapted.device)
        with adapted.untouched():
            if engine.weights == NATIVE:  # transformers would dequantise the blocks in every forward
                reference = engine.logits(token_ids[0])[None]
            else:
                reference = adapted(input_ids=token_ids, use_cache=False).logits
        reference = reference[:, max(prompt_tokens - 1, 0) :]
        everything = cost.full_depth_trace(backbone, token_ids.numel())
        base.add(backbone, token_ids, reference, reference, everything)
        if not at_once:
            logits = engine.logits(token_ids[0], prompt_tokens)[None]
            ours.add(backbone, token_ids, logits, reference, adapted.last_trace)
            if has_lora:
                with adapted.disabled():
                    others = adapted(input_ids=token_ids, use_cache=False).logits[:, -logits.shape[1] :]
                full.add(backbone, token_ids, others, reference, everything)
                num_agreeing += _num_agreeing(logits, others)
    found: dict[str, Any] = {"full_depth": base.fields()}
    if at_once:
        return {**base.fields(), **({} if full_depth_only else {"note": why}), **found}
    if has_lora:
        found |= {"full_depth_adapted": full.fields(), "agreement_adapted": num_agreeing / sum(full.counts)}
    if mixers := ours.mixers():
        found["mixers"] = mixers
    if methods := comparing(adapted.active_methods):
        found["skip_share"] = {method.name: method.skip_share(*ours.shares()) for method in methods}
    return {**ours.fields(), **found}


def _num_agreeing(logits: Tensor, others: Tensor) -> int:
    """Return for how many tokens (1, T, V) logits predict the same next token as others, the last one left out."""
    return int((logits[0, :-1].argmax(-1) == others[0, :-1].argmax(-1)).sum())


@torch.no_grad()
def exit_losses(adapted: AdaptedModel, windows: Tensor) -> list[dict[str, float]]:
    """Return `layers`, `loss` and `agreement` with full depth on (N, T) windows as if each layer were the last."""
    adapted.eval()
    num_layers = adapted.backbone.num_layers
    losses, agreeing, num_tokens = [0.0] * num_layers, [0] * num_layers, 0
    with adapted.backbone.layer_outputs() as states, adapted.disabled():
        for row in rows_of(windows):
            token_ids = row.to(adapted.device)
            targets = token_ids[0, 1:]
            reference = adapted(input_ids=token_ids, use_cache=False).logits
            for layer_idx in range(num_layers):
                logits = adapted.backbone.logits_of(states[layer_idx]).float()
                losses[layer_idx] += F.cross_entropy(logits[0, :-1], targets, reduction="sum").item()
                agreeing[layer_idx] += _num_agreeing(logits, reference)
            num_tokens += targets.numel()
    return [
        {"layers": i + 1, "loss": losses[i] / num_tokens, "agreement": agreeing[i] / num_tokens}
        for i in range(num_layers)
    ]
