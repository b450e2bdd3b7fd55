"""Laws of quantized pages in TPU lanes: they equal plain ones bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pages.formats import BlockFormat, page_format
from jaxpaged.pages.formats.lane_blocks import LaneBlockFormat

N = 5
SIZES = ((3, 32, 64), (1, 8, 128), (2, 256, 32), (2, 32, 96), (2, 16, 256))
"""KV, page_size, head_dim: packed, few rows, many tokens, padded, two rows of lanes per token."""


@pytest.mark.parametrize(
    ("name", "sizes"), [*(("q4_0", sizes) for sizes in SIZES), ("q8_0", SIZES[0]), ("q8_0", SIZES[4])]
)
def test_pages_in_lanes_equal_plain_pages(name: str, sizes: tuple[int, int, int]) -> None:
    num_kv_heads, page_size, head_dim = sizes
    plain, rng = page_format(name), np.random.default_rng(0)
    everywhere = tuple(jnp.divmod(jnp.arange(N * page_size), page_size))
    garbage = {  # with NaN among the scales
        part: jnp.asarray(
            rng.integers(0, 256, (*x.shape[:-1], x.shape[-1] * x.itemsize), np.uint8).view(x.dtype)
        )
        for part, x in plain.create(N, *sizes).parts.items()
    }
    garbage = {part: x[everywhere[0], :, everywhere[1]] for part, x in garbage.items()}
    steps = []
    for tokens in (7, 200):  # the second takes several iterations if pages are short
        slots = rng.permutation(N * page_size)[:tokens]
        page = np.where(rng.random(len(slots)) < 0.2, N, slots // page_size)  # some are dropped
        rows = rng.standard_normal((len(slots), num_kv_heads, head_dim), np.float32)
        steps.append((page, slots % page_size, rows))
    gathered = rng.integers(0, N, page_size), rng.integers(0, page_size, page_size)

    def stored(storage: BlockFormat) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        pages = storage.put(storage.create(N, *sizes), *everywhere, garbage)
        for step in steps:
            pages = storage.write(pages, *map(jnp.asarray, step))
        pages = storage.gather(pages, *map(jnp.asarray, gathered), jnp.int32(2))
        pages = storage.copy(pages, jnp.int32(2), jnp.int32(4))
        assert pages.shape == (N, *sizes)
        chosen = jnp.array([[4, 1]])
        loaded = (storage.load(pages, chosen, slices=slices) for slices in (False, True))
        return storage.read(pages, *everywhere), *loaded

    (expected, *loaded), (actual, *also_loaded) = (
        jax.jit(stored, static_argnums=0)(storage) for storage in (plain, plain.on_lanes(head_dim))
    )
    for part, x in expected.items():
        assert x.dtype == actual[part].dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(actual[part]).view(np.uint8))
    np.testing.assert_array_equal(loaded, also_loaded)


def test_bytes_per_page_are_those_of_the_arrays() -> None:
    for name in ("q8_0", "q4_0"):
        for sizes in SIZES:
            storage = page_format(name).on_lanes(sizes[2])
            assert storage.create(N, *sizes).nbytes == N * storage.bytes_per_page(*sizes)
        full = 8, 32, 128  # heads that fill the lanes have no padding
        assert page_format(name).on_lanes(128).bytes_per_page(*full) == page_format(name).bytes_per_page(
            *full
        )


def test_only_formats_of_the_tpu_kernel_have_lanes() -> None:
    lanes = page_format("q4_0").with_hadamard(True).on_lanes(64)
    assert isinstance(lanes, LaneBlockFormat) and lanes.hadamard
    for name in ("q5_0", "q4_1", "iq4_nl", "kivi4"):
        assert page_format(name).on_lanes(64) is page_format(name)
    with pytest.raises(ValueError, match="laid out for 64"):
        lanes.create(N, 1, 32, 128)
