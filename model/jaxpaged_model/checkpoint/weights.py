"""Maps the tensors of a file to the params of ``jaxpaged_model.llama``: names, layouts, shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpaged_model.checkpoint.pooling import RERANKER_TENSORS
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.layers import SLOTS, by_layer, variants
from jaxpaged_model.llama import Params
from jaxpaged_model.metadata import ModelError
from jaxpaged_model.quantized.activations import GATES
from jaxpaged_model.quantized.formats import BLOCK
from jaxpaged_model.quantized.layouts import LAYOUTS, Layout, aligned_zeros, empty_parts
from jaxpaged_model.quantized.linear import WeightPlan

Progress = Callable[[int, int], None]
"""Called with (bytes done, total bytes) after each tensor."""

Naming = Literal["gguf", "huggingface"]

Part = tuple[slice, ...]
"""A part of a tensor: one slice for each axis, of step 1."""


class TensorInfo(Protocol):
    """Shape, type and size of a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...


class TensorSource(Protocol):
    """A model file or folder, see ``GGUFFile``; its tensors are in the order in which to read them."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str) -> np.ndarray: ...
    def raw(self, name: str) -> np.ndarray: ...
    def release(self, name: str) -> None: ...


class PartialSource(TensorSource, Protocol):
    """A model file or folder from which parts of tensors can be read."""

    def read(self, name: str, part: Part | None = None) -> np.ndarray: ...
    def raw(self, name: str, part: Part | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Placement:
    """The weight that a file's tensor is, and the difference of their layouts.

    Attributes:
      path: dotted path of the weight in the params, such as ``"blocks.0.attention.q.kernel"``.
      shape: shape in the file; a linear layer is ``[out, in]`` there.
      transpose: True if the params have ``[in, out]``.
      head_dim: if positive, the first ``rotary_dim`` rows of each head of this size are interleaved: row
        ``2 i + j`` in the file is row ``i + j * rotary_dim / 2`` in the params. This is the layout of
        GGUF files of the architecture "llama" and others.
      rotary_dim: see ``head_dim``.
      plus: added to what stands in the file: Hugging Face folders of Gemma have norms less 1.
    """

    path: str
    shape: tuple[int, ...]
    transpose: bool = False
    head_dim: int = 0
    rotary_dim: int = 0
    plus: float = 0.0


# Module of the params -> (name in GGUF files, in Hugging Face folders); in a block without the block's prefix.
# Names of norms depend on which of them there are, see ``_names``.
_NAMES = {
    "embedding": ("token_embd", "model.embed_tokens"),
    "norm": ("output_norm", "model.norm"),
    "head": ("output", "lm_head"),
    "attention_norm": ("attn_norm", "input_layernorm"),
    "attention_post_norm": ("post_attention_norm", "post_attention_layernorm"),
    "attention.q": ("attn_q", "self_attn.q_proj"),
    "attention.k": ("attn_k", "self_attn.k_proj"),
    "attention.v": ("attn_v", "self_attn.v_proj"),
    "attention.out": ("attn_output", "self_attn.o_proj"),
    "attention.q_norm": ("attn_q_norm", "self_attn.q_norm"),
    "attention.k_norm": ("attn_k_norm", "self_attn.k_norm"),
    "mlp_norm": ("ffn_norm", "pre_feedforward_layernorm"),
    "mlp_post_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
    "mlp.gate": ("ffn_gate", "mlp.gate_proj"),
    "mlp.up": ("ffn_up", "mlp.up_proj"),
    "mlp.down": ("ffn_down", "mlp.down_proj"),
}
_BLOCK_PREFIX = ("blk.{}.", "model.layers.{}.")
# Tensors that are ignored: frequencies follow from the configuration.
_REDUNDANT = (
    "rope_freqs.weight",
    "rope_freqs",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    "rotary_emb.inv_freq",
    "attn_rot_embd",
    "attn_rot_embd.weight",
)


_NORMS = {
    "pre": ("attention_norm", "mlp_norm"),
    "post": ("attention_post_norm", "mlp_post_norm"),
    "both": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
    "parallel": ("attention_norm",),
}
"""Norms of a block, by ``ModelConfig.norms``."""
_INTERLEAVED = ("llama", "mistral", "smollm3", "granite", "mistral3", "arcee")
"""Architectures whose GGUF files have the rows of queries and keys interleaved: llama.cpp rotates pairs of
neighbours there (its ``llama_model_rope_type``), and its converter moves the rows."""
_ALWAYS_INTERLEAVED = ("cohere2", "command-r", "ernie4_5", "glm4")
"""Architectures trained so, whose Hugging Face folders have interleaved rows, too."""
_LESS_ONE = ("gemma", "gemma2", "gemma3")
"""Architectures whose Hugging Face folders have the scales of norms less 1; GGUF files do not."""


def _names(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """``_NAMES`` for one model: what stands before the MLP was named before there were other norms."""
    if config.architecture == "glm4":
        in_folders = {
            "attention_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        }
        return _NAMES | {module: (_NAMES[module][0], name) for module, name in in_folders.items()}
    if config.norms != "pre":
        return _NAMES
    in_gguf = "post_attention_norm" if config.architecture == "seed_oss" else "ffn_norm"
    return _NAMES | {"mlp_norm": (in_gguf, "post_attention_layernorm")}


def placements(config: ModelConfig, naming: Naming) -> dict[str, Placement]:
    """All tensors of a file of this model: ``{name in the file: Placement}``."""
    c, column = config, 0 if naming == "gguf" else 1
    hidden, q_dim, kv_dim = c.hidden_size, c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    interleaved = (
        naming == "gguf" and c.architecture in _INTERLEAVED
    ) or c.architecture in _ALWAYS_INTERLEAVED
    rope = (c.head_dim, c.rotary_dim) if interleaved else ()
    plus = 1.0 if naming == "huggingface" and c.architecture in _LESS_ONE else 0.0
    names = _names(c)
    result: dict[str, Placement] = {}

    def add(
        module: str, weight: str, shape: tuple[int, ...], layer: int | None, *layout: Any, **more: Any
    ) -> None:
        prefix = "" if layer is None else _BLOCK_PREFIX[column].format(layer)
        path = module if layer is None else f"blocks.{layer}.{module}"
        name = f"{prefix}{names[module][column]}.{'bias' if weight == 'bias' else 'weight'}"
        result[name] = Placement(f"{path}.{weight}", shape, *layout, **more)

    def norm(module: str, size: int, layer: int | None) -> None:
        add(module, "scale", (size,), layer, plus=plus)

    def linear(module: str, dims: tuple[int, int], bias: bool, layer: int | None, *rope: int) -> None:
        add(module, "kernel", dims, layer, True, *rope)
        if bias:
            add(module, "bias", dims[:1], layer, False, *rope)

    add("embedding", "embedding", (c.vocab_size, hidden), None)
    for i in range(c.num_layers):
        for module in _NORMS[c.norms]:
            norm(module, hidden, i)
        linear("attention.q", (q_dim, hidden), c.qkv_bias, i, *rope)
        linear("attention.k", (kv_dim, hidden), c.qkv_bias, i, *rope)
        linear("attention.v", (kv_dim, hidden), c.qkv_bias, i)
        linear("attention.out", (hidden, q_dim), c.attention_out_bias, i)
        if c.qk_norm:
            of_heads = c.qk_norm == "head"
            norm("attention.q_norm", c.head_dim if of_heads else q_dim, i)
            norm("attention.k_norm", c.head_dim if of_heads else kv_dim, i)
        if c.gated:
            linear("mlp.gate", (c.intermediate_size, hidden), c.mlp_bias, i)
        linear("mlp.up", (c.intermediate_size, hidden), c.mlp_bias, i)
        linear("mlp.down", (hidden, c.intermediate_size), c.mlp_bias, i)
    norm("norm", hidden, None)
    if not c.tie_embeddings:
        linear("head", (c.vocab_size, hidden), False, None)
    return result


def check_tensors(config: ModelConfig, source: TensorSource, plan: Mapping[str, Placement]) -> None:
    """Compares the file's tensors with those of the model, before any is read.

    Raises:
      ModelError: tensors are missing, unexpected, or of another shape; the message has names and shapes.
    """
    where, found = source.path, source.tensors
    if missing := [name for name in plan if name not in found]:
        raise ModelError(f"{where}: {_tensors(missing)} missing, needed by a {_sizes(config)}")
    wrong = [
        f"{name} is {list(found[name].shape)}, needed is {list(placement.shape)}"
        for name, placement in plan.items()
        if tuple(found[name].shape) != placement.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        raise ModelError(f"{where}: wrong shape: {wrong[0]}{more}, for a {_sizes(config)}")
    tied = "lm_head.weight" if config.tie_embeddings else None
    redundant = tied, *RERANKER_TENSORS
    extra = [
        name for name in found if name not in plan and name not in redundant and not name.endswith(_REDUNDANT)
    ]
    if extra:
        raise ModelError(f"{where}: {_tensors(extra)} unknown to a {_sizes(config)}")


def _tensors(names: list[str], most: int = 4) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names[:most]]
    listed = ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"tensors {listed} are" if len(names) > 1 else f"tensor {listed} is"


def _sizes(c: ModelConfig) -> str:
    tied = "tied" if c.tie_embeddings else "untied"
    return (
        f"{c.architecture} model of {c.num_layers} layers, hidden size {c.hidden_size}, "
        f"{c.num_q_heads} query and {c.num_kv_heads} KV heads of {c.head_dim}, {tied} embeddings"
    )


def weight_plan(
    config: ModelConfig,
    source: TensorSource,
    naming: Naming,
    *,
    exact: bool = False,
    layout: Layout = "panels",
) -> WeightPlan:
    """Plan in which all matrices stay in memory as they are in the file, if the layout has their format.

    Matrices of a number of columns that is no multiple of 32 are dense.

    Args:
      config, source, naming: as for ``load_params``.
      exact, layout: see ``quantized.product.product``.
    """
    kinds: dict[str, str] = {}
    rows: dict[str, int] = {}
    for name, placement in placements(config, naming).items():
        path, _, weight = placement.path.rpartition(".")
        if weight in ("kernel", "embedding") and name in source.tensors:
            rows[path] = placement.shape[0]
            kind = source.tensors[name].dtype
            if kind in LAYOUTS[layout].FORMATS and placement.shape[1] % BLOCK == 0:
                kinds[path] = kind
    for i in range(config.num_layers):
        for together, parts in SLOTS.items():
            paths = [f"blocks.{i}.{part}" for part in parts]
            found = {kinds.get(path) for path in paths}
            fitting = all(rows.get(path, 1) % LAYOUTS[layout].ROWS == 0 for path in paths)
            separate = together == "mlp.gate_up" and (config.mlp_bias or config.activation not in GATES)
            if len(parts) > 1 and len(found) == 1 and None not in found and fitting and not separate:
                kinds[f"blocks.{i}.{together}"] = kinds[paths[0]]
                for path in paths:
                    del kinds[path]
    plan = WeightPlan(tuple(sorted(kinds.items())), layout=layout)
    return plan.exactly() if exact else plan


def load_params(
    config: ModelConfig,
    source: TensorSource,
    naming: Naming,
    *,
    dtype: Any = jnp.float32,
    plan: WeightPlan | None = None,
    progress: Progress | None = None,
) -> Params:
    """Reads all weights, one tensor at a time; needs memory for the params and one more tensor.

    Params of the layers are read stack by stack, each into its place, so that a stack is on its device
    before memory for the next one is needed.

    Args:
      config: the model.
      source: its file or folder.
      naming: convention of the tensors' names.
      dtype: dtype of the dense params.
      plan: layers that stay as in the file; None = none.
      progress: called with (bytes done, total bytes) after each tensor.

    Raises:
      ModelError: see ``check_tensors``; or a tensor cannot be read.
    """
    places = placements(config, naming)
    check_tensors(config, source, places)
    loader = _Loader(config, places.values(), dtype, plan or WeightPlan())
    done, total = 0, sum(source.tensors[name].num_bytes for name in places)
    by_stack: dict[str, list[str]] = {}
    for name in source.tensors:
        if (placement := places.get(name)) is not None:
            by_stack.setdefault(loader.place(placement.path).path, []).append(name)
    for path, names in by_stack.items():
        for name in names:
            loader.add(source, name, places[name])
            done += source.tensors[name].num_bytes
            if progress is not None:
                progress(done, total)
        loader.finish(path)
    return loader.params()


@dataclass(frozen=True)
class ParamPlace:
    """The module of the params that has a weight: with those of other layers in a stack, and perhaps
    joined with other matrices."""

    path: str
    """Path of the module."""
    kind: str | None = None
    """Format of its matrix; None = dense."""
    index: Any = ...
    """Its index in the stack; ``...`` if the module is no stack."""
    stack: tuple[int, ...] = ()
    """Leading axes of the stack."""
    joined: tuple[str, ...] = ()
    """Modules whose matrices are joined there, in this order; without a joined matrix the own one."""


def param_place(path: str, plan: WeightPlan, num_layers: int) -> ParamPlace:
    """Where the params have the weight that a ``Placement`` calls ``path``."""
    module = path.rpartition(".")[0]
    if not module.startswith("blocks."):
        return ParamPlace(module, plan.of(module), joined=(module,))
    block, number, name = module.split(".", 2)
    layer = int(number)
    slot = next((slot for slot, parts in SLOTS.items() if name in parts), None)
    if slot is None:
        return ParamPlace(f"blocks.{name}", None, layer, (num_layers,), (module,))
    of_layers, parts = variants(plan, slot, num_layers), SLOTS[slot]
    variant = of_layers[layer]
    which = list(dict.fromkeys(of_layers)).index(variant)
    inside = f"blocks.{slot}.variants.{which}"
    at = of_layers[:layer].count(variant), (of_layers.count(variant),)
    if isinstance(variant, str):
        joined = tuple(f"{block}.{layer}.{part}" for part in parts)
        return ParamPlace(f"{inside}.joined", variant, *at, joined)
    own = f"{inside}.{name.rpartition('.')[2]}" if len(parts) > 1 else inside
    return ParamPlace(own, variant[parts.index(name)], *at, (module,))


class _Loader:
    """Fills the params of a model from its tensors, those of a stack one after the other."""

    def __init__(
        self, config: ModelConfig, places: Iterable[Placement], dtype: Any, plan: WeightPlan
    ) -> None:
        self._config, self._dtype, self._plan = config, dtype, plan
        self._params: list[tuple[tuple[str | int, ...], nnx.Param]] = []
        self._open: dict[str, dict[str, np.ndarray]] = {}
        """Params of modules that are being filled, by path and name."""
        self._rows = {place.path.rpartition(".")[0]: place.shape[0] for place in places}

    def place(self, path: str) -> ParamPlace:
        """See ``param_place``."""
        return param_place(path, self._plan, self._config.num_layers)

    def add(self, source: TensorSource, name: str, placement: Placement) -> None:
        """Reads a tensor to its place."""
        place, (module, _, weight) = self.place(placement.path), placement.path.rpartition(".")
        rows = [self._rows[one] for one in place.joined]
        first_row = sum(rows[: place.joined.index(module)])
        arrays = self._open.setdefault(place.path, {})
        if place.kind is not None and weight != "bias":
            fmt = LAYOUTS[self._plan.layout].FORMATS[place.kind]
            if "codes" not in arrays:
                columns = placement.shape[1]
                arrays |= empty_parts(self._plan.layout, fmt, sum(rows), columns, place.stack)
            matrix = {part: x[place.index] for part, x in arrays.items() if part != "bias"}
            raw = from_file(source.raw(name), replace(placement, transpose=False))
            LAYOUTS[self._plan.layout].pack(fmt, raw, matrix, first_row)
            source.release(name)
            return
        value = from_file(source.read(name), placement)
        if weight not in arrays:
            shape = (sum(rows),) if weight == "bias" else value.shape
            # Converted before the transfer to an accelerator, which is then of half the bytes.
            arrays[weight] = aligned_zeros((*place.stack, *shape), self._dtype)
        arrays[weight][place.index][first_row : first_row + len(value)] = value

    def finish(self, path: str) -> None:
        """Moves the params of a module to the device."""
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        for name, array in self._open.pop(path).items():
            where = (*keys, name)
            value = jax.device_put(by_layer(where, array))  # aligned arrays are not copied on a CPU
            self._params.append((where, nnx.Param(value)))

    def params(self) -> Params:
        """All params."""
        return nnx.from_flat_state(self._params)


def from_file(x: np.ndarray, placement: Placement) -> np.ndarray:
    """Converts a file's tensor to the layout of the params."""
    x = x + np.float32(placement.plus) if placement.plus else x
    if placement.head_dim:
        rotary_dim = placement.rotary_dim
        heads = x.reshape(-1, placement.head_dim, *x.shape[1:])
        pairs = heads[:, :rotary_dim].reshape(heads.shape[0], rotary_dim // 2, 2, *x.shape[1:])
        halves = pairs.swapaxes(1, 2).reshape(heads.shape[0], rotary_dim, *x.shape[1:])
        x = np.concatenate([halves, heads[:, rotary_dim:]], axis=1).reshape(x.shape)
    return x.T if placement.transpose else x


def to_file(x: np.ndarray, placement: Placement) -> np.ndarray:
    """Converts a weight of the params to a file's layout; inverse of ``from_file``."""
    x = x - np.float32(placement.plus) if placement.plus else x
    x = x.T if placement.transpose else x
    if placement.head_dim:
        rotary_dim = placement.rotary_dim
        heads = x.reshape(-1, placement.head_dim, *x.shape[1:])
        halves = heads[:, :rotary_dim].reshape(heads.shape[0], 2, rotary_dim // 2, *x.shape[1:])
        pairs = halves.swapaxes(1, 2).reshape(heads.shape[0], rotary_dim, *x.shape[1:])
        x = np.concatenate([pairs, heads[:, rotary_dim:]], axis=1).reshape(x.shape)
    return np.ascontiguousarray(x)
