"""Laws of a context spread over devices: it is an ordinary paged cache, whichever device has which page."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxpaged import PagedKVCache, Rope, check_invariants
from jaxpaged.generation.api import beam_request
from jaxpaged.generation.loop import run as run_request
from jaxpaged.generation.request import ContextShift, Lookup, Request
from jaxpaged.sharding.context import ContextKVCache, _as_words, _from_words, context_specs

S, T, LAYERS, Q_HEADS, KV_HEADS, PAGE_SIZE, NUM_PAGES = 4, 24, 2, 4, 2, 8, 16
SINKS = jnp.asarray([1.5, -0.5, 0.0, 3.0], jnp.float32)
EVERYTHING = {"window": 11, "soft_cap": 2.0, "sinks": SINKS, "scale": 0.9}
VARIANTS: tuple[Mapping[str, Any], ...] = (
    {},
    {"window": 5},
    {"soft_cap": 1.5},
    {"sinks": SINKS},
    EVERYTHING,
)
NOTHING, REMOVE, COPY, SHIFT, REORDER = EDITS = range(5)
SAME = PartitionSpec()


def mesh_of(size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:size]), ("context",))


def sharded(function: Callable[..., Any], size: int, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.jit(
        jax.shard_map(function, mesh=mesh_of(size), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def create_spread(size: int, **sizes: Any) -> tuple[ContextKVCache, Any]:
    """An empty cache over ``size`` devices, and its specs."""
    create = functools.partial(ContextKVCache.create, axis_size=size, **sizes)
    specs = context_specs(jax.eval_shape(create))
    return sharded(create, size, (), specs)(), specs


def rope_of(head_dim: int) -> Rope:
    return Rope.create(100.0 ** (-np.arange(0, head_dim, 2) / head_dim))


def with_nan(cache: Any) -> Any:
    """The cache with pages of NaN, so that what is read before it is written shows."""

    def filled(pages: Any) -> Any:
        return jax.tree.map(
            lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, pages
        )

    return replace(cache, k_pages=filled(cache.k_pages), v_pages=filled(cache.v_pages))


def act(
    variants: tuple[Mapping[str, Any], ...],
    edits: Collection[int],
    rope: Rope,
    cache: Any,
    kind: jax.Array,
    edit: dict[str, jax.Array],
    num_new: jax.Array,
    rows: dict[str, jax.Array],
) -> tuple[Any, ...]:
    """One edit of sequences, then a step: its tokens are written in every layer, and attend once in every variant.

    Of ``EDITS`` those not in ``edits`` are none, for a program that is compiled sooner.
    """
    ok = jnp.bool_(True)
    seq, other, p0, p1 = (edit[name] for name in ("seq", "other", "p0", "p1"))
    possible: dict[int, Callable[[Any], Any]] = {
        NOTHING: lambda c: (c, ok),
        REMOVE: lambda c: c.seq_remove(seq, p0, p1),
        COPY: lambda c: c.seq_copy(seq, other, p0, p1),
        SHIFT: lambda c: c.seq_shift(seq, p0, p1, edit["delta"]),
        REORDER: lambda c: (c.seq_reorder(edit["source"]), ok),
    }
    branches = [possible[i if i in edits else NOTHING] for i in EDITS]
    cache, edited = jax.lax.switch(kind, branches, cache)
    fits = cache.can_reserve_each(num_new)
    cache, batch, reserved = cache.reserve(num_new, num_tokens=T)
    q, k = (rope.rotate(rows[name], batch.rope_positions) for name in ("q", "k"))
    outs = []
    for i in range(max(cache.num_layers, len(variants))):
        layer, variant = i % cache.num_layers, variants[i % len(variants)]
        out, cache = cache.attend(layer, q, (1 + layer) * k, rows["v"] - layer, batch, **variant)
        outs.append(out)
    return cache, batch, jnp.stack(outs), {"edited": edited, "reserved": reserved, "can_reserve_each": fits}


@dataclass(repr=False)
class Twins:
    """The same operations on a cache of one device and on one that is spread over several, compared after each."""

    size: int
    plain: Any
    spread: Any
    specs: Any
    act_plain: Callable[..., Any]
    act_spread: Callable[..., Any]
    head_dim: int
    tolerance: float
    rng: np.random.Generator
    seen: collections.Counter[str]
    start: tuple[Any, Any]

    @classmethod
    def create(
        cls,
        size: int,
        *,
        variants: tuple[Mapping[str, Any], ...] = VARIANTS,
        edits: Collection[int] = EDITS,
        run_plain: Callable[..., Any] | None = None,
        head_dim: int = 8,
        tolerance: float = 1e-5,
        **sizes: Any,
    ) -> Twins:
        sizes = {
            "num_layers": LAYERS,
            "num_kv_heads": KV_HEADS,
            "head_dim": head_dim,
            "num_pages": NUM_PAGES,
            "max_seqs": S,
            "page_size": PAGE_SIZE,
            "rope": rope_of(head_dim),
            **sizes,
        }
        plain = with_nan(PagedKVCache.create(**sizes))
        spread, specs = create_spread(size, **sizes)
        spread = with_nan(spread)
        run = functools.partial(act, variants, edits, rope_of(head_dim))
        return cls(
            size,
            plain,
            spread,
            specs,
            run_plain or jax.jit(run),
            sharded(run, size, (specs, *[SAME] * 4), (specs, *[SAME] * 3)),
            head_dim,
            tolerance,
            np.random.default_rng(0),
            collections.Counter(),
            (plain, spread),
        )

    def reset(self) -> None:
        self.plain, self.spread = self.start
        self.rng = np.random.default_rng(0)
        self.seen.clear()

    def step(self, num_new: list[int], kind: int = NOTHING, **edit: Any) -> dict[str, np.ndarray]:
        """Acts on both and compares all there is; returns what both said was possible."""
        integers = {"seq": 0, "other": 0, "p0": 0, "p1": -1, "delta": 0, "source": list(range(S)), **edit}
        shape = {"q": Q_HEADS, "k": KV_HEADS, "v": KV_HEADS}
        rows = {
            name: jnp.asarray(self.rng.normal(size=(T, heads, self.head_dim)), jnp.float32)
            for name, heads in shape.items()
        }
        arguments = (
            jnp.int32(kind),
            {name: jnp.asarray(value, jnp.int32) for name, value in integers.items()},
            jnp.asarray(num_new, jnp.int32),
            rows,
        )
        before = self.plain.table
        self.plain, batch, out, said = self.act_plain(self.plain, *arguments)
        self.spread, batch_spread, out_spread, said_spread = self.act_spread(self.spread, *arguments)
        # Metadata, batch and results: equal bit by bit.
        ours = (self.spread.allocator, self.spread.table, batch_spread, said_spread)
        theirs = (self.plain.allocator, self.plain.table, batch, said)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        check_invariants(self.spread)
        self.check_pages()
        self.check_local_tables()
        np.testing.assert_allclose(out_spread, out, rtol=self.tolerance, atol=self.tolerance)
        self.count(before, batch)
        return {name: np.asarray(value) for name, value in said.items()}

    def check_pages(self) -> None:
        """Every page, bit by bit, copied ones and what nobody reads among them."""
        page = np.arange(self.plain.num_pages)
        layer, each = np.arange(self.plain.num_layers)[:, None], len(page) // self.size
        # Of each rank, its pages of layer 0, then of layer 1.
        place = ((page % self.size * self.plain.num_layers + layer) * each + page // self.size).reshape(-1)
        for plain, spread in zip(
            jax.tree.leaves((self.plain.k_pages, self.plain.v_pages)),
            jax.tree.leaves((self.spread.k_pages, self.spread.v_pages)),
            strict=True,
        ):
            plain, spread = (np.array(pages).view(np.uint8) for pages in (plain, spread))
            np.testing.assert_array_equal(spread[place], plain)

    def check_local_tables(self) -> None:
        """Each rank has the entries of its pages, in order, and padding behind them."""
        table = jax.tree.map(np.asarray, self.plain.table)
        local = jax.tree.map(
            lambda x: np.asarray(x).reshape(self.size, S, *x.shape[1:]), self.spread.local_table
        )
        none = self.plain.num_pages // self.size
        names = ("pages", "first_slot", "num_tokens", "position", "rotation")
        for rank in range(self.size):
            for seq in range(S):
                used = int(table.num_entries[seq])
                mine = np.flatnonzero(table.pages[seq, :used] % self.size == rank)
                assert local.num_entries[rank, seq] == len(mine)
                for name in names:
                    kept = getattr(table, name)[seq, mine]
                    expected = np.full(table.max_pages_per_seq, none if name == "pages" else 0)
                    expected[: len(mine)] = kept // self.size if name == "pages" else kept
                    np.testing.assert_array_equal(getattr(local, name)[rank, seq], expected)
                self.seen["rank without a page"] += used > 0 and len(mine) == 0

    def count(self, before: Any, batch: Any) -> None:
        """Kind of a step, to prove that a test has met it."""
        after = self.plain.table
        for seq in np.flatnonzero(np.asarray(batch.q_lens)):
            used = int(before.num_entries[seq])
            if used and int(after.num_entries[seq]) >= used:
                old, new = int(before.pages[seq, used - 1]), int(after.pages[seq, used - 1])
                self.seen["copy to another rank"] += old != new and old % self.size != new % self.size
                self.seen["copy within a rank"] += old != new and old % self.size == new % self.size
        self.seen["shifted"] += bool(np.any(np.asarray(after.rotation)))
        self.seen["cut pages"] += bool(np.any(np.asarray(after.first_slot)))
        self.seen["full pool"] += int(self.plain.pages_free) == 0


@pytest.fixture(scope="module")
def run_plain() -> Callable[..., Any]:
    """The program of one device, compiled once for all sizes."""
    return jax.jit(functools.partial(act, VARIANTS, EDITS, rope_of(8)))


@pytest.fixture(scope="module", params=[2, 4, 8])
def every_size(request: pytest.FixtureRequest, run_plain: Callable[..., Any]) -> Twins:
    return Twins.create(request.param, run_plain=run_plain)


@pytest.fixture
def twins(every_size: Twins) -> Iterator[Twins]:
    every_size.reset()
    yield every_size
    every_size.reset()


def random_operations(twins: Twins, steps: int) -> None:
    """Edits and steps of any kind; what is impossible is refused by both."""
    rng = np.random.default_rng(3)
    refused = collections.Counter[str]()
    for _ in range(steps):
        kind = int(rng.choice(5, p=[0.25, 0.15, 0.25, 0.25, 0.1]))
        start = int(rng.integers(0, 40))
        num_new = (
            rng.integers(0, 4, S) if rng.random() < 0.6 else rng.integers(0, 9, S) * (rng.random(S) < 0.6)
        )
        if int(twins.plain.pages_free) < 3 and rng.random() < 0.7:
            kind, start = REMOVE, 0
        said = twins.step(
            [int(n) for n in num_new],
            kind,
            seq=int(rng.integers(-1, S))
            if kind in (SHIFT, REMOVE) and rng.random() < 0.2
            else int(rng.integers(S)),
            other=int(rng.integers(S)),
            p0=start,
            p1=-1 if rng.random() < 0.5 else start + int(rng.integers(0, 20)),
            delta=int(rng.integers(-9, 10)),
            source=rng.permutation(S) if rng.random() < 0.5 else rng.integers(0, S + 1, S),
        )
        refused.update({name: int(not value.all()) for name, value in said.items()})
    twins.seen.update({f"{name} refused": count for name, count in refused.items()})


def test_any_operations_leave_the_same_book_pages_and_attention(twins: Twins) -> None:
    random_operations(twins, 60)
    refusals = "edited refused", "reserved refused", "can_reserve_each refused"
    for what in ("copy to another rank", "rank without a page", "shifted", "cut pages", *refusals):
        assert twins.seen[what] > 0, f"the test never met: {what}"


def test_formats_that_do_not_seal_pages_are_read_as_on_one_device() -> None:
    twins = Twins.create(
        4,
        variants=(EVERYTHING,),
        edits=(COPY, REMOVE),
        head_dim=32,
        num_layers=1,
        k_dtype="q8_0",
        v_dtype="fp8_e4m3",
    )
    fork_and_write(twins)
    random_operations(twins, 15)
    assert twins.seen["copy to another rank"] > 0


def test_attention_in_xla_alone_is_that_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXPAGED_ATTENTION", "xla")
    twins = Twins.create(4, variants=(EVERYTHING,), edits=(SHIFT,), num_layers=1)
    random_operations(twins, 25)
    assert twins.seen["rank without a page"] > 0


def test_one_sequence_fills_the_pool_to_the_last_page_whatever_rank_has_it(twins: Twins) -> None:
    for _ in range(5):
        assert twins.step([T, 0, 0, 0])["reserved"]
    assert twins.step([PAGE_SIZE, 0, 0, 0])["reserved"]
    assert int(twins.plain.lengths[0]) == NUM_PAGES * PAGE_SIZE > PAGE_SIZE * twins.spread.num_local_pages
    assert int(twins.spread.pages_free) == 0
    before = jax.tree.map(np.array, twins.spread)
    said = twins.step([0, 1, 0, 0])
    assert not said["reserved"] and said["can_reserve_each"].tolist() == [True, False, True, True]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, twins.spread), before)
    # Back to three tokens, and on: pages come back in another order.
    assert twins.step([T, 0, 0, 0], REMOVE, seq=0, p0=3)["reserved"]
    assert twins.step([1, T - 1, 0, 0])["reserved"]


def fork_and_write(twins: Twins) -> None:
    """Four sequences share two pages, and all of them write to the second."""
    twins.step([11, 0, 0, 0])
    for dst in (1, 2, 3):
        twins.step([0] * S, COPY, seq=0, other=dst)
    assert int(twins.spread.pages_used) == 2
    twins.step([1, 1, 1, 1])


def test_a_shared_page_is_copied_across_ranks_before_it_is_written(twins: Twins) -> None:
    fork_and_write(twins)
    # The second page has three copies, on the ranks of the next three pages; one sequence keeps it.
    assert np.asarray(twins.spread.table.pages)[:, :2].tolist() == [[0, 2], [0, 3], [0, 4], [0, 1]]
    across = sum(page % twins.size != 1 for page in (2, 3, 4))
    assert twins.seen["copy to another rank"] == across > 0
    assert twins.seen["copy within a rank"] == 3 - across
    assert twins.step([1, 2, 3, 4])["reserved"]


def test_ranks_without_any_page_change_nothing(twins: Twins) -> None:
    twins.step([1, 0, 0, 0])
    assert twins.seen["rank without a page"] == twins.size - 1
    twins.step([5, 0, 2, 0])
    twins.step([0, 0, 0, 0])  # nobody sees anything: zeros, and no NaN


def test_an_attend_is_two_collectives_and_a_step_without_copies_none() -> None:
    spread, specs = create_spread(
        4, num_layers=3, num_kv_heads=KV_HEADS, head_dim=8, num_pages=8, max_seqs=S, page_size=8
    )
    q, k = jnp.zeros((T, Q_HEADS, 8)), jnp.zeros((T, KV_HEADS, 8))

    def collectives(
        function: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any
    ) -> list[str]:
        text = sharded(function, 4, in_specs, out_specs).lower(*arguments).compile().as_text()
        kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
        return [
            kind
            for line in text.splitlines()
            for kind in kinds
            if f" {kind}(" in line or f" {kind}-start(" in line
        ]

    def reserve(cache: Any) -> Any:
        return cache.reserve(jnp.ones(S, jnp.int32), num_tokens=T)[:2]

    def attend(cache: Any, batch: Any) -> Any:
        return cache.attend(1, q, k, k, batch, sinks=SINKS)

    cache, batch = sharded(reserve, 4, (specs,), (specs, SAME))(spread)
    # All layers of a page are one collective, in the loop over copies.
    assert collectives(reserve, (specs,), (specs, SAME), spread) == ["all-reduce"]
    assert collectives(attend, (specs, SAME), (SAME, specs), cache, batch) == ["all-reduce"] * 2


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8", "int16"]
)
def test_a_page_crosses_ranks_bit_by_bit(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 2 * 8 * 4 * jnp.dtype(dtype).itemsize, dtype=np.uint8)
    bits[-4:] = 0, 0, 0, 128  # -0.0, which a sum with 0.0 would make 0.0
    page = jnp.asarray(bits.view(jnp.dtype(dtype)).reshape(2, 8, 4))
    words = _as_words(page)
    assert words.dtype == jnp.uint32
    again = _from_words(words + jnp.zeros_like(words), page.shape, page.dtype)
    np.testing.assert_array_equal(np.asarray(again).view(np.uint8), np.asarray(page).view(np.uint8))


# --- whole generations ---------------------------------------------------------------------------------------

VOCAB, HIDDEN, HEAD_DIM = 61, 32, 8
ROPE = rope_of(HEAD_DIM)


def toy(params: Any, tokens: jax.Array, cache: Any, batch: Any, rows: jax.Array) -> tuple[jax.Array, Any]:
    """A transformer of as many layers as the cache; every other one has a window and sinks."""
    x = params["embedding"][tokens]
    for layer in range(cache.num_layers):
        q, k, v = (
            jnp.reshape(x @ params[name][layer], (x.shape[0], -1, HEAD_DIM)) for name in ("q", "k", "v")
        )
        q, k = ROPE.rotate(q, batch.rope_positions), ROPE.rotate(k, batch.rope_positions)
        options = {"window": 9, "sinks": SINKS} if layer % 2 else {}
        out, cache = cache.attend(layer, q, k, v, batch, **options)
        x = x + out.reshape(x.shape[0], -1) @ params["out"][layer]
    return x[rows] @ params["head"], cache


@pytest.fixture(scope="module")
def params() -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32)

    return {
        "embedding": normal(VOCAB, HIDDEN),
        "q": normal(2, HIDDEN, Q_HEADS * HEAD_DIM),
        "k": normal(2, HIDDEN, KV_HEADS * HEAD_DIM),
        "v": normal(2, HIDDEN, KV_HEADS * HEAD_DIM),
        "out": normal(2, Q_HEADS * HEAD_DIM, HIDDEN),
        "head": normal(HIDDEN, VOCAB),
    }


SIZES = {
    "num_layers": 2,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_pages": 24,
    "max_seqs": S,
    "page_size": PAGE_SIZE,
    "rope": ROPE,
}
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((5, 29, 13))]


def generate_on(size: int, run: Callable[..., Any], params: Any, request: Any, num_layers: int = 1) -> Any:
    """``run(params, cache, request) -> (result, cache)`` over ``size`` devices, 0 = an ordinary cache; as numpy.

    Of the cache only the replicated metadata is returned.
    """
    sizes = SIZES | {"num_layers": num_layers}
    if size == 0:
        result, cache = jax.jit(run)(params, PagedKVCache.create(**sizes), request)
    else:
        cache, specs = create_spread(size, **sizes)
        # XLA of jax 0.11 dies of arguments without elements: those of the request are made inside.
        given = jax.tree.map(lambda x: x if x.size else None, request)

        def run_given(params: Any, cache: Any, given: Any) -> Any:
            whole = jax.tree.map(
                lambda like, x: jnp.zeros(like.shape, like.dtype) if x is None else x, request, given
            )
            return run(params, cache, whole)

        result, cache = sharded(run_given, size, (SAME, specs, SAME), (SAME, specs))(params, cache, given)
        check_invariants(cache)
    return jax.tree.map(np.asarray, (result, cache.allocator, cache.table))


assert_same = functools.partial(jax.tree.map, np.testing.assert_array_equal)


@pytest.fixture(scope="module")
def on_one_device(params: Any) -> Any:
    """Two samples of each prompt, so that pages are shared and copied; the third prompt waits in the queue, and the
    second is so long that its context is shifted."""
    shift = ContextShift(n_ctx=40, n_keep=3)
    empty = PagedKVCache.create(**SIZES)
    request = Request.create(empty, PROMPTS, max_new_tokens=20, batch_size=16, n=2, context_shift=shift)
    run = functools.partial(run_request, toy)
    return run, request, generate_on(0, run, params, request, num_layers=2)


@pytest.mark.parametrize("size", [2, 8])
def test_generate_has_the_tokens_of_one_device(params: Any, on_one_device: Any, size: int) -> None:
    run, request, expected = on_one_device
    assert_same(generate_on(size, run, params, request, num_layers=2), expected)
    result = expected[0]
    assert result.num_tokens[:6].tolist() == [20] * 6
    assert len(set(result.tokens[:6].flatten().tolist())) > 12, "a model that repeats itself shows little"


def test_lookup_has_the_tokens_of_generate_on_one_device(params: Any, on_one_device: Any) -> None:
    prompts, empty = [PROMPTS[0], PROMPTS[2]], PagedKVCache.create(**SIZES)
    request = Request.create(empty, prompts, max_new_tokens=20, batch_size=32, lookup=Lookup(3, ngram=2))
    run = functools.partial(run_request, toy)
    result = generate_on(4, run, params, request, num_layers=2)[0]
    wanted = on_one_device[2][0].tokens[[0, 4]]
    columns = min(wanted.shape[1], result.tokens.shape[1])
    np.testing.assert_array_equal(result.tokens[:2, :columns], wanted[:, :columns])
    assert result.drafted.sum() > result.accepted.sum() > 0, "drafts are tried, and rolled back"


def test_beams_are_those_of_one_device(params: Any) -> None:
    empty = PagedKVCache.create(**SIZES)
    request = beam_request(
        empty, PROMPTS[1:2], num_beams=4, num_return_sequences=4, max_new_tokens=10, batch_size=32
    )
    run = functools.partial(run_request, toy)
    plain, spread = (generate_on(size, run, params, request) for size in (0, 4))
    assert_same(spread[1:], plain[1:])
    np.testing.assert_array_equal(spread[0].tokens, plain[0].tokens)
    np.testing.assert_allclose(spread[0].score, plain[0].score, rtol=1e-5)
    assert spread[0].pages_peak == plain[0].pages_peak


def test_rows_that_see_behind_them_see_the_keys_of_all_ranks() -> None:
    """A prompt that sees itself both ways, in another cache and over four devices, by any implementation."""
    lengths = jnp.asarray([19, 0, 5, 0])
    q, k, v = (
        jax.random.normal(jax.random.key(i), (T, heads, HEAD_DIM))
        for i, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))
    )

    def prefill(cache: Any) -> jax.Array:
        cache, batch, _ = cache.reserve(lengths, num_tokens=T)
        batch = replace(batch, visible_end=lengths[batch.sequence])
        out: jax.Array = cache.attend(1, q, k, v, batch)[0]
        return out

    wanted = jax.jit(prefill)(PagedKVCache.create(**SIZES))
    for implementation in (None, "xla"):
        cache, specs = create_spread(4, **SIZES, implementation=implementation)
        np.testing.assert_allclose(sharded(prefill, 4, (specs,), SAME)(cache), wanted, rtol=2e-5, atol=2e-5)
    causal = PagedKVCache.create(**SIZES).reserve(lengths, num_tokens=T)
    assert not np.allclose(causal[0].attend(1, q, k, v, causal[1])[0], wanted, atol=1e-2)


def test_values_of_another_size_are_those_of_one_device() -> None:
    lengths = jnp.asarray([19, 0, 5, 0])
    q, k, v = (
        jax.random.normal(jax.random.key(i), (T, heads, dim))
        for i, (heads, dim) in enumerate(
            ((Q_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, 2 * HEAD_DIM))
        )
    )

    def prefill(cache: Any) -> jax.Array:
        cache, batch, _ = cache.reserve(lengths, num_tokens=T)
        out: jax.Array = cache.attend(1, q, k, v, batch)[0]
        return out

    sizes = SIZES | {"v_head_dim": 2 * HEAD_DIM}
    wanted = jax.jit(prefill)(PagedKVCache.create(**sizes))
    assert wanted.shape == (T, Q_HEADS, 2 * HEAD_DIM)
    cache, specs = create_spread(4, **sizes)
    np.testing.assert_allclose(sharded(prefill, 4, (specs,), SAME)(cache), wanted, rtol=2e-5, atol=2e-5)


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"axis_size": 0}, "axis_size must be positive, got 0"),
        ({"num_pages": 10}, "num_pages must be a positive multiple of axis_size, .* 4 ranks .* got 10"),
        ({"num_pages": 0}, "num_pages must be a positive multiple"),
        ({"dtype": "kivi4", "head_dim": 32, "page_size": 32}, "kivi4 quantizes whole pages"),
        ({"v_dtype": "kivi2", "head_dim": 32, "page_size": 32}, "kivi2 quantizes whole pages"),
        ({"page_size": 12}, "page_size"),
    ],
)
def test_what_cannot_be_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextKVCache.create(**{**SIZES, "axis_size": 4, **changed})


def test_a_mesh_axis_of_another_size_is_named() -> None:
    cache, specs = create_spread(4, **SIZES)

    def reserve(cache: Any) -> Any:
        return cache.reserve(jnp.ones(S, jnp.int32), num_tokens=T)[0]

    with pytest.raises(ValueError, match="created for 4 ranks, the mesh axis 'context' has 2"):
        sharded(reserve, 2, (specs,), specs).lower(cache)


def test_sinks_that_are_not_one_a_head_are_named() -> None:
    cache, specs = create_spread(2, **SIZES)

    def attend(cache: Any) -> Any:
        cache, batch, _ = cache.reserve(jnp.ones(S, jnp.int32), num_tokens=T)
        rows = jnp.zeros((T, KV_HEADS, HEAD_DIM))
        return cache.attend(0, rows, rows, rows, batch, sinks=SINKS)[0]

    with pytest.raises(ValueError, match=r"sinks must have shape \(2,\)"):
        sharded(attend, 2, (specs,), SAME).lower(cache)


def test_specs_split_pages_and_the_local_table_alone() -> None:
    cache = jax.eval_shape(
        functools.partial(ContextKVCache.create, axis_size=4, **(SIZES | {"dtype": "q8_0", "head_dim": 32}))
    )
    specs = context_specs(cache)
    assert jax.tree.structure(specs) == jax.tree.structure(cache)
    split = PartitionSpec("context")
    local = (specs.k_pages, specs.v_pages, specs.local_table)
    assert all(spec == split for spec in jax.tree.leaves(local))
    assert all(spec == SAME for spec in jax.tree.leaves((specs.allocator, specs.table)))
