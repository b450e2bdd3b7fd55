"""``jaxpaged bench-serve``: what it refuses, and the servers that it starts and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from scripted_server import in_virtual_time

from jaxpaged.app.bench_serve.info import ask, check_url
from jaxpaged.app.bench_serve.machine import command_line
from jaxpaged.app.bench_serve.servers import OwnServer, Variant, serving
from jaxpaged.app.errors import InputError


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--kv-memory is missing"),
        (["--compare", "paged,ring"], "'ring' is not one of 'paged', "),
        (["--lengths", "normal:3"], "'normal:3' is not sharegpt-like, "),
        (["--clients", "0"], "0 in '0' is below 1"),
        (["--rate", "1,-2"], "requests a second are above 0"),
        (["--rate", "nan"], "requests a second are above 0"),
        (["--rate", "1", "--clients", "1"], "--clients and --rate are two kinds of load"),
        (["--goodput", "ttft"], "'ttft' is not a limit such as ttft:500"),
        (["--goodput", "speed:3"], "'speed:3' is not one of ttft, "),
        (["--kv-memory", "half"], "'half' is not a number of bytes"),
        (["--timeout", "0"], "0 is not above 0"),
        (["--plot", "x.pdf"], "must end in .svg or .png"),
        (["-o", "no/such/folder/x.json"], "cannot be written"),
        (["--allow-remote"], "--allow-remote is for a server that runs already"),
        (["--url", "http://127.0.0.1:1", "-m", "x.gguf"], "--model is for servers that this command starts"),
        (["--url", "http://example.com"], "is another machine"),
        (["--url", "http://127.0.0.1:1", "--vocab", "9"], "no answer from /v1/models"),
        (["--kv-memory", "1M", "--server-args", "--port 80"], "--port is not for you to choose here"),
        (["--kv-memory", "1M", "--server-args", "'"], "No closing quotation"),
    ],
)
def test_bad_flags_are_one_line(refused, flags, said):
    assert said in refused("bench-serve", *flags)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://localhost:8080/v1/", "http://localhost:8080"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("http://127.8.9.1/base", "http://127.8.9.1/base"),
    ],
)
def test_addresses_of_this_machine(url, address):
    assert check_url(url, allow_remote=False) == address


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://10.0.0.1:8080", "is another machine"),
        ("http://localhost.example.com", "is another machine"),
        ("http://0.0.0.0:8080", "is another machine"),
        ("http://user:secret@127.0.0.1", "holds a name or a password"),
        ("ftp://127.0.0.1", "is not an address"),
        ("127.0.0.1:8080", "is not an address"),
        ("http://127.0.0.1:99999", "Port out of range"),
        ("http://127.0.0.1/?q=1", "only a host and a port"),
    ],
)
def test_addresses_that_are_refused(url, said):
    with pytest.raises(InputError, match=said):
        check_url(url, allow_remote=False)
    if "another" in said:
        assert check_url(url, allow_remote=True) == url


def test_a_key_is_not_in_the_results():
    words = ["bench-serve", "--api-key", "hidden-1", "--url", "http://x", "--api-key=hidden-2"]
    assert "hidden" not in command_line(words)
    assert command_line(words).startswith("jaxpaged bench-serve --api-key ")


def test_what_servers_tell():
    def answer(request):
        if request.url.path == "/props":
            return httpx.Response(200, json={"default_generation_settings": {"n_ctx": 512}, "total_slots": 4})
        return httpx.Response(200, json={"data": [{"id": "m", "meta": {"n_vocab": 99, "n_ctx_train": 8192}}]})

    async def main():
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://stub") as http:
            return await ask(http)

    info = in_virtual_time(main())
    assert (info.model, info.vocab, info.context, info.slots) == ("m", 99, 512, 4)


def test_a_server_that_does_not_start(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    missing = Variant("paged", ("-m", "no-such.gguf"))
    with (
        pytest.raises(InputError, match=r"status 2: jaxpaged: error: .*no-such\.gguf"),
        serving(missing, 60.0),
    ):
        pass
    server = OwnServer(())
    server.stop()
    server.start()  # came too late
    assert server.output() == ""


@pytest.mark.slow
def test_a_benchmark_from_end_to_end(jaxpaged, model_path, tmp_path):
    pytest.importorskip("matplotlib")
    done = jaxpaged(
        "bench-serve", "-m", model_path, "-c", "96", "-b", "16", "--page-size", "8", "--compare", "paged",
        "--server-args", "--decode-steps 2 --kv-pages 24",
        "--clients", "1,3", "--requests", "6", "--lengths", "uniform:4:40",
        "--plot", tmp_path / "x.svg", "-o", tmp_path / "x.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    assert [row["load"] for row in result["runs"]] == ["1 client", "3 clients"]
    for row in result["runs"]:
        assert (row["answered"], row["errors"], row["other_lengths"]) == (6, 0, 0), row
        assert row["output_tokens_per_second"] > 0 and row["ttft_ms"]["p50"] > 0
        assert row["cached_tokens"] <= 6  # a first token that a prompt of another level begins with
    assert result["workload"]["vocab"] == 259 and result["servers"]["paged"]["context"] == 96
    assert "| paged  | 3 clients |" in done.stdout and result["machine"]["cores"] >= 1
    assert (tmp_path / "x.svg").read_text().count("output tokens a second") >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks for children in /proc")
@pytest.mark.parametrize(("number", "statuses"), [(signal.SIGINT, {130}), (signal.SIGTERM, {130, 143})])
def test_an_end_that_is_asked_for_ends_the_server_too(environment, model_path, number, statuses):
    command = [sys.executable, "-m", "jaxpaged.app.cli", "bench-serve", "-m", str(model_path)]
    command += ["--compare", "paged"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as bench:
        children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
        deadline = time.monotonic() + 30
        while not (found := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        (server,) = map(int, found)
        bench.send_signal(number)
        assert bench.wait(30) in statuses
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
