"""Beam search in one XLA program: beams are sequences that share pages, forked and freed at every
step.

The path of a step, top to bottom: ``_reserve`` reserves a slot a beam (a shared page is copied only
when a beam writes to it), the model runs, ``_select`` picks the best continuations and their
parents, ``_update`` stores the finished ones, and ``seq_reorder`` makes each beam's sequence that
of its parent: integers move, no key or value.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax
from jax.sharding import Mesh

from jaxpaged.cache.interface import Cache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.compilation import background
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
    bucket,
    pack_limits,
    pack_prompts,
    pack_stop_ids,
    token_limits,
    token_lists,
)
from jaxpaged.pages.batch import Batch
from jaxpaged.sharding.mesh import BatchSharding, num_shards
from jaxpaged.sharding.specs import BATCH, CACHE, GATHERED, PARAMS, STATIC, mesh_of, over_mesh, put_batch

EarlyStopping = Literal[False, True, "never"]
_EARLY_STOPPING: tuple[EarlyStopping, ...] = (False, True, "never")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class BeamResult(ResultBase):
    """Result of ``beam_search``; best sequences first.

    Shapes: B = prompts that the cache has sequences for (max_seqs // num_beams), R =
    num_return_sequences.
    """

    tokens: Array
    """i32[B, R, M]: generated tokens, without the stop token, padded with -1."""
    num_tokens: Array
    """i32[B, R]: number of generated tokens."""
    score: Array
    """f32[B, R]: sum of log-probabilities, including the stop token's, over length **
    length_penalty; -inf if there is no such sequence."""
    finish_reason: Array
    """i32[B, R]: FINISH_STOP, FINISH_LENGTH or FINISH_OUT_OF_PAGES; FINISH_NAN in all R if logits
    of the search held NaN; RUNNING if there is no such sequence and the search is complete."""
    complete: Array
    """bool[B]: False if the search ended early, out of pages or with NaN."""
    num_steps: Array
    """i32[]: steps of the search, one token a beam each."""
    pages_peak: Array
    """i32[]: largest number of pages in use after any step."""
    unshared_peak: Array
    """i32[]: the same if no sequences shared pages."""
    pages_mean: Array
    """f32[]: pages in use, mean over the steps of the search."""
    unshared_mean: Array
    """f32[]: the same if no sequences shared pages."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Beams:
    """Growing sequences, best first; B prompts, W = num_beams."""

    tokens: Array
    """i32[B, W, M]"""
    newest: Array
    """i32[B, W]: last token of each, not yet in the cache."""
    score: Array
    """f32[B, W]: sum of log-probabilities; -inf = no beam."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Finished:
    """Best finished sequences of each prompt, best first."""

    tokens: Array
    """i32[B, W, M]"""
    num_tokens: Array
    """i32[B, W]"""
    score: Array
    """f32[B, W]: with the length penalty; -inf = none."""
    reason: Array
    """i32[B, W]"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Usage:
    """Pages over the steps; see BeamResult."""

    pages_peak: Array
    unshared_peak: Array
    pages_sum: Array
    unshared_sum: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """Carry of the loop, beside the cache."""

    beams: _Beams
    finished: _Finished
    active: Array
    """bool[B]"""
    failure: Array
    """i32[B]: FINISH_OUT_OF_PAGES or FINISH_NAN if the search ended early, else RUNNING."""
    num_steps: Array
    """i32[]: also the number of tokens of each beam."""
    usage: _Usage

    def result(self, num_return: int) -> BeamResult:
        best = jax.tree.map(lambda x: x[:, :num_return], self.finished)
        failure = self.failure[:, None]
        found = (best.score > -jnp.inf) & (failure != FINISH_NAN)
        steps = jnp.maximum(self.num_steps, 1)
        return BeamResult(
            tokens=best.tokens,
            num_tokens=best.num_tokens,
            score=best.score,
            finish_reason=jnp.where(found, best.reason, failure),
            complete=self.failure == RUNNING,
            num_steps=self.num_steps,
            pages_peak=self.usage.pages_peak,
            unshared_peak=self.usage.unshared_peak,
            pages_mean=self.usage.pages_sum / steps,
            unshared_mean=self.usage.unshared_sum / steps,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Request:
    """Dynamic part of a request: other values do not recompile."""

    prompts: Prompts
    max_new_tokens: Array
    """i32[B]"""
    stop_ids: Array
    """i32[number of stop tokens]; -1 in padding."""
    length_penalty: Array
    """f32[]"""
    early_stopping: Array
    """i32[]: index in ``_EARLY_STOPPING``."""

    def penalized(self, score: Array, length: Array) -> Array:
        """Score of sequences of ``length``, at least 1, with the length penalty; -inf stays
        -inf."""
        divided = score / length.astype(jnp.float32) ** self.length_penalty
        return jnp.where(score > -jnp.inf, divided, -jnp.inf)


@dataclass(frozen=True)
class _Shape:
    """Static part of a request."""

    num_beams: int
    """W"""
    num_return: int
    """R"""
    capacity: int
    """M: columns of the generated tokens."""
    chunk: int
    """Tokens of a prefill step."""


def _request(
    cache: Cache,
    prompts: PromptsLike,
    prompt_lens: npt.ArrayLike | None,
    num_beams: int,
    max_new_tokens: npt.ArrayLike,
    length_penalty: float,
    early_stopping: EarlyStopping,
    num_return_sequences: int,
    stop_ids: Sequence[int],
    batch_size: int,
) -> tuple[_Request, _Shape]:
    mesh = mesh_of(cache)
    shards = num_shards(mesh)
    max_seqs = cache.max_seqs // shards  # of one data shard
    if not 1 <= num_beams <= max_seqs:
        raise ValueError(f"num_beams must be 1 to {max_seqs} (the cache's max_seqs), got {num_beams}")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences must be 1 to {num_beams} (num_beams), got {num_return_sequences}"
        )
    if not np.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    if early_stopping not in _EARLY_STOPPING:
        raise ValueError(f'early_stopping must be False, True or "never", got {early_stopping!r}')
    ids = token_lists(prompts, prompt_lens)
    packed, chunk = pack_prompts(
        ids, max_seqs=max_seqs, stride=num_beams, batch_size=batch_size, shards=shards
    )
    limits = token_limits(max_new_tokens, len(ids), 1)
    sharding = BatchSharding(shards, 1)
    request = _Request(
        prompts=packed,
        max_new_tokens=pack_limits(limits, max_seqs // num_beams, shards),
        stop_ids=sharding.replicate(pack_stop_ids(stop_ids)),
        length_penalty=sharding.replicate(np.float32(length_penalty)),
        early_stopping=sharding.replicate(np.int32(_EARLY_STOPPING.index(early_stopping))),
    )
    shape = _Shape(num_beams, num_return_sequences, bucket(int(limits.max())), chunk)
    return put_batch(mesh, request), shape


def _gathered(result: BeamResult, mesh: Mesh | None) -> BeamResult:
    """Results of the data shards of a mesh in the order of the prompts, on the host; pages are
    summed up."""
    if mesh is None:
        return result
    return BatchSharding.of(mesh, 1).gather_result(
        result,
        num_steps=np.max,
        pages_peak=np.sum,
        unshared_peak=np.sum,
        pages_mean=np.sum,
        unshared_mean=np.sum,
    )


def _by_sequence(values: Array, others: Array) -> Array:
    """``[B, W]`` of beams as ``[S]`` of sequences; sequences without a prompt are as in
    ``others[S]``."""
    return jnp.concatenate([values.reshape(-1), others[values.size :]])


def _take(values: Array, index: Array) -> Array:
    """``values[b, index[b, i]]`` for ``[B, n, ...]`` and ``[B, m]``."""
    return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)


def _unshared(cache: Any) -> Array:
    """i32[]: pages in use if no sequences shared pages, one an entry."""
    return (
        jnp.sum(cache.table.num_entries, dtype=jnp.int32)
        if isinstance(cache, PagedKVCache)
        else cache.pages_used
    )


def _start(model: Model, shape: _Shape, params: Any, cache: Cache, request: _Request) -> tuple[Cache, _State]:
    """Prefills the prompts; each begins with one beam, whose newest token is the prompt's last."""
    prompts, w, m = request.prompts, shape.num_beams, shape.capacity
    b = cache.max_seqs // w
    cache, served, pages_peak = prefill(model, shape.chunk, params, cache, prompts)
    first = lax.iota(jnp.int32, b) * w
    asked, served = prompts.lens[first] > 0, served[first]
    alone = jnp.where(lax.iota(jnp.int32, w) == 0, jnp.float32(0), -jnp.inf)
    state = _State(
        beams=_Beams(
            tokens=jnp.full((b, w, m), -1, jnp.int32),
            newest=jnp.broadcast_to(prompts.last_tokens[first][:, None], (b, w)),
            score=jnp.where(served[:, None], alone, -jnp.inf),
        ),
        finished=_Finished(
            tokens=jnp.full((b, w, m), -1, jnp.int32),
            num_tokens=jnp.zeros((b, w), jnp.int32),
            score=jnp.full((b, w), -jnp.inf),
            reason=jnp.full((b, w), RUNNING, jnp.int32),
        ),
        active=served,
        failure=jnp.where(asked & ~served, FINISH_OUT_OF_PAGES, RUNNING),
        num_steps=jnp.int32(0),
        usage=_Usage(pages_peak, _unshared(cache), jnp.float32(0), jnp.float32(0)),
    )
    return cache, state


def _keep_best(finished: _Finished, more: _Finished) -> _Finished:
    """Best W of both."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), finished, more)
    _, best = lax.top_k(both.score, finished.score.shape[1])
    return jax.tree.map(lambda x: _take(x, best), both)


def _end_early(cache: Cache, state: _State, request: _Request, ended: Array) -> tuple[Cache, _State]:
    """Out of pages: stores the beams of the prompts ``ended bool[B]`` as they are, and frees their
    pages."""
    beams, steps = state.beams, state.num_steps
    grown = ended[:, None] & (steps > 0)
    shape = beams.score.shape
    unfinished = _Finished(
        tokens=beams.tokens,
        num_tokens=jnp.broadcast_to(steps, shape),
        score=jnp.where(grown, request.penalized(beams.score, jnp.maximum(steps, 1)), -jnp.inf),
        reason=jnp.full(shape, FINISH_OUT_OF_PAGES, jnp.int32),
    )
    marked = _by_sequence(jnp.broadcast_to(ended[:, None], shape), jnp.zeros(cache.max_seqs, bool))
    return cache.seq_remove(marked)[0], replace(
        state,
        finished=_keep_best(state.finished, unfinished),
        active=state.active & ~ended,
        failure=jnp.where(ended, FINISH_OUT_OF_PAGES, state.failure),
    )


def _reserve(cache: Cache, state: _State, request: _Request) -> tuple[Cache, _State, Batch]:
    """Reserves a slot a beam. A prompt without pages for all its beams ends, and its pages serve
    the others."""
    s, (b, w) = cache.max_seqs, state.beams.score.shape

    def num_new(state: _State) -> Array:
        grows = state.active[:, None] & (state.beams.score > -jnp.inf)
        return _by_sequence(grows.astype(jnp.int32), jnp.zeros(s, jnp.int32))

    def without_pages(carry: tuple[Cache, _State]) -> Array:
        cache, state = carry
        return ~jnp.all(cache.can_reserve_each(num_new(state))[: b * w].reshape(b, w), axis=1)

    def end_first(carry: tuple[Cache, _State]) -> tuple[Cache, _State]:
        return _end_early(*carry, request, lax.iota(jnp.int32, b) == jnp.argmax(without_pages(carry)))

    # One by one, since the pages of the first may suffice for those behind it.
    cache, state = lax.while_loop(lambda carry: jnp.any(without_pages(carry)), end_first, (cache, state))
    cache, batch, _ = cache.reserve(num_new(state), num_tokens=s, max_new=1)
    pages, unshared, usage = cache.pages_used, _unshared(cache), state.usage
    usage = _Usage(
        jnp.maximum(usage.pages_peak, pages),
        jnp.maximum(usage.unshared_peak, unshared),
        usage.pages_sum + pages,
        usage.unshared_sum + unshared,
    )
    return cache, replace(state, usage=usage), batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Candidates:
    """Best W continuations, best first, ``[B, W]`` each."""

    parent: Array
    """i32: beam that is continued."""
    token: Array
    """i32"""
    score: Array
    """f32: sum of log-probabilities."""


def _select(logits: Array, score: Array, stop_ids: Array) -> tuple[_Candidates, _Candidates, Array]:
    """Selects continuations, and detects NaN.

    No sort of all W × V candidates is needed: the best that do not stop are among the best W of
    each beam, and the best of all among these and the few that stop.

    Args:
      logits: float[B * W, V].
      score: f32[B, W].
      stop_ids: i32[n]; -1 in padding.

    Returns:
      ``(best without stop tokens, best of all, invalid bool[B])``; invalid: logits of a beam hold
      NaN, or +inf, from which NaN would follow.
    """
    (b, w), vocab = score.shape, logits.shape[-1]
    logits = logits.astype(jnp.float32)
    stops = jnp.where(stop_ids < 0, vocab, stop_ids)  # a negative index would wrap
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, ids = lax.top_k(logits.at[:, stops].set(-jnp.inf, mode="drop"), min(w, vocab))
    stop_values = logits.at[:, stops].get(mode="fill", fill_value=-jnp.inf)

    def candidates(values: Array, ids: Array) -> _Candidates:
        count = values.shape[-1]
        scores = score[..., None] + (values - total).reshape(b, w, count)
        return _Candidates(
            parent=jnp.broadcast_to(lax.iota(jnp.int32, w * count) // count, (b, w * count)),
            token=ids.reshape(b, w * count),
            # Not NaN either, which rows without a beam may hold.
            score=jnp.where(scores > -jnp.inf, scores, -jnp.inf).reshape(b, w * count),
        )

    def best(all_: _Candidates) -> _Candidates:
        _, chosen = lax.top_k(all_.score, w)
        return jax.tree.map(lambda x: _take(x, chosen), all_)

    going = candidates(values, ids)
    stopping = candidates(stop_values, jnp.broadcast_to(stop_ids, stop_values.shape))
    either = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), going, stopping)
    invalid = ~(total < jnp.inf).reshape(b, w) & (score > -jnp.inf)
    return best(going), best(either), jnp.any(invalid, axis=1)


def _update(state: _State, request: _Request, going: _Candidates, any_: _Candidates) -> tuple[_State, Array]:
    """State with one more token a beam, and ``bool[B]``: the prompt's search continues.

    A search ends by the rule of transformers, not the textbook's: see ``beam_search``.
    """
    beams, finished, column = state.beams, state.finished, state.num_steps
    length = column + 1
    full = (length >= request.max_new_tokens)[:, None]
    stops = jnp.any(any_.token[..., None] == request.stop_ids, axis=-1)
    ends = state.active[:, None] & (stops | full)

    def grown(c: _Candidates, appended: Array | bool) -> Array:
        tokens = _take(beams.tokens, c.parent)
        return tokens.at[:, :, column].set(jnp.where(appended, c.token, -1))

    finished = _keep_best(
        finished,
        _Finished(
            tokens=grown(any_, ~stops),
            num_tokens=length - stops,
            score=jnp.where(ends, request.penalized(any_.score, length), -jnp.inf),
            reason=jnp.where(stops, FINISH_STOP, FINISH_LENGTH),
        ),
    )
    running = _Beams(grown(going, True), going.token, going.score)
    never, at_once = request.early_stopping == 2, request.early_stopping == 1
    # With "never" and a penalty that favours length, a beam may reach its best score at the limit.
    reach = jnp.where(never & (request.length_penalty > 0), request.max_new_tokens, length)
    hopeful = request.penalized(running.score[:, 0], reach) > finished.score[:, -1]
    all_finished = finished.score[:, -1] > -jnp.inf
    goes_on = state.active & ~full[:, 0] & hopeful & ~(at_once & all_finished)
    return replace(state, beams=running, finished=finished, active=goes_on, num_steps=length), goes_on


def _step(model: Model, params: Any, cache: Cache, state: _State, request: _Request) -> tuple[Cache, _State]:
    """Adds a token to every beam, and forks."""
    s, (b, w) = cache.max_seqs, state.beams.score.shape
    cache, state, batch = _reserve(cache, state, request)
    newest = _by_sequence(state.beams.newest, jnp.zeros(s, jnp.int32))
    tokens = newest[jnp.minimum(batch.sequence, s - 1)]
    logits, cache = model(params, tokens, cache, batch, batch.last_rows[: b * w])
    was_active = state.active
    going, any_, invalid = _select(logits, state.beams.score, request.stop_ids)
    failed = was_active & invalid
    state, goes_on = _update(state, request, going, any_)
    goes_on &= ~failed
    state = replace(state, active=goes_on, failure=jnp.where(failed, FINISH_NAN, state.failure))
    stays = goes_on[:, None] & (going.score > -jnp.inf)
    source = jnp.where(stays, lax.iota(jnp.int32, b)[:, None] * w + going.parent, s)
    # Sequences without a prompt stay as they are, and prompts that ended before are empty.
    ids = lax.iota(jnp.int32, s)
    source = jnp.where(was_active[:, None], source, ids[: b * w].reshape(b, w))
    return cache.seq_reorder(_by_sequence(source, ids)), state


def _search(
    model: Model, shape: _Shape, params: Any, cache: Cache, state: _State, request: _Request
) -> tuple[BeamResult, Cache]:
    cache, state = lax.while_loop(
        lambda carry: jnp.any(carry[1].active),
        lambda carry: _step(model, params, carry[0], carry[1], request),
        (cache, state),
    )
    return state.result(shape.num_return), cache


def _beam_search(
    model: Model, shape: _Shape, params: Any, cache: Cache, request: _Request
) -> tuple[BeamResult, Cache]:
    cache, state = _start(model, shape, params, cache, request)
    return _search(model, shape, params, cache, state, request)


_ARGUMENTS = STATIC, STATIC, PARAMS, CACHE, BATCH
_beam_search_donating = jax.jit(
    over_mesh(_beam_search, _ARGUMENTS, (GATHERED, CACHE)), static_argnums=(0, 1), donate_argnums=3
)
_start_donating = jax.jit(
    over_mesh(_start, _ARGUMENTS, (CACHE, BATCH)), static_argnums=(0, 1), donate_argnums=3
)
_search_donating = jax.jit(
    over_mesh(_search, (*_ARGUMENTS, BATCH), (GATHERED, CACHE)), static_argnums=(0, 1), donate_argnums=3
)


def beam_search(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    num_beams: int,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
) -> tuple[BeamResult, Cache]:
    """Finds likely continuations of each prompt by beam search, in one XLA program.

    Each step continues every beam by every token and keeps the ``num_beams`` likeliest
    continuations that do not end. One that ends with a stop token, or at the limit, and is among
    the ``num_beams`` likeliest of all, competes with the finished ones. The sequences, the scores
    and the end of a search are those of Hugging Face transformers' ``generate(num_beams=...,
    do_sample=False)``.

    Args:
      model: ``(params, tokens i32[T], cache, batch, rows i32[R]) -> (logits f32[R, V], cache)``,
        hashable.
      params: the model's weights, a pytree.
      cache: paged or contiguous; **donated**. Prompt i uses the sequences ``i * num_beams`` up to
        ``(i + 1) * num_beams``: it continues the first of them, replaces the others, and leaves all
        empty. Sequences behind the last prompt's do not change. A ``ShardedCache`` runs the search
        on its mesh, with prompts distributed over the data shards.
      prompts: token ids, 1 to ``max_seqs // num_beams`` prompts, as for ``generate``.
      num_beams: W, the width of the search.
      max_new_tokens: maximum number of tokens to generate, one for all or one a prompt.
      prompt_lens: i32[B], tokens of each prompt if ``prompts`` are padded on the right.
      length_penalty: the score of a finished sequence is its sum of log-probabilities over
        length ** length_penalty, counting the stop token; above 0 favours longer ones.
      early_stopping: end of a prompt's search before the limit, once ``num_beams`` sequences are
        finished: True, at once; False, if the best beam could not win at its present length;
        "never", if it could not at any length.
      num_return_sequences: R, number of finished sequences to return, at most ``num_beams``.
      stop_ids: tokens that end a sequence; they are not part of the result.
      batch_size: maximum number of tokens of a prefill step, which may hold parts of several
        prompts.

    Returns:
      ``(result, cache)``. When the pool runs out, prompts are served in order; one without pages
      for all its beams ends with the best sequences it has, finished or not, and its pages serve
      the others. One whose logits hold NaN ends with FINISH_NAN. ``complete`` is False for both.

    Raises:
      ValueError: no prompt or too many, an empty prompt, ids that are no integers or negative, a
        limit below 1, an impossible number of beams or of sequences to return, an infinite penalty,
        an unknown ``early_stopping``.

    Reference: PagedAttention (arXiv:2309.06180), section 4.4, for beams that share pages.
    """
    request, shape = _request(
        cache, prompts, prompt_lens, num_beams, max_new_tokens, length_penalty, early_stopping,
        num_return_sequences, stop_ids, batch_size,
    )  # fmt: skip
    result, cache = _beam_search_donating(model, shape, params, cache, request)
    return _gathered(result, mesh_of(cache)), cache


@dataclass
class BeamSearch:
    """``beam_search`` in two programs, for callers that time or compile its parts.

    ``cache`` is the cache after the latest of them; the one passed in is donated by the first.
    """

    model: Model
    params: Any = field(repr=False)
    cache: Any = field(repr=False)
    request: _Request = field(repr=False)
    shape: _Shape
    _state: Any = field(default=None, repr=False)
    _programs: Any = field(default=None, repr=False)

    def compile(self) -> None:
        """Compiles both programs without running them."""
        if self._programs is None:
            start = _start_donating.lower(self.model, self.shape, self.params, self.cache, self.request)
            search = _search_donating.lower(
                self.model, self.shape, self.params, *start.out_info, self.request
            )
            # In parallel, since XLA compiles much of a program on one thread.
            with ThreadPoolExecutor(2) as pool:
                self._programs = tuple(pool.map(lambda program: program.compile(), (start, search)))
            background.wait()

    def prefill(self) -> None:
        """Prefills the prompts, and waits until that is done."""
        self.compile()
        self.cache, self._state = self._programs[0](self.params, self.cache, self.request)
        jax.block_until_ready(self._state)

    def search(self) -> BeamResult:
        """Runs the search."""
        result, self.cache = self._programs[1](self.params, self.cache, self._state, self.request)
        return _gathered(jax.block_until_ready(result), mesh_of(self.cache))


def prepare_beam_search(
    model: Model,
    params: Any,
    cache: Cache,
    prompts: PromptsLike,
    *,
    num_beams: int,
    max_new_tokens: npt.ArrayLike,
    prompt_lens: npt.ArrayLike | None = None,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] = (),
    batch_size: int = 512,
) -> BeamSearch:
    """``beam_search``, not yet started; same arguments and result.

    Raises:
      ValueError: as ``beam_search``.
    """
    request, shape = _request(
        cache, prompts, prompt_lens, num_beams, max_new_tokens, length_penalty, early_stopping,
        num_return_sequences, stop_ids, batch_size,
    )  # fmt: skip
    return BeamSearch(model, params, cache, request, shape)
