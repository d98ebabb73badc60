"""The command that checks an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Option

from anydepth.cli import options as opt
from anydepth.cli.display import table
from anydepth.errors import RunError, UserError

COLUMNS = {"check": "check", "endpoint": "endpoint", "result": "result", "line": "found"}


@opt.command(without=("device", "dtype", "threads"))
def conform(
    call: opt.Call,
    url: Annotated[str, Argument(help="Address of the server, with or without /v1 at its end.")],
    model: Annotated[str | None, Option(help="Check this model; default: the first of /v1/models.")] = None,
    api_key: Annotated[
        str | None, Option("--api-key", envvar="ANYDEPTH_API_KEY", help="Send this key; default: none.")
    ] = None,
    against: Annotated[
        str | None,
        Option(help="Compare answers with this server of the same model: a speculative decoder with a plain one."),
    ] = None,
    only: Annotated[list[str] | None, Option(help="Run only this check; repeatable.")] = None,
    timeout: Annotated[float, Option(help="Give up an answer after this many seconds without a byte.")] = 120.0,
) -> None:
    """Check what an OpenAI-compatible server answers.

    It also checks a speculative decoder, --against the same model without one.

    Compares streams with complete answers, cuts at stop strings, repeats seeds, adds up log-probabilities and tokens,
    disconnects, and sends mistakes. The exit code is 1 if a check fails.
    """
    from anydepth.conform.client import Client
    from anydepth.conform.run import chosen, open_servers, run

    if timeout <= 0:
        raise UserError(f"--timeout is a number of seconds above 0; got {timeout:g}")
    checks = chosen(only or [], with_other=against is not None)
    client = Client(url, api_key, timeout)
    other = None if against is None else Client(against, api_key, timeout)
    server = open_servers(client, model, other, call.seed)
    outcomes = run(server, checks, call.progress)

    from anydepth.measure.results import document

    failed = [outcome for outcome in outcomes if outcome.result == "failed"]
    config = {"url": url, "model": model, "against": against, "only": [check.name for check in checks]}
    fields = {"url": url, "model": server.model, "passed": not failed, "outcomes": outcomes}
    schema = "anydepth.conform/1"
    call.result(document(schema, seed=call.seed, config={**config, "timeout": timeout}, **fields), show_outcomes)
    if failed:
        names = ", ".join(f"{outcome.check} ({outcome.endpoint})" for outcome in failed)
        raise RunError(f"{len(failed)} of {len(outcomes)} checks failed: {names}")


def show_outcomes(document: dict[str, Any]) -> None:
    print(f"{document['model']} at {document['url']}")
    table(COLUMNS, document["outcomes"], text=tuple(COLUMNS))
