"""ModelConfig: the hyperparameters of a model, which describe its one kind of block."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from jaxpaged.cache.groups import LayerGroup
from jaxpaged.pages.rope import Rope
from jaxpaged.sharding.mesh import MeshError, check_heads, local_kv_heads
from jaxpaged_model.metadata import ModelError

ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3", "granite", "olmo2", "phi3", "mistral3",
    "seed_oss", "exaone4", "cohere2", "gemma", "command-r", "arcee", "ernie4_5", "glm4",
)  # fmt: skip
"""GGUF's names; "mistral" is Hugging Face's name of what GGUF files call "llama"."""

Norms = Literal["pre", "post", "both", "parallel"]
"""Norms of a block, where ``f`` is attention, and then the MLP:

  * ``"pre"``: ``x + f(norm(x))``.
  * ``"post"``: ``x + norm(f(x))``.
  * ``"both"``: ``x + norm(f(norm(x)))``, two different norms.
  * ``"parallel"``: ``x + attention(norm(x)) + mlp(norm(x))``, with one norm.
"""
NormKind = Literal["rms", "layer"]
"""RMSNorm (arXiv:1910.07467), or LayerNorm without a bias (arXiv:1607.06450)."""
Activation = Literal["silu", "gelu_tanh", "relu2"]
"""Activation of the MLP's gate, or of its inner layer if there is no gate: ``quantized.activations``."""
QKNorm = Literal["", "head", "width"]
"""RMSNorm of queries and keys before they are rotated: none, of each head, or of all heads together."""


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies, for contexts longer than that of pretraining.

    ``kind``:
      * ``"linear"``: every frequency divided by ``factor`` (position interpolation).
      * ``"yarn"``: NTK by parts (arXiv:2309.00071): high frequencies unchanged, low ones divided by
        ``factor``, a linear ramp between the dimensions that make ``beta_fast`` and ``beta_slow``
        rotations in the original context.
      * ``"llama3"``: Llama 3.1's rule, by wavelength between ``low_freq_factor`` and ``high_freq_factor``.
      * ``"factors"``: each frequency divided by its own number in ``factors`` (GGUF's
        ``rope_freqs.weight``).
      * ``"longrope"``: each frequency divided by its own number (arXiv:2402.13753), in ``long_factors``
        if the model's ``context_length`` is above ``original_context_length``, else in ``factors``. So
        it is in vLLM and in llama.cpp, with the context that they were started with; transformers
        decides by the length of a text, and its keys do not fit together once the text has passed it.
    """

    kind: str
    factor: float = 1.0
    original_context_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Factor of cos and sin; None = YaRN's ``0.1 ln(factor) + 1``, 1 for the other kinds."""
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerKind:
    """Differences between the layers of a model, other than their weights; static in a program."""

    window: int | None
    """Sliding window in tokens, None = full attention."""
    rope: Rope
    """Rotary embedding of queries and keys; ``Rope.create(())`` if they are not rotated."""
    rope_factor: float = 1.0
    """Factor of cos and sin."""
    group: int = 0
    """Index in ``ModelConfig.groups``."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model; hashable, so that it can be static under ``jax.jit``.

    Defaults are neutral: with them a block is that of Llama.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float = 1e-5
    """Epsilon of every norm, a LayerNorm's too."""
    rope_theta: float = 10000.0
    rope_dim: int = 0
    """Leading dimensions of a head that are rotated; 0 = all of them."""
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens, None = full attention; empty = full everywhere."""
    rotates: tuple[bool, ...] = ()
    """False for each layer whose queries and keys are not rotated; empty = all are."""
    window_rope_theta: float | None = None
    """Base of the rotary embedding in layers with a window; None = they have that of the other layers."""
    window_rope_scaling: RopeScaling | None = None
    """Its scaling, where it has a base of its own."""
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = ""
    norms: Norms = "pre"
    norm_kind: NormKind = "rms"
    activation: Activation = "silu"
    gated: bool = True
    """True for the MLP ``down(activation(gate(x)) * up(x))``, False for ``down(activation(up(x)))``."""
    embedding_scale: float = 1.0
    """Factor of a token's embedding."""
    residual_scale: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    attention_scale: float | None = None
    """Factor of the products of queries and keys; None = ``head_dim ** -0.5``."""
    attention_soft_cap: float | None = None
    """``cap * tanh(s / cap)`` of the scaled products; None = no cap."""
    attention_temperature: float = 0.0
    """Number b: a query at position p is multiplied by ``1 + b ln(1 + floor(p / length))``, as in Llama 4,
    where the length is ``attention_temperature_length``."""
    attention_temperature_length: int = 0
    logit_scale: float = 1.0
    """Factor of the logits."""
    logit_soft_cap: float | None = None
    """``cap * tanh(l / cap)`` of the logits; None = no cap."""
    name: str = ""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"architecture {self.architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
            )
        for field in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim",
            "context_length",
        ):  # fmt: skip
            if getattr(self, field) <= 0:
                raise ModelError(f"{field} must be positive, got {getattr(self, field)}")
        if self.num_q_heads % self.num_kv_heads:
            raise ModelError(
                f"num_q_heads must be a multiple of num_kv_heads, got {self.num_q_heads} and {self.num_kv_heads}"
            )
        for field, values in (("windows", self.windows), ("rotates", self.rotates)):
            if values and len(values) != self.num_layers:
                raise ModelError(f"{field} must name every layer: {len(values)} given for {self.num_layers}")
        if wrong := [window for window in self.windows if window is not None and window <= 0]:
            raise ModelError(f"a layer's window must be positive, got {wrong[0]}")
        if self.attention_temperature and self.attention_temperature_length <= 0:
            raise ModelError(
                "attention_temperature_length must be positive where there is an attention_temperature, "
                f"got {self.attention_temperature_length}"
            )
        for field, allowed in (
            ("qk_norm", QKNorm), ("norms", Norms), ("norm_kind", NormKind), ("activation", Activation),
        ):  # fmt: skip
            if getattr(self, field) not in get_args(allowed):
                raise ModelError(
                    f"{field} must be one of {', '.join(map(repr, get_args(allowed)))}, "
                    f"got {getattr(self, field)!r}"
                )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ModelError(
                f"rope_dim must be even and at most head_dim {self.head_dim}, got {self.rope_dim}"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.rope_dim or self.head_dim

    @functools.cached_property
    def rope(self) -> Rope:
        """Rotary embedding of queries and keys, in the layers that have no other one."""
        return Rope.create(rope_frequencies(self)[0])

    @functools.cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        full = self.rope, rope_frequencies(self)[1]
        local = full
        if self.window_rope_theta is not None:
            inv_freq, factor = _frequencies(
                self.rotary_dim, self.window_rope_theta, self.window_rope_scaling, self.context_length
            )
            local = Rope.create(inv_freq), factor
        unrotated = Rope(()), 1.0
        windows = [group.window for group in self.groups]

        def kind(layer: int) -> LayerKind:
            window = self.window(layer)
            rotates = not self.rotates or self.rotates[layer]
            rope, factor = (local if window is not None else full) if rotates else unrotated
            return LayerKind(window, rope, factor, windows.index(window))

        return tuple(map(kind, range(self.num_layers)))

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers that see equally far, furthest first: for ``create_cache``."""
        layers: dict[int | None, list[int]] = {}
        for layer in range(self.num_layers):
            layers.setdefault(self.window(layer), []).append(layer)
        furthest = sorted(layers, key=lambda window: -math.inf if window is None else -window)
        return tuple(
            LayerGroup(tuple(layers[window]), self.num_kv_heads, self.head_dim, window) for window in furthest
        )

    @property
    def cache_spec(self) -> dict[str, Any]:
        """Arguments of ``PagedKVCache.create`` and ``ContiguousKVCache.create`` that the model decides."""
        return {
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope": self.rope,
        }

    def window(self, layer: int) -> int | None:
        """Sliding window of ``layer`` in tokens, None for full attention."""
        return self.windows[layer] if self.windows else None

    def shard(self, tensor: int) -> ModelConfig:
        """Configuration of one of ``tensor`` devices that split each layer: fewer heads, a narrower MLP.

        Raises:
          MeshError: heads or the MLP cannot be split over so many devices.
        """
        check_heads(self.num_q_heads, self.num_kv_heads, tensor)
        if tensor > 1 and self.qk_norm == "width":
            raise MeshError(
                f"tensor={tensor}: queries and keys of this {self.architecture} model are normalized over all "
                "heads, which cannot be split over devices"
            )
        if self.intermediate_size % tensor:
            raise MeshError(
                f"tensor={tensor} does not divide the MLP's intermediate size {self.intermediate_size}"
            )
        if tensor == 1:
            return self
        return replace(
            self,
            num_q_heads=self.num_q_heads // tensor,
            num_kv_heads=local_kv_heads(self.num_kv_heads, tensor),
            intermediate_size=self.intermediate_size // tensor,
        )

    def num_parameters(self) -> int:
        """Number of weights, norms and biases included."""
        attention = self.head_dim * self.hidden_size * (2 * self.num_q_heads + 2 * self.num_kv_heads)
        biases = self.qkv_bias * self.head_dim * (self.num_q_heads + 2 * self.num_kv_heads)
        biases += self.attention_out_bias * self.hidden_size
        inner = 2 if self.gated else 1
        biases += self.mlp_bias * (inner * self.intermediate_size + self.hidden_size)
        norms = {"pre": 2, "post": 2, "both": 4, "parallel": 1}[self.norms] * self.hidden_size
        heads = {"": 0, "head": 2, "width": self.num_q_heads + self.num_kv_heads}[self.qk_norm]
        norms += heads * self.head_dim
        layer = attention + (inner + 1) * self.hidden_size * self.intermediate_size + biases + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies of the rotary embedding, with the configuration's scaling, not those of
    layers with another one (``ModelConfig.kinds``).

    Returns:
      ``(inv_freq f32[rotary_dim / 2], attention_factor)``: at position p, pair i is rotated by
      ``p * inv_freq[i]`` radians; cos and sin are multiplied by ``attention_factor``.

    Raises:
      ModelError: the kind of scaling is unknown, or has another number of factors than the model.
    """
    return _frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, config.context_length)


def _frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, context_length: int
) -> tuple[np.ndarray, float]:
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    inv_freq = theta**-exponents
    if scaling is None:
        return inv_freq.astype(np.float32), 1.0
    attention_factor = 1.0 if scaling.attention_factor is None else scaling.attention_factor
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind in ("factors", "longrope"):
        is_long = scaling.kind == "longrope" and context_length > scaling.original_context_length
        factors = scaling.long_factors if is_long else scaling.factors
        if len(factors) != dim // 2:
            raise ModelError(f"rope factors: {len(factors)} given, {dim // 2} needed for rotary_dim {dim}")
        inv_freq = inv_freq / np.asarray(factors, np.float64)
    elif scaling.kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    elif scaling.kind == "yarn":
        inv_freq = _yarn(inv_freq, dim, theta, scaling)
        if scaling.attention_factor is None:
            attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    else:
        raise ModelError(
            f"rope scaling {scaling.kind!r} is not supported; supported are linear, yarn, llama3, factors, longrope"
        )
    return inv_freq.astype(np.float32), attention_factor


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    wavelength = 2 * math.pi / inv_freq
    rotations = scaling.original_context_length / wavelength
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def _yarn(inv_freq: np.ndarray, dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    def dimension_of(rotations: float) -> float:
        """The pair that makes this many rotations in the original context."""
        ratio = scaling.original_context_length / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return (1 - ramp) * inv_freq + ramp * inv_freq / scaling.factor
