"""Sampling: logits to tokens, with one row of parameters a sequence, as in llama.cpp's chain.

penalties -> top-k -> top-p -> min-p -> temperature -> sample. The three truncations look at
probabilities at temperature 1, and each keeps a prefix of the tokens sorted by descending logit, so
together they keep one prefix. Its end mostly follows from a short head of it and one sum over the
row, so a row is seldom sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax

# Heads of the sorted row that are tried: the first on the whole batch, the second on each row that
# the first did not settle; other rows are sorted. 128 candidates hold llama.cpp's default top_k of
# 40 and cost a CPU little more than an argmax; 2,048 cost ten times as much, a sort of 49,152
# logits a hundred times.
_HEAD = 128
_LONG_HEAD = 2048
_CHUNK = 128
_INT_MAX = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of S sequences; arrays, so that other values do not recompile.

    ``create`` checks values on the host; nothing is checked on the device.
    """

    temperature: Array
    """f32[S]: divisor of the logits that are left; 0 or less (or subnormal) is greedy."""
    top_k: Array
    """i32[S]: number of likeliest tokens kept; 0 or less is off."""
    top_p: Array
    """f32[S]: least probability of the likeliest tokens kept, in sum; 1 or more is off."""
    min_p: Array
    """f32[S]: least probability of a token kept, relative to the likeliest; 0 or less is off."""
    repeat_penalty: Array
    """f32[S]: divisor of positive logits of recent tokens, factor of the others; 1 is off."""
    repeat_last_n: Array
    """i32[S]: number of recent tokens that penalties apply to; negative is all of them."""
    presence_penalty: Array
    """f32[S]: subtracted once from the logit of every recent token; 0 is off."""
    frequency_penalty: Array
    """f32[S]: subtracted from a recent token's logit for each occurrence; 0 is off."""
    seed: Array
    """u32[S]: determines the random numbers together with the position."""

    @property
    def num_seqs(self) -> int:
        """S, static."""
        return self.temperature.shape[0]

    @classmethod
    def create(
        cls,
        num_seqs: int,
        *,
        temperature: npt.ArrayLike = 0.8,
        top_k: npt.ArrayLike = 40,
        top_p: npt.ArrayLike = 0.95,
        min_p: npt.ArrayLike = 0.05,
        repeat_penalty: npt.ArrayLike = 1.0,
        repeat_last_n: npt.ArrayLike = 64,
        presence_penalty: npt.ArrayLike = 0.0,
        frequency_penalty: npt.ArrayLike = 0.0,
        seed: npt.ArrayLike = 0,
    ) -> SamplingParams:
        """Parameters for ``num_seqs`` sequences, checked on the host; the defaults are llama.cpp's.

        Args:
          num_seqs: S, at least 1.
          temperature: this and the others but ``seed``: one value for every sequence, or S values.
          seed: an integer, with ``seed + i`` (modulo 2**32) as the seed of row i; S integers, one a
            row; or a key of ``jax.random``, typed or a JAX array ``uint32[2]``, from which each row
            gets a seed of its own.

        Raises:
          ValueError: an invalid value; names the parameter, the value and the allowed range.

        Example:
          >>> SamplingParams.create(2, temperature=[0.0, 0.7], top_k=20, seed=5).seed.tolist()
          [5, 6]
        """
        if num_seqs < 1:
            raise ValueError(f"num_seqs = {num_seqs}: must be at least 1")

        def floats(name: str, value: npt.ArrayLike, low: float, high: float, allowed: str) -> Array:
            with np.errstate(over="ignore"):  # becomes infinite, and is refused below
                column = _column(name, value, num_seqs, "fiu", "a number").astype(np.float32)
            _refuse(name, value, np.isfinite(column) & (column >= low) & (column <= high), allowed)
            return jnp.asarray(column)

        def integers(name: str, value: npt.ArrayLike, low: int, high: int, allowed: str) -> np.ndarray:
            column = _column(name, value, num_seqs, "iu", "an integer")
            _refuse(name, value, (column >= low) & (column <= high), allowed)
            return column

        if _is_key(seed):
            seeds = cls.seeds_of(seed, num_seqs)
        else:
            allowed = "must be from 0 to 2**32 - 1, or a key of jax.random"
            column = integers("seed", seed, 0, 2**32 - 1, allowed)
            if np.ndim(seed) == 0:
                column = (column + np.arange(num_seqs)) % 2**32
            seeds = jnp.asarray(column, jnp.uint32)

        inf, smallest = np.inf, float(np.finfo(np.float32).tiny)
        return cls(
            temperature=floats("temperature", temperature, -inf, inf, "must be finite (0 or less is greedy)"),
            top_k=jnp.asarray(
                integers("top_k", top_k, -_INT_MAX - 1, _INT_MAX, "must fit 32 bits (0 or less is off)"),
                jnp.int32,
            ),
            top_p=floats("top_p", top_p, smallest, inf, "must be above 0 and finite (1 or more is off)"),
            min_p=floats("min_p", min_p, 0.0, 1.0, "must be from 0 (off) to 1"),
            repeat_penalty=floats(
                "repeat_penalty", repeat_penalty, smallest, inf, "must be above 0 and finite (1 is off)"
            ),
            repeat_last_n=jnp.asarray(
                integers(
                    "repeat_last_n", repeat_last_n, -1, _INT_MAX, "must be at least -1 (0 is off, -1 is all)"
                ),
                jnp.int32,
            ),
            presence_penalty=floats(
                "presence_penalty", presence_penalty, -inf, inf, "must be finite (0 is off)"
            ),
            frequency_penalty=floats(
                "frequency_penalty", frequency_penalty, -inf, inf, "must be finite (0 is off)"
            ),
            seed=seeds,
        )

    @staticmethod
    def seeds_of(key: Array, num_seqs: int) -> Array:
        """u32[num_seqs]: a seed for each sequence from a key of ``jax.random``.

        Raises:
          ValueError: not a key.
        """
        if not _is_key(key):
            given = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
            raise ValueError(f"key must be a key of jax.random (jax.random.key(0)), got {given}")
        return jax.random.bits(key, (num_seqs,), jnp.uint32)

    @classmethod
    def unmodified(cls, num_seqs: int, *, seed: npt.ArrayLike = 0) -> SamplingParams:
        """Parameters that sample from the model's own distribution: temperature 1, nothing cut off."""
        return cls.create(num_seqs, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)

    @classmethod
    def greedy(cls, num_seqs: int) -> SamplingParams:
        """Parameters of greedy decoding for ``num_seqs`` sequences."""
        return cls.create(num_seqs, temperature=0.0)


def sample(logits: Array, params: SamplingParams, position: Array, recent: Array) -> Array:
    """Samples the next token of every sequence.

    With logits z, sorted so that z_0 >= z_1 >= ... (equal ones by id), and p_i = exp(z_i) /
    sum(exp(z)) over the tokens that the previous step left:

    1. For a token that occurs c > 0 times among the last ``repeat_last_n`` recent ones:
       z <- z / ``repeat_penalty`` if z > 0 else z * ``repeat_penalty``;
       z <- z - c * ``frequency_penalty`` - ``presence_penalty``.
    2. Keep i < ``top_k``; then i < n for the least n with p_0 + ... + p_{n-1} >= ``top_p``; then
       p_i >= ``min_p`` * p_0. The likeliest token always stays.
    3. With weights w_i = exp((z_i - z_0) / ``temperature``) of the tokens left, take the first i
       with w_0 + ... + w_i > u * sum(w), where u is the uniform number of ``(seed, position)``.

    A row's token depends on that row alone. Sorting, penalties and random numbers are skipped at
    run time if no row needs them; values of ``params`` never cause a retrace.

    Args:
      logits: float[S, V], any floating dtype, computed in float32. +inf counts as the largest
        finite number. A token at -inf is never sampled; if all of a row are, the result is token 0.
      params: S rows.
      position: i32[S], position of the sampled token in its sequence; each has its own random
        number.
      recent: i32[S, R], latest tokens of each sequence, right-aligned, the latest last, padded with
        ids outside [0, V), such as -1. R may be 0; ``repeat_last_n`` is limited to R.

    Returns:
      i32[S], ids in [0, V); -1 for a row that holds NaN.

    Raises:
      ValueError: shapes or dtypes that do not match, at trace time.

    Example:
      >>> logits = jnp.array([[0.0, 2.0, 1.0]])
      >>> sample(logits, SamplingParams.greedy(1), jnp.array([7]), jnp.array([[-1, 1]])).tolist()
      [1]

    Reference: llama.cpp, ``src/llama-sampling.cpp`` (penalties, top-k, top-p, min-p, temp, dist);
    Holtzman et al., "The Curious Case of Neural Text Degeneration" (top-p); Nguyen et al., "Turning
    Up the Heat" (min-p).
    """
    _check(logits, params, position, recent)
    logits = logits.astype(jnp.float32)
    if recent.shape[1] > 0:
        penalized = (params.repeat_last_n != 0) & (
            (params.repeat_penalty != 1.0)
            | (params.presence_penalty != 0.0)
            | (params.frequency_penalty != 0.0)
        )
        logits = lax.cond(jnp.any(penalized), _penalize, lambda z, _p, _r: z, logits, params, recent)
    return lax.cond(jnp.all(_is_greedy(params)), _argmax, _sample_random, logits, params, position)


def logprobs_of(logits: Array, tokens: Array, count: int) -> dict[str, Array]:
    """Log-probabilities of tokens, and of the likeliest ones, by softmax of the logits.

    Args:
      logits: float[S, V].
      tokens: i32[S]; the result is arbitrary where one is negative.
      count: k, number of likeliest tokens.

    Returns:
      ``logprobs f32[S]``; ``top_tokens i32[S, k]`` and ``top_logprobs f32[S, k]``, likeliest first.
    """
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=1)
    values, ids = largest(logits, min(count, logits.shape[1]))
    missing = ((0, 0), (0, count - values.shape[1]))
    return {
        "logprobs": (chosen - total)[:, 0],
        "top_tokens": jnp.pad(ids.astype(jnp.int32), missing, constant_values=-1),
        "top_logprobs": jnp.pad(values - total, missing),
    }


def largest(x: Array, k: int) -> tuple[Array, Array]:
    """``lax.top_k``, and not a sort on a CPU: XLA sorts the row if a part of the result is used alone."""
    values, ids = lax.top_k(x, k)
    # One by one: XLA of jax 0.10 dies of a barrier around both.
    return lax.optimization_barrier(values), lax.optimization_barrier(ids)


def push_recent(recent: Array, tokens: Array, active: Array) -> Array:
    """Appends a token to each active row of ``recent``, dropping the oldest.

    Args:
      recent: i32[S, R], as ``sample`` takes it; ``jnp.full((S, R), -1)`` to begin with.
      tokens: i32[S].
      active: bool[S]; other rows do not change.

    Returns:
      i32[S, R].
    """
    pushed = jnp.concatenate([recent, tokens[:, None].astype(recent.dtype)], axis=1)[:, 1:]
    return jnp.where(active[:, None], pushed, recent)


def _is_key(seed: Any) -> TypeGuard[Array]:
    """True for a key of ``jax.random``: typed, or a JAX array uint32[2]; a list or numpy array
    holds seeds."""
    return isinstance(seed, Array) and (
        jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) or (seed.dtype == jnp.uint32 and seed.shape == (2,))
    )


def _column(name: str, value: npt.ArrayLike, num_seqs: int, kinds: str, what: str) -> np.ndarray:
    """``value`` as S numbers of one of the numpy dtype kinds ``kinds``."""
    column = np.asarray(value)
    if column.dtype.kind not in kinds:
        raise ValueError(f"{name} = {value!r}: must be {what}, or {num_seqs} of them")
    if column.shape not in ((), (num_seqs,)):
        raise ValueError(
            f"{name} has shape {column.shape}: must be one value, or one for each of {num_seqs} sequences"
        )
    return np.broadcast_to(column, (num_seqs,))


def _refuse(name: str, value: npt.ArrayLike, valid: np.ndarray, allowed: str) -> None:
    if not valid.all():
        row = int(np.argmin(valid))
        given = np.asarray(value)
        label = name if given.ndim == 0 else f"{name}[{row}]"
        raise ValueError(f"{label} = {given if given.ndim == 0 else given[row]}: {allowed}")


def _check(logits: Array, params: SamplingParams, position: Array, recent: Array) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating [S, V] with V > 0, not {logits.dtype}{list(logits.shape)}")
    num_seqs = logits.shape[0]
    shapes = {name: leaf.shape for name, leaf in vars(params).items()} | {"position": position.shape}
    for name, shape in shapes.items():
        if shape != (num_seqs,):
            raise ValueError(
                f"{name} must have one value for each of {num_seqs} rows of logits, not {list(shape)}"
            )
    if recent.ndim != 2 or recent.shape[0] != num_seqs or not jnp.issubdtype(recent.dtype, jnp.integer):
        raise ValueError(f"recent must be an integer [{num_seqs}, R], not {recent.dtype}{list(recent.shape)}")


def _is_greedy(params: SamplingParams) -> Array:
    # Also NaN, and subnormal numbers, which some devices flush to zero: neither may divide.
    return ~(params.temperature >= jnp.finfo(jnp.float32).tiny)


def _penalize(logits: Array, params: SamplingParams, recent: Array) -> Array:
    """Step 1 of ``sample``, on the recent tokens only: O(S * R log R) beside the copy of the
    logits."""
    vocab_size, size = logits.shape[1], recent.shape[1]
    age = size - jnp.arange(size, dtype=jnp.int32)
    last_n = jnp.where(params.repeat_last_n < 0, size, params.repeat_last_n)[:, None]
    seen = (age <= last_n) & (recent >= 0) & (recent < vocab_size)
    # Sorted, the occurrences of a token are a run, whose length is the count; all write the same
    # value.
    token = jnp.sort(jnp.where(seen, recent, vocab_size), axis=1)
    index = jnp.arange(size, dtype=jnp.int32)
    changes = token[:, 1:] != token[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start = lax.cummax(jnp.where(first, index, 0), axis=1)
    end = lax.cummin(jnp.where(last, index, size), axis=1, reverse=True)
    count = (end - start + 1).astype(jnp.float32)

    row = jnp.arange(logits.shape[0])[:, None]
    z = logits.at[row, token].get(mode="fill", fill_value=0.0)
    repeat = params.repeat_penalty[:, None]
    z = jnp.where(z > 0, z / repeat, z * repeat)
    z = z - (count * params.frequency_penalty[:, None] + params.presence_penalty[:, None])
    return logits.at[row, token].set(z, mode="drop")


def _clean(logits: Array) -> Array:
    """Logits in a total order: NaN as +inf, others finite or -inf, -0.0 as 0.0 (``lax.top_k`` sorts
    them apart).

    The greatest value of a row is +inf exactly if the row holds NaN, so detecting NaN costs no
    pass.
    """
    z = jnp.where(jnp.isnan(logits), jnp.inf, jnp.minimum(logits, jnp.finfo(jnp.float32).max))
    return jnp.where(z == 0.0, 0.0, z)


def _chunked(x: Array, fill: float) -> Array:
    """``[S, V]`` as ``[S, C, _CHUNK]``: reductions by chunk vectorize, in an order independent of
    S."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _CHUNK)), constant_values=fill)
    return padded.reshape(x.shape[0], -1, _CHUNK)


def _argmax(logits: Array, _params: SamplingParams, _position: Array) -> Array:
    """Lowest id of the greatest logit; by chunks, which XLA:CPU vectorizes, unlike a plain
    argmax."""
    chunks = _chunked(_clean(logits), -jnp.inf)
    chunk = jnp.argmax(chunks.max(axis=2), axis=1)
    winner = jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0]
    token = (chunk * _CHUNK + jnp.argmax(winner, axis=1)).astype(jnp.int32)
    return jnp.where(winner.max(axis=1) == jnp.inf, -1, token)


def _sample_random(logits: Array, params: SamplingParams, position: Array) -> Array:
    """Steps 2 and 3 of ``sample``."""
    z = _clean(logits)
    uniform = jax.vmap(_uniform)(params.seed, position)
    head = min(_HEAD, z.shape[1])
    values, ids = largest(z, head)
    if head == z.shape[1]:
        return _choose(values, ids, z.shape[1], params, uniform, None)[0]
    whole = _whole_row_needed(z.shape[1], params)
    mass = lax.cond(jnp.any(whole), _mass, lambda z, _p: jnp.zeros(z.shape[0], z.dtype), z, params)
    token, settled = _choose(values, ids, z.shape[1], params, uniform, mass)

    def finish(token: Array) -> Array:
        # Row by row: a request without truncation must not cost the others a sort.
        rows = (z, params, uniform, mass, token, settled)
        return lax.map(lambda row: lax.cond(row[-1], lambda row: row[-2], _sample_row, row), rows)

    return lax.cond(jnp.all(settled), lambda token: token, finish, token)


def _sample_row(row: tuple[Array, SamplingParams, Array, Array, Array, Array]) -> Array:
    """Token of a row that its first ``_HEAD`` candidates did not settle; ``z f32[V]``, scalars."""
    z, params, uniform, mass = jax.tree.map(lambda leaf: leaf[None], row[:4])
    vocab_size = z.shape[1]

    def from_sorted(z: Array) -> Array:
        ids = lax.broadcasted_iota(jnp.int32, z.shape, 1)
        negated, ids = lax.sort((-z, ids), is_stable=True, num_keys=1)
        return _choose(-negated, ids, vocab_size, params, uniform, None)[0]

    if vocab_size <= _LONG_HEAD:
        return from_sorted(z)[0]
    values, ids = largest(z, _LONG_HEAD)
    token, settled = _choose(values, ids, vocab_size, params, uniform, mass)
    return lax.cond(settled[0], lambda _: token, from_sorted, z)[0]


def _uniform(seed: Array, position: Array) -> Array:
    """f32[] in [0, 1). The generator is named, to be independent of the process-wide default."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.uniform(key, dtype=jnp.float32)


def _whole_row_needed(vocab_size: int, params: SamplingParams) -> Array:
    """bool[S]: top-k is off, so probabilities are relative to the whole row."""
    return ~_is_greedy(params) & ((params.top_k <= 0) | (params.top_k >= vocab_size))


def _gap(z: Array) -> Array:
    """``z`` minus its maximum, the exponent of an unnormalized probability; -inf if all of z
    are."""
    greatest = z.max(axis=1, keepdims=True)
    return z - jnp.where(greatest == -jnp.inf, 0.0, greatest)


def _log_min_p(params: SamplingParams) -> Array:
    """f32[S, 1]: least gap that min-p keeps."""
    return jnp.where(params.min_p > 0.0, jnp.log(params.min_p), -jnp.inf)[:, None]


def _temper(gap: Array, params: SamplingParams) -> Array:
    return gap / jnp.where(_is_greedy(params), 1.0, params.temperature)[:, None]


def _mass(z: Array, params: SamplingParams) -> Array:
    """f32[S]: sum over the whole row, which a row without top-k needs beside its head.

    Sum of probabilities with top-p, else of the weights of step 3; both relative to the likeliest
    token.
    """
    gap = _gap(z)
    tempered = jnp.where(gap >= _log_min_p(params), _temper(gap, params), -jnp.inf)
    weight = jnp.exp(jnp.where(params.top_p[:, None] < 1.0, gap, tempered))
    return _chunked(weight, 0.0).sum(axis=1).sum(axis=1)


def _cumulative(x: Array) -> Array:
    """Cumulative sums along the last axis.

    XLA would compute the summands once for each of the sums that they are part of, in a program as
    large as that.
    """
    return lax.cumsum(lax.optimization_barrier(x), axis=1)


def _choose(
    values: Array, ids: Array, vocab_size: int, params: SamplingParams, uniform: Array, mass: Array | None
) -> tuple[Array, Array]:
    """Truncates and samples among the K likeliest candidates of each row, if these determine the
    token.

    Args:
      values: f32[S, K], clean logits, descending.
      ids: i32[S, K].
      vocab_size: V, static.
      params: S rows.
      uniform: f32[S].
      mass: ``_mass`` of the rows without top-k; None where K = V.

    Returns:
      ``(token i32[S], settled bool[S])``; the token is arbitrary unless settled.
    """
    size = values.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)
    gap = _gap(values)
    greedy = _is_greedy(params)
    top_k = jnp.where((params.top_k <= 0) | (params.top_k >= vocab_size), vocab_size, params.top_k)

    probability = jnp.where(index < top_k[:, None], jnp.exp(gap), 0.0)
    cumulative = _cumulative(probability)
    total = cumulative[:, -1] if mass is None else jnp.where(top_k <= size, cumulative[:, -1], mass)
    by_top_p = 1 + jnp.sum(cumulative < (params.top_p * total)[:, None], axis=1, dtype=jnp.int32)
    by_top_p = jnp.where(params.top_p < 1.0, by_top_p, _INT_MAX)
    by_min_p = jnp.sum((gap >= _log_min_p(params)) & (values > -jnp.inf), axis=1, dtype=jnp.int32)
    kept = jnp.minimum(jnp.minimum(top_k, by_top_p), by_min_p)

    weight = jnp.where(index < kept[:, None], jnp.exp(_temper(gap, params)), 0.0)
    cumulative = _cumulative(weight)
    total_weight = cumulative[:, -1]
    settled = jnp.ones_like(greedy)
    if mass is not None:
        unlimited = top_k == vocab_size
        without_top_p = params.top_p >= 1.0
        # The end of the kept prefix is among the candidates.
        bounded = (
            (top_k <= size)
            | (unlimited & (by_top_p <= size))
            | ((unlimited | without_top_p) & (by_min_p < size))
        )
        # Elsewhere, a random number that falls on a candidate suffices if at most min-p truncates:
        # `mass` is then the sum of all weights.
        unbounded = unlimited & without_top_p & ~bounded
        total_weight = jnp.where(unbounded, mass, total_weight)
        settled = greedy | bounded | (unbounded & (uniform * total_weight < cumulative[:, -1]))

    rank = jnp.sum(cumulative <= (uniform * total_weight)[:, None], axis=1, dtype=jnp.int32)
    rank = jnp.where(greedy, 0, jnp.clip(rank, 0, jnp.maximum(kept - 1, 0)))
    rank = jnp.minimum(rank, size - 1)  # a row that is not settled may keep more than K
    token = jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0]
    invalid = values[:, 0] == jnp.inf
    return jnp.where(invalid, -1, token), settled | invalid
