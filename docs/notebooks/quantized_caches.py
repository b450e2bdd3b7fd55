# %% [markdown]
# # Quantized caches
#
# Keys and values can be stored in 16 bits, or in 8, 5 or 4. Each format is an argument of the cache; model and program
# stay the same. This notebook measures, on a small run, what a format costs: how far the predictions of the next token
# move from those of an f32 cache. `MODEL=model.gguf` in the environment takes another model than the one that comes
# with the package.

# %%
import inspect
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxpaged
from jaxpaged.pages.formats import hadamard_transform
from jaxpaged_model import load_model, tiny

plt.style.use("style.mplstyle")
loaded = load_model(os.environ.get("MODEL", tiny.PATH))
config = loaded.config
SEQUENCES, LENGTH = 4, 384


def create(dtype, hadamard=None):
    return jaxpaged.PagedKVCache.create(
        **config.cache_spec,
        num_pages=SEQUENCES * LENGTH // 32,
        max_seqs=SEQUENCES,
        max_seq_len=LENGTH,
        dtype=dtype,
        hadamard=hadamard,
    )


print(", ".join(jaxpaged.PAGE_FORMATS))

# %% [markdown]
# ## Bytes of a token
#
# `k_dtype` and `v_dtype` would name one format for keys and one for values; `dtype` names both. Block formats have a
# scale for 32 numbers, so that 4 bits a code are 4.5 bits a number.

# %%
NAMES = ["f32", "f16", "fp8_e4m3", "q8_0", "q5_1", "q4_0", "q4_k", "kivi2"]
numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # of a token
bits = {}
for name in NAMES:
    cache = jax.eval_shape(lambda name=name: create(name))  # shapes, and no memory
    a_token = cache.bytes_per_page / cache.page_size
    bits[name] = 8 * a_token / numbers
    print(f"{name:9} {a_token:6,.0f} bytes a token, {bits[name]:4.1f} bits a number")
assert bits["f32"] == 32 and bits["q8_0"] == 8.5 and bits["q4_0"] == 4.5

# %% [markdown]
# ## How far predictions move
#
# The same text, source code of this library, goes through the model with a cache of every format. `KLD` is the
# Kullback-Leibler divergence of each prediction from the one of f32, in nats, and the column behind it the share of
# positions at which both find the same token likeliest. The first half of each sequence is context and is not counted.

# %%
text = loaded.tokenizer.encode(inspect.getsource(jaxpaged.cache.paged))
texts = jnp.array(text[: SEQUENCES * LENGTH]).reshape(SEQUENCES, LENGTH)


@jax.jit
def predict(params, cache):
    """Log-probabilities [S, T / 2, V] in the second halves of the texts."""
    lengths = jnp.full(SEQUENCES, LENGTH)
    cache, batch, ok = jaxpaged.reserve(cache, lengths, num_tokens=texts.size)
    rows = jnp.arange(texts.size).reshape(texts.shape)[:, LENGTH // 2 :].ravel()
    logits, cache = loaded.function(params, texts.ravel(), cache, batch, rows)
    return jax.nn.log_softmax(logits.astype(jnp.float32)), ok


def divergence(name, hadamard=None):
    """Mean KLD, its standard error, and the share of equal likeliest tokens."""
    logprobs, ok = predict(loaded.params, create(name, hadamard))
    assert ok
    kld = (jnp.exp(exact) * (exact - logprobs)).sum(-1)
    same = (exact.argmax(-1) == logprobs.argmax(-1)).mean()
    return float(kld.mean()), float(kld.std() / kld.size**0.5), float(same)


exact, ok = predict(loaded.params, create("f32"))
assert ok
found = {name: divergence(name) for name in NAMES[1:]}
plain = {name: divergence(name, hadamard=False) for name in ("q4_0", "kivi2")}
for name, (kld, error, same) in found.items():
    print(f"{name:9} KLD {kld:.1e} ± {error:.0e}, same token {same:6.1%}")
for name, (kld, error, same) in plain.items():
    print(
        f"{name:9} KLD {kld:.1e} ± {error:.0e}, same token {same:6.1%}, without Hadamard transform"
    )
klds = [found[name][0] for name in ("f16", "q8_0", "q5_1", "q4_0", "kivi2")]
assert klds == sorted(klds)
assert found["q8_0"][0] < 1e-3

# %% tags=["remove-input"]
figure, axis = plt.subplots(figsize=(6.4, 3.9))
styles = {
    "f16": ("#7d8590", "s"),
    "fp8_e4m3": ("#7d8590", "s"),
    "q4_k": ("#009e73", "D"),
    "kivi2": ("#009e73", "D"),
}
for name, (kld, *_) in found.items():
    colour, marker = styles.get(name, ("#0072b2", "o"))
    axis.plot(bits[name], kld, marker, color=colour, ms=8)
    left = name in ("f16", "q4_k")
    axis.annotate(
        name,
        (bits[name], kld),
        (-10 if left else 10, -10 if name == "q4_k" else -4),
        textcoords="offset points",
        ha="right" if left else "left",
    )
for name, (kld, *_) in plain.items():
    axis.plot(bits[name], kld, "o", mfc="white", mec="#d55e00", ms=8, zorder=1)
for label, colour, marker in (
    ("plain numbers", "#7d8590", "s"),
    ("blocks of 32", "#0072b2", "o"),
    ("by page", "#009e73", "D"),
):
    axis.plot([], [], marker, color=colour, label=label)
axis.plot([], [], "o", mfc="white", mec="#d55e00", label="without Hadamard")
axis.set(
    yscale="log",
    xscale="log",
    xlabel="bits a number, scales included",
    ylabel="mean KLD, nats",
)
axis.set_xticks([3, 4, 5, 6, 8, 12, 16], [3, 4, 5, 6, 8, 12, 16])
axis.minorticks_off()
axis.set(
    xlim=(2.7, 18.5), title=f"Predictions moved, over {exact.shape[0]} tokens of Python"
)
axis.legend(loc="lower left", fontsize=10)
plt.show()

# %% [markdown]
# A bit less costs about four times the divergence. Formats for 4 bits or fewer transform rows before they quantize
# them. What that does is seen best on a key with an outlier.
#
# ## Outliers, and the Hadamard transform
#
# A block has one scale, set by its largest number. In many models a few channels of the keys are much larger than the
# others, and take the scale from all of them. The transform is a rotation: it spreads the large number over the head
# and leaves dot products as they are, so that queries, rotated likewise, find the same scores. Below is a key of the
# model's first layer, with one channel made eight times as large.

# %%
cache, batch, ok = jaxpaged.reserve(
    create("f32"), jnp.array([64] + [0] * (SEQUENCES - 1))
)
_, cache = loaded.function(loaded.params, texts[0, :64], cache, batch, jnp.array([63]))
keys, _ = cache.pages(0)
key = keys[0, 0, 20]  # page 0, KV head 0, slot 20
channel = int(abs(key).argmax())
key = key.at[channel].multiply(8)
transformed = hadamard_transform(key)
query = jax.random.normal(jax.random.key(0), key.shape)
np.testing.assert_allclose(
    query @ key, hadamard_transform(query) @ transformed, rtol=1e-3, atol=1e-3
)


def stored(row, hadamard):
    """The row as a page of q4_0 gives it back."""
    q4_0 = jaxpaged.PAGE_FORMATS["q4_0"].with_hadamard(hadamard)
    back = q4_0.decode(q4_0.encode(row))
    return hadamard_transform(back) if hadamard else back


errors = {hadamard: abs(stored(key, hadamard) - key) for hadamard in (False, True)}
rms = {
    hadamard: float(jnp.sqrt((error**2).mean())) for hadamard, error in errors.items()
}
print(f"root mean square error: {rms[False]:.3f} as it is, {rms[True]:.3f} transformed")
lost = int((stored(key, False) == 0).sum())
print(
    f"{lost} of {key.size} numbers became 0 as it is, {int((stored(key, True) == 0).sum())} transformed"
)

# %% tags=["remove-input"]
figure, axes = plt.subplots(2, 2, sharex=True, sharey="row", figsize=(6.4, 4.4))
for axis, row, title in zip(
    axes[0], (key, transformed), ("key", "key, transformed"), strict=True
):
    axis.bar(range(row.size), row, width=1, color="#0072b2")
    axis.set_title(title)
for axis, hadamard in zip(axes[1], (False, True), strict=True):
    axis.bar(range(key.size), errors[hadamard], width=1, color="#d55e00")
    axis.set_title(f"error of q4_0: {rms[hadamard]:.2f} rms", fontsize=11)
    axis.set_xlabel("channel")
axes[0, 0].set_ylabel("value")
axes[1, 0].set_ylabel("absolute error")
plt.show()

# %% [markdown]
# [Quantized pages](../guides/quantization.md) has the formats, larger measurements with their errors, and advice on
# which to choose.
