"""anydepth's own server passes every check, drafted answers too."""

from __future__ import annotations

import pytest

from anydepth.conform import checks_protocol
from anydepth.conform.client import Client
from anydepth.conform.run import CHECKS, chosen, open_servers, run


@pytest.mark.timeout(180)
def test_our_server_conforms(own_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_protocol, "LEAST_SECONDS", 0.2)  # a tiny model is done soon on a fast machine
    client = Client(own_server, timeout=60)
    found = run(open_servers(client, None, client, seed=0), chosen([]))
    print("\n".join(f"{one.check}, {one.endpoint}: {one.result}, {one.seconds:.1f} s: {one.line}" for one in found))
    assert {(one.check, one.endpoint) for one in found} >= {
        (check.name, name) for check in CHECKS if not check.once for name in ("completions", "chat")
    }
    assert [(one.check, one.endpoint, one.line) for one in found if one.result != "passed"] == []
