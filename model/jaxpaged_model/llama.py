"""Decoder-only transformers as one Flax NNX module, described by a ``ModelConfig``, and one pure function."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxpaged.compilation.executable_cache import source_digest
from jaxpaged.pages.batch import Batch
from jaxpaged_model.config import LayerKind, ModelConfig
from jaxpaged_model.layers import Blocks, by_layer, hidden_norm, is_by_layer, linear, rotations
from jaxpaged_model.quantized.linear import QuantizedEmbedding, WeightPlan
from jaxpaged_model.segments import Segment, segments

_DENSE = WeightPlan()


class Llama(nnx.Module):
    """Decoder-only transformer: Llama's, and those that its ``ModelConfig`` can describe.

    It is created once, split once (``nnx.split``) and then used as a pure function; see ``functional``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        plan: WeightPlan = _DENSE,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        axis: str | None = None,
    ) -> None:
        c = config
        self.config = c
        kind = plan.of("embedding")
        self.embedding = (
            nnx.Embed(c.vocab_size, c.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
            if kind is None
            else QuantizedEmbedding(
                kind, c.vocab_size, c.hidden_size, dtype=dtype, exact=plan.exact, layout=plan.layout
            )
        )
        self.blocks = Blocks(c, plan=plan, dtype=dtype, rngs=rngs, axis=axis)
        self.norm = hidden_norm(c, dtype)
        self.head = nnx.data(
            None
            if c.tie_embeddings
            else linear(plan.of("head"), c.hidden_size, c.vocab_size, plan=plan, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self, tokens: Array, cache: Any, batch: Batch, rows: Array, *, head: bool = True
    ) -> tuple[Array, Any]:
        """Runs one step.

        Args:
          tokens: i32[T], packed as described by ``batch``; padding may hold any id of the vocabulary.
          cache: a cache with ``attend``, to which each layer writes its keys and values.
          batch: the tokens' sequences and positions.
          rows: i32[R], indices into T of the tokens to return logits for.
          head: False: hidden states behind the last norm instead of logits.

        Returns:
          ``(logits f32[R, vocab_size], cache)``, or ``(hidden states f32[R, hidden_size], cache)``.
        """
        c = self.config
        of_step = rotations(c.kinds, batch.rope_positions)

        def block(carry: tuple[Array, Any], layer: Array | int, kind: LayerKind) -> tuple[Array, Any]:
            x, cache = carry
            return self.blocks(layer, kind, x, of_step, cache, batch)

        def period(
            carry: tuple[Array, Any], first: Array | int, segment: Segment
        ) -> tuple[tuple[Array, Any], None]:
            for i in range(segment.period):
                carry = block(carry, first + i if i else first, c.kinds[segment.first + i])
            return carry, None

        x = self.embedding(tokens)
        carry = (x if c.embedding_scale == 1.0 else x * c.embedding_scale), cache
        if is_by_layer(self.blocks):
            for layer, kind in enumerate(c.kinds):
                carry = block(carry, layer, kind)
        else:
            for segment in segments(c.kinds):
                if segment.repeats == 1:
                    carry, _ = period(carry, segment.first, segment)
                    continue
                layers = jnp.arange(segment.repeats, dtype=jnp.int32)
                layers = layers if segment.period == 1 else layers * segment.period
                layers = layers + segment.first if segment.first else layers
                # The cache is in the carry, not among xs and ys, which would be copied.
                carry, _ = lax.scan(functools.partial(period, segment=segment), carry, layers)
        x, cache = carry
        if not head:
            return self.norm(x[rows]).astype(jnp.float32), cache
        return self._logits(x[rows]), cache

    def _logits(self, x: Array) -> Array:
        """Logits f32[R, vocab_size] of rows of the residual stream."""
        c = self.config
        inputs, norm = self.norm.before_product(x)
        if self.head is not None:
            logits = self.head(inputs, norm=norm)
        elif isinstance(self.embedding, QuantizedEmbedding):
            logits = self.embedding.attend(inputs, norm=norm)
        else:
            logits = self.embedding.attend(self.norm(x))
        logits = logits.astype(jnp.float32)
        logits = logits if c.logit_scale == 1.0 else logits * c.logit_scale
        return logits if c.logit_soft_cap is None else jnp.tanh(logits / c.logit_soft_cap) * c.logit_soft_cap


Params = Any
"""Weights of a model: the pytree of ``nnx.split``."""

ModelFn = Callable[[Params, Array, Any, Batch, Array], tuple[Array, Any]]
"""``(params, tokens, cache, batch, rows) -> (logits, cache)``: the interface that generation needs."""

_DTYPES = {"f32": jnp.dtype("float32"), "bf16": jnp.dtype("bfloat16"), "f16": jnp.dtype("float16")}


def float_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype named "f32", "bf16" or "f16", or given in any way that numpy understands.

    Raises:
      ValueError: it is none of the three.
    """
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    with contextlib.suppress(TypeError):
        if (found := jnp.dtype(dtype)) in _DTYPES.values():
            return found
    raise ValueError(f"dtype must be f32, bf16 or f16, or the same by numpy's name, got {dtype!r}")


class _Keys:
    """Stands for ``nnx.Rngs`` with a counter in Python: in a trace, nnx's own counting is quadratic."""

    def __init__(self, key: Array) -> None:
        self._key, self._counter = key, itertools.count()

    def params(self) -> Array:
        return jax.random.fold_in(self._key, next(self._counter))


def _init(config: ModelConfig, dtype: Any, plan: WeightPlan, key: Array, axis: str | None = None) -> Llama:
    return Llama(config, plan=plan, dtype=dtype, rngs=cast(nnx.Rngs, _Keys(key)), axis=axis)


@functools.cache
def _skeleton(
    config: ModelConfig, dtype: Any, plan: WeightPlan, axis: str | None = None
) -> tuple[nnx.GraphDef[Llama], Params]:
    """The module without its weights, and their shapes and dtypes."""
    module = nnx.eval_shape(lambda: _init(config, dtype, plan, jax.random.key(0), axis))
    return nnx.split(module, nnx.Param)


def abstract_params(config: ModelConfig, dtype: DTypeLike = "f32", plan: WeightPlan = _DENSE) -> Params:
    """Shapes and dtypes of the weights, without memory behind them."""
    found = _skeleton(config, float_dtype(dtype), plan)[1]
    return jax.eval_shape(lambda params: _by_layer(params), found)


def _by_layer(params: Params) -> Params:
    """Params as ``by_layer`` has them."""
    return nnx.map_state(lambda path, param: nnx.Param(by_layer(path, param.get_value())), params)


def functional(
    config: ModelConfig,
    dtype: DTypeLike = "f32",
    plan: WeightPlan = _DENSE,
    axis: str | None = None,
    *,
    head: bool = True,
) -> ModelFn:
    """The model as a pure function of its weights; the same one for the same arguments.

    Args:
      config: the model.
      dtype: dtype of its computations: "f32", "bf16", "f16", or numpy's or JAX's name of one of them.
      plan: which of its layers have quantized weights.
      axis: the mesh axis over which each layer is split; ``config`` is then that of one device
        (``ModelConfig.shard``). The partial products of attention and MLP are summed over it, twice a
        layer; each device has the whole residual stream, embedding and head.
      head: False: the function returns hidden states behind the last norm, f32[R, hidden_size].

    Raises:
      ValueError: another dtype; or, when it is called, params of another model.
    """
    return _functional(config, float_dtype(dtype), plan, axis, head)


@functools.cache
def _functional(config: ModelConfig, dtype: Any, plan: WeightPlan, axis: str | None, head: bool) -> ModelFn:
    def apply(params: Params, tokens: Array, cache: Any, batch: Batch, rows: Array) -> tuple[Array, Any]:
        graph, abstract = _skeleton(config, dtype, plan, axis)
        if len(nnx.to_flat_state(params)) != len(nnx.to_flat_state(abstract)):
            raise ValueError(
                "the params are those of another model or of other quantized weights; "
                "load_model's result has the function that takes its params"
            )
        return nnx.merge(graph, params)(tokens, cache, batch, rows, head=head)

    vars(apply)["program_key"] = (
        f"{source_digest(Path(__file__).parent)} {config!r} {dtype} {plan!r} {axis} {head}"
    )
    return apply


def random_params(config: ModelConfig, *, seed: int = 0, dtype: DTypeLike = "f32") -> Params:
    """Random dense weights, for tests, training and benchmarks."""
    dtype = float_dtype(dtype)

    def init(key: Array) -> Params:
        return _by_layer(nnx.state(_init(config, dtype, _DENSE, key), nnx.Param))

    return jax.jit(init)(jax.random.key(seed))
