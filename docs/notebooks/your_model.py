# %% [markdown]
# # Bring your own model
#
# A Flax NNX transformer as one writes it for training, and the same weights on the paged cache. What
# changes in the attention layer is three lines; everything else of the model stays. At the end: what a
# decode step costs as the text grows. [The guide](../guides/your_model.md) has the details, and examples in
# Linen, Equinox and plain JAX.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import jaxpaged

plt.style.use("style.mplstyle")
VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 256, 4, 8, 4, 32
ROPE = jaxpaged.Rope.create(10_000.0 ** -np.linspace(0, 1, 16, endpoint=False))

# %% [markdown]
# ## Before: dense attention
#
# `x` has all tokens of one text, and attention sees all of them.


# %%
class Attention(nnx.Module):
    def __init__(self, rngs):
        heads = HEADS + 2 * KV_HEADS
        self.qkv = nnx.Linear(WIDTH, heads * HEAD_DIM, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(HEADS * HEAD_DIM, WIDTH, use_bias=False, rngs=rngs)

    def heads(self, x):
        """q [T, heads, head_dim], and k and v [T, kv_heads, head_dim]."""
        qkv = self.qkv(x).reshape(len(x), -1, HEAD_DIM)
        return jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=1)

    def __call__(self, x):
        q, k, v = self.heads(x)
        positions = jnp.arange(len(x))
        q, k = ROPE.rotate(q, positions), ROPE.rotate(k, positions)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.reshape(len(x), -1))


# %% [markdown]
# ## After: the cache's attention
#
# The rows of `x` are now the *new* tokens of all sequences, packed: the whole prompt of one beside a single
# token of another. So positions come from the batch, and `cache.attend` writes the new keys and values to
# their pages and attends to everything that each sequence holds. It returns the cache, like everything here
# that changes it.


# %%
class PagedAttention(Attention):
    def __call__(self, x, cache, layer, batch):
        q, k, v = self.heads(x)
        positions = batch.rope_positions  # changed: every row has its own
        q, k = ROPE.rotate(q, positions), ROPE.rotate(k, positions)
        out, cache = cache.attend(layer, q, k, v, batch)  # changed: no mask, no padding
        return self.out(out.reshape(len(x), -1)), cache  # changed: the cache comes back


# %% [markdown]
# The rest of the model takes the layer as it is. To have one class for training and decoding, pass `attend`
# as an argument, as the guide does; here both are written out so that they can be compared.


# %%
class Block(nnx.Module):
    def __init__(self, attention, rngs):
        self.norm1, self.norm2 = (
            nnx.RMSNorm(WIDTH, rngs=rngs),
            nnx.RMSNorm(WIDTH, rngs=rngs),
        )
        self.attention = attention(rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def mlp(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, attention, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(attention, rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)


@jax.jit
def forward(transformer, tokens):
    """Logits of a text, without a cache."""
    x = transformer.embed(tokens)
    for block in transformer.blocks:
        x = block.mlp(x + block.attention(block.norm1(x)))
    return transformer.head(transformer.norm(x))


def model(transformer, tokens, cache, batch, rows):
    """Logits behind ``rows`` of a step, and the cache: the form that ``generate`` takes."""
    x = transformer.embed(tokens)
    for layer, block in enumerate(transformer.blocks):
        out, cache = block.attention(block.norm1(x), cache, layer, batch)
        x = block.mlp(x + out)
    return transformer.head(transformer.norm(x[rows])), cache


dense = Transformer(Attention, nnx.Rngs(0))
paged = Transformer(PagedAttention, nnx.Rngs(0))  # the same seed: the same weights
same = jax.tree.map(
    lambda a, b: bool((a == b).all()), nnx.state(dense), nnx.state(paged)
)
assert all(jax.tree.leaves(same))

# %% [markdown]
# ## They are equal
#
# `generate` reads three prompts of different lengths in one step, decodes them together and returns the
# tokens with their log-probabilities. The dense model reads each finished text once. Each token has to be the
# likeliest, and its log-probability the same number.

# %%
SIZES = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def create(max_seqs, num_pages):
    return jaxpaged.PagedKVCache.create(
        **SIZES,
        num_pages=num_pages,
        page_size=16,
        max_seqs=max_seqs,
        rope=ROPE,
        dtype="f32",
    )


prompts = [[5], list(range(40)), [7, 7, 30, 2]]
result, cache = jaxpaged.generate(
    model, paged, create(3, 64), prompts, max_new_tokens=24, logprobs=0
)
differences = []
for prompt, tokens, logprobs in zip(
    prompts, result.token_lists(), np.asarray(result.logprobs), strict=False
):
    text = jnp.array(prompt + tokens)
    expected = jax.nn.log_softmax(forward(dense, text))[len(prompt) - 1 : -1]
    assert (expected.argmax(-1) == jnp.array(tokens)).all()
    chosen = expected[jnp.arange(len(tokens)), jnp.array(tokens)]
    differences.append(float(abs(chosen - logprobs[: len(tokens)]).max()))
print(
    f"greedy tokens are equal; log-probabilities differ by {max(differences):.0e} at most"
)
assert max(differences) < 1e-4
assert cache.pages_used == 0  # finished sequences have given their pages back

# %% [markdown]
# ## The same in plain JAX
#
# Nothing of this needs Flax. With a dictionary of arrays the layer is a function, and the same three lines
# change:


# %%
def attention(w, x):
    q, k, v = jnp.split((x @ w["qkv"]).reshape(len(x), -1, HEAD_DIM), (8, 12), axis=1)
    positions = jnp.arange(len(x))
    q, k = ROPE.rotate(q, positions), ROPE.rotate(k, positions)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out.reshape(len(x), -1) @ w["out"]


def paged_attention(w, x, cache, layer, batch):
    q, k, v = jnp.split((x @ w["qkv"]).reshape(len(x), -1, HEAD_DIM), (8, 12), axis=1)
    positions = batch.rope_positions
    q, k = ROPE.rotate(q, positions), ROPE.rotate(k, positions)
    out, cache = cache.attend(layer, q, k, v, batch)
    return out.reshape(len(x), -1) @ w["out"], cache


first = dense.blocks[0].attention
w = {"qkv": first.qkv.kernel[...], "out": first.out.kernel[...]}
x = jax.random.normal(jax.random.key(1), (20, WIDTH))
cache, batch, ok = jaxpaged.reserve(create(1, 8), jnp.array([20]))
out, cache = paged_attention(w, x, cache, 0, batch)
np.testing.assert_allclose(out, attention(w, x), atol=1e-4)
np.testing.assert_allclose(out, first(x), atol=1e-4)

# %% [markdown]
# ## A long text
#
# A step of your own is `reserve`, the model, and what you do with the logits, under one `jit`. Donate the cache:
# XLA then writes into the pool instead of copying it.

# %%
MOST = 4096  # tokens that a text may have


def decode(transformer, cache, token):
    cache, batch, ok = jaxpaged.reserve(cache, jnp.array([1]), num_tokens=1)
    logits, cache = model(transformer, token, cache, batch, jnp.array([0]))
    return jnp.argmax(logits, axis=-1), cache, ok


decode = jax.jit(decode, donate_argnames="cache")


def seconds(call):
    """Least time of five runs, after one that compiles."""
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def time_decode(cache, length):
    """Seconds of a step behind ``length`` tokens, and the cache then."""
    cache, _, ok = jaxpaged.reserve(cache, jnp.array([length]))
    assert ok
    state = {"cache": cache, "token": jnp.array([1])}

    def steps():
        for _ in range(8):
            state["token"], state["cache"], ok = decode(
                paged, state["cache"], state["token"]
            )
        assert ok

    return seconds(steps) / 8, state["cache"]


def time_dense(length):
    """Seconds of a forward pass over ``length`` tokens."""
    return seconds(
        lambda: forward(dense, jnp.ones(length, jnp.int32)).block_until_ready()
    )


lengths = [64, 256, 512, 1024, 2048, 3584]
on_pages, in_rows, used = [], [], []
for length in lengths:
    time_taken, cache = time_decode(create(1, MOST // 16), length)
    on_pages.append(1e3 * time_taken)
    used.append(int(cache.pages_used) * cache.bytes_per_page / 2**20)
    rows = jaxpaged.ContiguousKVCache.create(
        **SIZES, max_seqs=1, max_length=MOST, dtype="f32"
    )
    time_taken, rows = time_decode(rows, length)
    in_rows.append(1e3 * time_taken)
again = [1e3 * time_dense(length) for length in lengths[:4]]
aside = rows.bytes_per_page / 2**20

# %% tags=["remove-input"]
figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(6.4, 5.6))
upper.plot(
    lengths[:4], again, "o-", color="#7d8590", label="no cache, all tokens again"
)
upper.plot(lengths, in_rows, "s--", color="#e69f00", label="contiguous cache")
upper.plot(lengths, on_pages, "o-", color="#0072b2", label="paged cache")
upper.set(ylabel="ms", yscale="log", title="Time of one more token, on this CPU")
upper.set_ylim(top=3 * max(again))
upper.yaxis.set_major_formatter("{x:g}")
upper.legend(loc="center right")
lower.axhline(
    aside, ls="--", color="#e69f00", label=f"contiguous cache of {MOST:,} tokens"
)
lower.plot(lengths, used, "o-", color="#0072b2", label="pages in use")
lower.set(ylabel="MiB", xlabel="tokens of the text", ylim=(0, 1.35 * aside))
lower.set_title("Memory for keys and values")
lower.legend(loc="upper left", ncols=2)
plt.show()

# %% [markdown]
# Without a cache a token costs a whole forward pass. With one it costs reading the weights once, and the keys
# and values that are there. The contiguous cache takes about as long and sets the memory of the longest text aside
# from the start.
