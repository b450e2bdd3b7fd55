"""Models that are loaded on request and unloaded when idle, over fake engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_runner import FakeRunner
from http_server import TOKENIZER, check_error
from jaxpaged_model import tiny
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES

from jaxpaged.app.errors import InputError
from jaxpaged.app.server.application import create_application
from jaxpaged.app.server.hosting import Hosted, ModelHost
from jaxpaged.app.server.model_folder import models_in
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.state import ServedModel, ServerState


class Runner(FakeRunner):
    """A fake engine that knows whether it was closed, and under how many requests."""

    closed_under: int | None = None
    delay_of_all = 0.0

    def start(self) -> None:
        self.delay = self.delay_of_all

    async def close(self) -> None:
        self.closed_under = len(self.streams)
        await asyncio.sleep(0.01)


class House:
    """A server with some models, all of them fake."""

    def __init__(self, *names: str, by_name: bool = True, autoload: bool = True, **host: Any) -> None:
        self.opened: list[str] = []
        self.runners: list[Runner] = []
        self.broken: set[str] = set()
        self.open_seconds = 0.02
        self.most = 0
        self.delay = 0.0
        self.host = ModelHost([Hosted(name) for name in names], self._open, by_name=by_name, **host)
        self.state = ServerState(ServeOptions(metrics=True, models_autoload=autoload), host=self.host)
        self.state.metrics.watch(self.state.stats)
        self.app = create_application(self.state)

    def _open(self, hosted: Hosted) -> tuple[Runner, ServedModel]:
        time.sleep(self.open_seconds)
        self.opened.append(hosted.name)
        if hosted.name in self.broken:
            raise InputError(f"{hosted.name}: truncated")
        runner = Runner()
        runner.delay_of_all = self.delay
        self.runners.append(runner)
        self.most = max(self.most, 1 + len(self.host.loaded))
        names = (hosted.name or "tiny",)
        return runner, ServedModel(TOKENIZER, BUILTIN_TEMPLATES["chatml"], True, names, str(tiny.PATH), 1024)

    def run(self, scene: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        """Plays a scene; afterwards nothing is held."""

        async def play() -> None:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as client:
                await scene(client)
            assert all(hosted.is_idle for hosted in self.host.models)
            assert not any(runner.closed_under for runner in self.runners)

        asyncio.run(play())

    def statuses(self) -> dict[str, str]:
        return {hosted.name: hosted.status()["value"] for hosted in self.host.models}


def ask(client: httpx.AsyncClient, model: str | None = None, **more: Any) -> Awaitable[httpx.Response]:
    body = {"prompt": "def main", "max_tokens": 2} | ({} if model is None else {"model": model}) | more
    return client.post("/v1/completions", json=body)


def check_answer(response: httpx.Response, model: str) -> None:
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model and response.json()["choices"][0]["text"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_request_names_the_model_which_is_loaded_for_it():
    house = House("a", "b", max_loaded=1)

    async def scene(client: httpx.AsyncClient) -> None:
        assert house.statuses() == {"a": "unloaded", "b": "unloaded"}
        assert (await client.get("/health")).status_code == 200
        check_answer(await ask(client, "a"), "a")
        check_answer(await ask(client), "a")  # the only one that is loaded
        check_answer(await ask(client, "b"), "b")
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["status"]["value"]) for model in listed] == [
            ("a", "unloaded"),
            ("b", "loaded"),
        ]
        assert "meta" in listed[1] and "meta" not in listed[0]
        assert (await client.get("/v1/models/b")).json()["status"] == {"value": "loaded"}
        assert house.opened == ["a", "b"]

    house.run(scene)


def test_names_that_there_are_not():
    house = House("a", "b")

    async def scene(client: httpx.AsyncClient) -> None:
        for response in (await ask(client, "c"), await client.get("/slots?model=c")):
            assert response.status_code == 404
            error = response.json()["error"]
            assert error["code"] == "model_not_found" and "a, b" in error["message"]
        assert "a, b" in check_error(await ask(client), 400)["message"]
        await ask(client, "a")
        await ask(client, "b")
        check_error(await ask(client), 400)
        check_error(await client.get("/slots"), 400)
        assert (await client.get("/slots?model=b")).status_code == 200
        assert "jaxpaged_kv_pages " in (await client.get("/metrics?model=b")).text
        assert "jaxpaged_kv_pages " not in (await client.get("/metrics")).text

    house.run(scene)


def test_the_model_that_was_idle_longest_leaves():
    house = House("a", "b", "c", max_loaded=2)

    async def scene(client: httpx.AsyncClient) -> None:
        for name in "abac":
            await ask(client, name)
        assert house.statuses() == {"a": "loaded", "b": "unloaded", "c": "loaded"}

    house.run(scene)


def test_without_a_number_the_memory_decides_and_one_always_fits():
    house = House("a", "b", has_room=lambda hosted: False)

    async def scene(client: httpx.AsyncClient) -> None:
        for name in "ab":
            check_answer(await ask(client, name), name)
        assert house.statuses() == {"a": "unloaded", "b": "loaded"}

    house.run(scene)


@pytest.mark.parametrize("stream", [False, True])
def test_no_model_leaves_under_a_request_and_all_are_answered(stream):
    house = House("a", "b", max_loaded=1)
    house.delay = 0.002

    async def scene(client: httpx.AsyncClient) -> None:
        names = "aababbbaab" * 4
        for response in await asyncio.gather(*(ask(client, name, stream=stream, n=2) for name in names)):
            assert response.status_code == 200, response.text
        assert house.most == 1
        assert len(house.opened) <= 4, house.opened  # not once a request

    house.run(scene)


def test_a_busy_model_does_not_keep_others_out():
    house = House("a", "b", max_loaded=1)
    house.delay = 0.01

    async def scene(client: httpx.AsyncClient) -> None:
        ended = False

        async def insist() -> None:
            while not ended:
                check_answer(await ask(client, "a"), "a")

        await ask(client, "a")
        users = [asyncio.create_task(insist()) for _ in range(3)]
        check_answer(await asyncio.wait_for(ask(client, "b"), 5), "b")
        ended = True
        await asyncio.gather(*users)

    house.run(scene)


def test_requests_for_one_model_share_its_loading_and_wait_in_line():
    house = House("a", "b", "c", max_loaded=1)
    house.open_seconds = 0.05

    async def scene(client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(ask(client, name) for name in "abcabcabc"))
        assert house.opened == ["a", "b", "c"]

    house.run(scene)


def test_a_model_that_cannot_be_loaded_is_said_and_may_be_tried_again():
    house = House("a", "b")
    house.broken = {"b"}

    async def scene(client: httpx.AsyncClient) -> None:
        for response in await asyncio.gather(*(ask(client, "b") for _ in range(3))):
            assert "b: truncated" in check_error(response, 500)["message"]
        assert house.host.models[1].status() == {
            "value": "unloaded",
            "failed": True,
            "reason": "b: truncated",
        }
        check_answer(await ask(client, "a"), "a")
        house.broken.clear()
        check_answer(await ask(client, "b"), "b")
        assert house.statuses() == {"a": "loaded", "b": "loaded"}

    house.run(scene)


def test_load_and_unload():
    house = House("a", "b")

    async def scene(client: httpx.AsyncClient) -> None:
        def post(verb: str, name: Any) -> Awaitable[httpx.Response]:
            return client.post(f"/models/{verb}", json={"model": name})

        check_error(await post("unload", "a"), 400)
        check_error(await post("load", None), 400)
        for _ in range(2):
            assert (await post("load", "a")).json() == {"success": True}
        assert house.opened == ["a"]
        house.runners[0].delay = 0.05
        running = asyncio.create_task(ask(client, "a"))
        await until(lambda: bool(house.host.models[0].users))
        check_error(await post("unload", "a"), 409)
        check_answer(await running, "a")
        assert (await post("unload", "a")).json() == {"success": True}
        assert house.statuses()["a"] == "unloaded"
        assert (await post("load", "c")).status_code == 404

    house.run(scene)
    check = House("tiny", by_name=False)
    check.run(lambda client: _refused(client))


async def _refused(client: httpx.AsyncClient) -> None:
    check_error(await client.post("/models/load", json={"model": "a"}), 501)


def test_without_autoload_only_the_route_loads():
    house = House("a", autoload=False)

    async def scene(client: httpx.AsyncClient) -> None:
        props = (await client.get("/props")).json()
        assert props["role"] == "router" and props["models_autoload"] is False
        check_error(await client.get("/props?model=a"), 400)
        check_error(await ask(client, "a"), 400)
        assert (await client.post("/models/load", json={"model": "a"})).status_code == 200
        check_answer(await ask(client, "a"), "a")

    house.run(scene)


def test_a_model_sleeps_and_a_request_wakes_it():
    house = House("", by_name=False, sleep_seconds=0.05)
    hosted = house.host.models[0]

    async def scene(client: httpx.AsyncClient) -> None:
        check_error(await client.get("/health"), 503)
        assert check_error(await ask(client), 503)["message"] == "Loading model"
        await house.host.load(hosted)
        before = (await client.get("/metrics")).text
        for number in range(2, 5):
            await until(lambda: hosted.status()["value"] == "sleeping" and not house.host._tasks)
            for path in ("/health", "/v1/models", "/v1/models/tiny", "/metrics", "/props"):
                assert (await client.get(path)).status_code == 200, path
            props = (await client.get("/props")).json()
            assert props["is_sleeping"] and props["total_slots"] == 2 and props["chat_template"]
            assert [line for line in before.split("\n") if "kv_pages" in line] == [
                line for line in (await client.get("/metrics")).text.split("\n") if "kv_pages" in line
            ]
            check_error(await client.get("/slots"), 503)
            assert len(house.opened) == number - 1  # no look wakes it
            waking = [
                ask(client),
                ask(client, "whatever it names"),
                client.post("/tokenize", json={"content": "a"}),
            ]
            for response in await asyncio.gather(*waking):
                assert response.status_code == 200, response.text
            assert len(house.opened) == number
            assert not (await client.get("/props")).json()["is_sleeping"]

    house.run(scene)


def test_requests_that_come_while_a_model_falls_asleep_are_answered():
    house = House("", by_name=False, sleep_seconds=0.01)
    house.open_seconds = 0.005

    async def scene(client: httpx.AsyncClient) -> None:
        await house.host.load(house.host.models[0])
        for i in range(16):
            await asyncio.sleep(0.009 + 0.00025 * i)
            check_answer(await ask(client), "tiny")

    house.run(scene)
    assert len(house.opened) > 2


def test_waiting_ends():
    house = House("a", load_seconds=0.05)
    house.open_seconds = 0.3

    async def scene(client: httpx.AsyncClient) -> None:
        assert "0.05 seconds" in check_error(await ask(client, "a"), 503)["message"]
        await until(lambda: house.statuses()["a"] == "loaded")  # what was begun is finished
        check_answer(await ask(client, "a"), "a")

    house.run(scene)


def test_a_client_that_leaves_while_it_waits_costs_nobody_a_model():
    house = House("a", "b", max_loaded=1)

    async def scene(client: httpx.AsyncClient) -> None:
        await ask(client, "a")
        house.runners[0].delay = 0.1
        running = asyncio.create_task(ask(client, "a"))
        await until(lambda: bool(house.host.models[0].users))
        waiting = asyncio.create_task(ask(client, "b"))
        await until(lambda: house.host.models[0].is_leaving)
        waiting.cancel()
        check_answer(await running, "a")
        await asyncio.sleep(0.05)
        assert house.opened == ["a"] and house.statuses() == {"a": "loaded", "b": "unloaded"}
        house.runners[0].delay = 0.0
        check_answer(await ask(client, "a"), "a")

    house.run(scene)


def test_an_end_while_a_model_loads():
    house = House("a")
    house.open_seconds = 0.1

    async def scene(client: httpx.AsyncClient) -> None:
        waiting = asyncio.create_task(ask(client, "a"))
        await until(lambda: house.host.is_loading)
        house.state.draining = True
        check_error(await ask(client, "a"), 503)
        check_answer(await waiting, "a")  # it was accepted before
        await house.host.close()

    house.run(scene)
    house = House("a")
    house.open_seconds = 0.1

    async def impatient(client: httpx.AsyncClient) -> None:
        waiting = asyncio.create_task(ask(client, "a"))
        await until(lambda: house.host.is_loading)
        house.host.refuse_waiting()
        assert "shutting down" in check_error(await waiting, 503)["message"]

    house.run(impatient)


def test_an_engine_that_has_failed_is_loaded_again():
    house = House("a", "b")

    async def scene(client: httpx.AsyncClient) -> None:
        await ask(client, "a")
        await ask(client, "b")
        house.runners[0].failed = True
        check_error(await ask(client, "a"), 503)
        await house.host.discard_failed()
        assert house.statuses() == {"a": "unloaded", "b": "loaded"}
        check_answer(await ask(client, "a"), "a")

    house.run(scene)


def test_models_of_a_folder(tmp_path: Path):
    for refused in (tmp_path / "no", tmp_path):
        with pytest.raises(InputError, match=r"no such folder|there is no"):
            models_in(refused)
    (tmp_path / "one.gguf").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.gguf").mkdir()
    for part in (1, 2):
        (tmp_path / f"four-0000{part}-of-00002.gguf").write_bytes(b"")
    (tmp_path / "three").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "three" / name).write_bytes(b"")
    assert models_in(tmp_path) == {
        "four": tmp_path / "four-00001-of-00002.gguf",
        "one": tmp_path / "one.gguf",
        "three": tmp_path / "three",
    }
    (tmp_path / "three.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="two models have the name three"):
        models_in(tmp_path)
