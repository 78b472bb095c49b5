"""Minimizers that were found elsewhere: which are accepted, and how they are differentiated."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix
import pytest
import scipy.optimize

import difflbfgs as dl
from problems import (
    THETA,
    TIGHT,
    outer,
    quadratic,
    relative_error,
    ridge,
    ridge_solution,
    tolerance,
)

pytestmark = pytest.mark.slow

SOLUTION = ridge_solution(THETA)
EXACT = jax.grad(lambda theta: outer(ridge_solution(theta)))(THETA)


def gradient(x, theta=THETA, fun=ridge, loss=outer, **options):
    """Return the hypergradient at a minimizer that is known."""

    def value(theta):
        return loss(dl.known_minimizer(fun, x, theta, **options).value)

    return jax.jit(jax.grad(value))(theta)


def ending(fun, x, theta=None, **options) -> str:
    """Return the name of the member of `RESULTS` with which the check ends."""
    found = dl.known_minimizer(fun, x, theta, throw=False, **options)
    names = [
        "successful precision_limit nonfinite_start nonfinite_hessian",
        "indefinite_hessian not_a_minimizer",
    ]
    (name,) = (n for n in " ".join(names).split() if found.result == getattr(dl.RESULTS, n))
    assert bool(found.converged) == (name in ("successful", "precision_limit"))
    return name


def cosh(x, theta):
    """An objective that is no quadratic, in any number of variables."""
    center = jnp.sin(jnp.arange(x.size, dtype=x.dtype))
    return jnp.sum(jnp.cosh(x - theta * center)) + 0.1 * jnp.sum(x) ** 2 / x.size


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "Newton-CG"])
def test_the_answer_of_scipy(method):
    value_and_gradient = jax.jit(jax.value_and_grad(ridge))

    def fun(x):
        value, gradient = value_and_gradient(jnp.asarray(x), THETA)
        return float(value), np.asarray(gradient)

    options = {"L-BFGS-B": {"ftol": 0.0, "gtol": 1e-9}, "BFGS": {"gtol": 1e-9}, "Newton-CG": {}}
    found = scipy.optimize.minimize(
        fun, np.zeros(5), jac=True, method=method, options=options[method]
    )
    sol = dl.known_minimizer(ridge, found.x, THETA)
    assert np.array_equal(sol.value, found.x)
    assert sol.objective == pytest.approx(float(ridge(SOLUTION, THETA)), rel=1e-12)
    # The derivative is as wrong as the point.
    error = relative_error(found.x, SOLUTION)
    assert relative_error(gradient(found.x), EXACT) < 10 * error + tolerance(jnp.float64, 1e3)


@pytest.mark.parametrize("solver", [optimistix.BFGS, optimistix.LBFGS])
@pytest.mark.parametrize("rtol", [1e-6, 1e-12])
def test_the_answer_of_optimistix(solver, rtol):
    solver = solver(rtol=rtol, atol=rtol)

    def found(theta):
        return optimistix.minimise(ridge, solver, jnp.zeros(5), theta).value

    def loss(theta):
        return outer(dl.known_minimizer(ridge, found(theta), theta).value)

    error = relative_error(found(THETA), SOLUTION)
    assert 0 < error < 1e-6
    # Neither more wrong than the point, nor exact: that is where it was differentiated.
    assert 0.1 * error < relative_error(jax.jit(jax.grad(loss))(THETA), EXACT) < 10 * error


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4])
@pytest.mark.parametrize("n", [1, 20, 80])
def test_a_closed_form(n, condition, dtype):
    fun, solution, theta = quadratic(condition, n)
    c = jnp.sin(jnp.arange(1.0, n + 1)).astype(dtype)
    found = gradient(solution(theta).astype(dtype), theta.astype(dtype), fun, lambda x: c @ x)
    assert found.dtype == dtype
    exact = jax.grad(lambda theta: jnp.sin(jnp.arange(1.0, n + 1)) @ solution(theta))(theta)
    # Conjugate gradients, beyond 64 variables, stop at a residual of 3e-11 at the least.
    least = 3e-11 * condition**0.5 if n > 64 else 0.0
    assert relative_error(found, exact) < tolerance(dtype, 100 * condition) + least


@pytest.mark.parametrize(("n", "dtype"), [(3, jnp.float32), (80, jnp.float32), (80, jnp.float64)])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_factor_of_the_objective_changes_nothing(scale, n, dtype):
    """Squares of these gradients are out of the range of float32."""
    x0 = jnp.zeros(n, dtype)
    x = dl.minimize(cosh, x0, jnp.asarray(0.7, dtype)).value
    factor = jnp.asarray(scale, dtype)

    def scaled(x, theta):
        return factor * cosh(x, theta)

    def found(fun):
        return gradient(x, jnp.asarray(0.7, dtype), fun, lambda x: x[0] + x[-1])

    assert relative_error(found(scaled), found(cosh)) < tolerance(dtype, 1e3) + 1e-9
    assert ending(scaled, x, jnp.asarray(0.7, dtype)) != "not_a_minimizer"
    assert ending(scaled, x, jnp.asarray(0.75, dtype)) == "not_a_minimizer"


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(4, jnp.float32), (64, jnp.float64), (65, jnp.float32), (65, jnp.float64), (200, jnp.float64)],
)
def test_what_is_near_enough_is_accepted_and_nothing_else(n, dtype):
    """A relative error just below and just above the tolerance, in the energy norm."""
    n_eigenvalues = jnp.logspace(0, 2, n).astype(dtype)

    def fun(x, b):
        return 0.5 * jnp.sum(n_eigenvalues * (x - b) ** 2)

    b = jnp.cos(jnp.arange(n, dtype=dtype))
    direction = jnp.sin(jnp.arange(n, dtype=dtype))
    energy = jnp.sqrt(jnp.sum(n_eigenvalues * b**2) / jnp.sum(n_eigenvalues * direction**2))
    rtol = float(jnp.finfo(dtype).eps) ** 0.25
    for factor, expected in ((0.9, "successful"), (1.1, "not_a_minimizer")):
        x = b + factor * rtol * energy * direction
        assert ending(fun, x, b) == expected
        # Arrays, so that one program does for all.
        other = [jnp.asarray(k * rtol, dtype) for k in (2.0, 0.5, 0.0)]
        assert ending(fun, x, b, rtol=other[0]) == "successful"
        assert ending(fun, x, b, rtol=other[1]) == "not_a_minimizer"
    for atol, expected in ((1e3, "successful"), (1e-3, "not_a_minimizer")):
        assert ending(fun, x, b, rtol=other[2], atol=jnp.asarray(atol, dtype)) == expected


@pytest.mark.parametrize("n", [2, 80])
def test_units_of_the_variables_change_nothing(n):
    """Each variable in a unit of its own, over twelve orders of magnitude."""
    units = jnp.logspace(-6, 6, n)

    def fun(x, theta):
        return cosh(x * units, theta)

    x = dl.minimize(cosh, jnp.zeros(n), 0.7, solver=TIGHT).value / units
    found = gradient(x, 0.7, fun, lambda x: jnp.sum(x * units))
    plain = gradient(x * units, 0.7, cosh, jnp.sum)
    assert relative_error(found, plain) < 1e-9
    assert ending(fun, x, 0.71) == "not_a_minimizer"


@pytest.mark.parametrize("n", [2, 64])
def test_saddle_points_are_refused(n):
    """The gradient does not see the direction of negative curvature; the Hessian does."""

    def saddle(x, theta):
        return jnp.sum((x[1:] - theta) ** 2) - x[0] ** 2

    for moved in (0.0, 1e-12, 1e-9):
        x = jnp.ones(n).at[0].set(0.0).at[-1].add(moved)
        assert ending(saddle, x, 1.0) == "indefinite_hessian"
    with pytest.raises(RuntimeError, match="negative curvature"):
        dl.known_minimizer(saddle, x, 1.0)


@pytest.mark.parametrize("n", [2, 64, 65, 300])
def test_maxima_are_refused(n):
    def hill(x, theta):
        return -cosh(x, theta)

    top = dl.minimize(cosh, jnp.zeros(n), 0.7).value
    assert ending(hill, jnp.zeros(n), 0.0) == "indefinite_hessian"
    assert ending(hill, top, 0.7) in ("indefinite_hessian", "not_a_minimizer")
    assert ending(hill, jnp.zeros(n), 0.0, atol=1.0) == "indefinite_hessian"


def test_a_saddle_point_of_many_variables_is_seen_where_the_gradient_vanishes():
    def saddle(x, theta):
        return jnp.sum((x[1:] - theta) ** 2) - x[0] ** 2

    x = jnp.ones(100).at[0].set(0.0)
    assert ending(saddle, x, 1.0) == "indefinite_hessian"


@pytest.mark.parametrize("n", [3, 80])
def test_a_point_far_away_is_refused(n):
    """Also in a region of negative curvature, which says nothing about a saddle point there."""

    def wave(x, theta):
        return jnp.sum(1 - jnp.cos(x - theta))

    assert ending(wave, jnp.full(n, 2.5), 0.0) == "not_a_minimizer"
    assert ending(wave, jnp.full(n, 0.3), 0.0) == "not_a_minimizer"
    assert ending(wave, jnp.full(n, 2 * jnp.pi + 1e-9), 0.0) == "successful"


def test_a_degenerate_minimum_is_accepted_and_its_derivative_refused():
    def flat(x, theta):
        return jnp.sum((x - theta) ** 4)

    assert ending(flat, jnp.ones(3), 1.0) == "successful"
    assert ending(flat, jnp.ones(80), 1.0) == "successful"
    assert ending(flat, jnp.full(3, 1.01), 1.0) == "not_a_minimizer"  # does not contract
    with pytest.raises(RuntimeError, match="H u = v was not solved"):
        jax.block_until_ready(gradient(jnp.ones(3), 1.0, flat, jnp.sum))


@pytest.mark.parametrize("n", [4, 80])
@pytest.mark.parametrize(("dtype", "height"), [(jnp.float32, 1e3), (jnp.float64, 1e8)])
def test_in_a_flat_valley_the_hessian_decides(n, dtype, height):
    """Beside the energy of a wall the way to the minimizer is nothing, and the valley bends."""
    length = 1e-2

    def fun(x, theta):
        along = x[1:] / length
        valley = jnp.sum(jnp.exp(along) - theta * along)
        return 0.5 * height * (x[0] - 1) ** 2 + length**2 * valley

    def value(theta, away):
        x = length * (jnp.log(theta) + away * jnp.cos(jnp.arange(n - 1.0)))
        x = jnp.concatenate([jnp.ones(1), x]).astype(dtype)
        sol = dl.known_minimizer(fun, x, theta.astype(dtype), throw=False)
        return sol.value[1:].sum(), sol.converged

    theta, exact = 1.5 * jnp.ones(n - 1), length / 1.5
    rtol = float(jnp.finfo(dtype).eps) ** 0.25
    errors = []
    for away in 10.0 ** jnp.arange(-6.0, 1.0, 0.5):
        (_, converged), slope = jax.value_and_grad(value, has_aux=True)(theta, away)
        errors.append(jnp.max(jnp.abs(slope / exact - 1)) if converged else jnp.inf)
    accepted = jnp.isfinite(jnp.stack(errors))
    assert accepted[:4].all() & ~accepted[-3:].any()
    assert max(errors[: int(accepted.sum())]) <= 2 * rtol


@pytest.mark.parametrize("n", [2, 80])
def test_what_is_not_finite(n):
    def broken(x, theta):
        return jnp.sum((x - 1.0) ** 2) + jnp.sum(jnp.where(theta > 0, jnp.nan, 0.0))

    assert ending(broken, jnp.ones(n), 1.0) == "nonfinite_start"
    assert ending(broken, jnp.full(n, jnp.inf), 0.0) == "nonfinite_start"

    def rough(x, theta):
        return jnp.sum(jnp.abs(x - theta) ** 1.5)  # its second derivative is infinite there

    assert ending(rough, jnp.ones(n), 1.0) == "nonfinite_hessian"


def test_at_the_origin_the_gradient_decides():
    def fun(x, theta):
        return jnp.sum(x**2) + theta * jnp.sum(x)

    assert ending(fun, jnp.zeros(2), 0.0) == "successful"
    assert ending(fun, jnp.zeros(2), 1e-9) == "not_a_minimizer"
    assert ending(fun, jnp.zeros(2), 1e-9, atol=1e-8) == "successful"
    assert gradient(jnp.zeros(2), 0.0, fun, jnp.sum) == pytest.approx(-1.0)


WRONG = SOLUTION + 0.01


def loss(theta):
    return outer(dl.known_minimizer(ridge, WRONG, theta).value)


def batch(function):
    return lambda theta: jax.vmap(function)(jnp.stack([theta, 2 * theta]))


@pytest.mark.parametrize(
    "transformed",
    [
        loss,
        jax.jit(loss),
        jax.jit(jax.grad(loss)),
        jax.jit(jax.jacrev(lambda theta: dl.known_minimizer(ridge, WRONG, theta).value)),
        jax.jit(jax.hessian(loss)),
        jax.jit(batch(jax.grad(loss))),
        jax.jit(lambda theta: dl.known_minimizer(ridge, WRONG, theta).objective),
    ],
    ids="plain jit jit-grad jit-jacrev jit-hessian jit-vmap-grad objective".split(),
)
def test_a_point_that_is_no_minimizer_raises(transformed):
    with pytest.raises(RuntimeError, match="not shown to be a minimizer"):
        jax.block_until_ready(transformed(THETA))


def test_without_throw_the_derivative_is_nan_and_the_others_are_kept():
    def total(theta, x):
        sol = dl.known_minimizer(ridge, x, theta, throw=False)
        return jnp.where(sol.converged, outer(sol.value), 0.0)

    def unmasked(theta, x):
        return outer(dl.known_minimizer(ridge, x, theta, throw=False).value)

    xs, thetas = jnp.stack([SOLUTION, WRONG]), jnp.stack([THETA, THETA])
    masked = jax.jit(jax.vmap(jax.grad(total)))(thetas, xs)
    assert relative_error(masked[0], EXACT) < 1e-12
    assert np.array_equal(masked[1], jnp.zeros(3))
    plain = jax.jit(jax.vmap(jax.grad(unmasked)))(thetas, xs)
    assert relative_error(plain[0], EXACT) < 1e-12
    assert np.all(np.isnan(plain[1]))


def test_all_derivatives_are_those_of_minimize():
    def known(theta):
        x = jax.lax.stop_gradient(ridge_solution(theta))
        return dl.known_minimizer(ridge, x, theta)

    def solved(theta):
        return dl.minimize(ridge, jnp.zeros(5), theta, solver=TIGHT)

    def derivatives(solve):
        def value(theta):
            return outer(solve(theta).value)

        def objective(theta):
            return solve(theta).objective

        functions = (
            jax.jacrev(lambda theta: solve(theta).value),
            jax.hessian(value),
            jax.hessian(objective),
        )
        return jax.jit(lambda theta: [function(theta) for function in functions])(THETA)

    for found, exact in zip(derivatives(known), derivatives(solved), strict=True):
        assert relative_error(found, exact) < 1e-9


def test_forward_mode():
    def found(theta):
        x = jax.lax.stop_gradient(SOLUTION)
        return dl.known_minimizer(ridge, x, theta, adjoint=dl.ForwardImplicitAdjoint()).value

    exact = jax.jacfwd(ridge_solution)(THETA)
    assert relative_error(jax.jit(jax.jacfwd(found))(THETA), exact) < 1e-12


def test_the_derivative_by_the_point_is_zero():
    """Also where the point itself depends on theta: its dependence counts once."""

    def value(scale, theta):
        sol = dl.known_minimizer(ridge, scale * ridge_solution(theta), theta)
        return outer(sol.value) + 3 * sol.objective

    by_x, by_theta = jax.jit(jax.grad(value, (0, 1)))(1.0, THETA)
    assert by_x == 0
    exact = jax.grad(
        lambda theta: outer(ridge_solution(theta)) + 3 * ridge(ridge_solution(theta), theta)
    )
    assert relative_error(by_theta, exact(THETA)) < 1e-12


def test_in_vmap_over_points_and_parameters():
    thetas = jnp.stack([THETA * k for k in (0.5, 1.0, 2.0)])
    xs = jax.vmap(ridge_solution)(thetas)

    def both(x, theta):
        sol = dl.known_minimizer(ridge, x, theta)
        return sol.value, sol.stats.num_hvps

    values, products = jax.jit(jax.vmap(both))(xs, thetas)
    assert np.array_equal(values, xs)
    assert products.tolist() == [5, 5, 5]
    found = jax.jit(jax.vmap(lambda x, theta: gradient(x, theta)))(xs, thetas)
    exact = jax.vmap(jax.grad(lambda theta: outer(ridge_solution(theta))))(thetas)
    assert relative_error(found, exact) < 1e-12


class Model(eqx.Module):
    weight: Any
    bias: Any
    name: str = eqx.field(static=True, default="model")
    steps: int = 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_trees(dtype):
    """Modules with static leaves, integers, a complex leaf; theta a dictionary with others."""
    theta = {"a": jnp.arange(1.0, 4.0, dtype=dtype), "k": 2, "z": jnp.asarray(1 + 2j)}
    theta["z"] = theta["z"].astype(jnp.complex64 if dtype == jnp.float32 else jnp.complex128)

    def fun(model, theta):
        assert model.steps == 3
        away = jnp.sum((model.weight - theta["k"] * theta["a"]) ** 2)
        apart = model.bias - theta["z"]
        return away + apart.real**2 + apart.imag**2

    x = Model(2 * theta["a"], theta["z"])
    sol = dl.known_minimizer(fun, x, theta)
    assert jax.tree.structure(sol.value) == jax.tree.structure(x)
    assert [leaf.dtype for leaf in jax.tree.leaves(eqx.filter(sol.value, eqx.is_array))] == [
        dtype,
        theta["z"].dtype,
    ]

    def loss(a):
        value = dl.known_minimizer(fun, x, {**theta, "a": a}).value
        return jnp.sum(value.weight * jnp.arange(3.0, dtype=dtype)) + value.bias.real

    assert np.allclose(jax.grad(loss)(theta["a"]), [0, 2, 4], rtol=tolerance(dtype, 100))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_is_worked_on_in_float32(dtype):
    b = jnp.asarray([1.0, -2.0], dtype)
    sol = dl.known_minimizer(lambda x, b: jnp.sum((x - b) ** 2), b, b)
    assert sol.value.dtype == dtype
    assert np.array_equal(sol.value, b)
    assert sol.objective.dtype == jnp.float32


def test_aux_and_stats():
    sol = dl.known_minimizer(
        lambda w, theta: (ridge(w, theta), {"w": 2 * w}), SOLUTION + 1e-8, THETA, has_aux=True
    )
    assert np.array_equal(sol.aux["w"], 2 * (SOLUTION + 1e-8))
    exact = jnp.linalg.norm(jax.grad(ridge)(SOLUTION + 1e-8, THETA))
    assert sol.stats.grad_norm == pytest.approx(float(exact), rel=1e-6)
    counts = sol.stats.num_steps, sol.stats.num_fun_evals, sol.stats.num_hvps
    assert [int(k) for k in counts] == [0, 2, 5]
    assert sol.stats.grad_norm < sol.stats.reference_grad_norm


@pytest.mark.parametrize("n", [5, 80])
def test_the_state_starts_a_solve(n):
    """A warm start from it takes Newton's step at once, also for a theta nearby."""
    x = dl.minimize(cosh, jnp.zeros(n), 0.7, solver=TIGHT).value
    state = dl.known_minimizer(cosh, x, 0.7).state
    P = dl.inverse_hessian_operator(state)
    assert np.array_equal(P.mv(jnp.arange(1.0, n + 1)), jnp.arange(1.0, n + 1))  # no pair is known
    again = dl.minimize(cosh, jnp.full(n, jnp.nan), 0.7, state=state)
    assert again.stats.num_fun_evals <= 3
    near = dl.minimize(cosh, jnp.full(n, jnp.nan), 0.72, state=state)
    cold = dl.minimize(cosh, jnp.zeros(n), 0.72)
    assert relative_error(near.value, cold.value) < 1e-6
    assert near.stats.num_fun_evals < cold.stats.num_fun_evals


def test_the_adjoint_is_the_users():
    """Its ridge, its preconditioner and its linear solver take part."""
    H = jax.hessian(ridge)(SOLUTION, THETA)
    cross = jax.jacobian(jax.grad(ridge), 1)(SOLUTION, THETA)
    v = jax.grad(outer)(SOLUTION)
    exact = -cross.T @ jnp.linalg.solve(H + 0.1 * jnp.eye(5), v)
    found = gradient(SOLUTION, adjoint=dl.ImplicitAdjoint(ridge=0.1))
    assert relative_error(found, exact) < 1e-12

    def inverse(x, theta):
        P = jnp.linalg.inv(jax.hessian(ridge)(x, theta))
        return lx.MatrixLinearOperator(P, lx.positive_semidefinite_tag)

    for options in (
        {"preconditioner": inverse},
        {"linear_solver": lx.CG(rtol=1e-12, atol=0)},
    ):
        found = gradient(SOLUTION, adjoint=dl.ImplicitAdjoint(**options))
        assert relative_error(found, EXACT) < 1e-9
    starved = dl.ImplicitAdjoint(linear_solver=lx.CG(rtol=1e-8, atol=0, max_steps=2))
    with pytest.raises(RuntimeError, match="H u = v was not solved"):
        jax.block_until_ready(gradient(SOLUTION, adjoint=starved))


def test_a_point_may_be_differentiated_as_if_it_were_a_minimizer():
    adjoint = dl.ImplicitAdjoint(approximate=True)
    found = gradient(WRONG, adjoint=adjoint, throw=False)
    H = jax.hessian(ridge)(WRONG, THETA)
    cross = jax.jacobian(jax.grad(ridge), 1)(WRONG, THETA)
    exact = -cross.T @ jnp.linalg.solve(H, jax.grad(outer)(WRONG))
    assert relative_error(found, exact) < 1e-7


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"fun": 3}, TypeError, ["fun", "3", "fun(x, theta)"]),
        ({"x": jnp.arange(3)}, ValueError, ["x has nothing", "int64[3]", "jnp.asarray(x, float)"]),
        ({"x": None}, ValueError, ["x has nothing", "none"]),
        ({"rtol": -1.0}, ValueError, ["rtol", "-1.0", "nonnegative"]),
        ({"rtol": "loose"}, TypeError, ["rtol", "'loose'"]),
        ({"atol": None}, TypeError, ["atol", "None", "number"]),
        ({"has_aux": 1}, TypeError, ["has_aux", "1"]),
        ({"throw": None}, TypeError, ["throw", "None"]),
        ({"adjoint": dl.ImplicitAdjoint}, TypeError, ["adjoint", "class", "ImplicitAdjoint()"]),
        ({"adjoint": dl.QuasiNewtonAdjoint()}, TypeError, ["adjoint", "QuasiNewton", "Implicit"]),
        (
            {"adjoint": dl.ImplicitAdjoint(preconditioner="lbfgs")},
            ValueError,
            ["adjoint", "'lbfgs'", "(x, theta)"],
        ),
        ({"fun": lambda x, theta: x}, ValueError, ["fun", "(2,)", "jnp.sum"]),
        ({"fun": lambda x, theta: (jnp.sum(x), x)}, TypeError, ["fun", "tuple", "has_aux=True"]),
    ],
)
def test_bad_calls(options, error, fragments):
    options = {"fun": lambda x, theta: jnp.sum(x**2), "x": jnp.zeros(2), **options}
    with pytest.raises(error) as caught:
        dl.known_minimizer(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)


class TestBounds:
    """A minimizer of `min (x0 - a)²/2 + (x1 - b)²/2 + x0 x1 / 2` with `x >= 0`, from elsewhere."""

    @staticmethod
    def fun(x, theta):
        return jnp.sum((x - theta) ** 2) / 2 + x[0] * x[1] / 2

    def test_as_minimize(self):
        theta, bounds = jnp.array([2.0, 0.4]), (jnp.zeros(2), jnp.full(2, 9.0))
        x = jnp.array([2.0, 0.0])

        def known(theta, bounds):
            return dl.known_minimizer(self.fun, x, theta, bounds=bounds)

        def solved(theta, bounds):
            return dl.minimize(self.fun, jnp.ones(2), theta, bounds=bounds)

        one, other = known(theta, bounds), solved(theta, bounds)
        np.testing.assert_array_equal(one.value, x)
        np.testing.assert_array_equal(one.active, [0, -1])
        assert one.stats.num_active == other.stats.num_active == 1
        for of in (lambda s: s.value, lambda s: s.objective):
            found = jax.jacrev(lambda *a, of=of: of(known(*a)), (0, 1))(theta, bounds)
            wanted = jax.jacrev(lambda *a, of=of: of(solved(*a)), (0, 1))(theta, bounds)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-8)

    @pytest.mark.parametrize("x", [[2.1, 0.0], [2.0, 0.1], [0.0, 0.0], [2.0, -0.1]])
    def test_refused(self, x):
        theta = jnp.array([2.0, 0.4])
        solution = dl.known_minimizer(
            self.fun, jnp.array(x), theta, bounds=(0.0, None), throw=False
        )
        assert solution.result == dl.RESULTS.not_a_minimizer

    def test_a_tie_has_no_derivative(self):
        theta, x = jnp.array([2.0, 1.0]), jnp.array([2.0, 0.0])
        solution = dl.known_minimizer(self.fun, x, theta, bounds=(0.0, None))
        assert solution.converged
        assert solution.stats.num_weakly_active == 1
        jacobian = jax.jacrev(
            lambda theta: (
                dl.known_minimizer(self.fun, x, theta, bounds=(0.0, None), throw=False).value
            )
        )(theta)
        assert jnp.isnan(jacobian).any()
