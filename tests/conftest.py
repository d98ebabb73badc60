"""Offline, one thread, and the tiny models of every family, built once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from transformers import PreTrainedModel

import families

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quiet_models() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()


@pytest.fixture(params=sorted(families.CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A fresh tiny model of the family; tests may change it."""
    return families.build(family)
