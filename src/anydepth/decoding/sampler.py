"""Choose next tokens and decide when a text ends, request by request, as transformers' `generate` does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

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

GREEDY = 1e-5
"""Temperatures up to this one decode greedily: logits divided by a smaller number overflow."""
KEPT_NOISE = 48
"""Steps of which the noise is cached; older noise is drawn again for rows that are further back."""


class Row(Protocol):
    """The part of a request that samplers read; padding counts, and `row` is its row in the batch."""

    ids: list[int]
    draft: list[int]
    row: int
    num_prompt: int


class Noise:
    """Exponential noise that `torch.multinomial` draws at each step of a batch.

    Cached so that drafting and verification sample with the same noise. Drafts also draw noise for steps that are
    never taken: `rewind` then resets the generator to its state without them.

    Attributes:
        before: states of the generator before each step. kept: cached noise by step.
    """

    def __init__(self, num_rows: int, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.num_rows, self.device, self.generator = num_rows, device, generator or default_generator(device)
        self.before: list[Tensor] = []
        self.kept: dict[int, Tensor] = {}

    def at(self, step: int, size: int) -> Tensor:
        """Return (B, size) noise of a step; each step is first drawn after the one before it."""
        if step in self.kept:
            return self.kept[step]
        now = self.generator.get_state()
        if step < len(self.before):
            self.generator.set_state(self.before[step])
        else:
            self.before.append(now)
        noise = torch.empty(self.num_rows, size, device=self.device)
        self.kept[step] = noise.exponential_(1, generator=self.generator)
        if step < len(self.before) - 1:
            self.generator.set_state(now)
        while len(self.kept) > KEPT_NOISE:
            self.kept.pop(next(iter(self.kept)))
        return self.kept[step]

    def rewind(self, num_steps: int) -> None:
        if num_steps < len(self.before):
            self.generator.set_state(self.before[num_steps])


def default_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
"""Stateful processors of transformers: the first has a K/V cache, the second counts its calls."""


def is_stateless(processor: Any) -> bool:
    """Return whether a logits processor is known to return the same scores however often it is called.

    transformers' own do, except `STATEFUL` and the one that calls a user's function. Other processors, and such a
    function, declare it by an attribute `is_stateless = True`.
    """
    if type(processor) is PrefixConstrainedLogitsProcessor:
        processor = processor._prefix_allowed_tokens_fn
    declared = getattr(processor, "is_stateless", False) is True
    return declared or (type(processor).__module__ == logits_process.__name__ and not isinstance(processor, STATEFUL))


class Sampler:
    """Chooses tokens from logits, for one request or the requests of a batch.

    Args:
        processors: transformers' own or a user's. Those that may keep a state, such as a grammar, are called once for
            each token of the output, in order, and never for drafts.
        num_rows: rows of the batch; noise is drawn for all of them, as transformers does.
        vocabulary_size: size of the model's vocabulary; needed to draft from a part of it.
        generator: draws the noise of sampling; None is torch's default generator of the device.
        drafts: whether rows draft, so that they can be at different positions.

    Raises:
        UserError: processors that may keep a state, for several rows that draft.
    """

    def __init__(
        self,
        processors: LogitsProcessorList | None = None,
        num_rows: int = 1,
        vocabulary_size: int = 0,
        device: torch.device | None = None,
        *,
        sampling: bool = False,
        generator: torch.Generator | None = None,
        drafts: bool = False,
    ) -> None:
        self.processors = LogitsProcessorList() if processors is None else processors
        self.num_rows, self.sampling, self.vocabulary_size = num_rows, sampling, vocabulary_size
        self.for_drafts = LogitsProcessorList(part for part in self.processors if is_stateless(part))
        if drafts and num_rows > 1 and len(self.for_drafts) < len(self.processors):
            name = next(type(part).__name__ for part in self.processors if not is_stateless(part))
            raise UserError(
                f"{name} may keep a state, and rows that draft are at different tokens; generate them one by one, or "
                "at full depth (adapted.disabled())"
            )
        self.noise = Noise(num_rows, torch.device("cpu") if device is None else device, generator)
        self.ended: dict[int, list[int]] = {}

    @property
    def is_plain(self) -> bool:
        """Whether the next token is that of the largest logit."""
        return not self.processors and not self.sampling

    def scores(self, requests: Sequence[Row], logits: Tensor) -> Tensor:
        """Return the processed (R, V) logits after the tokens of some requests, which all have the same length.

        Processors get the whole batch, as in transformers: rows that have ended take part with their last tokens,
        padded.
        """
        if not self.processors:
            return logits.float()
        if self.num_rows == 1:
            return self._processed([request.ids for request in requests], logits)
        length = len(requests[0].ids)
        running = {request.row: number for number, request in enumerate(requests)}
        ids, order = [], []
        for row in range(self.num_rows):
            own = requests[running[row]].ids if row in running else self.ended.get(row, requests[0].ids)
            ids.append(own + [own[-1]] * (length - len(own)))
            order.append(running.get(row, 0))
            if row in running:
                self.ended[row] = own
        return self._processed(ids, logits[order])[[request.row for request in requests]]

    def _processed(self, ids: list[list[int]], logits: Tensor) -> Tensor:
        so_far: Any = torch.tensor(ids, device=logits.device)
        return self.processors(so_far, logits.float())

    def row_scores(self, request: Row, ids: Sequence[int], logits: Tensor, *, is_draft: bool = False) -> Tensor:
        """Return the processed (V,) logits of a request after `ids`, its tokens with or without a draft."""
        processors = self.for_drafts if is_draft else self.processors
        if not processors:
            return logits.float()
        # Some processors count the rows of a batch: each of its rows is a copy of this one.
        so_far: Any = torch.tensor([ids], device=logits.device).expand(self.num_rows, -1)
        return processors(so_far, logits[None].float().repeat(self.num_rows, 1))[request.row]

    def token(self, request: Row, num_tokens: int, scores: Tensor) -> int:
        """Choose the token after `num_tokens` tokens of a request, padding included, from processed (V,) logits."""
        if not self.sampling:
            return largest(scores[None])[0]
        noise = self.noise.at(num_tokens - request.num_prompt, len(scores))[request.row].to(scores.device)
        return int((scores.softmax(-1) / noise).argmax())

    def take(self, request: Row, scores: Tensor) -> int:
        """Choose the next token of a request from processed (V,) logits.

        Raises:
            RuntimeError: no token has a probability.
        """
        if self.sampling and not bool(scores.max() > float("-inf")):
            raise RuntimeError("the logits processors left no token to choose from")
        token = self.token(request, len(request.ids), scores)
        if self.num_rows == 1:  # no other row needs the noise of this step, which is as large as the vocabulary
            self.noise.kept.pop(len(request.ids) - request.num_prompt, None)
        return token

    def draft(
        self, requests: Sequence[Row], logits: Tensor, vocabulary: Tensor | None
    ) -> tuple[list[int], list[float]]:
        """Choose a draft token for each request; return the tokens and their probabilities.

        Args:
            logits: (R, V), or (R, V') of a `vocabulary` (V',).
        """
        if self.is_plain:
            scores = logits.float().cpu().numpy()  # numpy is faster than torch for few numbers
            best = scores.argmax(-1).tolist()
            probabilities = [1 / float(np.exp(row - row[one]).sum()) for row, one in zip(scores, best, strict=True)]
            return (best if vocabulary is None else [int(vocabulary[one]) for one in best]), probabilities
        tokens, probabilities = [], []
        for request, part in zip(requests, logits, strict=True):
            if vocabulary is not None:
                every = part.new_full((self.vocabulary_size,), float("-inf"))
                part = every.index_copy(0, vocabulary.to(part.device), part)
            ids = [*request.ids, *request.draft]
            scores = self.row_scores(request, ids, part, is_draft=True)
            tokens.append(self.token(request, len(ids), scores))
            probabilities.append(scores.softmax(-1)[tokens[-1]].item())
        return tokens, probabilities


class Stops:
    """Decides when a request ends, by transformers' criteria.

    Attributes:
        max_length: maximum length, padding included; None: no maximum.
        others: criteria that must be called at every token, one request at a time.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        lengths = [part for part in criteria if type(part) is MaxLengthCriteria]
        ends = [part for part in criteria if type(part) is EosTokenCriteria]
        self.max_length = min((part.max_length for part in lengths), default=None)
        self.end_ids = frozenset(token for part in ends for token in part.eos_token_id.tolist())
        self.others = StoppingCriteriaList(part for part in criteria if part not in lengths and part not in ends)

    @classmethod
    def at(cls, length: int, end_ids: Iterable[int] = ()) -> Stops:
        """Return stops at a length, padding included, or after one of these tokens."""
        stops = cls(StoppingCriteriaList([MaxLengthCriteria(length)]))
        stops.end_ids = frozenset(end_ids)
        return stops

    def num_left(self, request: Row) -> int | None:
        """Return how many tokens a request may still get; None: any number."""
        return None if self.max_length is None else self.max_length - len(request.ids)

    def ends(self, request: Row, scores: Tensor) -> bool:
        """Return whether a request ends with its last token, chosen from processed (V,) logits."""
        left = self.num_left(request)
        if (left is not None and left <= 0) or request.ids[-1] in self.end_ids:
            return True
        if not self.others:
            return False
        ids: Any = torch.tensor([request.ids], device=scores.device)
        criteria: Any = self.others
        return bool(criteria(ids, scores[None])[0])


class JointStops(Stops):
    """Stops of a batch in which rows continue until all have ended, as in transformers without an end token.

    Attributes:
        length: the common length at the end; None: some row has not ended yet.
    """

    def __init__(self, criteria: StoppingCriteriaList, num_rows: int) -> None:
        super().__init__(criteria)
        self.num_rows, self.first_ends = num_rows, dict[int, int]()

    @property
    def length(self) -> int | None:
        return max(self.first_ends.values()) if len(self.first_ends) == self.num_rows else None

    def ends(self, request: Row, scores: Tensor) -> bool:
        if request.row not in self.first_ends and super().ends(request, scores):
            self.first_ends[request.row] = len(request.ids)
        left = self.num_left(request)
        return (left is not None and left <= 0) or (self.length is not None and len(request.ids) >= self.length)


def largest(scores: Tensor) -> list[int]:
    """Return the index of the first maximum of each row of (N, V); numpy is ten times as fast as torch."""
    if scores.device.type == "cpu":
        return scores.float().numpy().argmax(-1).tolist()
    return scores.argmax(-1).tolist()
