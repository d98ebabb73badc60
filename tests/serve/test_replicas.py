"""recipes/serve_replicas.py on a local Ray: two processes answer as one, and one that is killed is replaced."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serving import tiny_router

# What Ray warns of itself about is not ours.
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
RECIPE = Path(__file__).parents[2] / "recipes" / "serve_replicas.py"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve

    target = tiny_router(tmp_path_factory.mktemp("served"))
    spec = importlib.util.spec_from_file_location("serve_replicas", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe: Any = importlib.util.module_from_spec(spec)
    sys.modules["serve_replicas"] = recipe
    spec.loader.exec_module(recipe)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A machine that is busy with other tests takes longer than the five seconds that Ray gives.
    os.environ |= {f"RAY_SERVE_PROXY_{which}_CHECK_TIMEOUT_S": "60" for which in ("READY", "HEALTH")}
    environment = {"env_vars": {"PYTHONPATH": str(RECIPE.parent), "HF_HUB_OFFLINE": "1"}}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"target": str(target / "router"), "name": "tiny", "data": str(target / "text.txt")}
        serve.run(recipe.build({**arguments, "dtype": "float32", "replicas": "2"}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(address: str, number: int, **more: Any) -> str:
    body = {"model": "tiny", "prompt": "the sea is wide"[: 3 + number], "max_tokens": 5 + number, "temperature": 0}
    answer = httpx.post(f"{address}/v1/completions", json={**body, **more}, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def running() -> set[int]:
    """Processes that are replicas."""
    lines = {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
    return {pid for pid, line in lines.items() if "ServeReplica:default:anydepth" in line}


def test_two_answer_as_one_and_a_killed_one_comes_back(address: str) -> None:
    alone = [ask(address, number) for number in range(10)]
    with ThreadPoolExecutor(10) as together:
        assert list(together.map(lambda number: ask(address, number), range(10))) == alone
    with httpx.stream(
        "POST",
        f"{address}/v1/completions",
        json={"model": "tiny", "prompt": "the", "max_tokens": 5, "temperature": 0, "stream": True},
        timeout=60,
    ) as stream:
        assert list(stream.iter_lines())[-2].strip() in ("data: [DONE]", "")
    refused = httpx.post(f"{address}/v1/completions", json={"model": "other", "prompt": "a"}, timeout=60)
    assert refused.status_code == 404 and refused.json()["error"]["type"] == "not_found_error"
    before = running()
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    deadline, back = time.monotonic() + 300, set[int]()
    while len(back) < 2 or back == before:
        assert time.monotonic() < deadline, "no other replica came"
        try:
            assert ask(address, 3) == alone[3]  # the other one goes on
        except httpx.HTTPStatusError as lost:
            if lost.response.status_code < 500:  # else it was on its way to the one that was killed
                raise
        time.sleep(0.5)
        back = running()
    assert [ask(address, number) for number in range(10)] == alone
