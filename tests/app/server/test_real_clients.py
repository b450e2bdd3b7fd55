"""A real server process of the embedded model, driven by the clients that people have."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import requests

pytestmark = pytest.mark.slow

KEY = "a-very-secret-key"
HOSTS = "127.0.0.1,127.0.0.2" if sys.platform == "linux" else "127.0.0.1"  # elsewhere there is only the first
PROMPT = "def main(path):\n    "


class Process:
    """A server, its address and what it said."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.log = folder / "log"
        command = [
            sys.executable,
            "-m",
            "jaxpaged.app.cli",
            "serve",
            "--port",
            "0",
            "-np",
            "4",
            "-c",
            "256",
            *flags,
        ]
        environment = os.environ | {"JAXPAGED_API_KEY": KEY}
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.popen.poll() is None:
            if match := re.search(r"listening on (\S+)", self.log.read_text()):
                return match[1]
            time.sleep(0.2)
        raise AssertionError(f"no server: {self.log.read_text()}")

    def ask(self, method: str, path: str, **kwargs):
        headers = {"Authorization": f"Bearer {KEY}"}
        return requests.request(method, self.url + path, headers=headers, timeout=60, **kwargs)

    def running(self) -> int:
        return self.ask("GET", "/pool").json()["running"]

    def wait_until_idle(self, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < deadline, "samples of a client that is gone still run"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "slots").mkdir()
    process = Process(
        folder, "--metrics", "--slot-save-path", str(folder / "slots"), "--max-queue", "8", "--host", HOSTS
    )
    yield process
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(30) == 0, process.log.read_text()
    assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")
def client(server: Process):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_every_address_is_listened_on(server):
    addresses = re.findall(r"listening on (\S+)", server.log.read_text())
    assert len(addresses) == len(HOSTS.split(",")) and addresses[0] == server.url
    for address in addresses:
        assert requests.get(f"{address}/health", timeout=60).json() == {"status": "ok"}


def test_openai_completions(client):
    whole = client.completions.create(model="any", prompt=PROMPT, max_tokens=12, temperature=0, seed=1)
    assert whole.choices[0].finish_reason in ("length", "stop") and whole.choices[0].text
    assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens_details.cached_tokens >= 0
    stream = client.completions.create(
        model="any",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 12


def test_openai_chat(client):
    messages = [{"role": "user", "content": "x = 1"}]
    whole = client.chat.completions.create(
        model="any",
        messages=messages,
        max_completion_tokens=8,
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    first, second = whole.choices
    assert first.message.content == second.message.content and first.message.role == "assistant"
    assert "".join(entry.token for entry in first.logprobs.content) == first.message.content
    with client.chat.completions.create(
        model="any", messages=messages, max_tokens=8, temperature=0, stream=True
    ) as stream:
        assert "".join(c.choices[0].delta.content or "" for c in stream) == first.message.content


def test_openai_errors(client, server):
    assert [model.id for model in client.models.list()] == [client.models.retrieve("tiny-python-Q8_0").id]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="any", prompt="x", max_tokens=-2)
    assert refused.value.param == "max_tokens" and refused.value.status_code == 400
    with pytest.raises(openai.BadRequestError, match="context size"):
        client.completions.create(model="any", prompt=[1] * 256)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another-key", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_openai_embeddings(client):
    texts = ["def main():", "class Stack:", "def main():"]
    first, second, third = (
        entry.embedding for entry in client.embeddings.create(model="any", input=texts).data
    )
    assert first == third and first != second and abs(sum(x * x for x in first) - 1) < 1e-5
    (alone,) = client.embeddings.create(model="any", input=texts[1], encoding_format="float").data
    assert max(abs(a - b) for a, b in zip(alone.embedding, second, strict=True)) < 1e-6


def test_langchain(server):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, model="any", temperature=0, max_tokens=8
    )
    whole = chat.invoke("x = 1")
    assert whole.usage_metadata["output_tokens"] <= 8
    assert "".join(chunk.content for chunk in chat.stream("x = 1")) == whole.content


def test_a_repeated_prompt_is_found_and_answered_alike(server):
    body = {"prompt": "# a long beginning\n" * 12, "n_predict": 8, "temperature": 0}
    first, second = (server.ask("POST", "/completion", json=body).json() for _ in range(2))
    assert second["content"] == first["content"]
    assert second["tokens_cached"] > 32 and second["timings"]["prompt_n"] < first["tokens_evaluated"] - 32


def test_a_slot_in_a_file(server):
    body = {"prompt": "# what no other test asks\n" * 12, "n_predict": 8, "id_slot": 0}
    assert server.ask("POST", "/completion", json=body).status_code == 200
    saved = server.ask("POST", "/slots/0?action=save", json={"filename": "one.bin"})
    assert saved.status_code == 200 and saved.json()["n_saved"] > 0, saved.text
    restored = server.ask("POST", "/slots/1?action=restore", json={"filename": "one.bin"}).json()
    assert restored["n_restored"] == saved.json()["n_saved"]
    assert server.ask("POST", "/slots/1?action=erase").json()["n_erased"] == restored["n_restored"]
    assert server.ask("POST", "/slots/0?action=restore", json={"filename": "none.bin"}).status_code == 400


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_frees_its_sample(server, stream):
    body = {"prompt": PROMPT, "n_predict": 200, "ignore_eos": True, "stream": stream}
    try:
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = requests.post(
            f"{server.url}/completion", json=body, headers=headers, stream=True, timeout=(5, 0.05)
        )
        next(answer.iter_content(1))
        answer.close()
    except requests.exceptions.RequestException:
        pass  # it did not wait for the answer
    server.wait_until_idle()


def test_overload_is_429_and_nothing_is_lost(server):
    body = {"prompt": PROMPT, "n_predict": 40, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    answers: list[requests.Response] = []

    def ask() -> None:
        answers.append(server.ask("POST", "/completion", json=body))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    right = [answer.json()["content"] for answer in answers if answer.status_code == 200]
    late = [answer for answer in answers if answer.status_code != 200]
    assert len(right) >= 8 and len(set(right)) == 1
    assert all(answer.status_code == 429 and answer.headers["Retry-After"] for answer in late)


def test_a_body_over_the_limit_gets_its_answer(server):
    answer = server.ask("POST", "/tokenize", data=b" " * (9 * 2**20))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == 413
    answer = requests.get(server.url + "/health", headers={"X-Large": "x" * 40_000}, timeout=10)
    assert answer.status_code == 431


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server):
    def curl(*args: str) -> str:
        command = ["curl", "-s", "-N", "-H", f"Authorization: Bearer {KEY}", *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert json.loads(curl(f"{server.url}/health")) == {"status": "ok"}
    body = '{"prompt": "x = ", "max_tokens": 4, "stream": true}'
    text = curl(f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body)
    assert text.endswith("data: [DONE]\n\n")
    assert json.loads(curl(f"{server.url}/v1/completions", "-d", body))["error"]["code"] == 415
    assert "jaxpaged_kv_pages_free" in curl(f"{server.url}/metrics")


def test_sigterm_lets_a_stream_end_and_turns_others_away(tmp_path):
    process = Process(tmp_path)
    body = {"prompt": PROMPT, "n_predict": 200, "ignore_eos": True, "stream": True}
    answer = process.ask("POST", "/completion", json=body, stream=True)
    lines = answer.iter_lines()
    next(lines)
    process.popen.send_signal(signal.SIGTERM)
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]
    assert events[-1]["stop"] is True and events[-1]["tokens_predicted"] == 200
    assert process.popen.wait(30) == 0
    assert "Traceback" not in process.log.read_text()
