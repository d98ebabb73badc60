"""`generate` of transformers with the fast engine in place of its decoding loop.

Options, logits processors, stop rules and streamers are transformers' own; this is the loop between them.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from anydepth.decoding.loop import check_mode, generate_by
from anydepth.decoding.sampler import Stops, largest
from anydepth.engine.kv_cache import EngineCache
from anydepth.engine.model import EngineModel
from anydepth.engine.weights import WEIGHT_ONLY
from anydepth.errors import UserError
from anydepth.gating.plan import Plan
from anydepth.gating.trace import PassRecord
from anydepth.hf.adapted import AdaptedModel
from anydepth.speculation.draft_network import DraftNetwork
from anydepth.speculation.drafters import Trained
from anydepth.speculation.speculate import Setup, decode, records_of, setup_of
from anydepth.speculation.targets import EngineTarget


class FastEngine:
    """The fast engine of an adapted model: `engine.generate(...)` for `adapted.generate(...)`.

    Holds the weights a second time, packed; weights that change later (training, a LoRA adapter) are not seen. Threads
    take turns, one generation at a time: kernels and drafters have one scratch memory, and all cores anyway.

    Args:
        weights: float32, bfloat16, float16, int8 or int4; None is the model's own precision.
        native: decode with the compiled kernels where they can be had; else PyTorch's own operators.
        compiled: put the branches through `torch.compile` in their place: for GPUs; the first start takes a minute.

    Raises:
        UserError: a family or weights that it does not run.
    """

    def __init__(
        self, adapted: AdaptedModel, weights: str | None = None, *, native: bool = True, compiled: bool = False
    ) -> None:
        for method in adapted.draft_methods:
            if method.routes_mixers:
                raise UserError(f"{method.name} has mixers that the fast engine does not know")
        self.adapted = adapted
        self.model = EngineModel(adapted.backbone, weights, native=native, compiled=compiled)
        self.drafting: Setup | None = None
        self.turn = threading.RLock()

    @property
    def packs(self) -> bool:
        """Whether the weights have fewer bits here than in the model."""
        return self.model.weights in WEIGHT_ONLY

    def trained(self, network: DraftNetwork) -> Trained:
        """A drafter that runs a trained network beside these weights."""
        return Trained(self.model, network)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' `generate`, its decoding loop done here. Greedy and sampling, any batch, left padding."""
        with self.turn:
            return generate_by(self._decode, self.adapted, *args, **kwargs)

    def logits(self, token_ids: Tensor) -> Tensor:
        """(T, V) of one sequence of (T,) tokens, in one prefill."""
        with self.turn:
            return self._logits(token_ids)

    @torch.no_grad()
    def _logits(self, token_ids: Tensor) -> Tensor:
        cache, plan = self.model.new_cache(1), Plan.of(self.adapted.active_methods)
        hidden, record = self.model.forward(token_ids[None], [cache.take_slot()], cache, plan)
        record.head_rows = len(token_ids)
        if self.adapted.is_enabled:
            self.adapted.records = [record]
        return self.model.logits(hidden[0])

    @torch.no_grad()
    def _decode(
        self,
        hf_model: Any,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, prompt + new) token ids; rows that ended are filled with the pad token."""
        check_mode(generation_config, "the fast engine")
        if self.adapted.speculation is not None:
            return self._speculate(
                input_ids,
                kwargs.get("attention_mask"),
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
            )
        sampling = bool(generation_config.do_sample)
        cache = self.model.new_cache(len(input_ids))
        slots = [cache.take_slot() for _ in input_ids]
        plan = Plan.of(self.adapted.active_methods)
        logits, record = self._prefill(input_ids, kwargs.get("attention_mask"), slots, cache, plan)
        records = [record]
        if self.adapted.is_enabled:
            self.adapted.records = records
        unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        pad: Any = generation_config._pad_token_tensor
        stops = Stops(stopping_criteria)  # asked only where they can say yes
        criteria: Any = StoppingCriteriaList(part for part in stopping_criteria if type(part) is not MaxLengthCriteria)
        num_ended = 0
        while True:
            scores = logits_processor(input_ids, logits.float())
            next_ids = (
                torch.multinomial(scores.softmax(-1), 1)[:, 0]
                if sampling
                else torch.tensor(largest(scores), device=scores.device)
            )
            if num_ended and generation_config._eos_token_tensor is not None:
                next_ids = next_ids * unfinished + pad * (1 - unfinished)
            input_ids = torch.cat([input_ids, next_ids[:, None]], dim=1)
            if streamer is not None:
                streamer.put(next_ids.cpu())
            if stops.others or not stops.end_ids.isdisjoint(next_ids.tolist()):
                unfinished = unfinished & ~criteria(input_ids, scores)
                num_ended = len(input_ids) - int(unfinished.sum())
            if num_ended == len(input_ids) or (stops.max_length is not None and input_ids.shape[1] >= stops.max_length):
                break
            hidden, record = self.model.forward(next_ids[:, None], slots, cache, plan)
            records.append(record)
            record.head_rows = len(input_ids)
            logits = self.model.logits(hidden[:, 0])
        if streamer is not None:
            streamer.end()
        return input_ids

    def _speculate(self, input_ids: Tensor, attention_mask: Tensor | None, *arguments: Any) -> Tensor:
        """The same tokens, drafted by a part of the model."""
        adapted, method = self.adapted, self.adapted.speculation
        assert method is not None
        self.drafting = setup_of(adapted, self.drafting, self.model.exit_logits, self.trained)
        target = EngineTarget(self.model, len(input_ids), [] if method.network is None else method.network.taps)
        ids, adapted.calls.draft_counts = decode(target, self.drafting, input_ids, attention_mask, *arguments)
        adapted.records = records_of(ids, attention_mask, input_ids.shape[1], len(self.model.layers))
        return ids

    def _prefill(
        self, input_ids: Tensor, mask: Tensor | None, slots: list[int], cache: EngineCache, plan: Plan
    ) -> tuple[Tensor, PassRecord]:
        """Each row alone, without its padding; (B, V) logits of the last tokens, and what ran."""
        lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
        last, records = [], []
        for row, slot in enumerate(slots):
            hidden, record = self.model.forward(input_ids[row : row + 1, -lengths[row] :], [slot], cache, plan)
            last.append(hidden[:, -1])
            records.append(record)
        record = _padded(records, input_ids.shape[1])
        record.head_rows = len(input_ids)
        return self.model.logits(torch.cat(last)), record


def _padded(records: list[PassRecord], num_tokens: int) -> PassRecord:
    """One record of rows that ran apart, padded on the left."""
    if len(records) == 1:
        return records[0]

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(part, (num_tokens - part.shape[1], 0)) for part in parts])

    first = records[0]
    return PassRecord(
        joined([record.token_mask for record in records]),
        0,
        cached=True,
        num_layers=first.num_layers,
        mixer_keep={i: joined([record.mixer_keep[i] for record in records]) for i in first.mixer_keep},
        ffn_keep={i: joined([record.ffn_keep[i] for record in records]) for i in first.ffn_keep},
        kv_rules=first.kv_rules,
        late={i: torch.cat([record.late[i] for record in records]) for i in first.late},
        router_flops=sum(record.router_flops for record in records),
    )
