"""Every way to end, its message, and that a failed solve fails its derivative."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import difflbfgs as dl
from problems import THETA, TIGHT, C, outer, relative_error, ridge, ridge_solution

STOPPED = {"max_steps": 2}
STARVED = {
    "solver": TIGHT,
    "adjoint": dl.ImplicitAdjoint(linear_solver=lx.CG(rtol=1e-8, atol=0, max_steps=2)),
}
STARVED_FORWARD = {
    "solver": TIGHT,
    "adjoint": dl.ForwardImplicitAdjoint(linear_solver=lx.CG(rtol=1e-8, atol=0, max_steps=2)),
}


def solved(theta, **options):
    return dl.minimize(ridge, jnp.zeros(5), theta, **options).value


def loss(**options):
    return lambda theta: outer(solved(theta, **options))


def forward(options):
    return {**options, "adjoint": dl.ForwardImplicitAdjoint()}


def raises(function, *args):
    """Run `function` and return the message of the error that it must raise."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        jax.block_until_ready(function(*args))
    return str(caught.value)


def batch(function):
    return lambda theta: jax.vmap(function)(jnp.stack([theta, 2 * theta]))


@pytest.mark.parametrize(
    "transformed",
    [
        loss(**STOPPED),
        jax.jit(loss(**STOPPED)),
        jax.grad(loss(**STOPPED)),
        jax.jit(jax.grad(loss(**STOPPED))),
        jax.jit(jax.jacrev(lambda t: solved(t, **STOPPED))),
        jax.jit(jax.jacfwd(lambda t: solved(t, **forward(STOPPED)))),
        jax.jit(jax.hessian(loss(**STOPPED))),
        batch(loss(**STOPPED)),
        jax.jit(batch(jax.grad(loss(**STOPPED)))),
        jax.jit(lambda t: dl.minimize(ridge, jnp.zeros(5), t, **STOPPED).objective),
        jax.jit(jax.grad(lambda t: dl.minimize(ridge, jnp.zeros(5), t, **STOPPED).objective)),
    ],
    ids="plain jit grad jit-grad jit-jacrev jit-jacfwd jit-hessian vmap jit-vmap-grad objective "
    "jit-grad-objective".split(),
)
def test_a_solve_stopped_early_raises(transformed):
    assert "maximum number of solver steps" in raises(transformed, THETA)


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad, batch], ids=["plain", "grad", "vmap"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_the_message_of_a_failed_solve_is_short(transform, jitted):
    function = transform(loss(**STOPPED))
    message = dl.RESULTS[dl.RESULTS.max_steps_reached]
    with pytest.raises(RuntimeError) as caught:
        jax.block_until_ready((jax.jit(function) if jitted else function)(THETA))
    text = str(caught.value)
    if not jitted:
        assert type(caught.value) is RuntimeError
        assert text == message
        assert caught.value.__suppress_context__
    assert text.endswith(message)
    assert text.count(message) == 1
    assert text.count("File ") <= 1  # JAX names one file, no stack
    assert len(text) < len(message) + 300


def test_a_user_s_own_error_stays_what_it_is():
    class Stop(Exception):
        pass

    def stop(step):
        raise Stop("enough")

    with pytest.raises(Exception, match="Stop: enough"):
        jax.block_until_ready(dl.minimize(ridge, jnp.zeros(5), THETA, callback=stop).value)


@pytest.mark.parametrize(
    "transformed",
    [
        jax.grad(loss(**STARVED)),
        jax.jit(jax.grad(loss(**STARVED))),
        jax.jit(jax.jacrev(lambda t: solved(t, **STARVED))),
        jax.jit(jax.jacfwd(lambda t: solved(t, **STARVED_FORWARD))),
        jax.jit(jax.hessian(loss(**STARVED))),
        jax.jit(batch(jax.grad(loss(**STARVED)))),
    ],
    ids="grad jit-grad jit-jacrev jit-jacfwd jit-hessian jit-vmap-grad".split(),
)
def test_an_adjoint_stopped_early_raises(transformed):
    assert "true residual is above tolerance" in raises(transformed, THETA)


@pytest.mark.parametrize("options", [{}, STOPPED, STARVED], ids=["well", "forward", "adjoint"])
def test_inside_shard_map(options):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("tasks",))
    spec = jax.sharding.PartitionSpec("tasks")
    sharded = jax.shard_map(
        jax.vmap(jax.grad(loss(**options))),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,  # Optax's own loops do not pass that check
    )
    thetas = jnp.stack([THETA, 2 * THETA])
    if options:
        fragment = "maximum number" if options is STOPPED else "true residual"
        assert fragment in raises(jax.jit(sharded), thetas)
    else:
        exact = jax.vmap(jax.grad(lambda t: outer(ridge_solution(t))))(thetas)
        assert relative_error(jax.jit(sharded)(thetas), exact) < 1e-9


def test_what_jax_shard_map_cannot_check_names_the_remedy():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("tasks",))
    spec = jax.sharding.PartitionSpec("tasks")
    solve = jax.shard_map(jax.vmap(loss()), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=r"axis 'tasks'.*check_vma=False"):
        solve(jnp.stack([THETA, 2 * THETA]))


@pytest.mark.parametrize("transform", ["shard_map", "vmap"])
def test_an_objective_that_spans_devices_or_lanes_raises(transform):
    def solve(theta):
        return dl.minimize(
            lambda x, t: jax.lax.pmean(ridge(x, t), "data"), jnp.zeros(5), theta
        ).value

    thetas = jnp.stack([THETA, 2 * THETA])
    if transform == "vmap":
        mapped = jax.vmap(solve, axis_name="data")
    else:
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
        spec = jax.sharding.PartitionSpec("data")
        mapped = jax.shard_map(
            jax.vmap(solve), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    with pytest.raises(ValueError, match=r"axis 'data'.*jax\.shard_map inside"):
        mapped(thetas)


def test_an_adjoint_stopped_early_leaves_the_primal_alone():
    assert jnp.isfinite(jax.jit(loss(**STARVED))(THETA))


@pytest.mark.parametrize("options", [STOPPED, STARVED], ids=["forward", "adjoint"])
def test_without_throw_the_derivatives_of_a_failed_solve_are_nan(options):
    f = loss(**options, throw=False)
    assert jnp.all(jnp.isnan(jax.jit(jax.grad(f))(THETA)))
    assert jnp.all(jnp.isnan(jax.jit(jax.hessian(f))(THETA)))
    assert jnp.all(jnp.isnan(jax.jit(jax.jacrev(jax.jacrev(f)))(THETA)))
    assert jnp.all(jnp.isnan(batch(jax.grad(f))(THETA)))


def test_without_throw_forward_mode_gives_nan_too():
    options = {**forward(STOPPED), "throw": False}
    assert jnp.all(jnp.isnan(jax.jacfwd(lambda t: solved(t, **options))(THETA)))


def test_without_throw_the_hessian_of_a_linear_outer_loss_is_nan_and_not_zero():
    hessian = jax.hessian(lambda t: C @ solved(t, **STOPPED, throw=False))(THETA)
    assert jnp.all(jnp.isnan(hessian))


def test_without_throw_the_derivative_of_a_failed_objective_is_nan():
    def objective(theta):
        return dl.minimize(ridge, jnp.zeros(5), theta, **STOPPED, throw=False).objective

    assert jnp.all(jnp.isnan(jax.grad(objective)(THETA)))
    assert jnp.all(jnp.isnan(jax.hessian(objective)(THETA)))


def test_approximate_differentiates_wherever_the_solver_stopped():
    adjoint = dl.ImplicitAdjoint(approximate=True)
    f = loss(solver=dl.LBFGS(polish=0), **STOPPED, throw=False, adjoint=adjoint)
    exact = jax.grad(lambda t: outer(ridge_solution(t)))(THETA)
    error = relative_error(jax.grad(f)(THETA), exact)
    assert 1e-6 < error < 1


@pytest.mark.parametrize("bad", ["stopped", "nan"])
def test_a_masked_failed_lane_leaves_the_others_exact(bad):
    """Lane 1 fails: its tolerance is out of reach, or its data are NaN."""
    thetas = jnp.stack([THETA, THETA - 1, 2 * THETA])
    scale = jnp.asarray([1.0, jnp.nan if bad == "nan" else 1.0, 1.0])
    rtols = jnp.asarray([1e-4, 1e-4 if bad == "nan" else 0.0, 1e-4])

    def one(theta, scale, rtol):
        def fun(w, theta):
            return scale * ridge(w, theta)

        sol = dl.minimize(
            fun, jnp.zeros(5), theta, solver=dl.LBFGS(rtol=rtol), max_steps=9, throw=False
        )
        return outer(sol.value) + sol.objective, sol.converged

    def total(thetas):
        losses, converged = jax.vmap(one)(thetas, scale, rtols)
        return jnp.sum(jnp.where(converged, losses, 0)), converged

    gradient, converged = jax.jit(jax.grad(total, has_aux=True))(thetas)
    assert list(converged) == [True, False, True]
    assert jnp.all(gradient[1] == 0)

    def exact(theta):
        w = ridge_solution(theta)
        return outer(w) + ridge(w, theta)

    assert relative_error(gradient[::2], jax.vmap(jax.grad(exact))(thetas[::2])) < 1e-9


def test_a_failed_lane_that_is_used_is_nan():
    def total(max_steps):
        def one(theta):
            return loss(solver=dl.LBFGS(rtol=1e-4), max_steps=max_steps, throw=False)(theta)

        return jax.grad(lambda t: jnp.sum(jax.vmap(one)(t)))(jnp.stack([THETA, 2 * THETA]))

    assert jnp.all(jnp.isfinite(total(9)))
    assert jnp.all(jnp.isnan(total(3)))


def ending(fun, x0, theta=None, **options):
    """Solve without throwing; return the member of RESULTS by name, and its message."""
    sol = dl.minimize(fun, x0, theta, throw=False, **options)
    (name,) = [n for n in NAMES if sol.result == getattr(dl.RESULTS, n)]
    assert bool(sol.converged) == (name in ("successful", "precision_limit"))
    return sol, name, dl.RESULTS[sol.result]


NAMES = (
    "successful precision_limit max_steps_reached nonfinite_start unbounded line_search_failed "
    "no_minimizer adjoint_not_converged indefinite_hessian nonfinite_hessian uncertified"
).split()


def test_successful():
    _, name, message = ending(ridge, jnp.zeros(5), THETA)
    assert (name, message) == ("successful", "")


def test_precision_limit():
    solver = dl.LBFGS(rtol=0.0)
    sol, name, message = ending(ridge, jnp.zeros(5), THETA, solver=solver)
    assert name == "precision_limit"
    assert "rounding error" in message
    assert "float64" in message
    assert relative_error(sol.value, ridge_solution(THETA)) < 1e-13


def test_max_steps_reached():
    sol, name, message = ending(ridge, jnp.zeros(5), THETA, max_steps=2)
    assert name == "max_steps_reached"
    assert "max_steps" in message
    assert sol.stats.num_steps == 2


@pytest.mark.parametrize("x0", [-1.0, jnp.nan, jnp.inf])
def test_nonfinite_start_ends_at_once(x0):
    sol, name, message = ending(lambda x, _: jnp.sum(jnp.log(x)), jnp.full(3, x0))
    assert name == "nonfinite_start"
    assert "starting point" in message
    assert sol.stats.num_steps == 0
    assert sol.stats.num_fun_evals <= 3


@pytest.mark.parametrize(
    "fun",
    [lambda x: jnp.sum(x), lambda x: -jnp.sum(x**2), lambda x: -jnp.sum(jnp.exp(x))],
    ids=["linear", "concave", "exponential"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_unbounded_is_noticed(fun, dtype):
    sol, name, message = ending(lambda x, _: fun(x), jnp.ones(3, dtype))
    assert name == "unbounded"
    assert "falls without limit" in message
    assert sol.stats.num_fun_evals < 250
    assert jnp.all(jnp.isfinite(sol.value))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_line_search_failed_at_a_kink_returns_the_best_point(dtype):
    target = jnp.arange(5, dtype=dtype)
    seen = []
    sol, name, message = ending(
        lambda x, _: jnp.sum(jnp.abs(x - target)),
        jnp.full(5, 0.3, dtype),
        callback=lambda step: seen.append(float(step.objective)),
    )
    jax.effects_barrier()
    assert name == "line_search_failed"
    assert "non-smooth" in message
    assert float(sol.objective) == min(seen)
    assert jnp.all(jnp.isfinite(sol.value))


@pytest.mark.parametrize("polish", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("far", [2.0, 20.0])
def test_a_kink_passes_for_neither_a_minimum_nor_noise(far, dtype, polish):
    def fun(x, theta):
        M, A = theta
        return 10 * jnp.sum((M @ x) ** 4) + jnp.sum(jnp.abs(A @ x))

    for seed in range(30):
        theta = np.random.default_rng(seed).normal(size=(2, 4, 4)).astype(dtype)
        x0 = jnp.array([0.0, 0.0, 0.0, far], dtype)
        sol, name, _ = ending(fun, x0, theta, solver=dl.LBFGS(polish=polish))
        assert name == "line_search_failed", seed
        assert sol.objective < 1e-2 * fun(x0, theta)


def test_rounding_on_an_ill_conditioned_problem_passes_for_no_kink():
    def fun(w, data):
        X, y, decay = data
        return jnp.mean((X @ w - y) ** 2) + decay * jnp.sum(w**2)

    rng = np.random.default_rng(0)
    spread = np.logspace(0, -rng.uniform(0, 4, 100), 10, axis=-1)
    X = rng.normal(size=(100, 40, 10)) * spread[:, None]
    y = np.einsum("tij,tj->ti", X, rng.normal(size=(100, 10))) + rng.normal(size=(100, 40))
    solver = dl.LBFGS(polish=0)
    solve = jax.vmap(
        lambda *data: dl.minimize(fun, jnp.zeros(10), data, solver=solver, throw=False)
    )
    sol = solve(X, y, 10 ** rng.uniform(-7, -1, 100))
    assert jnp.sum(~sol.converged) <= 2
    assert jnp.sum(sol.result == dl.RESULTS.precision_limit) > 20


def test_nan_at_the_first_trial_is_stepped_around():
    sol, name, _ = ending(
        lambda x, _: jnp.sum(x - jnp.log(x)) + jnp.where(jnp.any(x > 3), jnp.nan, 0.0),
        jnp.full(3, 0.01),
    )
    assert name == "successful"
    assert jnp.allclose(sol.value, 1)


def test_start_at_the_optimum_takes_no_steps():
    x0 = ridge_solution(THETA)
    sol, name, _ = ending(ridge, x0, THETA)
    assert name in ("successful", "precision_limit")
    assert sol.stats.num_steps == 0

    def f(theta):
        return outer(dl.minimize(ridge, x0, theta).value)

    exact = jax.grad(lambda t: outer(ridge_solution(t)))(THETA)
    assert relative_error(jax.grad(f)(THETA), exact) < 1e-10


def saddle(x, theta):
    return 0.5 * (x[0] - theta) ** 2 - 0.5 * x[1] ** 2 + x[2] ** 2


LARGE = 300


def large_saddle(x, theta):
    diagonal = jnp.linspace(1, 2, LARGE).at[7].set(-1.0)
    return 0.5 * jnp.sum(diagonal * x**2) - theta * jnp.sum(x)


@pytest.mark.parametrize(
    ("fun", "x0"),
    [
        (saddle, jnp.asarray([1.0, 0.0, 0.0])),
        (large_saddle, 1.0 / jnp.linspace(1, 2, LARGE).at[7].set(-1.0)),
    ],
    ids=["dense", "conjugate-gradient"],
)
def test_indefinite_hessian(fun, x0):
    def f(theta, throw):
        return jnp.sum(dl.minimize(fun, x0, theta, throw=throw).value)

    assert "saddle point" in raises(jax.jit(jax.grad(lambda t: f(t, True))), 1.0)
    assert jnp.isnan(jax.grad(lambda t: f(t, False))(1.0))


def translation_invariant(x, theta):
    """A chain of springs that is free to move as a whole: H is singular, with a zero mode."""
    return 0.5 * jnp.sum((jnp.diff(x) - theta) ** 2)


@pytest.mark.parametrize("n", [6, 300])
def test_singular_but_consistent_gives_the_derivative_of_least_norm(n):
    theta = jnp.linspace(0.5, 1.5, n - 1)

    def length(theta):  # invariant under translation
        x = dl.minimize(translation_invariant, jnp.zeros(n), theta, max_steps=5000).value
        return jnp.sum(jnp.sin(jnp.diff(x)))

    assert relative_error(jax.jit(jax.grad(length))(theta), jnp.cos(theta)) < 1e-6


@pytest.mark.parametrize("n", [6, 300])
def test_singular_and_inconsistent_is_flagged(n):
    theta = jnp.linspace(0.5, 1.5, n - 1)

    def position(theta, throw):  # not invariant: no derivative exists
        x = dl.minimize(
            translation_invariant, jnp.zeros(n), theta, max_steps=5000, throw=throw
        ).value
        return jnp.sum(x)

    message = raises(jax.jit(jax.grad(lambda t: position(t, True))), theta)
    assert "true residual is above tolerance" in message
    assert jnp.all(jnp.isnan(jax.jit(jax.grad(lambda t: position(t, False)))(theta)))


PAIRS = np.argwhere(np.triu(np.ones((6, 6)), 1))


def distances(x):
    return jnp.linalg.norm(x[PAIRS[:, 0]] - x[PAIRS[:, 1]], axis=1)


def molecule(seed):
    """Six atoms joined by springs of different stiffness that cannot all be at rest."""
    rng = np.random.default_rng(seed)
    stiffness = jnp.asarray(10.0 ** rng.uniform(0, 3, 15))
    start = jnp.asarray(2 * rng.normal(size=(6, 3)))
    rest = distances(start) + 0.3 * jnp.asarray(rng.normal(size=15))
    return stiffness, rest, start


def energy(x, theta):
    stiffness, rest = theta
    return jnp.sum(stiffness * (distances(x) - rest) ** 2)


def pinned(x, theta):
    """The same with conditions that can be met at no cost and fix all six motions."""
    *springs, start = theta
    moved = x - start
    torque = jnp.sum(jnp.cross(start - start.mean(0), moved), axis=0)
    return energy(x, springs) + jnp.sum(moved.sum(0) ** 2) + jnp.sum(torque**2)


def invariant(x, theta):
    return jnp.sum(jnp.sin(distances(x)))


@pytest.mark.parametrize("seed", [1, 4])
def test_beside_the_minimum_a_rotation_is_no_saddle(seed):
    stiffness, rest, start = molecule(seed)

    def derivative(fun, solver, loss):
        def total(theta):
            springs = (stiffness, theta * rest, *((start,) if fun is pinned else ()))
            sol = dl.minimize(fun, start, springs, solver=solver, max_steps=5000, throw=False)
            return loss(sol.value, theta)

        return jax.jit(jax.grad(total))(1.0)

    exact = derivative(pinned, dl.LBFGS(rtol=1e-11), invariant)
    assert relative_error(derivative(energy, dl.LBFGS(), invariant), exact) < 1e-7
    assert jnp.isnan(derivative(energy, dl.LBFGS(), lambda x, _: x[0, 0]))


@pytest.mark.parametrize(("dtype", "least"), [("float64", 50), ("float32", 42)])
def test_what_a_symmetry_leaves_is_solved_and_its_error_told(dtype, least):
    """Of 50 molecules at least so many are certified; along rotations all is rounding."""
    molecules = [molecule(seed) for seed in range(50)]
    step = jax.jit(dl.value_and_hypergrad(invariant, energy, max_steps=5000, throw=False))
    tight = dl.LBFGS(rtol=1e-13)
    exact = dl.value_and_hypergrad(invariant, pinned, solver=tight, max_steps=5000, throw=False)
    exact, certified = jax.jit(exact), 0
    for stiffness, rest, start in jax.tree.map(lambda leaf: leaf.astype(dtype), molecules):
        _, gradient, info = step((stiffness, rest), start)
        if info.result != dl.RESULTS.successful:
            continue
        certified += 1
        double = (leaf.astype("float64") for leaf in (stiffness, rest, start))
        _, truth, known = exact(tuple(double), info.solution.value.astype("float64"))
        error = jnp.linalg.norm(jnp.stack(gradient) - jnp.stack(truth[:2]))
        assert error <= 3 * (info.error_estimate + known.error_estimate)
    assert certified >= least
