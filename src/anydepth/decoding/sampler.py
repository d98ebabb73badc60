"""Which token comes next, and when a text ends: as transformers' `generate` decides it, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import logits_process

from anydepth.errors import UserError
from anydepth.speculation.targets import Row

GREEDY = 1e-5
"""A temperature up to which the likeliest token is taken: logits divided by less than that are no numbers."""
KEPT_NOISE = 48
"""Steps whose noise is kept; that of older ones is drawn anew for rows far behind."""


class Noise:
    """What `torch.multinomial` would divide by at each step of a batch, were all rows at that step.

    Args:
        generator: draws it; None is torch's own of the device.

    Drafts ask for steps that are never taken: `rewind` then gives the generator the state of a run without them.
    """

    def __init__(self, num_rows: int, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.num_rows, self.device, self.generator = num_rows, device, generator
        self.before: list[Tensor] = []  # states of the generator in front of each step
        self.kept: dict[int, Tensor] = {}

    def at(self, step: int, size: int) -> Tensor:
        """(B, size); steps are asked for in order the first time."""
        if step in self.kept:
            return self.kept[step]
        now = self._state
        if step < len(self.before):
            self._state = self.before[step]
        else:
            self.before.append(now)
        noise = torch.empty(self.num_rows, size, device=self.device)
        self.kept[step] = noise.exponential_(1, generator=self.generator)
        if step < len(self.before) - 1:
            self._state = now
        while len(self.kept) > KEPT_NOISE:
            self.kept.pop(next(iter(self.kept)))
        return self.kept[step]

    def rewind(self, num_steps: int) -> None:
        """So many steps were taken."""
        if num_steps < len(self.before):
            self._state = self.before[num_steps]

    @property
    def _state(self) -> Tensor:
        if self.generator is not None:
            return self.generator.get_state()
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    @_state.setter
    def _state(self, state: Tensor) -> None:
        if self.generator is not None:
            self.generator.set_state(state)
        elif self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


KEEP_STATE = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
"""Of transformers' own: one has a K/V cache, one counts its calls."""


def is_stateless(processor: Any) -> bool:
    """Return whether a logits processor is known to give the same scores however often it is asked.

    transformers' own are, but for those in `KEEP_STATE` and the one that asks a user's function; others, and such a
    function, say so by an attribute `is_stateless = True`.
    """
    if type(processor) is PrefixConstrainedLogitsProcessor:
        processor = processor._prefix_allowed_tokens_fn
    says_so = getattr(processor, "is_stateless", False) is True
    return says_so or (type(processor).__module__ == logits_process.__name__ and not isinstance(processor, KEEP_STATE))


class NextToken:
    """The next token out of logits.

    Args:
        processors: transformers' own or a user's. Those that may keep a state, such as a grammar, are asked once for
            each token that is taken, in order, and never for drafts.
        num_rows: of the batch; noise is drawn for all of them, as there.
        vocabulary_size: of the model.
        generator: draws the noise of sampling; None is torch's own of the device.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        num_rows: int,
        vocabulary_size: int,
        device: torch.device,
        *,
        sampling: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        self.processors, self.num_rows, self.sampling = processors, num_rows, sampling
        self.for_drafts = LogitsProcessorList(part for part in processors if is_stateless(part))
        if num_rows > 1 and len(self.for_drafts) < len(processors):
            name = next(type(part).__name__ for part in processors if not is_stateless(part))
            raise UserError(
                f"{name} may keep a state, and rows that draft are at different tokens; generate them one by one, or "
                "at full depth (adapted.disabled())"
            )
        self.vocabulary_size = vocabulary_size
        self.noise = Noise(num_rows, device, generator)

    @property
    def is_plain(self) -> bool:
        """Whether the largest of the logits is all there is to it."""
        return not self.processors and not self.sampling

    def scores(self, row: Row, ids: Sequence[int], logits: Tensor, *, is_draft: bool = False) -> Tensor:
        """Return the processed logits (V,) after `ids`, which begin as the row's."""
        processors = self.for_drafts if is_draft else self.processors
        if not processors:
            return logits.float()
        # Some know their batch: they get the row in its place among copies of itself.
        so_far: Any = torch.tensor([ids], device=logits.device).expand(self.num_rows, -1)
        return processors(so_far, logits[None].float().repeat(self.num_rows, 1))[row.slot]

    def token(self, row: Row, ids: Sequence[int], scores: Tensor) -> int:
        """The one behind `ids`, which begin as the row's."""
        if not self.sampling:
            return largest(scores[None])[0]
        noise = self.noise.at(len(ids) - row.num_prompt, len(scores))[row.slot].to(scores.device)
        return int((scores.softmax(-1) / noise).argmax())

    def guess(self, rows: Sequence[Row], logits: Tensor, vocabulary: Tensor | None) -> tuple[list[int], list[float]]:
        """`drafters.Choose`."""
        if self.is_plain:
            scores = logits.float().cpu().numpy()  # faster than torch at so few numbers
            places = scores.argmax(-1).tolist()
            shares = [1 / float(np.exp(row - row[place]).sum()) for row, place in zip(scores, places, strict=True)]
            return (places if vocabulary is None else [int(vocabulary[place]) for place in places]), shares
        tokens, shares = [], []
        for row, part in zip(rows, logits, strict=True):
            if vocabulary is not None:
                whole = part.new_full((self.vocabulary_size,), float("-inf"))
                part = whole.index_copy(0, vocabulary.to(part.device), part)
            ids = [*row.ids, *row.draft]
            scores = self.scores(row, ids, part, is_draft=True)
            tokens.append(self.token(row, ids, scores))
            shares.append(scores.softmax(-1)[tokens[-1]].item())
        return tokens, shares


class Stops:
    """When a row ends: transformers' own criteria, asked only where they can say yes.

    Attributes:
        max_length: known without asking; None: none. end_ids: likewise.
        others: that must be asked at every token.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        lengths = [part for part in criteria if type(part) is MaxLengthCriteria]
        ends = [part for part in criteria if type(part) is EosTokenCriteria]
        self.max_length = min((part.max_length for part in lengths), default=None)
        self.end_ids = {token for part in ends for token in part.eos_token_id.tolist()}
        self.others = StoppingCriteriaList(part for part in criteria if part not in lengths and part not in ends)

    @classmethod
    def at(cls, length: int, end_ids: Iterable[int] = ()) -> Stops:
        """At a length, or behind one of these tokens."""
        stops = cls(StoppingCriteriaList([MaxLengthCriteria(length)]))
        stops.end_ids = set(end_ids)
        return stops

    def room(self, row: Row) -> int | None:
        """Tokens that a row may still take; None: any number."""
        return None if self.max_length is None else self.max_length - len(row.ids)

    def ends(self, row: Row, scores: Tensor) -> bool:
        """Whether the row's last token is its end."""
        room = self.room(row)
        if (room is not None and room <= 0) or row.ids[-1] in self.end_ids:
            return True
        if not self.others:
            return False
        ids: Any = torch.tensor([row.ids], device=scores.device)
        criteria: Any = self.others
        return bool(criteria(ids, scores[None])[0])


def largest(scores: Tensor) -> list[int]:
    """Places of the first of the largest of (N, V). numpy looks ten times as fast as torch."""
    if scores.device.type == "cpu":
        return scores.float().numpy().argmax(-1).tolist()
    return scores.argmax(-1).tolist()
