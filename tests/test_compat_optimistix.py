"""`difflbfgs.compat.optimistix.LBFGS`, as users of `optimistix.minimise` would try it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import difflbfgs as dl
from difflbfgs.compat.optimistix import LBFGS
from problems import THETA as DECAY
from problems import ridge

pytestmark = pytest.mark.slow

SOLVER = LBFGS(rtol=1e-9, atol=1e-9)
PSD = frozenset({lx.positive_semidefinite_tag})


def flat(y):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(y)])


def rosenbrock(y, a):
    x = flat(y)
    return jnp.sum(a * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def beale(y, _):
    u, v = flat(y)
    powers = v ** jnp.arange(1, 4)
    return jnp.sum((jnp.array([1.5, 2.25, 2.625]) - u + u * powers) ** 2)


def variably_dimensioned(y, _):
    x = flat(y) - 1
    t = jnp.arange(1, x.size + 1) @ x
    return x @ x + t**2 + t**4


def trigonometric(y, _):
    x = flat(y)
    i = jnp.arange(1, x.size + 1)
    return jnp.sum((x.size - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)) ** 2)


def network(params, args):
    static, x = args
    return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - x**2) ** 2)


def network_start():
    model = eqx.nn.MLP(1, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    return eqx.partition(model, eqx.is_inexact_array)


PROBLEMS = {
    "scalars": (rosenbrock, [jnp.array(-1.2), jnp.array(1.0)], 100.0),
    "nested": (rosenbrock, (1.5 * jnp.ones((2, 2)), {"a": 1.5 * jnp.ones(3)}, ()), 100.0),
    "beale": (beale, {"u": jnp.array(2.0), "v": jnp.array(0.0)}, None),
    "float32": (variably_dimensioned, 1 - jnp.arange(1, 11, dtype=jnp.float32) / 10, None),
    "mixed": (
        variably_dimensioned,
        (1 - jnp.arange(1, 7, dtype=jnp.float32) / 10, 1 - jnp.arange(7, 11) / 10),
        None,
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("has_aux", [False, True])
def test_minimum(name, has_aux):
    fn, y0, args = PROBLEMS[name]

    def with_aux(y, args):
        return fn(y, args), {"twice": jax.tree.map(lambda leaf: 2 * leaf, y)}

    sol = optx.minimise(with_aux if has_aux else fn, SOLVER, y0, args, has_aux=has_aux)
    assert sol.result == optx.RESULTS.successful
    assert jax.tree.map(jnp.shape, sol.value) == jax.tree.map(jnp.shape, y0)
    assert jax.tree.map(lambda leaf: leaf.dtype, sol.value) == jax.tree.map(
        lambda leaf: leaf.dtype, y0
    )
    minimizer = jnp.array([3.0, 0.5]) if fn is beale else jnp.ones(flat(y0).size)
    single = any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(y0))
    np.testing.assert_allclose(flat(sol.value), minimizer, rtol=2e-4 if single else 1e-7)
    if has_aux:  # at the returned point, not a step before
        doubled = jax.tree.map(lambda leaf: 2 * leaf, sol.value)
        assert eqx.tree_equal(sol.aux["twice"], doubled, rtol=1e-12)


def test_other_functions():
    start = jnp.ones(20) / 20
    sol = optx.minimise(trigonometric, SOLVER, start)
    assert optx.two_norm(jax.grad(trigonometric)(sol.value, None)) < 1e-6
    params, static = network_start()
    x = jnp.linspace(-1, 1, 20)[:, None]
    sol = optx.minimise(network, LBFGS(rtol=1e-4, atol=0.0), params, (static, x), max_steps=1000)
    assert network(sol.value, (static, x)) < 1e-3 * network(params, (static, x))
    model = eqx.combine(sol.value, static)
    assert model(x[0]).shape == (1,)


@pytest.mark.usefixtures("optimized")
def test_takes_the_steps_of_minimize():
    y0 = jnp.array([-1.2, 1.0])
    sol = optx.minimise(rosenbrock, LBFGS(rtol=1e-6, atol=0.0), y0, 100.0)
    ours = dl.minimize(rosenbrock, y0, 100.0, solver=dl.LBFGS(rtol=1e-6, polish=0))
    assert sol.stats["num_steps"] == ours.stats.num_steps + 1  # the last shows where it ended
    assert sol.stats["num_fun_evals"] == ours.stats.num_fun_evals
    assert sol.stats["result"] == dl.RESULTS.successful
    np.testing.assert_allclose(sol.value, ours.value, rtol=1e-12)
    np.testing.assert_allclose(sol.stats["grad_norm"], ours.stats.grad_norm, rtol=1e-6)
    # Two programs round differently, and a gradient on the way feels it by Rosenbrock's curvature.
    reference = ours.stats.reference_grad_norm
    np.testing.assert_allclose(sol.stats["reference_grad_norm"], reference, rtol=1e-9)


def quartic(y, theta):
    """Return an objective whose minimizer moves with theta, by a matrix that is not square."""
    mixed = jnp.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]]) @ theta
    return jnp.sum((y["p"] - mixed) ** 2 * jnp.array([1.0, 10.0])) + jnp.sum(y["p"] ** 4)


START, THETA = {"p": jnp.zeros(2)}, jnp.array([0.3, -0.2, 0.5])


IMPLICIT = optx.ImplicitAdjoint()


def minimizer(theta, adjoint=IMPLICIT, tags=frozenset()):
    return optx.minimise(quartic, SOLVER, START, theta, adjoint=adjoint, tags=tags).value["p"]


@pytest.fixture(scope="module")
def jacobian():
    """Central differences."""
    step = 1e-5
    moves = step * jnp.eye(3)
    at = jax.jit(jax.vmap(minimizer))
    return ((at(THETA + moves) - at(THETA - moves)) / (2 * step)).T


@pytest.mark.parametrize(
    ("adjoint", "tags"),
    [
        (optx.ImplicitAdjoint(), frozenset()),
        (optx.ImplicitAdjoint(), PSD),
        (optx.ImplicitAdjoint(lx.CG(rtol=1e-10, atol=1e-10)), PSD),
    ],
    ids=["dense", "cholesky", "cg"],
)
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_derivative(adjoint, tags, mode, jacobian):
    found = jax.jit(mode(lambda theta: minimizer(theta, adjoint, tags)))(THETA)
    np.testing.assert_allclose(found, jacobian, rtol=1e-6, atol=1e-8)


def test_vmap(jacobian):
    thetas = jnp.stack([2 * THETA, THETA])
    scalar = lambda theta: (jnp.sum(minimizer(theta)), minimizer(theta))
    gradients, minimizers = jax.vmap(jax.grad(scalar, has_aux=True))(thetas)
    np.testing.assert_allclose(minimizers[1], minimizer(THETA), atol=1e-8)
    np.testing.assert_allclose(gradients[1], jacobian.sum(axis=0), rtol=1e-6, atol=1e-8)


def test_unrolling_is_refused():
    with pytest.raises(TypeError, match=r"ImplicitAdjoint\(\).*difflbfgs.Unrolled"):
        jax.grad(lambda theta: minimizer(theta, optx.RecursiveCheckpointAdjoint()).sum())(THETA)


ENDINGS = {
    "unbounded": (lambda y, _: jnp.sum(y), "nonlinear_divergence", "unbounded"),
    "logarithm": (lambda y, _: jnp.sum(jnp.log(y - 2)), "nonfinite", "nonfinite_start"),
    "kink": (
        lambda y, _: 1 + jnp.sum(jnp.abs(y - 1 / 3)),
        "nonlinear_divergence",
        "line_search_failed",
    ),
    "rounding": (lambda y, _: ridge(y, DECAY), "successful", "precision_limit"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_endings(name):
    fn, theirs, ours = ENDINGS[name]
    y0 = jnp.linspace(0.3, -0.7, 5)
    sol = optx.minimise(fn, LBFGS(rtol=0.0, atol=0.0), y0, throw=False)
    assert sol.result == getattr(optx.RESULTS, theirs)
    assert sol.stats["result"] == getattr(dl.RESULTS, ours)
    assert not fn(sol.value, None) > fn(y0, None)


def test_a_failure_raises():
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        optx.minimise(rosenbrock, SOLVER, jnp.array([-1.2, 1.0]), 100.0, max_steps=3)
    sol = optx.minimise(rosenbrock, SOLVER, jnp.array([-1.2, 1.0]), 100.0, max_steps=3, throw=False)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    assert sol.stats["num_steps"] == 3


def test_best_so_far_sees_the_last_point():
    best = optx.BestSoFarMinimiser(LBFGS(1e-5, 1e-5))
    for start in (0.0, 3.0):  # one step away, and there already
        sol = optx.minimise(lambda y, a: (y - a) ** 2, best, jnp.array(start), 3.0)
        np.testing.assert_allclose(sol.value, 3, rtol=1e-5)


def test_a_step_goes_on_from_the_y_that_it_is_given():
    def fn(y, _):
        return jnp.sum((y - 3.0) ** 2 * jnp.arange(1.0, 3.0)), None

    y, nothing = jnp.zeros(2), frozenset()
    struct = jax.eval_shape(fn, y, None)[0]
    init = jax.jit(lambda y: SOLVER.init(fn, y, None, {}, struct, None, nothing))
    state = init(y)
    step = jax.jit(lambda y, state: SOLVER.step(fn, y, None, {}, state, nothing)[:2])
    first, state = step(y, state)
    assert state.f_info.f < fn(y, None)[0]  # every step moves
    projected = jnp.clip(first, 0.0, 0.5)
    kept, moved = step(first, state), step(projected, state)
    assert not jnp.allclose(kept[0], moved[0])
    assert kept[1].num_accepted_steps == moved[1].num_accepted_steps == 2
    np.testing.assert_allclose(moved[0], step(projected, init(projected))[0], rtol=1e-12)
    for _ in range(30):
        y, state = step(y, state)
        y = jnp.clip(y, 0.0, 2.0)
    np.testing.assert_allclose(y, 2)


def test_settings(capfd):
    import optax

    y0 = jnp.array([-1.2, 1.0])
    found = optx.minimise(rosenbrock, SOLVER, y0, 100.0, max_steps=None).value
    np.testing.assert_allclose(found, 1, rtol=1e-7)
    found = optx.minimise(rosenbrock, optx.BestSoFarMinimiser(SOLVER), y0, 100.0).value
    np.testing.assert_allclose(found, 1, rtol=1e-4)
    search = optax.scale_by_backtracking_linesearch(20)
    solver = LBFGS(1e-6, 0.0, memory_size=3, linesearch=search, verbose=True)
    sol = optx.minimise(rosenbrock, solver, y0, 100.0)
    jax.effects_barrier()
    np.testing.assert_allclose(sol.value, 1, rtol=1e-4)
    assert sol.state.solve.memory.weights_memory.shape == (3,)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == sol.stats["num_steps"]
    assert lines[0].startswith("Step: 0, Loss: ")


def test_verbose_as_a_function():
    seen = {}
    optx.minimise(quartic, LBFGS(1e-3, 0.0, verbose=seen.update), START, THETA)
    assert {key: name for key, (name, _) in seen.items()} == {
        "num_steps": "Step",
        "loss": "Loss",
        "grad_norm": "Gradient norm",
        "step_size": "Step size",
    }


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"memory_size": 0}, ValueError, "memory_size"),
        ({"linesearch": "zoom"}, TypeError, "linesearch"),
        ({"verbose": "yes"}, TypeError, "verbose must be True"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        LBFGS(**{"rtol": 1e-6, "atol": 1e-6, **kwargs})


def test_bad_options():
    with pytest.raises(ValueError, match=r"autodiff_mode.*'fwd'"):
        optx.minimise(quartic, SOLVER, START, THETA, options={"autodiff_mode": "fwd"})


def test_roots_are_found_and_least_squares_find_them_sooner():
    """A norm has a kink at a root, and half its square has none."""

    def residual(y, a):
        return jnp.array([y[0] ** 2 - a, y[1] - y[0]])

    steps = []
    for solve in (optx.least_squares, optx.root_find):
        sol = solve(residual, LBFGS(1e-6, 1e-6), jnp.ones(2), 4.0)
        assert jnp.allclose(sol.value, 2, rtol=0, atol=1e-6)
        steps.append(int(sol.stats["num_steps"]))
    assert 4 * steps[0] < steps[1]
