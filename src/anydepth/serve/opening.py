"""Load a target and start its service."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from anydepth.decoding.engines import open_engine
from anydepth.decoding.sampling_options import use_defaults
from anydepth.draft_sections import DRAFT
from anydepth.errors import RunError, UserError
from anydepth.models.load import NATIVE, DType
from anydepth.serve.service import Budgets, Service
from anydepth.speculation.draft import why_no_draft
from anydepth.training.checkpoint import load_draft, load_target
from anydepth.training.corpora import check_corpus
from anydepth.training.data import load_windows

BUDGET_WINDOWS, BUDGET_LENGTH = 16, 128
log = logging.getLogger("anydepth.serve")


def open_service(
    target: str,
    *,
    data: str = "embedded:train",
    weights: str | None = None,
    device: str = "cpu",
    dtype: DType = "auto",
    generation_config: str = "auto",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    skip_share: float | None = None,
    **limits: int,
) -> tuple[Service, PreTrainedTokenizerBase]:
    """Return a `Service` for a target of the command line, and its tokenizer.

    Options are as in `load_target` and `open_engine`, which raise `UserError`.

    Args:
        data: text on which depth budgets are calibrated.
        generation_config: auto: requests default to the model's own sampling options; none: they do not.
        limits: `max_batch_size`, `max_tokens` and `max_queue` of the service.
    """
    check_corpus(data)
    load: dict[str, Any] = {"dtype": dtype, "device": device, "overrides": overrides, "skip_share": skip_share}
    adapted, tokenizer = load_target(target, merge=True, native=weights == NATIVE, **load)
    can_draft = why_no_draft(adapted.backbone, adapted.attached) is None
    draft = load_draft(target, adapted, lossless=can_draft, options=(overrides or {}).get(DRAFT))
    use_defaults(adapted.generation_config, generation_config)
    engine = open_engine(adapted.eval(), "auto", weights, log.warning, draft=draft)
    budgets = None
    if adapted.attached:
        windows = load_windows(data, tokenizer, BUDGET_LENGTH, max_windows=BUDGET_WINDOWS)
        with suppress(RunError, UserError):  # no method has a threshold
            budgets = Budgets(engine, windows)
    return Service(engine, tokenizer, budgets=budgets, **limits), tokenizer
