"""A server without a model for the browser page: words at a pace, a changing pool, errors on demand.

``python tests/app/server/stub_server.py 8090`` serves it to look at.
"""

from __future__ import annotations

import http.server
import json
import mimetypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PAGES = Path(__file__).parents[3] / "jaxpaged" / "app" / "server" / "pages"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
ANSWER = """\
A page is a fixed number of slots.

```python
for page in pages:
    print(page)
```
That <b>is</b> all."""
THOUGHTS = "A tool knows the weather. I ask it, first in one town, then in the other."
CALLS = [("get_weather", '{"city": "Oslo", "days": [1, 2]}'), ("get_weather", '{"city": "Rome", "days": []}')]


@dataclass
class Refusal:
    """Error of the next request."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class Stub(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), StubHandler)
        self.reset()

    def reset(self) -> None:
        self.key: str | None = None
        self.chat_template: str | None = "{{ messages }}"
        self.answer = ANSWER
        self.thoughts = ""
        self.calls: list[tuple[str, str]] = []  # name and arguments; none once a result has come
        self.pause = 0.005
        self.refusals: list[Refusal] = []
        self.fail_after: int | None = None  # tokens, then an error event
        self.cut_after: int | None = None  # tokens, then the connection ends
        self.bodies: list[tuple[str, dict]] = []
        self.aborted = 0
        self.pool_asked = 0
        self.num_pages = 96
        self.fixed_pool: tuple[str, list[int]] | None = None
        self.down = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that closes its connections is no error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def pool(self) -> dict:
        """Four sequences that grow and end; the first pages are shared, what ends is cached for a while."""
        n, now = self.num_pages, time.monotonic()
        state, owner = ["0"] * n, [-1] * n
        sequences = []
        for slot in range(4):
            tokens = int(now * 20 + slot * 90) % (n * 32 // 5 + 1)
            pages = [(7 * i + slot * n // 4) % n for i in range(tokens // 32 + 1)]
            for page in pages:
                if state[page] == "0":
                    state[page], owner[page] = "1", slot
            doing = "prefill" if tokens < 60 else "decode"
            sequences.append({"slot": slot, "request_id": f"cmpl-{slot}f3", "tokens": tokens, "state": doing})
        for page in range(min(n // 12, n - 1)):
            state[page], owner[page] = "2", page % 4
        for page in range(n - n // 6, n):
            if state[page] == "0":
                state[page] = "3"
        if self.fixed_pool is not None:
            state, owner = list(self.fixed_pool[0]), self.fixed_pool[1]
        return {
            "num_pages": n,
            "page_size": 32,
            "bytes_per_page": 196608,
            "state": "".join(state),
            "owner": owner,
            "sequences": sequences,
            "running": 4,
            "waiting": 2,
            "pages_used": state.count("1") + state.count("2"),
            "pages_cached": state.count("3"),
            "pages_free": state.count("0"),
            "waste": 0.031,
            "tokens_per_second": 83.25,
            "prompt_tokens_per_second": 512.0,
            "prefix_hit_rate": 0.42,
            "preemptions": 3,
            "uptime": 12.5,
        }


class StubHandler(http.server.BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/") or "index.html"
        if self.server.down:
            self.close_connection = True
            return
        if path in ("v1/models", "props", "pool"):
            if path == "pool":
                self.server.pool_asked += 1
            if self.allowed():
                models = {"object": "list", "data": [{"id": "models/tiny-q8_0.gguf", "object": "model"}]}
                answers = {
                    "v1/models": lambda: models,
                    "props": lambda: {"chat_template": self.server.chat_template},
                    "pool": self.server.pool,
                }
                self.send_json(200, answers[path]())
            return
        file = PAGES / path
        if file.parent != PAGES or not file.is_file():
            return self.send_json(404, {"error": {"message": "not found"}})
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self.send_bytes(200, file.read_bytes(), {"Content-Type": kind, "Content-Security-Policy": CSP})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if server.down:
            self.close_connection = True
            return
        if not self.allowed():
            return
        server.bodies.append((self.path, body))
        if server.refusals:
            refusal = server.refusals.pop(0)
            return self.send_json(refusal.status, {"error": {"message": refusal.message}}, refusal.headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.stream(self.deltas(body)[: body.get("max_tokens")])
        except OSError:
            server.aborted += 1

    def deltas(self, body: dict) -> list[dict]:
        """The pieces of an answer: thoughts, words, then calls in fragments."""
        answer = pieces(self.server.answer)
        if "messages" not in body:
            return [{"text": word} for word in answer]
        said = [{"reasoning_content": word} for word in pieces(self.server.thoughts)]
        said += [{"content": word} for word in answer]
        calls = self.server.calls if body["messages"][-1]["role"] != "tool" else []
        for i, (name, arguments) in enumerate(calls):
            function = {"name": name, "arguments": ""}
            said.append(
                {"tool_calls": [{"index": i, "id": f"call_{i}", "type": "function", "function": function}]}
            )
            parts = [arguments[at : at + 4] for at in range(0, len(arguments), 4)]
            said += [{"tool_calls": [{"index": i, "function": {"arguments": part}}]} for part in parts]
        return [{"delta": delta} for delta in said]

    def stream(self, deltas: list[dict]) -> None:
        server = self.server
        for i, delta in enumerate(deltas):
            if i == server.fail_after:
                self.event({"error": {"message": "the engine died", "type": "server_error", "code": 500}})
                return self.event("[DONE]")
            if i == server.cut_after:
                return None
            self.event({"choices": [{"index": 0, "finish_reason": None} | delta]})
            time.sleep(server.pause)
        self.event({"choices": [{"index": 0, "finish_reason": "stop", "delta": {}, "text": ""}]})
        details = {"cached_tokens": 6}
        usage = {"prompt_tokens": 9, "completion_tokens": len(deltas), "prompt_tokens_details": details}
        self.event({"choices": [], "usage": usage})
        self.event("[DONE]")

    def event(self, data: dict | str) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def allowed(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.send_json(401, {"error": {"message": "Invalid API Key"}})
        return False

    def send_json(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(
            status, json.dumps(body).encode(), {"Content-Type": "application/json"} | (headers or {})
        )

    def send_bytes(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(data)


def pieces(text: str) -> list[str]:
    """Words with the spaces behind them."""
    return [word for word in text.replace(" ", " \0").split("\0") if word]


@contextmanager
def stub_server(port: int = 0) -> Iterator[Stub]:
    """A stub that serves until the block ends."""
    with Stub(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with Stub(int(sys.argv[1]) if len(sys.argv) > 1 else 8090) as stub:
        stub.pause, stub.thoughts, stub.calls = 0.05, THOUGHTS, CALLS
        print(stub.url)
        stub.serve_forever()
