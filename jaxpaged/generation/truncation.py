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


def top_n_sigma(logits: Array, params: SamplingParams) -> Array:
    """Logits, -inf where one is more than ``top_n_sigma`` standard deviations below the greatest; those
    at -inf before do not count.

    Reference: Tang et al., "Top-n-sigma: Not All Logits Are You Need".
    """
    finite = logits > -jnp.inf
    count = jnp.maximum(_total(finite.astype(jnp.float32)), 1.0)
    mean = _total(jnp.where(finite, logits, 0.0)) / count
    sigma = jnp.sqrt(_total(jnp.where(finite, (logits - mean) ** 2, 0.0)) / count)
    least = logits.max(axis=1, keepdims=True) - params.top_n_sigma[:, None] * sigma
    return jnp.where((logits < least) & params.has_top_n_sigma[:, None], -jnp.inf, logits)


def sample_chain(
    values: Array,
    ids: Array,
    params: SamplingParams,
    uniform: Array,
    xtc_uniform: Array,
    mu: Array,
    *,
    whole: bool,
) -> tuple[Array, Array]:
    """Samples a token of each row by the whole chain, top-k, typical, top-p, min-p, XTC, temperature, or
    by Mirostat.

    Args:
      values: f32[S, K], descending, without NaN; at least ``top_k`` candidates, or all.
      ids: i32[S, K].
      params: S rows.
      uniform, xtc_uniform: f32[S], random numbers of the token, and of XTC's chance.
      mu: f32[S], state of Mirostat.
      whole: True if K = V; else Mirostat must be off.

    Returns:
      ``(tokens i32[S], mu)``; the first id of a row without candidates.

    Reference: llama.cpp, ``src/llama-sampler.cpp``; Meister et al., "Locally Typical Sampling"; p-e-w,
    "Exclude Top Choices" (text-generation-webui pull request 6335); Basu et al., "Mirostat: A Neural Text
    Decoding Algorithm that Directly Controls Perplexity".
    """
    size = values.shape[1]
    top_k = jnp.where(params.top_k <= 0, size, params.top_k)[:, None]
    kept = (lax.iota(jnp.int32, size) < top_k) & (values > -jnp.inf)
    weight = _weights(values, kept)
    kept = lax.cond(jnp.any(params.typical_p < 1), _typical, lambda _w, k, _p: k, weight, kept, params)
    weight = jnp.where(kept, weight, 0.0)
    kept &= (_sum_before(weight) < params.top_p[:, None] * _total(weight)) | (params.top_p >= 1.0)[:, None]
    least = _greatest(values, kept) + jnp.log(params.min_p)[:, None]
    kept &= (values >= least) | (params.min_p <= 0.0)[:, None]
    kept = _exclude_top(weight, kept, params, xtc_uniform)
    temperature = jnp.where(params.dynatemp_range > 0.0, _dynamic(weight, kept, params), params.temperature)
    adapts = params.mirostat > 0
    if whole:
        kept = lax.cond(jnp.any(adapts), _mirostat, lambda _v, k, _p, _m: k, values, kept, params, mu)
        temperature = jnp.where(adapts, params.temperature, temperature)
    rank, surprise = _pick(values, kept, temperature, uniform)
    if whole:
        mu = jnp.where(adapts, mu - params.mirostat_eta * (surprise - params.mirostat_tau), mu)
    return jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0], mu


def _mirostat(values: Array, kept: Array, params: SamplingParams, mu: Array) -> Array:
    """In rows with Mirostat, the likeliest tokens: 1, as many as have a surprise of ``mu`` by Zipf's law; 2,
    those whose surprise is at most ``mu``."""
    size = values.shape[1]
    index = lax.iota(jnp.int32, size)
    tempered = _temper(values, values > -jnp.inf, params.temperature)
    finite = tempered > -jnp.inf
    weight = _weights(tempered, finite)
    by_surprise = -jnp.log2(weight / _total(weight)) <= mu[:, None]

    few = min(_MIROSTAT_M, size)
    step = jnp.where(finite[:, 1:few], tempered[:, : few - 1] - tempered[:, 1:few], 0.0)
    ratio = jnp.log((index[1:few] + 1) / index[1:few])
    s_hat = _total(step * ratio) / _total(jnp.where(finite[:, 1:few], ratio**2, 0.0))
    epsilon = s_hat - 1
    k = (epsilon * jnp.exp2(mu)[:, None] / (1 - jnp.power(float(size), -epsilon))) ** (1 / s_hat)
    # One where the law cannot be estimated.
    k = jnp.where(jnp.isnan(k), 1.0, jnp.clip(k, 1.0, size)).astype(jnp.int32)
    version = params.mirostat[:, None]
    chosen = finite & ((index == 0) | jnp.where(version == 1, index < k, by_surprise))
    return jnp.where(version > 0, chosen, kept)


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


def _total(x: Array) -> Array:
    """f32[S, 1]: sums along the last axis."""
    return chunked(x, 0.0).sum(axis=2).sum(axis=1)[:, None]


def _cumulative(x: Array) -> Array:
    """Cumulative sums along the last axis, in a loop, since ``lax.cumsum`` becomes a large program."""
    size = x.shape[1]
    index = lax.iota(jnp.int32, size)

    def double(i: Array, x: Array) -> Array:
        shift = jnp.int32(1) << i
        return x + jnp.where(index >= shift, jnp.roll(x, shift, axis=1), 0.0)

    return lax.fori_loop(0, (size - 1).bit_length(), double, x)


def _sum_before(weight: Array) -> Array:
    """f32[S, K]: sum of the weights before each."""
    return jnp.pad(_cumulative(weight)[:, :-1], ((0, 0), (1, 0)))


def _information(weight: Array) -> tuple[Array, Array]:
    """``(surprise f32[S, K], entropy f32[S, 1])`` in nats of unnormalized probabilities."""
    total = _total(weight)
    surprise = jnp.log(total) - jnp.log(weight)
    return surprise, _total(jnp.where(weight > 0, weight / total * surprise, 0.0))


def _typical(weight: Array, kept: Array, params: SamplingParams) -> Array:
    """The tokens kept whose surprise is nearest to the entropy, until their sum is above ``typical_p``."""
    surprise, entropy = _information(weight)
    index = lax.broadcasted_iota(jnp.int32, weight.shape, 1)
    distance = jnp.where(kept, jnp.abs(surprise - entropy), jnp.inf)
    _, order = lax.sort((distance, index), is_stable=True, num_keys=1)
    before = _sum_before(jnp.take_along_axis(weight, order, axis=1))
    typical = before <= params.typical_p[:, None] * _total(weight)
    row = lax.broadcasted_iota(jnp.int32, weight.shape, 0)
    typical = jnp.zeros_like(kept).at[row, order].set(typical)
    return kept & (typical | (params.typical_p >= 1.0)[:, None])


def _exclude_top(weight: Array, kept: Array, params: SamplingParams, uniform: Array) -> Array:
    """The tokens kept without those above ``xtc_threshold``, except the least likely of these."""
    weight = jnp.where(kept, weight, 0.0)
    above = kept & (weight >= params.xtc_threshold[:, None] * _total(weight))
    index = lax.iota(jnp.int32, weight.shape[1])
    excluded = above & (index < jnp.where(above, index, 0).max(axis=1, keepdims=True))
    active = (params.xtc_probability > 0.0) & (params.xtc_threshold <= 0.5)
    active &= uniform <= params.xtc_probability
    return kept & ~(excluded & active[:, None])


def _dynamic(weight: Array, kept: Array, params: SamplingParams) -> Array:
    """f32[S]: temperature by the entropy of the tokens kept, relative to the greatest of so many."""
    count = jnp.sum(kept, axis=1, dtype=jnp.float32)
    entropy = _information(jnp.where(kept, weight, 0.0))[1][:, 0]
    relative = entropy / jnp.log(jnp.maximum(count, 2.0))
    low = jnp.maximum(params.temperature - params.dynatemp_range, 0.0)
    high = params.temperature + params.dynatemp_range
    return low + (high - low) * jnp.power(relative, params.dynatemp_exponent)


def _pick(values: Array, kept: Array, temperature: Array, uniform: Array) -> tuple[Array, Array]:
    """``(rank i32[S], surprise f32[S])`` of a token sampled among those kept; bits."""
    weight = _weights(_temper(values, kept, temperature), kept)
    cumulative = _cumulative(weight)
    total = cumulative[:, -1]
    rank = jnp.sum(cumulative <= (uniform * total)[:, None], axis=1, dtype=jnp.int32)
    first = jnp.argmax(kept, axis=1).astype(jnp.int32)
    last = kept.shape[1] - 1 - jnp.argmax(kept[:, ::-1], axis=1).astype(jnp.int32)
    last = jnp.where(jnp.any(kept, axis=1), last, 0)
    rank = jnp.where(temperature >= _TINY, jnp.minimum(rank, last), first)
    chosen = jnp.take_along_axis(weight, rank[:, None], axis=1)[:, 0]
    return rank, jnp.where(chosen > 0, jnp.log2(total) - jnp.log2(chosen), 0.0)
