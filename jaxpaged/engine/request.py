"""Requests, outputs, statistics and errors of an engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxpaged.engine.constraint import Constraint
from jaxpaged.generation.sampling_params import RANGES

FinishReason = Literal["stop", "length", "abort", "nan", "constraint"]
"""nan: the model's logits held NaN; tokens sampled before may be meaningless. constraint: that of the
request could not go on."""

MAX_STOP_IDS = 32
"""Stop tokens of a request, at most."""
MAX_LOGIT_BIAS = 256
"""Logit biases of a request, at most."""
MAX_LOGPROBS = 20
"""Log-probabilities of likeliest tokens, at most."""
MAX_SAMPLES = 128
"""Samples of a request, at most."""
MAX_SALT = 256
"""Characters of a cache salt, at most."""
_UINT32, _INT32 = 2**32, 2**31


class RefusedError(ValueError):
    """A request that the engine cannot serve; nothing was changed. It says what is allowed."""


class ContextError(RefusedError):
    """A prompt that fills the context."""

    def __init__(self, num_prompt: int, n_ctx: int) -> None:
        self.num_prompt, self.n_ctx = num_prompt, n_ctx
        super().__init__(
            f"the prompt has {num_prompt} tokens; the context of {n_ctx} tokens fits {n_ctx - 1} "
            "and one to generate"
        )


class PoolError(RefusedError):
    """A request that does not fit the whole pool."""

    def __init__(self, requested: int, total: int) -> None:
        self.requested, self.total = requested, total
        super().__init__(f"the request may need {requested} pages, the whole pool has {total}")


class QueueFullError(RefusedError):
    """The queue is full; a later try may succeed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} requests wait already; try again later")


class SlotBusyError(RefusedError):
    """A request is running in the slot; a later try may succeed."""

    def __init__(self, slot: int) -> None:
        super().__init__(f"slot {slot} is busy; try again when its request is done")


@dataclass(frozen=True)
class EngineRequest:
    """A prompt and how to continue it. Sampling parameters are those of
    ``generation.SamplingParams``.

    Raises:
      RefusedError: a value out of range; the message names parameter, value and what is allowed.
    """

    request_id: str
    """Chosen by the caller; unique among unfinished requests."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int | None = None
    """Tokens to generate, at most; None = as many as fit the context."""
    n: int = 1
    """Samples, which share the prompt's pages. Sample i has the seed ``seed + i``."""
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    """Recent tokens that penalties cover; -1 = the whole context, 4,096 tokens at most."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    """As ``repeat_last_n``."""
    dry_breakers: frozenset[int] = frozenset()
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int = 0
    """0 to 2**32 - 1."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end a sample, and are not part of it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens before anything else; -inf forbids a token."""
    constraint: Constraint | None = None
    """Restricts the tokens of each sample, which has a copy of its own."""
    num_logprobs: int | None = None
    """None: no log-probabilities; k: those of each token and of the k likeliest ones."""
    priority: int = 0
    """Smaller runs first; equal ones in order of arrival."""
    cache_salt: str = ""
    """Only requests with the same salt share cached pages."""
    cache_prompt: bool = True
    """True: use and keep cached pages of the prompt."""
    slot: int | None = None
    """Slot of its first sample, which waits until the slot is free; None = any."""
    n_keep: int = 0
    """First tokens that a context shift keeps; negative = the whole prompt."""
    n_discard: int = 0
    """Tokens that a context shift drops; 0 = half of those that are not kept."""

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise RefusedError(f"{name} = {getattr(self, name)!r}: {allowed}")

        if not self.prompt:
            raise RefusedError("the prompt is empty: it needs at least one token")
        if self.max_new_tokens is not None and not 0 <= self.max_new_tokens < _INT32:
            refuse("max_new_tokens", "must be at least 0")
        if not 1 <= self.n <= MAX_SAMPLES:
            refuse("n", f"must be 1 to {MAX_SAMPLES}")
        for name, values in RANGES.items():
            if not values.admits(getattr(self, name)):
                refuse(name, values.allowed)
        for name in ("n_keep", "priority"):
            if not -_INT32 <= getattr(self, name) < _INT32:
                refuse(name, "must fit 32 bits")
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

    @property
    def has_penalties(self) -> bool:
        """True if recent tokens change the logits."""
        changes = self.repeat_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        return bool(changes or self.dry_multiplier)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position of a sample, at temperature 1 and before truncation."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """``(token, logprob)`` of the likeliest tokens, as many as requested, in order."""


@dataclass
class RequestTimes:
    """Times of a request's events, in seconds of ``time.monotonic``; 0.0 = not yet."""

    arrived: float = 0.0
    scheduled: float = 0.0
    """First step with tokens of the request."""
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True)
class SampleOutput:
    """Output of one step for one sample."""

    request_id: str
    index: int
    """Index of the sample within the request."""
    tokens: tuple[int, ...]
    """New tokens, in order, without a stop token."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One per token, if requested."""
    finish_reason: FinishReason | None
    """None while the sample is running."""
    stop_token: int | None
    """Stop token that ended the sample."""
    slot: int
    """Slot of the sample."""
    num_cached: int
    """Prompt tokens found in the prefix cache at the first admission."""
    truncated: bool
    """True if the context is full, or was shifted."""
    times: RequestTimes
    """Times of the request."""


@dataclass(frozen=True)
class GroupStats:
    """Pages of a layer group; fields as in ``EngineStats``."""

    layers: int
    window: int | None
    """Tokens that its layers see; None = all."""
    pages_total: int
    pages_used: int
    pages_cached: int
    pages_free: int
    bytes_per_page: int


@dataclass(frozen=True)
class EngineStats:
    """Gauges and monotonic counters of an engine."""

    # gauges
    running: int
    """Running samples."""
    waiting: int
    """Waiting samples, preempted ones included."""
    swapped: int
    """Waiting samples with pages in host memory."""
    pages_total: int
    """Pages of all layer groups, as in the following."""
    pages_used: int
    """Pages held by running sequences."""
    pages_cached: int
    """Pages held by the prefix cache alone."""
    pages_free: int
    page_size: int
    tokens_live: int
    """Tokens of running sequences; those in shared pages count once."""
    waste: float
    """Share of token slots in used pages that are empty, 0 to 1."""
    bytes_per_page: int
    """Bytes of a page, of several groups on average."""
    groups: tuple[GroupStats, ...]
    """One for each layer group."""
    # counters
    steps: int
    """Steps of the model."""
    prompt_tokens: int
    """Prompt tokens computed, cached ones not included."""
    generated_tokens: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there."""
    preemptions: int
    swaps: int
    """Preemptions by swapping instead of recomputing."""
    evictions: int
    """Pages evicted from the prefix cache."""
    shifts: int
    """Context shifts."""
    nan_samples: int
    """Samples that ended because the model's logits held NaN."""
    compiled: int
    """Programs compiled at start-up."""
    compiled_late: int
    """Programs compiled by steps; anything but 0 is a bug."""
