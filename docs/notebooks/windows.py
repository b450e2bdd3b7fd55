# %% [markdown]
# # Endless texts: windows and context shift
#
# A text that never ends needs memory that does. There are two ways. Layers that see a *window* of some tokens give
# pages back behind it, and models mix them with layers that see everything. A *context shift* makes room in a full
# context: it forgets the older half of what need not be kept and moves the rest down. This notebook draws the pages
# that each way holds as a text grows.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import SVG, display

import jaxpaged
from jaxpaged import ContextShift, GroupedKVCache, LayerGroup, PagedKVCache
from jaxpaged_model import load_model, tiny

plt.style.use("style.mplstyle")
PAGE, HEADS = 16, {"num_kv_heads": 1, "head_dim": 32}
ROPE = jaxpaged.Rope.create(10_000.0 ** -np.linspace(0, 1, 16, endpoint=False))

# %% [markdown]
# ## Layer groups
#
# Six layers as in Gemma 3: five see 96 tokens, one sees all of them. A group has a table and a pool of its own.
# `reserve` frees, before it allocates, what no further token sees; nobody else has to know. The cache that
# treats all layers alike keeps everything in every layer.

# %%
groups = [
    LayerGroup(layers=(5,), **HEADS),
    LayerGroup(layers=(0, 1, 2, 3, 4), window=96, **HEADS),
]
mixed = GroupedKVCache.create(
    groups, num_pages=32, max_seqs=1, page_size=PAGE, max_seq_len=512, step_tokens=1
)
full = PagedKVCache.create(
    num_layers=6, num_pages=32, max_seqs=1, page_size=PAGE, max_seq_len=512, **HEADS
)
print(mixed)
one_token = jax.jit(lambda cache: jaxpaged.reserve(cache, jnp.array([1]), num_tokens=1))
held = {"full": [], "window": [], "rest": []}
for _ in range(400):
    mixed, _, ok = one_token(mixed)
    full, _, also = one_token(full)
    assert ok and also
    rest, window = mixed.pages_used.tolist()
    held["full"].append(int(full.pages_used))
    held["window"].append(window)
    held["rest"].append(rest)
jaxpaged.check_invariants(mixed)
most = groups[1].pages_per_seq(512, PAGE)
assert max(held["window"]) <= most
print(
    f"400 tokens: {held['full'][-1]} pages in every layer, or {window} in five and {rest} in one"
)
display(SVG(jaxpaged.draw_page_map(mixed)))

# %% [markdown]
# ## Context shift
#
# The other way needs no windows in the model. `ContextShift` is llama.cpp's `--context-shift`: when the next token does
# not fit into `n_ctx` tokens, the first `n_keep` stay, half of the others go, and the rest moves down. By hand it
# is two operations on the table:

# %%
N_CTX, N_KEEP = 128, 12
shifting = PagedKVCache.create(
    num_layers=6,
    num_pages=32,
    max_seqs=1,
    page_size=PAGE,
    max_seq_len=512,
    rope=ROPE,
    **HEADS,
)


def shift(cache):
    """Makes room in a full context; no key moves."""
    discard = (N_CTX - N_KEEP) // 2
    cache, ok = jaxpaged.seq_remove(cache, 0, N_KEEP, N_KEEP + discard)
    cache, also = jaxpaged.seq_shift(cache, 0, N_KEEP + discard, -1, -discard)
    return cache, ok & also


held["shift"], shifts = [], []
for token in range(400):
    if jaxpaged.seq_length(shifting)[0] == N_CTX:
        shifting, ok = shift(shifting)
        assert ok
        shifts.append(token)
    shifting, _, ok = one_token(shifting)
    assert ok
    held["shift"].append(int(shifting.pages_used))
jaxpaged.check_invariants(shifting)
assert (
    max(held["shift"]) <= N_CTX // PAGE + 2
)  # both ends of what stays are inside a page
print(f"{len(shifts)} shifts; rotation offsets of the entries", end=" ")
print(shifting.table.rotation[0, : int(shifting.table.num_entries[0])])

# %% tags=["remove-input"]
tokens = np.arange(1, 401)
figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(6.4, 5.6))
upper.step(
    tokens, held["full"], where="post", color="#7d8590", label="layer that sees all"
)
upper.step(
    tokens,
    held["shift"],
    where="post",
    color="#d55e00",
    label=f"context shift at {N_CTX} tokens",
)
upper.step(
    tokens,
    held["window"],
    where="post",
    color="#0072b2",
    label="layer with a window of 96",
)
upper.set(ylabel="pages of one layer", title="Live pages of a text, 16 tokens each")
upper.set_ylim(0, 27)
upper.legend(loc="upper left", fontsize=10)
a_page = full.bytes_per_page / 6 / 1024
total = {
    "all six see everything": (6 * np.array(held["full"]), "#7d8590"),
    "five windows, one sees all": (
        5 * np.array(held["window"]) + held["rest"],
        "#0072b2",
    ),
    "context shift": (6 * np.array(held["shift"]), "#d55e00"),
}
for name, (pages, colour) in total.items():
    lower.step(tokens, a_page * pages, where="post", color=colour, label=name)
lower.set(xlabel="tokens of the text", ylabel="KiB", title="Memory of all six layers")
lower.set(ylim=(0, None), xlim=(0, 400))
lower.legend(loc="upper left", fontsize=10)
plt.show()

# %% [markdown]
# Grey grows for ever. The window's line is flat from 96 tokens on: the pages that the window reaches, which is one more
# where it begins inside a page. The context shift is a saw: at each tooth half of the context is forgotten.
#
# ## A chat without an end
#
# In `generate` a shift is an argument, and happens inside the compiled loop: here 600 tokens in a context of 128, on a
# pool of 10 pages of 16 tokens.

# %%
loaded = load_model(os.environ.get("MODEL", tiny.PATH))
cache = PagedKVCache.create(
    **loaded.config.cache_spec, num_pages=10, page_size=PAGE, max_seqs=1
)
prompt = loaded.tokenizer.encode(
    "class Stack:\n    def __init__(self):\n        self.items = []\n"
)
result, cache = jaxpaged.generate(
    loaded.function,
    loaded.params,
    cache,
    [prompt],
    max_new_tokens=600,
    sampling=jaxpaged.SamplingParams.create(1, temperature=0.8, seed=4),
    context_shift=ContextShift(n_ctx=N_CTX, n_keep=len(prompt)),
)
tokens = result.token_lists()[0]
assert len(tokens) == 600
assert result.finish_reason[0] == jaxpaged.FINISH_LENGTH
assert result.pages_peak <= 10
print(f"{len(tokens)} tokens, at most {result.pages_peak} pages; the end of the text:")
print(loaded.tokenizer.decode(tokens[-40:]))

# %% [markdown]
# [Context shift](../concepts/context_shift.md) says why no key has to move and what a shift does to the quality of a
# text, and [windows and layer groups](../concepts/windows.md) has the memory of Gemma 3.
