"""Guards around the loaders of libraries: damaged files are one-line errors, and progress bars are off."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from anydepth.errors import UserError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise `UserError` for any error in reading `what`, because damaged files raise errors of many kinds."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if isinstance(error, ImportError):
            raise UserError(f"{what} needs a package that is not installed ({reason})") from error
        damaged = f"{what} could not be read ({reason}); its files are damaged or incomplete: fetch or copy them again"
        raise UserError(damaged) from error


def check_whole(name: str, report: dict[str, Any], head: str | None = None, architectures: Any = None) -> None:
    """Raise `UserError` for missing weights, which transformers fills with random numbers.

    Args:
        head: name of the head's weight, which checkpoints of base models lack.
        architectures: classes of the model that was saved, as its config names them.
    """
    missing = sorted(report["missing_keys"])
    if missing == [head]:
        saved = f" (a {architectures[0]})" if architectures else ""
        raise UserError(
            f"'{name}'{saved} has no head that predicts tokens ({head}); give the checkpoint of the causal language "
            "model"
        )
    if missing:
        raise UserError(f"'{name}' lacks the weight {missing[0]}; its files are incomplete: fetch or copy them again")


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' progress bars and hints."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
