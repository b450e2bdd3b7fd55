"""Laws of meshes and of what is stacked over them; and which collectives programs have: those that are written down."""

from __future__ import annotations

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import mesh_kit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.cache import interface, sharing
from jaxpaged.generation.api import generate
from jaxpaged.sharding.mesh import BatchSharding, MeshError, check_heads, make_mesh, parse_mesh
from jaxpaged.sharding.specs import BATCH, CACHE, PARAMS, REPLICATED, ShardedCache, over_mesh, put
from tpu_scripts.compile_check.hlo import contents_of

DATA, TENSOR, S, N, T = 2, 4, 3, 16, 8


def collectives(program, mesh) -> Counter[tuple[str, str]]:
    """Collectives of a compiled program, by kind and axes."""
    found = contents_of(program.as_text(), dict(mesh.shape)).collectives
    return Counter((one.kind, one.over) for one in found)


@pytest.fixture(scope="module")
def model():
    return mesh_kit.loaded("tiny", mesh_kit.mesh_of(DATA, TENSOR))


def compiled(function, sharded: ShardedCache, in_specs, out_specs, *arguments, donate: int = 0):
    return (
        jax.jit(over_mesh(function, in_specs, out_specs), donate_argnums=donate).lower(*arguments).compile()
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data=2,tensor=4", {"data": 2, "tensor": 4}),
        ("tensor=8", {"tensor": 8}),
        (" context = 2 ", {"context": 2}),
    ],
)
def test_a_mesh_is_written_as_axes_and_sizes(text: str, found: dict[str, int]):
    assert parse_mesh(text) == found


@pytest.mark.parametrize(
    "text", ["", "8", "data", "data=0", "data=-1", "data=2,data=2", "model=2", "data=2;tensor=4"]
)
def test_what_is_no_mesh_is_refused(text: str):
    with pytest.raises(MeshError, match="data=2,tensor=4"):
        parse_mesh(text)


def test_arrays_without_elements_go_through_a_program(model):
    """XLA of jax 0.11 ended the process on one that is an argument of a ``shard_map``."""
    sharded = mesh_kit.create_cache(model, S, N)
    rows = np.zeros((DATA, S, 0), np.int32)

    def function(cache, rows, same):
        assert (rows.shape, same["x"].shape) == ((S, 0), (0, 2))
        return cache, rows, rows.shape[0] + same["y"]

    program = jax.jit(over_mesh(function, (CACHE, BATCH, REPLICATED), (CACHE, BATCH, BATCH)))
    same = {"x": np.zeros((0, 2), np.float32), "y": np.arange(3), "none": None}
    _, rows, sums = program(sharded, put(model.mesh, rows), same)
    assert rows.shape == (DATA, S, 0)
    assert sums.tolist() == [[3, 4, 5]] * DATA


def test_the_repr_of_a_sharded_cache_shows_sizes_alone(model):
    text = repr(mesh_kit.create_cache(model, S, N))
    assert text.startswith("ShardedCache(PagedKVCache(") and text.endswith("on a mesh of data=2, tensor=4)")
    assert "Array" not in text and len(text) < 200


def test_a_mesh_takes_the_devices_that_it_needs():
    assert make_mesh(data=2, tensor=2).size == 4
    with pytest.raises(MeshError, match="mesh data=4,tensor=4 has 16 devices, and there are 8"):
        make_mesh(data=4, tensor=4)
    with pytest.raises(MeshError, match="tensor=0 must be at least 1"):
        make_mesh(tensor=0)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "allowed"),
    [(4, 2, "1, 2, 4"), (9, 3, "1, 3, 9"), (32, 8, "1, 2, 4, 8, 16, 32"), (12, 4, "1, 2, 4, 12")],
)
def test_heads_are_split_evenly_or_refused_with_the_allowed_sizes(q_heads: int, kv_heads: int, allowed: str):
    fitting = [int(size) for size in allowed.split(", ")]
    for size in range(1, q_heads + 2):
        if size in fitting:
            check_heads(q_heads, kv_heads, size)
        else:
            with pytest.raises(MeshError, match=f"allowed are {allowed}$"):
                check_heads(q_heads, kv_heads, size)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8))
def test_sharded_rows_are_gathered_in_order(shards: int, prompts: int, samples: int):
    mesh = type("Mesh", (), {"shape": {"data": shards}})
    sharding = BatchSharding.of(mesh, prompts, samples)
    padded = prompts if sharding.split_samples else -(-prompts // shards) * shards
    rows = np.arange(padded * samples)
    sharded = sharding.shard_rows(rows)
    assert sharded.shape == (shards, len(rows) // shards)
    np.testing.assert_array_equal(sharding.gather_rows(sharded), rows)
    # Each shard's rows are samples of the prompts that it has, in their order.
    owned = sharding.shard_prompts(np.arange(padded))
    for d in range(shards):
        of_prompt = sharded[d] // samples
        np.testing.assert_array_equal(of_prompt, np.repeat(owned[d], sharding.samples_per_shard))
    assert sharding.prompts_per_shard(prompts).sum() == (
        prompts * shards if sharding.split_samples else prompts
    )


def test_edits_of_tables_communicate_nothing(model):
    """``reserve`` and every operation on sequences, of the cache and of the engine."""
    sharded = mesh_kit.create_cache(model, S, N)
    counts, marked = np.zeros((DATA, S), np.int32), np.zeros((DATA, S), bool)
    pages = np.zeros((DATA, 4), np.int32)
    one = np.int32(0)
    programs = {
        "reserve": (lambda c, n: c.reserve(n, num_tokens=T), (BATCH,), (CACHE, BATCH, BATCH), (counts,)),
        "can_reserve_each": (lambda c, n: (c, c.can_reserve_each(n)), (BATCH,), (CACHE, BATCH), (counts,)),
        "seq_remove": (interface.seq_remove, (BATCH, REPLICATED, REPLICATED), (CACHE, BATCH), (marked, one, one)),
        "seq_copy": (interface.seq_copy, (REPLICATED,) * 4, (CACHE, BATCH), (one, one, one, one)),
        "seq_keep": (interface.seq_keep, (REPLICATED,), (CACHE, BATCH), (one,)),
        "seq_shift": (interface.seq_shift, (REPLICATED,) * 4, (CACHE, BATCH), (one, one, one, one)),
        "seq_reorder": (interface.seq_reorder, (BATCH,), CACHE, (counts,)),
        "seq_drop_unseen": (lambda c: c.seq_drop_unseen(16), (), CACHE, ()),
        "pin": (sharing.pin_pages, (BATCH,), CACHE, (pages,)),
        "attach": (sharing.seq_attach, (BATCH, BATCH), (CACHE, BATCH), (np.zeros((DATA, S, N), np.int32), counts)),
        "clear": (interface.clear, (), CACHE, ()),
    }  # fmt: skip
    for name, (function, in_specs, out_specs, arguments) in programs.items():
        program = compiled(function, sharded, (CACHE, *in_specs), out_specs, sharded, *arguments)
        assert not collectives(program, model.mesh), name


@pytest.mark.parametrize("rows", [S, 16], ids=["decode", "prompt"])
def test_a_step_sums_twice_a_layer_and_communicates_nothing_else(model, rows: int):
    sharded = mesh_kit.create_cache(model, S, N)

    def step(params, cache, tokens, num_new):
        cache, batch, _ = cache.reserve(num_new, num_tokens=rows, max_new=1 if rows == S else rows)
        logits, cache = model.function(params, tokens, cache, batch, batch.last_rows)
        return cache, jnp.argmax(logits, -1)

    arguments = model.params, sharded, np.zeros((DATA, rows), np.int32), np.ones((DATA, S), np.int32)
    program = compiled(step, sharded, (PARAMS, CACHE, BATCH, BATCH), (CACHE, BATCH), *arguments, donate=1)
    # The devices of a data shard, and no others, are summed over; layers are a loop, whose body counts once.
    assert collectives(program, model.mesh) == {("all-reduce", "tensor"): 2}


def test_data_alone_needs_no_collective():
    model = mesh_kit.loaded("tiny", mesh_kit.mesh_of(4, 1))
    sharded = mesh_kit.create_cache(model, S, N)

    def step(params, cache, tokens, num_new):
        cache, batch, _ = cache.reserve(num_new, num_tokens=S, max_new=1)
        return cache, model.function(params, tokens, cache, batch, batch.last_rows)[0]

    arguments = model.params, sharded, np.zeros((4, S), np.int32), np.ones((4, S), np.int32)
    program = compiled(step, sharded, (PARAMS, CACHE, BATCH, BATCH), (CACHE, BATCH), *arguments, donate=1)
    assert collectives(program, model.mesh).keys() <= {("all-reduce", "")}  # sums over groups of one device


def test_the_pool_is_not_copied(model):
    """A step that is given a cache writes into its memory."""
    sharded = mesh_kit.create_cache(model, S, 512)

    def step(params, cache, tokens, num_new):
        cache, batch, _ = cache.reserve(num_new, num_tokens=S, max_new=1)
        return cache, model.function(params, tokens, cache, batch, batch.last_rows)[0]

    arguments = model.params, sharded, np.zeros((DATA, S), np.int32), np.ones((DATA, S), np.int32)
    program = compiled(step, sharded, (PARAMS, CACHE, BATCH, BATCH), (CACHE, BATCH), *arguments, donate=1)
    memory = program.memory_analysis()
    pool = sharded.local.bytes_per_page * sharded.local.num_pages
    assert memory.alias_size_in_bytes >= pool
    assert (
        memory.temp_size_in_bytes < 1.2 * pool
    )  # XLA's CPU client copies once where a kernel reads beside a write


def test_shards_have_tables_and_pools_of_their_own(model):
    sharded = mesh_kit.create_cache(model, S, N)
    assert (sharded.num_shards, sharded.max_seqs) == (DATA, DATA * S)
    reserve = jax.jit(
        over_mesh(partial(interface.reserve, num_tokens=T), (CACHE, BATCH), (CACHE, BATCH, BATCH))
    )
    wanted = np.asarray([[5, 0, 0], [1, 1, 1]], np.int32)
    after, _, ok = reserve(sharded, put(sharded.mesh, wanted))
    assert np.asarray(ok).all()
    np.testing.assert_array_equal(np.asarray(after.parts.table.num_tokens).sum(-1), wanted)
    np.testing.assert_array_equal(np.asarray(after.pages_used), [1, 3])
    # Devices along "tensor" have the same tables, and each the pages of its own heads.
    table = after.parts.table.pages
    assert {str(piece.index) for piece in table.addressable_shards} == {
        str((slice(d, d + 1), slice(None), slice(None))) for d in range(DATA)
    }
    pages = after.parts.k_pages
    pool = model.config.num_layers * N
    assert (
        pages.shape[0] == DATA * TENSOR * pool and len({str(p.index) for p in pages.addressable_shards}) == 8
    )


def test_a_pool_that_is_full_leaves_the_others_alone(model):
    """Nothing is lost where one shard's reserve fails."""
    sharded = mesh_kit.create_cache(model, S, 2)
    reserve = jax.jit(
        over_mesh(partial(interface.reserve, num_tokens=32), (CACHE, BATCH), (CACHE, BATCH, BATCH))
    )
    after, _, ok = reserve(sharded, put(sharded.mesh, np.asarray([[20, 0, 0], [8, 0, 0]], np.int32)))
    np.testing.assert_array_equal(np.asarray(ok), [False, True])
    np.testing.assert_array_equal(np.asarray(after.pages_used), [0, 1])


def test_bad_requests_are_refused_before_anything_runs(model):
    sharded = mesh_kit.create_cache(model, 1, N)
    with pytest.raises(ValueError, match="n must be 1 to 1"):
        generate(model.function, model.params, sharded, [[1]] * 3, n=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="keep needs a sequence for each of 2 rows"):
        generate(model.function, model.params, sharded, [[1]] * 3, keep=True, max_new_tokens=4)
