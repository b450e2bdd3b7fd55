"""One run in two processes over loopback: the text of one device, and an end when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest

from model import tiny

TEXT = "class Stack:\n    def __init__(self"
GREEDY = ("-m", str(tiny.PATH), "--temp", "0")
SECONDS = 240


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment() -> dict[str, str]:
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxpaged.app.cli", *arguments]
    return subprocess.Popen(
        command, env=environment(), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@contextmanager
def two(*arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The command in two processes, which do not outlive the block."""
    ports = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id")
    processes = [start(*arguments, *ports, str(i)) for i in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each."""
    with ThreadPoolExecutor(len(processes)) as pool:
        told = list(pool.map(lambda process: process.communicate(timeout=SECONDS), processes))
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


@pytest.mark.parametrize(
    "flags",
    [("--mesh", "tensor=2"), ("--mesh", "data=2", "-np", "2"), ("--mesh", "tensor=2", "--beams", "3")],
    ids=str,
)
def test_the_text_is_that_of_one_device(flags):
    wanted = ("generate", *GREEDY, "-p", TEXT, "-n", "24", "--json")
    ((status, alone, _),) = ended([start(*wanted, *flags[2:])])
    assert status == 0
    with two(*wanted, *flags) as processes:
        (first, out, complaint), (second, nothing, _) = ended(processes)
    assert (first, second, nothing) == (0, 0, ""), complaint
    assert json.loads(out)["tokens"] == json.loads(alone)["tokens"]


@contextmanager
def server() -> Iterator[tuple[list[subprocess.Popen[str]], int]]:
    """Two processes that serve, once they are ready, and the port."""
    port = free_port()
    flags = ("--port", str(port), "-np", "4", "-c", "256", "--mesh", "tensor=2")
    with two("serve", *GREEDY[:2], *flags) as processes:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            assert [process.poll() for process in processes] == [None, None], ended(processes)
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield processes, port


def test_a_server_answers_many_at_once_and_a_dead_follower_ends_it():
    prompts = [TEXT, "def main(", "import os\n", "x = [", "for i in", "print("]
    with server() as (processes, port):

        def complete(prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": 16, "temperature": 0}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=SECONDS)
            return answer.raise_for_status().json()["choices"][0]["text"]

        in_turn = [complete(prompt) for prompt in prompts]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(complete, prompts)) == in_turn
        ((_, alone, _),) = ended([start("generate", *GREEDY, "-p", TEXT, "-n", "16", "--json")])
        assert in_turn[0] in json.loads(alone)["text"]
        processes[1].send_signal(signal.SIGKILL)
        (status, _, complaint), _ = ended(processes)
    assert status == 3
    assert complaint.splitlines()[-1].startswith("jaxpaged: error: "), complaint


def test_a_signal_ends_both_with_status_0():
    with server() as (processes, _):
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [status for status, _, _ in ended(processes)] == [0, 0]
