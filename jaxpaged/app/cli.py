"""``jaxpaged``: the process that runs a command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from jaxpaged.app import interrupt, timings


def main() -> NoReturn:
    """Runs the command line and ends the process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller; else the next file opened takes its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    timings.mark_start()
    interrupt.listen()  # before the first import that takes long
    from jaxpaged.app.commands import application

    status = application.status(prog_name="jaxpaged")
    sys.stdout.flush()
    sys.stderr.flush()
    # An ordinary exit frees everything first: a third of a second, in which Ctrl-C could still show a traceback.
    os._exit(status)


if __name__ == "__main__":
    main()
