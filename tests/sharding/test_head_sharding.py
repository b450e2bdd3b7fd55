"""Laws of pages whose KV heads are split over a mesh axis, in models that are not ours."""

from __future__ import annotations

import collections
import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpaged import (
    Lookup,
    PagedKVCache,
    Request,
    SamplingParams,
    beam_search,
    check_invariants,
    generate,
    reserve,
    run,
    score,
    seq_copy,
    seq_defragment,
)
from jaxpaged.cache.sharing import read_pages, write_pages
from jaxpaged.generation.api import run_donating

VOCAB, HIDDEN, INNER, HEAD_DIM, LAYERS = 97, 32, 64, 8, 3
Q_HEADS = 16
PROMPTS = [[1, 2, 3, 4], np.random.default_rng(1).integers(0, VOCAB, 13).tolist(), [7]]
NEW = 12


def mesh_of(size: int, kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((size,), ("model",), axis_types=(kind,), devices=jax.devices()[:size])


def create(kv_heads: int, mesh: Mesh | None = None, **options: Any) -> PagedKVCache:
    sharding = None if mesh is None else NamedSharding(mesh, P(None, "model"))
    sizes = {"num_layers": LAYERS, "num_kv_heads": kv_heads, "head_dim": HEAD_DIM, "num_pages": 24}
    return PagedKVCache.create(**sizes, page_size=8, max_seqs=4, sharding=sharding, **options)


# --- a model in plain JAX, and one in Flax NNX -----------------------------------------------------------

SPECS = {
    "embedding": P(),
    "q": P(None, None, "model"),
    "k": P(None, None, "model"),
    "v": P(None, None, "model"),
    "out": P(None, "model"),
    "up": P(None, None, "model"),
    "down": P(None, "model"),
    "head": P(),
}


def weights(kv_heads: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (VOCAB, HIDDEN),
        "q": (LAYERS, HIDDEN, Q_HEADS, HEAD_DIM),
        "k": (LAYERS, HIDDEN, kv_heads, HEAD_DIM),
        "v": (LAYERS, HIDDEN, kv_heads, HEAD_DIM),
        "out": (LAYERS, Q_HEADS, HEAD_DIM, HIDDEN),
        "up": (LAYERS, HIDDEN, INNER),
        "down": (LAYERS, INNER, HIDDEN),
        "head": (HIDDEN, VOCAB),
    }
    return {name: jnp.asarray(rng.normal(size=shape) * 0.15, jnp.float32) for name, shape in shapes.items()}


def split(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Weights on the mesh; keys and values of fewer heads than devices are on all."""

    def place(name: str, x: Any) -> Any:
        few = name in ("k", "v") and x.shape[2] % mesh.size
        return jax.device_put(x, NamedSharding(mesh, P() if few else SPECS[name]))

    return {name: place(name, x) for name, x in params.items()}


def plain(params: Any, tokens: Any, cache: Any, batch: Any, rows: Any) -> Any:
    """Pre-norm-free transformer; the sums over devices are XLA's, or named where axes are explicit."""
    explicit = not jax.sharding.get_abstract_mesh().empty
    summed: dict[str, Any] = {"out_sharding": P()} if explicit else {}
    x = params["embedding"].at[tokens].get(**summed)

    def layer(carry: Any, index: Any) -> Any:
        x, cache = carry
        w = {name: params[name][index] for name in ("q", "k", "v", "out", "up", "down")}
        q, k, v = (jnp.einsum("td,dhe->the", x, w[name]) for name in ("q", "k", "v"))
        out, cache = cache.attend(index, q, k, v, batch)
        x = x + jnp.einsum("the,hed->td", out, w["out"], **summed)
        x = x + jnp.einsum("tf,fd->td", jax.nn.relu(x @ w["up"]), w["down"], **summed)
        return (x, cache), None

    (x, cache), _ = jax.lax.scan(layer, (x, cache), jnp.arange(LAYERS))
    return x.at[rows].get(**summed) @ params["head"], cache


class Block(nnx.Module):
    def __init__(self, kv_heads: int, rngs: nnx.Rngs) -> None:
        def linear(dim_in: int, dim_out: int, *axes: Any) -> nnx.Linear:
            init = nnx.with_partitioning(nnx.initializers.normal(0.15), axes)
            return nnx.Linear(dim_in, dim_out, use_bias=False, kernel_init=init, rngs=rngs)

        self.q = linear(HIDDEN, Q_HEADS * HEAD_DIM, None, "model")
        self.k, self.v = (linear(HIDDEN, kv_heads * HEAD_DIM, None, "model") for _ in range(2))
        self.out = linear(Q_HEADS * HEAD_DIM, HIDDEN, "model", None)
        self.up, self.down = linear(HIDDEN, INNER, None, "model"), linear(INNER, HIDDEN, "model", None)

    def __call__(self, layer: int, x: Any, cache: Any, batch: Any) -> Any:
        q, k, v = (each(x).reshape(x.shape[0], -1, HEAD_DIM) for each in (self.q, self.k, self.v))
        out, cache = cache.attend(layer, q, k, v, batch)
        x = x + self.out(out.reshape(x.shape[0], -1))
        return x + self.down(jax.nn.relu(self.up(x))), cache


class Transformer(nnx.Module):
    def __init__(self, kv_heads: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([Block(kv_heads, rngs) for _ in range(LAYERS)])

    def __call__(self, tokens: Any, cache: Any, batch: Any, rows: Any) -> Any:
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x, cache = block(layer, x, cache, batch)
        return self.embed.attend(x[rows]), cache


@functools.cache
def flax_model(kv_heads: int) -> tuple[Callable[..., Any], Any, Any]:
    """``(model, params, specs)``: layers in a Python loop, and weights with Flax's own annotations."""
    with nnx.use_eager_sharding(False):  # weights are put on a mesh later
        graph, params = nnx.split(Transformer(kv_heads, nnx.Rngs(0)))

    def model(params: Any, *arguments: Any) -> Any:
        return nnx.merge(graph, params)(*arguments)

    return model, params, nnx.get_partition_spec(params)


def models(kv_heads: int, mesh: Mesh | None) -> dict[str, tuple[Any, Any]]:
    model, params, specs = flax_model(kv_heads)
    own = weights(kv_heads)
    if mesh is not None:
        own = split(own, mesh)
        params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
    return {"plain": (plain, own), "flax": (model, params)}


# --- laws ------------------------------------------------------------------------------------------------


def texts(result: Any) -> list[list[int]]:
    counts = np.asarray(result.num_tokens)
    return [row[:n].tolist() for row, n in zip(np.asarray(result.tokens), counts, strict=True)][
        : len(PROMPTS)
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("flax", {}),
        ("plain", {"lookup": Lookup(3)}),
        ("plain", {"dtype": "q8_0", "page_size": 32}),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_one_device(name: str, options: dict[str, Any]) -> None:
    options, mesh = dict(options), mesh_of(8)
    lookup = options.pop("lookup", None)
    sampling = SamplingParams.create(3, temperature=0.6, seed=2)
    results = []
    for here in (None, mesh):
        model, params = models(8, here)[name]
        sizes: dict[str, Any] = {
            "num_layers": LAYERS,
            "num_kv_heads": 8,
            "head_dim": 32 if options else HEAD_DIM,
        }
        if options and name == "flax":
            pytest.skip("one model with quantized pages is enough")
        if options:
            params = wide(params, here)
        sharding = None if here is None else NamedSharding(here, P(None, "model"))
        cache = PagedKVCache.create(
            **sizes, num_pages=24, max_seqs=4, sharding=sharding, **{"page_size": 8, **options}
        )
        result, cache = generate(
            model, params, cache, PROMPTS, max_new_tokens=NEW, sampling=sampling, lookup=lookup, logprobs=0
        )
        check_invariants(cache)
        results.append(result)
    assert texts(results[0]) == texts(results[1])
    np.testing.assert_allclose(results[0].logprobs, results[1].logprobs, atol=1e-4)


def wide(params: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Weights with heads of 32 dimensions, which quantized pages need."""
    whole = weights(8)
    more = {name: jnp.tile(whole[name], 4) for name in ("q", "k", "v")}
    more |= {"out": jnp.tile(whole["out"], (1, 1, 4, 1)) / 4}
    return {**params, **(more if mesh is None else split(more, mesh))}


def test_explicit_axes_say_where_heads_are() -> None:
    """No ``sharding=``: it is part of the pages' type."""
    model, params = models(8, None)["plain"]
    expected, _ = generate(model, params, create(8), PROMPTS, max_new_tokens=NEW)
    mesh = mesh_of(8, AxisType.Explicit)
    with jax.set_mesh(mesh):
        empty = create(8)
        cache = jax.device_put(empty, shardings(empty, mesh))
        result, cache = generate(plain, split(weights(8), mesh), cache, PROMPTS, max_new_tokens=NEW, n=1)
        assert texts(result) == texts(expected)
        check_invariants(cache)
        assert cache.k_pages.sharding.spec[1] == "model"


def shardings(cache: PagedKVCache, mesh: Mesh) -> Any:
    specs = cache.partition_specs("model")
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: NamedSharding(mesh, spec), part),
        specs,
        cache,
        is_leaf=lambda x: isinstance(x, P),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fewer_heads_than_devices_are_replicated(kv_heads: int) -> None:
    model, params = models(kv_heads, None)["plain"]
    expected, _ = generate(model, params, create(kv_heads), PROMPTS, max_new_tokens=NEW)
    mesh = mesh_of(8)
    cache = create(kv_heads, mesh)
    assert cache.k_pages.addressable_shards[0].data.shape[1] == 1
    result, cache = generate(plain, split(weights(kv_heads), mesh), cache, PROMPTS, max_new_tokens=NEW)
    assert texts(result) == texts(expected)


def test_samples_fork_and_beams_search_as_on_one_device() -> None:
    mesh, found = mesh_of(4), []
    for here in (None, mesh):
        model, params = models(4, here)["plain"]
        hot = SamplingParams.create(4, temperature=1.5, seed=3)
        samples, cache = generate(
            model, params, create(4, here), PROMPTS[1:2], max_new_tokens=NEW, n=4, sampling=hot
        )
        check_invariants(cache)
        beams, _ = beam_search(model, params, cache, PROMPTS[1:2], num_beams=4, max_new_tokens=6)
        found.append((np.asarray(samples.tokens)[:, :NEW].tolist(), np.asarray(beams.tokens)[0].tolist()))
    assert found[0] == found[1]


def test_inside_a_shard_map_of_the_caller_pages_are_a_devices_own() -> None:
    """The caller's ``shard_map`` over the axis: specs of the cache as ``in_specs``."""
    mesh = mesh_of(4)
    params, cache = weights(4), create(4, mesh)
    expected, _ = generate(plain, params, create(4), PROMPTS, max_new_tokens=NEW)

    def model(params: Any, tokens: Any, cache: Any, batch: Any, rows: Any) -> Any:
        x = params["embedding"][tokens]
        for layer in range(LAYERS):
            w = {name: params[name][layer] for name in ("q", "k", "v", "out", "up", "down")}
            q, k, v = (jnp.einsum("td,dhe->the", x, w[name]) for name in ("q", "k", "v"))
            out, cache = cache.attend(layer, q, k, v, batch)
            x = x + jax.lax.psum(jnp.einsum("the,hed->td", out, w["out"]), "model")
            x = x + jax.lax.psum(jax.nn.relu(x @ w["up"]) @ w["down"], "model")
        return x[rows] @ params["head"], cache

    specs = cache.partition_specs()
    request = Request.create(cache, PROMPTS, max_new_tokens=NEW)
    program = jax.shard_map(
        functools.partial(run, model),
        mesh=mesh,
        in_specs=(SPECS, specs, P()),
        out_specs=(P(), specs),
        check_vma=False,
    )
    result, cache = jax.jit(program)(split(params, mesh), cache, request)
    assert texts(result) == texts(expected)
    check_invariants(cache)


COLLECTIVE = re.compile(
    r" = \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("plain", AxisType.Auto), ("flax", AxisType.Auto), ("plain", AxisType.Explicit)],
    ids=str,  # nnx.Linear names no sharding of its sums, which explicit axes need
)
def test_a_layer_has_two_sums_and_no_other_collective(name: str, kind: AxisType) -> None:
    mesh = mesh_of(8, kind)
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        model, params = models(8, mesh)[name]
        if kind == AxisType.Explicit:
            empty = create(8)
            cache = jax.device_put(empty, shardings(empty, mesh))
        else:
            cache = create(8, mesh)
        request = Request.create(cache, PROMPTS, max_new_tokens=NEW)
        compiled = run_donating("cpu").lower(model, params, cache, request).compile()
    found = collections.Counter(COLLECTIVE.findall(compiled.as_text()))
    layers = 1 if name == "plain" else LAYERS  # in a scan, or in a Python loop
    # The model is in the program twice: for prompts and for decoding.
    assert found == {"all-reduce": 2 * 2 * layers}
    memory = compiled.memory_analysis()
    pool = (cache.k_pages.nbytes + cache.v_pages.nbytes) // mesh.size
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < 2**20


def test_scores_and_page_operations_are_those_of_one_device() -> None:
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, VOCAB, (2, 21)))
    mesh, found = mesh_of(4), []
    for here in (None, mesh):
        model, params = models(4, here)["plain"]
        logprobs, cache = jax.jit(functools.partial(score, model, keep=True))(params, create(4, here), tokens)
        cache, _ = seq_copy(cache, 0, 2)
        cache, _, _ = reserve(cache, jnp.asarray([3, 0, 5, 0]), num_tokens=8)
        cache, ok = seq_defragment(cache.seq_remove(1, 3, 9)[0], 1)
        assert bool(ok)
        data = read_pages(cache, jnp.asarray([0, 2]))
        cache = write_pages(cache, jnp.asarray([5, 6]), data)
        check_invariants(cache)
        found.append((logprobs, *data, cache.k_pages, cache.v_pages))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("kv_heads", "spec", "message"),
    [
        (6, P(None, "model"), "6 KV heads cannot be split over the 4 devices of mesh axis 'model'"),
        (4, P("model"), r"PartitionSpec\(None, axis\), got P.*\('model',?\)"),
        (4, P(None, None, "model"), r"PartitionSpec\(None, axis\), got"),
    ],
)
def test_what_cannot_be_split_is_named(kv_heads: int, spec: P, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedKVCache.create(
            num_layers=1, num_kv_heads=kv_heads, head_dim=8, num_pages=4, max_seqs=1,
            sharding=NamedSharding(mesh_of(4), spec),
        )  # fmt: skip


def test_rows_of_another_number_of_heads_are_named() -> None:
    cache = create(4, mesh_of(4))
    rows = jnp.zeros((1, 3, HEAD_DIM))
    cache, batch, _ = reserve(cache, jnp.asarray([1, 0, 0, 0]), num_tokens=1)
    with pytest.raises(
        ValueError, match=r"k must be \[tokens, num_kv_heads, head_dim\] = \(1, 4, 8\), got \(1, 3, 8\)"
    ):
        cache.attend(0, jnp.zeros((1, 16, HEAD_DIM)), rows, rows, batch)
