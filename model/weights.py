"""From the tensors of a file to the params of ``model.llama``: names, layouts, shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.config import ModelConfig, ModelError
from model.llama import Params

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor."""

Naming = Literal["gguf", "huggingface"]


class TensorInfo(Protocol):
    """What a file says about a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


class TensorSource(Protocol):
    """A model file or folder: its tensors in the order in which they are best read."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Placement:
    """Where a file's tensor belongs and how it lies there.

    Attributes:
      path: dotted path of the weight in the params, such as ``"blocks.0.attention.q.kernel"``.
      shape: shape in the file; a linear layer is ``[out, in]`` there.
      transpose: the params hold ``[in, out]``.
      head_dim: where positive, rows belong to heads of this size whose first ``rotary_dim`` rows are
        interleaved: row ``2 i + j`` in the file is row ``i + j * rotary_dim / 2`` here. GGUF files of the
        architecture "llama" are laid out so.
      rotary_dim: see ``head_dim``.
    """

    path: str
    shape: tuple[int, ...]
    transpose: bool = False
    head_dim: int = 0
    rotary_dim: int = 0


# Module of the params -> the file's name; in the blocks the names are of one block.
_NAMES: dict[Naming, dict[str, str]] = {
    "gguf": {
        "embedding": "token_embd",
        "norm": "output_norm",
        "head": "output",
        "block": "blk.{}.",
        "attention_norm": "attn_norm",
        "attention.q": "attn_q",
        "attention.k": "attn_k",
        "attention.v": "attn_v",
        "attention.out": "attn_output",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "ffn_gate",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
    },
    "huggingface": {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "block": "model.layers.{}.",
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
}
# Tensors that files carry and that say nothing new: frequencies follow from the configuration.
_REDUNDANT = (
    "rope_freqs.weight",
    "rope_freqs",
    "rotary_emb.inv_freq",
    "attn_rot_embd",
    "attn_rot_embd.weight",
)


def _interleaves(config: ModelConfig, naming: Naming) -> bool:
    """Whether the rows of Q and K lie interleaved in such a file."""
    return naming == "gguf" and config.architecture in ("llama", "mistral")


def placements(config: ModelConfig, naming: Naming) -> dict[str, Placement]:
    """Every tensor a file of this model must hold: ``{name in the file: Placement}``."""
    c, names = config, _NAMES[naming]
    q_dim, kv_dim = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    rope = (c.head_dim, c.rotary_dim) if _interleaves(c, naming) else ()
    result = {f"{names['embedding']}.weight": Placement("embedding.embedding", (c.vocab_size, c.hidden_size))}

    def linear(prefix: str, name: str, path: str, dims: tuple[int, int], bias: bool, *rope: int) -> None:
        result[f"{prefix}{name}.weight"] = Placement(f"{path}.kernel", dims, True, *rope)
        if bias:
            result[f"{prefix}{name}.bias"] = Placement(f"{path}.bias", dims[:1], False, *rope)

    def norm(prefix: str, name: str, path: str, dim: int) -> None:
        result[f"{prefix}{name}.weight"] = Placement(f"{path}.scale", (dim,))

    for i in range(c.num_layers):
        prefix, path = names["block"].format(i), f"blocks.{i}."
        norm(prefix, names["attention_norm"], path + "attention_norm", c.hidden_size)
        for part, dim, layout in (("q", q_dim, rope), ("k", kv_dim, rope), ("v", kv_dim, ())):
            name = f"attention.{part}"
            linear(prefix, names[name], path + name, (dim, c.hidden_size), c.qkv_bias, *layout)
        linear(
            prefix,
            names["attention.out"],
            path + "attention.out",
            (c.hidden_size, q_dim),
            c.attention_out_bias,
        )
        if c.qk_norm:
            for name in ("attention.q_norm", "attention.k_norm"):
                norm(prefix, names[name], path + name, c.head_dim)
        norm(prefix, names["mlp_norm"], path + "mlp_norm", c.hidden_size)
        for name in ("mlp.gate", "mlp.up"):
            linear(prefix, names[name], path + name, (c.intermediate_size, c.hidden_size), c.mlp_bias)
        linear(prefix, names["mlp.down"], path + "mlp.down", (c.hidden_size, c.intermediate_size), c.mlp_bias)
    norm("", names["norm"], "norm", c.hidden_size)
    if not c.tie_embeddings:
        linear("", names["head"], "head", (c.vocab_size, c.hidden_size), False)
    return result


def check_tensors(config: ModelConfig, source: TensorSource, plan: Mapping[str, Placement]) -> None:
    """Compares what the file holds with what the model needs, before anything is read.

    Raises:
      ModelError: tensors are missing, unexpected, or of another shape; all are named, with both shapes.
    """
    where, found = source.path, source.tensors
    if missing := [name for name in plan if name not in found]:
        raise ModelError(f"{where}: {_listed(missing, 'tensor')} missing, needed by a {_sizes(config)}")
    wrong = [
        f"{name} is {list(found[name].shape)}, needed is {list(placement.shape)}"
        for name, placement in plan.items()
        if tuple(found[name].shape) != placement.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        raise ModelError(f"{where}: wrong shape: {wrong[0]}{more}, for a {_sizes(config)}")
    tied = "lm_head.weight" if config.tie_embeddings else None
    extra = [name for name in found if name not in plan and name != tied and not name.endswith(_REDUNDANT)]
    if extra:
        raise ModelError(f"{where}: {_listed(extra, 'tensor')} unknown to a {_sizes(config)}")


def _listed(names: list[str], noun: str, most: int = 4) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names[:most]]
    listed = ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"{noun}s {listed} are" if len(names) > 1 else f"{noun} {listed} is"


def _sizes(c: ModelConfig) -> str:
    tied = "tied" if c.tie_embeddings else "untied"
    return (
        f"{c.architecture} model of {c.num_layers} layers, hidden size {c.hidden_size}, "
        f"{c.num_q_heads} query and {c.num_kv_heads} KV heads of {c.head_dim}, {tied} embeddings"
    )


def load_params(
    config: ModelConfig,
    source: TensorSource,
    naming: Naming,
    *,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
) -> Params:
    """Reads every weight, one tensor at a time: beside the params, memory for one tensor is needed.

    Args:
      config: what the file's model is.
      source: the file or folder.
      naming: how its tensors are called.
      dtype: of the params.
      progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
      ModelError: see ``check_tensors``; or a tensor cannot be read.
    """
    plan = placements(config, naming)
    check_tensors(config, source, plan)
    weights: list[tuple[tuple[str | int, ...], nnx.Param]] = []
    done, total = 0, sum(source.tensors[name].num_bytes for name in plan)
    for name, info in source.tensors.items():
        if (placement := plan.get(name)) is None:
            continue
        value = from_file(source.read(name), placement)
        # Cast before it moves: half the bytes go to an accelerator.
        value = value.astype(dtype, order="C", copy=False)
        path = tuple(int(key) if key.isdigit() else key for key in placement.path.split("."))
        weights.append((path, nnx.Param(jnp.asarray(value))))
        done += info.num_bytes
        if progress is not None:
            progress(done, total)
    return nnx.from_flat_state(weights)


def from_file(x: np.ndarray, placement: Placement) -> np.ndarray:
    """A file's tensor as the params hold it."""
    if placement.head_dim:
        rotary_dim = placement.rotary_dim
        heads = x.reshape(-1, placement.head_dim, *x.shape[1:])
        pairs = heads[:, :rotary_dim].reshape(heads.shape[0], rotary_dim // 2, 2, *x.shape[1:])
        halves = pairs.swapaxes(1, 2).reshape(heads.shape[0], rotary_dim, *x.shape[1:])
        x = np.concatenate([halves, heads[:, rotary_dim:]], axis=1).reshape(x.shape)
    return x.T if placement.transpose else x


def to_file(x: np.ndarray, placement: Placement) -> np.ndarray:
    """A weight of the params as a file holds it: the inverse of ``from_file``."""
    x = x.T if placement.transpose else x
    if placement.head_dim:
        rotary_dim = placement.rotary_dim
        heads = x.reshape(-1, placement.head_dim, *x.shape[1:])
        halves = heads[:, :rotary_dim].reshape(heads.shape[0], 2, rotary_dim // 2, *x.shape[1:])
        pairs = halves.swapaxes(1, 2).reshape(heads.shape[0], rotary_dim, *x.shape[1:])
        x = np.concatenate([pairs, heads[:, rotary_dim:]], axis=1).reshape(x.shape)
    return np.ascontiguousarray(x)
