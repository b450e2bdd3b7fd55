"""Does text suffer from a context shift? The loss of held-out text behind shifts, and behind a context computed anew.

    python -m tpu_scripts.bench.endless

Each file is read token by token through a context of ``--n-ctx`` tokens. When it is full, the first ``--keep`` stay,
half of the others are forgotten and the rest moves up, as ``jaxpaged generate --context-shift`` does, all inside one
program. Beside it the same with the tokens that stay computed anew at every shift, which costs a prefill each time.
Loss in bits a token, by how many tokens ago the shift was. Needs the embedded model or ``-m``, and a minute of a CPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.tiny.corpus import read_corpus

from jaxpaged import PagedKVCache, check_invariants, seq_remove, seq_shift

_PAGE_SIZE = 32
_BUCKETS = (0, 8, 32, 64)


def forward(
    model: Any, params: Any, cache: Any, tokens: jax.Array, count: jax.Array
) -> tuple[Any, jax.Array]:
    """The cache with ``count`` of ``tokens i32[T]`` behind what it holds, and the logits of the last one."""
    cache, batch, _ = cache.reserve(count[None], num_tokens=tokens.shape[0])
    logits, cache = model(params, tokens, cache, batch, batch.last_rows)
    return cache, logits[0]


@functools.partial(jax.jit, static_argnums=(0, 3, 4), donate_argnums=2)
def read_on(
    model: Any, params: Any, cache: Any, n_ctx: int, keep: int, tokens: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Reads ``tokens`` one by one, shifting where the context is full: ``(cache, bits, shifted)`` of each."""

    def step(cache: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        token, following = pair
        length = cache.lengths[0]
        full = length >= n_ctx

        def shift(cache: Any) -> Any:
            discard = (length - keep) // 2
            cache, _ = seq_remove(cache, 0, keep, keep + discard)
            return seq_shift(cache, 0, keep + discard, -1, -discard)[0]

        cache = jax.lax.cond(full, shift, lambda cache: cache, cache)
        cache, logits = forward(model, params, cache, token[None], jnp.int32(1))
        bits = -jax.nn.log_softmax(logits)[following] / np.log(2)
        return cache, (bits, full)

    cache, (bits, shifted) = jax.lax.scan(step, cache, (tokens[:-1], tokens[1:]))
    return cache, bits, shifted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, default=tiny.PATH)
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=3000, help="of each file")
    parser.add_argument("--files", type=int, default=6)
    args = parser.parse_args()
    loaded = load_model(args.model)
    config, params = loaded.config, loaded.params
    model = loaded.function
    pages = -(-args.n_ctx // _PAGE_SIZE) + 2

    def empty() -> PagedKVCache:
        return PagedKVCache.create(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_pages=pages,
            max_seqs=1,
            page_size=_PAGE_SIZE,
        )

    prefill = jax.jit(functools.partial(forward, model), donate_argnums=1)
    losses: dict[str, list[tuple[int, float]]] = {"shifted": [], "computed anew": []}
    before: list[float] = []
    texts = sorted(read_corpus().held_out.items(), key=lambda item: -len(item[1]))[: args.files]
    shifts = 0
    for name, text in texts:
        tokens = jnp.asarray(loaded.tokenizer.encode(text)[: args.tokens], jnp.int32)
        cache, bits, shifted = read_on(model, params, empty(), args.n_ctx, args.keep, tokens)
        check_invariants(cache)
        bits, shifted = np.asarray(bits), np.asarray(shifted)
        starts = np.flatnonzero(shifted)
        shifts += len(starts)
        before += bits[64 : starts[0]].tolist()
        ends = [*starts[1:], len(bits)]
        discard = (args.n_ctx - args.keep) // 2
        stay = args.n_ctx - discard  # tokens in the context right behind a shift
        for start, end in zip(starts, ends, strict=True):
            losses["shifted"] += [(i - start, float(bits[i])) for i in range(start, end)]
            # The same tokens, computed in a context that never held more: the beginning, then those just before.
            kept = jnp.concatenate([tokens[: args.keep], tokens[start - (stay - args.keep) : start]])
            fresh, _ = prefill(params, empty(), kept, jnp.int32(stay))
            _, anew, _ = read_on(model, params, fresh, args.n_ctx, args.keep, tokens[start : end + 1])
            losses["computed anew"] += [(i, float(b)) for i, b in enumerate(np.asarray(anew))]
        print(f"{name}: {len(tokens)} tokens, {len(starts)} shifts", flush=True)
    print(
        f"\n{config.name}; jax {jax.__version__}; context {args.n_ctx}, {args.keep} kept; {shifts} shifts; before the "
        f"first one, from token 64 on: {np.mean(before):.3f} bits a token\n"
    )
    edges = [*_BUCKETS, args.n_ctx]
    print("| tokens since the shift | shifted | computed anew | difference |\n|---|---:|---:|---:|")
    for low, high in itertools.pairwise(edges):
        means = [np.mean([b for i, b in rows if low <= i < high]) for rows in losses.values()]
        print(f"| {low} - {high - 1} | {means[0]:.3f} | {means[1]:.3f} | {means[0] - means[1]:+.3f} |")


if __name__ == "__main__":
    main()
