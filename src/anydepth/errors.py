"""The errors that end a command: a mistake of the user (exit code 2) and a failed run (exit code 1).

The message is one line: what came, what is allowed, what to do. Only `cli` prints it.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user: a wrong option, file, model or recipe. Exit code 2."""


class Unsupported(UserError):
    """A model or weights that the fast engine does not run here."""


class RunError(Exception):
    """A failed run: training diverged, a gate got no gradient, or a self-check failed. Exit code 1."""
