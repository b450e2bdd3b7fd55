"""Paged attention: the conformance kit over every implementation, and the laws the kit does not state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_pools import in_a_pool

from jaxpaged.attention import api, candidates, choose, merge_states, paged_attention
from jaxpaged.attention.cases import CASES, QUANTIZED_CASES, SMOLLM2_135M, Case
from jaxpaged.testing.conformance import build_case, check_conformance

HERE = candidates("cpu")
"""Implementations of the machine that tests."""
QUICK = {"xla_backend_optimization_level": 0}
"""Results are compared, not timed, and most of a small program's compilation is optimization."""

SMALL = Case(
    "small", num_q_heads=4, num_kv_heads=2, head_dim=16, lengths=(37, 20, 9), q_lens=(1, 3, 0), page_size=8
)


def under_jit(implementation):
    def attention(q, k_pages, v_pages, table, batch, *, sinks, **static):
        @jax.jit(compiler_options=QUICK)
        def run(q, k_pages, v_pages, table, batch, sinks):
            return paged_attention(
                q, k_pages, v_pages, table, batch, sinks=sinks, implementation=implementation, **static
            )

        return run(q, k_pages, v_pages, table, batch, sinks)

    return attention


@pytest.mark.parametrize("case", [*CASES, *QUANTIZED_CASES], ids=lambda case: case.name)
def test_every_implementation_conforms(case):
    built = build_case(case)
    for implementation in HERE:
        check_conformance(under_jit(implementation), built)


def test_the_kit_notices_a_masked_value_that_leaks():
    built = build_case(SMALL)
    clean = jnp.nan_to_num(built.v_pages)
    wrong = dataclasses.replace(built, v_pages=clean.at[built.table.pages[0, 0]].add(1))
    with pytest.raises(AssertionError, match="small: out"):
        check_conformance(under_jit("xla"), wrong)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("name", ["group_5_everything", "shifted", "q8_0_smollm2_decode", "q4_k"])
def test_a_layer_of_a_pool_is_the_layer_alone(name, implementation):
    built = build_case(next(case for case in (*CASES, *QUANTIZED_CASES) if case.name == name))

    @jax.jit(compiler_options=QUICK)
    def run(k_pages, v_pages, first_page):
        return paged_attention(
            built.q,
            k_pages,
            v_pages,
            built.table,
            built.batch,
            first_page=first_page,
            implementation=implementation,
            return_lse=True,
            **built.options,
        )

    alone = run(built.k_pages, built.v_pages, jnp.int32(0))
    for layer in (1, 2):
        pool, first_page = in_a_pool(built, layer)
        for found, wanted in zip(run(pool.k_pages, pool.v_pages, first_page), alone, strict=True):
            np.testing.assert_array_equal(found, wanted)


def split(table, entries):
    """The table of the first entries of each sequence, and that of the others."""
    shift = jnp.arange(table.max_pages_per_seq) + entries

    def behind(x):
        return x.at[:, shift].get(mode="fill", fill_value=0)

    head = dataclasses.replace(table, num_entries=jnp.minimum(table.num_entries, entries))
    tail = dataclasses.replace(
        table,
        pages=behind(table.pages),
        first_slot=behind(table.first_slot),
        num_tokens=behind(table.num_tokens),
        position=behind(table.position),
        num_entries=jnp.maximum(table.num_entries - entries, 0),
    )
    return head, tail


@pytest.mark.parametrize("implementation", HERE)
def test_parts_of_a_table_merge_to_the_whole(implementation):
    built = build_case(dataclasses.replace(SMALL, sinks=True, padding=2))

    @jax.jit(compiler_options=QUICK)
    def part(table, sinks):
        return paged_attention(
            built.q,
            built.k_pages,
            built.v_pages,
            table,
            built.batch,
            sinks=sinks,
            implementation=implementation,
            return_lse=True,
        )

    without = jnp.full_like(built.sinks, -jnp.inf)
    for entries in (0, 2, 4):
        head, tail = split(built.table, entries)
        # One part alone is given the sinks.
        a, b = part(head, built.sinks), part(tail, without)
        for out, lse in (merge_states(*a, *b), merge_states(*b, *a)):
            np.testing.assert_allclose(out, built.out, rtol=2e-5, atol=2e-5)
            np.testing.assert_allclose(lse, built.lse, rtol=2e-5, atol=2e-5)


def test_merge_states_is_associative_and_nothing_is_neutral():
    rng = np.random.default_rng(0)
    a, b, c = (
        (jnp.asarray(rng.standard_normal((5, 2, 8)), jnp.float32), jnp.asarray(lse, jnp.float32))
        for lse in rng.standard_normal((3, 5, 2)) * 20
    )
    for one, other in zip(
        merge_states(*merge_states(*a, *b), *c), merge_states(*a, *merge_states(*b, *c)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    nothing = jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf)
    for merged in (merge_states(*a, *nothing), merge_states(*nothing, *a)):
        np.testing.assert_array_equal(merged[0], a[0])
        np.testing.assert_array_equal(merged[1], a[1])
    out, lse = merge_states(*nothing, *nothing)
    assert not out.any() and jnp.isneginf(lse).all()


def test_other_lengths_do_not_trace_again():
    traces = []

    @jax.jit
    def attention(q, k_pages, v_pages, table, batch):
        traces.append(q.shape)
        return paged_attention(q, k_pages, v_pages, table, batch)

    built = build_case(SMALL)
    for count in (5, 2, 0):
        table = dataclasses.replace(built.table, num_entries=jnp.minimum(built.table.num_entries, count))
        assert jnp.isfinite(attention(built.q, built.k_pages, built.v_pages, table, built.batch)).all()
    assert len(traces) == 1


def test_layers_that_are_alike_are_traced_once(monkeypatch):
    traced = []

    def attention(q, *_):
        traced.append(q.shape)
        return q, q[..., 0]

    stand_in(monkeypatch, new=attention)
    built = build_case(SMALL)
    arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch

    @jax.jit
    def layers(q, *rest):
        for _ in range(5):
            q = paged_attention(q, *rest)
        return paged_attention(q, *rest, window=3)

    layers(*arguments)
    assert len(traced) == 2, "and again with another window"


@pytest.mark.parametrize("name", ["group_5_everything", "shifted", "q4_k"])
def test_64_bit_numbers_change_nothing(name):
    case = next(case for case in (*CASES, *QUANTIZED_CASES) if case.name == name)
    with jax.enable_x64(True):
        for implementation in HERE:
            check_conformance(under_jit(implementation), case)


def test_the_output_keeps_the_dtype_of_the_queries():
    built = build_case(dataclasses.replace(SMALL, dtype="bf16"))
    q = built.q.astype(jnp.bfloat16)
    for implementation in HERE:
        attention = functools.partial(paged_attention, implementation=implementation, return_lse=True)
        out, lse = jax.eval_shape(attention, q, built.k_pages, built.v_pages, built.table, built.batch)
        assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (4, 3, 16)}, "3 query heads are no multiple of 2 KV heads"),
        ({"q": (4, 0, 16)}, "0 query heads are no multiple of 2 KV heads"),
        ({"q": (4, 4, 8)}, "head_dim of q is 8, of the cache 16"),
        ({"q": (5, 4, 16)}, "q has 5 tokens, the batch 4"),
        ({"q": (4, 64)}, r"got shape \(4, 64\)"),
        ({"v_pages": (2, 2, 8, 16)}, r"v_pages \(2, 2, 8, 16\) must be alike"),
        ({"sinks": (3,)}, r"sinks must have shape \(4,\).*got \(3,\)"),
        ({"window": 0}, "window must be at least 1 token, got 0"),
        ({"soft_cap": 0.0}, r"soft_cap must be positive, got 0\.0"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'; there are cpu_numba, mosaic_gpu, .*xla"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_values(change, message):
    built = build_case(SMALL)
    arguments = {name: getattr(built, name) for name in ("q", "k_pages", "v_pages", "table", "batch")}
    arguments |= {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)


@pytest.mark.parametrize("name", ["q", "k_pages", "sinks"])
def test_integers_are_refused(name):
    built = build_case(dataclasses.replace(SMALL, sinks=True))
    arguments = {x: getattr(built, x) for x in ("q", "k_pages", "v_pages", "table", "batch", "sinks")}
    arguments[name] = arguments[name].astype(jnp.int32)
    with pytest.raises(TypeError, match=f"{name} must be floating point, got int32"):
        paged_attention(**arguments)


def stand_in(monkeypatch, **implementations):
    """The named implementations first, then the specification."""
    load = api.load
    monkeypatch.setattr(api, "candidates", lambda platform=None: (*implementations, "reference"))
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (*implementations, "reference"))
    monkeypatch.setattr(api, "load", lambda name: implementations.get(name) or load(name))


def test_only_not_implemented_moves_to_the_next(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such device")

    built = build_case(SMALL)
    arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch
    stand_in(monkeypatch, new=refuse)
    np.testing.assert_allclose(jax.jit(paged_attention)(*arguments), built.out, rtol=2e-5, atol=2e-5)
    with pytest.raises(NotImplementedError, match="new: no such device"):
        paged_attention(*arguments, implementation="new")
    choice = choose("cpu", *arguments)
    assert choice.name == "reference" and choice.refusals == {"new": "no such device"}

    def broken(*_):
        raise ValueError("a bug")

    stand_in(monkeypatch, new=broken)
    with pytest.raises(ValueError, match="a bug"):
        paged_attention(*arguments)


def test_each_platform_tries_its_own_kernel_first():
    assert candidates("cpu")[0] == "cpu_numba" and candidates("tpu")[0] == "mosaic_tpu"
    assert candidates("cuda")[0] == candidates("gpu")[0] == "mosaic_gpu"
    assert candidates("metal") == ("xla", "reference")


def test_what_a_kernel_is_built_on_may_be_missing(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(api.importlib, "import_module", missing)
    api._find.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match=r"needs numba \(pip install 'jaxpaged\[cpu\]'\)"):
            api.load("cpu_numba")
    finally:
        api._find.cache_clear()


def test_another_ffi_falls_back_with_one_warning(monkeypatch):
    def changed(name):
        raise ImportError("XLA_FFI_Buffer begins with other fields")

    built = build_case(SMALL)
    real = api.importlib.import_module
    monkeypatch.setattr(
        api.importlib, "import_module", lambda name: (changed if "cpu.backend" in name else real)(name)
    )
    api._find.cache_clear()
    try:
        arguments = built.q, built.k_pages, built.v_pages, built.table, built.batch
        with pytest.warns(RuntimeWarning, match="falls back from cpu_numba: XLA_FFI_Buffer"):
            paged_attention(*arguments)
        out = paged_attention(*arguments)  # a second warning would be an error
        np.testing.assert_allclose(out, built.out, rtol=2e-5, atol=2e-5)
    finally:
        api._find.cache_clear()


def test_no_work_grows_with_the_pool_or_the_table():
    """The program for a long table holds no array of the size of its keys."""
    built = build_case(Case("long", **SMOLLM2_135M, lengths=(64,), q_lens=(1,)))

    def temporaries(pages):
        table = jax.tree.map(lambda x: jnp.zeros((1, pages), x.dtype) if x.ndim == 2 else x, built.table)
        pool = jax.ShapeDtypeStruct((pages, *built.k_pages.shape[1:]), jnp.float32)
        program = (
            jax.jit(paged_attention, compiler_options=QUICK)
            .lower(built.q, pool, pool, table, built.batch)
            .compile()
        )
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(1024) <= temporaries(64) + 16 * 1024
