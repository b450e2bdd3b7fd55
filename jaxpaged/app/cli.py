"""Entry point of the ``jaxpaged`` program."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

from jaxpaged.app import interrupt, timings


def main() -> NoReturn:
    """Runs the command line and ends the process with its exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller; else the next file opened takes its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        # Not every terminal's encoding has every character that a model writes.
        getattr(sys, name).reconfigure(errors="replace")
    timings.mark_start()
    interrupt.listen()  # before slow imports
    from jaxpaged.app.commands import application

    status = application.status(prog_name="jaxpaged")
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # already reported
            stream.flush()
    # An ordinary exit first frees everything, for a third of a second in which Ctrl-C still shows a traceback.
    os._exit(status)


if __name__ == "__main__":
    main()
