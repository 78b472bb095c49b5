"""What `minimize` does on data, parameters and tasks that are spread over eight devices.

A program of its own, since the number of devices has to be known before JAX starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/eight_devices.py
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
MESH = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
SPREAD = NamedSharding(MESH, PartitionSpec("devices"))
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 6)), RNG.normal(size=64)
THETA = np.linspace(-1.0, 1.0, 6)


def inner(w, problem):
    theta, (x, y) = problem
    return jnp.mean((x @ w - y) ** 2 + jnp.log1p((x @ w) ** 2)) + jnp.exp(theta) @ w**2


def outer(w, problem):
    theta, (x, y) = problem
    return jnp.mean((x @ w - 2 * y) ** 2) + theta @ theta


def hypergradient(data, **settings):
    def loss(theta, data):
        w = dl.minimize(inner, jnp.zeros(6), (theta, data), **settings).value
        return outer(w, (theta, data))

    return jax.jit(jax.grad(loss)).lower(THETA, data).compile()


def collectives(program):
    return set(
        re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", program.as_text())
    )


def close(found, exact, tolerance=1e-10):
    return np.linalg.norm(found - exact) <= tolerance * np.linalg.norm(exact)


def raises(fragment, call):
    try:
        jax.block_until_ready(call())
    except RuntimeError as error:
        return fragment in str(error)
    return False


def test_sharded_data():
    alone = hypergradient((X, Y))(THETA, (X, Y))
    data = jax.device_put((X, Y), SPREAD)
    program = hypergradient(data)
    assert close(program(THETA, data), alone)
    assert collectives(program) == {"all-reduce"}
    step = jax.jit(dl.value_and_hypergrad(outer, inner))
    _, gradient, info = step((THETA, data), jnp.zeros(6))
    assert close(gradient[0], alone)
    assert gradient[1][0].sharding.is_equivalent_to(SPREAD, 2)
    assert info.error_estimate < 1e-8


def test_shard_map_in_the_objective():
    def mapped(w, theta, *data):
        return jax.lax.pmean(inner(w, (theta, data)), "devices")

    spread, whole = PartitionSpec("devices"), PartitionSpec()
    everywhere = jax.shard_map(
        mapped, mesh=MESH, in_specs=(whole, whole, spread, spread), out_specs=whole
    )

    def loss(theta, data):
        w = dl.minimize(lambda w, theta: everywhere(w, theta, *data), jnp.zeros(6), theta).value
        return outer(w, (theta, data))

    data = jax.device_put((X, Y), SPREAD)
    program = jax.jit(jax.grad(loss)).lower(THETA, data).compile()
    assert close(program(THETA, data), hypergradient((X, Y))(THETA, (X, Y)))
    assert collectives(program) == {"all-reduce"}


def test_failures_on_sharded_data():
    data = jax.device_put((X, Y), SPREAD)
    assert np.all(np.isnan(hypergradient(data, max_steps=1, throw=False)(THETA, data)))
    stopped = hypergradient(data, max_steps=1)
    assert raises("maximum number of solver steps", lambda: stopped(THETA, data))
    strict = dl.ImplicitAdjoint(rtol=0.0)
    starved = hypergradient(data, adjoint=strict)
    assert raises("true residual is above tolerance", lambda: starved(THETA, data))


def test_failures_of_lanes():
    thetas = jnp.stack([THETA, THETA + 1])

    def solve(theta, max_steps):
        return dl.minimize(inner, jnp.zeros(6), (theta, (X, Y)), max_steps=max_steps).value

    stopped = jax.jit(jax.vmap(lambda theta: solve(theta, 1)))
    assert raises("maximum number of solver steps", lambda: stopped(thetas))
    assert jax.vmap(lambda theta: solve(theta, 100))(thetas).shape == (2, 6)


def test_sharded_parameters():
    n = 8 * 512
    start = jax.device_put({"w": np.zeros(n)}, SPREAD)
    centre = jax.device_put(np.sin(np.arange(n)), SPREAD)

    def bowl(x, theta):
        return jnp.sum(jnp.cosh(x["w"] - theta * centre)) + 0.1 * jnp.sum(x["w"] ** 2) ** 1.5 / n

    def loss(theta, start, **settings):
        solver = dl.LBFGS(flatten=False)
        w = dl.minimize(bowl, start, theta, solver=solver, **settings).value["w"]
        return jnp.sum(w * centre), w

    program = jax.jit(jax.grad(loss, has_aux=True)).lower(1.5, start).compile()
    gradient, w = program(1.5, start)
    assert w.sharding.is_equivalent_to(SPREAD, 1)
    assert collectives(program) == {"all-reduce"}
    here = jax.tree.map(np.asarray, start)
    assert close(gradient, jax.grad(loss, has_aux=True)(1.5, here)[0])


def test_sharded_parameters_between_bounds():
    n = 8 * 64
    start = jax.device_put({"w": np.zeros(n)}, SPREAD)
    centre = jax.device_put(np.sin(np.arange(n)), SPREAD)
    upper = jax.device_put({"w": np.full(n, 0.5)}, SPREAD)

    def bowl(x, theta):
        return jnp.sum(jnp.cosh(x["w"] - theta * centre)) + 0.1 * jnp.sum(x["w"] ** 2) ** 1.5 / n

    def loss(theta, upper):
        solver = dl.LBFGS(flatten=False)
        solution = dl.minimize(bowl, start, theta, bounds=(-0.9, upper), solver=solver)
        return jnp.sum(solution.value["w"] * centre), (solution.value["w"], solution.active["w"])

    differentiate = jax.grad(loss, (0, 1), has_aux=True)
    program = jax.jit(differentiate).lower(1.5, upper).compile()
    gradients, (w, active) = program(1.5, upper)
    assert w.sharding.is_equivalent_to(SPREAD, 1)
    assert collectives(program) == {"all-reduce"}
    assert set(np.asarray(active)) == {-1, 0, 1}
    alone, _ = differentiate(1.5, jax.tree.map(np.asarray, upper))
    assert close(gradients[0], alone[0])
    assert close(gradients[1]["w"], alone[1]["w"])


def test_sharded_tasks():
    thetas = np.linspace(-1, 1, 16)[:, None] + THETA

    def solve(theta):
        return outer(dl.minimize(inner, jnp.zeros(6), (theta, (X, Y))).value, (theta, (X, Y)))

    spec = PartitionSpec("devices")
    spread = jax.shard_map(
        jax.vmap(jax.grad(solve)), mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False
    )
    found = jax.jit(spread)(jax.device_put(thetas, SPREAD))
    assert found.sharding.is_equivalent_to(SPREAD, 2)
    assert close(np.asarray(found), jax.jit(jax.vmap(jax.grad(solve)))(thetas))


if __name__ == "__main__":
    assert jax.device_count() == 8
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(name, flush=True)
