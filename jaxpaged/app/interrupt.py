"""Ctrl-C, handled on a thread of its own: ends the process at once, or requests its end.

Python handles signals on the main thread between two instructions: a compilation or a long prompt would have to
finish first, and a KeyboardInterrupt that is raised inside a library may be printed and lost.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

STATUS = 130


class _Mode(Enum):
    EXIT = "the process exits"
    REQUEST = "the first is a request, the second ends the process"
    RAISE = "the main thread gets a KeyboardInterrupt"


_mode = _Mode.EXIT
_requested = threading.Event()
_callbacks: list[Callable[[], None]] = []


def listen() -> None:
    """Makes Ctrl-C end the process with STATUS and no traceback; call it on the main thread."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _nothing)
    threading.Thread(target=_listen, args=(reader, writer), name="interrupt", daemon=True).start()


def defer() -> None:
    """Makes the first Ctrl-C a request: the caller checks ``requested`` and ends."""
    global _mode
    _mode = _Mode.REQUEST


def requested() -> bool:
    """True if Ctrl-C was pressed since ``defer``."""
    return _requested.is_set()


@contextmanager
def raising() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt in the main thread; afterwards it is deferred."""
    global _mode
    _mode = _Mode.RAISE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    _requested.clear()
    _mode = _Mode.REQUEST


@contextmanager
def before_exit(callback: Callable[[], None]) -> Iterator[None]:
    """Calls ``callback`` on another thread if Ctrl-C ends the process inside the context."""
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.remove(callback)


def _nothing(*_: Any) -> None:
    """Signal handler, without which Python does not write to the wakeup socket."""


def _listen(reader: socket.socket, _writer: socket.socket) -> None:
    while reader.recv(1):
        if _mode is _Mode.REQUEST and not _requested.is_set():
            _requested.set()
        elif _mode is not _Mode.RAISE:
            try:
                for callback in reversed(_callbacks):
                    callback()
                if sys.stderr.isatty():
                    sys.stderr.write("\n")
            finally:
                os._exit(STATUS)
