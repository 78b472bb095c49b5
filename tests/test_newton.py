"""The Newton step and what it says of its point, without a solve around it."""

import jax.numpy as jnp
import numpy as np
import pytest

from difflbfgs._newton import newton_step
from difflbfgs._solution import count

BOTH = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
SIZES = pytest.mark.parametrize("n", [6, 40])  # assembled, and by products


def found(eigenvalues, slopes, dtype, units=1.0):
    """Return the step of a rotated quadratic with these eigenvalues and slopes along their axes."""
    rng = np.random.default_rng(3)
    Q = np.linalg.qr(rng.normal(size=(len(slopes), len(slopes))))[0]
    units = np.broadcast_to(units, len(slopes))
    H = jnp.asarray(units[:, None] * (Q @ np.diag(eigenvalues) @ Q.T) * units, dtype)
    g = jnp.asarray(units * (Q @ slopes), dtype)
    x = jnp.asarray(rng.normal(size=len(slopes)) / units, dtype)
    rtol, decrement = (jnp.asarray(k, dtype) for k in (jnp.finfo(dtype).eps ** 0.5, 1e-6))
    d, _, findings = newton_step(
        lambda p: H @ p, x, g, x, decrement, rtol, count(400), jnp.asarray(True)
    )
    exact = -np.linalg.solve(np.asarray(H, float), np.asarray(g, float)) if all(eigenvalues) else g
    error = np.asarray(d, float) - exact
    return findings, np.sqrt(abs(error @ np.asarray(H, float) @ error))


@BOTH
@SIZES
@pytest.mark.parametrize("spread", [0, 3])
def test_solves_the_system_in_whatever_units(dtype, n, spread):
    units = 10.0 ** np.random.default_rng(0).uniform(-spread, spread, n)
    findings, error = found(np.linspace(1, 10, n), np.ones(n), dtype, units)
    assert findings.valid & findings.solved & ~findings.negative & ~findings.falls & ~findings.steep
    assert error <= 0.05 * np.sqrt(np.sum(1 / np.linspace(1, 10, n)))


@BOTH
@SIZES
def test_a_slope_without_curvature_is_no_rounding(dtype, n):
    eigenvalues, slopes = np.linspace(0, 10, n), np.ones(n)
    flat, _ = found(eigenvalues, slopes, dtype)
    assert flat.steep & ~flat.solved
    slopes[0] = 0
    symmetric, _ = found(eigenvalues, slopes, dtype)
    assert ~symmetric.steep & symmetric.solved
    hidden, _ = found(eigenvalues, np.full(n, float(jnp.finfo(dtype).eps)), dtype)
    assert ~hidden.steep & ~hidden.solved


@pytest.mark.parametrize(("n", "dtype"), [(6, jnp.float32), (6, jnp.float64), (40, jnp.float64)])
def test_a_small_slope_without_curvature_is_not_solved_with_the_rest(n, dtype):
    """It is a part of the residual that may be left, and leads far away.

    Beyond 24 variables conjugate gradients in float32 end before they meet it.
    """
    eigenvalues, slopes = np.linspace(0, 10, n), np.ones(n)
    slopes[0] = 1e-3
    flat, _ = found(eigenvalues, slopes, dtype)
    assert flat.steep & ~flat.solved


@BOTH
@SIZES
def test_negative_curvature_is_seen(dtype, n):
    findings, _ = found(np.linspace(-1, 10, n), np.ones(n), dtype)
    assert findings.negative & ~findings.valid
