"""The application with which commands register."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="anydepth",
    help="Make a pretrained language model spend less compute on easy tokens, and measure what that buys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
