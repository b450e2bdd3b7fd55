"""An engine on its thread, behind coroutines."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from engine_kit import NUM_PAGES, alone, greedy, make_engine, prompt

from jaxpaged.app.server.runner import EngineFailedError, EngineRunner
from jaxpaged.engine import ContextError, Engine, QueueFullError, RefusedError


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def run(engine: Engine, use) -> None:
    """Lets ``use(runner)`` happen, and checks that nothing is left of it."""

    async def go() -> None:
        runner = EngineRunner(engine)
        runner.start()
        try:
            await asyncio.wait_for(use(runner), 120)
        finally:
            await runner.close()
        assert runner.num_unfinished == 0

    asyncio.run(go())
    while engine.has_work:
        engine.step()
    engine.check_state()
    assert engine.stats().pages_used == 0


async def text_of(stream) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for output in stream:
        tokens.setdefault(output.index, []).extend(output.tokens)
    return tokens


def test_many_coroutines_share_an_engine(engine):
    async def use(runner):
        async def one(i):
            request = greedy(f"r{i}", prompt(i, 5 + i), 6, n=1 + i % 2)
            tokens = await text_of(await runner.submit(request))
            assert tokens == dict.fromkeys(range(request.n), alone(request.prompt, 6))

        await asyncio.gather(*(one(i) for i in range(8)))

    run(engine, use)


def test_refusals_reach_who_asked_and_nobody_else(engine):
    async def use(runner):
        stream = await runner.submit(greedy("a", prompt(1, 8), 20))
        with pytest.raises(ContextError):
            await runner.submit(greedy("b", prompt(1, 200), 1))
        with pytest.raises(RefusedError, match="'a'"):
            await runner.submit(greedy("a", prompt(1, 8), 1))
        assert (await text_of(stream))[0] == alone(prompt(1, 8), 20)
        asked = [runner.submit(greedy(f"c{i}", prompt(i, 8), 50)) for i in range(40)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        assert refused
        assert all(isinstance(answer, QueueFullError) for answer in refused)
        streams = [answer for answer in answers if not isinstance(answer, Exception)]
        assert len(streams) >= 8
        for stream in streams:
            await stream.abort()

    run(engine, use)


def test_an_aborted_stream_ends_and_its_pages_come_back(engine):
    async def use(runner):
        stream = await runner.submit(greedy("a", prompt(2, 8), 50, n=2))
        async for output in stream:
            if output.index == 0:
                await stream.abort(0)
                await stream.abort(0)
                break
        rest = await text_of(stream)
        assert set(rest) <= {1}
        assert runner.num_unfinished == 0
        other = await runner.submit(greedy("b", prompt(3, 8), 50))
        await anext(other)
        await other.abort()
        with pytest.raises(StopAsyncIteration):
            await anext(other)
        while runner.stats().pages_used:
            await asyncio.sleep(0.01)

    run(engine, use)


def test_a_cancelled_caller_leaves_nothing_behind(engine):
    async def use(runner):
        task = asyncio.create_task(runner.submit(greedy("a", prompt(2, 8), 50)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await runner.call(lambda _: None)
        while runner.stats().running or runner.stats().waiting:
            await asyncio.sleep(0.01)

    run(engine, use)


def test_calls_run_between_steps(engine):
    async def use(runner):
        stream = await runner.submit(greedy("a", prompt(2, 8), 30))
        await anext(stream)
        assert await runner.call(lambda e: (e.check_state(), e.max_seqs)[1]) == 4
        with pytest.raises(RefusedError):
            await runner.call(lambda e: e.save_slot(99, "x"))
        await text_of(stream)
        assert runner.pool_state().num_pages == NUM_PAGES
        assert len(runner.slot_states()) == 4

    run(engine, use)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_is_told_to_everybody(monkeypatch):
    engine = make_engine()

    async def use():
        runner = EngineRunner(engine)
        runner.start()
        stream = await runner.submit(greedy("a", prompt(2, 8), 30))
        await anext(stream)

        def fail():
            raise KeyError("broken")

        monkeypatch.setattr(engine, "step", fail)
        with pytest.raises(EngineFailedError, match="KeyError: 'broken'"):
            await text_of(stream)
        assert not runner.healthy
        with pytest.raises(EngineFailedError):
            await runner.submit(greedy("b", prompt(2, 8), 3))
        await runner.close()

    asyncio.run(asyncio.wait_for(use(), 60))


class SlowEmbedder:
    """Takes a while for a text, and counts how many it has at once."""

    def __init__(self) -> None:
        self.running = self.most = self.done = 0

    def hidden_states(self, tokens):
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.05)
        self.running -= 1
        self.done += 1
        return np.ones((len(tokens), 2), np.float32)


def test_texts_are_embedded_one_at_a_time_also_those_of_clients_that_are_gone(engine):
    embedder = SlowEmbedder()

    async def main() -> None:
        runner = EngineRunner(engine, embedder)
        runner.start()
        tasks = [asyncio.create_task(runner.embed([1] * n)) for n in range(1, 5)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        tasks[2].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [
            True,
            False,
            True,
            False,
        ]
        assert results[3].shape == (4, 2)
        await runner.close()

    asyncio.run(main())
    assert embedder.most == 1 and embedder.done == 3


def test_a_mesh_embeds_nothing(engine):
    async def main() -> None:
        with pytest.raises(RefusedError, match="mesh"):
            await EngineRunner(engine).embed([1])

    asyncio.run(main())
