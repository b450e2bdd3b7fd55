"""Worker processes: a script that does a part of its work in a process of its own, and sends rows of JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_FLAG = "--worker"


class WorkerFailed(Exception):
    """A worker that crashed or hung; the message is one line."""


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def run_as_worker(work: Callable[..., Iterable[Any]]) -> bool:
    """Sends the rows of ``work(**task)``, if this process is a worker; returns False elsewhere."""
    if sys.argv[1:2] != [_FLAG]:
        return False
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr, at once, so that a traceback comes last
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    for row in work(**json.loads(sys.argv[2])):
        print(json.dumps(row), file=rows, flush=True)
    return True


class Worker:
    """Process of ``python -m module`` that calls ``run_as_worker``."""

    def __init__(
        self, module: str, task: Mapping[str, Any], environment: Mapping[str, str], limit: float | None = None
    ) -> None:
        """Starts the process; ``limit``: seconds without a row after which it counts as hung."""
        self._limit = limit
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        # Without filtering, the last line of a traceback is the exception.
        added = {"JAX_TRACEBACK_FILTERING": "off", **environment}
        command = [sys.executable, "-m", module, _FLAG, json.dumps(task)]
        streams: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self._errors,
        }
        self._process = subprocess.Popen(command, cwd=ROOT, env=os.environ | added, text=True, **streams)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._reader.join()
        with contextlib.suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)
        self._errors.close()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def rows(self) -> Iterator[Any]:
        """Yields rows until the worker ends.

        Raises:
          WorkerFailed: it ended with a status other than 0, or hangs.
        """
        while True:
            try:
                line = self._lines.get(timeout=self._limit)
            except queue.Empty:
                raise WorkerFailed(f"no result within {self._limit:g} s") from None
            if not line:
                break
            yield json.loads(line)
        if status := self._process.wait():
            ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            self._errors.seek(0)
            raise WorkerFailed(f"{ended}: {last_line(self._errors.read())}"[:300])

    def ask(self, request: Any) -> Any:
        """Sends a line of JSON to the worker's stdin, and returns the row that answers it.

        Raises:
          WorkerFailed: the worker ended instead.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        for row in self.rows():
            return row
        raise WorkerFailed("it ended without an answer")
