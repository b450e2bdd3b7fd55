"""Entry point of the ``jaxpaged`` program."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

_OF_SERVERS = {"fastapi", "h11", "httpx", "prometheus_client", "pydantic", "starlette", "uvicorn"}
"""Modules that the extra ``serve`` brings, and ``model`` does not."""


def main() -> NoReturn:
    """Runs the command line and ends the process with its exit status."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # no traceback of imports, until `listen`
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from jaxpaged.app import interrupt, timings

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller; else the next file opened takes its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        # Not every terminal's encoding has every character that a model writes.
        getattr(sys, name).reconfigure(errors="replace")
    timings.mark_start()
    interrupt.listen()  # before slow imports
    try:
        from jaxpaged.app.commands import application

        status = application.status(prog_name="jaxpaged")
    except ModuleNotFoundError as error:
        print(f"jaxpaged: error: {_missing(error)}", file=sys.stderr)
        status = 2
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # already reported
            stream.flush()
    # An ordinary exit first frees everything, for a third of a second in which Ctrl-C still shows a traceback.
    os._exit(status)


def _missing(error: ModuleNotFoundError) -> str:
    """One line that names the extra to install; raises the error again if a module of jaxpaged is missing."""
    module = (error.name or "jaxpaged").partition(".")[0]
    if module.startswith("jaxpaged"):
        raise error
    serves = module in _OF_SERVERS or sys.argv[1:2] in (["serve"], ["bench-serve"])
    extra = "serve" if serves else "model"
    return f"this command needs the package {module!r}: pip install 'jaxpaged[{extra}]'"


if __name__ == "__main__":
    main()
