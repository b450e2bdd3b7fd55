"""Models on one device and on meshes, and caches for them."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "model"))

import small_models
from jax.sharding import Mesh
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model

from jaxpaged import ContiguousKVCache, PagedKVCache
from jaxpaged.sharding.mesh import make_mesh
from jaxpaged.sharding.specs import ShardedCache

KINDS: dict[str, dict[str, Any]] = {
    "qwen2": small_models.config_json("qwen2"),  # biases on Q, K and V
    "qwen3": small_models.config_json("qwen3", tie_word_embeddings=True),  # norms of heads
    "windowed": small_models.config_json(
        "qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "biased": small_models.config_json("llama", attention_bias=True, mlp_bias=True),
}
PAGE_SIZE = 8


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="jaxpaged-mesh-"))


@functools.cache
def path_of(kind: str) -> Path:
    """A model's folder or file: one of ``KINDS``, "gguf" of random quantized weights, or the embedded model."""
    if kind == "tiny":
        return tiny.PATH
    if kind == "gguf":
        config = small_models.config_json("llama")
        weights = small_models.random_weights(config)
        kinds = small_models.gguf.GGMLQuantizationType
        return small_models.write_converted_gguf(_folder() / "random.gguf", config, weights, kind=kinds.Q8_0)
    config = KINDS[kind]
    return small_models.write_folder(_folder() / kind, config, small_models.random_weights(config), shards=2)


@functools.cache
def loaded(kind: str, mesh: Mesh | None = None, **options: Any) -> LoadedModel:
    """The model, on one device or a mesh."""
    return load_model(path_of(kind), mesh=mesh, **options)


@functools.cache
def mesh_of(data: int, tensor: int, context: int = 1) -> Mesh:
    return make_mesh(data=data, tensor=tensor, context=context)


def create_cache(
    model: LoadedModel, max_seqs: int, num_pages: int, *, paged: bool = True, dtype: str = "f32", **sizes: Any
) -> Any:
    """An empty cache for a model, on its mesh: with so many sequences and pages on each data shard."""
    config, mesh = model.local_config, model.mesh
    heads = {**config.cache_spec, "max_seqs": max_seqs, "dtype": dtype}

    def create() -> Any:
        if not paged:
            return ContiguousKVCache.create(**heads, max_length=num_pages * PAGE_SIZE // max_seqs)
        return PagedKVCache.create(**heads, num_pages=num_pages, **{"page_size": PAGE_SIZE, **sizes})

    return create() if mesh is None else ShardedCache.create(mesh, create, model.config.num_kv_heads)
