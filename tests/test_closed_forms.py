"""Hypergradients against closed forms and against differences of the solve itself."""

import jax
import jax.numpy as jnp
import pytest

import difflbfgs as dl
from problems import (
    THETA,
    TIGHT,
    C,
    outer,
    quadratic,
    relative_error,
    ridge,
    ridge_solution,
    tolerance,
)


def test_ridge_hypergradient_and_objective():
    def found(theta):
        return outer(dl.minimize(ridge, jnp.zeros(5), theta, solver=TIGHT).value)

    def exact(theta):
        return outer(ridge_solution(theta))

    assert relative_error(jax.grad(found)(THETA), jax.grad(exact)(THETA)) < 1e-10


def test_ridge_at_default_settings():
    def found(theta):
        return outer(dl.minimize(ridge, jnp.zeros(5), theta).value)

    exact = jax.grad(lambda theta: outer(ridge_solution(theta)))(THETA)
    assert relative_error(jax.grad(found)(THETA), exact) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_quadratic_at_default_settings(condition, dtype):
    """Right to 1e-6 in float64 up to condition 1e4; beyond that and in float32 right or flagged."""
    fun, solution, theta = quadratic(condition)
    c = jnp.sin(jnp.arange(20.0))

    def found(theta):
        sol = dl.minimize(fun, jnp.zeros(20, dtype), theta, max_steps=20_000, throw=False)
        return c.astype(dtype) @ sol.value

    gradient = jax.jit(jax.grad(found))(theta.astype(dtype))
    assert gradient.dtype == dtype
    error = relative_error(gradient, jax.grad(lambda t: c @ solution(t))(theta))
    eps = float(jnp.finfo(dtype).eps)
    if dtype == jnp.float64 and condition <= 1e4:
        assert error < 1e-6
    else:  # a NaN is a flag, and fails this comparison
        assert not error >= 10 * condition * eps
        assert not error >= 1e-2


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_quadratic_without_a_matrix(condition):
    fun, solution, theta = quadratic(condition)
    c = jnp.sin(jnp.arange(20.0))
    adjoint = dl.ImplicitAdjoint(linear_solver=conjugate_gradient())

    def found(theta):
        sol = dl.minimize(fun, jnp.zeros(20), theta, adjoint=adjoint, max_steps=20_000)
        return c @ sol.value

    exact = jax.grad(lambda t: c @ solution(t))(theta)
    assert relative_error(jax.jit(jax.grad(found))(theta), exact) < 1e-6


def test_the_polish_rescues_what_rounding_stopped():
    """L-BFGS alone ends above the tolerance here: the objective's rounding hides the decrease."""
    for seed in range(8):
        fun, solution, theta = quadratic(1e7, seed=seed)

        def solve(polish, fun=fun, theta=theta):
            solver = dl.LBFGS(polish=polish)
            return dl.minimize(
                fun, jnp.zeros(20), theta, solver=solver, max_steps=20_000, throw=False
            )

        assert solve(polish=0).result != dl.RESULTS.successful
        polished = solve(polish=1)
        assert polished.result == dl.RESULTS.successful
        exact = solution(theta)
        assert relative_error(polished.value, exact) < tolerance(jnp.float64, 10 * 1e7)


def conjugate_gradient():
    """Return the matrix-free solver that large problems get by default."""
    from difflbfgs._linear import ConjugateGradient

    return ConjugateGradient(1e-12, 2000)


def test_richardson_differences_of_the_solve():
    def fun(x, theta):
        return jnp.sum(jnp.cosh(x - theta)) + 0.3 * jnp.sum(x**2 * theta) ** 2 + x[0] * theta[1]

    theta = jnp.asarray([0.7, -0.2, 1.1])
    solver = dl.LBFGS(rtol=1e-14)

    @jax.jit
    def loss(theta):
        x = dl.minimize(fun, jnp.zeros(3), theta, solver=solver, max_steps=5000).value
        return C[:3] @ x**2

    def slope(direction, h):
        return (loss(theta + h * direction) - loss(theta - h * direction)) / (2 * h)

    def richardson(direction, h=1e-2):
        rows = [[slope(direction, h / 2**i)] for i in range(4)]
        for i in range(1, 4):
            for k in range(1, i + 1):
                better = rows[i][k - 1] + (rows[i][k - 1] - rows[i - 1][k - 1]) / (4**k - 1)
                rows[i].append(better)
        return rows[-1][-1]

    differences = jnp.stack([richardson(e) for e in jnp.eye(3)])
    assert relative_error(jax.grad(loss)(theta), differences) < 1e-8


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_outer_loss_does_not_change_the_relative_error(scale):
    @jax.jit
    def gradient(scale, theta):
        return jax.grad(
            lambda t: scale * outer(dl.minimize(ridge, jnp.zeros(5), t, solver=TIGHT).value)
        )(theta)

    exact = jax.grad(lambda theta: outer(ridge_solution(theta)))(THETA)
    assert relative_error(gradient(scale, THETA) / scale, exact) < 1e-10


def test_consistency_with_the_outer_loss_equal_to_the_objective():
    fun, _, theta = quadratic(1e2)

    def total(theta):
        return fun(dl.minimize(fun, jnp.ones(20), theta, solver=TIGHT).value, theta)

    x = dl.minimize(fun, jnp.ones(20), theta, solver=TIGHT).value
    partial = jax.grad(fun, argnums=1)(x, theta)
    assert relative_error(jax.grad(total)(theta), partial) < 1e-9
