"""Scores of a text read through caches: each token's loss, and the divergence of predictions between caches.

Text is cut into chunks of ``n_ctx`` tokens, each a sequence of its own, and the second half of each is scored, so that
every prediction has a context: the convention of llama.cpp's llama-perplexity. A chunk goes through
``cache.reserve`` and ``cache.attend`` in steps, as a prompt or a decoded token does. The size of a step matters:
tokens of earlier steps are read from pages, and some formats store a page in 16 bits until it is full.

Comparisons are reduced to a few numbers per token on the device; the logits of a whole text never exist.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxpaged_model.llama import ModelFn, Params

from jaxpaged.cache.interface import clear
from jaxpaged.cache.paged import PagedKVCache

_LOGITS_BYTES = 2**26
"""Most bytes of logits that a program returns, unless a single step has more."""


@dataclass(frozen=True)
class Scores:
    """The scored tokens of some chunks, as one cache predicts them; ``[chunks, n_ctx - n_ctx // 2 - 1]`` each."""

    nll: np.ndarray
    """f64: negative log-likelihood of the token, in nats."""
    right: np.ndarray
    """bool: the token is the likeliest one."""
    kld: np.ndarray
    """f64: Kullback-Leibler divergence from the first cache's prediction to this one's, in nats, over the whole
    vocabulary; zeros for the first cache itself."""
    same_top: np.ndarray
    """bool: both caches have the same likeliest token."""

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Concatenates the scores of several groups of chunks."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def __getitem__(self, index: Any) -> Scores:
        """Indexes every array: a part of the chunks, or of the tokens."""
        return Scores(self.nll[index], self.right[index], self.kld[index], self.same_top[index])


def cut(tokens: Sequence[int], n_ctx: int, *, bos: int | None = None) -> np.ndarray:
    """Splits tokens into chunks ``i32[len(tokens) // n_ctx, n_ctx]`` and drops the rest; each begins with ``bos``."""
    count = len(tokens) // n_ctx
    chunks = np.asarray(tokens[: count * n_ctx], np.int32).reshape(count, n_ctx)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


def default_parallel(step: int) -> int:
    """Number of chunks to compute at once in steps of ``step`` tokens, enough for a small machine."""
    return min(max(512 // step, 1), 32)


@dataclass(frozen=True)
class _Shape:
    """Static part of a step: the tokens of each sequence, and the rows of them that are scored."""

    length: int
    first: int
    last: int
    """Rows ``first .. last`` of the step's ``length`` are scored; none if both are 0."""

    @property
    def scored(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class _StepRun:
    """Successive steps of one shape."""

    shape: _Shape
    start: int
    steps: int

    @property
    def targets(self) -> np.ndarray:
        """i32[steps, scored]: positions in a chunk of the tokens that scored rows predict."""
        steps = self.start + self.shape.length * np.arange(self.steps, dtype=np.int32)
        return steps[:, None] + np.arange(self.shape.first, self.shape.last, dtype=np.int32) + 1


def _step_runs(n_ctx: int, step: int, most_rows: int) -> list[_StepRun]:
    """Splits a chunk into steps of ``step`` tokens; a run has at most ``most_rows`` scored rows, or one step."""
    runs: list[_StepRun] = []
    for start in range(0, n_ctx, step):
        length = min(step, n_ctx - start)
        first = min(max(n_ctx // 2 - start, 0), length)
        last = min(n_ctx - 1 - start, length)  # the last token has none to predict
        shape = _Shape(length, first, last) if first < last else _Shape(length, 0, 0)
        before = runs[-1] if runs else None
        if before and before.shape == shape and (before.steps + 1) * shape.scored <= most_rows:
            runs[-1] = _StepRun(shape, before.start, before.steps + 1)
        else:
            runs.append(_StepRun(shape, start, 1))
    return runs


@functools.partial(
    jax.jit, static_argnames=("model", "vocab_size", "shape", "capacity"), donate_argnames="cache"
)
def _read(
    model: ModelFn,
    vocab_size: int,
    shape: _Shape,
    capacity: int,
    params: Params,
    cache: PagedKVCache,
    chunks: Array,
    active: Array,
    start: Array,
    steps: Array,
) -> tuple[PagedKVCache, Array]:
    """Computes ``steps`` steps of the first ``active`` chunks, from their token ``start`` on; donates ``cache``.

    Returns:
      ``(cache, logits f32[capacity, chunks, scored, vocab_size])``, of which the first ``steps`` are valid.
    """
    num_seqs, length = chunks.shape[0], shape.length
    rows = jnp.arange(num_seqs)[:, None] * length + jnp.arange(shape.first, shape.last)
    num_new = jnp.where(jnp.arange(num_seqs) < active, length, 0)

    def step(i: Array, carry: tuple[PagedKVCache, Array]) -> tuple[PagedKVCache, Array]:
        cache, logits = carry
        tokens = jax.lax.dynamic_slice_in_dim(chunks, start + i * length, length, axis=1)
        cache, batch, _ = cache.reserve(num_new, num_tokens=num_seqs * length, max_new=length)
        found, cache = model(params, tokens.reshape(-1), cache, batch, rows.reshape(-1))
        return cache, logits.at[i].set(found.reshape(logits.shape[1:]))

    logits = jnp.zeros((capacity, num_seqs, shape.scored, vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, steps, step, (cache, logits))


_clear = jax.jit(clear, donate_argnums=0)


@jax.jit
def divergence(base: Array, logits: Array) -> Array:
    """Kullback-Leibler divergence from softmax(base) to softmax(logits), f32[...] in nats; both ``f32[..., V]``.

    With p the probabilities of ``base`` and x the difference of the logits less its mean under p, the divergence is
    ``log sum p e^x``, which is ``log1p(sum p (e^x - 1 - x))`` because ``sum p x`` is 0. No term of that sum is negative
    and each is of second order, so that float32 gives a divergence of 1e-6 to four digits and that of equal logits as
    0; the difference of two log-softmaxes, rounded at 1e-6 each, would not.
    """
    log_p = jax.nn.log_softmax(base, axis=-1)
    p = jnp.exp(log_p)
    difference = logits - base
    x = difference - jnp.sum(p * difference, axis=-1, keepdims=True)
    small = p * (jnp.expm1(x) - x)
    large = jnp.exp(log_p + x) - p * (1 + x)  # e^x alone may overflow where p is next to nothing
    second_order = jnp.sum(jnp.where(jnp.abs(x) < 1, small, large), axis=-1)
    return jnp.where(second_order < 1, jnp.log1p(second_order), jax.nn.logsumexp(log_p + x, axis=-1))


def score(
    model: ModelFn,
    params: Params,
    vocab_size: int,
    caches: Sequence[PagedKVCache],
    chunks: np.ndarray,
    *,
    step: int,
    base: ModelFn | None = None,
) -> Iterator[list[Scores]]:
    """Scores the second halves of chunks, ``max_seqs`` chunks at a time.

    Args:
      model: as ``jaxpaged_model.llama.functional`` gives it.
      params: its weights.
      vocab_size: V, of its logits.
      caches: the others are compared with the first. All have the same ``max_seqs`` and pages for ``n_ctx`` tokens of
        each sequence; donated.
      chunks: i32[C, n_ctx], see ``cut``.
      step: tokens of each chunk that one step computes; 1 feeds them as decoding does.
      base: the model used with the first cache; None = ``model``.

    Yields:
      For each group of chunks, in order: the scores of each cache.

    Raises:
      ValueError: the caches differ in ``max_seqs``, or have too few pages.
    """
    caches = list(caches)
    num_seqs, n_ctx = caches[0].max_seqs, chunks.shape[1]
    if any(cache.max_seqs != num_seqs for cache in caches):
        raise ValueError(f"caches differ in max_seqs: {[cache.max_seqs for cache in caches]}")
    for cache in caches:
        pages = min(cache.num_pages // num_seqs, cache.max_pages_per_seq)
        if pages * cache.page_size < n_ctx:
            raise ValueError(
                f"{num_seqs} x {n_ctx} tokens need more than {cache.num_pages} pages of {cache.page_size}"
            )
    runs = _step_runs(n_ctx, step, max(_LOGITS_BYTES // (4 * vocab_size * num_seqs), 1))
    capacity = {shape: max(p.steps for p in runs if p.shape == shape) for shape in {p.shape for p in runs}}
    for at in range(0, len(chunks), num_seqs):
        group = chunks[at : at + num_seqs]
        padded = np.zeros((num_seqs, n_ctx), np.int32)
        padded[: len(group)] = group
        caches = [_clear(cache) for cache in caches]
        found: list[list[tuple[Array, ...]]] = [[] for _ in caches]
        for run in runs:
            compared_with = None
            places = np.resize(run.targets, (capacity[run.shape], run.shape.scored))
            targets = jnp.asarray(padded[:, places].swapaxes(0, 1))
            for i, cache in enumerate(caches):
                caches[i], logits = _read(
                    model if i or base is None else base,
                    vocab_size,
                    run.shape,
                    capacity[run.shape],
                    params,
                    cache,
                    padded,
                    len(group),
                    run.start,
                    run.steps,
                )
                if run.shape.scored:
                    found[i].append(_compare(compared_with, logits, targets))
                    compared_with = logits if compared_with is None else compared_with
        scored = [run for run in runs if run.shape.scored]
        yield [_gathered(scored, parts, len(group)) for parts in found]


@jax.jit
def _compare(base: Array | None, logits: Array, targets: Array) -> tuple[Array, ...]:
    """Fields of ``Scores`` for each prediction; without ``base``, compared with itself."""
    loss = jax.nn.logsumexp(logits, axis=-1)
    loss -= jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    top = jnp.argmax(logits, axis=-1)
    if base is None:
        return loss, top == targets, jnp.zeros_like(loss), jnp.ones_like(loss, bool)
    return loss, top == targets, divergence(base, logits), top == jnp.argmax(base, axis=-1)


def _gathered(runs: Sequence[_StepRun], parts: Sequence[tuple[Array, ...]], active: int) -> Scores:
    """Concatenates the scores of a chunk's runs, ``[capacity, chunks, scored]`` each."""
    columns = []
    for field in zip(*parts, strict=True):
        kept = [
            np.asarray(x)[: run.steps, :active].swapaxes(0, 1).reshape(active, -1)
            for run, x in zip(runs, field, strict=True)
        ]
        columns.append(np.concatenate(kept, axis=1))
    nll, right, kld, same_top = columns
    return Scores(nll.astype(np.float64), right, kld.astype(np.float64), same_top)
