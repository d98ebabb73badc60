"""Offline, one thread, a cache folder of the tests' own, and the tiny models of every family, built once."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from transformers import PreTrainedModel

import families

OWN_CACHE = "ANYDEPTH_TESTS_CACHE"
KEPT = ("native", "inductor", "int4")
"""Folders of this machine's cache that are used, and made, since what is in them takes long to make."""


def _use_own_cache() -> None:
    """Use a temporary cache folder; workers of xdist and commands share it, by the environment.

    It links to what takes long to make; metadata of .gguf files, which tests write many of, is its own.
    """
    if OWN_CACHE in os.environ:
        return
    kept = Path(os.environ.get("ANYDEPTH_CACHE") or Path.home() / ".cache" / "anydepth")
    for name in KEPT:
        (kept / name).mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="anydepth-tests-"))
    for path in kept.iterdir():
        if path.name != "gguf":
            (own / path.name).symlink_to(path)
    os.environ |= {"ANYDEPTH_CACHE": str(own), OWN_CACHE: "1"}
    maker = os.getpid()
    atexit.register(lambda: shutil.rmtree(own, ignore_errors=True) if os.getpid() == maker else None)


_use_own_cache()
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quiet_models() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()


@pytest.fixture(params=sorted(families.CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    if not families.is_available(request.param):
        pytest.skip(f"this transformers has no {request.param}")
    return request.param


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A fresh tiny model of the family; tests may change it."""
    return families.build(family)
