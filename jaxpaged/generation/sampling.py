"""Sampling: logits to tokens, with one row of parameters a sequence, as in llama.cpp's chain.

penalties -> DRY -> top-n-sigma -> top-k -> typical -> top-p -> min-p -> XTC -> temperature -> sample;
temperature -> Mirostat where that is on. Truncations look at probabilities at temperature 1. Those
of top-k, top-p and min-p each keep a prefix of the tokens sorted by descending logit, so together
they keep one prefix. Its end mostly follows from a short head of it and one sum over the row, so a
row is seldom sorted. Typical, XTC and dynamic temperature are computed on the head too where top-k
is in it (``truncation``).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.generation import repetition, truncation
from jaxpaged.generation.sampling_params import SamplingParams, first_mu
from jaxpaged.generation.truncation import CHUNK, chunked

# Heads of the sorted row that are tried: the first on the whole batch, the second on each row that
# the first did not settle; other rows are sorted. 128 candidates hold llama.cpp's default top_k of
# 40 and cost a CPU little more than an argmax; 2,048 cost ten times as much, a sort of 49,152
# logits a hundred times.
_HEAD = 128
_LONG_HEAD = 2048
_INT_MAX = np.iinfo(np.int32).max


def sample(logits: Array, params: SamplingParams, position: Array, recent: Array) -> Array:
    """Samples the next token of every sequence.

    With logits z, sorted so that z_0 >= z_1 >= ... (equal ones by id), and p_i = exp(z_i) /
    sum(exp(z)) over the tokens that the previous step left:

    1. For a token that occurs c > 0 times among the last ``repeat_last_n`` recent ones:
       z <- z / ``repeat_penalty`` if z > 0 else z * ``repeat_penalty``;
       z <- z - c * ``frequency_penalty`` - ``presence_penalty``.
    2. For a token that would repeat n + 1 tokens, with n >= ``dry_allowed_length``:
       z <- z - ``dry_multiplier`` * ``dry_base`` ** (n - ``dry_allowed_length``).
    3. Keep z_i >= z_0 - ``top_n_sigma`` * (standard deviation of z); then i < ``top_k``; then those
       nearest to the entropy up to ``typical_p``; then i < n for the least n with
       p_0 + ... + p_{n-1} >= ``top_p``; then p_i >= ``min_p`` * p_0. The likeliest token always stays,
       but for typical.
    4. With the chance ``xtc_probability``, drop the tokens with p_i >= ``xtc_threshold`` but the last.
    5. With weights w_i = exp((z_i - z_0) / ``temperature``) of the tokens left, take the first i
       with w_0 + ... + w_i > u * sum(w), where u is the uniform number of ``(seed, position)``. With
       ``dynatemp_range``, the temperature is between ``temperature`` minus and plus this, by the
       ``dynatemp_exponent``-th power of the entropy of p divided by that of equal ones.

    Mirostat takes the place of all but the temperature. Its state is 2 * ``mirostat_tau`` here;
    ``sample_next`` takes it and returns it.

    A row's token depends on that row alone. Sorting, penalties and random numbers are skipped at
    run time if no row needs them; values of ``params`` never cause a retrace.

    Args:
      logits: float[S, V], any floating dtype, computed in float32. +inf counts as the largest
        finite number. A token at -inf is never sampled; if all of a row are, the result is token 0.
      params: S rows.
      position: i32[S], position of the sampled token in its sequence; each has its own random
        number.
      recent: i32[S, R], latest tokens of each sequence, right-aligned, the latest last, padded with
        ids outside [0, V), such as -1. R may be 0; ``repeat_last_n`` and ``dry_penalty_last_n`` are
        limited to R.

    Returns:
      i32[S], ids in [0, V); -1 for a row that holds NaN.

    Raises:
      ValueError: shapes or dtypes that do not match, at trace time.

    Example:
      >>> logits = jnp.array([[0.0, 2.0, 1.0]])
      >>> sample(logits, SamplingParams.greedy(1), jnp.array([7]), jnp.array([[-1, 1]])).tolist()
      [1]

    Reference: llama.cpp, ``src/llama-sampler.cpp``;
    Holtzman et al., "The Curious Case of Neural Text Degeneration" (top-p); Nguyen et al., "Turning
    Up the Heat" (min-p).
    """
    return sample_next(logits, params, position, recent, first_mu(params))[0]


def sample_next(
    logits: Array, params: SamplingParams, position: Array, recent: Array, mu: Array
) -> tuple[Array, Array]:
    """``sample`` with the state of Mirostat, ``mu f32[S]``; returns ``(tokens, mu)``.

    ``first_mu`` begins a sequence. Other rows keep theirs.
    """
    _check(logits, params, position, recent)
    logits = logits.astype(jnp.float32)

    def change(z: Array) -> Array:
        def unchanged(z: Array, *_: object) -> Array:
            return z

        if recent.shape[1] > 0:
            penalized = jnp.any(params.has_penalties)
            z = lax.cond(penalized, repetition.penalize, unchanged, z, params, recent)
            z = lax.cond(jnp.any(params.has_dry), repetition.penalize_repeats, unchanged, z, params, recent)
        return lax.cond(jnp.any(params.has_top_n_sigma), truncation.top_n_sigma, unchanged, z, params)

    # One condition around all, since each copies the logits.
    changes = params.has_penalties | params.has_dry | params.has_top_n_sigma
    logits = lax.cond(jnp.any(changes), change, lambda z: z, logits)
    greedy = jnp.all(params.is_greedy & ~params.has_chain)
    return lax.cond(greedy, _argmax, _sample_random, logits, params, position, mu)


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


def _check(logits: Array, params: SamplingParams, position: Array, recent: Array) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating [S, V] with V > 0, not {logits.dtype}{list(logits.shape)}")
    num_seqs = logits.shape[0]
    shapes = {name: leaf.shape for name, leaf in vars(params).items() if name != "dry_breakers"}
    shapes["position"] = position.shape
    for name, shape in shapes.items():
        if shape != (num_seqs,):
            raise ValueError(
                f"{name} must have one value for each of {num_seqs} rows of logits, not {list(shape)}"
            )
    if recent.ndim != 2 or recent.shape[0] != num_seqs or not jnp.issubdtype(recent.dtype, jnp.integer):
        raise ValueError(f"recent must be an integer [{num_seqs}, R], not {recent.dtype}{list(recent.shape)}")


def _clean(logits: Array) -> Array:
    """Logits in a total order: NaN as +inf, others finite or -inf, -0.0 as 0.0 (``lax.top_k`` sorts
    them apart).

    The greatest value of a row is +inf exactly if the row holds NaN, so detecting NaN costs no
    pass.
    """
    z = jnp.where(jnp.isnan(logits), jnp.inf, jnp.minimum(logits, jnp.finfo(jnp.float32).max))
    return jnp.where(z == 0.0, 0.0, z)


def _argmax(logits: Array, _params: SamplingParams, _position: Array, mu: Array) -> tuple[Array, Array]:
    """Lowest id of the greatest logit; by chunks, which XLA:CPU vectorizes, unlike a plain
    argmax."""
    chunks = chunked(_clean(logits), -jnp.inf)
    chunk = jnp.argmax(chunks.max(axis=2), axis=1)
    winner = jnp.take_along_axis(chunks, chunk[:, None, None], axis=1)[:, 0]
    token = (chunk * CHUNK + jnp.argmax(winner, axis=1)).astype(jnp.int32)
    return jnp.where(winner.max(axis=1) == jnp.inf, -1, token), mu


def _sample_random(logits: Array, params: SamplingParams, position: Array, mu: Array) -> tuple[Array, Array]:
    """Steps 3 to 5 of ``sample`` after top-n-sigma, and Mirostat."""
    z = _clean(logits)
    uniform, xtc_uniform = _uniforms(params.seed, position)
    head = min(_HEAD, z.shape[1])
    values, ids = largest(z, head)
    if head == z.shape[1]:
        return _choose_among_all(values, ids, params, uniform, xtc_uniform, mu)
    whole = _whole_row_needed(z.shape[1], params)
    mass = lax.cond(jnp.any(whole), _mass, lambda z, _p: jnp.zeros(z.shape[0], z.dtype), z, params)
    token, settled = _choose(values, ids, z.shape[1], params, uniform, mass)

    def by_chain(token: Array, settled: Array) -> tuple[Array, Array]:
        chain, invalid = params.has_chain, values[:, 0] == jnp.inf
        fits = (params.top_k > 0) & (params.top_k <= head) & (params.mirostat == 0)
        chosen, _ = truncation.sample_chain(values, ids, params, uniform, xtc_uniform, mu, whole=False)
        return jnp.where(chain & ~invalid, chosen, token), jnp.where(chain, fits | invalid, settled)

    token, settled = lax.cond(jnp.any(params.has_chain), by_chain, lambda *same: same, token, settled)

    def finish(token: Array, mu: Array) -> tuple[Array, Array]:
        # Row by row: a request without truncation must not cost the others a sort.
        rows = (z, params, uniform, xtc_uniform, mass, mu), token, settled
        return lax.map(lambda row: lax.cond(row[2], lambda row: (row[1], row[0][-1]), _sample_row, row), rows)

    return lax.cond(jnp.all(settled), lambda *same: same, finish, token, mu)


def _sample_row(row: tuple[tuple[Any, ...], Array, Array]) -> tuple[Array, Array]:
    """``(token, mu)`` of a row that its first ``_HEAD`` candidates did not settle; ``z f32[V]``, scalars."""
    z, params, uniform, xtc_uniform, mass, mu = jax.tree.map(lambda leaf: leaf[None], row[0])
    vocab_size = z.shape[1]

    def from_sorted(z: Array) -> tuple[Array, Array]:
        ids = lax.broadcasted_iota(jnp.int32, z.shape, 1)
        negated, ids = lax.sort((-z, ids), is_stable=True, num_keys=1)
        return _choose_among_all(-negated, ids, params, uniform, xtc_uniform, mu)

    if vocab_size <= _LONG_HEAD:
        token, mu = from_sorted(z)
    else:
        values, ids = largest(z, _LONG_HEAD)
        token, settled = _choose(values, ids, vocab_size, params, uniform, mass)
        settled &= ~params.has_chain
        token, mu = lax.cond(settled[0], lambda _: (token, mu), from_sorted, z)
    return token[0], mu[0]


def _choose_among_all(
    values: Array, ids: Array, params: SamplingParams, uniform: Array, xtc_uniform: Array, mu: Array
) -> tuple[Array, Array]:
    """``(tokens i32[S], mu f32[S])`` from all candidates of each row, sorted."""
    token, _ = _choose(values, ids, values.shape[1], params, uniform, None)
    chain = params.has_chain & (values[:, 0] < jnp.inf)

    def by_chain(token: Array, mu: Array) -> tuple[Array, Array]:
        chosen, after = truncation.sample_chain(values, ids, params, uniform, xtc_uniform, mu, whole=True)
        return jnp.where(chain, chosen, token), jnp.where(chain, after, mu)

    return lax.cond(jnp.any(chain), by_chain, lambda *same: same, token, mu)


def _uniforms(seed: Array, position: Array) -> tuple[Array, Array]:
    """Two f32[S] in [0, 1), of each position and of each position + 2**31. The generator is named, to be
    independent of the process-wide default."""

    def uniform(seed: Array, number: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
        return jax.random.uniform(key, dtype=jnp.float32)

    first = position.astype(jnp.uint32)
    both = jax.vmap(uniform)(jnp.tile(seed, 2), jnp.concatenate([first, first + jnp.uint32(2**31)]))
    return both[: len(seed)], both[len(seed) :]


def _whole_row_needed(vocab_size: int, params: SamplingParams) -> Array:
    """bool[S]: top-k is off, so probabilities are relative to the whole row."""
    return ~params.is_greedy & ~params.has_chain & ((params.top_k <= 0) | (params.top_k >= vocab_size))


def _gap(z: Array) -> Array:
    """``z`` minus its maximum, the exponent of an unnormalized probability; -inf if all of z
    are."""
    greatest = z.max(axis=1, keepdims=True)
    return z - jnp.where(greatest == -jnp.inf, 0.0, greatest)


def _log_min_p(params: SamplingParams) -> Array:
    """f32[S, 1]: least gap that min-p keeps."""
    return jnp.where(params.min_p > 0.0, jnp.log(params.min_p), -jnp.inf)[:, None]


def _temper(gap: Array, params: SamplingParams) -> Array:
    return gap / jnp.where(params.is_greedy, 1.0, params.temperature)[:, None]


def _mass(z: Array, params: SamplingParams) -> Array:
    """f32[S]: sum over the whole row, which a row without top-k needs beside its head.

    Sum of probabilities with top-p, else of the weights of step 3; both relative to the likeliest
    token.
    """
    gap = _gap(z)
    tempered = jnp.where(gap >= _log_min_p(params), _temper(gap, params), -jnp.inf)
    weight = jnp.exp(jnp.where(params.top_p[:, None] < 1.0, gap, tempered))
    return chunked(weight, 0.0).sum(axis=1).sum(axis=1)


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
    greedy = params.is_greedy
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
