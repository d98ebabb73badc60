"""The text that `tune` chooses with, and other text that confirms what it chose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from anydepth.calibration.guarantee import least_sequences
from anydepth.decoding.generate import check_window
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.bench import batches_of
from anydepth.measure.prompts import read_prompts
from anydepth.measure.race import FEW
from anydepth.measure.timing import Batch, unpadded
from anydepth.recipe import TuneConfig
from anydepth.runs.candidates import Quality
from anydepth.training.corpora import validation_of
from anydepth.training.data import load_windows

Prompts = list[tuple[str, Batch]]
LENGTH, NUM_CHOOSING, NUM_UNSEEN, NUM_FITTING = 512, 6, 24, 40
"""Tokens of a window of text; windows that choose, those that score what is left, and those to fit projections on."""
MOST_PROMPTS = 30
"""Batches of prompts that confirm, of text; twice as many choose."""
ERROR = 0.05
"""Probability that a setting passes the test of a bound on risk and does not keep it."""


@dataclass
class Texts:
    """Prompts and windows of one search, of each two parts: the first chooses, the second is for what was chosen."""

    config: TuneConfig
    adapted: AdaptedModel
    tokenizer: Any

    @cached_property
    def batches(self) -> tuple[Prompts, Prompts]:
        """Batches of prompts with the names of their shapes, to choose and to confirm with."""
        config = self.config
        if config.prompts is not None:
            texts = read_prompts(Path(config.prompts), self.tokenizer)
            cut = self._cut(len(texts))
            return self._of_texts(texts[:cut]), self._of_texts(texts[cut:])
        longest = max(config.prompt_tokens)
        check_window(self.adapted, longest, config.new_tokens)
        # Windows as long as those that score, so that prompts that confirm come after the text that chooses.
        most = 3 * max(MOST_PROMPTS * max(config.batch_sizes), self.num_texts(ERROR / FEW))
        windows = load_windows(config.data, self.tokenizer, max(longest, self._length), max_windows=most)
        cut = self._cut(len(windows))
        return self._of_windows(windows[:cut]), self._of_windows(windows[cut:])

    def _of_texts(self, texts: list[str]) -> Prompts:
        config, found = self.config, list[Prompts]()
        for size in config.batch_sizes:
            batches = batches_of(self.adapted, self.tokenizer, texts, size, config.new_tokens)
            found.append([(f"batch {size}", batch) for batch in batches])
        return _in_turn(found)

    def _of_windows(self, windows: Tensor) -> Prompts:
        found, windows = list[Prompts](), windows.to(self.adapted.device)
        for size, length in product(self.config.batch_sizes, self.config.prompt_tokens):
            parts = [windows[start : start + size, :length] for start in range(0, len(windows) - size + 1, size)]
            found.append([(f"{length} tokens, batch {size}", unpadded(part)) for part in parts])
        return _in_turn(found)

    def _cut(self, count: int) -> int:
        """Return how many of the prompts choose; raise `UserError` if too few are left to confirm with."""
        cut, source = count - count // 3, self.config.prompts or self.config.data
        if count - cut < max(self.config.batch_sizes):
            raise UserError(
                f"{source} has {count} prompts; tune needs at least {3 * max(self.config.batch_sizes)}, to choose and "
                "to confirm with: give more text, or smaller batches"
            )
        return cut

    @property
    def num_shapes(self) -> int:
        return len(self.config.batch_sizes) * (1 if self.config.prompts else len(self.config.prompt_tokens))

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Return (N, T) windows of text that choose, and others."""
        data, length = self.config.data, self._length
        other = validation_of(data)
        count = NUM_CHOOSING if other else NUM_CHOOSING + NUM_UNSEEN
        windows = load_windows(data, self.tokenizer, length, max_windows=count)
        unseen = windows[NUM_CHOOSING:]
        if other:
            unseen = load_windows(other, self.tokenizer, length, max_windows=NUM_UNSEEN)
        if not len(unseen):
            raise UserError(
                f"{data} has {len(windows)} windows of {length} tokens; {NUM_CHOOSING} choose, and others have to "
                "score: give more text"
            )
        return windows[:NUM_CHOOSING], unseen

    @cached_property
    def fitting(self) -> Tensor:
        """Return (N, T) windows to fit projections on, in general not those that choose."""
        data = self.config.data
        if validation_of(data) is None:  # what comes after those that choose is for other uses
            return self.windows[0]
        windows = load_windows(data, self.tokenizer, self._length, max_windows=NUM_CHOOSING + NUM_FITTING)
        return windows[NUM_CHOOSING:] if len(windows) > NUM_CHOOSING else windows

    @property
    def _length(self) -> int:
        return min(LENGTH, getattr(self.adapted.config, "max_position_embeddings", None) or LENGTH)

    @cached_property
    def choosing(self) -> Quality:
        return Quality(self.windows[0])

    @cached_property
    def unseen(self) -> Quality:
        return Quality(self.windows[1])

    def num_texts(self, error: float) -> int:
        """Return how many texts show a bound on risk of which half is lost; 0 without such a bound."""
        return 0 if self.config.max_risk is None else 2 * least_sequences(self.config.max_risk, 1 - error)


def _in_turn(shapes: list[Prompts]) -> Prompts:
    """Return a batch of each shape, then the next of each."""
    return [batch for row in zip(*shapes, strict=False) for batch in row]
