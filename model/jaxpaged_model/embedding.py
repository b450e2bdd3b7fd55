"""Embedder: one vector of a text, from the hidden states of a language model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged_model.checkpoint.loading import LoadedModel
from jaxpaged_model.checkpoint.pooling import Pooling, pooled
from jaxpaged_model.llama import ModelFn

_SMALLEST = 64
"""Tokens of the shortest cache: caches of few sizes, so of few programs."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(function: ModelFn, params: Any, cache: Any, tokens: Array, num_new: Array) -> tuple[Any, Array]:
    """Reads tokens ``i32[T]``, of which ``num_new i32[1]`` count: ``(cache, hidden states f32[T, hidden_size])``."""
    cache, batch, _ = cache.reserve(num_new, num_tokens=tokens.shape[0], max_new=tokens.shape[0])
    hidden, cache = function(params, tokens, cache, batch, jnp.arange(tokens.shape[0], dtype=jnp.int32))
    return cache, hidden


class Embedder:
    """Makes vectors of texts, one text at a time, so that none depends on others.

    Args:
        loaded: the model, on one device.
        dtype: dtype of keys and values, which are kept for the time of one text.
        chunk: tokens of one step, at most.

    Example:
        >>> from jaxpaged_model import load_model, tiny
        >>> embedder = Embedder(load_model(tiny.PATH))
        >>> vector = embedder([1, 2, 3], pooling="mean")
        >>> vector.shape == (embedder.size,)
        True
    """

    def __init__(self, loaded: LoadedModel, *, dtype: Any = jnp.float32, chunk: int = 512) -> None:
        if loaded.mesh is not None:
            raise ValueError("embeddings are computed on one device, not on a mesh")
        self._function, self._params = loaded.hidden_function, loaded.params
        self._spec, self._dtype, self._chunk = loaded.config.cache_spec, dtype, chunk
        self.size = loaded.config.hidden_size
        """Dimensions of a vector."""

    def hidden_states(self, tokens: Sequence[int]) -> np.ndarray:
        """Hidden states behind the last norm, f32[number of tokens, hidden_size].

        Raises:
            ValueError: there are no tokens.
        """
        if not tokens:
            raise ValueError("there are no tokens to embed")
        length = _SMALLEST
        while length < len(tokens):
            length *= 2
        cache: Any = ContiguousKVCache.create(**self._spec, max_seqs=1, max_length=length, dtype=self._dtype)
        rows, found = min(length, self._chunk), []
        for start in range(0, len(tokens), rows):
            part = tokens[start : start + rows]
            given = np.zeros(rows, np.int32)
            given[: len(part)] = part
            cache, hidden = _step(self._function, self._params, cache, given, np.array([len(part)], np.int32))
            found.append(np.asarray(hidden)[: len(part)])
        return np.concatenate(found)

    def __call__(self, tokens: Sequence[int], *, pooling: Pooling) -> np.ndarray:
        """The vector of a text, f32[hidden_size], not normalized.

        Raises:
            ValueError: there are no tokens.
        """
        return pooled(self.hidden_states(tokens), pooling)
