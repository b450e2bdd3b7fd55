# %% [markdown]
# # Pages, block tables and sharing
#
# A KV cache that gives each sequence one contiguous block has to guess how long the sequence will become. A paged
# cache does not guess: memory is a pool of pages of a few tokens each, and a *block table* says which pages a sequence
# has. This notebook does one operation at a time and draws the pool after each. The pictures are drawn from the real
# cache, nothing else.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import SVG, display

import jaxpaged

plt.style.use("style.mplstyle")

cache = jaxpaged.PagedKVCache.create(
    num_layers=2,
    num_kv_heads=2,
    head_dim=64,
    num_pages=16,
    page_size=8,
    max_seqs=4,
    max_seq_len=128,
    rope=jaxpaged.Rope.create(10_000.0 ** -np.linspace(0, 1, 32, endpoint=False)),
)
print(cache)
print(
    f"{cache.bytes_per_page:,} bytes a page, {cache.bytes_per_page * cache.num_pages:,} bytes in all"
)


def show(cache):
    jaxpaged.check_invariants(
        cache
    )  # counts, free pages and tables agree; raises otherwise
    display(SVG(jaxpaged.draw_page_map(cache)))


# %% [markdown]
# ## Reserve
#
# `reserve` makes room for the tokens of a step: how many each sequence gets is the argument. Here sequence 0 gets 20
# tokens and sequence 1 gets 5. Both take whole pages, so at most one page a sequence is partly empty. A cell below is
# a page; it is filled as far as its slots hold tokens.

# %%
cache, batch, ok = jaxpaged.reserve(cache, jnp.array([20, 5, 0, 0]))
assert ok
print("lengths", jaxpaged.seq_length(cache), "pages in use", cache.pages_used)
show(cache)

# %% [markdown]
# The block table has an entry a page. An entry says which page it is, which slots of it belong to the sequence, and
# the position of the first of these tokens.


# %%
def entries(cache, sequence):
    table = cache.table
    for e in range(int(table.num_entries[sequence])):
        page, slot, count, position = (
            int(field[sequence, e])
            for field in (
                table.pages,
                table.first_slot,
                table.num_tokens,
                table.position,
            )
        )
        print(
            f"  positions {position:2}-{position + count - 1:2} on page {page:2}, slots {slot}-{slot + count - 1}"
        )


print("sequence 0")
entries(cache, 0)

# %% [markdown]
# The pool is all that fails. When there are not enough pages, `ok` is false and nothing has changed; host code that
# prefers an exception calls `reserve_or_raise`.

# %%
same, _, ok = jaxpaged.reserve(cache, jnp.array([0, 0, 125, 0]))
assert not ok and same.pages_used == cache.pages_used
try:
    jaxpaged.reserve_or_raise(cache, jnp.array([0, 0, 125, 0]))
except jaxpaged.OutOfPages as error:
    print(error)

# %% [markdown]
# ## Fork
#
# `seq_copy` gives sequence 2 everything that sequence 0 has, and 3 as well. No key or value is copied: three rows of
# the table name the same pages, and the number in a cell is the page's reference count. This is how samples of one
# prompt, beams, and prompts with a common beginning share memory.

# %%
before = cache.pages_used
for fork in (2, 3):
    cache, ok = jaxpaged.seq_copy(cache, 0, fork)
    assert ok
assert cache.pages_used == before  # 40 tokens more, no page more
show(cache)

# %% [markdown]
# ## Copy on write
#
# Now sequences 0, 2 and 3 go on with 3 tokens each. The full pages stay shared. The last page is partly empty, and
# each of the three wants to write to it: two of them get a copy first, the third keeps the original.

# %%
cache, batch, ok = jaxpaged.reserve(cache, jnp.array([3, 0, 3, 3]))
assert ok and cache.pages_used == before + 2
show(cache)

# %% [markdown]
# ## Remove
#
# Any range of tokens can go, aligned to pages or not. Positions 6 to 17 of sequence 3 end: one page is not needed by
# this sequence any more, two are needed in part. What others still use stays where it is.

# %%
cache, ok = jaxpaged.seq_remove(cache, 3, 6, 18)
assert ok
print("sequence 3")
entries(cache, 3)
show(cache)

# %% [markdown]
# ## Shift
#
# The hole is closed by lowering the positions behind it. Keys are stored rotated by their position (RoPE), and a
# shift rotates none of them: the entry remembers by how much its keys are off, and attention rotates the *query* by
# that difference. So a shift costs the same on a hundred tokens and on a hundred thousand, and other sequences that
# share a page do not notice. The picture is therefore the same as before.

# %%
cache, ok = jaxpaged.seq_shift(cache, 3, 18, -1, -12)
assert ok
print("sequence 3")
entries(cache, 3)
print("rotation offsets", cache.table.rotation[3, : int(cache.table.num_entries[3])])
assert jaxpaged.seq_position_max(cache)[3] + 1 == jaxpaged.seq_length(cache)[3] == 11

# %% [markdown]
# Freeing a sequence is `seq_remove` without a range. Pages whose count falls to zero are free at once.

# %%
for sequence in (0, 2):
    cache, ok = jaxpaged.seq_remove(cache, sequence)
show(cache)

# %% [markdown]
# ## What it saves
#
# 32 sequences with lengths like those of chats (most short, a few long), each of which may have 2,048 tokens. The
# contiguous cache sets all of that aside. The paged one has what is used, rounded up to pages: the
# numbers are those of two real caches.

# %%
rng = np.random.default_rng(0)
lengths = np.minimum(rng.lognormal(5.5, 1.0, 32), 2048).astype(np.int32)
sizes = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64, "max_seqs": 32}
paged = jaxpaged.PagedKVCache.create(
    **sizes, num_pages=2048, page_size=16, max_seq_len=2048
)
contiguous = jaxpaged.ContiguousKVCache.create(**sizes, max_length=2048)

paged, _, ok = jaxpaged.reserve(paged, jnp.asarray(lengths))
contiguous, _, also = jaxpaged.reserve(contiguous, jnp.asarray(lengths))
assert (
    ok
    and also
    and (jaxpaged.seq_length(paged) == jaxpaged.seq_length(contiguous)).all()
)

a_token = paged.bytes_per_page / paged.page_size
used = int(paged.pages_used) * paged.bytes_per_page
aside = sum(pool.nbytes for pool in (contiguous.k, contiguous.v))
live = int(lengths.sum()) * a_token
print(f"live tokens      {live / 2**20:6.1f} MiB")
print(f"paged            {used / 2**20:6.1f} MiB, {1 - live / used:.1%} of it empty")
print(f"contiguous       {aside / 2**20:6.1f} MiB, {1 - live / aside:.1%} of it empty")
assert used - live < 32 * paged.bytes_per_page  # less than a page a sequence

# %% tags=["remove-input"]
order = np.argsort(lengths)
held = np.asarray(paged.table.num_entries)[order] * paged.page_size
whole = f"contiguous: {aside / 2**20:.0f} MiB set aside"
in_pages, in_use = (
    f"paged: {used / 2**20:.1f} MiB",
    f"live tokens: {live / 2**20:.1f} MiB",
)
figure, axis = plt.subplots()
axis.bar(range(32), [2048] * 32, width=1, color="#e7ebf0", label=whole)
axis.bar(range(32), held, width=1, color="#e69f00", label=in_pages)
axis.bar(range(32), lengths[order], width=1, color="#0072b2", label=in_use)
axis.set(
    xlabel="sequence, shortest first",
    ylabel="tokens",
    xlim=(-0.5, 31.5),
    ylim=(0, 2048),
)
axis.set_title("Memory of 32 sequences of up to 2,048 tokens")
axis.grid(False)
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# The thin orange edge is all that paging wastes. [Sequences](../guides/sequences.md) lists the operations beside
# llama.cpp's, and [your model on this cache](../guides/your_model.md) how a model attends to pages.
