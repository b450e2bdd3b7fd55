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
from jaxpaged_model import tiny

TEXT = "class Stack:\n    def __init__(self"
GREEDY = ("-m", str(tiny.PATH), "--temp", "0")
SECONDS = 240
FIRST_PORT = 65536 - 4096
"""First of the ports that JAX derives from a job number."""


def free_port(wanted: int = 0) -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", wanted))
        return sock.getsockname()[1]


def port_of_a_job() -> int:
    """A free one of those that JAX makes of the number of a cluster's job."""
    for port in range(FIRST_PORT + os.getpid() % 2048, 65536):
        with suppress(OSError):
            return free_port(port)
    raise AssertionError("no port is free")


def environment() -> dict[str, str]:
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxpaged.app.cli", *arguments]
    return subprocess.Popen(
        command, env=environment() | variables, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@contextmanager
def two(*arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The command in two processes, which do not outlive the block."""
    ports = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id")
    with killed_at_the_end([start(*arguments, *ports, str(i)) for i in range(2)]) as processes:
        yield processes


@contextmanager
def killed_at_the_end(processes: list[subprocess.Popen[str]]) -> Iterator[list[subprocess.Popen[str]]]:
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


def slurm(process: int, port: int) -> dict[str, str]:
    """Environment that ``srun --ntasks 2`` sets for a task; JAX makes the port of the job's number."""
    return {
        "SLURM_JOB_ID": str(port - FIRST_PORT), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(process), "SLURM_LOCALID": "0",
    }  # fmt: skip


def open_mpi(process: int, port: int) -> dict[str, str]:
    """Environment that ``mpirun -n 2`` sets for a process."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{(port - FIRST_PORT) * 4096}.0;tcp://127.0.0.1,10.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(process), "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }  # fmt: skip


@pytest.mark.parametrize("cluster", [slurm, open_mpi])
def test_a_cluster_tells_the_processes_of_each_other(cluster):
    wanted = ("generate", *GREEDY, "-p", TEXT, "-n", "8", "--json", "--mesh", "tensor=2")
    port = port_of_a_job()
    started = [start(*wanted, **cluster(i, port)) for i in range(2)]
    with killed_at_the_end(started) as processes:
        (first, out, complaint), (second, nothing, _) = ended(processes)
    assert (first, second, nothing) == (0, 0, ""), complaint
    assert json.loads(out)["text"]
    assert "in 2 processes" in complaint


def test_processes_with_other_flags_are_told_so():
    wanted = ("generate", *GREEDY, "-p", TEXT, "--mesh", "tensor=2", "-n", "8")
    ports = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id")
    with killed_at_the_end(
        [start(*wanted, *ports, "0"), start(*wanted, "--ignore-eos", *ports, "1")]
    ) as processes:
        found = ended(processes)
    for status, out, complaint in found:
        assert (status, out) == (2, "")
        assert "error: process 1 was started with other flags than process 0" in complaint.splitlines()[-1]
        assert "Traceback" not in complaint


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
