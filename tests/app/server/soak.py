"""A soak of the real server: random requests, a third with a schema, many more than fit, all of them checked.

    python tests/app/server/soak.py --requests 5000

One process: uvicorn on a loopback port, the embedded model, and as many clients as asked for, each with connections of
its own. Every text is compared with that of the same prompt alone; at the end no page may be missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import uvicorn

from jaxpaged.app.server import serve
from jaxpaged.app.server.application import create_application
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.runner import EngineRunner
from jaxpaged.app.server.state import ServerState
from jaxpaged.engine import Engine, EngineStats
from jaxpaged.engine.swap import SwapCosts

KEY = "the key of the soak"
LONGEST = 64
_PROMPTS = 24
_SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["red", "green", 3, None]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "integer", "minimum": -20, "maximum": 3000},
    {"type": "string", "pattern": "^[a-f]{1,12}$"},
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["kind", "count"],
        "additionalProperties": False,
    },
]
_WORDS = [
    "def",
    "class",
    "return",
    "import",
    "self",
    "list",
    "for",
    "in",
    "(",
    "):",
    "=",
    "+",
    "[0]",
    "name",
    "None",
]


@dataclass
class Report:
    """Findings of a soak."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    stats: EngineStats | None = None
    seconds: float = 0.0
    megabytes: list[float] = field(default_factory=list)
    """Resident memory after each round."""
    alone: dict[str, list[int]] = field(default_factory=dict)
    """The tokens that each prompt gives alone, from the same server."""

    @property
    def memory_growth(self) -> float:
        """From the end of the first third to the end, relative."""
        return self.megabytes[-1] / self.megabytes[len(self.megabytes) // 3] - 1


def resident_megabytes() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def prompts() -> list[str]:
    """Texts of all lengths, some with long beginnings in common."""
    rng = random.Random(0)
    systems = [" ".join(rng.choices(_WORDS, k=50)) for _ in range(3)]
    return [
        (systems[i % 3] if i % 2 else "") + f"\n# {i}\n" + " ".join(rng.choices(_WORDS, k=rng.randint(1, 60)))
        for i in range(_PROMPTS)
    ]


class Client:
    """A client that asks, streams, disconnects, and compares."""

    def __init__(self, url: str, expected: dict[str, dict[str, Any]], report: Report, seed: int) -> None:
        self.expected, self.report, self.rng = expected, report, random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)

    async def run(self, count: list[int]) -> None:
        """Takes requests off ``count`` until there are none."""
        async with self.http:
            while count[0] > 0:
                count[0] -= 1
                action = self.rng.choices(
                    [
                        self.ask,
                        self.stream,
                        self.disconnect_while_reading,
                        self.disconnect_while_waiting,
                        self.ask_nonsense,
                        self.ask_constrained,
                    ],
                    [27, 17, 10, 10, 3, 33],
                )[0]
                await action()

    def body(self, **more: Any) -> dict[str, Any]:
        """A request with a known answer."""
        rng = self.rng
        body = {
            "prompt": rng.choice(list(self.expected)),
            "max_tokens": rng.randint(1, LONGEST),
            "temperature": 0.0,
        }
        body |= {"cache_salt": rng.choice(["a", "b"])} if rng.random() < 0.3 else {}
        body |= {"n": rng.randint(2, 3)} if rng.random() < 0.15 else {}
        body |= {"priority": rng.randint(-1, 1)} if rng.random() < 0.2 else {}
        return body | more

    def compare(
        self, body: dict[str, Any], texts: dict[int, str], reasons: dict[int, str], tokens: int
    ) -> None:
        """Every choice against what the prompt gives alone."""
        known, count, n = self.expected[body["prompt"]], body["max_tokens"], body.get("n", 1)
        ended = count > known["tokens"]
        wanted = min(count, known["tokens"])
        whole = known["prefixes"][wanted]
        problems = [
            i for i in range(n) if texts.get(i) != whole or reasons.get(i) != ("stop" if ended else "length")
        ]
        if problems or tokens != n * wanted:
            self.report.wrong.append(f"{body}: {tokens} tokens, {reasons}, {texts} instead of {whole!r}")
        self.report.outcomes["right" if not problems else "wrong"] += 1

    async def refused(self, response: httpx.Response) -> bool:
        """True if the server was full, and answered so properly."""
        if response.status_code == 200:
            return False
        await response.aread()
        self.report.outcomes[str(response.status_code)] += 1
        error = response.json().get("error", {})
        if (
            response.status_code not in (429, 503)
            or "Retry-After" not in response.headers
            or "message" not in error
        ):
            self.report.wrong.append(f"{response.status_code}: {response.text}")
        await asyncio.sleep(self.rng.uniform(0.05, 0.3))
        return True

    async def ask(self) -> None:
        body = self.body()
        while await self.refused(response := await self.http.post("/v1/completions", json=body)):
            pass
        answer = response.json()
        choices = answer["choices"]
        self.compare(
            body,
            {c["index"]: c["text"] for c in choices},
            {c["index"]: c["finish_reason"] for c in choices},
            answer["usage"]["completion_tokens"],
        )

    async def stream(self) -> None:
        body = self.body(stream=True, stream_options={"include_usage": True})
        while True:
            async with self.http.stream("POST", "/v1/completions", json=body) as response:
                if await self.refused(response):
                    continue
                texts, reasons, tokens, done = {}, {}, 0, False
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        done = True
                        continue
                    event = json.loads(line[6:])
                    tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
                    for choice in event["choices"]:
                        i = choice["index"]
                        texts[i] = texts.get(i, "") + choice["text"]
                        reasons[i] = choice["finish_reason"] or reasons.get(i)
                if not done:
                    self.report.wrong.append(f"{body}: the stream has no end")
                self.compare(body, texts, reasons, tokens)
                return

    async def disconnect_while_reading(self) -> None:
        body = self.body(stream=True, max_tokens=LONGEST)
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if not await self.refused(response):
                left = self.rng.randint(0, 6)
                async for _ in response.aiter_lines():
                    left -= 1
                    if left < 0:
                        break
                self.report.outcomes["given up reading"] += 1

    async def disconnect_while_waiting(self) -> None:
        try:
            await self.http.post("/v1/completions", json=self.body(), timeout=self.rng.uniform(0.005, 0.2))
            self.report.outcomes["in time"] += 1
        except httpx.TimeoutException:
            self.report.outcomes["given up waiting"] += 1

    async def ask_constrained(self) -> None:
        """A request with a schema: the answer is valid, unless it was cut."""
        rng = self.rng
        schema = rng.choice(_SCHEMAS)
        body = {
            "prompt": rng.choice(list(self.expected)),
            "max_tokens": rng.randint(8, 2 * LONGEST),
            "temperature": rng.choice([0.0, 1.0, 2.0]),
            "seed": rng.randint(0, 2**31),
            "n": rng.choice([1, 1, 1, 2]),
            "structured_outputs": {"json": schema},
        }
        while await self.refused(response := await self.http.post("/v1/completions", json=body)):
            pass
        for choice in response.json()["choices"]:
            if choice["finish_reason"] == "length":
                self.report.outcomes["constrained, cut"] += 1
                continue
            try:
                jsonschema.validate(json.loads(choice["text"]), schema)
                self.report.outcomes["constrained, valid"] += 1
            except ValueError as error:
                self.report.wrong.append(f"{body}: {choice}: {error}")
            except jsonschema.ValidationError as error:
                self.report.wrong.append(f"{body}: {choice}: {error.message}")

    async def ask_nonsense(self) -> None:
        bad = self.rng.choice(
            [
                {"prompt": 5}, {"prompt": ""}, {"prompt": "x", "max_tokens": -2}, {"prompt": "x", "n": 10**9},
                {"prompt": "x", "json_schema": {"type": "what"}}, {"prompt": "x", "grammar": "root ::= missing"},
                {"prompt": "x" * 20000}, {"prompt": [10**9]}, {"prompt": "x", "temperature": "hot"}, {},
            ]
        )  # fmt: skip
        response = await self.http.post("/v1/completions", json=bad)
        if response.status_code != 400 or not response.json()["error"]["message"]:
            self.report.wrong.append(f"{bad}: {response.status_code} {response.text}")
        self.report.outcomes["nonsense refused"] += 1


async def _expected(http: httpx.AsyncClient, model: Any, report: Report) -> dict[str, dict[str, Any]]:
    """Text of each prompt alone: asked for one by one, outside of the prefix cache."""
    expected = {}
    for prompt in prompts():
        body = {
            "prompt": prompt,
            "n_predict": LONGEST,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = (await http.post("/completion", json=body)).raise_for_status().json()
        ids = report.alone[prompt] = answer["tokens"]
        decoder = model.tokenizer.stream(at_start=False)
        prefixes, text = [""], ""
        for token in ids:
            text += decoder.push(token)
            prefixes.append(text)
        expected[prompt] = {"tokens": len(ids), "prefixes": prefixes}
    return expected


class _AlwaysSwap(SwapCosts):
    """Makes every preemption a swap."""

    def swap_is_cheaper(self, num_tokens: int, num_bytes: int) -> bool:
        return True


def _always_swap(engine: Engine) -> None:
    for shard in engine.shards:
        shard.pool.costs = _AlwaysSwap()


async def soak(
    *,
    requests: int,
    clients: int,
    pages: int,
    rounds: int = 10,
    swap: bool = False,
    mesh: str | None = None,
    seed: int = 0,
    limit_seconds: float = 1200,
) -> Report:
    """Runs it; raises what the engine's own checks find."""
    options = ServeOptions(
        ctx_size=256, parallel=8, kv_pages=pages, page_size=16, max_queue=12, batch_size=128, swap_space=2**24,
        api_keys=(KEY,), log=False, mesh=mesh,
    )  # fmt: skip
    state = ServerState(options)
    runner, model = await asyncio.to_thread(serve.load_engine, options)
    runner.start()
    if swap:
        await runner.call(_always_swap)
    hosted = state.host.models[0]
    hosted.model, hosted.runner = model, runner
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        config = uvicorn.Config(create_application(state), http="h11", log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            return await asyncio.wait_for(
                _soaked(state, runner, url, requests=requests, clients=clients, rounds=rounds, seed=seed),
                limit_seconds,
            )
        finally:
            server.should_exit = True
            await serving
            await runner.close()


async def _soaked(
    state: ServerState, runner: EngineRunner, url: str, *, requests: int, clients: int, rounds: int, seed: int
) -> Report:
    report = Report()
    while (await _status(url)) != 200:
        await asyncio.sleep(0.05)
    async with httpx.AsyncClient(base_url=url, headers={"X-Api-Key": KEY}, timeout=60) as http:
        expected = await _expected(http, state.host.models[0].model, report)
    begin = time.monotonic()
    for number in range(rounds):
        count = [requests // rounds]
        users = [Client(url, expected, report, seed * 10_000 + number * 100 + i) for i in range(clients)]
        await asyncio.gather(*(user.run(count) for user in users))
        report.megabytes.append(resident_megabytes())
    report.seconds = time.monotonic() - begin
    deadline = time.monotonic() + 10
    while runner.stats().running + runner.stats().waiting and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    await runner.call(_check)
    report.stats = runner.stats()
    if runner.num_unfinished or state.generations:
        report.wrong.append(
            f"{runner.num_unfinished} requests and {len(state.generations)} generations are left"
        )
    return report


async def _status(url: str) -> int:
    async with httpx.AsyncClient(base_url=url) as http:
        try:
            return (await http.get("/health")).status_code
        except httpx.ConnectError:
            return 0


def _check(engine: Engine) -> None:
    """No page is missing, and none is left in use."""
    engine.check_state()
    stats = engine.stats()
    left = {
        name: getattr(stats, name)
        for name in ("running", "waiting", "swapped", "pages_used", "compiled_late")
    }
    assert not any(left.values()), left
    assert stats.pages_free + stats.pages_cached == stats.pages_total, stats


def main() -> int:
    """The command line; the exit status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument(
        "--clients", type=int, default=80, help="at once; 8 run and 12 wait, so 80 are four times that"
    )
    parser.add_argument("--pages", type=int, default=40, help="of 16 tokens; 8 sequences may want 128")
    parser.add_argument("--swap", action="store_true", help="preempted sequences always go to host memory")
    parser.add_argument("--mesh", help="as of jaxpaged serve; pages are those of all data shards")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.swap and options.mesh:
        parser.error("--swap is for one device")
    report = asyncio.run(soak(**vars(options)))
    print(f"{options.requests} requests of {options.clients} clients in {report.seconds:.1f} s")
    print("outcomes:", dict(report.outcomes))
    print("resident MB:", [round(x) for x in report.megabytes], f"growth {report.memory_growth:+.1%}")
    print(report.stats)
    for line in report.wrong[:10]:
        print("WRONG:", line)
    print(f"{len(report.wrong)} wrong")
    return bool(report.wrong)


if __name__ == "__main__":
    from jaxpaged.app.environment import prepare

    prepare()
    sys.exit(main())
