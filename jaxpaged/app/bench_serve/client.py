"""Streamed requests to an OpenAI-compatible server, with the time of each token."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from jaxpaged.app.bench_serve.workload import RequestSpec

BUSY = (429, 503)
"""Status codes of a server that may accept the request later."""
_LONGEST_WAIT = 10.0
"""Longest wait for a Retry-After, in seconds."""
_USUAL_WAIT = 1.0
_LONGEST_MESSAGE = 300


@dataclass
class Record:
    """Record of one request; times in seconds of the client's clock."""

    num_prompt: int
    num_output: int
    """Tokens requested."""
    arrival: float
    """Time at which the client was ready to send; waiting for a busy server counts as latency."""
    chunks: list[tuple[float, int | None]] = field(default_factory=list)
    """Time of each chunk, and its tokens if the server reports them."""
    ended: float | None = None
    """Time of the finish reason; the last tokens may have no text, as special tokens."""
    finished: float | None = None
    """Time at which the request ended, with or without success."""
    prompt_tokens: int | None = None
    """Number reported by the server; None if it reports none."""
    completion_tokens: int | None = None
    cached_tokens: int = 0
    retries: int = 0
    """Number of answers 429 or 503."""
    error: str | None = None

    @property
    def ok(self) -> bool:
        """True if the request succeeded."""
        return self.error is None and self.finished is not None and bool(self.chunks)


class StreamError(ValueError):
    """A malformed stream, or an error in it."""


class Client:
    """Sends requests, each on its own connection of a pool.

    Args:
      http: with the server's address as ``base_url``.
      model: the name that requests carry.
      timeout: seconds per request, retries included.
      max_retries: after answers 429 and 503.
      logprobs: request log-probabilities, which say how many tokens a chunk has.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str | None,
        *,
        timeout: float,
        max_retries: int,
        logprobs: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http, self._timeout, self._max_retries = http, timeout, max_retries
        self._common: dict[str, Any] = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "temperature": 0,
        }
        if model is not None:
            self._common["model"] = model
        if logprobs:
            self._common["logprobs"] = 0
        self.clock, self.sleep = clock, sleep

    def record(self, spec: RequestSpec, arrival: float) -> Record:
        """An empty record of a request."""
        return Record(len(spec.prompt), spec.num_output, arrival)

    async def complete(self, spec: RequestSpec, record: Record) -> None:
        """Sends the request and fills ``record``, also with errors; raises nothing."""
        body = self._common | {"prompt": list(spec.prompt), "max_tokens": spec.num_output}
        try:
            async with asyncio.timeout(self._timeout):
                await self._until_served(body, record)
        except TimeoutError:
            record.error = f"no end after {self._timeout:g} s"
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}".rstrip(": ")
        except StreamError as error:
            record.error = str(error)
        record.finished = self.clock()

    async def _until_served(self, body: dict[str, Any], record: Record) -> None:
        for attempt in range(self._max_retries + 1):
            wait = await self._try(body, record)
            if wait is None:
                return
            if attempt < self._max_retries:
                record.retries += 1
                await self.sleep(wait)
        record.error = f"busy: {record.error}, {self._max_retries + 1} times"

    async def _try(self, body: dict[str, Any], record: Record) -> float | None:
        """Tries once; seconds to wait before a retry, None if there is none."""
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                record.error = f"{response.status_code}: {_message(response)}"
                return retry_after(response) if response.status_code in BUSY else None
            record.error = None
            await self._read(response, record)
            return None

    async def _read(self, response: httpx.Response, record: Record) -> None:
        async for line in response.aiter_lines():
            if not line.startswith("data:"):  # comments keep a connection open; other fields are not used
                continue
            now, data = self.clock(), line[5:].strip()
            if data == "[DONE]":
                if not record.chunks and record.completion_tokens and record.ended is not None:
                    record.chunks.append((record.ended, None))  # no token has text
                if not record.chunks:
                    raise StreamError("the answer has no tokens")
                return
            take_event(data, now, record)
        raise StreamError("the stream ended before [DONE]")


def take_event(data: str, now: float, record: Record) -> None:
    """Adds one event of a stream to the record.

    Raises:
      StreamError: it is an error, or no event of a completion.
    """
    try:
        event = json.loads(data)
    except json.JSONDecodeError as error:
        raise StreamError(f"an event is not JSON: {data[:80]!r}") from error
    if not isinstance(event, dict):
        raise StreamError(f"an event is no object: {data[:80]!r}")
    if refusal := event.get("error"):
        message = refusal.get("message") if isinstance(refusal, dict) else refusal
        raise StreamError(f"in the stream: {str(message)[:_LONGEST_MESSAGE]}")
    for choice in event.get("choices") or ():
        count = _tokens_of(choice)
        if choice.get("text") or count:
            record.chunks.append((now, count))
        if choice.get("finish_reason"):
            record.ended = now
    if usage := event.get("usage"):
        record.prompt_tokens = usage.get("prompt_tokens")
        record.completion_tokens = usage.get("completion_tokens")
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _tokens_of(choice: dict[str, Any]) -> int | None:
    """Number of tokens of a chunk, by its log-probabilities or token ids; None if it has neither."""
    tokens = (choice.get("logprobs") or {}).get("tokens") or choice.get("token_ids")
    return len(tokens) if tokens else None


def retry_after(response: httpx.Response) -> float:
    """Seconds of a Retry-After, within bounds; dates are ignored."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return _USUAL_WAIT
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else _USUAL_WAIT


def _message(response: httpx.Response) -> str:
    """Error message of an answer, on one line."""
    text = response.text
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (json.JSONDecodeError, KeyError, TypeError):
        pass  # not OpenAI's shape: as it is
    return " ".join(text.split())[:_LONGEST_MESSAGE]
