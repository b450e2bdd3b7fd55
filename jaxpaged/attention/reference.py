"""Reference implementation of paged attention: readable, float32, dense in memory and time."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxpaged.attention.base import Config, Pages, has_hadamard
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, hadamard_transform, token_rows, tokens_per_row
from jaxpaged.pages.rope import Rope


def paged_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    table: BlockTable,
    batch: Batch,
    config: Config,
    sinks: Array | None,
    rope: Rope | None,
    first_page: Array | int = 0,
) -> tuple[Array, Array]:
    """``(out f32[T, Hq, Dv], lse f32[T, Hq])``; arguments as checked by ``api.paged_attention``."""
    tokens, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_rows, width = k_pages.shape
    page_size = page_rows * tokens_per_row(width, head_dim)
    max_seqs, max_pages_per_seq = table.pages.shape

    # Every slot of every entry: [S, P, page_size].
    slot = jnp.arange(page_size, dtype=jnp.int32)
    first_slot = table.first_slot[:, :, None]
    live = (slot >= first_slot) & (slot < first_slot + table.num_tokens[:, :, None])
    live &= (jnp.arange(max_pages_per_seq, dtype=jnp.int32) < table.num_entries[:, None])[:, :, None]
    position = table.position[:, :, None] + slot - first_slot

    # Keys of each sequence in the order of its table, [S, P * page_size, KV, D]; unused slots may be NaN.
    def gather(pages: Pages, head_dim: int) -> Array:
        taken = jnp.clip(table.pages + first_page, 0, num_pages - 1)
        if isinstance(pages, BlockPages):
            rows = pages.format.load(pages, taken)
        else:
            rows = token_rows(pages.astype(jnp.float32)[taken], head_dim)
        rows = rows.transpose(0, 1, 3, 2, 4)
        return jnp.where(live[..., None, None], rows, 0).reshape(max_seqs, -1, num_kv_heads, head_dim)

    v_head_dim = config.width_of_values(head_dim)
    k, v = gather(k_pages, head_dim), gather(v_pages, v_head_dim)
    if has_hadamard(k_pages):
        k = hadamard_transform(k)
    live, position = live.reshape(max_seqs, -1), position.reshape(max_seqs, -1)

    # Keys and queries as if they had been rotated at their logical positions.
    q = q.astype(jnp.float32)
    if rope is not None:
        rotation = jnp.repeat(table.rotation, page_size, axis=1)
        k = rope.rotate(k.reshape(-1, num_kv_heads, head_dim), -rotation.reshape(-1)).reshape(k.shape)
        q = rope.rotate(q, batch.position - batch.rope_positions)

    # Scores of each query and the keys of its sequence; query heads are grouped by KV head.
    sequence = jnp.minimum(batch.sequence, max_seqs - 1)
    query_position = batch.position[:, None]
    visible = batch.valid[:, None] & live[sequence] & (position[sequence] <= batch.last_visible[:, None])
    if config.window is not None:
        visible &= position[sequence] > query_position - config.window
    grouped = q.reshape(tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    scores = config.scale * jnp.einsum("tkgd,tnkd->tkgn", grouped, k[sequence])
    if config.soft_cap is not None:
        scores = config.soft_cap * jnp.tanh(scores / config.soft_cap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf).reshape(tokens, num_q_heads, -1)

    # A sink is an additional score without a value.
    if sinks is not None:
        sink = jnp.where(batch.valid[:, None], sinks.astype(jnp.float32), -jnp.inf)
        scores = jnp.concatenate([scores, sink[..., None]], axis=-1)
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(maximum), 0, maximum))
    denominator = weights.sum(-1, keepdims=True)
    seen = denominator > 0
    weights = jnp.where(seen, weights / jnp.where(seen, denominator, 1), 0)
    lse = jnp.where(seen, maximum + jnp.log(jnp.where(seen, denominator, 1)), -jnp.inf)[..., 0]

    weights = weights[..., : k.shape[1]].reshape(tokens, num_kv_heads, -1, k.shape[1])
    out = jnp.einsum("tkgn,tnkd->tkgd", weights, v[sequence])
    return out.reshape(tokens, num_q_heads, v_head_dim), lse
