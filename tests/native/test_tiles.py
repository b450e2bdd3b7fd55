"""Vector code against numpy."""

import itertools

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from jaxpaged.native import memory, tiles  # noqa: E402

RNG = np.random.default_rng(0)


@numba.njit
def product(*sizes):
    tiles.product(*sizes)


@numba.njit
def dots(*sizes):
    tiles.dots(*sizes)


@numba.njit
def transpose(*sizes):
    tiles.transpose(*sizes)


@numba.njit
def row_exp(row, n, maximum):
    return tiles.row_exp((row, n, maximum))


@numba.njit
def row_max(row, n):
    return tiles.row_max((row, n))


@numba.njit
def row_cap(row, n, cap):
    tiles.row_cap((row, n, cap))


@numba.njit
def widen(bf16, source, target):
    if bf16:
        tiles.widen_bf16((source, target))
    else:
        tiles.widen_f16((source, target))


def address(array):
    return array.ctypes.data


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("m", "vectors", "k"), [*itertools.product((1, 2, 3, 4, 7), (1, 3, 4, 5), (1, 33)), (64, 8, 0)]
)
def test_a_product_is_added_to_what_is_there(m, vectors, k):
    n = vectors * tiles.WIDTH
    # Rows longer than the matrices: the distance of rows is not their length.
    a, b, out = normal(m, k + 3), normal(k, n + 5), normal(m, n + 2)
    expected = out.copy()
    expected[:, :n] += a[:, :k] @ b[:, :n]
    product(address(a), k + 3, address(b), n + 5, address(out), n + 2, m, n, k)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "vectors"), [*itertools.product((1, 2, 3, 8), (1, 3, 4, 13), (1, 5))])
def test_rows_times_rows(m, n, vectors):
    k = vectors * tiles.WIDTH
    a, b, out = normal(m, k), normal(n, k + 4), normal(m, n + 2)
    expected = out.copy()
    expected[:, :n] = a @ b[:, :k].T
    dots(address(a), k, address(b), k + 4, address(out), n + 2, m, n, k)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("m", "n"), [(1, 8), (8, 8), (13, 16), (32, 64)])
def test_a_transposed_matrix(m, n):
    source, target = normal(m, n + 3), np.zeros((n, m + 2), np.float32)
    transpose(address(source), n + 3, address(target), m + 2, m, n)
    np.testing.assert_array_equal(target[:, :m], source[:, :n].T)
    assert not target[:, m:].any()


def test_exponentials_and_their_sum():
    x = np.concatenate([-np.geomspace(1e-6, 86, 60), [0, -np.inf, -1e30, -1000]]).astype(np.float32)
    expected = np.exp(x.astype(np.float64) - 0.0)
    got = x.copy()
    total = row_exp(address(got), 64, np.float32(0))
    np.testing.assert_allclose(got, expected, rtol=3e-7, atol=1e-38)
    assert (got[-3:] == 0).all(), "what is masked must weigh nothing"
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    everywhere_masked = np.full(64, -np.inf, np.float32)
    assert row_exp(address(everywhere_masked), 64, np.float32(-1e30)) == 0


def test_the_largest_of_a_row():
    for place in range(64):
        x = normal(64)
        x[place] = 9
        assert row_max(address(x), 64) == 9
    assert row_max(address(np.full(64, -np.inf, np.float32)), 64) == -np.inf


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_a_soft_cap(cap):
    x = np.concatenate([normal(32) * 100, normal(32) * 0.01]).astype(np.float32)
    got = x.copy()
    row_cap(address(got), 64, np.float32(cap))
    np.testing.assert_allclose(got, cap * np.tanh(x.astype(np.float64) / cap), rtol=1e-5, atol=cap * 2e-7)


def test_numbers_of_two_bytes():
    x = np.array([0.0, -0.0, 1.5, -65504, 6e-8, np.inf, -np.inf, 2**-14], np.float16)
    got = np.zeros(8, np.float32)
    widen(False, address(x), address(got))
    np.testing.assert_array_equal(got, x.astype(np.float32))
    bits = (normal(8) * 1e30).view(np.uint32) >> 16
    widen(True, address(bits.astype(np.uint16)), address(got))
    np.testing.assert_array_equal(got, (bits << 16).view(np.float32))


def test_counters_count_what_they_were():
    @numba.njit
    def count(at):
        return memory.fetch_add(at, 3), memory.fetch_add(at, -1), memory.load_i64(at, 0)

    cell = np.array([5], np.int64)
    assert count(address(cell)) == (5, 8, 7)
