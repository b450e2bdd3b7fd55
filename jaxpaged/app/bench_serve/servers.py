"""``jaxpaged serve`` as a child process on a free port of the loopback interface."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO

import httpx

from jaxpaged.app import interrupt
from jaxpaged.app.errors import InputError

HOST = "127.0.0.1"
_KEYS = ("JAXPAGED_API_KEY", "LLAMA_API_KEY")
_LISTENING = re.compile(r"^listening on (http://\S+)\n", re.MULTILINE)
_LOOK_SECONDS = 0.2
_DRAIN_SECONDS, _KILL_SECONDS = 2, 15
_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Variant:
    """A name, and flags of the server."""

    name: str
    flags: tuple[str, ...]


class OwnServer:
    """A server's process; ``stop`` may be called from any thread."""

    def __init__(self, flags: Sequence[str]) -> None:
        self._command = [
            sys.executable, "-m", "jaxpaged.app.cli", "serve", *flags,
            "--host", HOST, "--port", "0", "--drain-seconds", str(_DRAIN_SECONDS),
        ]  # fmt: skip
        # A file, because nobody reads a pipe during the load, and a full one would block the server. Appended to,
        # because both processes share its offset.
        self._log: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 # closed by stop
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process, unless ``stop`` came first."""
        with self._lock:
            if self._log.closed:
                return
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                # The keys of this process are for other servers.
                env={name: value for name, value in os.environ.items() if name not in _KEYS},
                # Ctrl-C on the terminal is for this process, which then stops the server.
                start_new_session=True,
            )

    def wait_until_ready(self, seconds: float) -> str:
        """Address of the server, once it is ready.

        Raises:
          InputError: it ended, or is not ready within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self._process.poll() if self._process else 0
            output = self.output()
            if status is not None:
                raise InputError(f"the server ended with status {status}: {_last_line(output)}")
            if (match := _LISTENING.search(output)) and _is_healthy(match[1]):
                return match[1]
            time.sleep(_LOOK_SECONDS)
        raise InputError(
            f"the server did not start within {seconds:g} s (--start-timeout): {_last_line(self.output())}"
        )

    def stop(self) -> None:
        """Ends the process by SIGTERM, or SIGKILL if that takes too long; idempotent."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                try:
                    self._process.wait(_DRAIN_SECONDS + _KILL_SECONDS)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            self._log.close()

    def output(self) -> str:
        """Everything that it printed."""
        with self._lock:
            if self._log.closed:
                return ""
            self._log.seek(0)
            return self._log.read().decode(errors="replace")


def _last_line(output: str) -> str:
    return next(
        (line.strip() for line in reversed(output.splitlines()) if line.strip()), "it printed nothing"
    )


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=5.0).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextmanager
def serving(variant: Variant, start_seconds: float) -> Iterator[str]:
    """Runs a server inside the context, and yields its address.

    Ctrl-C and SIGTERM end the server before they end this process.

    Raises:
      InputError: it does not start.
    """
    server = OwnServer(variant.flags)
    with _before_the_end(server):
        try:
            server.start()
            yield server.wait_until_ready(start_seconds)
        finally:
            server.stop()


@contextmanager
def _before_the_end(server: OwnServer) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM stop the server before they end the process."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        # On another thread, because the main one may hold the lock of ``stop``.
        threading.Thread(target=end).start()

    def end() -> None:
        server.stop()
        os._exit(_TERMINATED)

    on_main = threading.current_thread() is threading.main_thread()  # others must not set handlers
    before = signal.signal(signal.SIGTERM, leave) if on_main else None
    try:
        with interrupt.before_exit(server.stop):
            yield
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, before)
