"""SamplingParams: how the next token of each sequence is sampled, under llama.cpp's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

_INT_MAX = np.iinfo(np.int32).max
_FLOAT_MAX = float(np.finfo(np.float32).max)
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Range:
    """Values that a sampling parameter can have."""

    allowed: str
    """The allowed values, in words for messages."""
    low: float = -_FLOAT_MAX
    high: float = _FLOAT_MAX
    dtype: type = np.float32

    def admits(self, value: Any) -> Any:
        """True, or an array of True, for values in the range; not for NaN."""
        return (value >= self.low) & (value <= self.high)


RANGES = {
    "temperature": Range("must be finite (0 or less is greedy)"),
    "top_k": Range("must fit 32 bits (0 or less is off)", -_INT_MAX - 1, _INT_MAX, np.int32),
    "top_p": Range("must be above 0 and finite (1 or more is off)", _TINY),
    "min_p": Range("must be from 0 to 1 (0 is off)", 0, 1),
    "typical_p": Range("must be at least 0 and finite (1 or more is off)", 0),
    "top_n_sigma": Range("must be finite (0 or less is off)"),
    "xtc_probability": Range("must be from 0 to 1 (0 is off)", 0, 1),
    "xtc_threshold": Range("must be at least 0 and finite (above 0.5 is off)", 0),
    "dynatemp_range": Range("must be finite (0 or less is off)"),
    "dynatemp_exponent": Range("must be finite"),
    "repeat_penalty": Range("must be above 0 and finite (1 is off)", _TINY),
    "repeat_last_n": Range("must be at least -1 (0 is off, -1 is all)", -1, _INT_MAX, np.int32),
    "presence_penalty": Range("must be finite (0 is off)"),
    "frequency_penalty": Range("must be finite (0 is off)"),
    "dry_multiplier": Range("must be finite (0 is off)"),
    "dry_base": Range("must be finite (below 1 is off)"),
    "dry_allowed_length": Range("must be at least 0", 0, _INT_MAX, np.int32),
    "dry_penalty_last_n": Range("must be at least -1 (0 is off, -1 is all)", -1, _INT_MAX, np.int32),
    "mirostat": Range("must be 0 (off), 1 or 2", 0, 2, np.int32),
    "mirostat_tau": Range("must be at least 0 and finite", 0),
    "mirostat_eta": Range("must be at least 0 and finite", 0),
}
"""Range of each parameter that is one number a sequence, but the seed."""
NEUTRAL = {
    "temperature": 0,
    "typical_p": 1,
    "top_n_sigma": 0,
    "xtc_probability": 0,
    "dynatemp_range": 0,
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "dry_multiplier": 0,
    "mirostat": 0,
}
"""Values that switch everything off which takes time beside the likeliest token."""


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
    typical_p: Array
    """f32[S]: probability of the tokens kept, in sum, whose surprise is nearest to the entropy; 1 or
    more is off."""
    top_n_sigma: Array
    """f32[S]: standard deviations of the logits that a logit kept is below the greatest, at most; 0
    or less is off."""
    xtc_probability: Array
    """f32[S]: chance that all tokens above ``xtc_threshold`` but the least likely of them are dropped."""
    xtc_threshold: Array
    """f32[S]: probability; above 0.5 is off."""
    dynatemp_range: Array
    """f32[S]: the temperature is from ``temperature`` minus this to plus this, by entropy; 0 or less
    is off."""
    dynatemp_exponent: Array
    """f32[S]: power of the normalized entropy."""
    repeat_penalty: Array
    """f32[S]: divisor of positive logits of recent tokens, factor of the others; 1 is off."""
    repeat_last_n: Array
    """i32[S]: number of recent tokens that penalties apply to; negative is all of them."""
    presence_penalty: Array
    """f32[S]: subtracted once from the logit of every recent token; 0 is off."""
    frequency_penalty: Array
    """f32[S]: subtracted from a recent token's logit for each occurrence; 0 is off."""
    dry_multiplier: Array
    """f32[S]: penalty of a token that would repeat one more than ``dry_allowed_length`` tokens; 0 is off."""
    dry_base: Array
    """f32[S]: factor of that penalty for each further token; below 1 is off."""
    dry_allowed_length: Array
    """i32[S]: length of repetitions that are not penalized."""
    dry_penalty_last_n: Array
    """i32[S]: number of recent tokens that are searched for repetitions; negative is all of them."""
    dry_breakers: Array
    """i32[S, B]: tokens that no repetition goes across; bit b of word w is token 32 w + b. B may be 0."""
    mirostat: Array
    """i32[S]: version of Mirostat, 1 or 2, in place of all but the temperature; 0 is off."""
    mirostat_tau: Array
    """f32[S]: surprise that Mirostat aims at, in bits."""
    mirostat_eta: Array
    """f32[S]: learning rate of Mirostat."""
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
        typical_p: npt.ArrayLike = 1.0,
        top_n_sigma: npt.ArrayLike = -1.0,
        xtc_probability: npt.ArrayLike = 0.0,
        xtc_threshold: npt.ArrayLike = 0.1,
        dynatemp_range: npt.ArrayLike = 0.0,
        dynatemp_exponent: npt.ArrayLike = 1.0,
        repeat_penalty: npt.ArrayLike = 1.0,
        repeat_last_n: npt.ArrayLike = 64,
        presence_penalty: npt.ArrayLike = 0.0,
        frequency_penalty: npt.ArrayLike = 0.0,
        dry_multiplier: npt.ArrayLike = 0.0,
        dry_base: npt.ArrayLike = 1.75,
        dry_allowed_length: npt.ArrayLike = 2,
        dry_penalty_last_n: npt.ArrayLike = 64,
        dry_breakers: Sequence[int] = (),
        mirostat: npt.ArrayLike = 0,
        mirostat_tau: npt.ArrayLike = 5.0,
        mirostat_eta: npt.ArrayLike = 0.1,
        seed: npt.ArrayLike = 0,
    ) -> SamplingParams:
        """Parameters for ``num_seqs`` sequences, checked on the host; the defaults are llama.cpp's.

        Args:
          num_seqs: S, at least 1.
          temperature: this and the others but ``dry_breakers`` and ``seed``: one value for every
            sequence, or S values.
          dry_breakers: token ids, the same for every sequence.
          seed: an integer, with ``seed + i`` (modulo 2**32) as the seed of row i; S integers, one a
            row; or a key of ``jax.random``, typed or a JAX array ``uint32[2]``, from which each row
            gets a seed of its own.

        Raises:
          ValueError: an invalid value; names the parameter, the value and the allowed range.

        Example:
          >>> SamplingParams.create(2, temperature=[0.0, 0.7], top_k=20, seed=5).seed.tolist()
          [5, 6]
        """
        given = locals()  # the arguments by name
        if num_seqs < 1:
            raise ValueError(f"num_seqs = {num_seqs}: must be at least 1")
        columns = {
            name: jnp.asarray(_checked(name, given[name], num_seqs, values), values.dtype)
            for name, values in RANGES.items()
        }
        if _is_key(seed):
            seeds = cls.seeds_of(seed, num_seqs)
        else:
            allowed = Range("must be from 0 to 2**32 - 1, or a key of jax.random", 0, 2**32 - 1, np.uint32)
            column = _checked("seed", seed, num_seqs, allowed)
            if np.ndim(seed) == 0:
                column = (column + np.arange(num_seqs)) % 2**32
            seeds = jnp.asarray(column, jnp.uint32)
        breakers = pack_tokens(dry_breakers)
        return cls(
            **columns,
            dry_breakers=jnp.asarray(np.broadcast_to(breakers, (num_seqs, len(breakers)))),
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

    # Parts of sampling that a sequence uses. Mirostat uses none of the first three, as in llama.cpp.

    @property
    def has_penalties(self) -> Array:
        """bool[S]: True if the logits of recent tokens change."""
        changes = (self.repeat_penalty != 1) | (self.presence_penalty != 0) | (self.frequency_penalty != 0)
        return changes & (self.repeat_last_n != 0) & (self.mirostat == 0)

    @property
    def has_dry(self) -> Array:
        """bool[S]: True if repetitions are penalized."""
        active = (self.dry_multiplier != 0) & (self.dry_base >= 1) & (self.dry_penalty_last_n != 0)
        return active & (self.mirostat == 0)

    @property
    def has_top_n_sigma(self) -> Array:
        """bool[S]"""
        return (self.top_n_sigma > 0) & (self.mirostat == 0)

    @property
    def has_chain(self) -> Array:
        """bool[S]: True if more than a prefix of the sorted tokens and one temperature decides."""
        xtc = (self.xtc_probability > 0) & (self.xtc_threshold <= 0.5)
        return (self.typical_p < 1) | xtc | (self.dynatemp_range > 0) | (self.mirostat > 0)

    @property
    def is_greedy(self) -> Array:
        """bool[S]: True if the temperature takes the likeliest token."""
        # Also NaN, and subnormal numbers, which some devices flush to zero: neither may divide.
        return ~(self.temperature >= _TINY)


def first_mu(params: SamplingParams) -> Array:
    """f32[S]: Mirostat's state before the first token."""
    return 2 * params.mirostat_tau


def pack_tokens(tokens: Sequence[int] | frozenset[int]) -> np.ndarray:
    """i32[B]: a set of tokens, bit b of word w for token 32 w + b; B is 0 or a power of two.

    Raises:
      ValueError: a negative id.
    """
    ids = np.asarray(sorted(tokens), np.int64)
    if not ids.size:
        return np.zeros(0, np.int32)
    if ids[0] < 0:
        raise ValueError(f"dry_breakers: {ids[0]} is not a token")
    num_words = 1 << int(ids[-1] // 32).bit_length()  # few sizes, few programs
    bits = np.zeros(32 * num_words, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def unpack_tokens(words: Array, vocab_size: int) -> Array:
    """bool[R, vocab_size]: True for the tokens of R sets, packed as ``words i32[R, W]``; tokens beyond the
    last word are in none."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    tokens = bits.reshape(words.shape[0], -1)[:, :vocab_size] == 1
    return jnp.pad(tokens, ((0, 0), (0, vocab_size - tokens.shape[1])))


def _is_key(seed: Any) -> TypeGuard[Array]:
    """True for a key of ``jax.random``: typed, or a JAX array uint32[2]; a list or numpy array
    holds seeds."""
    return isinstance(seed, Array) and (
        jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) or (seed.dtype == jnp.uint32 and seed.shape == (2,))
    )


def _checked(name: str, value: npt.ArrayLike, num_seqs: int, values: Range) -> np.ndarray:
    """``value`` as S numbers in a range."""
    kinds, what = ("fiu", "a number") if values.dtype is np.float32 else ("iu", "an integer")
    given = np.asarray(value)
    if given.dtype.kind not in kinds:
        raise ValueError(f"{name} = {value!r}: must be {what}, or {num_seqs} of them")
    if given.shape not in ((), (num_seqs,)):
        raise ValueError(
            f"{name} has shape {given.shape}: must be one value, or one for each of {num_seqs} sequences"
        )
    valid = np.atleast_1d(values.admits(given))
    if not valid.all():
        row = int(np.argmin(valid))
        label, wrong = (name, given) if given.ndim == 0 else (f"{name}[{row}]", given[row])
        raise ValueError(f"{label} = {wrong}: {values.allowed}")
    return np.broadcast_to(given, (num_seqs,))
