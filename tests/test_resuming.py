"""A solve that was told to end goes on from its state as if it had not been."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import difflbfgs as dl

N = 20
START = jnp.where(jnp.arange(N) % 2 == 0, -1.2, 1.0)


def valley(x, theta):
    """Rosenbrock's function, chained: 116 steps, and Newton's method is asked on the way."""
    return jnp.sum(theta * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def work(sol):
    return int(sol.stats.num_fun_evals + sol.stats.num_hvps)


def in_one_piece(start, fun=valley, theta=100.0, **settings):
    """Return a solve of which the first step was another: one program rounds as it does always.

    The program of a cold solve may round in another way.
    """
    first = dl.minimize(fun, start, theta, max_steps=1, throw=False, **settings)
    return dl.minimize(fun, start, theta, state=first.state, **settings)


def in_chunks(start, size, fun=valley, theta=100.0, **settings):
    """Return the end of a solve in chunks, their number and work, and the steps taken in all."""
    sol = dl.minimize(fun, start, theta, max_steps=1, throw=False, **settings)
    settings = {"max_steps": size, "throw": False, **settings}
    sol = dl.minimize(fun, start, theta, state=sol.state, **settings)
    chunks, total, steps = 1, work(sol), int(sol.stats.num_steps)
    while sol.result == dl.RESULTS.max_steps_reached:
        assert int(sol.stats.num_steps) == size  # the counts are those of the chunk
        sol = dl.minimize(fun, start, theta, state=sol.state, **settings)
        chunks, total, steps = chunks + 1, total + work(sol), steps + int(sol.stats.num_steps)
    return sol, chunks, total, steps


SETTINGS = {
    "default": {},
    "no polish": {"solver": dl.LBFGS(polish=0)},
    "bounds": {"bounds": (-1.1, 0.9)},
    "leaves": {"solver": dl.LBFGS(flatten=False)},
}
CASES = [
    *[(name, size, jnp.float64) for name in ("default", "no polish") for size in (1, 7, 20)],
    *[("default", size, jnp.float32) for size in (1, 7, 20)],
    *[(name, 7, jnp.float32) for name in ("no polish", "bounds", "leaves")],
    ("bounds", 7, jnp.float64),
]


FAST = ("default", 7, jnp.float64)


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [case if case == FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_in_chunks_it_is_the_same_solve(name, size, dtype):
    start, settings = START.astype(dtype), SETTINGS[name]
    whole = in_one_piece(start, **settings)
    sol, chunks, total, steps = in_chunks(start, size, **settings)
    assert chunks > 5 or size == 20
    assert sol.result == whole.result
    expected = work(whole) + chunks - 1  # each chunk evaluates once where it starts
    if name == "bounds":  # as XLA compiles for the tests, JAX 0.10 rounds the two in two ways
        close = float(jnp.finfo(dtype).eps) ** 0.5
        assert jnp.allclose(sol.value, whole.value, rtol=0, atol=close)
        assert total <= 1.25 * expected  # and a rounding may lead another way
        return
    assert jnp.array_equal(sol.value, whole.value)
    assert steps == whole.stats.num_steps
    assert total == expected


@pytest.mark.slow
def test_the_step_before_is_remembered():
    """Next to a minimizer at the origin its energy is more than that of the point."""

    def bowl(x, theta):
        return theta * jnp.sum(jnp.logspace(0, 2, 12) * x**2) + jnp.sum(x**4) + x[0] * x[1] * x[2]

    start = 3 * jnp.cos(jnp.arange(12.0))
    whole = in_one_piece(start, bowl, 1.0)
    sol, chunks, total, _ = in_chunks(start, 1, fun=bowl, theta=1.0)
    assert jnp.array_equal(sol.value, whole.value)
    assert total == work(whole) + chunks - 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 20])
def test_with_an_optax_line_search_it_is_the_same_solve(optimized, size):
    """Its state is handed over, too, and it may round the objective in its own way."""
    solver = dl.LBFGS(linesearch=optax.scale_by_zoom_linesearch(20))
    whole = in_one_piece(START, solver=solver)
    sol, chunks, total, steps = in_chunks(START, size, solver=solver)
    assert jnp.array_equal(sol.value, whole.value)
    assert steps == whole.stats.num_steps
    assert total == work(whole) + chunks - 1
    other = dl.minimize(valley, START, 100.0, max_steps=20, throw=False)
    warm = dl.minimize(valley, START, 100.0, solver=solver, state=other.state)  # a warm start
    assert jnp.allclose(warm.value, whole.value, rtol=0, atol=1e-6)


def test_another_theta_or_a_solve_that_had_ended_is_a_warm_start():
    def go_on(state, theta, steps):
        return dl.minimize(valley, START, theta, max_steps=steps, throw=False, state=state)

    first = dl.minimize(valley, START, 100.0, max_steps=1, throw=False)  # see `in_one_piece`
    part = go_on(first.state, 100.0, 19)
    same = go_on(part.state, 100.0, 1)
    moved = go_on(part.state, 100.0 * (1 + 1e-12), 1)
    next_ = go_on(first.state, 100.0, 20)
    assert jnp.array_equal(same.value, next_.value)
    assert not jnp.array_equal(moved.value, next_.value)
    assert moved.state.ledger.num_steps == 1
    assert same.state.ledger.num_steps == 21
    end = dl.minimize(valley, START, 100.0)
    again = dl.minimize(valley, START, 100.0, state=end.state)
    assert again.state.ledger.num_steps == again.stats.num_steps <= 1


@pytest.mark.slow
def test_other_bounds_are_a_warm_start_from_inside_them():
    part = dl.minimize(valley, START, 100.0, bounds=(-1.1, 0.9), max_steps=7, throw=False)
    whole = dl.minimize(valley, START, 100.0, bounds=(-1.1, 0.5))
    sol = dl.minimize(valley, START, 100.0, bounds=(-1.1, 0.5), state=part.state)
    assert jnp.allclose(sol.value, whole.value, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_lanes_go_on_each_where_it_was():
    thetas = jnp.array([1.0, 10.0, 100.0])

    @jax.jit
    @jax.vmap
    def first(theta):
        return dl.minimize(valley, START, theta, max_steps=20, throw=False)

    @jax.jit
    @jax.vmap
    def further(theta, state):
        return dl.minimize(valley, START, theta, max_steps=20, throw=False, state=state)

    whole = jax.vmap(lambda theta: dl.minimize(valley, START, theta))(thetas)
    sol, ends = first(thetas), {}
    for _ in range(10):
        for lane in np.flatnonzero(sol.converged):
            ends.setdefault(int(lane), sol.value[lane])
        sol = further(thetas, sol.state)
    assert jnp.unique(whole.stats.num_steps // 20).size > 1  # they finish at different times
    found = jnp.stack([ends[lane] for lane in range(len(thetas))])
    assert jnp.allclose(found, whole.value, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("polish", [0, 1])
def test_a_stopped_solve_goes_on(polish):
    def solve(limit, state):
        limit, solver = jnp.asarray(limit), dl.LBFGS(polish=polish)
        return dl.minimize(
            valley, START, 100.0, solver=solver, state=state, stop=lambda s: s.num_steps >= limit
        )

    first = solve(1, None)
    assert first.result == dl.RESULTS.stopped
    whole, sol, total, parts = solve(1000, first.state), first, 0, 0
    while sol.result == dl.RESULTS.stopped:
        sol = solve(30, sol.state)
        total, parts = total + work(sol), parts + 1
    assert parts > 2
    assert jnp.array_equal(sol.value, whole.value)
    assert total == work(whole) + parts - 1


@pytest.mark.slow
def test_hypergradients_and_operators_take_the_state():
    step = dl.value_and_hypergrad(lambda x, t: jnp.sum(x**2), valley, max_steps=60, throw=False)
    whole = dl.value_and_hypergrad(lambda x, t: jnp.sum(x**2), valley)(100.0, START)
    _, grad, info = step(100.0, START)
    assert info.result == dl.RESULTS.max_steps_reached
    _, grad, info = step(100.0, START, info.state)
    assert info.result == dl.RESULTS.successful
    assert jnp.allclose(grad, whole[1], rtol=1e-6)
    for state in (info.state, info.solution.state):
        assert jnp.all(jnp.linalg.eigvalsh(dl.inverse_hessian_operator(state).as_matrix()) > 0)


@pytest.mark.slow
def test_a_state_is_a_carry_whatever_made_it():
    """States of solves cold and warm and of known minimizers have one structure, for `scan`."""

    def body(state, theta):
        sol = dl.minimize(valley, START, theta, max_steps=40, throw=False, state=state)
        return sol.state, sol.result

    cold = dl.minimize(valley, START, 100.0, max_steps=20, throw=False).state
    known = dl.known_minimizer(valley, jnp.ones(N), 100.0).state
    for state in (cold, known):
        end, _ = jax.lax.scan(body, state, jnp.full(3, 100.0))
        assert jnp.allclose(end.x, 1, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_state_may_be_donated():
    """It shares no array with anything that the user holds."""
    start, theta = START + 0.0, jnp.asarray(100.0)
    sol = dl.minimize(valley, start, theta, max_steps=20, throw=False)

    def go_on(state):
        return dl.minimize(valley, START, theta, max_steps=20, throw=False, state=state)

    sol_2 = jax.jit(go_on, donate_argnums=0)(sol.state)
    assert jnp.all(jnp.isfinite(start + sol.value + sol_2.value))
    assert theta == 100
    known = dl.known_minimizer(valley, jnp.ones(N), 100.0)
    assert jax.jit(go_on, donate_argnums=0)(known.state).converged
    assert jnp.all(known.value == 1)
