"""``-hf user/repo[:quant]``, against a stand-in for the hub on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from small_models import config_json, random_weights, write_converted_gguf, write_folder

from model import hub
from model.config import ModelError
from model.hub import HubSpec, choose_gguf, resolve
from model.loading import load_model

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


@pytest.fixture
def server() -> Iterator[Hub]:
    hub_server = Hub()
    thread = threading.Thread(target=hub_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield hub_server
    hub_server.shutdown()
    hub_server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = config_json("llama")
    path = write_converted_gguf(tmp_path_factory.mktemp("hub") / "m.gguf", config, random_weights(config))
    return path.read_bytes()


def test_spec() -> None:
    assert HubSpec.parse("user/Repo-1.0_GGUF") == HubSpec("user/Repo-1.0_GGUF")
    assert HubSpec.parse("user/repo:Q4_K_M") == HubSpec("user/repo", "Q4_K_M")
    for wrong in (
        "repo",
        "a/b/c",
        "user/",
        "/repo",
        "user/repo:",
        "user/re po",
        "https://x/y",
        "../../x",
        "",
    ):
        with pytest.raises(ModelError, match="write user/repo or user/repo:quant"):
            HubSpec.parse(wrong)


def test_choice_follows_llama_cpp() -> None:
    names = ["m-F16.gguf", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m.Q4_0.gguf", "mmproj-m-Q4_K_M.gguf", "README.md"]
    assert choose_gguf(HubSpec("u/r"), names) == ["m-Q4_K_M.gguf"]
    assert choose_gguf(HubSpec("u/r"), names[:2]) == ["m-Q8_0.gguf"]
    assert choose_gguf(HubSpec("u/r"), names[:1]) == ["m-F16.gguf"]
    assert choose_gguf(HubSpec("u/r", "q4_0"), names) == ["m.Q4_0.gguf"]
    assert choose_gguf(HubSpec("u/r", "f16"), names) == ["m-F16.gguf"]
    assert choose_gguf(HubSpec("u/r"), ["config.json"]) == []
    parts = [f"q/m-Q8_0-{i:05d}-of-00003.gguf" for i in (2, 3, 1)]
    assert choose_gguf(HubSpec("u/r", "Q8_0"), parts) == sorted(parts)
    with pytest.raises(ModelError, match=r"no GGUF file of quant 'Q4'; it has m-F16\.gguf, m-Q8_0\.gguf$"):
        choose_gguf(HubSpec("u/r", "Q4"), names[:2])
    with pytest.raises(ModelError, match="u/r has no GGUF files, so no 'Q4'; leave the quant out"):
        choose_gguf(HubSpec("u/r", "Q4"), ["config.json"])


def test_a_gguf_is_downloaded_once_and_found_offline(server: Hub, model_bytes: bytes, tmp_path: Path) -> None:
    server.repos["u/r"] = {"m-Q8_0.gguf": model_bytes, "m-F16.gguf": b"other", "README.md": b"#"}
    path = resolve("u/r", cache_dir=tmp_path, endpoint=server.endpoint)
    assert path.name == "m-Q8_0.gguf" and path.read_bytes() == model_bytes
    assert load_model(path).description == "llama 95K F32"

    server.requests.clear()
    assert resolve("u/r:q8_0", cache_dir=tmp_path, endpoint=server.endpoint) == path
    assert not [name for method, name in server.requests if method == "GET" and name.endswith(".gguf")]

    server.requests.clear()
    assert resolve("u/r:Q8_0", cache_dir=tmp_path, offline=True) == path
    assert not server.requests
    with pytest.raises(
        ModelError, match=r"u/r is not completely in the cache \(.*it has m-Q8_0.gguf\), and offline"
    ):
        resolve("u/r:F16", cache_dir=tmp_path, offline=True)
    with pytest.raises(ModelError, match=r"u/other is not in the cache .*, and offline"):
        resolve("u/other", cache_dir=tmp_path, offline=True)
    with pytest.raises(ModelError, match="u/other is not in the cache"):
        resolve("u/other", cache_dir=tmp_path / "none", offline=True)


def test_a_hub_that_does_not_answer_leaves_the_cache(
    server: Hub, model_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_S", 2.0)
    server.repos["u/r"] = {"m-Q8_0.gguf": model_bytes}
    path = resolve("u/r", cache_dir=tmp_path, endpoint=server.endpoint)
    server.broken = True
    assert resolve("u/r", cache_dir=tmp_path, endpoint=server.endpoint) == path
    with pytest.raises(
        ModelError, match=r"u/x is not in the cache .*, and http://127.* answered 503 for u/x"
    ):
        resolve("u/x", cache_dir=tmp_path, endpoint=server.endpoint)
    nobody = "http://127.0.0.1:9"
    assert resolve("u/r", cache_dir=tmp_path, endpoint=nobody) == path
    with pytest.raises(
        ModelError, match=r"not in the cache .*, and http://127.0.0.1:9 cannot be reached: "
    ) as error:
        resolve("u/x", cache_dir=tmp_path, endpoint=nobody)
    assert "\n" not in str(error.value)


def test_split_models_come_whole(server: Hub, tmp_path: Path) -> None:
    names = [f"m-Q8_0-{i:05d}-of-00002.gguf" for i in (1, 2)]
    server.repos["u/r"] = {name: name.encode() for name in names}
    path = resolve("u/r", cache_dir=tmp_path, endpoint=server.endpoint)
    assert path.name == names[0]
    assert [path.with_name(name).read_bytes() for name in names] == [name.encode() for name in names]
    assert resolve("u/r", cache_dir=tmp_path, offline=True) == path


def test_a_folder_is_downloaded_where_there_is_no_gguf(server: Hub, tmp_path: Path) -> None:
    config = config_json("qwen3")
    folder = write_folder(tmp_path / "folder", config, random_weights(config), shards=2)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    unwanted = {
        "pytorch_model.bin": b"x",
        "onnx/config.json": b"x",
        "consolidated.safetensors": b"x",
        "a.png": b"x",
    }
    server.repos["u/r"] = files | unwanted
    path = resolve("u/r", cache_dir=tmp_path / "cache", endpoint=server.endpoint)
    assert {p.name for p in path.iterdir()} == set(files)
    assert load_model(path).description == "qwen3 95K F32"
    assert resolve("u/r", cache_dir=tmp_path / "cache", offline=True) == path


def test_refusals_are_one_line(server: Hub, tmp_path: Path) -> None:
    server.repos["u/r"] = {"m-Q8_0.gguf": b"x"}
    server.repos["u/gated"] = {"m-Q8_0.gguf": b"x"}
    server.gated.add("u/gated")
    for spec, message in (
        ("u/none", "there is no model u/none at http://127.*; if it is private, set HF_TOKEN"),
        ("u/gated", "u/gated is gated: accept its terms at .*/u/gated and set HF_TOKEN"),
        ("u/r:Q2_K", "u/r has no GGUF file of quant 'Q2_K'; it has m-Q8_0.gguf"),
        ("u/a--b", "names no model of a hub"),
    ):
        with pytest.raises(ModelError, match=message) as error:
            resolve(spec, cache_dir=tmp_path, endpoint=server.endpoint)
        assert "\n" not in str(error.value)


def test_the_token_of_the_environment_is_sent(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "stand-in")
    server.repos["u/r"] = {"m-Q8_0.gguf": b"x"}
    resolve("u/r", cache_dir=tmp_path, endpoint=server.endpoint)
    assert server.tokens == {"Bearer stand-in"}
