"""The command line. The one place that prints errors: one line, exit code 2 for a mistake, 1 for a failed run.

Commands import what they need when they run, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings

import typer

# Imported for the commands they register, in the order in which help lists them.
from anydepth.cli import training, calibrating, measuring, generating, serving  # noqa: F401  # isort: skip
from anydepth.cli.application import app
from anydepth.errors import RunError, UserError
from anydepth.processes import is_parallel, rank

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Entry point: runs a command and turns every error into one line and an exit code."""
    sys.exit(_exit_code(sys.argv[1:]))


def _exit_code(arguments: list[str]) -> int:
    # Libraries warn each other of coming versions; no user of a command can act on that.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it wants kernels from the hub, and says so on import
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # five lines of retries before the one that says it
    if {"--quiet", "-q"} & set(arguments):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' bars as well
    interrupted = "interrupted; `train --resume`, `run` and `sweep` go on where they were"
    try:
        if is_parallel() and arguments[:1] != ["train"]:
            raise UserError("train alone runs in several processes; start this command by itself, without a launcher")
        # typer turns Ctrl-C into a returned 130.
        if app(arguments or ["--help"], prog_name="anydepth", standalone_mode=False) == INTERRUPTED:
            return _fail(interrupted, INTERRUPTED)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        return _fail(f"{error.format_message()} (see {context.command_path if context else 'anydepth'} --help)", 2)
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(interrupted, INTERRUPTED)
    except BrokenPipeError:
        # The reader went away, as `head` does: not our failure. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("ANYDEPTH_DEBUG") == "1":
            raise
        reason = " ".join(str(error).split())[:300]
        return _fail(f"failed with {type(error).__name__}: {reason} (ANYDEPTH_DEBUG=1 shows where)", 1)
    return 0


def _fail(line: str, code: int) -> int:
    who = f"anydepth (process {rank()})" if rank() > 0 else "anydepth"
    print(f"{who}: {' '.join(line.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
