"""ModelConfig: the hyperparameters of a Llama-family model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxpaged.pages.rope import Rope
from jaxpaged.sharding.mesh import MeshError, check_heads, local_kv_heads
from jaxpaged_model.metadata import ModelError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


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


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model; hashable, so that it can be static under ``jax.jit``."""

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
    rope_theta: float = 10000.0
    rope_dim: int = 0
    """Leading dimensions of a head that are rotated; 0 = all of them."""
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens, None = full attention; empty = full everywhere."""
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
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
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelError(
                f"windows must name every layer: {len(self.windows)} given for {self.num_layers}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ModelError(
                f"rope_dim must be even and at most head_dim {self.head_dim}, got {self.rope_dim}"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.rope_dim or self.head_dim

    @property
    def rope(self) -> Rope:
        """Rotary embedding of queries and keys."""
        return Rope.create(rope_frequencies(self)[0])

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
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + biases + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies of the rotary embedding, with the configuration's scaling.

    Returns:
      ``(inv_freq f32[rotary_dim / 2], attention_factor)``: at position p, pair i is rotated by
      ``p * inv_freq[i]`` radians; cos and sin are multiplied by ``attention_factor``.

    Raises:
      ModelError: the kind of scaling is unknown, or has another number of factors than the model.
    """
    dim = config.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    inv_freq = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq.astype(np.float32), 1.0
    attention_factor = 1.0 if scaling.attention_factor is None else scaling.attention_factor
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "factors":
        if len(scaling.factors) != dim // 2:
            raise ModelError(
                f"rope factors: {len(scaling.factors)} given, {dim // 2} needed for rotary_dim {dim}"
            )
        inv_freq = inv_freq / np.asarray(scaling.factors, np.float64)
    elif scaling.kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    elif scaling.kind == "yarn":
        inv_freq = _yarn(inv_freq, dim, config.rope_theta, scaling)
        if scaling.attention_factor is None:
            attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    else:
        raise ModelError(
            f"rope scaling {scaling.kind!r} is not supported; supported are linear, yarn, llama3, factors"
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
