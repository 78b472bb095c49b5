"""Known defects of the parts that we are built from, each with its remedy.

Kinks, NaN and unbounded objectives are in test_failures.py, dtypes and structures in
test_border.py.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import difflbfgs as dl
from difflbfgs import _lanes
from problems import THETA, quadratic, relative_error, ridge, tolerance

COMPILED = []


def listen(event, duration, **_):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(duration)


jax.monitoring.register_event_duration_secs_listener(listen)


def wavy(x, _):
    return jnp.sum(jnp.cos(x) + 0.01 * x**2)


WAVY_START = jnp.asarray([0.3, -0.2, 0.1])


def raw_optax_weights(steps):
    """Return the memory weights of a plain Optax loop with backtracking on `wavy`."""
    optimizer = optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(20))

    def step(carry, _):
        x, state = carry
        value, grad = jax.value_and_grad(wavy)(x, None)
        updates, state = optimizer.update(
            grad, state, x, value=value, grad=grad, value_fn=lambda x: wavy(x, None)
        )
        return (optax.apply_updates(x, updates), state), jnp.min(state[0].weights_memory)

    return jax.lax.scan(step, (WAVY_START, optimizer.init(WAVY_START)), length=steps)[1]


def test_no_pair_of_negative_curvature_is_kept():
    assert jnp.min(raw_optax_weights(5)) < 0
    solver = dl.LBFGS(linesearch=optax.scale_by_backtracking_linesearch(20))
    objectives = []
    sol = dl.minimize(
        wavy, WAVY_START, solver=solver, callback=lambda s: objectives.append(float(s.objective))
    )
    jax.effects_barrier()
    assert sol.result == dl.RESULTS.successful
    assert jnp.all(sol.state.memory.weights_memory >= 0)
    # One of the minima, none of the maxima between them.
    assert jnp.allclose(jnp.sin(sol.value), 0.02 * sol.value, atol=1e-6)
    assert jnp.all(jnp.cos(sol.value) < 0)
    assert np.all(np.diff(objectives) <= 1e-14)


@pytest.mark.parametrize("steps", range(1, 8))
def test_no_pair_of_negative_curvature_is_kept_at_any_step(steps):
    solver = dl.LBFGS(linesearch=optax.scale_by_backtracking_linesearch(20))
    sol = dl.minimize(wavy, WAVY_START, solver=solver, max_steps=steps, throw=False)
    assert jnp.all(sol.state.memory.weights_memory >= 0)


def rosenbrock(x, _):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("fun", [rosenbrock, wavy], ids=["rosenbrock", "wavy"])
def test_the_objective_never_rises(fun, dtype):
    objectives = []
    x0 = jnp.asarray([-1.2, 1.0, -0.5, 0.8], dtype)
    dl.minimize(fun, x0, callback=lambda s: objectives.append(float(s.objective)))
    jax.effects_barrier()
    rises = np.diff(objectives) / np.abs(objectives[:-1])
    assert len(objectives) > 3
    assert np.all(rises <= 20 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, None])
def test_rosenbrock_has_no_false_convergence(rtol):
    x0 = jnp.asarray([-1.2, 1.0])
    for polish in (0, 1):
        sol = dl.minimize(rosenbrock, x0, solver=dl.LBFGS(rtol=rtol, polish=polish))
        assert jnp.allclose(sol.value, 1, atol=2e-2)
        error = sol.value - 1
        H = jax.hessian(rosenbrock)(sol.value, None)
        if polish:  # an error in the energy norm, relative to that of the minimizer
            assert error @ H @ error <= (rtol or 1.5e-8) ** 2 * jnp.sum(H)
        else:
            assert sol.stats.grad_norm <= (rtol or 1.5e-8) * sol.stats.reference_grad_norm


@pytest.mark.parametrize("polish", [0, 1])
def test_scaling_the_objective_changes_nothing(polish):
    fun, _, theta = quadratic(1e2)
    solver = dl.LBFGS(polish=polish)
    solve = jax.jit(
        lambda c: dl.minimize(lambda x, t: c * fun(x, t), jnp.ones(20), theta, solver=solver)
    )
    reference = solve(1.0)
    for c in (2.0**-40, 2.0**-20, 2.0**27):  # these do not even change roundings
        sol = solve(c)
        assert sol.stats.num_fun_evals == reference.stats.num_fun_evals
        assert jnp.array_equal(sol.value, reference.value)
    for c in (1e-12, 1e-6, 1e8):
        sol = solve(c)
        difference = abs(sol.stats.num_fun_evals - reference.stats.num_fun_evals)
        assert difference <= 0.1 * reference.stats.num_fun_evals
        assert relative_error(sol.value, reference.value) < (1e-6 if polish == 0 else 1e-12)


def test_scaling_the_variables_changes_the_path_only_at_its_end():
    def fun(x, size):
        return rosenbrock(x / size, None)

    solve = jax.jit(
        lambda size: dl.minimize(fun, jnp.asarray([-1.2, 1.0]) * size, size, throw=False)
    )
    reference = solve(1.0)
    for size in (1e-6, 1e-3, 1e3, 1e6):
        sol = solve(size)
        assert sol.result == dl.RESULTS.successful
        assert relative_error(sol.value / size, jnp.ones(2)) < 1e-10
        # The length in the gradient test is at most 1: larger variables are asked for more.
        longer = sol.stats.num_fun_evals - reference.stats.num_fun_evals
        assert abs(longer) <= 2 if size < 1 else 0 <= longer + 2 <= 8


def test_a_far_start_does_not_loosen_the_test():
    def fun(x, theta):
        return 0.5 * jnp.sum(jnp.asarray([1.0, 3.0, 10.0]) * (x - theta) ** 2)

    for start in (1e4, 1e10):
        sol = dl.minimize(fun, jnp.full(3, start), 1.0, solver=dl.LBFGS(polish=0))
        assert relative_error(sol.value, jnp.ones(3)) < 1e-6


def test_a_start_next_to_the_minimum_is_not_out_of_reach():
    """It costs less than one far away; how much at rounding level depends on the processor."""
    fun, solution, theta = quadratic(1e2)

    def solve(distance):
        return dl.minimize(fun, solution(theta) + distance, theta, solver=dl.LBFGS(polish=0))

    far = solve(1.0).stats.num_fun_evals
    for distance in (1e-12, 1e-9, 1e-6):
        sol = solve(distance)
        assert sol.converged
        assert sol.stats.num_fun_evals < far


def test_a_solve_without_jit_compiles_once():
    def fun(x, theta):
        return jnp.sum((x - theta) ** 4 + x**2)

    def solve(theta):
        return dl.minimize(fun, jnp.zeros(7), theta).value

    solve(jnp.full(7, 5.0))
    COMPILED.clear()
    for i in range(3):
        solve(jnp.full(7, 1.0 + i))
    assert not COMPILED
    jax.jit(lambda x: x * 3.21)(1.0)
    assert len(COMPILED) == 1


def test_a_changed_global_is_seen_without_jit():
    scale = 1.0

    def fun(x, theta):
        return scale * jnp.sum((x - theta) ** 2) + jnp.sum(x**2)

    first = dl.minimize(fun, jnp.zeros(2), 1.0).value
    scale = 3.0
    second = dl.minimize(fun, jnp.zeros(2), 1.0).value
    assert jnp.allclose(first, 0.5)
    assert jnp.allclose(second, 0.75)


def test_a_lane_costs_under_vmap_what_it_costs_alone():
    thetas = jnp.stack([THETA, 3 * THETA, THETA - 2])

    def evaluations(theta):
        return dl.minimize(ridge, jnp.zeros(5), theta).stats.num_fun_evals

    alone = [int(evaluations(theta)) for theta in thetas]
    one_lane = jax.vmap(evaluations)(thetas[:1])
    assert list(jax.vmap(evaluations)(thetas)) == alone
    assert int(one_lane[0]) == alone[0]


@pytest.fixture(params=["in turn", "at once"])
def batching(request, monkeypatch):
    """Run the test with the lanes in turn, as on a CPU, and at once, as on an accelerator."""
    if request.param == "at once":
        monkeypatch.setattr(_lanes, "by_platform", lambda *args, cpu, default: default(*args))
    return request.param


def test_lanes_evaluate_as_often_as_they_say(batching):
    calls = []

    def fun(x, theta):
        jax.debug.callback(lambda _: calls.append(1), x[0])
        return jnp.sum(jnp.cosh(theta * (x - 1))) + rosenbrock(x, None)

    thetas = jnp.asarray([0.3, 1.0, 3.0, 6.0])

    def counts(theta):
        stats = dl.minimize(fun, jnp.zeros(2), theta).stats
        return stats.num_fun_evals + stats.num_hvps  # a product evaluates the objective again

    said = jax.jit(jax.vmap(counts))(thetas)
    jax.effects_barrier()
    if batching == "in turn":
        assert len(calls) == int(jnp.sum(said))
    else:
        assert len(calls) > int(jnp.sum(said))  # the test sees what it is to see


def test_lanes_agree_however_they_run(batching):
    thetas = jnp.stack([THETA, 3 * THETA, THETA - 2])

    def loss(theta):
        return jnp.sum(jnp.sin(dl.minimize(ridge, jnp.zeros(5), theta).value))

    found = jax.jit(jax.vmap(jax.grad(loss)))(thetas)
    nested = jax.jit(jax.vmap(jax.vmap(jax.grad(loss))))(thetas[None])[0]
    alone = jnp.stack([jax.grad(loss)(theta) for theta in thetas])
    assert relative_error(found, alone) < 1e-12
    assert relative_error(nested, alone) < 1e-12


def flat_stretch(x, theta):
    """Steep along x₁; along x₀ a valley so wide that the gradient there passes for nothing."""
    return 50 * x[1] ** 2 + jnp.sqrt(1 + (x[0] - theta) ** 2)


def concave_stretch(x, theta):
    """Steep along x₁; along x₀ the shoulder of a bell, where the Hessian is indefinite."""
    return 50 * x[1] ** 2 - jnp.exp(-((x[0] - theta) ** 2) / 2)


STRETCHES = [flat_stretch, concave_stretch]
BESIDE = jnp.asarray([3.0, 1.0])
LOOSE = dl.LBFGS(rtol=0.03)


@pytest.mark.parametrize("fun", STRETCHES)
def test_a_newton_step_that_fails_says_that_the_minimum_is_not_near(fun):
    def solve(solver):
        return dl.minimize(fun, BESIDE, 0.5, solver=solver).value

    assert solve(dl.LBFGS(rtol=LOOSE.rtol, polish=0))[0] > 2.9  # which is what was asked for
    assert jnp.linalg.norm(solve(LOOSE) - jnp.asarray([0.5, 0])) < 1e-4


@pytest.mark.parametrize("fun", STRETCHES)
def test_a_solve_that_goes_on_is_watched_and_does_not_rise(fun):
    steps = []
    dl.minimize(fun, BESIDE, 0.5, solver=LOOSE, callback=steps.append)
    jax.effects_barrier()
    counts = [int(step.num_steps) for step in steps]
    assert counts[:-1] == list(range(1, len(steps)))
    assert counts[-1] in (len(steps) - 1, len(steps))  # to see that it is over may take no step
    assert [bool(step.last) for step in steps] == [False] * (len(steps) - 1) + [True]
    objectives = jnp.stack([fun(BESIDE, 0.5), *(step.objective for step in steps)])
    assert jnp.all(jnp.diff(objectives) <= tolerance(jnp.float64, 10) * jnp.abs(objectives[1:]))


def test_lanes_go_on_as_they_do_alone(batching):
    thetas = jnp.asarray([0.5, 2.9, -0.3])

    def solve(theta):
        sol = dl.minimize(flat_stretch, BESIDE, theta, solver=LOOSE)
        return sol.value[0], sol.stats.num_fun_evals

    values, counts = jax.jit(jax.vmap(solve))(thetas)
    assert jnp.max(jnp.abs(values - thetas)) < 1e-3
    assert list(counts) == [solve(theta)[1] for theta in thetas]


@pytest.mark.parametrize("fun", STRETCHES)
def test_a_solve_that_goes_on_ends_truly_when_it_runs_out_of_steps(fun):
    seen = set()
    for max_steps in (1, 3, 6, 30):
        sol = dl.minimize(fun, BESIDE, 0.5, solver=LOOSE, max_steps=max_steps, throw=False)
        near = jnp.linalg.norm(sol.value - jnp.asarray([0.5, 0])) < LOOSE.rtol
        success = sol.result == dl.RESULTS.successful
        assert near or not success
        assert success or sol.result == dl.RESULTS.max_steps_reached
        assert sol.stats.num_steps <= max_steps
        assert sol.objective <= fun(BESIDE, 0.5)
        seen.add(bool(success))
    assert seen == {True, False}


def test_going_on_costs_no_more_than_the_default_tolerance():
    """Newton's method converges linearly to this minimizer, and no step is ever good enough."""

    def quartic(x, theta):
        return 50 * x[1] ** 2 + (x[0] - theta) ** 4

    def stats(rtol):
        return dl.minimize(quartic, BESIDE, 0.5, solver=dl.LBFGS(rtol=rtol)).stats

    loose, default = stats(0.03), stats(None)
    assert loose.num_fun_evals <= default.num_fun_evals
    assert loose.num_hvps <= default.num_hvps


@pytest.mark.parametrize("batching", ["at once"], indirect=True)
@pytest.mark.parametrize("polish", [0, 1])
def test_the_memory_of_lanes_is_not_copied_at_every_step(batching, polish):
    lanes, pairs, n = 5, 7, 37
    solver = dl.LBFGS(polish=polish, memory_size=pairs)

    def solve(theta):
        return dl.minimize(rosenbrock, theta, solver=solver).value

    program = jax.jit(jax.vmap(solve)).lower(jnp.zeros((lanes, n))).compile().as_text()
    copied = rf"f64\[{lanes},{pairs},{n}\]\S* (select|copy)\((.*)"
    assert all("broadcast" in made[1] for made in re.findall(copied, program))  # once, of zeros
    assert f"f64[{lanes},{pairs},{n}]" in program


def test_a_finished_lane_does_not_set_the_pace(batching):
    """A lane that starts at NaN would make every line search of the batch run to its limit."""
    trips = []

    def fun(x, theta):
        jax.debug.callback(lambda _: trips.append(1), x[0])
        return theta * jnp.sum(jnp.cosh(x - 1))

    def solve(thetas):
        trips.clear()
        solver = dl.LBFGS(polish=0)
        jax.block_until_ready(
            jax.vmap(lambda t: dl.minimize(fun, jnp.zeros(2), t, solver=solver, throw=False).value)(
                thetas
            )
        )
        jax.effects_barrier()
        return len(trips)

    well = solve(jnp.asarray([1.0, 1.0]))
    assert solve(jnp.asarray([1.0, jnp.nan])) <= 1.2 * well


@pytest.mark.parametrize("n", [2, 5, 70])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_flat_direction_along_an_axis_is_no_saddle(dtype, n):
    """At a point of the circle `xᵀx = θ` the curvature along it is rounding, of either sign."""
    step = dl.value_and_hypergrad(
        lambda x, t: jnp.sum(x**2), lambda x, t: (x @ x - t) ** 2, throw=False
    )
    start = jnp.zeros(n, dtype).at[0].set(2.0)
    radii = jnp.linspace(0.3, 3.0, 60).astype(dtype)
    _, grads, infos = jax.jit(jax.vmap(step, in_axes=(0, None)))(radii, start)
    assert jnp.all(infos.result == dl.RESULTS.successful)
    assert jnp.max(jnp.abs(grads - 1)) < (1e-4 if dtype == jnp.float32 else 1e-9)
