"""Load a target, open its engine and start its service."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from anydepth.calibration.guarantee import RiskTable
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import open_engine
from anydepth.decoding.sampling_options import use_defaults
from anydepth.draft_sections import DRAFT
from anydepth.engine.backends.cpu.native import why_not
from anydepth.errors import RunError, Unsupported, UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.json_io import read_document
from anydepth.models.load import AUTO, NATIVE, DType, has_blocks
from anydepth.models.target import local_folder
from anydepth.serve.budgets import Budgets
from anydepth.serve.service import Service
from anydepth.speculation.draft import why_no_draft
from anydepth.training.checkpoint import load_draft, load_target, run_options
from anydepth.training.corpora import check_corpus
from anydepth.training.data import load_windows

BUDGET_WINDOWS, BUDGET_LENGTH = 16, 128
log = logging.getLogger("anydepth.serve")


Opened = TypeVar("Opened")


def as_recorded(
    target: str, engine: str, weights: str | None, dtype: DType = AUTO, device: str = "cpu"
) -> tuple[str, str | None]:
    """Return the engine and the weights to run a target with: those given, else those that its folder records.

    They are recorded for the CPU, and do not hold for another device.
    """
    run = run_options(target) if device.split(":")[0] == "cpu" else {}
    if weights is None and engine in ("auto", run.get("engine")) and dtype in (AUTO, run.get("dtype")):
        return (run.get("engine", engine) if engine == "auto" else engine), run.get("weights")
    return engine, weights


def native_first(
    open_as: Callable[[str | None], Opened],
    target: str,
    weights: str | None,
    say: Callable[[str], None],
    *,
    engine: str = "auto",
    dtype: DType = "auto",
    device: str = "cpu",
    compiled: bool = False,
) -> Opened:
    """Return `open_as(weights)`; run a .gguf file in its own blocks if no other weights are named."""
    if weights is None and engine in ("auto", "fast") and not compiled and has_blocks(target, dtype, device):
        try:
            return open_as(NATIVE)
        except Unsupported as error:
            say(f"{target} is dequantised: {error}")
    return open_as(weights)


def open_target(
    target: str,
    *,
    engine: str = "auto",
    weights: str | None = None,
    compiled: bool = False,
    lossless: bool | None = False,
    generation_config: str = "auto",
    say: Callable[[str], None] = log.warning,
    **load: Any,
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Return the engine of a target of the command line, and its tokenizer.

    Args:
        engine, weights, compiled, say: see `open_engine`; by default a folder runs as it records, and a .gguf file in
            its own blocks if it can.
        lossless: draft in any case; None: if the target can.
        generation_config: auto: requests default to the model's own sampling options; none: they do not.
        load: options of `load_target`.
    """
    options = (load.get("overrides") or {}).get(DRAFT)
    engine, weights = as_recorded(target, engine, weights, load.get("dtype", AUTO), load.get("device", "cpu"))

    def open_as(kind: str | None) -> tuple[Engine, PreTrainedTokenizerBase]:
        adapted, tokenizer = load_target(target, merge=True, native=kind == NATIVE, **load)
        drafts = why_no_draft(adapted.backbone, adapted.attached) is None if lossless is None else lossless
        use_defaults(adapted.generation_config, generation_config)
        draft = load_draft(target, adapted, lossless=drafts, options=options)
        return open_engine(adapted.eval(), engine, kind, say, draft=draft, compiled=compiled), tokenizer

    of_load = {name: load[name] for name in ("dtype", "device") if name in load}
    return native_first(open_as, target, weights, say, engine=engine, compiled=compiled, **of_load)


def open_to_inspect(target: str, *, dtype: DType = AUTO, device: str = "cpu") -> AdaptedModel:
    """Return a target with its weights as `generate` and `serve` run them by default: a .gguf file's in blocks."""
    _, weights = as_recorded(target, "auto", None, dtype, device)
    in_blocks = weights == NATIVE or (weights is None and has_blocks(target, dtype, device))
    native = in_blocks and why_not(torch.bfloat16, torch.device("cpu")) is None
    return load_target(target, dtype=dtype, device=device, native=native)[0]


def risk_table(target: str, engine: Engine, *, is_changed: bool) -> RiskTable | None:
    """Return the settings that `calibrate --max-risk` tested when it wrote a folder.

    None: it did not, or their risk is not known here: options change what runs, or other weights or types do.
    """
    path = local_folder(target) / "calibrate.json"
    if not path.is_file():
        return None
    document = read_document(path)
    table = RiskTable.of(document)
    same = engine.weights == document["config"].get("dtype") and not is_changed
    if table is not None and not same:
        log.warning("%s was calibrated by risk, which does not hold for other options, weights or types", target)
    return table if same else None


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
    **limits: Any,
) -> tuple[Service, PreTrainedTokenizerBase]:
    """Return a `Service` for a target of the command line, and its tokenizer.

    Options are as in `load_target` and `open_engine`, which raise `UserError`.

    Args:
        data: text on which depth budgets are calibrated.
        generation_config: auto: requests default to the model's own sampling options; none: they do not.
        limits: `max_batch_size`, `max_tokens`, `max_queue` and `prefix_tokens` of the service.
    """
    check_corpus(data)
    load: dict[str, Any] = {"dtype": dtype, "device": device, "overrides": overrides, "skip_share": skip_share}
    engine, tokenizer = open_target(target, weights=weights, lossless=None, generation_config=generation_config, **load)
    adapted = engine.adapted
    budgets = None
    if adapted.attached:
        windows = load_windows(data, tokenizer, BUDGET_LENGTH, max_windows=BUDGET_WINDOWS)
        tested = risk_table(target, engine, is_changed=bool(overrides) or skip_share is not None)
        with suppress(RunError, UserError):  # no method has a threshold
            budgets = Budgets(engine, windows, tested)
    drafts = run_options(target).get("draft") is not None and engine.drafting is not None
    return Service(engine, tokenizer, budgets=budgets, is_lossless=drafts, **limits), tokenizer
