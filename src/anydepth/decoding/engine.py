"""The interface of engines: weights, sessions over them, and drafting."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from anydepth.decoding.request import DraftCounts
from anydepth.decoding.session import Session, StepPolicy
from anydepth.engine.model import EngineModel
from anydepth.engine.weights import WEIGHT_ONLY
from anydepth.gating.plan import FULL_DEPTH, Plan
from anydepth.hf.adapted import AdaptedModel


class Drafting(Protocol):
    """Drafts on an engine (`speculation/drafting.py`).

    Attributes:
        captures: layers, counted from 1, of which drafters read the output states.
    """

    @property
    def captures(self) -> Sequence[int]: ...

    def open(self, session: Session) -> StepPolicy:
        """Return the step policy for the drafted requests of a session."""
        ...


class Draft(Protocol):
    """Drafters for any engine (`speculation/draft.py`)."""

    def on(self, engine: Engine) -> Drafting:
        """Open the drafters on an engine."""
        ...


class Engine(ABC):
    """Decodes an adapted model: `engine.generate(...)` for `adapted.generate(...)`.

    Threads take turns, one `generate` or one scheduler step at a time: kernels and drafters have one scratch memory,
    and a step uses all cores anyway.

    Args:
        draft: draft tokens and verify them: `generate` then returns the text of full depth, and the attached methods
            decide in drafts alone. None: the attached methods decide.

    Attributes:
        weights: the precision of its weights, such as bfloat16 or int8.
        model: the packed model of the fast engine.
        shares_prefixes: whether texts with a common prefix are best scored one after the other, in one sequence.
    """

    name: ClassVar[str]
    weights: str
    model: EngineModel | None = None
    shares_prefixes: ClassVar[bool] = False

    def __init__(self, adapted: AdaptedModel, draft: Draft | None = None) -> None:
        self.adapted, self.draft = adapted, draft
        self.turn = threading.RLock()
        self.last = threading.local()
        self.drafting = None if draft is None else draft.on(self)

    @abstractmethod
    def new_session(self, num_sequences: int, max_length: int | None = None, captures: Sequence[int] = ()) -> Session:
        """Return a session for `num_sequences` sequences of up to `max_length` tokens; None: as memory allows."""

    @abstractmethod
    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Generate as transformers' `generate` does, with its options; return (B, prompt + new) token ids."""

    @abstractmethod
    def exit_logits(self, states: Tensor, vocabulary: Tensor | None) -> Tensor:
        """Return (..., V) logits of (..., D) states of any depth, or (..., V') of a vocabulary (V',)."""

    @abstractmethod
    def weight_bytes(self) -> tuple[list[tuple[int, int]], int]:
        """Return the bytes of weights that a token reads: (mixer, FFN) by layer, and of the head."""

    @abstractmethod
    def expert_bytes(self) -> list[int]:
        """Return by layer the bytes of one expert; 0 without a mixture of experts."""

    def check_batch(  # noqa: B027 (most engines decode any batch)
        self, input_ids: Tensor, mask: Tensor | None, max_length: int | None
    ) -> None:
        """Raise `UserError` for a (B, T) batch of which the rows cannot be decoded independently."""

    @property
    def is_bitwise(self) -> bool:
        """Whether drafting leaves every token as it is.

        The kernels compute the same bits for one token and for several. Other operators do not: in float32 that can
        change exact ties alone, in half precision near ties as well.
        """
        has_kernels = self.model is not None and self.model.why_not_native is None
        return has_kernels or self.adapted.dtype == torch.float32

    @property
    def is_quantised(self) -> bool:
        """Whether the engine holds the weights in fewer bits than the model."""
        return self.weights in WEIGHT_ONLY

    @property
    def differs(self) -> bool:
        """Whether a method or a draft is attached, so that text or time can differ from full depth."""
        return bool(self.adapted.methods) or self.drafting is not None

    @property
    def drafts(self) -> bool:
        """Whether `generate` drafts and verifies: with a draft, unless the model is `disabled`."""
        return self.drafting is not None and self.adapted.is_enabled

    def without_draft(self) -> Self:
        """Return an engine on the same weights that does not draft: the attached methods decide."""
        return self.with_draft(None)

    def with_draft(self, draft: Draft | None) -> Self:
        """Return an engine on the same weights with another draft; None: the attached methods decide."""
        other = copy.copy(self)
        other.last = threading.local()
        other.draft, other.drafting = draft, None if draft is None else draft.on(other)
        return other

    @property
    def draft_counts(self) -> DraftCounts | None:
        """Draft counts of the last generation of this thread; None: it did not draft."""
        return getattr(self.last, "counts", None)

    @torch.no_grad()
    def logits(self, token_ids: Tensor, num_prompt: int = 0) -> Tensor:
        """Return the (T, V) logits of one sequence of (T,) tokens, in one prefill.

        Args:
            num_prompt: number of first tokens that are read as a prompt; of them only the last one has logits.
        """
        session, plan = self.new_session(1), FULL_DEPTH if self.drafts else Plan.of(self.adapted.active_methods)
        sequence, ids = session.open(), token_ids.tolist()
        with self.turn:
            num_logits = len(ids) - max(num_prompt - 1, 0)
            logits, record = session.read(sequence, ids, plan.of_prompt(num_prompt), num_logits=num_logits)
        assert logits is not None
        if self.adapted.is_enabled:
            self.adapted.records = [record]
        return logits
