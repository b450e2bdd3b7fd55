"""Ctrl-C, heard on a thread of its own: it ends the process at once, or only asks for the end.

Python hands a signal to the main thread, between two instructions: a compilation or a long prompt would have to
end first, and a KeyboardInterrupt that comes up inside a library may be printed and lost.
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
    LEAVE = "the process ends"
    NOTE = "the first is noted, the second ends the process"
    RAISE = "the main thread gets a KeyboardInterrupt"


_mode = _Mode.LEAVE
_noted = threading.Event()
_callbacks: list[Callable[[], None]] = []


def listen() -> None:
    """From now on Ctrl-C ends the process with STATUS, without a word. For the main thread of a command's process."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _nothing)
    threading.Thread(target=_hear, args=(reader, writer), name="interrupt", daemon=True).start()


def defer() -> None:
    """From now on the first Ctrl-C is only noted: the caller looks at ``asked`` and comes to an end."""
    global _mode
    _mode = _Mode.NOTE


def requested() -> bool:
    """Whether Ctrl-C came since ``defer``."""
    return _noted.is_set()


@contextmanager
def raising() -> Iterator[None]:
    """While the main thread waits for its user, Ctrl-C is a KeyboardInterrupt; afterwards it is deferred."""
    global _mode
    _mode = _Mode.RAISE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    _noted.clear()
    _mode = _Mode.NOTE


@contextmanager
def before_exit(callback: Callable[[], None]) -> Iterator[None]:
    """Calls ``callback``, on another thread, should Ctrl-C end the process in here."""
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.remove(callback)


def _nothing(*_: Any) -> None:
    """The handler: Python writes to the wakeup socket only where there is one."""


def _hear(reader: socket.socket, _writer: socket.socket) -> None:
    while reader.recv(1):
        if _mode is _Mode.NOTE and not _noted.is_set():
            _noted.set()
        elif _mode is not _Mode.RAISE:
            try:
                for callback in reversed(_callbacks):
                    callback()
                if sys.stderr.isatty():
                    sys.stderr.write("\n")
            finally:
                os._exit(STATUS)
