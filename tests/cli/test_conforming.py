"""The command `conform`: one document, one line for each mistake, and an exit code that says whether all passed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from commands import anydepth, refused
from fake_server import fake_server


def test_it_prints_a_document_and_a_table() -> None:
    with fake_server() as url:
        done = anydepth(
            "conform", f"{url}/v1", "--only", "streaming", "--only", "usage", "--json", "--api-key", "secret"
        )
        table = anydepth("conform", url, "--only", "echo")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "anydepth.conform/1" and document["passed"] is True
    assert [(one["check"], one["endpoint"], one["result"]) for one in document["outcomes"]] == [
        (check, endpoint, "passed") for check in ("streaming", "usage") for endpoint in ("completions", "chat")
    ]
    assert document["config"]["only"] == ["streaming", "usage"] and "secret" not in done.stdout
    assert done.stderr.splitlines()[0] == "streaming, completions …"
    assert table.returncode == 0 and "echo   completions  passed  prompts come back" in table.stdout


def test_a_failed_check_is_exit_code_1_and_named() -> None:
    with fake_server("the cut is one character late") as url:
        done = anydepth("conform", url, "--only", "stop", "--only", "greedy", "--quiet", "--json")
    assert done.returncode == 1
    assert done.stderr == "anydepth: 2 of 4 checks failed: stop (completions), stop (chat)\n"
    failed = json.loads(done.stdout)["outcomes"][0]
    assert failed["result"] == "failed" and len(failed["failures"]) == 5


def test_a_mistake_is_one_line() -> None:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        nothing = f"http://127.0.0.1:{line.getsockname()[1]}"  # bound, and refuses connections
        assert "does not answer" in refused("conform", nothing) and "connection refused" in refused("conform", nothing)
    assert "is not the URL of a server" in refused("conform", "ftp://localhost:8000")
    assert "http://127.0.0.1:1 does not answer" in refused("conform", "127.0.0.1:1")
    assert "is not a URL" in refused("conform", "http://127.0.0.1:port")
    assert "there is no check 'stops'; --only takes streaming" in refused("conform", nothing, "--only", "stops")
    assert "give the second one by --against URL" in refused("conform", nothing, "--only", "against")
    assert "--timeout is a number" in refused("conform", nothing, "--timeout", 0)
    with fake_server() as url, fake_server(chat=True) as other:
        assert "has no model 'gpt'; it has fake" in refused("conform", url, "--model", "gpt")
        assert "does not answer" in refused("conform", url, "--against", nothing)
        assert anydepth("conform", url, "--against", other, "--only", "against").returncode == 0
        assert "lists no model (status 404); give --model" in refused("conform", f"{url}/elsewhere")
        assert "neither completions nor chat" in refused("conform", f"{url}/elsewhere", "--model", "fake")


@pytest.mark.parametrize("module", ["torch", "transformers", "pydantic_core"])
def test_mistakes_need_no_time_to_import(module: str) -> None:
    """The checks use the standard library alone."""
    code = f"import anydepth.conform.run, sys; sys.exit('{module}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
