"""``docs/examples/ray_serve.py`` on a local Ray cluster: two replicas against one server of the same model."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import openai
import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed (pip install 'ray[serve]')", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "ray_serve.py"
FLAGS = ("-np", "2", "-c", "1024", "-t", "1", "--temp", "0", "--metrics", "--log-disable")
HEADER = "x-jaxpaged-replica"
START_SECONDS, REPLACE_SECONDS, LEAVE_SECONDS = 240, 180, 60
PROMPTS = ["def main(path):\n    ", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n\ndef"]
LONG = "def read_lines(path):\n    '''Read all the lines of a file, and return them as a list of texts.'''\n"
CHAT = [{"role": "user", "content": "x = 1"}]
KILLER = """
import sys, ray
ray.init(sys.argv[1], namespace="serve", log_to_driver=False, logging_level="ERROR")
print("ready", flush=True)
ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Replica#{sys.stdin.readline().strip()}"))
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until(what: Callable[[], Any], seconds: float, message: str) -> Any:
    """Waits until ``what`` returns a true value; returns it."""
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, message
        time.sleep(0.25)
    return result


class Process:
    """A server in its own session; its subprocesses have the same mark in their environment."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.mark = secrets.token_hex(32)
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))  # names of sockets must be short
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.mark,
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.connections: list[Any] = []
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self.url = self.said(r"listening on (\S+)")
        except BaseException:
            self.end()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.connections += [self.http, self.client]

    def said(self, pattern: str) -> str:
        def look() -> re.Match[str] | None:
            assert self.popen.poll() is None, self.log.read_text()
            return re.search(pattern, self.log.read_text())

        return wait_until(look, START_SECONDS, f"no {pattern!r} in: {self.log.read_text()}")[1]

    def left(self) -> list[int]:
        """Running processes of the server, itself included."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def end(self) -> int:
        """Interrupts it, and kills what is left; returns its exit status."""
        for connections in self.connections:
            connections.close()
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(LEAVE_SECONDS)
        finally:
            for number in self.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)

    def complete(self, prompt: Any, max_tokens: int = 16, **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | more
        return self.http.post("/v1/completions", json=body)

    def chat(self, messages: list[dict[str, str]], max_tokens: int = 16) -> tuple[str | None, Any]:
        """Returns (replica that answered, answer), through the ``openai`` package."""
        raw = self.client.chat.completions.with_raw_response.create(
            model="any", messages=messages, max_tokens=max_tokens, temperature=0
        )
        return raw.headers.get(HEADER), raw.parse()

    def metrics(self, replica: str) -> dict[str, float]:
        """Prometheus metrics of one replica; each request may reach another one."""

        def ask() -> dict[str, float] | None:
            answer = self.http.get("/metrics")
            if answer.headers[HEADER] != replica:
                return None
            pairs = (line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
            return {name: float(value) for name, value in pairs}

        return wait_until(ask, 60, f"{replica} was never asked")


def texts(process: Process) -> list[str]:
    """Greedy answers to every kind of request."""
    answers = [process.complete(prompt).json()["choices"][0]["text"] for prompt in (*PROMPTS, PROMPTS)]
    return [*answers, process.chat(CHAT)[1].choices[0].message.content]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Answers of a single server, which ends before the replicas start."""
    command = (sys.executable, "-m", "jaxpaged.app.cli", "serve", "--port", "0", *FLAGS)
    process = Process(tmp_path_factory.mktemp("single"), *command)
    try:
        return texts(process)
    finally:
        process.end()


@pytest.fixture(scope="module")
def service(expected: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    own = ("--replicas", "2", "--cpus", "0.5", "--imbalance", "2", "--port", str(free_port()))
    process = Process(tmp_path_factory.mktemp("ray"), sys.executable, str(SCRIPT), *own, *FLAGS)
    yield process
    process.end()


@pytest.fixture(scope="module")
def ray_serve() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("ray_serve", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        spec.loader.exec_module(module)
    return module


def test_a_key_names_its_block_and_all_before_it(ray_serve):
    def keys(text: str, **more: Any) -> list[bytes]:
        body = httpx.Request("POST", "http://test", json={"prompt": text} | more).content
        return ray_serve.prefix_keys(body, 16)

    text = "".join(f"line {i}\n" for i in range(40))
    whole = keys(text)
    assert len(whole) == len(set(whole)) > 15
    longer, changed = keys(text + "more " * 20), keys(text.replace("line 9\n", "line X\n"))
    assert longer[: len(whole)] == whole
    same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, changed, strict=True))))
    assert 0 < same < len(whole) and not set(whole[same:]) & set(changed[same:])
    assert not set(whole) & set(keys(text, cache_salt="another tenant"))
    assert keys("x") == ray_serve.prefix_keys(b"[[[", 16) == ray_serve.prefix_keys(b"[" * 99999, 16) == []
    assert len(ray_serve.prefix_keys(b'{"prompt": "' + rb"\ud800" * 16 + b'"}', 16)) == 1


def test_what_is_known_is_bounded_and_a_beginning_outlives_its_end(ray_serve):
    known = ray_serve.KnownPrefixes()
    known.keep(["a", "b"])
    first, second = [b"0", b"1", b"2", b"3"], [b"0", b"1", b"4"]
    known.add("a", first, 4)
    assert known.length("a", first) == 4 and known.length("a", second) == 2 and known.length("b", first) == 0
    known.add("a", second, 4)
    assert known.size("a") == 4
    assert known.length("a", second) == 3 and known.length("a", first) == 3  # its last block had to go
    known.add("c", first, 4)  # it died meanwhile
    known.keep(["b"])
    assert known.length("a", first) == known.size("c") == 0


def test_flags_that_are_wrong_are_one_line():
    wrong = (
        ["--kv-memory", "1G", "--kv-pages", "4"],
        ["--coordinator", "a:1"],
        ["--no-such"],
        ["--replicas", "0"],
    )
    for flags in wrong:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert flags[0].removeprefix("--") in done.stderr or "one process" in done.stderr


def test_replicas_answer_as_one_server_does(service, expected):
    assert texts(service) == expected == texts(service)


def test_a_stream_comes_in_parts(service, expected):
    asked = {"model": "any", "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "stream": True}
    chunks = list(service.client.completions.create(**asked, stream_options={"include_usage": True}))
    assert len(chunks) > 2 and chunks[-1].usage.completion_tokens == 16
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected[0]


def test_errors_are_those_of_the_server(service):
    assert service.http.get("/health").json() == {"status": "ok"}
    assert service.http.get("/no/such/path").json()["error"]["type"] == "not_found_error"
    json = {"content-type": "application/json"}
    for body, status in (
        (b"{", 400),
        (b'{"prompt": 1.5}', 400),
        (b"[" * 5000, 400),
        (b"x" * (9 * 2**20), 413),
    ):
        answer = service.http.post("/v1/completions", content=body, headers=json)
        assert answer.status_code == answer.json()["error"]["code"] == status


def test_a_conversation_stays_where_its_pages_are(service):
    replicas = []
    for name in ("Ada", "Grace", "Barbara", "Edsger"):
        content = (
            f"You are {name}, and you write Python with as few lines as you can, and no comments at all."
        )
        messages = [{"role": "system", "content": content}]
        seen, last = set(), 0
        for turn in range(4):
            messages.append({"role": "user", "content": f"Write function number {turn} of the module."})
            replica, answer = service.chat(messages)
            seen.add(replica)
            assert answer.usage.prompt_tokens_details.cached_tokens >= last // 2, "its pages are not used"
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            last = answer.usage.prompt_tokens
        assert len(seen) == 1
        replicas += seen
    assert len(set(replicas)) == 2, "one replica has all the conversations"
    for replica in set(replicas):
        numbers = service.metrics(replica)
        assert numbers["jaxpaged_prefix_hit_tokens_total"] > numbers["jaxpaged_prefix_query_tokens_total"] / 2


def test_texts_that_begin_differently_spread(service):
    counts = Counter(service.complete(f"# Example {i}\n{LONG}", 4).headers[HEADER] for i in range(8))
    # The replica with fewer cached texts evicts first; earlier conversations may be unevenly distributed.
    assert len(counts) == 2 and min(counts.values()) >= 2


def test_a_beginning_that_all_share_does_not_keep_a_replica_idle(service):
    first = service.complete(LONG, 4)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: service.complete(LONG, 256, ignore_eos=True), range(12)))
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    counts = Counter(answer.headers[HEADER] for answer in answers)
    assert len(counts) == 2 and counts[first.headers[HEADER]] >= 3  # up to the imbalance it was preferred


def begin_long_stream(
    service: Process, prompts: int
) -> tuple[contextlib.ExitStack, httpx.Response, Iterator[str]]:
    """Load for one replica, a dozen prompts of seconds; only the first line is read."""
    body = {
        "prompt": [LONG] * prompts,
        "max_tokens": 900,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(service.http.stream("POST", "/v1/completions", json=body))
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        return stack.pop_all(), answer, lines
    raise AssertionError


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_takes_its_request_along(service, streams):
    def aborted() -> float:
        numbers = [service.metrics(replica) for replica in known]
        return sum(each.get('jaxpaged_finished_total{reason="abort"}', 0.0) for each in numbers)

    known = {service.complete(f"# Example {i}\n{LONG}", 4).headers[HEADER] for i in range(8)}
    assert len(known) == 2
    before = aborted()
    if streams:
        begun, _, _ = begin_long_stream(service, 12)
        begun.close()
    else:
        with pytest.raises(httpx.ReadTimeout):
            body = {"prompt": [LONG] * 12, "max_tokens": 900, "ignore_eos": True}
            httpx.post(f"{service.url}/v1/completions", json=body, timeout=0.5)
    wait_until(lambda: aborted() >= before + 8, 20, "the request of a client that is gone ran on")
    assert all(service.metrics(replica)["jaxpaged_requests_running"] == 0 for replica in known)


def test_a_replica_that_is_killed_is_replaced(service, expected):
    cluster = service.said(r"cluster (\S+)")
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER, cluster],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=service.environment,
    )
    with killer:
        assert killer.stdout.readline() == "ready\n"
        begun, answer, lines = begin_long_stream(service, 120)  # Ray takes seconds to kill
        dead = answer.headers[HEADER]
        killer.stdin.write(f"{dead}\n")
        killer.stdin.close()
        with begun, pytest.raises(httpx.RemoteProtocolError):  # half an answer does not look like a whole one
            list(lines)
    assert killer.returncode == 0

    seen: Counter[str] = Counter()

    def both() -> bool:
        answer = service.complete(PROMPTS[0])
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == expected[0]
        seen[answer.headers[HEADER]] += 1
        return len(seen) == 2

    wait_until(both, REPLACE_SECONDS, f"no other replica came: {seen}")
    assert dead not in seen
    assert texts(service) == expected


def test_what_runs_may_end_before_everything_does(service):
    begun, _, lines = begin_long_stream(service, 12)
    with begun:
        service.popen.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert service.popen.wait(LEAVE_SECONDS) == 0, service.log.read_text()
    assert "Traceback" not in service.log.read_text()
    threading.Event().wait(0.5)
    wait_until(lambda: not service.left(), 20, f"it left processes: {service.left()}")
