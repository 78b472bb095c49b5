"""The JAXopt adapter: its arguments, its state, its steps and its derivatives.

JAXopt itself is not needed: what it does is written down here once more, naively.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import difflbfgs as dl
from difflbfgs.compat._jaxopt_adjoint import make_adjoint
from difflbfgs.compat.jaxopt import LBFGS, LbfgsState, OptStep
from problems import relative_error, tolerance

# The signature and the state of JAXopt 0.8.5.
ARGUMENTS = {
    "fun": inspect.Parameter.empty,
    "value_and_grad": False,
    "has_aux": False,
    "maxiter": 500,
    "tol": 1e-3,
    "stepsize": 0.0,
    "linesearch": "zoom",
    "linesearch_init": "increase",
    "stop_if_linesearch_fails": False,
    "condition": None,
    "maxls": 30,
    "decrease_factor": None,
    "increase_factor": 1.5,
    "max_stepsize": 1.0,
    "min_stepsize": 1e-6,
    "history_size": 10,
    "use_gamma": True,
    "implicit_diff": True,
    "implicit_diff_solve": None,
    "jit": True,
    "unroll": "auto",
    "verbose": False,
}
STATE = (
    "iter_num value grad stepsize error s_history y_history rho_history gamma aux "
    "failed_linesearch num_fun_eval num_grad_eval num_linesearch_iter"
).split()

_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(size=(20, 3)))
Y = jnp.asarray(_rng.normal(size=20))
LABELS = jnp.sign(Y)
W0 = jnp.zeros(3)
P = jnp.asarray(0.3)
EPS = float(jnp.finfo(jnp.float64).eps)
# A step size at which the fixed iteration converges, and enough steps for it to.
FIXED = {"tol": 1e-8, "stepsize": 0.5, "maxiter": 100}


def ridge(w, p, y):
    return 0.5 * jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(w**2)


def ridge_with_gradient(w, p, y):
    return ridge(w, p, y), X.T @ (X @ w - y) / 20 + jnp.exp(p) * w


def ridge_solution(p, y):
    return jnp.linalg.solve(X.T @ X / 20 + jnp.exp(p) * jnp.eye(3), X.T @ y / 20)


def outer(w):
    return jnp.sum(jnp.sin(w) * jnp.arange(1.0, 4.0))


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def hypergradient(solver):
    """Return the derivatives by `p`, a positional argument, and `y`, a keyword argument."""
    loss = lambda p, y: outer(solver.run(W0, p, y=y).params)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(P, Y)


EXACT = jax.grad(lambda p, y: outer(ridge_solution(p, y)), argnums=(0, 1))(P, Y)


def test_signature_is_jaxopts():
    found = {name: p.default for name, p in inspect.signature(LBFGS).parameters.items()}
    assert found == ARGUMENTS
    assert list(found) == list(ARGUMENTS)
    solver = LBFGS(ridge, maxiter=7)
    assert hash(solver) != hash(dataclasses.replace(solver))
    assert solver.attribute_names() == tuple(ARGUMENTS)
    assert solver.attribute_values()[3] == 7


def test_state_has_jaxopts_fields_and_the_same_types_after_each_step():
    assert LbfgsState._fields == (*STATE, "result")
    solver = LBFGS(ridge, tol=1e-6)
    before = solver.init_state(W0, P, y=Y)
    states = [before, solver.update(W0, before, P, y=Y).state, solver.run(W0, P, y=Y).state]
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in states]
    assert kinds[0] == kinds[1] == kinds[2]


def test_state_says_where_the_solve_ended():
    solver = LBFGS(ridge, tol=1e-6)
    w, state = solver.run(W0, P, y=Y)
    close = {"rtol": tolerance(float, 100), "atol": tolerance(float, 100)}
    np.testing.assert_allclose(w, ridge_solution(P, Y), rtol=tolerance(float, 1e3))
    np.testing.assert_allclose(state.value, ridge(w, P, Y), **close)
    np.testing.assert_allclose(state.grad, jax.grad(ridge)(w, P, Y), **close)
    np.testing.assert_allclose(state.error, solver.l2_optimality_error(w, P, y=Y), **close)
    np.testing.assert_allclose(solver.optimality_fun(w, P, y=Y), jax.grad(ridge)(w, P, Y), **close)
    assert state.error <= 1e-6
    assert state.iter_num > 0
    assert state.num_fun_eval >= state.iter_num
    assert not state.failed_linesearch
    assert dl.RESULTS[state.result] == dl.RESULTS[dl.RESULTS.successful]


def test_histories_are_steps_and_changes_of_the_gradient_oldest_first():
    solver = LBFGS(ridge, history_size=3)
    w, state = W0, solver.init_state(W0, P, y=Y)
    points, gradients = [w], [state.grad]
    for _ in range(4):
        w, state = solver.update(w, state, P, y=Y)
        points.append(w)
        gradients.append(state.grad)
    for age in (1, 2, 3):
        row = (state.iter_num - age) % 3
        s, y = points[-age] - points[-age - 1], gradients[-age] - gradients[-age - 1]
        np.testing.assert_array_equal(state.s_history[row], s)
        np.testing.assert_array_equal(state.y_history[row], y)
        np.testing.assert_allclose(state.rho_history[row], 1 / (s @ y), rtol=tolerance(float, 10))
    s, y = points[-1] - points[-2], gradients[-1] - gradients[-2]
    np.testing.assert_allclose(state.gamma, s @ y / (y @ y), rtol=tolerance(float, 10))


def test_run_leaves_its_last_pair_in_the_newest_row():
    _, state = LBFGS(ridge, tol=1e-6).run(W0, P, y=Y)
    row = (state.iter_num - 1) % 10
    hessian = X.T @ X / 20 + jnp.exp(P) * jnp.eye(3)
    s, y = state.s_history[row], state.y_history[row]
    assert relative_error(y, hessian @ s) < 1e-6  # s is small, and y a difference of gradients
    np.testing.assert_allclose(state.rho_history[row], 1 / (s @ y), rtol=tolerance(float, 10))


def naive_lbfgs(fun, x, stepsize, steps, history_size, use_gamma):
    """Repeat `x - η P g` with a list of pairs, and `P` as a matrix (Nocedal & Wright, (7.16))."""
    compiled = jax.jit(jax.grad(fun))
    gradient = lambda x: np.asarray(compiled(x))
    x, pairs, identity = np.asarray(x), [], np.eye(len(x))
    for k in range(steps):
        gamma = pairs[-1][0] @ pairs[-1][1] / (pairs[-1][1] @ pairs[-1][1]) if pairs else 1.0
        inverse = (gamma if use_gamma else 1.0) * identity
        for s, y in pairs[len(pairs) - min(history_size, len(pairs)) :]:
            v = identity - np.outer(y, s) / (s @ y)
            inverse = v.T @ inverse @ v + np.outer(s, s) / (s @ y)
        new = x - (stepsize(k) if callable(stepsize) else stepsize) * inverse @ gradient(x)
        pairs.append((new - x, gradient(new) - gradient(x)))
        x = new
    return x


@pytest.mark.parametrize(
    ("stepsize", "history_size", "use_gamma"),
    [(1e-3, 5, True), (1e-3, 5, False), (lambda k: 1e-3 / (k + 1.0), 5, True), (1e-3, 0, False)],
)
def test_a_given_stepsize_is_jaxopts_iteration(stepsize, history_size, use_gamma):
    memory = {"history_size": history_size, "use_gamma": use_gamma}
    solver = LBFGS(
        rosenbrock, stepsize=stepsize, maxiter=15, implicit_diff=False, unroll=False, **memory
    )
    found, state = solver.run(jnp.zeros(2))
    wanted = naive_lbfgs(rosenbrock, jnp.zeros(2), stepsize, 15, history_size, use_gamma)
    assert relative_error(found, wanted) < tolerance(float, 1e4)
    assert state.iter_num == 15
    assert state.stepsize == (stepsize(14) if callable(stepsize) else stepsize)
    assert dl.RESULTS[state.result] == dl.RESULTS[dl.RESULTS.max_steps_reached]


@pytest.mark.parametrize("linesearch", ["zoom", "hager-zhang", "backtracking"])
def test_a_loop_of_updates_converges(linesearch):
    solver = LBFGS(rosenbrock, tol=1e-8, linesearch=linesearch)
    x = jnp.asarray([-1.2, 1.0])
    state = solver.init_state(x)
    values = [state.value]
    while state.error > solver.tol and state.iter_num < 100:
        x, state = solver.update(x, state)
        values.append(state.value)
    assert relative_error(x, jnp.ones(2)) < 1e-7  # the Hessian's smallest eigenvalue is 0.4
    assert np.all(np.diff(values) <= tolerance(float, 10) * np.asarray(values[:-1]))
    assert state.num_linesearch_iter >= state.iter_num


def test_where_a_line_search_begins():
    def first_step(last, **arguments):
        solver = LBFGS(lambda x: jnp.sum((x - 1) ** 2), linesearch="backtracking", **arguments)
        state = solver.init_state(jnp.zeros(1))._replace(stepsize=jnp.asarray(last))
        return solver.update(jnp.zeros(1), state).state.stepsize

    assert first_step(0.25) == 0.375
    assert first_step(0.25, increase_factor=2.0) == 0.5
    assert first_step(0.25, linesearch_init="current") == 0.25
    assert first_step(0.25, linesearch_init="max", max_stepsize=0.5) == 0.5
    assert first_step(1e-7, max_stepsize=0.5) == 0.5


def test_a_step_that_rises_is_not_taken():
    rising = lambda x: (jnp.sum(x**2), -2 * x)  # the gradient has the wrong sign
    solver = LBFGS(rising, value_and_grad=True, maxls=3, stop_if_linesearch_fails=True, maxiter=9)
    state = solver.init_state(jnp.ones(3))
    x, state = solver.update(jnp.ones(3), state)
    np.testing.assert_array_equal(x, jnp.ones(3))
    assert state.failed_linesearch
    assert dl.RESULTS[state.result] == dl.RESULTS[dl.RESULTS.line_search_failed]
    plain = dataclasses.replace(solver, use_gamma=False)
    assert plain.run(jnp.ones(3)).state.iter_num == 1
    assert (
        dataclasses.replace(plain, stop_if_linesearch_fails=False).run(jnp.ones(3)).state.iter_num
        == 9
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"tol": 1e-4},
        {"tol": 1e-4, "linesearch": "backtracking"},
        FIXED,
        {"tol": 1e-8, "history_size": 0},
    ],
)
def test_derivative_of_the_minimizer_by_args_and_kwargs(arguments):
    # Newton's polish squares the error of the first two, whose tolerance is looser.
    assert relative_error(hypergradient(LBFGS(ridge, **arguments)), EXACT) < 1e-7


def test_derivative_of_logistic_regression():
    def loss(w, p):
        return jnp.mean(jnp.log1p(jnp.exp(-LABELS * (X @ w)))) + 0.5 * jnp.exp(p) * jnp.sum(w**2)

    def found(p):
        w = LBFGS(loss, tol=1e-4).run(W0, p).params
        return outer(w), w

    by_p, w = jax.jit(jax.grad(found, has_aux=True))(P - 3)
    probability = jax.nn.sigmoid(-LABELS * (X @ w))
    hessian = (X.T * (probability * (1 - probability))) @ X / 20 + jnp.exp(P - 3) * jnp.eye(3)
    gradient = -X.T @ (LABELS * probability) / 20 + jnp.exp(P - 3) * w
    assert jnp.linalg.norm(gradient) < 1e-7
    exact = -jax.grad(outer)(w) @ jnp.linalg.solve(hessian, jnp.exp(P - 3) * w)
    assert relative_error(by_p, exact) < 1e-9


def test_value_and_aux_are_differentiated_and_the_start_is_not():
    def with_aux(w, p, y):
        return ridge(w, p, y), w * p

    solver = LBFGS(with_aux, has_aux=True, **FIXED)

    def found(w0, p):
        state = solver.run(w0, p, Y).state
        return outer(state.aux) + state.value

    def exact(p):
        w = ridge_solution(p, Y)
        return outer(w * p) + ridge(w, p, Y)

    by_start, by_p = jax.jit(jax.grad(found, argnums=(0, 1)))(W0, P)
    np.testing.assert_allclose(by_p, jax.grad(exact)(P), rtol=1e-6)
    assert not jnp.any(by_start)


@pytest.mark.parametrize("as_function", [False, True])
def test_a_gradient_of_the_users_own(as_function):
    fun, given = (ridge, ridge_with_gradient) if as_function else (ridge_with_gradient, True)
    solver = LBFGS(fun, value_and_grad=given, **FIXED)
    assert relative_error(hypergradient(solver), EXACT) < 1e-6


def test_a_gradient_of_the_users_own_is_the_one_used():
    doubled = lambda w: (jnp.sum((w - 1) ** 2), 4 * (w - 1))
    solver = LBFGS(doubled, value_and_grad=True, stepsize=0.05, maxiter=1)
    np.testing.assert_allclose(solver.run(W0).params, 0.2 * jnp.ones(3), rtol=tolerance(float, 4))


def test_a_gradient_that_jax_cannot_differentiate_can_be_minimized():
    def outside(w):
        form = (jax.ShapeDtypeStruct((), float), jax.ShapeDtypeStruct((3,), float))
        return jax.pure_callback(lambda w: (np.sum((w - 1) ** 2), 2 * (w - 1)), form, w)

    w, state = LBFGS(outside, value_and_grad=True, tol=1e-8).run(W0)
    np.testing.assert_allclose(w, jnp.ones(3), atol=1e-8)
    assert state.error <= 1e-8


@pytest.mark.parametrize("own_gradient", [False, True])
def test_closures_are_differentiated(own_gradient):
    def loss(p, y):
        fun = lambda w: (ridge_with_gradient if own_gradient else ridge)(w, p, y)
        solver = LBFGS(fun, value_and_grad=own_gradient, **FIXED)
        return outer(solver.run(W0).params)

    assert relative_error(jax.jit(jax.grad(loss, argnums=(0, 1)))(P, Y), EXACT) < 1e-6


@pytest.mark.parametrize("arguments", [{"tol": 1e-9}, FIXED])
def test_a_solve_that_did_not_converge_has_the_derivative_nan(arguments):
    solver = LBFGS(ridge, **{**arguments, "maxiter": 1})

    def loss(p):
        w, state = solver.run(W0, p, y=Y)
        return outer(w), (w, state)

    by_p, (w, state) = jax.jit(jax.grad(loss, has_aux=True))(P)
    assert jnp.all(jnp.isfinite(w))
    assert state.iter_num == 1
    assert state.error > solver.tol
    assert dl.RESULTS[state.result] == dl.RESULTS[dl.RESULTS.max_steps_reached]
    assert jnp.isnan(by_p)


def test_the_switch_differentiates_wherever_the_solver_stopped():
    approximate = dl.ImplicitAdjoint(approximate=True)
    solver = LBFGS(ridge, tol=1e-9, stepsize=0.5, maxiter=1, implicit_diff_solve=approximate)
    w = solver.run(W0, P, y=Y).params
    hessian = X.T @ X / 20 + jnp.exp(P) * jnp.eye(3)
    u = jnp.linalg.solve(hessian, jax.grad(outer)(w))
    assert relative_error(hypergradient(solver), (-u @ (jnp.exp(P) * w), X @ u / 20)) < 1e-12


def test_implicit_diff_solve():
    calls = []

    def solve(matvec, b):
        calls.append(b.shape)
        return jnp.linalg.solve(jax.vmap(matvec)(jnp.eye(3)), b)

    assert (
        relative_error(hypergradient(LBFGS(ridge, **FIXED, implicit_diff_solve=solve)), EXACT)
        < 1e-6
    )
    assert set(calls) == {(3,)}
    wrong = LBFGS(ridge, **FIXED, implicit_diff_solve=lambda matvec, b: 1.01 * solve(matvec, b))
    assert all(jnp.all(jnp.isnan(leaf)) for leaf in hypergradient(wrong))
    assert make_adjoint(None) == dl.ImplicitAdjoint()
    assert make_adjoint(lx.LU()) == dl.ImplicitAdjoint(linear_solver=lx.LU())


@pytest.mark.parametrize(
    "arguments",
    [{"stepsize": lambda k: 0.5 / (k + 1.0)}, {"linesearch": "backtracking"}],
)
def test_unrolled_iterates_have_their_own_derivative(arguments):
    solver = LBFGS(ridge, tol=1e-12, maxiter=4, implicit_diff=False, **arguments)
    loss = lambda w, p: outer(solver.run(w, p, y=Y).params)
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    by_start, by_p = both(W0 + 0.1, P)[1]
    h = EPS ** (1 / 3)
    difference = (both(W0 + 0.1, P + h)[0] - both(W0 + 0.1, P - h)[0]) / (2 * h)
    np.testing.assert_allclose(by_p, difference, rtol=EPS ** (1 / 2))
    assert jnp.all(by_start != 0)
    # The iterate is not the minimizer yet, and neither is its derivative.
    assert relative_error(by_p, EXACT[0]) > 1e-4


def test_a_zoom_search_is_not_differentiated_in_silence():
    solver = LBFGS(ridge, tol=1e-4, implicit_diff=False)
    np.testing.assert_allclose(solver.run(W0, P, y=Y).params, ridge_solution(P, Y), atol=1e-3)
    with pytest.raises(NotImplementedError, match=r"implicit_diff=True.*backtracking.*stepsize"):
        hypergradient(solver)
    state = solver.init_state(W0, P, y=Y)
    with pytest.raises(NotImplementedError, match="zoom"):
        jax.grad(lambda p: outer(solver.update(W0, state, p, y=Y).params))(P)


def test_without_jit_fun_is_called_once_a_step_and_may_be_numpy():
    calls = []

    def fun(x):
        calls.append(x)
        return rosenbrock(x)

    LBFGS(fun, stepsize=1e-3, maxiter=3, history_size=0, jit=False).run(jnp.zeros(2))
    assert len(calls) == 4

    def own(w):
        w = np.asarray(w)  # fails if it is traced
        return jnp.asarray(np.sum((w - 1) ** 2)), jnp.asarray(2 * (w - 1))

    eager = LBFGS(
        own, value_and_grad=True, jit=False, implicit_diff=False, stepsize=0.4, history_size=0
    )
    np.testing.assert_allclose(eager.run(W0).params, jnp.ones(3), atol=1e-3)


def test_warm_starts():
    for solver in (LBFGS(ridge, tol=1e-6), LBFGS(ridge, **FIXED)):
        cold = solver.run(W0, P, y=Y)
        again = solver.run(cold, P, y=Y)
        assert again.state.iter_num == cold.state.iter_num
        np.testing.assert_allclose(again.params, cold.params, rtol=tolerance(float, 10))
        moved = solver.run(cold, P + 1e-3, y=Y)
        np.testing.assert_allclose(moved.params, ridge_solution(P + 1e-3, Y), atol=1e-5)
        assert moved.state.iter_num - cold.state.iter_num < cold.state.iter_num
    state = solver.init_state(cold, P, y=Y)
    np.testing.assert_array_equal(state.s_history, cold.state.s_history)


def test_maxiter_zero_stays():
    w, state = LBFGS(ridge, maxiter=0).run(W0, P, y=Y)
    np.testing.assert_array_equal(w, W0)
    assert state.iter_num == 0


def test_complex_trees():
    def fun(tree, a):
        z, r = tree["z"], tree["r"][0]
        return jnp.sum(jnp.abs(z - a) ** 2) + 0.5 * jnp.abs(z[0] * 1j + r[1]) ** 2 + jnp.sum(r**2)

    start = {"z": jnp.zeros(2, complex), "r": [jnp.ones(2)]}
    a = jnp.asarray([1 + 2j, -1j])
    solver = LBFGS(fun, tol=1e-7, stepsize=0.3)
    tree, state = solver.run(start, a)
    assert solver.l2_optimality_error(tree, a) < 1e-7
    np.testing.assert_allclose(tree["z"][1], a[1], atol=1e-7)
    np.testing.assert_allclose(tree["r"][0][0], 0, atol=1e-7)
    assert jax.tree.structure(state.grad) == jax.tree.structure(start)
    assert state.s_history["z"].shape == (10, 2)
    assert state.s_history["z"].dtype == a.dtype
    wanted = jax.grad(fun)(tree, a)
    for found, exact in zip(jax.tree.leaves(state.grad), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, exact, atol=tolerance(float, 100))


def test_dtypes():
    def fun(x, dtype):
        return jnp.sum((x.astype(dtype) - 1) ** 2).astype(dtype)

    plain = {"implicit_diff": False, "unroll": False}
    for variable, value in ((jnp.float32, jnp.float64), (jnp.float16, jnp.bfloat16)):
        solver = LBFGS(lambda x, value=value: fun(x, value), stepsize=0.1, maxiter=2, **plain)
        x, state = solver.run(jnp.zeros(2, variable))
        assert x.dtype == variable
        assert state.value.dtype == value
        names = ("error", "grad", "s_history", "y_history", "rho_history", "gamma", "stepsize")
        assert {getattr(state, name).dtype for name in names} == {jnp.dtype(variable)}
        assert state.iter_num.dtype == jnp.asarray(0).dtype


def test_batches():
    penalties = jnp.asarray([0.1, 2.5])

    def found(p):
        w, state = LBFGS(ridge, **FIXED).run(W0, p, y=Y)
        return outer(w), state

    gradients, states = jax.jit(jax.vmap(jax.grad(found, has_aux=True)))(penalties)
    exact = jax.vmap(jax.grad(lambda p: outer(ridge_solution(p, Y))))(penalties)
    np.testing.assert_allclose(gradients, exact, rtol=1e-6)
    assert states.s_history.shape == (2, 10, 3)
    assert states.iter_num[0] != states.iter_num[1]  # each lane stops when it has converged
    assert jnp.all(states.error <= 1e-8)


def test_verbose_prints_every_step(capfd):
    _, state = LBFGS(ridge, **FIXED, verbose=True).run(W0, P, y=Y)
    jax.effects_barrier()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("INFO")]
    assert len(lines) == state.iter_num
    assert f"Iter: {int(state.iter_num)} " in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "fragments"),
    [
        ({"fun": 3}, TypeError, ["fun", "3", "fun(params"]),
        ({"maxiter": -1}, ValueError, ["maxiter", "-1", "at least 0"]),
        ({"maxiter": 1e3}, TypeError, ["maxiter", "1000.0", "integer"]),
        ({"tol": -1.0}, ValueError, ["tol", "-1.0", "nonnegative"]),
        ({"stepsize": "auto"}, TypeError, ["stepsize", "'auto'", "line search"]),
        ({"stepsize": np.ones(2)}, ValueError, ["stepsize", "scalar"]),
        ({"linesearch": "wolfe"}, ValueError, ["linesearch", "'wolfe'", "'zoom'", "hager-zhang"]),
        ({"linesearch_init": "one"}, ValueError, ["linesearch_init", "'one'", "'increase'"]),
        ({"maxls": 0}, ValueError, ["maxls", "0", "at least 1"]),
        ({"max_stepsize": 0.0}, ValueError, ["max_stepsize", "0.0", "positive"]),
        ({"increase_factor": "x"}, TypeError, ["increase_factor", "'x'", "1.0"]),
        ({"history_size": 2.0}, TypeError, ["history_size", "2.0", "integer"]),
        ({"use_gamma": 1}, TypeError, ["use_gamma", "1", "True or False"]),
        ({"value_and_grad": "yes"}, TypeError, ["value_and_grad", "'yes'"]),
        ({"implicit_diff_solve": "cg"}, TypeError, ["implicit_diff_solve", "'cg'", "matvec"]),
        ({"unroll": "never"}, ValueError, ["unroll", "'never'", "'auto'"]),
        ({"verbose": 3}, ValueError, ["verbose", "3"]),
    ],
)
def test_bad_arguments(arguments, error, fragments):
    with pytest.raises(error) as caught:
        LBFGS(**{"fun": ridge, **arguments})
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_bad_objectives_and_states():
    with pytest.raises(TypeError, match="has_aux=True needs fun to return a pair"):
        LBFGS(ridge, has_aux=True).init_state(W0, P, Y)
    with pytest.raises(TypeError, match="value_and_grad=True"):
        LBFGS(ridge_with_gradient).init_state(W0, P, Y)
    with pytest.raises(TypeError, match=r"returns \(objective, gradient\)"):
        LBFGS(ridge, value_and_grad=True).init_state(W0, P, Y)
    with pytest.raises(TypeError, match="gradient like the parameters"):
        LBFGS(lambda w: (jnp.sum(w), (w, w)), value_and_grad=True).init_state(W0)
    state = LBFGS(ridge, history_size=3).init_state(W0, P, Y)
    with pytest.raises(ValueError, match=r"3 curvature pairs .* history_size=10"):
        LBFGS(ridge).run(OptStep(W0, state), P, Y)
    with pytest.raises(dataclasses.FrozenInstanceError):
        LBFGS(ridge).tol = 1.0


@pytest.mark.parametrize("name", ["condition", "decrease_factor"])
def test_arguments_without_effect_warn(name):
    with pytest.warns(DeprecationWarning, match=f"{name} has no effect"):
        LBFGS(ridge, **{name: 0.5})
