"""Laws of the page formats: what is written is read, page N is nowhere, and nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.page_format import PAGE_FORMATS, check_page_size, page_format

N, KV, PAGE_SIZE, D = 5, 2, 8, 3


@pytest.mark.parametrize("name", sorted(PAGE_FORMATS))
def test_written_rows_are_read_back_and_all_else_stays(name: str) -> None:
    storage = page_format(name)
    pages = jnp.full_like(storage.create(N, KV, PAGE_SIZE, D), -1)
    page, slot = [0, 4, 2, N, N], [7, 0, 3, 7, 0]
    rows = np.random.default_rng(0).integers(0, 99, (5, KV, D)).astype(np.float32)
    written = jax.jit(storage.write)(pages, jnp.asarray(page), jnp.asarray(slot), jnp.asarray(rows))
    assert written.dtype == pages.dtype == storage.dtype
    expected = np.full((N, KV, PAGE_SIZE, D), -1, np.float32)
    for i in range(3):
        expected[page[i], :, slot[i]] = rows[i]
    np.testing.assert_array_equal(np.asarray(written, np.float32), expected)


@pytest.mark.parametrize("name", sorted(PAGE_FORMATS))
def test_a_copy_is_a_whole_page_and_one_page(name: str) -> None:
    storage = page_format(name)
    pages = jnp.arange(N * KV * PAGE_SIZE * D).reshape(N, KV, PAGE_SIZE, D).astype(storage.dtype)
    copied = np.asarray(storage.copy(pages, 1, 3), np.float32)
    expected = np.array(pages, np.float32)
    expected[3] = expected[1]
    np.testing.assert_array_equal(copied, expected)


@pytest.mark.parametrize("name", sorted(PAGE_FORMATS))
def test_bytes_per_page_are_the_bytes_of_a_page(name: str) -> None:
    storage = PAGE_FORMATS[name]
    pages = storage.create(N, KV, PAGE_SIZE, D)
    assert storage.bytes_per_page(KV, PAGE_SIZE, D) * N == pages.nbytes
    assert not pages.any()
    assert storage == page_format(name) and hash(storage) == hash(page_format(name))


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'f64' is not known.*f32, bf16, f16"):
        page_format("f64")


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_page_sizes(size: int) -> None:
    assert check_page_size(size) == size


@pytest.mark.parametrize("size", [-8, 0, 1, 4, 7, 12, 33, 512])
def test_other_page_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 8 to 256, got {size}"):
        check_page_size(size)
