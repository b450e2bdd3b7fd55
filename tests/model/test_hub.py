"""``-hf user/repo[:quant]``, with a local server in place of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serving
from jaxpaged_model.checkpoint import hub
from jaxpaged_model.checkpoint.hub import HubSpec, choose_gguf, resolve
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.metadata import ModelError
from small_models import config_json, random_weights, write_converted_gguf, write_folder


@pytest.fixture
def server() -> Iterator[Hub]:
    with serving() as hub_server:
        yield hub_server


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


def test_the_cache_is_used_if_the_hub_does_not_answer(
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


def test_all_parts_of_a_split_model_are_downloaded(server: Hub, tmp_path: Path) -> None:
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
