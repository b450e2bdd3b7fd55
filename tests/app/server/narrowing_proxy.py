"""A proxy before the server that narrows what a client asks for, so that a small model must answer as a test
expects: it keeps one tool with fixed arguments, demands its call, and then an answer without one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

Rewrite = Callable[[str, dict[str, Any]], dict[str, Any]]


@contextmanager
def narrowing_proxy(server: str, rewrite: Rewrite) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Runs a proxy: ``(its address, the requests that were sent on: path and body)``."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            if data:
                body = rewrite(self.path, json.loads(data))
                seen.append((self.path, body))
                data = json.dumps(body).encode()
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
            headers["Accept-Encoding"] = "identity"
            answer = requests.request(
                self.command, server + self.path, data=data, headers=headers, stream=True, timeout=600
            )
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.send_header("Connection", "close")
            self.end_headers()
            for part in answer.iter_content(None):
                self.wfile.write(part)
                self.wfile.flush()
            self.close_connection = True

        do_GET = do_POST = do_HEAD = _forward

        def log_message(self, *_: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", seen
    finally:
        proxy.shutdown()
        proxy.server_close()
