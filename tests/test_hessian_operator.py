"""The exact Hessian as a Lineax operator, and what is solved with it."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import difflbfgs as dl
from problems import (
    THETA,
    TIGHT,
    C,
    X,
    relative_error,
    ridge,
    ridge_solution,
    stubborn_square,
    tolerance,
)

pytestmark = pytest.mark.slow

ADJOINT = dl.ImplicitAdjoint()


class Net(eqx.Module):
    """A model with what is no variable in it: a static field, an integer, a function."""

    weight: Any
    bias: Any
    steps: int = 2
    activation: Any = jnp.tanh
    name: str = eqx.field(static=True, default="net")


def net(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 2)), rng.normal(size=3)
    return Net(jnp.asarray(weight, dtype), jnp.asarray(bias, dtype))


def fit(model, theta):
    """Return the loss of a model; its Hessian is dense and indefinite."""
    assert model.steps == 2
    inputs = jnp.cos(jnp.arange(10.0, dtype=theta["decay"].dtype)).reshape(5, 2)
    out = model.activation(inputs @ model.weight.T + model.bias)
    return jnp.sum(jnp.sin(out) ** 2) + theta["decay"] * jnp.sum(out) * theta["k"]


def variables(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


def dense(fun, x, theta):
    """Return the Hessian on flat vectors, as JAX computes it."""
    inexact, static = eqx.partition(x, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(inexact)
    return jax.hessian(lambda v: fun(eqx.combine(unravel(v), static), theta))(flat)


def logistic(w, theta):
    """A logistic regression; its labels move with theta."""
    X_ = X.astype(w.dtype)
    labels = jax.nn.sigmoid(jnp.arange(40.0, dtype=w.dtype) % 7 - 3 + theta[0])
    z = X_ @ w
    return jnp.sum(jax.nn.softplus(z) - labels * z) + 0.5 * jnp.exp(theta[1]) * jnp.sum(w**2)


def definite(n, dtype=jnp.float64, seed=0, spectrum=(0.0, 2.0)):
    """Return an objective whose Hessian moves with theta and x, and is positive definite."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = jnp.asarray(q @ np.diag(np.logspace(*spectrum, n)) @ q.T, dtype)

    def fun(x, theta):
        return 0.5 * theta * x @ a @ x + jnp.sum(x**4) * theta**2

    x = jnp.asarray(rng.normal(size=n), dtype)
    return fun, x, jnp.asarray(rng.normal(size=n), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_products_and_matrix_on_a_module(dtype):
    model, theta = net(dtype), {"decay": jnp.asarray(0.3, dtype), "k": 2}
    H = dl.hessian_operator(fit, model, theta)
    assert jax.tree.structure(H.in_structure()) == jax.tree.structure(variables(model))
    assert H.in_structure() == H.out_structure()
    exact = dense(fit, model, theta)
    eps = tolerance(dtype, 100)
    assert relative_error(H.as_matrix(), exact) < eps
    v = jax.tree.map(jnp.cos, variables(model))
    product = H.mv(v)
    assert jax.tree.structure(product) == jax.tree.structure(v)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype(dtype)}
    assert relative_error(ravel_pytree(product)[0], exact @ ravel_pytree(v)[0]) < eps
    assert relative_error(H.T.mv(v), product) == 0
    assert relative_error(lx.diagonal(H), jnp.diag(exact)) < eps
    assert relative_error(lx.materialise(H).as_matrix(), exact) < eps


def test_tags():
    H = dl.hessian_operator(ridge, ridge_solution(THETA), THETA)
    assert isinstance(H, lx.AbstractLinearOperator)
    for operator in (H, H.T, lx.materialise(H), lx.linearise(H), lx.conj(H)):
        assert lx.is_symmetric(operator)
        assert not lx.is_positive_semidefinite(operator)
        assert not lx.is_negative_semidefinite(operator)
    assert not lx.is_diagonal(H)
    # The inverse Hessian keeps its own.
    P = dl.inverse_hessian_operator(dl.minimize(ridge, jnp.zeros(5), THETA).state)
    for operator in (P, lx.materialise(P)):
        assert lx.is_positive_semidefinite(operator)


def test_aux_is_ignored():
    found = dl.hessian_operator(lambda w, t: (ridge(w, t), w), X[0], THETA, has_aux=True)
    assert relative_error(found.as_matrix(), jax.hessian(ridge)(X[0], THETA)) < 1e-13


@pytest.mark.parametrize("kinds", [(jnp.float32, jnp.float64), (jnp.float16, jnp.bfloat16)])
def test_mixed_and_low_precision(kinds):
    """One working dtype, float32 at least, as in a solve."""
    x = [jnp.asarray([0.5, 1.0], kinds[0]), jnp.asarray(2.0, kinds[1])]

    def fun(x, theta):
        return jnp.sum(x[0] ** 3) * x[1] ** 2

    H = dl.hessian_operator(fun, x)
    working = jnp.float64 if jnp.float64 in kinds else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(H.in_structure())} == {jnp.dtype(working)}
    exact = dense(fun, [leaf.astype(jnp.float64) for leaf in x], None)
    assert relative_error(H.as_matrix(), exact) < tolerance(working, 10)
    assert H.as_matrix().dtype == working


@pytest.mark.parametrize("n", [5, 64, 65, 150])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_solutions(n, dtype):
    """By a factor up to 64 variables, by conjugate gradients beyond."""
    fun, x, b = definite(n, dtype)
    theta = jnp.asarray(1.3, dtype)
    u, report = ADJOINT.solve(dl.hessian_operator(fun, x, theta), b)
    H = np.asarray(jax.hessian(fun)(x, theta), np.float64)
    exact = np.linalg.solve(H, np.asarray(b, np.float64))
    assert u.dtype == dtype
    accuracy = 3e-11 if dtype == jnp.float64 else 3e-6
    assert relative_error(u, exact) < 100 * accuracy
    assert report.result == dl.RESULTS.successful
    left = np.linalg.norm(b - H @ np.asarray(u, np.float64)) / np.linalg.norm(b)
    assert left < 2 * accuracy
    assert report.residual < 2 * accuracy
    values = np.linalg.eigvalsh(H)
    slack = 1 + tolerance(dtype, 1e3)
    assert values[0] / slack <= report.min_curvature <= report.max_curvature
    assert report.max_curvature <= values[-1] * slack
    assert (int(report.num_steps) == n) == (n <= 64)


@pytest.mark.parametrize("n", [4, 80])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_of_right_hand_side_and_objective(n, scale):
    fun, x, b = definite(n)
    exact = jnp.linalg.solve(jax.hessian(fun)(x, 1.3), b)
    H = dl.hessian_operator(lambda x, theta: scale * fun(x, theta), x, 1.3)
    assert relative_error(ADJOINT.solve(H, b)[0] * scale, exact) < 1e-8
    assert relative_error(ADJOINT.solve(H, scale**2 * b)[0] / scale, exact) < 1e-8
    zero, report = ADJOINT.solve(H, jnp.zeros(n))
    assert np.array_equal(zero, jnp.zeros(n))
    assert report.result == dl.RESULTS.successful


@pytest.mark.parametrize("n", [6, 80])
def test_units_of_the_variables(n):
    fun, x, b = definite(n)
    units = jnp.logspace(-5, 5, n)
    H = dl.hessian_operator(lambda z, theta: fun(z * units, theta), x / units, 1.3)
    u, _ = ADJOINT.solve(H, b * units)
    assert relative_error(u * units, jnp.linalg.solve(jax.hessian(fun)(x, 1.3), b)) < 1e-7


def indefinite(x, theta):
    return jnp.sum(x[1:] ** 2) - theta * x[0] ** 2


def singular(x, theta):
    return theta * jnp.sum(x[1:] ** 2)


def broken(x, theta):
    return theta * jnp.sum(jnp.abs(x) ** 1.5)


@pytest.mark.parametrize("n", [3, 80])
@pytest.mark.parametrize(
    ("fun", "result"),
    [
        (indefinite, "indefinite_hessian"),
        (singular, "adjoint_not_converged"),
        (broken, "nonfinite_hessian"),
    ],
    ids="indefinite singular nonfinite".split(),
)
def test_failures(fun, result, n):
    H, b = dl.hessian_operator(fun, jnp.zeros(n), 1.0), jnp.ones(n)
    u, report = ADJOINT.solve(H, b, throw=False)
    assert report.result == getattr(dl.RESULTS, result)
    assert np.all(np.isnan(u))
    message = dl.RESULTS[getattr(dl.RESULTS, result)][:40]
    with pytest.raises(RuntimeError, match=message.replace("(", ".")):
        jax.block_until_ready(ADJOINT.solve(H, b))
    with pytest.raises(RuntimeError, match=message[:20]):
        jax.block_until_ready(jax.jit(lambda b: ADJOINT.solve(H, b)[0])(b))


def test_a_consistent_singular_system_has_its_solution_of_least_norm():
    H = dl.hessian_operator(singular, jnp.zeros(4), 1.0)
    u, report = ADJOINT.solve(H, jnp.array([0.0, 1.0, 2.0, 3.0]))
    assert np.allclose(u, [0, 0.5, 1, 1.5], atol=1e-14)
    assert report.result == dl.RESULTS.successful


def test_curvature_that_the_gradient_explains_is_none():
    """Along a circle of minima, a little beside it: `H A x = A g` with a rotation `A`."""

    def ring(x, theta):
        return (jnp.sum(x[:2] ** 2) - theta) ** 2 + jnp.sum(x[2:] ** 2)

    x = (1 - 1e-10) * jnp.array([0.6, 0.8, 0.0])
    H = dl.hessian_operator(ring, x, 1.0)
    assert jnp.linalg.eigvalsh(H.as_matrix())[0] < -1e-12
    u, _ = ADJOINT.solve(H, jnp.array([4.8, 6.4, 2.0]))  # 8 x, and 2
    assert np.allclose(u, [0.6, 0.8, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("n", "scale"), [(5, 1.0), (5, 1e10), (64, 1e-10), (80, 1e-10), (80, 1e10)]
)
def test_active_variables(n, scale):
    """Rows and columns are zero; the block of the others is solved, whatever its size."""
    fun, x, b = definite(n)
    active = (jnp.arange(n) % 3 == 0).astype(jnp.int8) * jnp.where(jnp.arange(n) % 2 == 0, 1, -1)
    active = active.astype(jnp.int8)
    held = np.asarray(active) != 0
    H = dl.hessian_operator(lambda x, theta: scale * fun(x, theta), x, 1.3, active=active)
    full = scale * np.asarray(jax.hessian(fun)(x, 1.3))
    matrix = np.asarray(H.as_matrix())
    assert np.all(matrix[held] == 0)
    assert np.all(matrix[:, held] == 0)
    assert relative_error(matrix[~held][:, ~held], full[~held][:, ~held]) < 1e-13
    assert np.array_equal(H.mv(b), H.mv(b.at[0].set(jnp.nan)))
    u, report = ADJOINT.solve(H, b)
    assert np.all(np.asarray(u)[held] == 0)
    block = np.linalg.solve(full[~held][:, ~held], np.asarray(b)[~held])
    assert relative_error(u[~held], block) < 1e-8
    assert report.result == dl.RESULTS.successful
    values = np.linalg.eigvalsh(full[~held][:, ~held])
    assert values[0] * (1 - 1e-9) <= report.min_curvature
    assert report.max_curvature <= values[-1] * (1 + 1e-9)


def test_active_variables_of_a_module_and_where_the_objective_is_rough():
    """The Hessian is infinite by an active variable, as that of a root at its bound."""

    def fun(model, theta):
        return jnp.sum(model.weight**2) + theta * jnp.sum(jnp.abs(model.bias) ** 1.5)

    model = Net(jnp.ones((2, 2)), jnp.array([0.0, 4.0]))
    active = Net(jnp.zeros((2, 2), jnp.int8), jnp.array([1, 0], jnp.int8), None, None)
    active = eqx.tree_at(lambda a: a.weight, active, active.weight.at[0, 1].set(-1))
    H = dl.hessian_operator(fun, model, 1.0, active=active)
    u, _ = ADJOINT.solve(H, jax.tree.map(jnp.ones_like, variables(model)))
    assert np.allclose(u.weight, [[0.5, 0], [0.5, 0.5]])
    assert np.allclose(u.bias, [0, 4 * 2 / 3])


def test_all_active_or_none():
    fun, x, b = definite(4)
    everything = dl.hessian_operator(fun, x, 1.3, active=jnp.ones(4, bool))
    u, report = ADJOINT.solve(everything, b)
    assert np.array_equal(u, jnp.zeros(4))
    assert report.result == dl.RESULTS.successful
    nothing = dl.hessian_operator(fun, x, 1.3, active=jnp.zeros(4, jnp.int8))
    plain = dl.hessian_operator(fun, x, 1.3)
    assert relative_error(ADJOINT.solve(nothing, b)[0], ADJOINT.solve(plain, b)[0]) < 1e-13


def test_negative_curvature_counts_only_where_it_is_free():
    H = dl.hessian_operator(indefinite, jnp.zeros(3), 1.0, active=jnp.array([1, 0, 0], jnp.int8))
    assert np.allclose(ADJOINT.solve(H, jnp.ones(3))[0], [0, 0.5, 0.5])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("prior", [-30.0, 0.0])
def test_standard_errors_of_a_logistic_regression(dtype, prior):
    theta = jnp.asarray([0.2, prior], dtype)
    w = dl.minimize(logistic, jnp.zeros(5, dtype), theta).value
    H = dl.hessian_operator(logistic, w, theta)
    covariance, report = jax.vmap(lambda e: ADJOINT.solve(H, e))(jnp.eye(5, dtype=dtype))
    p = jax.nn.sigmoid(X @ w)
    information = X.T @ (X * (p * (1 - p))[:, None]) + jnp.exp(prior) * jnp.eye(5)
    exact = jnp.linalg.inv(information)
    errors = jnp.sqrt(jnp.diag(covariance))
    assert relative_error(errors, jnp.sqrt(jnp.diag(exact))) < tolerance(dtype, 100)
    assert jnp.all(report.result == dl.RESULTS.successful)
    logdet = jnp.linalg.slogdet(H.as_matrix())[1]
    assert logdet == pytest.approx(float(jnp.linalg.slogdet(information)[1]), rel=1e-5)


def richardson(fun, x, h=1e-2):
    """Return the derivative along the axes by extrapolated central differences."""

    def differences(h):
        return jnp.stack([(fun(x + h * e) - fun(x - h * e)) / (2 * h) for e in jnp.eye(x.size)])

    rows = [differences(h / 2**i) for i in range(4)]
    for k in range(1, 4):
        rows = [b + (b - a) / (4**k - 1) for a, b in itertools.pairwise(rows)]
    return rows[0]


def test_the_derivative_by_theta_with_x_moving():
    """Of standard errors and of the logarithm of the determinant, in both modes."""

    @jax.jit
    def statistics(theta):
        w = dl.minimize(logistic, jnp.zeros(5), theta, solver=TIGHT).value
        H = dl.hessian_operator(logistic, w, theta)
        u, _ = ADJOINT.solve(H, C)
        return jnp.stack([jnp.sqrt(C @ u), jnp.linalg.slogdet(H.as_matrix())[1]])

    theta = jnp.array([0.2, -1.0])
    found = jax.jit(jax.jacrev(statistics))(theta)
    assert relative_error(found, richardson(statistics, theta).T) < 1e-8


@pytest.mark.parametrize("n", [6, 70])
def test_derivatives_of_a_solution(n):
    """By operator and right-hand side, forward, reverse and twice, beside a dense solve."""
    fun, x, b = definite(n)
    active = (jnp.arange(n) == 2).astype(jnp.int8)
    free = active == 0

    def found(theta, b):
        H = dl.hessian_operator(fun, theta * x, theta, active=active)
        return jnp.sum(jnp.sin(ADJOINT.solve(H, theta * b)[0]))

    def exact(theta, b):
        H = jax.hessian(fun)(theta * x, theta) * free * free[:, None] + jnp.diag(1.0 - free)
        return jnp.sum(jnp.sin(jnp.linalg.solve(H, theta * b * free)))

    for transform in (
        lambda f: jax.grad(f, (0, 1)),
        lambda f: jax.jacfwd(f, 0),
        lambda f: jax.grad(jax.grad(f)),
    ):
        mine, theirs = (jax.jit(transform(f))(1.3, b) for f in (found, exact))
        assert relative_error(mine, theirs) < 1e-8


def test_under_vmap_over_everything():
    fun, x, b = definite(5)

    def solution(theta, x, b, active):
        H = dl.hessian_operator(fun, x, theta, active=active)
        return ADJOINT.solve(H, b)[0], jax.grad(lambda t: jnp.sum(H.as_matrix()) * t)(theta)

    batch = (
        jnp.array([1.0, 2.0, 3.0]),
        jnp.stack([x, -x, 2 * x]),
        jnp.stack([b, b**2, -b]),
        jnp.stack([jnp.zeros(5), jnp.ones(5), jnp.arange(5) == 1]).astype(jnp.int8),
    )
    found = jax.jit(jax.vmap(solution))(*batch)
    one_by_one = [solution(*(leaf[i] for leaf in batch)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    assert relative_error(found[0], stacked[0]) < 1e-12
    assert relative_error(found[1], stacked[1]) < 1e-12


def test_one_lane_that_fails_spoils_no_other():
    def solution(theta):
        H = dl.hessian_operator(indefinite, jnp.zeros(3), theta)
        return ADJOINT.solve(H, jnp.ones(3), throw=False)[0]

    found = jax.jit(jax.vmap(solution))(jnp.array([-1.0, 1.0]))
    assert np.allclose(found[0], 0.5)
    assert np.all(np.isnan(found[1]))


def test_many_right_hand_sides_share_one_factor():
    """The matrix is assembled once: the products do not grow with the right-hand sides."""
    fun, x, _ = definite(8)

    def inverse(k):
        def solve(theta, bs):
            H = dl.hessian_operator(fun, x, theta)
            return jax.vmap(lambda b: ADJOINT.solve(H, b)[0])(bs)

        bs = jnp.ones((k, 8))
        return str(jax.make_jaxpr(solve)(1.3, bs)).count("cholesky")

    assert inverse(1) == inverse(50) >= 1


@pytest.mark.parametrize("solver", [lx.CG(rtol=1e-12, atol=1e-14), lx.Cholesky()])
def test_lineax_solves_with_it_once_it_is_tagged(solver):
    fun, x, b = definite(20)

    def found(theta):
        H = dl.hessian_operator(fun, x, theta)
        H = lx.TaggedLinearOperator(H, lx.positive_semidefinite_tag)
        return lx.linear_solve(H, b, solver).value

    def exact(theta):
        return jnp.linalg.solve(jax.hessian(fun)(x, theta), b)

    for transform in (lambda f: f, jax.jit, jax.jacrev, jax.jacfwd):
        assert relative_error(transform(found)(1.3), transform(exact)(1.3)) < 1e-9
    thetas = jnp.array([1.0, 2.0])
    assert relative_error(jax.vmap(found)(thetas), jax.vmap(exact)(thetas)) < 1e-9


def test_lineax_solves_with_it_as_it_is():
    model, theta = net(), {"decay": jnp.asarray(0.3), "k": 2}
    H, b = dl.hessian_operator(fit, model, theta), jax.tree.map(jnp.ones_like, variables(net()))
    found = lx.linear_solve(H, b).value
    exact = jnp.linalg.solve(dense(fit, model, theta), ravel_pytree(b)[0])
    assert relative_error(ravel_pytree(found)[0], exact) < 1e-9
    with pytest.raises(ValueError, match="positive or negative definite"):
        lx.linear_solve(H, b, lx.CG(rtol=1e-6, atol=0))


@pytest.mark.parametrize(
    "adjoint",
    [
        dl.ForwardImplicitAdjoint(),
        dl.ImplicitAdjoint(linear_solver=lx.CG(rtol=1e-12, atol=0)),
        dl.ImplicitAdjoint(rtol=1e-12),
    ],
)
def test_other_settings_of_the_adjoint(adjoint):
    fun, x, b = definite(70)
    u, _ = adjoint.solve(dl.hessian_operator(fun, x, 1.3), b)
    assert relative_error(u, jnp.linalg.solve(jax.hessian(fun)(x, 1.3), b)) < 1e-9


def test_a_ridge_and_an_indefinite_system_on_demand():
    H = dl.hessian_operator(indefinite, jnp.zeros(3), 1.0)
    b = jnp.array([1.0, 2.0, 3.0])
    u, _ = dl.ImplicitAdjoint(ridge=4.0).solve(H, b)
    assert np.allclose(u, b / jnp.array([2.0, 6.0, 6.0]))
    u, report = dl.ImplicitAdjoint(approximate=True).solve(H, b)
    assert np.allclose(u, b / jnp.array([-2.0, 2.0, 2.0]))
    assert report.min_curvature == pytest.approx(-2.0)
    starved = dl.ImplicitAdjoint(linear_solver=lx.CG(rtol=1e-12, atol=0, max_steps=1))
    fun, x, b = definite(5)
    _, report = starved.solve(dl.hessian_operator(fun, x, 1.3), b, throw=False)
    assert report.result == dl.RESULTS.adjoint_not_converged


@pytest.mark.parametrize("tag", [lx.symmetric_tag, lx.positive_semidefinite_tag])
def test_any_symmetric_operator(tag):
    A = X.T @ X
    u, report = ADJOINT.solve(lx.MatrixLinearOperator(A, tag), C)
    assert relative_error(u, jnp.linalg.solve(A, C)) < 1e-12
    assert report.result == dl.RESULTS.successful

    def by_matrix(A):
        return jnp.sum(ADJOINT.solve(lx.MatrixLinearOperator(A, tag), C)[0])

    exact = jax.grad(lambda A: jnp.sum(jnp.linalg.solve(A, C)))(A)
    found = jax.grad(by_matrix)(A)
    assert relative_error(found + found.T, exact + exact.T) < 1e-10


X0 = jnp.zeros(2)


@pytest.mark.parametrize(
    ("call", "error", "fragments"),
    [
        ({"fun": 3}, TypeError, ["fun", "3", "fun(x, theta)"]),
        ({"x": jnp.arange(2)}, ValueError, ["x has nothing", "int64[2]"]),
        ({"x": jnp.ones(2) * 1j}, ValueError, ["x must be real", "c128[2]", "lax.complex"]),
        ({"x": [X0, X0 * 1j]}, ValueError, ["x must be real", "c128[2]"]),
        ({"has_aux": 1}, TypeError, ["has_aux", "1"]),
        ({"active": jnp.zeros(3, jnp.int8)}, ValueError, ["active", "i8[3]", "f64[2]", "tree.map"]),
        ({"active": [jnp.zeros(2, jnp.int8)]}, ValueError, ["active", "i8[2]", "f64[2]"]),
        ({"active": jnp.zeros(2)}, ValueError, ["active", "f64[2]", "integer"]),
        ({"active": 1}, ValueError, ["active", "1", "integer"]),
        ({"fun": lambda x, t: x}, ValueError, ["fun", "(2,)", "jnp.sum"]),
    ],
)
def test_bad_calls(call, error, fragments):
    options = {"fun": lambda x, theta: jnp.sum(jnp.abs(x) ** 2), "x": X0, **call}
    with pytest.raises(error) as caught:
        dl.hessian_operator(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_objective_without_products():
    with pytest.raises(TypeError, match="custom_jvp"):
        dl.hessian_operator(lambda x, theta: jnp.sum(stubborn_square(x)), X0)


@pytest.mark.parametrize(
    ("operator", "b", "error", "fragments"),
    [
        (jnp.eye(2), X0, TypeError, ["operator", "lineax", "MatrixLinearOperator("]),
        (lx.MatrixLinearOperator(jnp.eye(2)), X0, TypeError, ["operator", "symmetric_tag"]),
        (None, jnp.zeros(3), ValueError, ["b must", "f64[3]", "f64[2]"]),
        (None, [X0], ValueError, ["b must", "f64[2]", "same structure"]),
        (None, X0 * 1j, ValueError, ["b must be real", "c128[2]"]),
        (
            lx.MatrixLinearOperator(jnp.eye(2) * (1 + 0j), lx.symmetric_tag),
            X0,
            ValueError,
            ["operator must be real", "c128[2]"],
        ),
    ],
)
def test_bad_systems(operator, b, error, fragments):
    if operator is None:
        operator = dl.hessian_operator(lambda x, theta: jnp.sum(x**2), X0)
    with pytest.raises(error) as caught:
        ADJOINT.solve(operator, b)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_bad_settings_of_a_solve():
    H = dl.hessian_operator(lambda x, theta: jnp.sum(x**2), X0)
    with pytest.raises(TypeError, match="throw must be True or False, got 1"):
        ADJOINT.solve(H, X0, throw=1)
    with pytest.raises(ValueError, match=r"preconditioner belongs to .* 'lbfgs'"):
        dl.ImplicitAdjoint(preconditioner="lbfgs").solve(H, X0)
