# %% [markdown]
# # Meshes of devices
#
# A cache over several devices has three axes. `data` gives each shard sequences and a pool of its own, `tensor` gives
# each device some of the KV heads, and `context` spreads the pages of one sequence over devices. This notebook makes
# eight devices of one CPU, which is how meshes are tested without hardware, generates on three meshes, and draws where
# keys and values are, from the arrays on each device.

# %%
import os

# Before jax is imported. On a machine with eight devices, leave it out.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import functools

import jax
import matplotlib.pyplot as plt
import numpy as np

import jaxpaged
from jaxpaged import PagedKVCache
from jaxpaged.sharding.context import ContextKVCache
from jaxpaged.sharding.mesh import make_mesh
from jaxpaged.sharding.specs import ShardedCache
from jaxpaged_model import load_model, tiny

plt.style.use("style.mplstyle")
assert len(jax.devices()) == 8

# %% [markdown]
# ## On one device
#
# Four prompts of different lengths, and what `generate` makes of them. `keep=True` leaves their pages in the cache.

# %%
loaded = load_model(tiny.PATH)
lines = "def read_lines(path):\n    lines = []\n    for line in open(path):\n        lines.append(line)\n"
texts = (
    "import os\n",
    3 * lines,
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
    lines,
)
prompts = [loaded.tokenizer.encode(text) for text in texts]
longest = 1
options = {"max_new_tokens": 16, "keep": True}
sizes = {"num_pages": 32, "page_size": 8, "dtype": "f32"}
cache = PagedKVCache.create(**loaded.config.cache_spec, max_seqs=4, **sizes)
result, cache = jaxpaged.generate(
    loaded.function, loaded.params, cache, prompts, **options
)
expected = result.token_lists()
print([len(prompt) for prompt in prompts], "tokens of prompts;", cache)

# %% [markdown]
# ## On a mesh
#
# The calls are the same. `load_model(mesh=...)` puts each device's part of the weights on it, and `ShardedCache.create`
# makes a cache on every device from a function that makes the cache of one. With a `context` axis that is a
# `ContextKVCache`. Random numbers depend on a row's seed and its position, and the tokens are those of one device.


# %%
def on_mesh(**axes):
    mesh = make_mesh(**axes)
    model = load_model(tiny.PATH, mesh=mesh)
    create = PagedKVCache.create
    if axes.get("context", 1) > 1:
        create = functools.partial(ContextKVCache.create, axis_size=axes["context"])
    create = functools.partial(
        create,
        **model.local_config.cache_spec,  # with the KV heads of one device
        max_seqs=4 // axes.get("data", 1),
        **sizes,
    )
    cache = ShardedCache.create(mesh, create, model.config.num_kv_heads)
    result, cache = jaxpaged.generate(
        model.function, model.params, cache, prompts, **options
    )
    assert result.token_lists() == expected
    return cache


caches = {
    "data=4, tensor=2": on_mesh(data=4, tensor=2),
    "context=4, tensor=2": on_mesh(context=4, tensor=2),
    "data=2, context=2, tensor=2": on_mesh(data=2, context=2, tensor=2),
}
for cache in caches.values():
    print(cache, "pages used", cache.pages_used)


# %% [markdown]
# ## Where keys and values are
#
# Pages are one global array, split over all devices. The next cell reads the part of each device, finds the slots that
# hold keys, and compares them with the block table of its data shard: page `p` of a table is on rank `p % C` of the C
# ranks along `context`.


# %%
def held(cache):
    """By mesh coordinates: for each page and KV head of the device, sequence, page number and tokens."""
    mesh, local, table = cache.mesh, cache.local, jax.device_get(cache.parts.table)
    ranks = mesh.shape["context"]
    on_device = {
        shard.device: shard.data for shard in cache.parts.k_pages.addressable_shards
    }
    found = {}
    for place in np.ndindex(mesh.devices.shape):
        data, rank, tensor = place
        pages = np.asarray(on_device[mesh.devices[place]])
        # Those of all layers, one layer after the other; the first layer says it all.
        pages = pages.reshape(local.num_layers, -1, *pages.shape[1:])[0]
        filled = (pages != 0).any(-1)  # [pages, KV heads, slots]
        found[place] = []
        for seq, entry in np.ndindex(table.pages.shape[1:]):
            page = int(table.pages[data, seq, entry])
            if entry >= table.num_entries[data, seq] or page % ranks != rank:
                continue
            tokens = int(table.num_tokens[data, seq, entry])
            assert (filled[page // ranks].sum(-1) == tokens).all()
            for head in range(filled.shape[1]):
                # Sequence i of the caller is number i // data of data shard i % data.
                owner = seq * mesh.shape["data"] + data
                whole_head = tensor * filled.shape[1] + head
                found[place].append((owner, page, page // ranks, whole_head, tokens))
    return found


where = {name: held(cache) for name, cache in caches.items()}
one, two = where["data=4, tensor=2"], where["context=4, tensor=2"]
# With a data axis a device has one sequence here; with a context axis every rank has pages of the longest.
assert all(len({owner for owner, *_ in pages}) == 1 for pages in one.values())
assert all(longest in {owner for owner, *_ in pages} for pages in two.values())
# The devices along tensor have the same pages, and different heads.
for found in where.values():
    for (data, rank, tensor), pages in found.items():
        others = found[data, rank, 1 - tensor]
        assert {page for _, page, *_ in pages} == {page for _, page, *_ in others}
        assert not {head for *_, head, _ in pages} & {head for *_, head, _ in others}

# %% tags=["remove-input"]
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00")


def draw(axis, cache, found):
    """Eight boxes, a device each: pages from left to right, a row a KV head."""
    heads, across = cache.num_kv_heads, 2
    columns = max(place for pages in found.values() for _, _, place, *_ in pages) + 1
    wide, high = columns + 1.4, heads + 1.5
    names = [name for name, size in cache.mesh.shape.items() if size > 1]
    for number, (place, pages) in enumerate(found.items()):
        x, y = number % across * wide, number // across * high
        box = (x - 0.15, y - 0.15), columns + 0.3, heads + 0.3
        axis.add_patch(plt.Rectangle(*box, fc="#f6f8fa", ec="#8c959f", lw=0.8))
        coordinates = dict(zip(cache.mesh.axis_names, place, strict=True))
        label = ", ".join(f"{name} {coordinates[name]}" for name in names)
        axis.text(x, y - 0.35, f"{number}: {label}", fontsize=10.5)
        for owner, page, column, head, tokens in pages:
            full = tokens / sizes["page_size"]
            axis.add_patch(
                plt.Rectangle(
                    (x + column + 0.05, y + head + 0.05), 0.9, 0.9, color="#e1e5ea"
                )
            )
            axis.add_patch(
                plt.Rectangle(
                    (x + column + 0.05, y + head + 0.95 - 0.9 * full),
                    0.9,
                    0.9 * full,
                    color=COLOURS[owner],
                )
            )
            axis.text(
                x + column + 0.5,
                y + head + 0.52,
                page,
                ha="center",
                va="center",
                fontsize=9.5,
                color="white" if full > 0.6 else "#222",
            )
        for head in range(heads):
            axis.text(
                x - 0.3,
                y + head + 0.5,
                f"h{head}",
                ha="right",
                va="center",
                fontsize=9.5,
                color="#57606a",
            )
    rows = len(found) // across
    axis.set(xlim=(-1, across * wide - 0.8), ylim=(rows * high - 0.9, -1.1))
    axis.axis("off")


for name, cache in caches.items():
    figure, axis = plt.subplots(figsize=(6.4, 4.7))
    draw(axis, cache, where[name])
    axis.set_title(f"{name}: pages and KV heads on eight devices")
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS],
        [f"sequence {i}" for i in range(4)],
        loc="outside lower center",
        ncols=4,
        fontsize=9.5,
    )
    plt.show()

# %% [markdown]
# Each box is a device, with its number and its place in the mesh. A cell is a page of one KV head, filled as far as it
# holds tokens; its number is the one in the table of its data shard, and its place the one in the device's array. With
# `data` every shard counts its own pages from 0. With `context` consecutive pages go to the ranks in turn, so that a
# sequence may use the memory of all of them.
#
# [Past one device](../guides/scaling.md) says which axis to choose, what is communicated, and how several hosts take
# part.
