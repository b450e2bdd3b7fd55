"""Samplers that look at all candidates of a row, in llama.cpp's order: top-n-sigma on the logits;
typical, top-p, min-p, XTC and dynamic temperature, or Mirostat, on candidates sorted by logit.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxpaged.generation.sampling_params import SamplingParams

CHUNK = 128
"""Logits of a partial sum."""
_MIROSTAT_M = 100
"""Likeliest tokens that Mirostat 1 estimates the exponent of Zipf's law from, as in llama.cpp."""
_TINY = float(np.finfo(np.float32).tiny)


def chunked(x: Array, fill: float) -> Array:
    """``[S, V]`` as ``[S, C, CHUNK]``: reductions by chunk vectorize, in an order independent of
    S."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK)), constant_values=fill)
    return padded.reshape(x.shape[0], -1, CHUNK)


def cumulative_sum(x: Array) -> Array:
    """Cumulative sums along the last axis.

    XLA would compute the summands once for each of the sums that they are part of, in a program as
    large as that.
    """
    return lax.cumsum(lax.optimization_barrier(x), axis=1)


def top_n_sigma(logits: Array, params: SamplingParams) -> Array:
    """Logits, -inf where one is more than ``top_n_sigma`` standard deviations below the greatest; those
    at -inf before do not count.

    Reference: Tang et al., "Top-n-sigma: Not All Logits Are You Need".
    """

    def total(x: Array) -> Array:
        return chunked(x, 0.0).sum(axis=2).sum(axis=1)[:, None]

    finite = logits > -jnp.inf
    count = jnp.maximum(total(finite.astype(jnp.float32)), 1.0)
    mean = total(jnp.where(finite, logits, 0.0)) / count
    sigma = jnp.sqrt(total(jnp.where(finite, (logits - mean) ** 2, 0.0)) / count)
    least = logits.max(axis=1, keepdims=True) - params.top_n_sigma[:, None] * sigma
    return jnp.where((logits < least) & params.has_top_n_sigma[:, None], -jnp.inf, logits)


def sample_chain(
    values: Array, ids: Array, params: SamplingParams, uniform: Array, xtc_uniform: Array
) -> Array:
    """Samples a token of each row by the whole chain: top-k, typical, top-p, min-p, XTC, temperature.

    Args:
      values: f32[S, K], descending, without NaN; at least ``top_k`` candidates, or all.
      ids: i32[S, K].
      params: S rows.
      uniform, xtc_uniform: f32[S], random numbers of the token, and of XTC's chance.

    Returns:
      i32[S]; the first id of a row without candidates.

    Reference: Meister et al., "Locally Typical Sampling"; p-e-w, "Exclude Top Choices" (text-generation-
    webui pull request 6335); llama.cpp, ``src/llama-sampler.cpp``.
    """
    size = values.shape[1]
    top_k = jnp.where(params.top_k <= 0, size, params.top_k)[:, None]
    kept = (lax.iota(jnp.int32, size) < top_k) & (values > -jnp.inf)
    kept = lax.cond(jnp.any(params.typical_p < 1), _typical, lambda _v, k, _p: k, values, kept, params)
    before, total = _mass_before(_weights(values, kept))
    kept &= (before < params.top_p[:, None] * total) | (params.top_p >= 1.0)[:, None]
    least = _greatest(values, kept) + jnp.log(params.min_p)[:, None]
    kept &= (values >= least) | (params.min_p <= 0.0)[:, None]
    kept = _exclude_top(values, kept, params, xtc_uniform)

    temperature = jnp.where(params.dynatemp_range > 0.0, _dynamic(values, kept, params), params.temperature)
    return jnp.take_along_axis(ids, _pick(values, kept, temperature, uniform)[0][:, None], axis=1)[:, 0]


def sample_mirostat(
    values: Array, ids: Array, params: SamplingParams, uniform: Array, mu: Array
) -> tuple[Array, Array]:
    """Samples a token of each row by Mirostat: the likeliest tokens whose surprise is at most mu, which
    moves so that the surprise of sampled tokens becomes ``mirostat_tau``.

    Args:
      values, ids, uniform: as for ``sample_chain``, of all tokens.
      params: S rows; Mirostat 2 where the version is 0.
      mu: f32[S]: state; ``first_mu`` before the first token.

    Returns:
      ``(tokens i32[S], mu f32[S])``

    Reference: Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity".
    """
    size = values.shape[1]
    index = lax.iota(jnp.int32, size)
    first = index == 0
    # One candidate where the temperature is 0.
    finite = (values > -jnp.inf) & (first | ~params.is_greedy[:, None])
    tempered = _temper(values, finite, params.temperature)
    finite &= tempered > -jnp.inf

    weight = _weights(tempered, finite)
    probability = weight / cumulative_sum(weight)[:, -1:]
    by_surprise = -jnp.log2(probability) <= mu[:, None]

    few = min(_MIROSTAT_M, size)
    step = jnp.where(finite[:, 1:few], tempered[:, : few - 1] - tempered[:, 1:few], 0.0)
    ratio = jnp.log((index[1:few] + 1) / index[1:few])
    squares = jnp.where(finite[:, 1:few], ratio**2, 0.0)
    s_hat = cumulative_sum(jnp.pad(step * ratio, ((0, 0), (1, 0))))[:, -1]
    s_hat /= cumulative_sum(jnp.pad(squares, ((0, 0), (1, 0))))[:, -1]
    epsilon = s_hat - 1
    k = (epsilon * jnp.exp2(mu) / (1 - jnp.power(float(size), -epsilon))) ** (1 / s_hat)
    k = jnp.where(jnp.isnan(k), 1.0, jnp.clip(k, 1.0, size)).astype(jnp.int32)
    by_rank = index < k[:, None]

    kept = finite & (first | jnp.where((params.mirostat == 1)[:, None], by_rank, by_surprise))
    rank, surprise = _pick(tempered, kept, jnp.ones_like(mu), uniform)
    token = jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0]
    return token, mu - params.mirostat_eta * (surprise - params.mirostat_tau)


def _greatest(values: Array, kept: Array) -> Array:
    """f32[S, 1]: greatest value that is kept; 0 where none is."""
    greatest = jnp.where(kept, values, -jnp.inf).max(axis=1, keepdims=True)
    return jnp.where(greatest == -jnp.inf, 0.0, greatest)


def _weights(values: Array, kept: Array) -> Array:
    """f32[S, K]: unnormalized probabilities, 1 of the likeliest token that is kept."""
    return jnp.where(kept, jnp.exp(values - _greatest(values, kept)), 0.0)


def _temper(values: Array, kept: Array, temperature: Array) -> Array:
    """f32[S, K]: distance from the greatest value kept by temperature, not by one near 0; -inf for
    others."""
    divisor = jnp.where(temperature >= _TINY, temperature, 1.0)[:, None]
    return jnp.where(kept, (values - _greatest(values, kept)) / divisor, -jnp.inf)


def _mass_before(weight: Array) -> tuple[Array, Array]:
    """``(f32[S, K], f32[S, 1])``: sum of the weights before each, and of all."""
    cumulative = cumulative_sum(weight)
    return jnp.pad(cumulative[:, :-1], ((0, 0), (1, 0))), cumulative[:, -1:]


def _information(weight: Array) -> tuple[Array, Array]:
    """``(surprise f32[S, K], entropy f32[S, 1])`` in nats of unnormalized probabilities."""
    total = cumulative_sum(weight)[:, -1:]
    surprise = jnp.log(total) - jnp.log(weight)
    entropy = cumulative_sum(jnp.where(weight > 0, weight / total * surprise, 0.0))[:, -1:]
    return surprise, entropy


def _typical(values: Array, kept: Array, params: SamplingParams) -> Array:
    """The tokens kept whose surprise is nearest to the entropy, until their sum is above ``typical_p``."""
    weight = _weights(values, kept)
    surprise, entropy = _information(weight)
    index = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    distance = jnp.where(kept, jnp.abs(surprise - entropy), jnp.inf)
    _, order = lax.sort((distance, index), is_stable=True, num_keys=1)
    before, total = _mass_before(jnp.take_along_axis(weight, order, axis=1))
    typical = before <= params.typical_p[:, None] * total
    row = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    typical = jnp.zeros_like(kept).at[row, order].set(typical)
    return kept & (typical | (params.typical_p >= 1.0)[:, None])


def _exclude_top(values: Array, kept: Array, params: SamplingParams, uniform: Array) -> Array:
    """The tokens kept without those above ``xtc_threshold``, except the least likely of these."""
    weight = _weights(values, kept)
    above = kept & (weight >= params.xtc_threshold[:, None] * cumulative_sum(weight)[:, -1:])
    number = cumulative_sum(above.astype(jnp.int32))
    excluded = above & (number < number[:, -1:])
    active = (params.xtc_probability > 0.0) & (params.xtc_threshold <= 0.5)
    active &= uniform <= params.xtc_probability
    return kept & ~(excluded & active[:, None])


def _dynamic(values: Array, kept: Array, params: SamplingParams) -> Array:
    """f32[S]: temperature by the entropy of the tokens kept, relative to the greatest of so many."""
    count = jnp.sum(kept, axis=1, dtype=jnp.float32)
    entropy = _information(_weights(values, kept))[1][:, 0]
    relative = entropy / jnp.log(jnp.maximum(count, 2.0))
    low = jnp.maximum(params.temperature - params.dynatemp_range, 0.0)
    high = params.temperature + params.dynatemp_range
    return low + (high - low) * jnp.power(relative, params.dynatemp_exponent)


def _pick(values: Array, kept: Array, temperature: Array, uniform: Array) -> tuple[Array, Array]:
    """``(rank i32[S], surprise f32[S])`` of a token sampled among those kept; bits."""
    weight = _weights(_temper(values, kept, temperature), kept)
    cumulative = cumulative_sum(weight)
    total = cumulative[:, -1]
    rank = jnp.sum(cumulative <= (uniform * total)[:, None], axis=1, dtype=jnp.int32)
    first = jnp.argmax(kept, axis=1).astype(jnp.int32)
    last = kept.shape[1] - 1 - jnp.argmax(kept[:, ::-1], axis=1).astype(jnp.int32)
    last = jnp.where(jnp.any(kept, axis=1), last, 0)
    rank = jnp.where(temperature >= _TINY, jnp.minimum(rank, last), first)
    chosen = jnp.take_along_axis(weight, rank[:, None], axis=1)[:, 0]
    return rank, jnp.where(chosen > 0, jnp.log2(total) - jnp.log2(chosen), 0.0)
