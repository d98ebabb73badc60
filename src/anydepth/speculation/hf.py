"""Speculation on the Hugging Face model itself: any family, any drafter but the trained one.

Each row has a cache of its own, and runs alone: rows accept different lengths, which one cache cannot hold.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from anydepth.decoding.loop import check_mode, generate_by
from anydepth.errors import UserError
from anydepth.gating.scores import Known
from anydepth.gating.spec import GateSpec
from anydepth.hf.adapted import AdaptedModel
from anydepth.hf.adaptive_cache import AdaptiveCache
from anydepth.methods._base.method import Method
from anydepth.methods.self_speculation import SelfSpeculation
from anydepth.search.knapsack import latencies
from anydepth.speculation.speculate import decode, records_of, setup_of
from anydepth.speculation.targets import PrunedModel, Row


class ExitAt(Method):
    """All tokens exit in front of one layer, or continue there with those that exited before."""

    name = "exit_at"
    summary = "drafts with the first layers"

    def __init__(self, adapted: AdaptedModel, num_layers: int, *, continues: bool) -> None:
        super().__init__(SelfSpeculation.Config(), adapted.backbone)
        self.first_missed, self.continues = num_layers, continues

    def gates(self) -> list[GateSpec]:
        score = Known(1, lambda context: torch.full((1, *context.positions.shape), float(self.continues)))
        return [GateSpec((self.first_missed,), "layer", score, 0.5, "recompute", exits=True)]


class HFTarget:
    """`targets.Target` on an adapted model."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted, self.exit_layer = adapted, 0
        self.max_tokens: int | None = None
        self.switch = adapted.backbone.rotary_switch
        self.caches: list[AdaptiveCache] = []

    def start(self, rows: Sequence[Row], pruned: PrunedModel | None = None) -> list[Tensor]:
        last = []
        for number, row in enumerate(rows):
            row.slot = number
            self.caches.append(self.adapted.new_cache())
            ids = row.ids[row.num_padding :]
            if pruned is not None:
                self._forward(row, ids, *pruned.methods, logits_to_keep=1)
                self.caches[number].rewind(0)
            last.append(self._forward(row, ids, logits_to_keep=1)[-1])
        return last

    def first_layers(self, rows: Sequence[Row]) -> list[Tensor]:
        states = []
        leaving = ExitAt(self.adapted, self.exit_layer, continues=False)
        for row in rows:
            with self.adapted.deciding(leaving):
                ids = torch.tensor([[row.last]], device=self.adapted.device)
                self.adapted.backbone.decoder(input_ids=ids, past_key_values=self.caches[row.slot], use_cache=True)
            state = self.adapted.last_run.left[self.exit_layer][1][0]
            row.early.append(state)
            states.append(state)
        return states

    def prune(self, rows: Sequence[Row], pruned: PrunedModel) -> Tensor:
        return torch.stack([self._forward(row, [row.last], *pruned.methods)[-1] for row in rows])

    def rehearse(self, row: Row, num_tokens: int, pruned: PrunedModel) -> Tensor:
        start, cache = row.num_seen - num_tokens, self.caches[row.slot]
        try:
            self.caches[row.slot] = copy.deepcopy(cache)
            self.caches[row.slot].rewind(start)
            return self._forward(row, row.ids[row.num_padding :][start : row.num_seen], *pruned.methods)
        finally:
            self.caches[row.slot] = cache

    def layer_seconds(self, row: Row, num_tokens: int) -> list[float]:
        seconds = latencies(self.adapted, torch.tensor([row.ids[-num_tokens:]]))
        return [seconds["layer", layer_idx] for layer_idx in range(self.adapted.backbone.num_layers)]

    def verify(self, rows: Sequence[Row]) -> list[Tensor]:
        logits = []
        for row in rows:
            unseen = [row.ids[-1], *row.draft][len(row.early) :]
            if self._restarts(row):
                self.caches[row.slot].rewind(0)
                own = self._forward(row, row.ids[row.num_padding :], logits_to_keep=1)
            elif self.exit_layer and unseen:
                own = self._forward(row, unseen, ExitAt(self.adapted, self.exit_layer, continues=True))
                late = self.adapted.last_run.late
                if late is not None:
                    own = torch.cat([self.adapted.backbone.logits_of(late[0]), own])
            else:
                self.caches[row.slot].rewind(row.num_seen)
                own = self._forward(row, [row.ids[-1], *row.draft])
            logits.append(own)
        return logits

    def room(self, row: Row) -> int | None:
        """Tokens that a pass may have besides the next one, so that its rotary embedding is that of a plain step."""
        if self.switch is None:
            return None
        left = self.switch.length - row.num_seen - 1
        if left >= 0:
            return left
        return 0 if self.switch.again or self._restarts(row) else None

    def _restarts(self, row: Row) -> bool:
        """Whether the row's next pass is the first beyond the switch, of a model that then reads all of it anew."""
        return self.switch is not None and self.switch.restarts and row.num_seen == self.switch.length

    def settle(self, rows: Sequence[Row], num_taken: Sequence[int]) -> None:
        for row in rows:
            row.early = []
            self.caches[row.slot].rewind(row.num_seen)

    def _forward(self, row: Row, ids: list[int], *methods: Method, **options: Any) -> Tensor:
        """(N, V) logits of a row's next tokens."""
        input_ids = torch.tensor([ids], device=self.adapted.device)
        with self.adapted.deciding(*methods):
            output = self.adapted(input_ids=input_ids, past_key_values=self.caches[row.slot], **options)
        return output.logits[0]


def speculate(adapted: AdaptedModel, *args: Any, **kwargs: Any) -> Tensor:
    """`adapted.generate`, drafted and verified on the model itself.

    Raises:
        UserError: a model with recurrent layers, whose states cannot go back.
    """
    if "recurrent" in adapted.backbone.layer_types():
        raise UserError("self_speculation takes back what was wrong, which a recurrent layer's state cannot; detach it")
    if kwargs.get("past_key_values") is not None:
        raise UserError("self_speculation keeps caches of its own; leave past_key_values out")

    def loop(
        _: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor:
        check_mode(generation_config, "self_speculation")
        mask = options.get("attention_mask")
        _check_rotary_switch(adapted, input_ids, mask, generation_config)
        calls = adapted.calls
        calls.drafting = setup_of(adapted, calls.drafting, adapted.backbone.logits_of, None)
        ids, calls.draft_counts = decode(
            HFTarget(adapted),
            calls.drafting,
            input_ids,
            mask,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
        )
        adapted.records = records_of(ids, mask, input_ids.shape[1], adapted.backbone.num_layers)
        return ids

    return generate_by(loop, adapted, *args, **kwargs)


def _check_rotary_switch(
    adapted: AdaptedModel, input_ids: Tensor, mask: Tensor | None, config: GenerationConfig
) -> None:
    """Raise `UserError` where a row's tokens would depend on the length of others, or on its padding.

    A rotary embedding that changes with the length does so at that of the longest row of a batch, padding included;
    rows that draft run alone.
    """
    switch, length = adapted.backbone.rotary_switch, config.max_length
    if switch is None or (len(input_ids) == 1 and (mask is None or bool(mask.all()))):
        return
    if length is None or length > switch.length:
        raise UserError(
            f"this model's rotary embedding changes at {switch.length} tokens, for all rows of a batch at once, and "
            "rows that draft run alone; generate prompts one by one without padding, or at full depth "
            "(adapted.disabled())"
        )
