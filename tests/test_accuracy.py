"""`value_and_hypergrad(accuracy=...)`: as exact as was asked for, or it says that it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difflbfgs as dl
from problems import relative_error


def logistic(n, dtype=jnp.float64):
    """Return a ridge-penalised logistic regression of `n` weights, its outer loss and `theta`."""
    rng = np.random.default_rng(n)
    X = jnp.asarray(rng.normal(size=(2 * n, n)) / np.sqrt(n), dtype)
    y = jnp.asarray(rng.uniform(size=2 * n) < 0.4, dtype)
    target = jnp.asarray(rng.normal(size=n), dtype)

    def inner(w, theta):
        return jnp.sum(jnp.logaddexp(0, X @ w) - y * (X @ w)) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)

    def outer(w, theta):
        return jnp.sum((w - target) ** 2) + 0.01 * jnp.sum(theta**2)

    return inner, outer, jnp.linspace(-2, 1, n).astype(dtype)


PROBLEMS = {n: logistic(n) for n in (8, 100)}


def exact(n):
    inner, outer, theta = PROBLEMS[n]
    solver = dl.LBFGS(rtol=1e-14, polish=3)
    return jax.grad(lambda t: outer(dl.minimize(inner, jnp.zeros(n), t, solver=solver).value, t))(
        theta
    )


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
    n = request.param
    return n, *PROBLEMS[n], exact(n)


def cost(info):
    stats = info.solution.stats
    return int(stats.num_fun_evals + stats.num_hvps + info.num_adjoint_steps) + int(
        info.num_estimate_steps
    )


def test_the_error_is_what_was_asked_for_and_looser_costs_less(problem):
    n, inner, outer, theta, truth = problem

    @jax.jit
    def step(accuracy):
        return dl.value_and_hypergrad(outer, inner, accuracy=accuracy)(theta, jnp.zeros(n))

    costs = []
    for accuracy in (1e-1, 1e-2, 1e-4, 1e-6, 1e-8):
        value, grad, info = step(accuracy)
        assert info.result == dl.RESULTS.successful
        assert relative_error(grad, truth) <= 1.5 * accuracy
        error = jnp.linalg.norm(grad - truth)
        assert error <= 1.5 * info.error_estimate
        assert info.error_estimate <= accuracy * jnp.linalg.norm(grad)
        assert value == outer(info.solution.value, theta)
        costs.append(cost(info))
    default = cost(dl.value_and_hypergrad(outer, inner)(theta, jnp.zeros(n))[2])
    if n > 64:
        assert costs == sorted(costs)
        assert costs[0] <= 0.6 * default


@pytest.mark.slow
def test_what_comes_back_belongs_together(problem):
    n, inner, outer, theta, _ = problem
    _, grad, info = dl.value_and_hypergrad(outer, inner, accuracy=1e-3)(theta, jnp.zeros(n))
    sol = info.solution
    x = sol.value
    np.testing.assert_allclose(sol.objective, inner(x, theta), rtol=1e-14)
    g = jax.grad(inner)(x, theta)
    np.testing.assert_allclose(sol.stats.grad_norm, jnp.linalg.norm(g), rtol=1e-6)
    u = info.state.adjoint
    u = u[0] if isinstance(u, list) else u
    along = jax.grad(lambda t: outer(x, t) - u @ jax.grad(inner)(x, t))(theta)
    np.testing.assert_allclose(grad, along, rtol=1e-9, atol=1e-12)
    H = jax.hessian(inner)(x, theta)
    v = jax.grad(outer)(x, theta)
    residual = jnp.linalg.norm(v - H @ u) / jnp.linalg.norm(v)
    np.testing.assert_allclose(info.adjoint_residual, residual, rtol=0.1, atol=1e-14)


@pytest.mark.slow
def test_a_warm_call_costs_little(problem):
    n, inner, outer, theta, _ = problem
    step = jax.jit(dl.value_and_hypergrad(outer, inner, accuracy=1e-3))
    _, _, cold = step(theta, jnp.zeros(n))
    moved = theta + 1e-3
    _, grad, warm = step(moved, jnp.zeros(n), cold.state)
    _, fresh, _ = jax.jit(dl.value_and_hypergrad(outer, inner))(moved, jnp.zeros(n))
    assert relative_error(grad, fresh) <= 1.5e-3
    assert warm.solution.stats.num_fun_evals < cold.solution.stats.num_fun_evals
    _, _, again = step(theta, jnp.zeros(n), cold.state)
    assert again.result == dl.RESULTS.successful
    assert cost(again) < cost(cold)


@pytest.mark.slow
@pytest.mark.parametrize("n", PROBLEMS)
def test_out_of_reach_in_float32_says_so_and_returns_the_best_it_has(n):
    inner, outer, theta = logistic(n, jnp.float32)
    x0 = jnp.zeros(n, jnp.float32)
    step = dl.value_and_hypergrad(outer, inner, accuracy=1e-12, throw=False)
    _, grad, info = jax.jit(step)(theta, x0)
    assert info.result == dl.RESULTS.accuracy_not_reached
    assert info.solution.converged
    assert info.error_estimate < 1e-4 * jnp.linalg.norm(grad)
    assert jnp.all(jnp.isfinite(grad))
    with pytest.raises(RuntimeError, match="as exact as `accuracy`"):
        jax.block_until_ready(dl.value_and_hypergrad(outer, inner, accuracy=1e-12)(theta, x0)[1])


@pytest.mark.slow
def test_out_of_steps(problem):
    n, inner, outer, theta, truth = problem
    step = dl.value_and_hypergrad(outer, inner, accuracy=1e-6, max_steps=1, throw=False)
    _, grad, info = step(theta, jnp.zeros(n))
    assert info.result == dl.RESULTS.max_steps_reached
    assert jnp.all(jnp.isnan(grad))
    assert jnp.isinf(info.error_estimate)
    for steps in (4, 6, 8, 12):
        step = dl.value_and_hypergrad(outer, inner, accuracy=1e-1, max_steps=steps, throw=False)
        _, grad, info = step(theta, jnp.zeros(n))
        assert info.solution.stats.num_steps <= steps
        if info.result == dl.RESULTS.successful:
            assert relative_error(grad, truth) <= 0.15
        elif info.result == dl.RESULTS.max_steps_reached:
            assert jnp.all(jnp.isnan(grad))


@pytest.mark.slow
def test_lanes_get_what_each_asked_for():
    n = 8
    inner, outer, theta = PROBLEMS[n]
    thetas = theta + jnp.linspace(-1, 1, 5)[:, None]
    accuracies = jnp.asarray([1e-1, 1e-8, 1e-3, 1e-2, 1e-6])

    def step(theta, accuracy):
        return dl.value_and_hypergrad(outer, inner, accuracy=accuracy)(theta, jnp.zeros(n))

    _, grads, infos = jax.jit(jax.vmap(step))(thetas, accuracies)
    for k, theta in enumerate(thetas):
        _, alone, info = step(theta, accuracies[k])
        _, fine, _ = dl.value_and_hypergrad(outer, inner)(theta, jnp.zeros(n))
        assert relative_error(grads[k], fine) <= 1.5 * accuracies[k]
        np.testing.assert_allclose(grads[k], alone, rtol=1e-9, atol=1e-12)
        assert infos.solution.stats.num_fun_evals[k] == info.solution.stats.num_fun_evals


def test_an_absolute_accuracy_where_the_hypergradient_vanishes():
    """`F = (x - 1)²` and `x* = θ`: at `θ = 1` nothing is small beside the hypergradient."""

    def inner(x, t):
        return jnp.cosh(x - t) + 0.1 * (x - t) ** 4

    def outer(x, t):
        return (x - 1) ** 2

    step = dl.value_and_hypergrad(outer, inner, accuracy=(1e-2, 1e-8))
    _, grad, info = step(1.0, 0.3)
    assert info.result == dl.RESULTS.successful
    assert abs(grad) < 2e-8
    assert info.error_estimate <= 1e-8 + 1e-2 * abs(grad)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 5, 6])  # with the last two, a loose solve is on another face
@pytest.mark.parametrize("n", [6, 80])
def test_bounds_hold_and_the_derivative_knows_them(n, seed):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n)) / np.sqrt(n)
    H = jnp.asarray(A @ A.T + np.eye(n))
    theta = jnp.asarray(rng.normal(size=n))

    def inner(x, t):
        return 0.5 * x @ H @ x - t @ x + 0.1 * jnp.sum(x**4)

    def outer(x, t):
        return jnp.sum(jnp.sin(x))

    def bounds(t):
        return 0.1 * t[0], None

    _, truth, fine = dl.value_and_hypergrad(outer, inner, bounds=bounds)(theta, jnp.ones(n))
    for accuracy in (1e-1, 1e-4):
        step = dl.value_and_hypergrad(outer, inner, bounds=bounds, accuracy=accuracy)
        _, grad, info = jax.jit(step)(theta, jnp.ones(n))
        assert relative_error(grad, truth) <= 1.5 * accuracy
        assert jnp.all(info.solution.value >= 0.1 * theta[0])
        assert jnp.array_equal(info.solution.active, fine.solution.active)
        assert info.solution.stats.num_active == fine.solution.stats.num_active > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "adjoint",
    [
        dl.QuasiNewtonAdjoint(),
        dl.ImplicitAdjoint(ridge=0.1),
        dl.ImplicitAdjoint(preconditioner="lbfgs"),
        dl.ImplicitAdjoint(rtol=0.3),
        dl.ForwardImplicitAdjoint(),
    ],
    ids=lambda a: type(a).__name__,
)
def test_every_adjoint_gets_as_exact_as_was_asked_for(problem, adjoint):
    n, inner, outer, theta, truth = problem
    step = dl.value_and_hypergrad(outer, inner, accuracy=1e-4, adjoint=adjoint)
    _, grad, info = step(theta, jnp.zeros(n))
    assert info.result == dl.RESULTS.successful
    assert relative_error(grad, truth) <= 1.5e-4


def test_a_start_far_away_and_a_saddle():
    def inner(x, t):
        return jnp.sum((x**2 - t) ** 2)

    def outer(x, t):
        return jnp.sum(x)

    step = dl.value_and_hypergrad(outer, inner, accuracy=1e-2, throw=False)
    _, grad, info = step(2.0, jnp.asarray([300.0, 0.4]))
    assert info.result == dl.RESULTS.successful
    np.testing.assert_allclose(grad, 1 / np.sqrt(2), rtol=1.5e-2)
    _, grad, info = step(2.0, jnp.zeros(2))
    assert info.result == dl.RESULTS.indefinite_hessian
    assert jnp.isnan(grad)


@pytest.mark.parametrize("units", [(1e-4, 1.0, 1e3), (1e-4, 1e-6, 1e-7), (1e2, 1e4, 1e5)])
def test_extreme_curvatures_are_those_of_the_hessian_in_any_units(units):
    """The factorisation sees scaled variables, where all curvatures are about one."""
    units = jnp.asarray(units)

    def inner(x, t):
        return jnp.sum(jnp.cosh(x / units - t))

    step = dl.value_and_hypergrad(lambda x, t: jnp.sum(x / units), inner, accuracy=1e-4)
    _, _, info = step(0.3, jnp.zeros(3))
    values = jnp.linalg.eigvalsh(jax.hessian(inner)(info.solution.value, 0.3))
    np.testing.assert_allclose(info.min_curvature, values[0], rtol=1e-9)
    np.testing.assert_allclose(info.max_curvature, values[-1], rtol=1e-9)


def test_the_value_can_be_differentiated(problem):
    n, inner, outer, theta, truth = problem
    step = dl.value_and_hypergrad(outer, inner, accuracy=1e-6)
    along = jax.grad(lambda t: step(t, jnp.zeros(n))[0])(theta)
    assert relative_error(along, truth) <= 1.5e-6


@pytest.mark.parametrize(
    ("accuracy", "kind"),
    [
        ("1e-3", TypeError),
        (True, TypeError),
        (0.0, ValueError),
        (-1e-3, ValueError),
        ((0.0, 0.0), ValueError),
        ((1e-3, 1e-3, 1e-3), ValueError),
        (jnp.ones(2), ValueError),
    ],
)
def test_bad_accuracies_are_named(accuracy, kind):
    with pytest.raises(kind, match="accuracy"):
        dl.value_and_hypergrad(lambda x, t: x, lambda x, t: x**2, accuracy=accuracy)
