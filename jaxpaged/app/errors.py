"""What ends a command with one line instead of a traceback."""

from __future__ import annotations

import click


class InputError(click.ClickException):
    """Something the user gave cannot be used; the message names what is wrong and what is allowed."""

    exit_code = 2


def say(line: str) -> None:
    """One line to the user beside the output: on stderr, so that stdout stays the result."""
    click.echo(f"jaxpaged: {line}", err=True)
