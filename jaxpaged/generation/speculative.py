"""Prompt-lookup decoding in one XLA program: several tokens a step where the text repeats itself.

The path of a step, top to bottom: ``find_drafts`` copies the tokens that followed an earlier
occurrence of the last ones; ``_verify`` reserves slots for the newest token and its draft, runs the
model on them, accepts the draft as far as greedy decoding agrees, and removes the rest from the
cache. The text is that of greedy decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax
from jax.sharding import Mesh

from jaxpaged.cache.interface import Cache
from jaxpaged.generation.loop import (
    FINISH_LENGTH,
    FINISH_NAN,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    RUNNING,
    Model,
    ResultBase,
)
from jaxpaged.generation.prefill import prefill
from jaxpaged.generation.prompts import (
    Prompts,
    PromptsLike,
    columns,
    pack_limits,
    pack_prompts,
    pack_stop_ids,
    token_limits,
    token_lists,
)
from jaxpaged.generation.sampling import SamplingParams, sample
from jaxpaged.generation.stream import TokenStream
from jaxpaged.sharding.mesh import BatchSharding, num_shards
from jaxpaged.sharding.multihost import fetch
from jaxpaged.sharding.specs import (
    BATCH,
    CACHE,
    GATHERED,
    PARAMS,
    REPLICATED,
    STATIC,
    mesh_of,
    over_mesh,
    put_batch,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class LookupResult(ResultBase):
    """Result of ``generate_lookup``; one row a sequence, S = max_seqs of the cache."""

    tokens: Array
    """i32[S, M]: generated tokens, without the stop token, padded with -1."""
    num_tokens: Array
    """i32[S]: number of generated tokens."""
    finish_reason: Array
    """i32[S]: FINISH_STOP, FINISH_LENGTH, FINISH_OUT_OF_PAGES or FINISH_NAN; RUNNING without a
    prompt."""
    pages_peak: Array
    """i32[]: largest number of pages in use after any step."""
    drafted: Array
    """i32[S]: number of drafted tokens."""
    accepted: Array
    """i32[S]: number of drafted tokens that are part of the text."""
    num_steps: Array
    """i32[S]: steps that computed a token of the sequence; without drafts, one a token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Carry of the loop, beside the cache."""

    text: Array
    """i32[S, X]: prompt and generated tokens; all but the last are in the cache."""
    length: Array
    """i32[S]"""
    active: Array
    """bool[S]"""
    finish_reason: Array
    pages_peak: Array
    drafted: Array
    accepted: Array
    num_steps: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Request:
    """Dynamic part of a request: other values do not recompile."""

    prompts: Prompts
    max_new_tokens: Array
    """i32[S]"""
    stop_ids: Array
    """i32[number of stop tokens]; -1 in padding."""


@dataclass(frozen=True)
class _Shape:
    """Static part of a request."""

    num_draft: int
    """K: tokens of a draft."""
    ngram: int
    capacity: int
    """M: columns of the generated tokens."""
    chunk: int
    """Tokens of a prefill step."""
    keep: bool
    """True if finished sequences stay in the cache."""


def find_drafts(text: Array, length: Array, *, ngram: int, num_draft: int) -> tuple[Array, Array]:
    """Predicts the continuation of each text from an earlier occurrence of its last tokens.

    Takes the occurrence that matches most of the last tokens, up to ``ngram``, and the latest of
    these. If it is less than ``num_draft`` tokens back, the copy continues with the tokens just
    copied.

    Args:
      text: i32[S, X].
      length: i32[S], tokens of each text; those behind them are ignored.
      ngram: maximum number of tokens to match.
      num_draft: K.

    Returns:
      ``(draft i32[S, K], found bool[S])``.

    Reference: Saxena, "Prompt Lookup Decoding" (2023), which takes the earliest occurrence; Lempel
    and Ziv (1977) for the copy that overlaps itself.
    """
    width = text.shape[1]
    place = lax.iota(jnp.int32, width)
    last = length[:, None] - 1
    same, agreeing = place < last, jnp.zeros(text.shape, jnp.int32)
    for back in range(ngram):
        wanted = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
        same &= (jnp.roll(text, back, axis=1) == wanted) & (place >= back)
        agreeing += same
    value = jnp.where(agreeing > 0, agreeing * width + place, -1)
    found = jnp.any(agreeing > 0, axis=1)
    best = jnp.argmax(value, axis=1).astype(jnp.int32)[:, None]
    period = jnp.where(found[:, None], last - best, 1)
    source = best + 1 + lax.iota(jnp.int32, num_draft) % period
    return jnp.take_along_axis(text, jnp.minimum(source, width - 1), axis=1), found


def _request(
    cache: Cache,
    prompts: PromptsLike,
    prompt_lens: npt.ArrayLike | None,
    num_draft: int,
    ngram: int,
    max_new_tokens: npt.ArrayLike,
    stop_ids: Sequence[int],
    batch_size: int,
    keep: bool,
) -> tuple[_Request, _Shape]:
    for name, value in (("num_draft", num_draft), ("ngram", ngram)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    mesh = mesh_of(cache)
    shards = num_shards(mesh)
    max_seqs = cache.max_seqs // shards  # of one data shard
    ids = token_lists(prompts, prompt_lens)
    packed, chunk = pack_prompts(ids, max_seqs=max_seqs, batch_size=batch_size, shards=shards)
    limits = token_limits(max_new_tokens, len(ids), 1)
    request = _Request(
        packed,
        pack_limits(limits, max_seqs, shards),
        BatchSharding(shards, 1).replicate(pack_stop_ids(stop_ids)),
    )
    return put_batch(mesh, request), _Shape(
        num_draft, ngram, columns(int(limits.max()), max_seqs), chunk, keep
    )


def _start(model: Model, shape: _Shape, params: Any, cache: Cache, request: _Request) -> tuple[Cache, _State]:
    """Prefills the prompts, all but the last token of each."""
    prompts = request.prompts
    s = cache.max_seqs
    cache, served, pages_peak = prefill(model, shape.chunk, params, cache, prompts)
    zeros = jnp.zeros(s, jnp.int32)
    state = _State(
        text=jnp.pad(prompts.tokens, ((0, 0), (0, shape.capacity))),
        length=prompts.lens,
        active=served,
        finish_reason=jnp.where((prompts.lens > 0) & ~served, FINISH_OUT_OF_PAGES, RUNNING),
        pages_peak=pages_peak,
        drafted=zeros,
        accepted=zeros,
        num_steps=zeros,
    )
    return cache, state


def _end(
    cache: Cache, state: _State, ended: Array, reason: Array | int, released: Array
) -> tuple[Cache, _State]:
    """Ends the sequences ``ended bool[S]`` and frees the pages of ``released bool[S]``."""
    cache, _ = cache.seq_remove(released)
    return cache, replace(
        state,
        active=state.active & ~ended,
        finish_reason=jnp.where(ended, reason, state.finish_reason),
    )


def _verify(
    model: Model,
    params: Any,
    cache: Cache,
    state: _State,
    request: _Request,
    draft: Array,
    count: Array,
) -> tuple[Cache, _State, Array, Array, Array]:
    """Runs the model on the newest token and the draft of each sequence, and keeps the tokens of
    greedy decoding.

    Args:
      draft: i32[S, K].
      count: i32[S]: number of the K tokens to try.

    Returns:
      ``(cache, state, stopped bool[S], failed bool[S], appended i32[S])``: sequences that end with
      a stop token, those with NaN, and number of new tokens. The cache is without rejected tokens.
    """
    s, width = cache.max_seqs, draft.shape[1] + 1
    num_new = jnp.where(state.active, 1 + count, 0)
    cache, batch, _ = cache.reserve(num_new, num_tokens=s * width, max_new=width)
    pages_peak = jnp.maximum(state.pages_peak, cache.pages_used)
    newest = jnp.take_along_axis(state.text, jnp.maximum(state.length - 1, 0)[:, None], axis=1)
    tried = jnp.concatenate([newest, draft], axis=1)
    first, step = batch.cu_q_lens[:-1], lax.iota(jnp.int32, width)
    sequence = jnp.minimum(batch.sequence, s - 1)
    tokens = tried[sequence, jnp.clip(lax.iota(jnp.int32, s * width) - first[sequence], 0, width - 1)]
    rows = jnp.minimum(first[:, None] + step, s * width - 1).reshape(-1)
    logits, cache = model(params, tokens, cache, batch, rows)
    nothing_recent = jnp.zeros((s * width, 0), jnp.int32)
    best = sample(logits, SamplingParams.greedy(s * width), batch.position[rows], nothing_recent)
    best = best.reshape(s, width)

    agrees = (draft == best[:, :-1]) & (step[:-1] < count[:, None])
    accepted = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1, dtype=jnp.int32)
    stops = (best < 0) | jnp.any(best[..., None] == request.stop_ids, axis=-1)
    stops &= step <= accepted[:, None]
    ended = state.active & jnp.any(stops, axis=1)
    appended = jnp.where(ended, jnp.argmax(stops, axis=1), accepted + 1).astype(jnp.int32)
    failed = ended & (jnp.take_along_axis(best, jnp.minimum(appended, width - 1)[:, None], axis=1)[:, 0] < 0)
    appended = jnp.where(state.active, appended, 0)
    accepted = jnp.minimum(accepted, appended)

    # Roll back: the newest token and the accepted ones stay.
    rejected = num_new > 1 + accepted
    behind = batch.position[jnp.minimum(first, s * width - 1)] + 1 + accepted
    cache, _ = cache.seq_remove(rejected, behind)
    column = jnp.where(step < appended[:, None], state.length[:, None] + step, state.text.shape[1])
    return (
        cache,
        replace(
            state,
            text=state.text.at[lax.iota(jnp.int32, s)[:, None], column].set(best, mode="drop"),
            length=state.length + appended,
            pages_peak=pages_peak,
            drafted=state.drafted + count,
            accepted=state.accepted + accepted,
            num_steps=state.num_steps + state.active,
        ),
        ended & ~failed,
        failed,
        appended,
    )


def _draft(shape: _Shape, cache: Cache, state: _State, request: _Request) -> tuple[Array, Array]:
    """``(draft i32[S, K], count i32[S])``: tokens to try in the next step, and number of them."""
    left = request.max_new_tokens - (state.length - request.prompts.lens)
    draft, found = find_drafts(state.text, state.length, ngram=shape.ngram, num_draft=shape.num_draft)
    # The last token of a limit is never drafted, since a step adds one more token than it accepts.
    count = jnp.where(state.active & found, jnp.minimum(shape.num_draft, left - 1), 0)
    # A draft must neither take a page that another sequence needs nor end its own sequence.
    fits = jnp.all(cache.can_reserve_each(state.active + count))
    return draft, jnp.where(fits, count, 0)


def _step(
    model: Model,
    shape: _Shape,
    params: Any,
    cache: Cache,
    state: _State,
    request: _Request,
    draft: Array,
    count: Array,
) -> tuple[Cache, _State]:
    """One step: the accepted tokens of the draft of each active sequence, and one more."""
    cache, state, stopped, failed, appended = _verify(model, params, cache, state, request, draft, count)
    ended = stopped | failed
    full = (appended > 0) & ~ended & (state.length - request.prompts.lens >= request.max_new_tokens)
    reason = jnp.where(failed, FINISH_NAN, jnp.where(stopped, FINISH_STOP, FINISH_LENGTH))
    return _end(cache, state, ended | full, reason, released=failed if shape.keep else ended | full)


_Carry = tuple[Array, Any, _State, Array, Array]
"""(steps done, cache, state, draft, count)"""


def _advance(
    model: Model, shape: _Shape, params: Any, cache: Cache, state: _State, request: _Request, steps: Array
) -> tuple[Cache, _State]:
    """Runs at most ``steps`` steps, fewer if all sequences end.

    A step without any draft computes one row a sequence. The two kinds of steps are two loops in a
    loop, because XLA copies the pool if branches of a condition write to it.
    """

    def unfinished(carry: _Carry) -> Array:
        i, _, state, _, _ = carry
        return (i < steps) & jnp.any(state.active)

    def drafted(carry: _Carry) -> Array:
        return jnp.any(carry[-1] > 0)

    def with_draft(carry: _Carry) -> _Carry:
        i, cache, state, draft, count = carry
        cache, state = _step(model, shape, params, cache, state, request, draft, count)
        return i + 1, cache, state, *_draft(shape, cache, state, request)

    def without_draft(carry: _Carry) -> _Carry:
        i, cache, state, draft, count = carry
        without_pages = state.active & ~cache.can_reserve_each(state.active.astype(jnp.int32))
        cache, state = _end(cache, state, without_pages, FINISH_OUT_OF_PAGES, released=without_pages)
        cache, state = _step(model, shape, params, cache, state, request, draft[:, :0], count)
        return i + 1, cache, state, *_draft(shape, cache, state, request)

    def both(carry: _Carry) -> _Carry:
        carry = lax.while_loop(lambda c: unfinished(c) & drafted(c), with_draft, carry)
        return lax.while_loop(lambda c: unfinished(c) & ~drafted(c), without_draft, carry)

    carry = (jnp.int32(0), cache, state, *_draft(shape, cache, state, request))
    _, cache, state, _, _ = lax.while_loop(unfinished, both, carry)
    return cache, state


def _result(shape: _Shape, state: _State, request: _Request) -> LookupResult:
    num_tokens = state.length - request.prompts.lens
    index = lax.iota(jnp.int32, shape.capacity)
    column = jnp.minimum(request.prompts.lens[:, None] + index, state.text.shape[1] - 1)
    tokens = jnp.take_along_axis(state.text, column, axis=1)
    return LookupResult(
        tokens=jnp.where(index < num_tokens[:, None], tokens, -1),
        num_tokens=num_tokens,
        finish_reason=state.finish_reason,
        pages_peak=state.pages_peak,
        drafted=state.drafted,
        accepted=state.accepted,
        num_steps=state.num_steps,
    )


def _generate(
    model: Model, shape: _Shape, params: Any, cache: Cache, request: _Request
) -> tuple[LookupResult, Cache]:
    cache, state = _start(model, shape, params, cache, request)
    cache, state = _advance(model, shape, params, cache, state, request, jnp.int32(shape.capacity))
    return _result(shape, state, request), cache


_ARGUMENTS = STATIC, STATIC, PARAMS, CACHE, BATCH
_generate_donating = jax.jit(
    over_mesh(_generate, _ARGUMENTS, (GATHERED, CACHE)), static_argnums=(0, 1), donate_argnums=3
)
_start_donating = jax.jit(
    over_mesh(_start, _ARGUMENTS, (CACHE, BATCH)), static_argnums=(0, 1), donate_argnums=3
)
_advance_donating = jax.jit(
    over_mesh(_advance, (*_ARGUMENTS, BATCH, REPLICATED), (CACHE, BATCH)),
    static_argnums=(0, 1),
    donate_argnums=(3, 4),
)
_result_jitted = jax.jit(_result, static_argnums=0)
_results_jitted = jax.jit(
    lambda shape, state, request: jax.vmap(functools.partial(_result, shape))(state, request),
    static_argnums=0,
)


def _gathered(result: LookupResult, mesh: Mesh | None) -> LookupResult:
    """Results of the data shards of a mesh in the order of the prompts, on the host; pages are
    summed up."""
    return result if mesh is None else BatchSharding.of(mesh, 1).gather_result(result, pages_peak=np.sum)


def generate_lookup(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    num_draft: int = 8,
    ngram: int = 3,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
) -> tuple[LookupResult, Cache]:
    """Greedy decoding that tries several tokens a step where the text repeats itself, in one XLA
    program.

    The tokens are those of ``generate`` without sampling, as far as the model's logits do not
    depend on the number of tokens of a step: another order of sums may decide a tie otherwise.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``,
        hashable.
      params: the model's weights, a pytree.
      cache: paged or contiguous; **donated**. Prompt i continues sequence i of the cache; drafts
        are looked up in the prompt and the tokens generated since.
      prompts: token ids, 1 to ``max_seqs`` prompts, as for ``generate``.
      max_new_tokens: maximum number of tokens to generate, one for all or one a prompt.
      prompt_lens: i32[B], tokens of each prompt if ``prompts`` are padded on the right.
      num_draft: K, tokens of a draft.
      ngram: maximum number of last tokens to match, see ``find_drafts``.
      stop_ids: tokens that end a sequence; they are not part of the result.
      batch_size: maximum number of tokens of a prefill step, which may hold parts of several
        prompts.
      keep: leave finished sequences in the cache (without their newest token, which was never an
        input); otherwise their pages are freed when they end.

    Returns:
      ``(result, cache)``. When pages run short, steps go without drafts. A sequence that gets no
      page for one token ends with FINISH_OUT_OF_PAGES and the tokens it has; one whose logits hold
      NaN ends with FINISH_NAN. Their pages are freed, with ``keep`` too.

    Raises:
      ValueError: no prompt or too many, an empty prompt, ids that are no integers or negative, a
        limit, ``num_draft`` or ``ngram`` below 1.

    Reference: Saxena, "Prompt Lookup Decoding" (2023); transformers' ``prompt_lookup_num_tokens``.
    """
    request, shape = _request(
        cache, prompts, prompt_lens, num_draft, ngram, max_new_tokens, stop_ids, batch_size, keep
    )
    result, cache = _generate_donating(model, shape, params, cache, request)
    return _gathered(result, mesh_of(cache)), cache


@dataclass
class LookupStream(TokenStream):
    """Iterator of StreamChunks; see ``lookup_stream``."""

    _first_steps = 1

    def _compile(self) -> Any:
        start = _start_donating.lower(self.model, self.shape, self.params, self.cache, self.request)
        advance = _advance_donating.lower(
            self.model, self.shape, self.params, *start.out_info, self.request, np.int32(0)
        )
        # In parallel, since XLA compiles much of a program on one thread.
        with ThreadPoolExecutor(2) as pool:
            return tuple(pool.map(lambda program: program.compile(), (start, advance)))

    def _begin(self) -> Any:
        self.cache, state = self._programs[0](self.params, self.cache, self.request)
        return state

    def _result(self, state: Any) -> LookupResult:
        mesh = mesh_of(self.cache)
        result = (_result_jitted if mesh is None else _results_jitted)(self.shape, state, self.request)
        return _gathered(fetch(result), mesh)


def lookup_stream(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    num_draft: int = 8,
    ngram: int = 3,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
    keep: bool = False,
    every: int = 8,
) -> LookupStream:
    """``generate_lookup`` that yields tokens while it runs: after the first step, then every
    ``every`` steps.

    Raises:
      ValueError: as ``generate_lookup``, or ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    request, shape = _request(
        cache, prompts, prompt_lens, num_draft, ngram, max_new_tokens, stop_ids, batch_size, keep
    )
    return LookupStream(model, params, cache, len(prompts), request, shape, every)
