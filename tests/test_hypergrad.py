"""`value_and_hypergrad`: right, and right about how right it is."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import difflbfgs as dl
from problems import (
    THETA,
    outer,
    quadratic,
    relative_error,
    ridge,
    ridge_solution,
    tolerance,
)

RESULTS = dl.RESULTS


def outer_loss(w, theta):
    return outer(w) + jnp.sum(theta**3)


def exact(theta):
    return outer_loss(ridge_solution(theta), theta)


STEP = dl.value_and_hypergrad(outer_loss, ridge)
JITTED = jax.jit(STEP)
ZERO = jnp.zeros(5)


@pytest.mark.parametrize("step", [STEP, JITTED], ids=["eager", "jit"])
def test_value_and_gradient_are_exact(step):
    value, grad, info = step(THETA, ZERO)
    assert relative_error(value, exact(THETA)) < tolerance(jnp.float64, 100)
    assert relative_error(grad, jax.grad(exact)(THETA)) < tolerance(jnp.float64, 100)
    assert info.result == RESULTS.successful
    assert relative_error(info.solution.value, ridge_solution(THETA)) < 1e-12


def test_a_custom_vjp_does_no_harm():
    @jax.custom_vjp
    def square(w):
        return w**2

    square.defvjp(lambda w: (w**2, w), lambda w, g: (2 * w * g,))

    def inner(w, theta):
        return ridge(w, theta) + jnp.sum(square(w)) - jnp.sum(w**2)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def both(theta):
        value, grad, _ = dl.value_and_hypergrad(outer_loss, inner)(theta, ZERO)
        return value, grad

    for grad in both(THETA):
        assert relative_error(grad, jax.grad(exact)(THETA)) < tolerance(jnp.float64, 100)


def test_the_forward_adjoint_does_here_what_the_other_does():
    def program(adjoint):
        step = dl.value_and_hypergrad(outer_loss, ridge, adjoint=adjoint)
        return re.sub(r"0x\w+", "", str(jax.make_jaxpr(step)(THETA, ZERO)))

    forward = program(dl.ForwardImplicitAdjoint(rtol=1e-3))
    assert forward.replace("Forward", "") == program(dl.ImplicitAdjoint(rtol=1e-3))


def test_what_is_printed_are_the_numbers():
    _, _, info = JITTED(THETA, ZERO)
    assert f"error_estimate={info.error_estimate!r}" in repr(info)
    stats = info.solution.stats
    assert f"num_steps={stats.num_steps!r}" in repr(stats)


def test_it_is_the_gradient_of_minimize():
    def loss(theta):
        return outer_loss(dl.minimize(ridge, ZERO, theta).value, theta)

    _, grad, _ = STEP(THETA, ZERO)
    assert relative_error(grad, jax.grad(loss)(THETA)) < tolerance(jnp.float64, 10)


def test_vmap_equals_one_by_one():
    thetas = jnp.stack([THETA, 2 * THETA, THETA - 1])
    values, grads, infos = jax.vmap(STEP, in_axes=(0, None))(thetas, ZERO)
    for i, theta in enumerate(thetas):
        value, grad, info = JITTED(theta, ZERO)
        assert relative_error(values[i], value) < 1e-12
        assert relative_error(grads[i], grad) < 1e-12
        assert infos.num_adjoint_steps[i] == info.num_adjoint_steps
    warm = jax.vmap(STEP, in_axes=(0, None, 0))(thetas, ZERO, infos.state)
    assert relative_error(warm[1], grads) < 1e-12
    assert jnp.all(warm[2].solution.stats.num_steps == 0)


def test_curvatures_are_the_extreme_eigenvalues():
    _, _, info = JITTED(THETA, ZERO)
    values = jnp.linalg.eigvalsh(jax.hessian(ridge)(ridge_solution(THETA), THETA))
    assert relative_error(info.min_curvature, values[0]) < 1e-10
    assert relative_error(info.max_curvature, values[-1]) < 1e-10
    # The one factorisation serves the adjoint and the estimate.
    assert (info.num_adjoint_steps, info.num_estimate_steps) == (5, 0)


# A hundred variables: beyond the dense factorisation, so that conjugate gradients run.
LARGE, LARGE_SOLUTION, LARGE_THETA = quadratic(1e2, n=100)
WEIGHTS = jnp.sin(jnp.arange(100.0))


def large_outer(x, theta):
    return jnp.sum(jnp.tanh(x) * WEIGHTS) + jnp.sum(theta**2)


@eqx.filter_jit
def large(theta, rtol, adjoint=dl.ImplicitAdjoint(), state=None):
    solver = dl.LBFGS(rtol=rtol)
    return dl.value_and_hypergrad(large_outer, LARGE, solver=solver, adjoint=adjoint)(
        theta, jnp.zeros(100), state
    )


LARGE_EXACT = jax.grad(lambda t: large_outer(LARGE_SOLUTION(t), t))(LARGE_THETA)


def test_ritz_values_lie_in_the_spectrum_and_near_its_ends():
    _, _, info = large(LARGE_THETA, 1e-6)
    x = info.solution.value
    values = jnp.linalg.eigvalsh(jax.hessian(LARGE)(x, LARGE_THETA))
    assert values[0] * (1 - 1e-9) <= info.min_curvature < 1.5 * values[0]
    assert 0.9 * values[-1] < info.max_curvature <= values[-1] * (1 + 1e-9)


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4, 1e-6])
def test_error_estimate_is_the_error(rtol):
    _, grad, info = large(LARGE_THETA, rtol)
    error = jnp.linalg.norm(grad - LARGE_EXACT)
    assert error > 1e-12 * jnp.linalg.norm(LARGE_EXACT)
    assert error / 3 < info.error_estimate < 3 * error


def test_error_estimate_at_rounding_is_not_below_it():
    _, grad, info = JITTED(THETA, ZERO)
    error = jnp.linalg.norm(grad - jax.grad(exact)(THETA))
    assert info.error_estimate >= error / 3
    assert 0 < info.error_estimate < 1e-13 * jnp.linalg.norm(grad)


def test_error_estimate_in_float32():
    theta = THETA.astype(jnp.float32)
    step = dl.value_and_hypergrad(outer_loss, ridge, solver=dl.LBFGS(rtol=0.1, polish=0))
    _, grad, info = step(theta, jnp.zeros(5, jnp.float32))
    assert grad.dtype == jnp.float32
    error = jnp.linalg.norm(grad - jax.grad(exact)(THETA))
    assert error / 3 < info.error_estimate < 3 * error


def test_a_ridge_is_part_of_the_error():
    adjoint = dl.ImplicitAdjoint(ridge=0.1)
    _, grad, info = dl.value_and_hypergrad(outer_loss, ridge, adjoint=adjoint)(THETA, ZERO)
    error = jnp.linalg.norm(grad - jax.grad(exact)(THETA))
    assert error > 1e-3
    assert relative_error(info.error_estimate, error) < 1e-6
    assert info.adjoint_residual < 1e-12


def test_residual_of_a_foreign_solver_is_recomputed():
    """lineax.CG stops far from the solution and calls it successful."""
    adjoint = dl.ImplicitAdjoint(linear_solver=lx.CG(1e-2, 1e-2), rtol=0.5)
    _, grad, info = large(LARGE_THETA, 1e-6, adjoint)
    error = jnp.linalg.norm(grad - LARGE_EXACT)
    assert info.adjoint_residual > 1e-3
    assert error / 3 < info.error_estimate < 3 * error


def test_the_adjoint_follows_the_forward_solve():
    """Solving it further than the forward solve went would be a waste."""
    loose, tight = (large(LARGE_THETA, rtol) for rtol in (1e-2, 1e-8))
    assert loose[2].num_adjoint_steps < 0.65 * tight[2].num_adjoint_steps
    told = large(LARGE_THETA, 1e-2, dl.ImplicitAdjoint(rtol=1e-10))
    assert told[2].num_adjoint_steps > loose[2].num_adjoint_steps
    assert told[2].adjoint_residual < 1e-10
    # Half as many products, and the error is that of the forward solve either way.
    errors = [jnp.linalg.norm(grad - LARGE_EXACT) for _, grad, _ in (loose, told)]
    assert errors[0] < 1.5 * errors[1]


def test_what_is_not_converged_has_no_estimate():
    step = dl.value_and_hypergrad(outer_loss, ridge, max_steps=1, throw=False)
    _, grad, info = step(THETA, ZERO)
    assert info.result == RESULTS.max_steps_reached
    assert jnp.all(jnp.isnan(grad))
    assert jnp.isinf(info.error_estimate)


def double_well(x, theta):
    return jnp.sum((x**2 - theta) ** 2)


def test_a_saddle_has_no_estimate():
    step = dl.value_and_hypergrad(lambda x, theta: jnp.sum(x), double_well, throw=False)
    _, grad, info = step(jnp.ones(2), jnp.zeros(2))
    assert info.result == RESULTS.indefinite_hessian
    assert info.min_curvature < 0
    assert jnp.all(jnp.isnan(grad))
    assert jnp.isinf(info.error_estimate)


@pytest.mark.parametrize("n", [2, 100])
def test_a_saddle_is_refused_a_second_time(n):
    """The adjoint handed on solves the system, and still says what it is."""
    step = dl.value_and_hypergrad(
        lambda x, t: jnp.sum(x), lambda x, t: jnp.sum((x**2 - t) ** 2), throw=False
    )
    state = None
    for _ in range(2):
        _, grad, info = step(2.0, jnp.zeros(n), state)
        state = info.state
        assert info.result == dl.RESULTS.indefinite_hessian
        assert info.min_curvature < 0
        assert jnp.isnan(grad)


def test_far_from_the_minimizer_there_is_no_estimate():
    """A Newton step that does not shrink the gradient shows that the theory does not apply."""

    def funnel(x, theta):  # beyond a distance of 1, Newton's method goes further away
        return jnp.sum(jnp.sqrt(1 + (x - theta) ** 2))

    solver = dl.LBFGS(atol=10.0, polish=0)  # which stops where it starts
    step = dl.value_and_hypergrad(lambda x, theta: jnp.sum(x**2), funnel, solver=solver)
    _, grad, info = jax.vmap(step, in_axes=(0, None))(jnp.asarray([0.2, 2.0]), jnp.zeros(1))
    assert jnp.all(info.solution.result == RESULTS.successful)
    assert list(info.result == RESULTS.successful) == [True, False]
    assert list(info.result == RESULTS.uncertified) == [False, True]
    assert jnp.all(jnp.isfinite(grad))
    assert jnp.array_equal(jnp.isinf(info.error_estimate), jnp.asarray([False, True]))


def test_approximate_gradients_are_estimated_near_the_minimizer():
    adjoint = dl.ImplicitAdjoint(approximate=True)
    step = dl.value_and_hypergrad(outer_loss, ridge, adjoint=adjoint, max_steps=4, throw=False)
    _, grad, info = step(THETA, ZERO)
    error = jnp.linalg.norm(grad - jax.grad(exact)(THETA))
    assert info.result == RESULTS.max_steps_reached
    assert error / 3 < info.error_estimate < 3 * error


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 1}, "maximum number of solver steps"),
        (
            {"adjoint": dl.ImplicitAdjoint(linear_solver=lx.CG(0.9, 0.9), rtol=1e-12)},
            "adjoint system H u = v was not solved",
        ),
    ],
    ids=["solve", "adjoint"],
)
def test_throw_raises_for_the_solve_and_for_the_adjoint(wrap, settings, message):
    step = dl.value_and_hypergrad(outer_loss, ridge, **settings)
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(wrap(step)(THETA, ZERO)[1])


def test_a_failed_adjoint_has_a_code():
    adjoint = dl.ImplicitAdjoint(linear_solver=lx.CG(0.9, 0.9), rtol=1e-12)
    step = dl.value_and_hypergrad(outer_loss, ridge, adjoint=adjoint, throw=False)
    _, grad, info = step(THETA, ZERO)
    assert info.result == RESULTS.adjoint_not_converged
    assert info.solution.converged
    assert jnp.all(jnp.isnan(grad))
    assert jnp.isinf(info.error_estimate)


def test_warm_start_saves_work_and_changes_nothing():
    _, _, info = large(LARGE_THETA, 1e-8)
    near = LARGE_THETA + 1e-4
    cold, warm = large(near, 1e-8), large(near, 1e-8, state=info.state)
    assert relative_error(warm[1], cold[1]) < 1e-8
    assert warm[2].solution.stats.num_fun_evals < 0.8 * cold[2].solution.stats.num_fun_evals
    assert warm[2].num_adjoint_steps < 0.8 * cold[2].num_adjoint_steps
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(info.state))


def test_a_bad_adjoint_in_the_state_does_no_harm():
    _, grad, info = large(LARGE_THETA, 1e-8)
    for bad in (jnp.nan, 1e30):
        state = eqx.tree_at(lambda s: s.adjoint, info.state, jnp.full(100, bad))
        _, again, _ = large(LARGE_THETA, 1e-8, state=state)
        assert relative_error(again, grad) < 1e-8


def test_a_failed_call_can_be_followed_by_a_warm_one():
    step = jax.jit(dl.value_and_hypergrad(outer_loss, ridge, throw=False))
    _, _, info = step(jnp.full(3, jnp.nan), ZERO)
    assert info.result == RESULTS.nonfinite_start
    _, grad, info = step(THETA, ZERO, info.state)
    assert info.result == RESULTS.successful
    assert relative_error(grad, jax.grad(exact)(THETA)) < 1e-10


def test_theta_may_be_anything():
    theta = {"mix": THETA, "power": 3, "name": "ridge", "f": jnp.tanh, "scale": 0.5, "none": None}

    def inner(w, theta):
        return ridge(w, theta["mix"]) + 0 * len(theta["name"])

    def loss(w, theta):
        return outer(theta["f"](w)) * theta["scale"] + jnp.sum(theta["mix"] ** theta["power"])

    _, grad, _ = dl.value_and_hypergrad(loss, inner)(theta, ZERO)
    found = jax.grad(lambda mix: loss(ridge_solution(mix), {**theta, "mix": mix}))(THETA)
    assert relative_error(grad["mix"], found) < 1e-10
    assert relative_error(grad["scale"], outer(jnp.tanh(ridge_solution(THETA)))) < 1e-10
    assert grad["power"] is grad["name"] is grad["f"] is grad["none"] is None


def test_an_equinox_module_goes_in_whole():
    class Linear(eqx.Module):
        w: jax.Array
        activation: str

    def inner(model, theta):
        return ridge(model.w, theta)

    start = Linear(ZERO, "none")
    _, grad, info = dl.value_and_hypergrad(lambda m, t: outer_loss(m.w, t), inner)(THETA, start)
    assert info.solution.value.activation == "none"
    assert relative_error(grad, jax.grad(exact)(THETA)) < 1e-10


def test_leaves_may_stay_leaves():
    def inner(x, theta):
        return ridge(jnp.concatenate(x), theta)

    start = [jnp.zeros(2), jnp.zeros(3)]
    step = dl.value_and_hypergrad(
        lambda x, t: outer_loss(jnp.concatenate(x), t), inner, solver=dl.LBFGS(flatten=False)
    )
    _, grad, info = step(THETA, start)
    _, again, _ = step(THETA, start, info.state)
    for found in (grad, again):
        assert relative_error(found, jax.grad(exact)(THETA)) < 1e-10


def test_complex_theta_follows_jax():
    def inner(x, theta):
        return jnp.sum((x - theta.real * jnp.arange(3.0)) ** 2) + theta.imag**2 * jnp.sum(x**2)

    def solution(theta):
        return theta.real * jnp.arange(3.0) / (1 + theta.imag**2)

    def loss(x, theta):
        return jnp.sum(jnp.sin(x)) + jnp.abs(theta) ** 2

    theta = jnp.asarray(0.7 - 0.3j)
    _, grad, info = dl.value_and_hypergrad(loss, inner)(theta, jnp.zeros(3))
    assert relative_error(grad, jax.grad(lambda t: loss(solution(t), t))(theta)) < 1e-10
    assert info.error_estimate < 1e-10


def test_an_outer_loss_of_theta_alone():
    step = dl.value_and_hypergrad(lambda w, theta: jnp.sum(theta**2), ridge)
    _, grad, info = step(THETA, ZERO)
    assert relative_error(grad, 2 * THETA) < 1e-14
    assert info.result == RESULTS.successful
    assert info.adjoint_residual == 0


def test_the_value_can_be_differentiated_and_the_gradient_says_that_it_cannot():
    found = jax.grad(lambda theta: STEP(theta, ZERO)[0])(THETA)
    assert relative_error(found, jax.grad(exact)(THETA)) < 1e-12
    assert jnp.all(jnp.isnan(jax.jacobian(lambda theta: STEP(theta, ZERO)[1])(THETA)))
    assert jnp.all(jnp.isnan(jax.hessian(lambda theta: STEP(theta, ZERO)[0])(THETA)))


def test_the_value_is_differentiable_by_what_the_functions_close_over():
    def by_closure(scale):
        step = dl.value_and_hypergrad(
            lambda w, theta: scale * outer(w), lambda w, theta: ridge(w, scale * theta)
        )
        return step(THETA, ZERO)[0]

    wanted = jax.grad(lambda scale: scale * outer(ridge_solution(scale * THETA)))(1.3)
    assert relative_error(jax.grad(by_closure)(1.3), wanted) < 1e-10


def test_a_loop_without_jit_compiles_once():
    step = dl.value_and_hypergrad(
        lambda w, penalty: jnp.sum(w), lambda w, p: ridge(w, THETA) + p * w @ w
    )
    step(0.5, ZERO)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("logging.Logger.warning", lambda *args: compiled.append(args))
        step(0.7, ZERO)
    assert not [args for args in compiled if "Compiling" in str(args) and "_compiled" in str(args)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dl.value_and_hypergrad(None, ridge), TypeError, "outer must be a function"),
        (lambda: dl.value_and_hypergrad(outer, 3), TypeError, "inner must be a function"),
        (
            lambda: dl.value_and_hypergrad(outer_loss, ridge, solver=dl.Unrolled(None, 3)),
            TypeError,
            "optimizer must be",
        ),
        (
            lambda: dl.value_and_hypergrad(outer_loss, ridge, solver="lbfgs"),
            TypeError,
            "solver must be",
        ),
        (lambda: STEP(3, ZERO), ValueError, "theta has nothing to differentiate by"),
        (lambda: STEP(THETA, jnp.zeros(5, int)), ValueError, "x0 has nothing to minimize over"),
        (
            lambda: STEP(THETA, ZERO, dl.minimize(ridge, ZERO, THETA).state),
            TypeError,
            "state must be the info.state",
        ),
        (
            lambda: dl.value_and_hypergrad(lambda w, t: w, ridge)(THETA, ZERO),
            ValueError,
            "outer must return a scalar",
        ),
        (
            lambda: dl.value_and_hypergrad(lambda w, t: (jnp.sum(w), w), ridge)(THETA, ZERO),
            TypeError,
            "Return the scalar alone",
        ),
        (
            lambda: dl.value_and_hypergrad(outer_loss, lambda w, t: None)(THETA, ZERO),
            TypeError,
            "inner must return a real scalar",
        ),
        (lambda: dl.QuasiNewtonAdjoint(refine=-1), ValueError, "refine must be at least 0"),
        (lambda: dl.QuasiNewtonAdjoint(refine=0.5), TypeError, "refine must be an integer"),
        (lambda: dl.inverse_hessian_operator(None), TypeError, "Pass solution.state"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_state_of_another_problem_is_refused():
    _, _, info = STEP(THETA, ZERO)
    with pytest.raises(ValueError, match="state belongs to another problem"):
        dl.value_and_hypergrad(lambda w, t: jnp.sum(w), double_well)(1.0, jnp.ones(2), info.state)


# The quasi-Newton adjoint and its operator.


def test_quasi_newton_adjoint_is_the_operator_in_place_of_the_inverse():
    adjoint = dl.QuasiNewtonAdjoint()
    _, grad, info = dl.value_and_hypergrad(outer_loss, ridge, adjoint=adjoint)(THETA, ZERO)
    w, P = info.solution.value, dl.inverse_hessian_operator(info.state)
    B = jax.jacobian(jax.grad(ridge), argnums=1)(w, THETA)
    wanted = jax.grad(outer_loss, 1)(w, THETA) - B.T @ P.mv(jax.grad(outer_loss)(w, THETA))
    assert relative_error(grad, wanted) < 1e-12
    assert info.num_adjoint_steps == 0
    error = jnp.linalg.norm(grad - jax.grad(exact)(THETA))
    assert 0.5 * error < info.error_estimate < 2 * error
    assert error > 1e-4
    same = jax.grad(lambda t: outer_loss(dl.minimize(ridge, ZERO, t, adjoint=adjoint).value, t))(
        THETA
    )
    assert relative_error(same, grad) < 1e-12


def test_refining_leads_to_the_exact_adjoint():
    errors = []
    for refine in (0, 2, 6):
        adjoint = dl.QuasiNewtonAdjoint(refine=refine)
        _, grad, info = dl.value_and_hypergrad(outer_loss, ridge, adjoint=adjoint)(THETA, ZERO)
        assert info.num_adjoint_steps == (refine + 1 if refine else 0)
        errors.append(relative_error(grad, jax.grad(exact)(THETA)))
    assert errors[2] < 1e-10 < 1e-2 * errors[1] < 1e-2 * errors[0]


def test_quasi_newton_adjoint_of_a_failed_solve_is_nan():
    adjoint = dl.QuasiNewtonAdjoint()

    def loss(theta):
        sol = dl.minimize(ridge, ZERO, theta, adjoint=adjoint, max_steps=1, throw=False)
        return jnp.sum(sol.value)

    assert jnp.all(jnp.isnan(jax.grad(loss)(THETA)))


@pytest.mark.parametrize("flatten", [True, False])
def test_inverse_hessian_operator_is_symmetric_positive_definite(flatten):
    solver = dl.LBFGS(flatten=flatten, polish=0)
    state = dl.minimize(ridge, ZERO, THETA, solver=solver).state
    P = dl.inverse_hessian_operator(state)
    matrix = P.as_matrix()
    assert lx.is_symmetric(P)
    assert lx.is_positive_semidefinite(P)
    assert jnp.max(jnp.abs(matrix - matrix.T)) < 1e-13 * jnp.max(jnp.abs(matrix))
    assert jnp.all(jnp.linalg.eigvalsh(matrix) > 0)
    v = jnp.arange(5.0) if flatten else [jnp.arange(5.0)]
    assert relative_error(P.mv(v), matrix @ jnp.arange(5.0)) < 1e-12
    # The secant equation of the newest pair, the one that Optax has not formed: P y = s.
    s = jax.tree.map(jnp.subtract, state.x, state.memory.params)
    y = jax.tree.map(jnp.subtract, state.g, state.memory.updates)
    assert relative_error(P.mv(y), s) < 1e-10


def test_inverse_hessian_operator_preconditions_and_batches():
    state = dl.minimize(ridge, ZERO, THETA).state
    P = dl.inverse_hessian_operator(state)
    H = jax.hessian(ridge)(ridge_solution(THETA), THETA)
    A = lx.MatrixLinearOperator(H, lx.positive_semidefinite_tag)
    b = jnp.arange(1.0, 6.0)
    found = lx.linear_solve(A, b, lx.CG(1e-12, 1e-12), options={"preconditioner": P}).value
    assert relative_error(found, np.linalg.solve(H, b)) < 1e-10
    states = jax.vmap(lambda t: dl.minimize(ridge, ZERO, t).state)(jnp.stack([THETA, 2 * THETA]))
    # The two solves round differently, and the last pairs are differences close to rounding.
    products = jax.vmap(lambda s: dl.inverse_hessian_operator(s).mv(b))(states)
    assert relative_error(products[0], P.mv(b)) < 1e-6
