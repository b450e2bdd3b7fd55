"""Generation: the samples of one HTTP request, from submission to text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxpaged.app.server.errors import ApiError, as_api_error
from jaxpaged.app.server.interfaces import Stream
from jaxpaged.app.server.runner import EngineFailedError
from jaxpaged.app.server.sampling_schema import SamplingFields, engine_request, seed_of, special_stops
from jaxpaged.app.server.state import ServerState
from jaxpaged.app.server.text import SampleText, TextPart
from jaxpaged.engine.constraint import Constraint
from jaxpaged.engine.request import EngineRequest, RefusedError, RequestTimes, SampleOutput

StopType = Literal["eos", "limit", "word"]
MAX_CHOICES = 128
"""Samples of a request, over all its prompts, at most."""
_background: set[asyncio.Task[None]] = set()  # the event loop holds tasks only weakly


@dataclass
class Choice:
    """State of one sample."""

    index: int
    prompt: int
    """Index of its prompt."""
    num_prompt: int
    text: SampleText
    slot: int = -1
    """Slot of the sample; -1 = none yet."""
    num_cached: int = 0
    truncated: bool = False
    has_new_line: bool = False
    times: RequestTimes = field(default_factory=RequestTimes)
    last_token: float = 0.0
    stop_type: StopType | None = None
    """None while the sample is running."""
    special_stop: str | None = None
    """The special token that ended it, if the request named it as a stop string."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it."""
        return self.text.stopped_by or self.special_stop

    @property
    def num_tokens(self) -> int:
        """Tokens generated, those of a stop string included."""
        return self.text.num_tokens

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's name of the stop type."""
        return {None: None, "eos": "stop", "word": "stop", "limit": "length"}[self.stop_type]

    def timings(self) -> dict[str, float]:
        """llama-server's ``timings``."""
        prompt_n = self.num_prompt - self.num_cached
        prompt_ms = 1e3 * max(0.0, self.times.first_token - self.times.scheduled)
        predicted_ms = 1e3 * max(0.0, self.last_token - self.times.first_token)
        return {
            "cache_n": self.num_cached,
            **_rate("prompt", prompt_n, prompt_ms),
            # The first token comes with the last prefill step, so the time is that of the others.
            **_rate("predicted", self.num_tokens, predicted_ms, timed=max(0, self.num_tokens - 1)),
        }


def _rate(name: str, count: int, milliseconds: float, *, timed: int | None = None) -> dict[str, float]:
    timed = count if timed is None else timed
    return {
        f"{name}_n": count,
        f"{name}_ms": milliseconds,
        f"{name}_per_token_ms": milliseconds / timed if timed else 0.0,
        f"{name}_per_second": 1e3 * timed / milliseconds if milliseconds else 0.0,
    }


@dataclass(frozen=True)
class Update:
    """New text of a choice."""

    choice: Choice
    part: TextPart
    is_last: bool = False
    """True if it ends the choice."""


def gathered(choices: Sequence[Choice], updates: Iterable[Update]) -> list[TextPart]:
    """The text of each choice, joined from updates."""
    parts = [TextPart() for _ in choices]
    for update in updates:
        parts[update.choice.index].extend(update.part)
    return parts


class Generation:
    """A request in the engine: call ``start``, iterate over ``updates``, and always call ``close``."""

    def __init__(
        self,
        state: ServerState,
        prompts: Sequence[Sequence[int]],
        fields: SamplingFields,
        *,
        constraint: Constraint | None = None,
        visible: frozenset[int] = frozenset(),
    ) -> None:
        """visible: special tokens that belong to the text."""
        model, runner = state.accepting()
        tokenizer, n = model.tokenizer, fields.samples
        if len(prompts) * n > MAX_CHOICES:
            raise ApiError(
                400, f"{len(prompts)} prompts with n = {n}: at most {MAX_CHOICES} choices", param="n"
            )
        self._state, self._runner, self._tokenizer = state, runner, tokenizer
        self._prompts, self._fields, self._constraint = prompts, fields, constraint
        self._special_stops: dict[int, str] = special_stops(fields.stops, tokenizer)
        self._streams: dict[int, Stream] = {}
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[int, SampleOutput] | ApiError] = asyncio.Queue()
        self.choices = [
            Choice(
                prompt * n + i,
                prompt,
                len(ids),
                SampleText(tokenizer.stream(at_start=False, visible=visible), fields.stops),
            )
            for prompt, ids in enumerate(prompts)
            for i in range(n)
        ]
        self.requests: list[EngineRequest] = []

    async def start(self) -> None:
        """Submits all prompts, or none.

        Raises:
          RefusedError: the engine refused one; the others are aborted.
          EngineFailedError: the engine has failed.
        """
        state, seed = self._state, seed_of(self._fields, self._state.options)
        self.requests = [
            engine_request(
                f"{next(state.numbers)}",
                prompt,
                self._fields,
                state.options,
                self._tokenizer,
                seed=seed,
                constraint=self._constraint,
            )
            for prompt in self._prompts
        ]
        self._state.generations.add(self)
        tasks = [asyncio.create_task(self._submit(*pair)) for pair in enumerate(self.requests)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            # All tasks must have ended before close can abort their requests.
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self.close()
            raise
        self._pumps = [
            asyncio.create_task(self._pump(prompt, stream)) for prompt, stream in self._streams.items()
        ]
        for pump in self._pumps:
            pump.add_done_callback(self._look)

    async def _submit(self, prompt: int, request: EngineRequest) -> None:
        self._streams[prompt] = await self._runner.submit(request)

    async def _pump(self, prompt: int, stream: Stream) -> None:
        try:
            async for output in stream:
                self._queue.put_nowait((prompt, output))
        except (EngineFailedError, RefusedError) as error:
            self._queue.put_nowait(as_api_error(error))

    def _look(self, pump: asyncio.Task[None]) -> None:
        """Reports an exception of a pump, a bug, so that ``updates`` does not wait forever."""
        if not pump.cancelled() and (bug := pump.exception()) is not None:
            self.fail(ApiError(500, "internal error"))
            pump.get_loop().call_exception_handler(
                {"message": "the output stream of a request broke", "exception": bug}
            )

    async def updates(self) -> AsyncIterator[Update]:
        """New text of the choices, until all are finished.

        Raises:
          ApiError: the engine failed, or the server is shutting down.
        """
        open_choices = len(self.choices)
        while open_choices:
            news = await self._queue.get()
            if isinstance(news, ApiError):
                raise news
            prompt, output = news
            choice = self.choices[prompt * self._fields.samples + output.index]
            if choice.stop_type is not None:  # sent before the choice ended
                continue
            now = time.monotonic()
            before = choice.num_tokens
            # Tokens of one output came together: the time since the last one is divided among them.
            seconds = (now - choice.last_token) / max(1, len(output.tokens))
            if output.tokens:
                choice.last_token = now
                if not before:
                    self._state.metrics.began(output.times)
            choice.slot, choice.num_cached, choice.times = output.slot, output.num_cached, output.times
            choice.truncated = choice.truncated or output.truncated
            # With log-probabilities each token is an update of its own, as in llama-server.
            step = 1 if output.logprobs else max(1, len(output.tokens))
            for start in range(0, max(1, len(output.tokens)), step):
                update = await self._update(choice, output, start, start + step, now)
                yield update
                if choice.stop_type is not None:
                    open_choices -= 1
                    break
            for _ in range(choice.num_tokens - before if before else 0):
                self._state.metrics.inter_token.observe(seconds)

    async def _update(self, choice: Choice, output: SampleOutput, start: int, end: int, now: float) -> Update:
        """The update from an output's tokens ``start`` to ``end``."""
        logprobs = output.logprobs[start:end] if output.logprobs else None
        part = choice.text.push(output.tokens[start:end], logprobs)
        choice.has_new_line = choice.has_new_line or "\n" in part.text
        if choice.text.stopped_by is not None:
            choice.stop_type = "word"
        elif end < len(output.tokens):
            return Update(choice, part)
        elif output.finish_reason == "abort":
            raise ApiError(503, "the request was aborted")
        elif output.finish_reason == "nan":
            raise ApiError(
                500, "the model's logits hold NaN: its weights, or their dtype, cannot compute this text"
            )
        elif output.finish_reason == "constraint":
            raise ApiError(
                400, "the grammar allowed no token, or grew beyond its limits, in the middle of the answer"
            )
        elif output.finish_reason == "stop":
            choice.special_stop = self._special_stops.get(
                -1 if output.stop_token is None else output.stop_token
            )
            choice.stop_type = "eos" if choice.special_stop is None else "word"
        elif output.finish_reason is not None or self._is_late(choice, now):
            choice.stop_type = "limit"
        if choice.stop_type is not None:
            if choice.text.stopped_by is None:
                part.extend(choice.text.finish())
                if choice.text.stopped_by is not None:  # an incomplete last character was a stop string
                    choice.stop_type = "word"
            if output.finish_reason is None:
                await self._streams[choice.prompt].abort(output.index)
            self._state.metrics.ended(
                choice.times,
                reason=choice.stop_type,
                prompt=choice.num_prompt - choice.num_cached if output.index == 0 else 0,
                generated=choice.num_tokens,
                now=now,
            )
        return Update(choice, part, choice.stop_type is not None)

    def _is_late(self, choice: Choice, now: float) -> bool:
        limit = self._fields.seconds
        return limit is not None and choice.has_new_line and now - choice.times.first_token > limit

    def fail(self, error: ApiError) -> None:
        """Ends the generation with an error."""
        self._queue.put_nowait(error)

    def close(self) -> None:
        """Aborts samples that are still running; idempotent.

        In a separate task, because the caller's may be cancelled at its next await.
        """
        self._state.generations.discard(self)
        for pump in self._pumps:
            pump.cancel()
        streams, self._streams = list(self._streams.values()), {}
        if streams:
            aborted = sum(choice.stop_type is None for choice in self.choices)
            self._state.metrics.finished.labels("abort").inc(aborted)
            task = asyncio.get_running_loop().create_task(_abort_all(streams))
            _background.add(task)
            task.add_done_callback(_background.discard)


async def _abort_all(streams: Iterable[Stream]) -> None:
    for stream in streams:
        await stream.abort()
