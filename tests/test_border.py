"""What goes in and out: dtypes, structures, modules, complex numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import difflbfgs as dl
from problems import THETA, ridge, tolerance


def rosenbrock(x, _):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


class Net(eqx.Module):
    """A module with leaves that are no arrays: a function, a string, an integer, a flag."""

    layers: list[eqx.nn.Linear]
    activation: callable
    name: str
    depth: int
    frozen: jax.Array

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.layers = [eqx.nn.Linear(2, 4, key=first), eqx.nn.Linear(4, 1, key=second)]
        self.activation = jnp.tanh
        self.name = "net"
        self.depth = 2
        self.frozen = jnp.arange(3)

    def __call__(self, x):
        return self.layers[1](self.activation(self.layers[0](x)))[0]


INPUTS = jax.random.normal(jax.random.key(0), (12, 2))
TARGETS = jnp.sin(INPUTS[:, 0]) + 0.5 * INPUTS[:, 1]


def net_loss(net, penalty):
    squares = sum(
        jnp.sum(leaf**2) for leaf in jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array))
    )
    return jnp.mean((jax.vmap(net)(INPUTS) - TARGETS) ** 2) + penalty * squares


@pytest.mark.parametrize("flatten", [True, False])
def test_an_equinox_module_goes_in_and_comes_out_whole(flatten):
    net = Net(jax.random.key(1))
    solver = dl.LBFGS(flatten=flatten)

    def loss(penalty):
        fitted = dl.minimize(net_loss, net, penalty, solver=solver).value
        return jnp.mean(jax.vmap(fitted)(INPUTS) ** 3), fitted

    (_, fitted), gradient = jax.value_and_grad(loss, has_aux=True)(0.05)
    assert isinstance(fitted, Net)
    assert fitted.activation is jnp.tanh
    assert fitted.name == "net"
    assert jnp.array_equal(fitted.frozen, net.frozen)
    assert jax.tree.structure(fitted) == jax.tree.structure(net)
    h = 1e-4
    difference = (loss(0.05 + h)[0] - loss(0.05 - h)[0]) / (2 * h)
    assert abs(gradient - difference) < 1e-6 * abs(difference)


def test_raw_optax_fails_where_we_do_not():
    net = Net(jax.random.key(1))
    optimizer = optax.lbfgs()
    with pytest.raises((AttributeError, TypeError, ValueError)):
        optimizer.init(net)


def test_a_module_in_theta():
    net = Net(jax.random.key(1))

    def fun(x, net):
        return jnp.sum((x - net(jnp.ones(2))) ** 2)

    gradient = eqx.filter_grad(lambda net: dl.minimize(fun, 0.0, net).value)(net)
    exact = eqx.filter_grad(lambda net: net(jnp.ones(2)))(net)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b), gradient, exact))


def test_has_aux_may_be_anything():
    def fun(x, _):
        return jnp.sum((x - 1) ** 2), {"twice": 2 * x, "name": "aux", "int": 3}

    sol = dl.minimize(fun, jnp.zeros(2), has_aux=True)
    assert sol.aux["name"] == "aux"
    assert jnp.allclose(sol.aux["twice"], 2)
    assert dl.minimize(lambda x, _: x**2, 1.0).aux is None


@pytest.mark.parametrize("x64_constant", [True, False])
def test_float32_stays_float32(x64_constant):
    constant = jnp.asarray(2.0, jnp.float64 if x64_constant else jnp.float32)

    def fun(x, theta):
        return jnp.sum(constant * (x - theta) ** 2)

    def loss(theta):
        sol = dl.minimize(fun, jnp.zeros(3, jnp.float32), theta)
        assert sol.value.dtype == jnp.float32
        return jnp.sum(sol.value**2)

    theta = jnp.asarray([1.0, 2.0, 3.0], jnp.float32)
    gradient = jax.jit(jax.grad(loss))(theta)
    assert gradient.dtype == jnp.float32
    assert jnp.allclose(gradient, 2 * theta, rtol=tolerance(jnp.float32, 100))


def test_any_key_is_allowed():
    keys = ["value", "grad", "count", "params", "updates"]
    x0 = {key: jnp.full(2, i) * 0.1 for i, key in enumerate(keys)}
    for flatten in (True, False):
        solver = dl.LBFGS(flatten=flatten)
        sol = dl.minimize(
            lambda x, _: sum(jnp.sum((x[key] - i) ** 2) for i, key in enumerate(keys)),
            x0,
            solver=solver,
        )
        assert all(jnp.allclose(sol.value[key], i) for i, key in enumerate(keys))


def test_mixed_dtypes_are_restored():
    x0 = {
        "a": jnp.zeros(2, jnp.bfloat16),
        "b": jnp.zeros(2, jnp.float32),
        "c": 0.0,
        "n": 3,
    }

    def fun(x, _):
        assert x["a"].dtype == x["b"].dtype == jnp.float32
        return jnp.sum((x["a"] - 1) ** 2 + (x["b"] - x["a"] - 2) ** 2) + (x["c"] - x["n"]) ** 2

    value = dl.minimize(fun, x0).value
    assert value["a"].dtype == jnp.bfloat16
    assert value["b"].dtype == jnp.float32
    assert value["n"] == 3
    assert jnp.allclose(value["a"].astype(float), 1, atol=1e-2)
    assert jnp.allclose(value["b"], 3, atol=1e-3)
    assert jnp.allclose(value["c"], 3, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rosenbrock_in_half_precision(dtype):
    sol = dl.minimize(rosenbrock, jnp.asarray([-1.2, 1.0], dtype))
    assert sol.value.dtype == dtype
    assert sol.objective.dtype == jnp.float32
    assert jnp.allclose(sol.value.astype(jnp.float32), 1, atol=1e-2)


@pytest.mark.parametrize("flatten", [True, False])
def test_complex_variables(flatten):
    target = jnp.asarray([1 + 2j, -0.5 + 1j])
    mix = jnp.asarray([[2.0, 1j], [-1j, 3.0]])

    def fun(p, theta):
        r = mix @ p - theta
        return jnp.sum(r.real**2 + r.imag**2)  # jnp.abs has no second derivative at zero

    def loss(theta):
        value = dl.minimize(
            fun, jnp.zeros(2, complex), theta, solver=dl.LBFGS(flatten=flatten)
        ).value
        return jnp.sum(jnp.abs(value) ** 4)

    def exact(theta):
        return jnp.sum(jnp.abs(jnp.linalg.solve(mix, theta)) ** 4)

    assert jnp.allclose(loss(target), exact(target), rtol=1e-9)
    assert jnp.allclose(jax.grad(loss)(target), jax.grad(exact)(target), rtol=1e-8)
    simple = dl.minimize(lambda p, _: jnp.sum(jnp.abs(p - 1j) ** 2), jnp.ones(3, jnp.complex64))
    assert simple.value.dtype == jnp.complex64
    assert jnp.allclose(simple.value, 1j, atol=1e-5)


def test_python_numbers_are_arrays():
    sol = dl.minimize(lambda x, t: (x["a"] - t) ** 2 + (x["b"] + 1) ** 2, {"a": 0.0, "b": 2.0}, 3.0)
    assert jnp.allclose(sol.value["a"], 3)
    assert jnp.allclose(sol.value["b"], -1)
    gradient = jax.grad(lambda t: dl.minimize(lambda x, t: (x - t**2) ** 2, 0.0, t).value)(3.0)
    assert jnp.allclose(gradient, 6)


def test_strict_promotion_is_allowed():
    with jax.numpy_dtype_promotion("strict"):
        sol = jax.jit(lambda t: dl.minimize(ridge, jnp.zeros(5), t))(THETA)
    assert sol.converged


def test_a_warm_start_saves_evaluations_and_ends_at_the_same_answer():
    def fun(x, theta):
        return jnp.sum(jnp.cosh(x - theta)) + 5 * jnp.sum((x[1:] - x[:-1] ** 2) ** 2)

    theta = jnp.linspace(0, 1, 8)
    first = dl.minimize(fun, jnp.zeros(8), theta)
    moved = theta + 1e-3
    cold = dl.minimize(fun, jnp.zeros(8), moved)
    warm = dl.minimize(fun, jnp.zeros(8), moved, state=first.state)
    from_value = dl.minimize(fun, first.value, moved)
    assert warm.stats.num_fun_evals < cold.stats.num_fun_evals
    assert warm.stats.num_fun_evals < from_value.stats.num_fun_evals
    assert jnp.allclose(warm.value, cold.value, rtol=1e-10)


def test_state_holds_arrays_only_and_passes_through_transformations():
    def step(state, theta):
        sol = dl.minimize(ridge, jnp.zeros(5), theta, state=state)
        return sol.state, sol.stats.num_fun_evals

    state = dl.minimize(ridge, jnp.zeros(5), THETA).state
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    thetas = THETA + 0.01 * jnp.arange(4.0)[:, None]
    _, evaluations = jax.lax.scan(step, state, thetas)
    assert jnp.all(evaluations > 0)


@pytest.mark.parametrize("empty", [False, True], ids=["leaf-not-read", "leaf-of-size-zero"])
def test_a_loss_may_read_some_leaves_only(empty):
    x0 = {"a": jnp.zeros(2), "b": jnp.zeros(0 if empty else 3), "c": jnp.zeros(2, complex)}

    def fun(x, t):
        r = x["c"] - 1j * t
        return jnp.sum((x["a"] - t) ** 4 + (x["a"] - t) ** 2) + (
            jnp.sum((x["b"] - 2 * t) ** 2) + jnp.sum(r.real**2 + r.imag**2)
        )

    def loss(t):
        x = dl.minimize(fun, x0, t, solver=dl.LBFGS(flatten=False)).value
        return jnp.sum(x["a"] ** 3) + jnp.sum(x["b"])

    gradient, hessian = jax.jit(jax.vmap(lambda t: (jax.grad(loss)(t), jax.hessian(loss)(t))))(
        jnp.asarray([1.0, 2.0])
    )
    assert jnp.allclose(gradient, jnp.asarray([6.0, 24.0]) + 2 * x0["b"].size)
    assert jnp.allclose(hessian, jnp.asarray([12.0, 24.0]))
