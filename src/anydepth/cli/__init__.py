"""The command line, and the only place that prints errors: one line, exit code 2 for a mistake, 1 for a failed run.

Commands import other packages when they run, so that `--help` and errors in options need no time.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings

import typer

# Imported for the commands that they register, in the order of the help.
from anydepth.cli import tuning, training, calibrating, evaluating, benching, analysis, generating, conforming  # noqa: F401  # isort: skip
from anydepth.cli.options import app
from anydepth.errors import RunError, UserError
from anydepth.processes import is_parallel, rank

INTERRUPTED = 128 + signal.SIGINT
AFTER_INTERRUPT = {
    "train": "; train --resume continues",
    "tune": "; nothing was written",
    **dict.fromkeys(("run", "sweep", "demo"), "; the same command continues"),
}


def main() -> None:
    """Run a command; turn every error into one line and an exit code."""
    sys.exit(_exit_code(sys.argv[1:]))


def _exit_code(arguments: list[str]) -> int:
    _silence_libraries(quiet=not {"--quiet", "-q"}.isdisjoint(arguments))
    interrupted = f"interrupted{AFTER_INTERRUPT.get(arguments[0], '') if arguments else ''}"
    try:
        if is_parallel() and arguments[:1] != ["train"]:
            raise UserError("only train runs in several processes; start this command without a launcher")
        # typer returns 130 after Ctrl-C.
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
        # The reader has ended, as `head` does, which is no failure. Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if os.environ.get("ANYDEPTH_DEBUG") == "1":
            raise
        reason = " ".join(str(error).split())[:300]
        return _fail(f"failed with {type(error).__name__}: {reason} (ANYDEPTH_DEBUG=1 shows where)", 1)
    return 0


def _silence_libraries(quiet: bool) -> None:
    """Keep warnings and logs of libraries out of the output; their progress bars too if `quiet`."""
    # These warnings are about coming versions of libraries, which a user of a command cannot change.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It reports on import that it has no kernels.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # It logs five retries before the error.
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # This hides transformers' bars too.


def _fail(line: str, code: int) -> int:
    name = f"anydepth (process {rank()})" if rank() > 0 else "anydepth"
    print(f"{name}: {' '.join(line.split())}", file=sys.stderr)
    return code
