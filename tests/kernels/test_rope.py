"""rope: against complex numbers in float64 that are turned one by one; its gradient turns back; refusals."""

import cmath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai_kernels import rope
from hsai_kernels.ops.rope.shapes import SHAPES
from tests.kernels.tolerances import assert_close


def draw(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
    """x, cosines, sines, and the angles (..., T, H/2)."""
    rng = np.random.default_rng(shape[-1])
    angles = rng.uniform(-20.0, 20.0, (*shape[:-2], shape[-1] // 2))
    cos, sin = (jnp.asarray(f(angles)[..., None, :], jnp.float32) for f in (np.cos, np.sin))
    return jnp.asarray(rng.standard_normal(shape), dtype), cos, sin, angles


def turn(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Each pair as a complex number, times that of its angle."""
    out, half = np.zeros(x.shape), x.shape[-1] // 2
    for *lead, token, head, pair in np.ndindex(*x.shape[:-1], half):
        at = (*lead, token, head)
        turned = complex(x[*at, pair], x[*at, pair + half]) * cmath.exp(1j * angles[*lead, token, pair])
        out[*at, pair], out[*at, pair + half] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_match_the_oracle(shape: tuple[int, ...], dtype: str) -> None:
    x, cos, sin, angles = draw(shape, dtype)
    out, pull = jax.vjp(lambda x: rope(x, cos, sin), x)
    assert out.dtype == dtype
    exact = np.asarray(x, np.float64)
    assert_close(out, turn(exact, angles), 2.0 * np.abs(exact).max(), dtype)
    (back,) = pull(x)
    assert_close(back, turn(exact, -angles), 2.0 * np.abs(exact).max(), dtype)


X, COS = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 1, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[..., :7]}, r"even H, got shape \(2, 3, 4, 7\)"),
        ({"x": X[0, 0]}, r"got shape \(4, 8\)"),
        ({"x": X.astype(jnp.int32)}, "floating x, got int32"),
        ({"cos": COS[:1]}, r"cos is float32 \(1, 3, 1, 4\), must be float32 \(2, 3, 1, 4\)"),
        ({"sin": COS.astype(jnp.bfloat16)}, "sin is bfloat16"),
        ({"implementation": "tpu"}, "unknown implementation 'tpu' of rope: valid are reference"),
    ],
)
def test_refusals_name_both_values(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "cos": COS, "sin": COS} | changes
    with pytest.raises(ValueError, match=message):
        rope(**arguments)
