"""Real processes with several models, and with sleep: no request is lost, and the memory comes back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
import requests
from jaxpaged_model import tiny
from test_real_clients import Process

from jaxpaged.app.server.hosting import Hosted, ModelHost
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.serve import load_engine

pytestmark = pytest.mark.slow
GREEDY = {"prompt": "def main(", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny.PATH, folder / name)
    (folder / "broken.gguf").write_bytes(tiny.PATH.read_bytes()[:3000])
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*flags: str) -> Process:
        started.append(Process(tmp_path, *flags))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()


def resident_mib(process: Process) -> float:
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def threads(process: Process) -> int:
    return len(list(Path(f"/proc/{process.popen.pid}/task").iterdir()))


def statuses(process: Process) -> dict[str, str]:
    listed = process.ask("GET", "/v1/models").json()["data"]
    return {model["id"]: model["status"]["value"] for model in listed}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_clients_alternate_between_models_that_do_not_fit_together_and_sleep(start, folder):
    process = start("--models-dir", str(folder), "--models-max", "1", "--sleep-idle-seconds", "1", "-m", "b")
    assert statuses(process) == {"a": "unloaded", "b": "loaded", "broken": "unloaded"}
    stop = threading.Event()
    seen: list[int] = []

    def watch() -> None:
        while not stop.wait(0.02):
            seen.append(sum(status == "loaded" for status in statuses(process).values()))

    watcher = threading.Thread(target=watch)
    watcher.start()

    def ask(name: str) -> requests.Response:
        return process.ask("POST", "/v1/completions", json=GREEDY | {"model": name})

    texts = set()
    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            names = ["a", "b"] * 20
            for name, response in zip(names, pool.map(ask, names), strict=True):
                assert response.status_code == 200, response.text
                assert response.json()["model"] == name
                texts.add(response.json()["choices"][0]["text"])
        assert "damaged" in ask("broken").json()["error"]["message"]
        for name in "abab":
            texts.add(ask(name).json()["choices"][0]["text"])
        until(lambda: "loaded" not in statuses(process).values())
    assert len(texts) == 1  # both files are one model
    stop.set()
    watcher.join()
    assert max(seen) == 1
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(30) == 0


def test_memory_comes_back(start):
    process = start("--sleep-idle-seconds", "2", "-c", "1024", "--kv-memory", "256M", "-np", "16")

    def fill() -> tuple[float, int]:
        """Touches the pool; memory and threads after it."""
        bodies = [GREEDY | {"prompt": [i + 300] * 900, "max_tokens": 100} for i in range(16)]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for response in pool.map(lambda body: process.ask("POST", "/v1/completions", json=body), bodies):
                assert response.status_code == 200, response.text
        return resident_mib(process), threads(process)

    def check_sleep(awake: float, num_threads: int) -> None:
        until(lambda: process.ask("GET", "/props").json()["is_sleeping"])
        until(lambda: threads(process) < num_threads)
        until(lambda: resident_mib(process) < awake - 50)  # 16 x 1000 tokens of 4 KiB are 62 MiB

    for _ in range(3):
        check_sleep(*fill())


def test_signals_while_a_model_loads(start, folder):
    process = start("--models-dir", str(folder), "--drain-seconds", "60")
    waiting = concurrent.futures.ThreadPoolExecutor(1).submit(
        process.ask, "POST", "/v1/completions", json=GREEDY | {"model": "a"}
    )
    until(lambda: statuses(process)["a"] == "loading")
    process.popen.send_signal(signal.SIGTERM)
    assert waiting.result().status_code == 200  # it was accepted before
    assert process.popen.wait(30) == 0
    process = start("--models-dir", str(folder), "--drain-seconds", "0")
    waiting = concurrent.futures.ThreadPoolExecutor(1).submit(
        process.ask, "POST", "/v1/completions", json=GREEDY | {"model": "a"}
    )
    until(lambda: statuses(process)["a"] == "loading")
    process.popen.send_signal(signal.SIGTERM)
    assert waiting.result().status_code == 503
    assert process.popen.wait(30) == 0


def test_no_array_and_no_thread_is_left():
    host = ModelHost([Hosted("")], lambda _: load_engine(ServeOptions(log=False, ctx_size=128, parallel=2)))
    hosted = host.models[0]

    async def cycle() -> None:
        await host.load(hosted)
        assert len(jax.live_arrays()) > before and "engine" in [
            thread.name for thread in threading.enumerate()
        ]
        await host.unload(hosted)

    for _ in range(2):
        gc.collect()
        before = len(jax.live_arrays())
        asyncio.run(cycle())
        assert len(jax.live_arrays()) <= before
        assert "engine" not in [thread.name for thread in threading.enumerate()]
