"""Laws of Rope: its angles are those of float64, and add up exactly."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pages.rope import Rope

FREQUENCIES = 500_000.0 ** (-np.arange(0, 64, 2) / 64)


def complex_of(rope: Rope, positions: np.ndarray) -> np.ndarray:
    cos, sin = rope.cos_sin(jnp.asarray(positions, jnp.int32))
    return np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)


@pytest.mark.parametrize(
    ("position", "error"), [(0, 0), (1, 2e-7), (1000, 1e-6), (100_000, 1e-4), (-5000, 5e-6)]
)
def test_angles_are_those_of_float64(position: int, error: float) -> None:
    got = complex_of(Rope.create(FREQUENCIES), np.array([position]))
    assert np.abs(got - np.exp(1j * position * FREQUENCIES)).max() <= error


def test_a_difference_of_angles_is_the_angle_of_the_difference_at_any_position() -> None:
    rope, rng = Rope.create(FREQUENCIES), np.random.default_rng(0)
    p, q = rng.integers(-(2**31), 2**31, (2, 1000))
    difference = ((p - q + 2**31) % 2**32 - 2**31).astype(np.int32)
    together = complex_of(rope, p.astype(np.int32)) * complex_of(rope, q.astype(np.int32)).conj()
    assert np.abs(together - complex_of(rope, difference)).max() < 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_invertible_and_leaves_other_dimensions_and_position_0_unchanged(
    interleaved: bool,
) -> None:
    rope = Rope.create(FREQUENCIES[:5], interleaved=interleaved)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 16)), jnp.float32)
    rotated = rope.rotate(x, jnp.array([0, 7, -7]))
    np.testing.assert_array_equal(rotated[..., 10:], x[..., 10:])
    np.testing.assert_array_equal(rotated[0], x[0])
    back = rope.rotate(rotated, jnp.array([0, -7, 7]))
    np.testing.assert_allclose(back, x, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)


def test_frequencies_are_one_dimensional() -> None:
    with pytest.raises(ValueError, match="one number a pair"):
        Rope.create(np.ones((2, 2)))
