"""Beam search in the decode loop: beams are samples of a prompt that are chosen together.

After each run of the model, ``select`` picks the best continuations of all beams of a prompt and
their parents, stores the finished ones, and makes each beam's sequence a copy of its parent's:
integers move, no key or value. A shared page is copied when a beam writes to it, not before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxpaged.cache.groups import GroupedKVCache
from jaxpaged.cache.interface import Cache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.generation.request import Request
from jaxpaged.generation.result import (
    FINISH_LENGTH,
    FINISH_NAN,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    RUNNING,
    BeamResult,
    GenerateResult,
)
from jaxpaged.generation.sampling import largest


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
class Search:
    """State of a search beside the loop's; B prompts, W = num_beams."""

    score: Array
    """f32[B, W]: sum of log-probabilities of each beam, best first; -inf = no beam."""
    finished: _Finished
    failure: Array
    """i32[B]: FINISH_OUT_OF_PAGES or FINISH_NAN if the search ended early, else RUNNING."""
    num_steps: Array
    """i32[]: steps that gave beams a token."""
    unshared_peak: Array
    pages_sum: Array
    unshared_sum: Array

    def grows(self, max_seqs: int) -> Array:
        """bool[S]: sequences of beams that there are."""
        return _by_sequence(self.score > -jnp.inf, jnp.zeros(max_seqs, bool))


def begin(cache: Any, request: Request) -> Search:
    """State before the first token: each prompt has one beam, which all its sequences fork."""
    w, m = request.shape.beams, request.shape.capacity
    b = cache.max_seqs // w
    first = jnp.where(lax.iota(jnp.int32, w) == 0, jnp.float32(0), -jnp.inf)
    return Search(
        score=jnp.broadcast_to(first, (b, w)),
        finished=_Finished(
            tokens=jnp.full((b, w, m), -1, jnp.int32),
            num_tokens=jnp.zeros((b, w), jnp.int32),
            score=jnp.full((b, w), -jnp.inf),
            reason=jnp.full((b, w), RUNNING, jnp.int32),
        ),
        failure=jnp.full(b, RUNNING, jnp.int32),
        num_steps=jnp.int32(0),
        unshared_peak=_unshared(cache),
        pages_sum=jnp.float32(0),
        unshared_sum=jnp.float32(0),
    )


def result(found: GenerateResult, search: Search, request: Request) -> BeamResult:
    """Best ``num_return`` sequences of each prompt."""
    params = request.search
    assert params is not None, "a request of a beam search"
    best = jax.tree.map(lambda x: x[:, : params.num_return], search.finished)
    failure = search.failure[:, None]
    exists = (best.score > -jnp.inf) & (failure != FINISH_NAN)
    steps = jnp.maximum(search.num_steps, 1)
    return BeamResult(
        tokens=best.tokens,
        num_tokens=best.num_tokens,
        score=best.score,
        finish_reason=jnp.where(exists, best.reason, failure),
        complete=search.failure == RUNNING,
        num_steps=search.num_steps,
        pages_peak=found.pages_peak,
        unshared_peak=search.unshared_peak,
        pages_mean=search.pages_sum / steps,
        unshared_mean=search.unshared_sum / steps,
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
    parts = cache.parts if isinstance(cache, GroupedKVCache) else (cache,)
    if not isinstance(parts[0], PagedKVCache):
        return cache.pages_used
    return jnp.sum(jnp.stack([part.table.num_entries for part in parts]), dtype=jnp.int32)


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


def _candidates(logits: Array, score: Array, stop_ids: Array) -> tuple[_Candidates, _Candidates, Array]:
    """Continuations of all beams, and NaN.

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
    values, ids = largest(logits.at[:, stops].set(-jnp.inf, mode="drop"), min(w, vocab))
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
        _, chosen = largest(all_.score, w)
        return jax.tree.map(lambda x: _take(x, chosen), all_)

    going = candidates(values, ids)
    stopping = candidates(stop_values, jnp.broadcast_to(stop_ids, stop_values.shape))
    either = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), going, stopping)
    invalid = ~(total < jnp.inf).reshape(b, w) & (score > -jnp.inf)
    return best(going), best(either), jnp.any(invalid, axis=1)


def select(
    cache: Cache,
    logits: Array,
    request: Request,
    found: GenerateResult,
    row: Array,
    newest: Array,
    search: Search,
    sampled: Array,
    refused: Array,
) -> tuple[Cache, GenerateResult, Array, Array, Search]:
    """Adds a token to every beam of the prompts of ``sampled``, forks, and ends searches.

    A search ends by the rule of transformers, not the textbook's: see ``beam_search``.

    Args:
      cache: with the beams' newest tokens.
      logits: f32[S, V].
      found: tokens of the beams so far, in rows of their sequences.
      row: i32[S], row of each sequence; R = idle.
      newest: i32[S], its newest token.
      sampled: bool[S], sequences that get a token.
      refused: bool[S], sequences of searches that end without pages, with what they have.

    Returns:
      ``(cache, found, row, newest, search)``
    """
    s, (b, w) = cache.max_seqs, search.score.shape
    count, params, rows = b * w, request.search, found.num_tokens.shape[0]
    assert params is not None, "a request of a beam search"

    def by_prompt(of_sequence: Array) -> Array:
        return of_sequence[:count].reshape(b, w, *of_sequence.shape[1:])

    active, without_pages = (jnp.any(by_prompt(x), axis=1) for x in (sampled, refused))
    tokens, before = by_prompt(found.tokens), by_prompt(found.num_tokens)[:, 0]
    length, limit = before + 1, by_prompt(request.max_new_tokens)[:, 0]
    going, any_, invalid = _candidates(logits[:count], search.score, request.stop_ids)
    failed = active & invalid
    full = (length >= limit)[:, None]
    stops = jnp.any(any_.token[..., None] == request.stop_ids, axis=-1)
    ends = active[:, None] & (stops | full)

    def grown(c: _Candidates, appended: Array | bool) -> Array:
        column = jnp.where(appended, before[:, None], tokens.shape[2])
        prompt, beam = jnp.arange(b)[:, None], jnp.arange(w)[None]
        return _take(tokens, c.parent).at[prompt, beam, column].set(c.token, mode="drop")

    out = without_pages[:, None]
    as_it_is = jnp.where(
        out & (before > 0)[:, None],
        params.penalized(search.score, jnp.maximum(before, 1)[:, None]),
        -jnp.inf,
    )
    more = _Finished(
        tokens=jnp.where(out[..., None], tokens, grown(any_, ~stops)),
        num_tokens=jnp.where(out, before[:, None], length[:, None] - stops),
        score=jnp.where(ends, params.penalized(any_.score, length[:, None]), as_it_is),
        reason=jnp.where(out, FINISH_OUT_OF_PAGES, jnp.where(stops, FINISH_STOP, FINISH_LENGTH)),
    )
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), search.finished, more)
    _, best = largest(both.score, w)
    finished = jax.tree.map(lambda x: _take(x, best), both)

    never, at_once = params.early_stopping == 2, params.early_stopping == 1
    # With "never" and a penalty that favours length, a beam may reach its best score at the limit.
    reach = jnp.where(never & (params.length_penalty > 0), limit, length)
    hopeful = params.penalized(going.score[:, 0], reach) > finished.score[:, -1]
    all_finished = finished.score[:, -1] > -jnp.inf
    goes_on = active & ~full[:, 0] & hopeful & ~(at_once & all_finished) & ~failed
    ended = (active & ~goes_on) | without_pages

    # Beams that go on copy their parents, those that ended are emptied, other sequences stay.
    ids, nobody = lax.iota(jnp.int32, s), jnp.zeros(s, bool)
    parent = lax.iota(jnp.int32, b)[:, None] * w + going.parent
    source = jnp.where(goes_on[:, None] & (going.score > -jnp.inf), parent, s)
    changed = _by_sequence(jnp.broadcast_to((active | without_pages)[:, None], (b, w)), nobody)
    source = jnp.where(changed, _by_sequence(source, ids), ids)
    pages, unshared = jnp.sum(cache.pages_used), _unshared(cache)
    some = jnp.any(active)
    has_ended = _by_sequence(jnp.broadcast_to(ended[:, None], (b, w)), nobody)
    reason = jnp.where(without_pages, FINISH_OUT_OF_PAGES, jnp.where(failed, FINISH_NAN, FINISH_LENGTH))
    at = jnp.where(has_ended, row, rows)
    here = jnp.where(active[:, None], lax.iota(jnp.int32, count).reshape(b, w), rows).reshape(-1)
    found = replace(
        found,
        tokens=found.tokens.at[here].set(grown(going, True).reshape(count, -1), mode="drop"),
        num_tokens=found.num_tokens.at[here].add(1, mode="drop"),
        finish_reason=found.finish_reason.at[at[:count]].set(jnp.repeat(reason, w), mode="drop"),
    )
    search = Search(
        score=jnp.where(active[:, None], going.score, search.score),
        finished=finished,
        failure=jnp.where(without_pages | failed, reason, search.failure),
        num_steps=search.num_steps + some,
        unshared_peak=jnp.maximum(search.unshared_peak, unshared),
        pages_sum=search.pages_sum + jnp.where(some, pages, 0),
        unshared_sum=search.unshared_sum + jnp.where(some, unshared, 0),
    )
    newest = _by_sequence(jnp.where(active[:, None], going.token, by_prompt(newest)), newest)
    return cache.seq_reorder(source), found, jnp.where(has_ended, rows, row), newest, search
