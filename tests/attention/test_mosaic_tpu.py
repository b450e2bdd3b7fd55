"""The TPU kernel in Pallas' interpreter: what it computes, that nothing races, and how its work is cut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from layer_pools import in_a_pool

from jaxpaged.attention.base import Pages, make_config
from jaxpaged.attention.cases import CASES, LLAMA_3_8B, MODELS, QUANTIZED_CASES, SMOLLM2_135M, Case
from jaxpaged.attention.tpu import backend as mosaic_tpu
from jaxpaged.attention.tpu import kernel as tpu_kernel
from jaxpaged.attention.tpu.block_sizes import Blocks, Heads, block_items, choose_blocks, describe
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.block_table import BlockTable
from jaxpaged.pages.formats import BlockPages, PageFormat, hadamard_transform, page_format, token_rows
from jaxpaged.testing.conformance import Built, build_case, check_conformance

INTERPRETER = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
)

REPRESENTATIVE = (
    ("smollm2_decode_idle", "lanes"),
    ("llama3_decode_bf16", "plain"),
    ("smollm2_mixed", "lanes"),
    ("gemma2_soft_cap", "plain"),
    ("stablelm_head_dim_80", "lanes"),
    ("slices_gaps_window", "plain"),
    ("shared", "lanes"),
    ("shifted_decode", "lanes"),
    ("shifted_window", "plain"),
    ("ahead", "lanes"),
    ("ahead_window_shifted", "plain"),
    ("two_tokens", "plain"),
    ("nothing", "plain"),
    ("values_128_of_192", "lanes"),
    ("values_96_of_128", "lanes"),
    ("group_5_everything", "plain"),
    ("pages_of_256", "lanes"),
)
"""Cases that reach every branch of the kernel between them; the others, in both layouts, are slow."""


def races_found() -> bool:
    """True if the interpreter saw a race since its reset; jax has no public name for it."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races is not None and interpret_pallas_call.races.races_found


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Iterator[None]:
    """A run leaves its memory and its races in the module."""
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()


def on_lanes(built: Built) -> Built:
    """The same case with pages in rows of 128."""

    def laid_out(pages: Pages) -> Pages:
        sizes = pages.shape
        if isinstance(pages, BlockPages):
            # Bit by bit, the rubbish of slots that nobody wrote too.
            page, slot = jnp.divmod(jnp.arange(sizes[0] * sizes[2]), sizes[2])
            lanes = pages.format.on_lanes(sizes[3])
            return lanes.put(lanes.create(*sizes), page, slot, pages.format.read(pages, page, slot))
        storage = PageFormat("plain", pages.dtype).on_lanes(sizes[3])
        shape = jax.eval_shape(lambda: storage.create(*sizes)).shape
        if shape[-1] % sizes[3]:  # padded, with what no product may see
            return jnp.pad(pages, ((0, 0),) * 3 + ((0, shape[-1] - sizes[3]),))
        return pages.reshape(shape)

    return dataclasses.replace(built, k_pages=laid_out(built.k_pages), v_pages=laid_out(built.v_pages))


def packs_alike(case: Case) -> bool:
    """True if rows of lanes hold as many tokens of keys as of values; the kernel refuses others."""
    dims = case.head_dim, case.v_head_dim or case.head_dim
    return len({1 if 128 % dim else 128 // dim for dim in dims}) == 1


def interpreted(blocks: Blocks | None = None, v_head_dim: int | None = None):
    def attention(
        q,
        k_pages,
        v_pages,
        table,
        batch,
        *,
        scale,
        window,
        soft_cap,
        sinks,
        rope=None,
        first_page=0,
        return_lse,
    ):
        config = make_config(q.shape[-1], scale, window, soft_cap, v_head_dim)
        run = functools.partial(
            mosaic_tpu.paged_attention, config=config, rope=rope, blocks=blocks, interpret=INTERPRETER
        )
        out, lse = jax.jit(run)(q, k_pages, v_pages, table, batch, sinks=sinks, first_page=first_page)
        turned = isinstance(v_pages, BlockPages) and v_pages.format.hadamard
        return hadamard_transform(out) if turned else out, lse

    return attention


def smallest(built: Built, queries: int = 8) -> Blocks:
    """Blocks so small that every loop runs more than once."""
    rows = built.case.page_size
    if isinstance(built.k_pages, BlockPages):
        rows //= max(1, 128 // built.case.head_dim)
    else:
        rows = built.k_pages.shape[2]
    return Blocks(pages=max(1, 128 // rows), queries=queries)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            case.name, layout, marks=() if (case.name, layout) in REPRESENTATIVE else pytest.mark.slow
        )
        for case in CASES
        for layout in ("plain", "lanes")
        if case.dtype != "f16"
    ],
)
def test_the_kernel_conforms_and_nothing_races(name: str, layout: str) -> None:
    built = build_case(next(case for case in CASES if case.name == name))
    if layout == "lanes":
        packed = 1 if 128 % built.case.head_dim else 128 // built.case.head_dim
        same = built.case.head_dim % 128 == (built.case.v_head_dim or 0) % 128 == 0
        if packed > built.case.page_size or same or not packs_alike(built.case):
            pytest.skip("no such layout")
        built = on_lanes(built)
    check_conformance(interpreted(smallest(built), built.case.v_head_dim), built)
    assert not races_found()


def quantized_cases() -> Iterator[tuple[Case, int]]:
    """Cases over q8_0 and q4_0, and the queries of a block: with 2 scales meet scores, with 16 keys."""
    cases = {case.name: case for case in (*CASES, *QUANTIZED_CASES)}

    def over(name: str, dtype: str, v_dtype: str, hadamard: bool) -> Case:
        kinds = {"dtype": dtype, "v_dtype": v_dtype, "hadamard": hadamard}
        return dataclasses.replace(cases[name], name=f"{name}_{dtype}_{v_dtype}", **kinds)

    yield over("q8_0_smollm2_decode", "q8_0", "q4_0", True), 2  # shifted
    for dtype, v_dtype, hadamard, queries in (
        ("q8_0", "q8_0", False, 2),
        ("q8_0", "q4_0", True, 16),
        ("q4_0", "q4_0", True, 2),
    ):
        for case in CASES:
            if case.head_dim % 32 == 0 and case.dtype != "f16" and packs_alike(case):
                yield over(case.name, dtype, v_dtype, hadamard), queries
    for queries in (2, 16):
        for case in QUANTIZED_CASES:
            if {case.dtype, case.v_dtype} <= {"q8_0", "q4_0", None} and packs_alike(case):
                yield case, queries
        yield over("shared", "f32", "q4_0", True), queries
        yield over("mistral_window_chunk", "q8_0", "bf16", True), queries


@pytest.mark.parametrize(
    ("case", "queries"),
    [
        pytest.param(
            *each,
            id=name,
            marks=() if name in ("q8_0_smollm2_decode_q8_0_q4_0-2", "q4_0-16") else pytest.mark.slow,
        )
        for each in quantized_cases()
        for name in [f"{each[0].name}-{each[1]}"]
    ],
)
def test_the_kernel_conforms_over_quantized_pages(case: Case, queries: int) -> None:
    built = on_lanes(build_case(case))
    for pages in (built.k_pages, built.v_pages):
        if isinstance(pages, BlockPages) and pages.parts["codes"].shape[2] < 4:
            pytest.skip("less than a word in a column of codes; refused")
    check_conformance(interpreted(smallest(built, queries), built.case.v_head_dim), built)
    assert not races_found()


def test_chosen_blocks_conform_too() -> None:
    built = build_case(next(case for case in CASES if case.name == "smollm2_mixed"))
    check_conformance(interpreted(), built)
    assert not races_found()


@pytest.mark.parametrize(
    "case",
    [
        Case("decode", **SMOLLM2_135M, lengths=(40, 150), q_lens=(1, 1)),
        Case("chunk", **LLAMA_3_8B, lengths=(40, 33), q_lens=(9, 1), dtype="bf16"),
        Case("q8_0", **SMOLLM2_135M, lengths=(40, 33), q_lens=(1, 1), dtype="q8_0", v_dtype="q4_0"),
    ],
    ids=lambda case: case.name,
)
def test_a_layer_of_a_pool_is_the_layer_alone(case: Case) -> None:
    built = on_lanes(build_case(case)) if case.head_dim < 128 else build_case(case)
    pool, first_page = in_a_pool(built, 2)
    options = built.options | {"return_lse": True}
    attention, queries = interpreted(smallest(built)), (built.table, built.batch)
    alone = attention(built.q, built.k_pages, built.v_pages, *queries, **options)
    found = attention(built.q, pool.k_pages, pool.v_pages, *queries, first_page=first_page, **options)
    for one, wanted in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one, wanted)
    assert not races_found()


def test_64_bit_numbers_change_nothing() -> None:
    with jax.enable_x64(True):
        built = build_case(next(case for case in CASES if case.name == "shifted_decode"))
        check_conformance(interpreted(smallest(built)), built)


def test_a_block_that_is_overwritten_while_it_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the tests above could fail."""
    monkeypatch.setattr(tpu_kernel, "_buffer_of", lambda number: 0)
    built = build_case(Case("race", **SMOLLM2_135M, lengths=(300,), q_lens=(1,)))
    with pytest.raises(AssertionError, match="race: out"):
        check_conformance(interpreted(smallest(built)), built)
        assert not races_found(), "race: out is right by luck"


def test_a_full_row_of_the_table_of_which_the_window_sees_nothing() -> None:
    built = build_case(Case("gone", **SMOLLM2_135M, lengths=(256,), q_lens=(1,), window=9))
    full = jax.tree.map(lambda x: x[:, :8] if x.ndim == 2 else x, built.table)
    far = dataclasses.replace(built.batch, position=built.batch.position + 99)
    options = built.options | {"return_lse": True}
    out, lse = interpreted(Blocks(4, 1))(built.q, built.k_pages, built.v_pages, full, far, **options)
    assert not out.any() and jnp.isneginf(lse).all()


def test_queries_in_bfloat16_are_multiplied_as_such() -> None:
    built = build_case(Case("bf16", **LLAMA_3_8B, lengths=(70, 150), q_lens=(1, 9), dtype="bf16"))
    rounded = built.q.astype(jnp.bfloat16)
    options = built.options | {"return_lse": True}
    arguments = built.k_pages, built.v_pages, built.table, built.batch
    expected, _ = interpreted()(rounded.astype(jnp.float32), *arguments, **options)
    out, lse = interpreted()(rounded, *arguments, **options)
    assert out.dtype == lse.dtype == jnp.float32
    difference = np.abs(np.asarray(out - expected))
    # Weights are rounded to bfloat16; equality to all digits would mean that float32 was multiplied.
    assert 1e-5 < difference.max() < 2e-2


def test_items_hold_every_query_once_and_no_other_row() -> None:
    q_lens = np.array([3, 0, 1, 20, 8, 5, 0])
    tokens, max_seqs, queries = 48, len(q_lens), 8
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
    integers = functools.partial(jnp.zeros, dtype=jnp.int32)
    sequence = np.full(tokens, max_seqs)
    sequence[: cu_q_lens[-1]] = np.repeat(np.arange(max_seqs), q_lens)
    batch = Batch(
        jnp.asarray(sequence, jnp.int32), integers(tokens), integers(tokens), integers(tokens),
        integers(tokens), jnp.asarray(cu_q_lens, jnp.int32),
    )  # fmt: skip
    table = BlockTable(*(integers((max_seqs, 2)) for _ in range(5)), integers(max_seqs))
    items, count = block_items(table, batch, batch.q_lens != 1, queries, None)
    rows = [
        (int(items.sequence[i]), int(items.block[i]) * queries + row)
        for i in range(int(count))
        for row in range(int(items.first_row[i]), int(items.end_row[i]))
    ]
    assert rows == [(s, int(row)) for row, s in enumerate(sequence) if s < max_seqs and q_lens[s] != 1]
    # Items of one block follow each other, so that its output stays where it is until all of them wrote to it.
    blocks = np.asarray(items.block[: int(count)])
    assert (np.diff(blocks) >= 0).all()


@pytest.mark.parametrize("max_q_len", [1, None])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["bf16", "q8_0", "q4_0"])
def test_chosen_blocks_fit_every_tpu(name: str, max_q_len: int | None, dtype: str) -> None:
    model = MODELS[name]
    storage = page_format(dtype).on_lanes(model["head_dim"])
    holds = storage.dtype if dtype == "bf16" else storage
    q_shape = 512, model["num_q_heads"], model["head_dim"]
    for page_size in (8, 16, 32, 64, 128, 256):
        heads = model["num_kv_heads"], page_size, model["head_dim"]
        shape = jax.eval_shape(functools.partial(storage.create, 1, *heads)).shape
        told = describe(q_shape, shape, holds, max_q_len)
        blocks, sizes = told["blocks"], Heads.of(q_shape, shape, holds)
        assert blocks == choose_blocks(q_shape, shape, holds, max_q_len)
        assert blocks.pages * sizes.page_rows % 128 == 0
        assert blocks.queries == 1 if max_q_len == 1 else blocks.queries > 1
        assert told["vmem_bytes"] <= 12 << 20  # of 16 MiB: what leaves the registers needs some
        assert told["tokens_per_block"] == blocks.pages * page_size
        assert told["bytes_per_block"] == 2 * blocks.pages * storage.bytes_per_page(*heads)
        assert told["bytes_per_token"] == 2 * storage.bytes_per_page(*heads) // page_size
        assert told["padding"] >= 0
        assert sizes.page_size == page_size


def test_what_the_kernel_cannot_serve_is_refused_with_the_reason() -> None:
    built = build_case(Case("small", **SMOLLM2_135M, lengths=(9,), q_lens=(1,), page_size=8))

    def run(k_pages, v_pages, **options):
        return mosaic_tpu.paged_attention(
            built.q, k_pages, v_pages, built.table, built.batch, make_config(64, None, None, None),
            None, None, **options,
        )  # fmt: skip

    odd = jnp.zeros((4, 3, 24, 64))
    with pytest.raises(NotImplementedError, match=r"pages of 24 tokens.*powers of two"):
        run(odd, odd)
    for dtype in (jnp.float16, jnp.float8_e4m3fn):
        other = built.k_pages.astype(dtype)
        with pytest.raises(NotImplementedError, match=f"pages of {other.dtype}.*float32 and bfloat16"):
            run(other, other)
    for name, reason in {
        "q8_0": r"q8_0\(4, 3, 32, 64\).*rows of lanes",  # plain pages
        "q5_1": r"q5_1.*reads q8_0 and q4_0",
        "kivi4": r"kivi4.*reads q8_0 and q4_0",
    }.items():
        quantized = page_format(name).create(4, 3, 32, 64)
        with pytest.raises(NotImplementedError, match=reason):
            run(quantized, quantized)
    short = page_format("q4_0").on_lanes(64).create(4, 3, 8, 64)
    with pytest.raises(NotImplementedError, match=r"q4_0 pages of 8 tokens.*from 16 tokens on"):
        run(short, short)
    with pytest.raises(ValueError, match=r"3 pages of 8 rows are no multiple of 128 rows; 16 pages are"):
        run(built.k_pages, built.v_pages, blocks=Blocks(3, 1))


def test_unpacked_rows_are_those_of_plain_pages() -> None:
    pages = jnp.arange(2 * 3 * 16 * 64.0).reshape(2, 3, 16, 64)
    np.testing.assert_array_equal(token_rows(pages.reshape(2, 3, 8, 128), 64), pages)
    np.testing.assert_array_equal(token_rows(jnp.pad(pages, ((0, 0),) * 3 + ((0, 64),)), 48), pages[..., :48])
