"""The list of checks, and the run of them on a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from anydepth.conform import checks_numbers, checks_protocol, checks_sampling, checks_text
from anydepth.conform.client import CheckError, Client
from anydepth.conform.endpoint import Endpoint, Findings, NotApplicable, Server, open_server
from anydepth.errors import UserError

MOST_FAILURES = 5
"""Failures of a check after which it ends: the others are likely to be the same fault."""
ALL = "all"
"""The name of the outcome of an endpoint that a server does not have."""


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        once: whether it runs on one endpoint alone, the first that there is.
        compares: whether it needs a second server.
    """

    name: str
    run: Callable[[Endpoint], Findings]
    once: bool = False
    compares: bool = False

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.run.__doc__ or "").splitlines()[0]


CHECKS = (
    Check("streaming", checks_text.streaming),
    Check("characters", checks_text.characters),
    Check("stop", checks_text.stop),
    Check("stop-streamed", checks_text.stop_streamed),
    Check("end", checks_text.end),
    Check("greedy", checks_sampling.greedy),
    Check("seed", checks_sampling.seed),
    Check("company", checks_sampling.company),
    Check("logprobs", checks_numbers.logprobs),
    Check("echo", checks_numbers.echo, once=True),
    Check("usage", checks_numbers.usage),
    Check("lossless", checks_sampling.lossless),
    Check("against", checks_sampling.against, compares=True),
    Check("against-sampled", checks_sampling.against_sampled, once=True, compares=True),
    Check("cancel", checks_protocol.cancel, once=True),
    Check("errors", checks_protocol.errors),
)
NAMES = tuple(check.name for check in CHECKS)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check on an endpoint; `line` is its first failure, the reason, or what was found."""

    check: str
    endpoint: str
    result: Literal["passed", "failed", "not applicable"]
    line: str
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def chosen(only: Sequence[str], *, with_other: bool = True) -> list[Check]:
    """Return the checks of these names, or all that can run with or without a second server.

    Raises:
        UserError: a name that there is not, or a check that needs a second server.
    """
    if unknown := [name for name in only if name not in NAMES]:
        raise UserError(f"there is no check '{unknown[0]}'; --only takes {', '.join(NAMES)}")
    found = [check for check in CHECKS if not only or check.name in only]
    if only and not with_other and any(check.compares for check in found):
        raise UserError("the check against compares two servers; give the second one by --against URL")
    return [check for check in found if with_other or not check.compares]


def open_servers(client: Client, model: str | None, other: Client | None, seed: int) -> Server:
    """Return a server to check, its endpoints with those of the server to compare with."""
    server = open_server(client, model, seed)
    if other is None:
        return server
    # The two serve one model under names that may differ.
    compared = open_server(other, seed=seed).endpoints
    pairs = {name: replace(endpoint, other=compared.get(name)) for name, endpoint in server.endpoints.items()}
    if all(endpoint.other is None for endpoint in pairs.values()):
        raise UserError(f"{client.url} and {other.url} have no endpoint in common; give two servers of one model")
    return replace(server, endpoints=pairs)


def run(server: Server, checks: Iterable[Check], begin: Callable[[str], None] = lambda _: None) -> list[Outcome]:
    """Run checks on each endpoint of a server; `begin` is called before each."""
    outcomes = [
        Outcome(ALL, name, "not applicable", f"the server has no such endpoint: {reason}")
        for name, reason in server.unavailable.items()
    ]
    for check in checks:
        for endpoint in list(server.endpoints.values())[: 1 if check.once else None]:
            begin(f"{check.name}, {endpoint.name} …")
            outcomes.append(run_one(check, endpoint))
    return outcomes


def run_one(check: Check, endpoint: Endpoint) -> Outcome:
    """Run a check; an answer with which it cannot continue is a failure."""
    begin, failures, remark = time.monotonic(), list[str](), list[str]()

    def findings() -> Findings:
        remark.append((yield from check.run(endpoint)))
        return ""

    try:
        failures += islice(findings(), MOST_FAILURES)
    except NotApplicable as reason:
        remark.append(str(reason))
        if not failures:
            return Outcome(check.name, endpoint.name, "not applicable", str(reason), [], time.monotonic() - begin)
    except CheckError as error:
        failures.append(str(error))
    except Exception as error:  # what a server sends must not end the other checks
        failures.append(f"the answer cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    line = failures[0] if failures else remark[0]
    if len(failures) > 1:
        more = f"at least {MOST_FAILURES - 1}" if len(failures) == MOST_FAILURES else str(len(failures) - 1)
        line += f" (and {more} more)"
    result = "failed" if failures else "passed"
    return Outcome(check.name, endpoint.name, result, line, failures, time.monotonic() - begin)
