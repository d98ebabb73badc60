"""The two errors that end a command: a mistake of the user's (exit code 2) and a failed run (exit code 1).

Each carries one line: what came, what is allowed, what to do. Only `cli` prints them.
"""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake: a wrong option, file, model or recipe. Exit code 2."""


class RunError(Exception):
    """The run itself failed: training diverged, a gate got no gradient, a self-check failed. Exit code 1."""
