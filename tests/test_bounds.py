"""Bounds: the minimizer, its derivative, what is refused, and that nothing is evaluated outside."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
import scipy.optimize

import difflbfgs as dl

INF = jnp.inf
TOLERANCE = {"float64": (1e-9, 1e-8), "float32": (1e-4, 1e-4)}  # of values and of derivatives


def quadratic(n, seed, dtype="float64"):
    """Return `f(x, θ) = xᵀQx/2 - θᵀx`, `Q`, `θ` and bounds of which many are active."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    Q, theta = A @ A.T / n + np.eye(n), 2 * rng.normal(size=n)
    lower, upper = -rng.uniform(0.3, 1.2, n), rng.uniform(0.3, 1.2, n)
    made = [jnp.asarray(v, dtype) for v in (Q, theta, lower, upper)]
    return lambda x, theta: x @ (made[0] @ x) / 2 - theta @ x, made


def by_enumeration(Q, theta, lower, upper):
    """Return the minimizer and its derivatives by `θ`, lower and upper, trying every face."""
    n = len(theta)
    for face in itertools.product((-1, 0, 1), repeat=n):
        face = np.array(face)
        free, x = face == 0, np.where(face < 0, lower, upper)
        inverse = np.linalg.inv(Q[np.ix_(free, free)]) if free.any() else np.zeros((0, 0))
        x[free] = inverse @ (theta[free] - Q[np.ix_(free, ~free)] @ x[~free])
        g = Q @ x - theta
        if (lower <= x).all() and (x <= upper).all() and (face * g <= 0).all():
            by_theta, by_bound = np.zeros((n, n)), np.diag((~free).astype(float))
            by_theta[np.ix_(free, free)] = inverse
            by_bound[np.ix_(free, ~free)] = -inverse @ Q[np.ix_(free, ~free)]
            return x, face, (by_theta, by_bound * (face < 0), by_bound * (face > 0))
    raise AssertionError("no face is optimal")


def minimizer(f, x0, theta, lower, upper, **settings):
    return dl.minimize(f, x0, theta, bounds=(lower, upper), **settings).value


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("polish", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_quadratic_with_every_face_tried(dtype, polish, seed):
    f, (Q, theta, lower, upper) = quadratic(5, seed, dtype)
    exact = [np.asarray(v, np.float64) for v in (Q, theta, lower, upper)]
    x, face, derivatives = by_enumeration(*exact)
    solver = dl.LBFGS(polish=polish, rtol=1e-10 if dtype == "float64" else None)
    solution = dl.minimize(f, jnp.zeros(5, dtype), theta, bounds=(lower, upper), solver=solver)
    of_value, of_derivative = TOLERANCE[dtype]
    np.testing.assert_allclose(solution.value, x, atol=of_value)
    np.testing.assert_array_equal(solution.active, face)
    assert solution.active.dtype == jnp.int8
    assert (solution.stats.num_active, solution.stats.num_weakly_active) == ((face != 0).sum(), 0)
    found = jax.jacrev(
        lambda *args: minimizer(f, jnp.zeros(5, dtype), *args, solver=solver), (0, 1, 2)
    )(theta, lower, upper)
    for one, wanted in zip(found, derivatives, strict=True):
        np.testing.assert_allclose(one, wanted, atol=of_derivative)


ADJOINTS = {
    "default": dl.ImplicitAdjoint(),
    "conjugate gradients": dl.ImplicitAdjoint(linear_solver=lx.CG(rtol=1e-12, atol=0)),
    "preconditioned": dl.ImplicitAdjoint(preconditioner="lbfgs"),
    "by a function": dl.ImplicitAdjoint(
        preconditioner=lambda x, theta: lx.TaggedLinearOperator(
            lx.DiagonalLinearOperator(jnp.full_like(x, 0.5)), lx.positive_semidefinite_tag
        )
    ),
    "refined": dl.QuasiNewtonAdjoint(refine=100),
    "with a small ridge": dl.ImplicitAdjoint(ridge=1e-9),
}


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("n", [20, 100])
def test_all_adjoints_dense_and_matrix_free(adjoint, n):
    f, (Q, theta, lower, upper) = quadratic(n, 0)
    weights = jnp.cos(jnp.arange(n))

    def outer(theta, lower, upper):
        x = minimizer(f, jnp.zeros(n), theta, lower, upper, adjoint=ADJOINTS[adjoint])
        return jnp.sum(weights * x**2)

    found = jax.grad(outer, (0, 1, 2))(theta, lower, upper)
    solution = dl.minimize(f, jnp.zeros(n), theta, bounds=(lower, upper))
    x, free = solution.value, np.asarray(solution.active) == 0
    assert 0.2 * n < free.sum() < 0.8 * n
    v = np.asarray(2 * weights * x)
    u = np.zeros(n)
    u[free] = np.linalg.solve(np.asarray(Q)[np.ix_(free, free)], v[free])
    by_bound = np.where(free, 0, v - np.asarray(Q) @ u)
    np.testing.assert_allclose(found[0], u, atol=1e-7)
    np.testing.assert_allclose(found[1], by_bound * (solution.active < 0), atol=1e-7)
    np.testing.assert_allclose(found[2], by_bound * (solution.active > 0), atol=1e-7)


@pytest.mark.slow
def test_forward_mode_and_second_derivatives():
    f, (_, theta, lower, upper) = quadratic(6, 3)

    def curved(x, theta):
        return f(x, theta) + jnp.sum(jnp.exp(0.3 * x))

    def outer(theta, lower, adjoint=dl.ImplicitAdjoint()):
        x = minimizer(curved, jnp.zeros(6), theta, lower, upper, adjoint=adjoint)
        return jnp.sum(jnp.sin(x))

    reverse = jax.grad(outer, (0, 1))(theta, lower)
    forward = jax.jacfwd(lambda *a: outer(*a, adjoint=dl.ForwardImplicitAdjoint()), (0, 1))
    for one, other in zip(reverse, forward(theta, lower), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    hessian = jax.hessian(outer, (0, 1))(theta, lower)
    step = 1e-5
    for k in range(6):
        move = step * jnp.eye(6)[k]
        after = jax.grad(outer, (0, 1))(theta + move, lower)
        before = jax.grad(outer, (0, 1))(theta - move, lower)
        for row, a, b in zip((hessian[0][0], hessian[1][0]), after, before, strict=True):
            np.testing.assert_allclose(row[:, k], (a - b) / (2 * step), atol=1e-8)


def test_nonnegative_least_squares():
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(40, 12)), rng.normal(size=40)
    exact = scipy.optimize.nnls(A, b)[0]
    assert 0 < (exact == 0).sum() < 12
    solution = dl.minimize(
        lambda x, b: jnp.sum((A @ x - b) ** 2) / 2, jnp.ones(12), b, bounds=(0.0, None)
    )
    np.testing.assert_allclose(solution.value, exact, atol=1e-9)
    np.testing.assert_array_equal(solution.active == -1, exact == 0)
    free = exact > 0
    jacobian = jax.jacrev(
        lambda b: minimizer(lambda x, b: jnp.sum((A @ x - b) ** 2) / 2, jnp.ones(12), b, 0.0, None)
    )(b)
    np.testing.assert_allclose(jacobian[free], np.linalg.pinv(A[:, free]), atol=1e-8)
    np.testing.assert_array_equal(jacobian[~free], 0)


def membrane(n):
    """Return the energy of a membrane under a load over an obstacle, and the obstacle."""
    side = round(n**0.5)
    h = 1 / (side + 1)
    s = jnp.linspace(h, 1 - h, side)
    obstacle = 0.08 - 0.6 * ((s[:, None] - 0.5) ** 2 + (s[None, :] - 0.4) ** 2)

    def energy(x, load):
        x = jnp.pad(x.reshape(side, side), 1)
        bent = jnp.sum(jnp.diff(x, axis=0) ** 2) + jnp.sum(jnp.diff(x, axis=1) ** 2)
        return bent / 2 - load * h**2 * jnp.sum(x)

    return energy, obstacle.ravel(), h


def primal_dual_active_set(energy, load, obstacle):
    """Return the solution of the obstacle problem by the method of that name, with a sparse `H`."""
    n = len(obstacle)
    side = round(n**0.5)
    line = scipy.sparse.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(side, side))
    H = (scipy.sparse.kronsum(line, line)).tocsr()
    f = -np.asarray(jax.grad(energy)(jnp.zeros(n), load))
    x, multiplier = np.zeros(n), np.zeros(n)
    for _ in range(100):
        contact = multiplier + (obstacle - x) > 0
        free = ~contact
        new = np.where(contact, obstacle, 0)
        new[free] = scipy.sparse.linalg.spsolve(
            H[free][:, free], f[free] - H[free][:, contact] @ obstacle[contact]
        )
        done = np.array_equal(new, x)
        x, multiplier = new, np.where(contact, H @ new - f, 0)
        if done:
            return x, contact, H
    raise AssertionError("no convergence")


@pytest.mark.parametrize("n", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_obstacle_problem(n):
    energy, obstacle, h = membrane(n)
    load = 0.1
    exact, contact, H = primal_dual_active_set(energy, load, np.asarray(obstacle))
    assert 0.05 * n < contact.sum() < 0.6 * n
    solution = dl.minimize(energy, jnp.zeros(n), load, bounds=(obstacle, None))
    np.testing.assert_allclose(solution.value, exact, atol=1e-9)
    np.testing.assert_array_equal(solution.active == -1, contact)

    def area(load, obstacle):
        return h**2 * jnp.sum(minimizer(energy, jnp.zeros(n), load, obstacle, None))

    by_load, by_obstacle = jax.grad(area, (0, 1))(load, obstacle)
    free, v = ~contact, np.full(n, h**2)
    u = np.zeros(n)
    u[free] = scipy.sparse.linalg.spsolve(H[free][:, free], v[free])
    assert abs(by_load - h**2 * u.sum()) <= 1e-8 * abs(by_load)
    np.testing.assert_allclose(by_obstacle, np.where(contact, v - H @ u, 0), atol=1e-8 * h)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e8])
def test_projection_onto_a_box_at_any_scale(scale):
    theta = jnp.array([-2.0, -0.9, 0.3, 1.7, 1.0001])

    def project(theta, lower, upper):
        return minimizer(
            lambda x, theta: scale * jnp.sum((x - theta) ** 2) / 2,
            jnp.zeros(5),
            theta,
            lower,
            upper,
        )

    np.testing.assert_allclose(project(theta, -1.0, 1.0), jnp.clip(theta, -1, 1), atol=1e-12)
    by_theta, by_lower, by_upper = jax.jacrev(project, (0, 1, 2))(theta, -1.0, 1.0)
    np.testing.assert_allclose(by_theta, np.diag([0, 1, 1, 0, 0]), atol=1e-12)
    np.testing.assert_allclose(by_lower, [1, 0, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(by_upper, [0, 0, 0, 1, 1], atol=1e-12)


def test_a_multiple_of_the_objective_takes_the_same_path():
    f, (_, theta, lower, upper) = quadratic(8, 1)
    paths = set()
    for scale in (2.0**-40, 1.0, 2.0**27):
        stats = dl.minimize(
            lambda x, theta, scale=scale: scale * (f(x, theta) + jnp.sum(x**4)),
            jnp.full(8, 0.3),
            theta,
            bounds=(lower, upper),
        ).stats
        paths.add((int(stats.num_steps), int(stats.num_fun_evals), int(stats.num_hvps)))
    assert len(paths) == 1


@pytest.mark.slow
class TestAtATie:
    """`min ½(x - θ)² + ½(y - θ/2)²` with `x >= 0`: at `θ = 0` the derivative of `x` jumps."""

    @staticmethod
    def fun(x, theta):
        return ((x[0] - theta) ** 2 + (x[1] - theta / 2) ** 2 + 0.1 * (x[0] - x[1]) ** 2) / 2

    BOUNDS = (jnp.array([0.0, -INF]), None)

    def value(self, theta, **settings):
        return dl.minimize(
            self.fun, jnp.array([0.5, 0.5]), theta, bounds=self.BOUNDS, **settings
        ).value

    @pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
    def test_right_on_either_side(self, distance):
        coupled = np.linalg.solve([[1.1, -0.1], [-0.1, 1.1]], [1, 0.5])
        for theta, wanted in ((distance, coupled), (-distance, [0, 0.5 / 1.1])):
            np.testing.assert_allclose(jax.jacrev(self.value)(theta), wanted, atol=1e-8)

    def test_refused_at_the_tie(self):
        solution = dl.minimize(self.fun, jnp.array([0.5, 0.5]), 0.0, bounds=self.BOUNDS)
        assert solution.converged
        assert solution.stats.num_weakly_active == 1
        loss = jax.grad(lambda theta, **settings: jnp.sum(self.value(theta, **settings)))
        for derivative in (loss, jax.jit(loss)):
            with pytest.raises(RuntimeError, match="multiplier within"):
                jax.block_until_ready(derivative(0.0))
        with pytest.raises(RuntimeError, match="multiplier within"):
            jax.block_until_ready(jax.vmap(loss)(jnp.array([1.0, 0.0])))
        assert jnp.isnan(loss(0.0, throw=False))
        lanes = jax.vmap(lambda theta: loss(theta, throw=False))(jnp.array([1.0, 0.0, -1.0]))
        np.testing.assert_array_equal(jnp.isnan(lanes), [False, True, False])

    def test_taken_for_free_if_asked(self):
        adjoint = dl.ImplicitAdjoint(approximate=True)
        found = jax.jacrev(lambda theta: self.value(theta, adjoint=adjoint))(0.0)
        np.testing.assert_allclose(
            found, np.linalg.solve([[1.1, -0.1], [-0.1, 1.1]], [1, 0.5]), atol=1e-8
        )

    def test_the_objective_keeps_its_derivative(self):
        def objective(theta):
            return dl.minimize(
                lambda x, theta: self.fun(x, theta) + theta * 3,
                jnp.array([0.5, 0.5]),
                theta,
                bounds=self.BOUNDS,
            ).objective

        assert abs(jax.grad(objective)(0.0) - 3) <= 1e-12

    def test_hypergradient_says_so(self):
        step = dl.value_and_hypergrad(
            lambda x, theta: jnp.sum(x), self.fun, bounds=self.BOUNDS, throw=False
        )
        _, gradient, info = step(0.0, jnp.array([0.5, 0.5]))
        assert info.result == dl.RESULTS.weakly_active
        assert jnp.isnan(gradient)
        assert jnp.isinf(info.error_estimate)
        _, gradient, info = step(0.5, jnp.array([0.5, 0.5]))
        assert info.result == dl.RESULTS.successful
        assert abs(gradient - 0.5 * 1.5 / 0.5) <= max(3 * info.error_estimate, 1e-8)


@pytest.mark.slow
def test_hypergradient_by_bounds_that_depend_on_theta():
    f, (_, theta, lower, upper) = quadratic(7, 2)

    def bounds(theta):
        return theta["low"], upper

    def outer(x, theta):
        return jnp.sum(x**3)

    step = dl.value_and_hypergrad(outer, lambda x, th: f(x, th["pull"]), bounds=bounds)
    both = {"pull": theta, "low": lower}
    value, found, info = step(both, jnp.zeros(7))
    wanted = jax.grad(
        lambda th: outer(minimizer(f, jnp.zeros(7), th["pull"], th["low"], upper), th)
    )(both)
    for name in both:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-9)
    assert info.error_estimate <= 1e-9
    assert info.min_curvature > 0.9
    again, _, warm = step(both, jnp.zeros(7), info.state)
    np.testing.assert_allclose(again, value, atol=1e-12)
    assert warm.solution.stats.num_fun_evals < info.solution.stats.num_fun_evals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fun", "lower"),
    [
        (lambda x, t: jnp.sum(x * jnp.log(x / t)) + jnp.sum(x) * 3, 1e-3),
        (lambda x, t: jnp.sum(-2 * jnp.sqrt(x)) + t * jnp.sum(x), 1e-2),
        (lambda x, t: jnp.sum(x + t * 1e-6 / x), 1e-2),
        (lambda x, t: jnp.sum((jnp.sqrt(x - 0.1) - t) ** 2) + jnp.sum(x), 0.2),
    ],
    ids=["log", "sqrt", "division", "inside a root"],
)
@pytest.mark.parametrize("polish", [0, 1])
def test_nothing_is_evaluated_outside(fun, lower, polish):
    seen = []

    def watched(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return fun(x, t)

    x0 = jnp.array([2.0, 0.5, 5.0])
    settings = {"bounds": (lower, 10.0), "solver": dl.LBFGS(polish=polish), "throw": False}
    step = dl.value_and_hypergrad(lambda x, t: jnp.sum(x), watched, **settings)
    _, _, info = step(1.5, x0)
    jax.effects_barrier()
    assert info.solution.converged
    assert len(seen) > 5
    points = np.concatenate([np.atleast_2d(x) for x in seen])
    assert (points >= lower).all()
    assert (points <= 10.0).all()
    assert (info.solution.value >= lower).all()


def test_a_start_outside_is_projected_and_values_obey():
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        upper = jnp.asarray(0.1, dtype)  # rounds differently in each
        x = minimizer(lambda x, _: jnp.sum((x - 3) ** 2), jnp.full(3, 7, dtype), None, None, upper)
        assert x.dtype == dtype
        assert (x <= upper).all()
        np.testing.assert_array_equal(x, upper)


def test_equal_bounds_fix_a_variable_with_the_sign_of_its_multiplier():
    def fun(x, theta):
        return jnp.sum((x - theta) ** 2) / 2

    lower, upper = jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 1.0, 5.0])
    solution = dl.minimize(fun, jnp.zeros(3), jnp.array([0.0, 2.0, 3.0]), bounds=(lower, upper))
    np.testing.assert_allclose(solution.value, [1, 1, 3], atol=1e-12)
    np.testing.assert_array_equal(solution.active, [-1, 1, 0])
    tie = dl.minimize(fun, jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]), bounds=(lower, upper))
    assert (tie.stats.num_active, tie.stats.num_weakly_active) == (2, 0)
    by_bounds = jax.jacrev(
        lambda b: minimizer(fun, jnp.zeros(3), jnp.array([0.0, 2.0, 3.0]), b, b)
    )(jnp.ones(3))
    np.testing.assert_allclose(by_bounds, np.eye(3), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("polish", [0, 1])
def test_all_variables_active(polish):
    solver = dl.LBFGS(polish=polish)
    solution = dl.minimize(
        lambda x, c: c @ x,
        jnp.array([0.3, 0.4]),
        jnp.array([1.0, -1.0]),
        bounds=(0.0, 1.0),
        solver=solver,
    )
    np.testing.assert_array_equal(solution.value, [0, 1])
    assert solution.result == dl.RESULTS.successful
    jacobian = jax.jacrev(
        lambda c, b: minimizer(lambda x, c: c @ x, jnp.array([0.3, 0.4]), c, *b, solver=solver),
        (0, 1),
    )(jnp.array([1.0, -1.0]), (0.0, 1.0))
    np.testing.assert_array_equal(jacobian[0], np.zeros((2, 2)))
    np.testing.assert_array_equal(jacobian[1], ([1, 0], [0, 1]))
    multipliers = jax.grad(
        lambda b: (
            dl.minimize(
                lambda x, c: c @ x, jnp.zeros(2), jnp.array([1.0, -1.0]), bounds=b, solver=solver
            ).objective
        )
    )((jnp.zeros(2), jnp.ones(2)))
    np.testing.assert_array_equal(multipliers, ([1, 0], [0, -1]))


class Model(eqx.Module):
    mean: jax.Array
    sigma: jax.Array
    name: str
    activation: object


def negative_log_likelihood(model, y):
    z = (y - model.mean) / model.sigma
    return jnp.sum(z**2) / 2 + y.size * jnp.log(model.sigma)


@pytest.mark.parametrize("flatten", [True, False])
def test_one_leaf_of_a_module_is_bounded(flatten):
    model = Model(jnp.zeros(()), jnp.ones(()), "normal", jnp.tanh)
    nothing = jax.tree.map(lambda _: None, model)
    lower = eqx.tree_at(lambda m: m.sigma, nothing, 0.7, is_leaf=lambda v: v is None)
    solver = dl.LBFGS(flatten=flatten)
    for spread, active in ((2.0, 0), (0.1, -1)):
        y = jnp.array([-1.0, 0.0, 1.0, 2.0]) * spread
        solution = dl.minimize(
            negative_log_likelihood, model, y, bounds=(lower, None), solver=solver
        )
        assert abs(solution.value.mean - y.mean()) <= 1e-9
        assert abs(solution.value.sigma - max(y.std(), 0.7)) <= 1e-8
        assert (solution.active.sigma, solution.active.mean) == (active, 0)
        assert solution.active.name is None
        assert solution.value.activation is jnp.tanh


@pytest.mark.slow
def test_prefixes_numbers_and_none():
    x0 = {"a": (jnp.zeros(2), jnp.zeros(())), "b": jnp.zeros((2, 2)), "label": "text"}

    def fun(x, target):
        return sum(jnp.sum((leaf - target) ** 2) for leaf in (*x["a"], x["b"]))

    for bounds, wanted in [
        ((None, 1.0), (1, 1, 1)),
        ((None, {"a": 1.0, "b": None, "label": None}), (1, 1, 3)),
        ((None, {"a": (None, 2), "b": jnp.array([1.0, INF]), "label": "text"}), (3, 2, (1, 3))),
        ([-1, {"a": (jnp.array([0.5, 4.0]), None), "b": 7.0, "label": None}], ((0.5, 3), 3, 3)),
        ((None, None), (3, 3, 3)),
    ]:
        found = dl.minimize(fun, x0, 3.0, bounds=bounds)
        (one, two), three = found.value["a"], found.value["b"]
        for leaf, value in zip((one, two, three), wanted, strict=True):
            np.testing.assert_allclose(leaf, np.broadcast_to(value, leaf.shape), atol=1e-9)
        assert found.active["label"] is None


@pytest.mark.slow
def test_lanes_have_bounds_of_their_own():
    f, (_, theta, lower, upper) = quadratic(5, 4)
    factors = jnp.array([0.2, 1.0, 30.0])

    def value(factor):
        return minimizer(f, jnp.zeros(5), theta, factor * lower, factor * upper)

    lanes = jax.jit(jax.vmap(value))(factors)
    by_factor = jax.vmap(jax.jacrev(value))(factors)
    for k, factor in enumerate(factors):
        np.testing.assert_allclose(lanes[k], value(factor), atol=1e-10)
        np.testing.assert_allclose(by_factor[k], jax.jacrev(value)(factor), atol=1e-9)


def test_warm_start_with_bounds_that_moved():
    f, (_, theta, lower, upper) = quadratic(30, 5)
    cold = dl.minimize(f, jnp.zeros(30), theta, bounds=(lower, upper))
    for factor in (0.9, 1.02, 3.0):
        moved = (factor * lower, factor * upper)
        warm = dl.minimize(f, jnp.zeros(30), theta, bounds=moved, state=cold.state)
        exact = dl.minimize(f, jnp.zeros(30), theta, bounds=moved)
        np.testing.assert_allclose(warm.value, exact.value, atol=1e-8)


def test_crossed_bounds_that_are_not_known_before():
    def solve(lower, throw=True):
        return dl.minimize(
            lambda x, _: jnp.sum(x**2), jnp.ones(2), bounds=(lower, 1.0), throw=throw
        )

    for bad in (2.0, jnp.nan):
        solution = jax.jit(lambda lower: solve(lower, throw=False))(bad)
        assert solution.result == dl.RESULTS.nonfinite_start
        with pytest.raises(RuntimeError, match="crossed"):
            jax.block_until_ready(jax.jit(solve)(bad).value)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ((1.0, 0.0), ValueError, "lower <= upper, got 1.0 and 0.0"),
        ((jnp.nan, 0.0), ValueError, "lower <= upper, got nan"),
        ((jnp.zeros(4), None), ValueError, r"shape \(4,\) for a variable of shape \(3,\)"),
        ((1j, None), TypeError, "real numbers, got 1j"),
        (("low", None), TypeError, "'low' for a variable"),
        ((True, None), TypeError, "real numbers, got True"),
        (({"a": 1.0}, None), ValueError, "no prefix of that of x0"),
        ([(0, 1), (0, 1), (0, 1)], TypeError, "SciPy's list of pairs"),
        (jnp.zeros((2, 3)), TypeError, r"pair \(lower, upper\), got"),
        (1.0, TypeError, r"pair \(lower, upper\), got 1.0"),
    ],
)
def test_bounds_that_are_refused(bounds, error, message):
    with pytest.raises(error, match=message):
        dl.minimize(lambda x, _: jnp.sum(x**2), jnp.ones(3), bounds=bounds)


def test_bounds_of_leaves_that_are_not_variables_or_are_complex():
    with pytest.raises(TypeError, match="SciPy"):
        dl.minimize(lambda x, _: jnp.sum(x**2), jnp.ones(2), bounds=[(0, 1), (0, 1)])
    x0 = {"x": jnp.ones(2), "k": 3}
    with pytest.raises(ValueError, match=r"no variable\. Write None there"):
        dl.minimize(lambda x, _: jnp.sum(x["x"] ** 2), x0, bounds=({"x": 0.0, "k": 5}, None))
    dl.minimize(lambda x, _: jnp.sum(x["x"] ** 2), x0, bounds=({"x": 0.0, "k": 3}, None))
    z0 = {"z": jnp.ones(2, complex), "x": jnp.ones(2)}

    def fun(x, _):
        return jnp.sum(jnp.abs(x["z"] - 2j) ** 2) + jnp.sum((x["x"] + 1) ** 2)

    with pytest.raises(ValueError, match="complex numbers have no order"):
        dl.minimize(fun, z0, bounds=(0.0, None))
    solution = dl.minimize(fun, z0, bounds=({"z": None, "x": 0.0}, None))
    np.testing.assert_allclose(solution.value["z"], 2j * np.ones(2), atol=1e-9)
    np.testing.assert_array_equal(solution.active["x"], [-1, -1])
    np.testing.assert_array_equal(solution.active["z"], [0, 0])


def test_solvers_without_bounds_refuse_them():
    def fun(x, _):
        return jnp.sum(x**2)

    with pytest.raises(ValueError, match="bounds are kept by LBFGS"):
        dl.minimize(
            fun, jnp.ones(2), bounds=(0, 1), solver=dl.Unrolled(optax.sgd(0.1), num_steps=3)
        )
    search = optax.scale_by_backtracking_linesearch(10)
    with pytest.raises(ValueError, match="own line search"):
        dl.minimize(fun, jnp.ones(2), bounds=(0, 1), solver=dl.LBFGS(linesearch=search))


def test_infinite_and_inactive_bounds_have_no_derivative():
    f, (_, theta, *_) = quadratic(4, 0)
    lower = jnp.array([-INF, -100.0, -INF, -50.0])
    by_lower = jax.jacrev(lambda lower: minimizer(f, jnp.zeros(4), theta, lower, INF))(lower)
    np.testing.assert_array_equal(by_lower, np.zeros((4, 4)))


@pytest.mark.slow
def test_a_degenerate_vertex_converges():
    """The first of the multipliers vanishes, and so does the gradient of the second variable."""

    def fun(x, theta):
        return jnp.sum((x - theta) ** 2) / 2 + 0.3 * x[0] * x[1]

    for polish in (0, 1):
        for theta in ([0.0, 0.0, 1.0], [0.0, -1.0, 1.0], [0.0, 2.0, 0.5]):
            solution = dl.minimize(
                fun,
                jnp.full(3, 0.7),
                jnp.array(theta),
                bounds=(0.0, None),
                solver=dl.LBFGS(polish=polish),
            )
            assert solution.converged
            Q = np.array([[1, 0.3, 0], [0.3, 1, 0], [0, 0, 1]])
            exact, *_ = by_enumeration(Q, np.array(theta), np.zeros(3), np.full(3, 9.0))
            np.testing.assert_allclose(solution.value, exact, atol=1e-6)
