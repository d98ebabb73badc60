"""Sequences on the Hugging Face model itself, of any family, with the methods of `decoding/session.py`.

Each sequence has its own cache and runs alone: sequences accept different numbers of draft tokens, and one cache holds
rows of one length.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anydepth.gating.plan import FULL_DEPTH, Decider, Plan
from anydepth.gating.scores import Known
from anydepth.gating.spec import GateSpec
from anydepth.gating.trace import PassRecord
from anydepth.hf.adapted import AdaptedModel
from anydepth.hf.adaptive_cache import AdaptiveCache, LayerKV
from anydepth.hf.latencies import latencies


class HFSession:
    """K/V of sequences on an adapted model.

    Attributes:
        ids: by sequence, its committed tokens.
        num_exited: by sequence, draft tokens that have run the first layers alone.
        verified: by sequence, the tokens of a verification until `commit`.
    """

    max_tokens = None

    def __init__(self, adapted: AdaptedModel, num_sequences: int, max_length: int | None = None) -> None:
        self.adapted, self.num_sequences, self.max_length = adapted, num_sequences, max_length
        self.switch = adapted.backbone.rotary_switch
        self.free = list(range(num_sequences))
        self.caches: dict[int, AdaptiveCache] = {}
        self.ids: dict[int, list[int]] = {}
        self.num_exited: dict[int, int] = {}
        self.verified: dict[int, list[int]] = {}
        self.memory: dict[Any, Any] = {}
        self.capturing = False
        self.exit_plans: dict[tuple[int, bool], Plan] = {}

    @property
    def is_full(self) -> bool:
        return not self.free

    def open(self) -> int:
        sequence = min(self.free)
        self.free.remove(sequence)
        self.caches[sequence] = self.adapted.new_cache()
        self.ids[sequence], self.num_exited[sequence] = [], 0
        return sequence

    def close(self, sequence: int) -> None:
        del self.caches[sequence], self.ids[sequence], self.num_exited[sequence]
        self.verified.pop(sequence, None)
        self.free.append(sequence)

    def length(self, sequence: int) -> int:
        return len(self.ids[sequence])

    def cut(self, sequence: int, start: int, end: int, plan: Plan) -> None:
        """Return None: caches of sliding windows drop what a shorter beginning would need."""

    def restore(self, sequence: int, block: Any, start: int) -> bool:
        return False

    def num_kv(self, sequence: int) -> list[int]:
        layers = self.caches[sequence].layers
        return [layer.num_kv if isinstance(layer, LayerKV) else self.length(sequence) for layer in layers]

    def rewind(self, sequence: int, length: int) -> None:
        self.caches[sequence].rewind(length)
        del self.ids[sequence][length:]

    def read(
        self, sequence: int, ids: Sequence[int], plan: Plan, *, num_logits: int = 1, capture: bool = False
    ) -> tuple[Tensor | None, PassRecord]:
        # transformers reads logits_to_keep=0 as all.
        logits = self._forward(sequence, list(ids), plan, logits_to_keep=max(num_logits, 1))
        self.ids[sequence] += ids
        record = self.adapted.records[-1]
        record.head_rows = num_logits
        return (logits if num_logits else None), record

    def step(
        self, sequences: Sequence[int], ids: Sequence[int], plan: Plan
    ) -> tuple[Tensor, list[tuple[PassRecord, int]]]:
        logits, passes = [], []
        for sequence, token in zip(sequences, ids, strict=True):
            own, record = self.read(sequence, [token], plan)
            logits.append(own)
            passes.append((record, 0))
        return torch.cat(logits), passes

    def draft(self, sequences: Sequence[int], ids: Sequence[int], plan: Plan) -> Tensor:
        return torch.cat(
            [self._forward(sequence, [token], plan) for sequence, token in zip(sequences, ids, strict=True)]
        )

    def draft_exits(self, sequences: Sequence[int], ids: Sequence[int], exit_layer: int) -> list[Tensor]:
        states, plan = [], self._exit_plan(exit_layer, continues=False)
        for sequence, token in zip(sequences, ids, strict=True):
            with self.adapted.running(plan):
                input_ids = torch.tensor([[token]], device=self.adapted.device)
                self.adapted.backbone.decoder(
                    input_ids=input_ids, past_key_values=self.caches[sequence], use_cache=True
                )
            self.num_exited[sequence] += 1
            states.append(self.adapted.last_run.exited[exit_layer][1][0])
        return states

    def verify(self, sequences: Sequence[int], ids: Sequence[Sequence[int]], exit_layer: int = 0) -> list[Tensor]:
        logits = []
        for sequence, tokens in zip(sequences, ids, strict=True):
            unseen, seen = list(tokens[self.num_exited[sequence] :]), self.ids[sequence]
            if self._restarts(sequence):
                self.caches[sequence].rewind(0)
                own = self._forward(sequence, [*seen, *tokens], FULL_DEPTH, logits_to_keep=1)
            elif self.num_exited[sequence] and unseen:
                own = self._forward(sequence, unseen, self._exit_plan(exit_layer, continues=True))
                deferred = self.adapted.last_run.deferred
                if deferred is not None:
                    own = torch.cat([self.adapted.backbone.logits_of(deferred[0]), own])
            else:
                self.caches[sequence].rewind(len(seen))
                own = self._forward(sequence, list(tokens), FULL_DEPTH)
            self.verified[sequence] = list(tokens)
            logits.append(own)
        return logits

    def commit(self, sequences: Sequence[int], num_tokens: Sequence[int]) -> None:
        for sequence, count in zip(sequences, num_tokens, strict=True):
            self.ids[sequence] += self.verified.pop(sequence)[:count]
            self.num_exited[sequence] = 0
            self.caches[sequence].rewind(len(self.ids[sequence]))

    def captured(self, sequence: int) -> list[Tensor]:
        """Return no states: drafters that read states run on the fast engine."""
        return []

    def draft_limit(self, sequence: int) -> int | None:
        if self.switch is None:
            return None
        left = self.switch.length - len(self.ids[sequence]) - 1
        if left >= 0:
            return left
        return 0 if self.switch.again or self._restarts(sequence) else None

    def _restarts(self, sequence: int) -> bool:
        """Return whether the next pass is the first after the switch, in which some models read the sequence again."""
        return self.switch is not None and self.switch.restarts and len(self.ids[sequence]) == self.switch.length

    def score(self, sequence: int, ids: Sequence[int], plan: Plan) -> Tensor:
        cache = self.caches[sequence]
        try:
            self.caches[sequence] = copy.deepcopy(cache)
            self.caches[sequence].rewind(len(self.ids[sequence]) - len(ids))
            return self._forward(sequence, list(ids), plan)
        finally:
            self.caches[sequence] = cache

    def layer_seconds(self, sequence: int, ids: Sequence[int]) -> list[float]:
        seconds = latencies(self.adapted, torch.tensor([list(ids)]))
        return [seconds["layer", layer_idx] for layer_idx in range(self.adapted.backbone.num_layers)]

    def _exit_plan(self, exit_layer: int, *, continues: bool) -> Plan:
        """Return a plan in which every token exits before a layer, or continues there; made once for a session."""
        if (exit_layer, continues) not in self.exit_plans:
            self.exit_plans[exit_layer, continues] = Plan.of([ExitAt(exit_layer, continues=continues)])
        return self.exit_plans[exit_layer, continues]

    def _forward(self, sequence: int, ids: list[int], plan: Plan, **options: Any) -> Tensor:
        """Run the next tokens of a sequence; return (N, V) logits."""
        input_ids = torch.tensor([ids], device=self.adapted.device)
        with self.adapted.running(plan):
            return self.adapted(input_ids=input_ids, past_key_values=self.caches[sequence], **options).logits[0]


class ExitAt(Decider):
    """Lets every token exit before one layer, or continue there together with tokens that exited earlier."""

    name = "exit_at"

    def __init__(self, exit_layer: int, *, continues: bool) -> None:
        self.exit_layer, self.continues = exit_layer, continues

    def gates(self) -> list[GateSpec]:
        score = Known(1, lambda context: torch.full((1, *context.positions.shape), float(self.continues)))
        return [GateSpec((self.exit_layer,), "layer", score, 0.5, "recompute", exits=True)]
