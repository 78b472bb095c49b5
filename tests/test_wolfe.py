"""The line search alone, driven by functions of one variable."""

import jax
import jax.numpy as jnp
import pytest

from difflbfgs import _wolfe
from difflbfgs._wolfe import MAX_TRIALS, Trial


def searched(phi, first, level=None, trials=MAX_TRIALS):
    """Return the trials of a search along `phi` from 0, and whether the last one holds."""
    value_and_slope = jax.jit(jax.value_and_grad(phi))
    f, slope = value_and_slope(0.0)
    level = f + 1e-15 * jnp.abs(f) if level is None else jnp.asarray(level)
    line, lengths = _wolfe.begin(f, slope, jnp.asarray(first)), []
    for _ in range(trials):
        trial = Trial(line.t, *value_and_slope(line.t))
        finite = jnp.isfinite(trial.f) & jnp.isfinite(trial.slope)
        lengths.append(float(line.t))
        judged = _wolfe.judge(line, f, slope, trial, level, finite, trial.t * slope)
        if judged.holds:
            return lengths, True, line
        line = _wolfe.advance(line, trial, judged, finite)
    return lengths, False, line


def is_strong_wolfe(phi, t):
    f, slope = jax.value_and_grad(phi)(0.0)
    end, along = jax.value_and_grad(phi)(t)
    bound = f + 1e-4 * t * slope
    return end <= bound + 1e-12 * abs(f) and abs(along) <= 0.9 * abs(slope)


# Moré & Thuente (ACM Transactions on Mathematical Software 20, 1994), their functions 1 to 3.
FUNCTIONS = {
    "more-thuente-1": lambda t: -t / (t**2 + 2),
    "more-thuente-2": lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
    "more-thuente-3": lambda t: (
        jnp.where(
            t <= 0.9,
            1 - t,
            jnp.where(t >= 1.1, t - 1, (t - 1) ** 2 / 0.2 + 0.05),
        )
        + 2 * 0.99 / (39 * jnp.pi) * jnp.sin(39 * jnp.pi / 2 * t)
    ),
    "quadratic": lambda t: (t - 3) ** 2,
    "exponential": lambda t: jnp.exp(t) - 10 * t,
    "barrier": lambda t: -jnp.log(1 - t) - 20 * t,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("first", [1e-3, 1e-1, 1.0, 10.0, 1e3])
def test_it_ends_at_a_strong_wolfe_point(name, first):
    phi = FUNCTIONS[name]
    lengths, holds, _ = searched(phi, first)
    assert holds
    assert is_strong_wolfe(phi, lengths[-1])
    assert len(lengths) <= 16


def test_a_quadratic_takes_one_interpolation():
    lengths, holds, _ = searched(FUNCTIONS["quadratic"], 100.0)
    assert holds
    assert len(lengths) <= 4


def test_extrapolation_is_not_shy():
    lengths, holds, _ = searched(lambda t: (t - 1e6) ** 2, 1.0)
    assert holds
    assert len(lengths) <= 8


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan, -jnp.nan])
def test_a_trial_that_is_not_finite_is_stepped_back_from(bad):
    def phi(t):
        return jnp.where(t < 1, (t - 0.5) ** 2, bad)

    lengths, holds, _ = searched(phi, 50.0)
    assert holds
    assert lengths[-1] < 1
    assert len(lengths) <= 6


def test_a_gradient_that_is_not_finite_is_stepped_back_from_too():
    def phi(t):
        return (t - 0.5) ** 2 + 1e-9 * jnp.sqrt(jnp.maximum(2 - t, 0))

    slope = jax.grad(phi)(2.0)
    assert not jnp.isfinite(slope)
    lengths, holds, _ = searched(phi, 2.0)
    assert holds
    assert lengths[0] == 2.0
    assert lengths[-1] < 1


def test_within_rounding_the_slope_decides():
    """The decrease of 1e-20 is lost beside 1, which rounds upwards; the slope is exact."""

    def phi(t):
        return 1 + 1e-20 * (t - 1) ** 2 + jnp.where(t > 0, 4e-16, 0.0)

    lengths, holds, _ = searched(phi, 1.0)
    assert (lengths, holds) == ([1.0], True)
    assert not searched(phi, 1.0, level=phi(0.0))[1]


def test_the_best_length_is_not_lost():
    def phi(t):  # steep everywhere: no length satisfies the curvature condition
        return -t + 1e-3 * jnp.floor(t)

    _, holds, line = searched(phi, 1.0)
    assert not holds
    assert line.low.t > 1e6
    assert _wolfe.settled(line).t == line.low.t


@pytest.mark.parametrize("t", [1.0, 1e-3, 1e-6, 1e-9])
def test_noise_is_what_slopes_do_not_explain(t):
    def rest(phi, wrong=1.0, off=0.0):
        start, end = ((phi(a), wrong * jax.grad(phi)(a)) for a in jnp.asarray([0.0, t]))
        return _wolfe.unexplained(*start, Trial(jnp.asarray(t), end[0] + off, end[1]))

    for phi in (jnp.exp, jnp.cos, lambda t: -jnp.abs(t - 1e-7), lambda t: t**3 - t):
        assert rest(phi) == 0  # smooth, and with a kink
        for wrong in (-1.0, 0.2, 5.0):
            assert rest(phi, wrong) == 0
    assert rest(lambda s: -1e-9 * s, off=1e-7) == pytest.approx(1e-7, rel=0.02)
    assert rest(lambda s: -s, off=1e-7) == pytest.approx(1e-7 if t < 1e-7 else 0)
    start = jnp.asarray(1.0), jnp.asarray(-1e-9)
    noisy = Trial(jnp.asarray(t), jnp.asarray(2.0), jnp.asarray(-1e-9))
    assert _wolfe.unexplained(*start, noisy) > 0.9
    assert _wolfe.unexplained(*start, noisy, jnp.asarray(True)) == 0
