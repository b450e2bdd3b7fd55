"""What is asked of the engine, what it answers, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "nan"]
"""nan: the model's logits held NaN, and the tokens so far may mean nothing."""

MAX_STOP_IDS = 32
"""Stop tokens that a request may name."""
MAX_LOGIT_BIAS = 256
"""Tokens whose logits a request may change."""
MAX_LOGPROBS = 20
"""Likeliest tokens whose log-probabilities a request may ask for."""
MAX_SAMPLES = 128
"""Samples of one prompt that a request may ask for."""
MAX_SALT = 256
"""Characters of a cache salt."""
_UINT32, _INT32 = 2**32, 2**31


class RefusedError(ValueError):
    """A request that the engine cannot serve, now or ever; nothing was changed. The message says what is allowed."""


class ContextError(RefusedError):
    """A prompt that leaves no room in the context."""

    def __init__(self, num_prompt: int, n_ctx: int) -> None:
        self.num_prompt, self.n_ctx = num_prompt, n_ctx
        super().__init__(
            f"the prompt has {num_prompt} tokens; the context of {n_ctx} tokens has room for {n_ctx - 1} "
            "and one to generate"
        )


class PoolError(RefusedError):
    """A request that would not fit the whole pool; waiting for pages would be in vain."""

    def __init__(self, requested: int, total: int) -> None:
        self.requested, self.total = requested, total
        super().__init__(f"the request may need {requested} pages, the whole pool has {total}")


class QueueFullError(RefusedError):
    """As many requests wait as may wait; a later try may succeed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} requests wait already; try again later")


class SlotBusyError(RefusedError):
    """A slot that a request runs in; a later try may succeed."""

    def __init__(self, slot: int) -> None:
        super().__init__(f"slot {slot} is busy; try again when its request is done")


@dataclass(frozen=True)
class EngineRequest:
    """One prompt and how to continue it. Sampling parameters mean what they mean in ``sampling.SamplingParams``.

    Raises:
      RefusedError: a value that means nothing; the line names the parameter, the value and what is allowed.
    """

    request_id: str
    """Chosen by the caller; no two requests in the engine share one."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int | None = None
    """Tokens to generate at most; None: as many as the context has room for."""
    n: int = 1
    """Samples; they share the prompt's pages. Sample i draws with ``seed + i``."""
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    """Tokens that penalties look at; -1 = the context."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """0 to 2**32 - 1."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a sample; they are not part of it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens before anything else; -inf forbids a token."""
    num_logprobs: int | None = None
    """None: no log-probabilities; k: those of the token and of the k likeliest ones."""
    priority: int = 0
    """Smaller goes first; equal ones in order of arrival."""
    cache_salt: str = ""
    """Requests share cached pages only with requests of the same salt."""
    cache_prompt: bool = True
    """Whether the prompt may be taken from pages that are in the pool already."""
    slot: int | None = None
    """The slot that its first sample has to have, as ``/slots`` counts them; it waits until that is free."""
    n_keep: int = 0
    """Tokens at the beginning that a context shift keeps; negative: the whole prompt."""
    n_discard: int = 0
    """Tokens that a context shift forgets at a time; 0 = half of those that are not kept."""

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise RefusedError(f"{name} = {getattr(self, name)!r}: {allowed}")

        if not self.prompt:
            raise RefusedError("the prompt is empty: it needs at least one token")
        if self.max_new_tokens is not None and not 0 <= self.max_new_tokens < _INT32:
            refuse("max_new_tokens", "must be at least 0")
        if not 1 <= self.n <= MAX_SAMPLES:
            refuse("n", f"must be 1 to {MAX_SAMPLES}")
        for name in ("temperature", "presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) < 1e30:
                refuse(name, "must be finite")
        for name in ("top_p", "repeat_penalty"):
            if not 0.0 < getattr(self, name) < 1e30:
                refuse(name, "must be above 0 and finite")
        if not 0.0 <= self.min_p <= 1.0:
            refuse("min_p", "must be from 0 to 1")
        for name in ("top_k", "repeat_last_n", "n_keep", "priority"):
            if not -_INT32 <= getattr(self, name) < _INT32:
                refuse(name, "must fit 32 bits")
        if self.repeat_last_n < -1:
            refuse("repeat_last_n", "must be at least -1")
        if not 0 <= self.n_discard < _INT32:
            refuse("n_discard", "must be at least 0")
        if not 0 <= self.seed < _UINT32:
            refuse("seed", "must be from 0 to 2**32 - 1")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise RefusedError(f"{len(self.stop_ids)} stop tokens: at most {MAX_STOP_IDS} are allowed")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RefusedError(
                f"logit_bias names {len(self.logit_bias)} tokens: at most {MAX_LOGIT_BIAS} are allowed"
            )
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias > 1e30:
                raise RefusedError(f"logit_bias of token {token} = {bias}: must be a finite number, or -inf")
        if self.num_logprobs is not None and not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            refuse("num_logprobs", f"must be 0 to {MAX_LOGPROBS}")
        if len(self.cache_salt) > MAX_SALT:
            raise RefusedError(
                f"cache_salt has {len(self.cache_salt)} characters: at most {MAX_SALT} are allowed"
            )


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place of a sample, at temperature 1 and before truncation."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """``(token, logprob)`` of the likeliest, as many as were asked for, in order."""


@dataclass
class RequestTimes:
    """When things happened to a request, in seconds of ``time.monotonic``; 0.0 = not yet."""

    arrived: float = 0.0
    scheduled: float = 0.0
    """First part of the prompt computed."""
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True)
class SampleOutput:
    """What one step did for one sample of a request."""

    request_id: str
    index: int
    """Which sample, from 0."""
    tokens: tuple[int, ...]
    """New tokens, in order; a stop token is none of them."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One a token, where they were asked for."""
    finish_reason: FinishReason | None
    """None: it goes on."""
    stop_token: int | None
    """The stop token that ended it."""
    slot: int
    """The slot that it ran in."""
    num_cached: int
    """Tokens of the prompt that were in the pool already when the sample was first admitted."""
    truncated: bool
    """The context is full, or was shifted."""
    times: RequestTimes
    """Of the request's first sample so far."""


@dataclass(frozen=True)
class EngineStats:
    """Gauges and counters, for metrics and pages; counters only grow."""

    # gauges
    running: int
    """Samples that have a sequence of the cache."""
    waiting: int
    """Samples that wait for one, preempted ones included."""
    swapped: int
    """Of the waiting, those whose pages are in host memory."""
    pages_total: int
    pages_used: int
    """Pages that running sequences hold."""
    pages_cached: int
    """Pages that none holds and the prefix cache keeps: until they are needed, or for a text that computed the same
    meanwhile, until that ends."""
    pages_free: int
    page_size: int
    tokens_live: int
    """Tokens of running sequences; those that share pages count once each."""
    waste: float
    """Share of the slots of used pages that hold no live token, 0 to 1."""
    bytes_per_page: int
    # counters
    steps: int
    """Runs of the model."""
    prompt_tokens: int
    """Computed, cached ones not included."""
    generated_tokens: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Those found."""
    preemptions: int
    swaps: int
    """Preemptions that went to host memory instead of being computed again."""
    evictions: int
    """Cached pages given up for others."""
    shifts: int
    """Context shifts."""
    nan_samples: int
    """Samples that ended because the model's logits held NaN."""
    compiled: int
    """Programs compiled at the start."""
    compiled_late: int
    """Programs that a step had to compile all the same: 0, unless something is wrong."""
