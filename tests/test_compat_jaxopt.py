"""The JAXopt adapter: its arguments, its state, its steps and its derivatives."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import difflbfgs as dl
from difflbfgs.compat._jaxopt import make_adjoint
from difflbfgs.compat.jaxopt import LBFGS, LBFGSB, LbfgsState, OptStep
from problems import relative_error, tolerance

pytestmark = pytest.mark.slow

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
TIGHT = {"tol": 1e-8, "maxiter": 100}


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


def test_update_takes_the_steps_of_the_loop():
    steps = []
    arguments = {"solver": dl.LBFGS(rtol=0.0, atol=1e-6, polish=0), "throw": False}
    sol = dl.minimize(lambda x, _: rosenbrock(x), jnp.zeros(2), callback=steps.append, **arguments)
    jax.effects_barrier()
    solver, x = LBFGS(rosenbrock, tol=1e-6), jnp.zeros(2)
    state = solver.init_state(x)
    # Both find the same, until roundings and what the loop remembers tell them apart.
    for step in steps[:6]:
        x, state = solver.update(x, state)
        np.testing.assert_allclose(state.value, step.objective, rtol=1e-9)
        np.testing.assert_allclose(state.stepsize, step.step_size, rtol=1e-6)
    assert state.iter_num == 6
    assert sol.converged
    # Each update evaluates where it begins, but for the start, where `init_state` does, too.
    assert state.num_fun_eval == steps[5].num_fun_evals + 6


def test_update_goes_on_from_its_parameters_and_arguments():
    solver = LBFGS(ridge, tol=1e-8)
    state = solver.update(W0, solver.init_state(W0, P, y=Y), P, y=Y).state
    w = jnp.asarray([3.0, -2.0, 1.0])
    after = solver.update(w, state, P - 1, y=2 * Y)
    assert after.state.value < ridge(w, P - 1, 2 * Y)
    np.testing.assert_allclose(after.state.value, ridge(after.params, P - 1, 2 * Y), rtol=1e-12)
    np.testing.assert_array_equal(after.state.s_history[1], after.params - w)


def test_update_inside_a_loop_and_in_lanes():
    solver = LBFGS(rosenbrock, tol=1e-8)
    starts = jnp.asarray([[-1.2, 1.0], [1.0, 1.0]])

    def solve(x):
        def unfinished(step):
            return (step[1].error > solver.tol) & (step[1].iter_num < 100)

        start = (x, solver.init_state(x))
        return jax.lax.while_loop(unfinished, lambda step: tuple(solver.update(*step)), start)

    x, state = jax.jit(jax.vmap(solve))(starts)
    np.testing.assert_allclose(x, jnp.ones((2, 2)), rtol=1e-7)
    assert state.iter_num[0] > 10
    assert state.iter_num[1] == 0


def test_update_goes_on_below_the_tolerance_and_counts_where_it_ends():
    solver = LBFGS(ridge, tol=1e-2)
    w, state = W0, solver.init_state(W0, P, y=Y)
    for _ in range(20):
        w, state = solver.update(w, state, P, y=Y)
    assert state.iter_num == 20
    assert state.error < tolerance(float, 100)
    assert dl.RESULTS[state.result] == dl.RESULTS[dl.RESULTS.successful]
    solver = LBFGS(rosenbrock)
    x, state = solver.update(jnp.ones(2), solver.init_state(jnp.ones(2)))
    np.testing.assert_array_equal(x, jnp.ones(2))
    assert state.iter_num == 1
    assert not state.failed_linesearch


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


@pytest.mark.parametrize("beyond", [1e3, jnp.nan])
def test_a_step_that_rises_is_not_taken(beyond):
    def fun(w, p, y, walled=True):  # a wall around W0
        return ridge(w, p, y) + jnp.where(walled & jnp.any(w != W0), beyond, 0.0)

    solver = LBFGS(fun, maxiter=20)
    w, state = solver.update(W0 + 1, solver.init_state(W0 + 1, P, Y, False), P, Y, False)
    w, state = solver.update(w, state, P, Y, False)
    w, state = solver.update(W0, state, P, Y)
    np.testing.assert_array_equal(w, W0)
    assert state.failed_linesearch
    assert state.stepsize == 0
    assert state.iter_num == 3
    # It forgets the memory, and goes down the gradient.
    gradient = state.grad
    w, state = solver.update(w, state, P, Y, False)
    assert not state.failed_linesearch
    assert abs(w @ gradient) > (1 - 1e-12) * jnp.linalg.norm(w) * jnp.linalg.norm(gradient)
    w, state = solver.run(W0, P, Y)
    np.testing.assert_array_equal(w, W0)
    assert state.failed_linesearch
    assert dl.RESULTS[state.result] == dl.RESULTS[dl.RESULTS.line_search_failed]


@pytest.mark.parametrize(
    "arguments",
    [
        {"tol": 1e-4},
        {"tol": 1e-4, "linesearch": "backtracking"},
        {"tol": 1e-8, "history_size": 1, "unroll": True, "jit": False},
    ],
)
def test_derivative_of_the_minimizer_by_args_and_kwargs(arguments):
    # A Newton step squares the error that the tolerance leaves.
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

    solver = LBFGS(with_aux, has_aux=True, **TIGHT)

    def found(w0, p):
        state = solver.run(w0, p, Y).state
        return outer(state.aux) + state.value

    def exact(p):
        w = ridge_solution(p, Y)
        return outer(w * p) + ridge(w, p, Y)

    by_start, by_p = jax.jit(jax.grad(found, argnums=(0, 1)))(W0, P)
    np.testing.assert_allclose(by_p, jax.grad(exact)(P), rtol=1e-6)
    assert not jnp.any(by_start)


def test_aux_may_be_anything():
    solver = LBFGS(lambda w: (jnp.sum((w - 1) ** 2), {"w": w, "name": "loss"}), has_aux=True)
    state = solver.init_state(W0)
    assert state.aux["name"] == "loss"
    np.testing.assert_array_equal(state.aux["w"], W0)
    w, state = solver.update(W0, state)
    np.testing.assert_array_equal(state.aux["w"], w)
    w, state = solver.run(W0)
    np.testing.assert_array_equal(state.aux["w"], w)


@pytest.mark.parametrize("as_function", [False, True])
def test_a_gradient_of_the_users_own(as_function):
    fun, given = (ridge, ridge_with_gradient) if as_function else (ridge_with_gradient, True)
    solver = LBFGS(fun, value_and_grad=given, **TIGHT)
    assert relative_error(hypergradient(solver), EXACT) < 1e-6


def test_a_gradient_of_the_users_own_is_the_one_used():
    doubled = lambda w: (jnp.sum((w - 1) ** 2), 4 * (w - 1))
    solver = LBFGS(doubled, value_and_grad=True)
    np.testing.assert_array_equal(solver.init_state(W0).grad, -4 * jnp.ones(3))
    np.testing.assert_array_equal(solver.optimality_fun(W0), -4 * jnp.ones(3))


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
        solver = LBFGS(fun, value_and_grad=own_gradient, **TIGHT)
        return outer(solver.run(W0).params)

    assert relative_error(jax.jit(jax.grad(loss, argnums=(0, 1)))(P, Y), EXACT) < 1e-6


def test_a_solve_that_did_not_converge_has_the_derivative_nan():
    solver = LBFGS(ridge, tol=1e-9, maxiter=1)

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
    solver = LBFGS(ridge, tol=1e-9, maxiter=1, implicit_diff_solve=approximate)
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
        relative_error(hypergradient(LBFGS(ridge, **TIGHT, implicit_diff_solve=solve)), EXACT)
        < 1e-6
    )
    assert set(calls) == {(3,)}
    wrong = LBFGS(ridge, **TIGHT, implicit_diff_solve=lambda matvec, b: 1.01 * solve(matvec, b))
    assert all(jnp.all(jnp.isnan(leaf)) for leaf in hypergradient(wrong))
    assert make_adjoint(None) == dl.ImplicitAdjoint()
    assert make_adjoint(lx.LU()) == dl.ImplicitAdjoint(linear_solver=lx.LU())


@pytest.mark.parametrize("linesearch", ["zoom", "backtracking"])
@pytest.mark.parametrize("unroll", ["auto", True, False])
def test_iterates_are_not_differentiated_in_silence(linesearch, unroll):
    solver = LBFGS(ridge, tol=1e-4, implicit_diff=False, linesearch=linesearch, unroll=unroll)
    np.testing.assert_allclose(solver.run(W0, P, y=Y).params, ridge_solution(P, Y), atol=1e-3)
    with pytest.raises(NotImplementedError, match=r"implicit_diff=False.*=True.*Unrolled"):
        hypergradient(solver)


def test_every_way_to_differentiate_iterates_raises():
    solver = LBFGS(ridge, tol=1e-4, implicit_diff=False)
    state = solver.init_state(W0, P, y=Y)
    inner = lambda p: LBFGS(lambda w: ridge(w, p, Y), implicit_diff=False).run(W0)
    for wrong in (
        lambda p: outer(solver.run(W0 + p, P, y=Y).params),
        lambda p: outer(inner(p).params),
        lambda p: inner(p).state.value,
        lambda p: outer(solver.update(W0, state, p, y=Y).params),
        lambda p: solver.init_state(W0, p, y=Y).value,
    ):
        with pytest.raises(NotImplementedError, match="update"):
            jax.grad(wrong)(P)
        with pytest.raises(NotImplementedError, match="update"):
            jax.jvp(jax.jit(wrong), (P,), (P,))
    # Where nothing of it is asked for, it may be used.
    assert jnp.isfinite(jax.grad(lambda p: p * outer(solver.run(W0, P, y=Y).params))(P))


def test_jit_changes_nothing_and_says_so_where_fun_is_not_jax():
    compiled, eager = (LBFGS(ridge, tol=1e-6, jit=jit).run(W0, P, y=Y) for jit in (True, False))
    np.testing.assert_array_equal(compiled.params, eager.params)
    outside = lambda w: np.sum(np.asarray(w) ** 2)
    with pytest.raises(TypeError, match=r"jit=False.*<lambda>.*jax\.pure_callback"):
        LBFGS(outside, jit=False).run(W0)
    with pytest.raises(jax.errors.TracerArrayConversionError):
        LBFGS(outside).run(W0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"linesearch": "hager-zhang"},
        {"linesearch": "backtracking"},
        {"linesearch_init": "max"},
        {"stop_if_linesearch_fails": True},
        {"maxls": 15, "increase_factor": 2.0, "max_stepsize": 10.0, "min_stepsize": 0.1},
        {"unroll": True},
        {"stepsize": np.float64(-1.0), "maxiter": np.int64(500), "history_size": np.int32(10)},
        {"maxiter": jnp.asarray(500), "maxls": np.int64(3), "verbose": np.int64(0)},
    ],
)
def test_arguments_without_effect_on_the_solve(arguments):
    wanted, found = (LBFGS(ridge, tol=1e-6, **some).run(W0, P, y=Y) for some in ({}, arguments))
    np.testing.assert_array_equal(wanted.params, found.params)
    assert wanted.state.num_fun_eval == found.state.num_fun_eval


def test_warm_starts():
    for solver in (LBFGS(ridge, tol=1e-6), LBFGS(ridge, **TIGHT, implicit_diff=False)):
        cold = solver.run(W0, P, y=Y)
        again = solver.run(cold, P, y=Y)
        assert again.state.iter_num == cold.state.iter_num
        np.testing.assert_allclose(again.params, cold.params, rtol=tolerance(float, 10))
        moved = solver.run(cold, P + 1e-3, y=Y)
        np.testing.assert_allclose(moved.params, ridge_solution(P + 1e-3, Y), atol=1e-5)
        assert moved.state.iter_num - cold.state.iter_num < cold.state.iter_num
    state = solver.init_state(cold, P, y=Y)
    np.testing.assert_array_equal(state.s_history, cold.state.s_history)
    np.testing.assert_array_equal(state.rho_history, cold.state.rho_history)
    assert state.iter_num == cold.state.iter_num


def test_maxiter_zero_stays():
    w, state = LBFGS(ridge, maxiter=0).run(W0, P, y=Y)
    np.testing.assert_array_equal(w, W0)
    assert state.iter_num == 0
    assert not jnp.any(state.s_history)
    assert not jnp.any(state.rho_history)


def test_complex_trees():
    def fun(tree, a):
        z, r = tree["z"], tree["r"][0]
        return jnp.sum(jnp.abs(z - a) ** 2) + 0.5 * jnp.abs(z[0] * 1j + r[1]) ** 2 + jnp.sum(r**2)

    start = {"z": jnp.zeros(2, complex), "r": [jnp.ones(2)]}
    a = jnp.asarray([1 + 2j, -1j])
    solver = LBFGS(fun, tol=1e-7)
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

    for variable, value in ((jnp.float32, jnp.float64), (jnp.float16, jnp.bfloat16)):
        solver = LBFGS(lambda x, value=value: fun(x, value), maxiter=2)
        x, state = solver.run(jnp.zeros(2, variable))
        assert x.dtype == variable
        assert state.value.dtype == value
        names = ("error", "grad", "s_history", "y_history", "rho_history", "gamma", "stepsize")
        assert {getattr(state, name).dtype for name in names} == {jnp.dtype(variable)}
        assert state.iter_num.dtype == jnp.asarray(0).dtype


def test_batches():
    penalties = jnp.asarray([0.1, 2.5])

    def found(p):
        w, state = LBFGS(ridge, **TIGHT).run(W0, p, y=Y)
        return outer(w), state

    gradients, states = jax.jit(jax.vmap(jax.grad(found, has_aux=True)))(penalties)
    exact = jax.vmap(jax.grad(lambda p: outer(ridge_solution(p, Y))))(penalties)
    np.testing.assert_allclose(gradients, exact, rtol=1e-6)
    assert states.s_history.shape == (2, 10, 3)
    assert states.iter_num[0] != states.iter_num[1]  # each lane stops when it has converged
    assert jnp.all(states.error <= 1e-8)


def test_verbose_prints_every_step(capfd):
    _, state = LBFGS(ridge, **TIGHT, verbose=True).run(W0, P, y=Y)
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
        ({"stepsize": 0.1}, ValueError, ["stepsize", "0.1", "line search", "Unrolled(optax.sgd"]),
        ({"stepsize": ridge}, ValueError, ["stepsize", "ridge", "line search", "Unrolled"]),
        ({"linesearch": "wolfe"}, ValueError, ["linesearch", "'wolfe'", "'zoom'", "hager-zhang"]),
        ({"linesearch_init": "one"}, ValueError, ["linesearch_init", "'one'", "'increase'"]),
        ({"maxls": 0}, ValueError, ["maxls", "0", "at least 1"]),
        ({"max_stepsize": 0.0}, ValueError, ["max_stepsize", "0.0", "positive"]),
        ({"max_stepsize": 0.5}, ValueError, ["max_stepsize", "0.5", "at least 1", "Drop it"]),
        ({"increase_factor": "x"}, TypeError, ["increase_factor", "'x'", "1.0"]),
        ({"history_size": 2.0}, TypeError, ["history_size", "2.0", "integer"]),
        ({"history_size": 0}, ValueError, ["history_size", "0", "at least 1"]),
        ({"history_size": 0, "stepsize": 0.1}, ValueError, ["history_size", "at least 1"]),
        ({"use_gamma": False}, ValueError, ["use_gamma", "False", "Drop it"]),
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


def test_traced_counts_are_refused():
    with pytest.raises(TypeError, match=r"maxiter must be an integer, got .* a Python integer"):
        jax.jit(lambda n: LBFGS(ridge, maxiter=n).run(W0, P, Y))(3)


@pytest.mark.parametrize("name", ["init_state", "update"])
def test_a_subclass_may_not_change_the_steps(name):
    with pytest.raises(TypeError, match=rf"Clipped overrides {name}, got <function.*Write a loop"):
        type("Clipped", (LBFGS,), {name: lambda self, *args: args})
    named = type("Named", (LBFGS,), {"title": lambda self: "mine"})
    assert named(ridge).title() == "mine"


class TestBounds:
    """`LBFGSB`: what it has from `minimize(bounds=...)`, in JAXopt's terms."""

    @staticmethod
    def fun(x, theta, shift=0.0):
        return jnp.sum((x - theta) ** 2) / 2 + 0.3 * x[0] * x[1] + shift * jnp.sum(x)

    BOUNDS = (jnp.zeros(3), jnp.array([1.0, 2.0, jnp.inf]))
    THETA = jnp.array([-1.0, 5.0, 0.7])

    def test_solves_and_differentiates(self):
        def params(theta, bounds):
            return LBFGSB(self.fun, tol=1e-9).run(jnp.ones(3), bounds, theta, shift=0.1).params

        found = params(self.THETA, self.BOUNDS)
        np.testing.assert_allclose(found, [0, 2, 0.6], atol=1e-9)
        by_theta, (by_lower, by_upper) = jax.jacrev(params, (0, 1))(self.THETA, self.BOUNDS)
        np.testing.assert_allclose(by_theta, np.diag([0, 0, 1]), atol=1e-9)
        np.testing.assert_allclose(by_lower, np.diag([1, 0, 0]), atol=1e-9)
        np.testing.assert_allclose(by_upper, np.diag([0, 1, 0]), atol=1e-9)

    def test_has_jaxopts_arguments_and_goes_on(self):
        found = {
            name: parameter.default
            for name, parameter in inspect.signature(LBFGSB).parameters.items()
        }
        assert found == ARGUMENTS | {"history_size": 20}
        cold = LBFGSB(self.fun, tol=1e-9).run(jnp.ones(3), self.BOUNDS, self.THETA)
        assert cold.state.error <= 1e-9
        warm = LBFGSB(self.fun, tol=1e-9).run(cold, self.BOUNDS, self.THETA)
        np.testing.assert_allclose(warm.params, cold.params, atol=1e-9)
        assert warm.state.num_fun_eval <= cold.state.num_fun_eval

    def test_weakly_active_is_nan_and_steps_are_not_offered(self):
        tie = jnp.array([0.6, 5.0, 0.7])  # the multiplier of the first variable vanishes
        jacobian = jax.jacrev(
            lambda theta: LBFGSB(self.fun, tol=1e-9).run(jnp.ones(3), self.BOUNDS, theta).params
        )(tie)
        assert jnp.isnan(jacobian).any()
        assert not hasattr(LBFGSB(self.fun), "update")
        with pytest.raises(ValueError, match="lower <= upper"):
            LBFGSB(self.fun).run(jnp.ones(3), (1.0, 0.0), self.THETA)
