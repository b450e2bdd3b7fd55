"""Laws of plain page formats: rows written are read back, nothing else changes, page N drops a row."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.attention import paged_attention
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.formats import PAGE_FORMATS, check_page_size, page_format, token_rows

N, KV, PAGE_SIZE, D = 5, 2, 8, 3
PLAIN = ["f32", "bf16", "f16"]


@pytest.mark.parametrize("name", PLAIN)
def test_written_rows_are_read_back_and_nothing_else_changes(name: str) -> None:
    storage = page_format(name)
    pages = jnp.full_like(storage.create(N, KV, PAGE_SIZE, D), -1)
    page, slot = [0, 4, 2, N, N], [7, 0, 3, 7, 0]
    rows = np.random.default_rng(0).integers(0, 16, (5, KV, D)).astype(np.float32)
    written = jax.jit(storage.write)(pages, jnp.asarray(page), jnp.asarray(slot), jnp.asarray(rows))
    assert written.dtype == pages.dtype == storage.dtype
    expected = np.full((N, KV, PAGE_SIZE, D), -1, np.float32)
    for i in range(3):
        expected[page[i], :, slot[i]] = rows[i]
    np.testing.assert_array_equal(np.asarray(written, np.float32), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_a_copy_changes_one_whole_page(name: str) -> None:
    storage = page_format(name)
    pages = jnp.arange(N * KV * PAGE_SIZE * D).reshape(N, KV, PAGE_SIZE, D).astype(storage.dtype)
    copied = np.asarray(storage.copy(pages, 1, 3), np.float32)
    expected = np.array(pages, np.float32)
    expected[3] = expected[1]
    np.testing.assert_array_equal(copied, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_bytes_per_page_are_those_of_the_arrays(name: str) -> None:
    storage = PAGE_FORMATS[name]
    pages = storage.create(N, KV, PAGE_SIZE, D)
    assert storage.bytes_per_page(KV, PAGE_SIZE, D) * N == pages.nbytes
    assert not pages.any()
    assert storage == page_format(name) and hash(storage) == hash(page_format(name))


def create(**options: Any) -> PagedKVCache:
    sizes = {
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 64,
        "num_pages": 1,
        "max_seqs": 1,
        "page_size": 8,
    }
    return PagedKVCache.create(**(sizes | options))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("f32", jnp.float32),
        ("bf16", jnp.bfloat16),
        ("f16", jnp.float16),
        ("fp8_e4m3", jnp.float8_e4m3fn),
    ],
)
def test_every_spelling_of_a_dtype_is_the_same_format(name: str, dtype: Any) -> None:
    expected = create(dtype=name)
    assert expected.k_format.dtype == dtype
    for spelling in (dtype, np.dtype(dtype), np.dtype(dtype).name, np.dtype(dtype).type):
        assert page_format(spelling) is page_format(name)
        assert jax.tree.structure(create(dtype=spelling)) == jax.tree.structure(expected)
        assert create(k_dtype=spelling, dtype="q8_0").k_format == expected.k_format


@pytest.mark.parametrize(
    "unknown", ["f64", "q9", "int8", "", jnp.int8, np.dtype("int8"), jnp.float64, bool, object, 8, None]
)
def test_an_unknown_format_is_refused_with_the_known_ones(unknown: Any) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"{unknown!r} is not known; known are f32, bf16, f16, fp8")
    ) as e:
        page_format(unknown)
    assert "\n" not in str(e.value) and e.value.__cause__ is None


@pytest.mark.parametrize(("platform", "name"), [("cpu", "f32"), ("gpu", "bf16"), ("tpu", "bf16")])
def test_the_default_is_f32_on_a_cpu_and_bf16_elsewhere(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str
) -> None:
    monkeypatch.setattr("jaxpaged.cache.checks.default_platform", lambda: platform)
    assert (create().k_format, create().v_format) == (page_format(name), page_format(name))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_page_sizes(size: int) -> None:
    assert check_page_size(size) == size


@pytest.mark.parametrize("size", [-8, 0, 1, 4, 7, 12, 33, 512])
def test_other_page_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 8 to 256, got {size}"):
        check_page_size(size)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("f32", 16), ("f32", 192), ("bf16", 64), ("bf16", 96), ("f16", 32)],
)
def test_pages_in_lanes_equal_plain_pages(name: str, head_dim: int) -> None:
    plain = page_format(name)
    lanes = plain.on_lanes(head_dim)
    rng = np.random.default_rng(head_dim)
    sizes = N, KV, 16, head_dim
    pages, packed = plain.create(*sizes), lanes.create(*sizes)
    assert packed.shape[-1] % 128 == 0 and packed.dtype == pages.dtype
    assert lanes.bytes_per_page(*sizes[1:]) * N == packed.nbytes
    if 128 % head_dim == 0:
        assert packed.nbytes == pages.nbytes  # tokens side by side, no padding

    def same(pages: jax.Array, packed: jax.Array) -> None:
        np.testing.assert_array_equal(token_rows(packed, head_dim), pages)

    for _ in range(3):
        # Distinct slots in any order: some share a row, some are dropped.
        place = rng.permutation(N * 16)[:40]
        page = jnp.asarray(np.where(rng.random(40) < 0.2, N, place // 16))
        slot = jnp.asarray(place % 16)
        rows = jnp.asarray(rng.standard_normal((40, KV, head_dim)), jnp.float32)
        pages = jax.jit(plain.write)(pages, page, slot, rows)
        packed = jax.jit(lanes.write)(packed, page, slot, rows)
        same(pages, packed)
    same(plain.copy(pages, 1, 3), lanes.copy(packed, 1, 3))
    page, slot = jnp.asarray(rng.integers(0, N, 16)), jnp.asarray(rng.integers(0, 16, 16))
    np.testing.assert_array_equal(lanes.read(packed, page, slot), plain.read(pages, page, slot))
    target = jnp.int32(2)
    same(plain.gather(pages, page, slot, target), lanes.gather(packed, page, slot, target))


def test_heads_of_multiples_of_128_have_one_layout() -> None:
    for head_dim in (128, 256):
        assert page_format("bf16").on_lanes(head_dim) is page_format("bf16")
    with pytest.raises(
        ValueError, match="holds 16 tokens of head_dim 8, page_size must be at least that, got 8"
    ):
        page_format("f32").on_lanes(8).create(N, KV, 8, 8)
    with pytest.raises(ValueError, match="head_dim is 32, the pages are laid out for 64"):
        page_format("f32").on_lanes(64).create(N, KV, 8, 32)


@pytest.mark.parametrize("head_dim", [64, 48])
def test_attention_is_the_same_in_both_layouts(head_dim: int) -> None:
    rng = np.random.default_rng(1)
    sizes = {"num_layers": 1, "num_kv_heads": KV, "head_dim": head_dim, "num_pages": 9, "max_seqs": 2}
    caches = [PagedKVCache.create(**sizes, page_size=8, layout=layout) for layout in ("plain", "lanes")]
    assert caches[0].k_pages.shape != caches[1].k_pages.shape

    @jax.jit
    def step(cache: PagedKVCache, counts: Any, q: Any, k: Any, v: Any) -> tuple[PagedKVCache, list[Any], Any]:
        cache, batch, ok = cache.reserve(counts, num_tokens=14)
        cache = cache.write(0, k, v, batch)
        arguments = q, *cache.pages(0), cache.table, batch
        outs = [paged_attention(*arguments, implementation=name) for name in ("xla", "reference")]
        return cache, outs, ok

    for counts in ([11, 3], [1, 1], [0, 5]):
        qkv = [rng.standard_normal((14, h, head_dim)).astype(np.float32) for h in (2 * KV, KV, KV)]
        outs: list[Any] = []
        for i, cache in enumerate(caches):
            caches[i], both, ok = step(cache, np.asarray(counts), *qkv)
            assert ok
            outs += both
        for out in outs[1:]:
            np.testing.assert_allclose(out, outs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "head_dim", "expected"),
    [
        ("cpu", 64, (8, 64)),
        ("tpu", 64, (4, 128)),
        ("tpu", 80, (8, 128)),
        ("tpu", 128, (8, 128)),
        ("tpu", 8, (8, 8)),
    ],
)
def test_a_cache_on_a_tpu_uses_lanes_by_default(
    monkeypatch: pytest.MonkeyPatch, platform: str, head_dim: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr("jaxpaged.cache.paged.default_platform", lambda: platform)
    cache = create(head_dim=head_dim)
    assert cache.k_pages.shape[2:] == expected
    assert cache.bytes_per_page == cache.k_pages.nbytes + cache.v_pages.nbytes


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match='layout must be "plain" or "lanes", got \'rows\''):
        create(layout="rows")
