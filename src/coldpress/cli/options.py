"""Options that several verbs have, in the same words."""

from __future__ import annotations

import click

__all__ = ["log_format_option", "trust_option"]

trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    envvar="COLDPRESS_TRUST_REMOTE_CODE",
    help="Agree to run Python code that comes with the checkpoint, where it is asked for.",
)
log_format_option = click.option(
    "--log-format",
    type=click.Choice(["auto", "plain", "json"]),
    default="auto",
    show_default=True,
    help="auto: live on a terminal, plain lines elsewhere; json: one event a line.",
)
