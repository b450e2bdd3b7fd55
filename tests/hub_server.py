"""A stand-in for the Hugging Face hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


class Hub(http.server.ThreadingHTTPServer):
    """Serves what huggingface_hub asks for: /api/models/..., its tree, /user/repo/resolve/revision/file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.broken = False
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(self.path.split("?")[0]).strip("/")
        self.server.requests.append((self.command, path))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.broken:
            return self.send(503, b"down")
        if path.startswith("api/models/"):
            user, name, *rest = path.removeprefix("api/models/").split("/")
            repo = f"{user}/{name}"
            if repo not in self.server.repos:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = self.server.repos[repo]
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": p, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for p, data in files.items()
                ]
                return self.send(200, json.dumps(tree).encode())
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]}
            return self.send(200, json.dumps(info | {"private": False, "tags": [], "downloads": 0}).encode())
        user, name, _, _, *parts = path.split("/")
        repo, file = f"{user}/{name}", "/".join(parts)
        if repo in self.server.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        data = self.server.repos.get(repo, {}).get(file)
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.send(206, data[start:], headers)
        return self.send(200, data, headers)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers in here."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
