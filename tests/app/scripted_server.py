"""A server that answers by a script, in virtual time, and the load that is put on it."""

from __future__ import annotations

import asyncio
import json
import selectors

import httpx

from jaxpaged.app.bench_serve import watch
from jaxpaged.app.bench_serve.client import Client
from jaxpaged.app.bench_serve.load import apply_load
from jaxpaged.app.bench_serve.workload import RequestSpec


class _Selector(selectors.DefaultSelector):
    """Waits in no time: the clock jumps to when something happens."""

    now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everybody waits, and nothing will happen"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.selector = _Selector()
        super().__init__(self.selector)

    def time(self):
        return self.selector.now


def in_virtual_time(coroutine):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


class Stub(httpx.AsyncByteStream):
    """A server that serves ``slots`` requests at once, each by the same script of ``(seconds, tokens)``."""

    def __init__(self, script, *, slots=1000, told=True, usage=True, refusals=(), raw=None):
        self.script, self.told, self.usage, self.raw = script, told, usage, raw
        self.refusals = list(refusals)
        self.slots = asyncio.Semaphore(slots)
        self.bodies = []
        self.running = 0

    def __call__(self, request):
        if request.url.path == "/pool":
            pool = {"running": self.running, "waiting": 0, "pages_used": 2 * self.running, "pages_cached": 1}
            return httpx.Response(200, json=pool | {"pages_free": 3, "waste": 0.25, "preemptions": 7})
        self.bodies.append(json.loads(request.content))
        if self.refusals:
            status, headers = self.refusals.pop(0)
            return httpx.Response(
                status, headers=headers, json={"error": {"message": "full", "code": status}}
            )
        return httpx.Response(200, stream=self)

    async def __aiter__(self):
        if self.raw is not None:
            for line in self.raw:
                yield f"{line}\n\n".encode()
            return
        async with self.slots:
            self.running += 1
            try:
                for seconds, tokens in self.script:
                    await asyncio.sleep(seconds)
                    choice = {"index": 0, "text": "x" * tokens, "finish_reason": None, "logprobs": None}
                    if self.told:
                        choice["logprobs"] = {"tokens": ["x"] * tokens}
                    yield f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n".encode()
                yield b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}\n\n'
                if self.usage:
                    count = sum(tokens for _, tokens in self.script)
                    usage = {"prompt_tokens": 3, "completion_tokens": count}
                    usage |= {"prompt_tokens_details": {"cached_tokens": 1}}
                    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
                yield b"data: [DONE]\n\n"
            finally:  # the client goes at [DONE]
                self.running -= 1


SCRIPT = ((0.5, 1), (0.3, 3), (0.2, 1))
"""A first token, three that come together, a last one: a second in all."""


def specs(count, arrivals=None):
    return [RequestSpec(i, (1, 2, 3), 5, arrivals[i] if arrivals else None) for i in range(count)]


def run(stub, load, requests, *, timeout=100.0, max_retries=3, time_limit=1000.0, samples=None):
    async def main():
        loop = asyncio.get_running_loop()
        transport = httpx.MockTransport(stub)
        async with httpx.AsyncClient(transport=transport, base_url="http://stub", timeout=None) as http:
            client = Client(http, "m", timeout=timeout, max_retries=max_retries, clock=loop.time)
            watcher = asyncio.create_task(watch.watch(http, [] if samples is None else samples, 1e3))
            records = await apply_load(client, requests, load, time_limit=time_limit)
            watcher.cancel()
            return records

    return in_virtual_time(main())
