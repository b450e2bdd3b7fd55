"""Compilation that goes on beside the main thread's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_tasks: list[Future[Any]] = []


def start(task: Callable[[], Any]) -> Future[Any]:
    """Runs ``task()`` on a thread of its own, which does not keep the process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    _tasks.append(future)
    threading.Thread(target=run, daemon=True).start()
    return future


def wait() -> None:
    """Waits for all that was started; raises the exception of a task that failed."""
    for task in tuple(_tasks):
        try:
            task.result()
        finally:
            with contextlib.suppress(ValueError):  # another thread waited, too
                _tasks.remove(task)
