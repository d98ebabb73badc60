"""The rank of this process, from the environment of a launcher."""

from __future__ import annotations

import pytest

from anydepth.processes import is_parallel, rank, shards_weights


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (False, 0, False)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (True, 1, False)),
        ({"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "True"}, (True, 0, True)),
        ({"RANK": "3"}, (False, 0, False)),  # set by something else: a single process always writes
        ({"RANK": "3", "WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "false"}, (False, 0, False)),
    ],
)
def test_what_a_launcher_set(
    environment: dict[str, str], wanted: tuple[bool, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (is_parallel(), rank(), shards_weights()) == wanted
