"""A server of anydepth's own to check: a tiny model with a chat template, and answers long enough to cancel."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from serving import running, tiny_router
from serving_here import TEMPLATE

LONG_WINDOW = 4096


@pytest.fixture(scope="session")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tiny_router(tmp_path_factory.mktemp("conform"))
    for name, changes in {
        "config.json": {"max_position_embeddings": LONG_WINDOW},
        "tokenizer_config.json": {"chat_template": TEMPLATE},
    }.items():
        path = folder / "base" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with running(folder) as address:
        yield address
