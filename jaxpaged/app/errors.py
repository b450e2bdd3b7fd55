"""Errors that end a command with one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


class InputError(click.ClickException):
    """Bad input; the message names what is wrong and what is allowed."""

    exit_code = 2


def say(line: str) -> None:
    """Prints a line on stderr; stdout is for results alone."""
    click.echo(f"jaxpaged: {line}", err=True)


def nan_message(dtype: str) -> str:
    """Error message for NaN in the logits of a model that computes in ``dtype``."""
    other = "; --dtype f32 has the range that f16 lacks" if dtype == "f16" else ""
    return f"the model's logits are NaN: its weights hold NaN, or overflow in {dtype}{other}"


@contextmanager
def out_of_memory_is_input(advice: str) -> Iterator[None]:
    """Turns running out of memory into an InputError that ends with ``advice``."""
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "allocation failed"
        raise InputError(f"out of memory: {reason}; {advice}") from error
