"""Worker processes of tpu_scripts: rows in order, answers, and one line for each kind of failure."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tpu_scripts.workers import Worker, WorkerFailed, run_as_worker

HERE = {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))}


def work(count=0, end="", answers=False):
    for number in range(count):
        print("noise")  # stdout of a worker is not mixed with its rows
        yield {"number": number}
    if answers:
        yield from (int(line) + 1 for line in sys.stdin)
    if end == "error":
        raise ValueError("no luck")
    if end == "status":
        sys.exit(7)
    if end == "signal":
        os.abort()
    if end == "hang":
        time.sleep(600)


def worker(**task):
    return Worker("test_workers", task, HERE)


def test_rows_come_in_order():
    with worker(count=3) as process:
        assert list(process.rows()) == [{"number": n} for n in range(3)]


def test_requests_are_answered():
    with worker(answers=True) as process:
        assert [process.ask(n) for n in (1, 5, 2)] == [2, 6, 3]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("error", "exit status 1: ValueError: no luck"),
        ("status", "exit status 7: noise"),
        ("signal", "SIGABRT: "),
        ("hang", "no result within 0.5 s"),
    ],
)
def test_a_failure_is_one_line_behind_the_rows(end, reason):
    with worker(count=1, end=end) as process:
        rows = process.rows()
        assert next(rows) == {"number": 0}
        process._limit = 0.5 if end == "hang" else None
        with pytest.raises(WorkerFailed) as failed:
            next(rows)
    assert str(failed.value).startswith(reason) and "\n" not in str(failed.value)


def test_a_worker_that_ends_without_an_answer_failed():
    with worker() as process, pytest.raises(WorkerFailed, match="ended without an answer"):
        process.ask(1)


if __name__ == "__main__":
    run_as_worker(work)
