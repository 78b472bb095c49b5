"""What is in the compiled program: copies of the objective, arrays, memory."""

import concurrent.futures
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import difflbfgs as dl
from difflbfgs._program import _known, trace


def objective(x, theta):
    """Contains one error function, which marks the copies of the objective."""
    return jnp.sum(theta * (x - 1) ** 2) + jax.lax.erf(jnp.sum(x[:3]))


def copies(function, *args):
    """Count the marker in the optimised program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return len(re.findall(r" erf\(", text))


@pytest.mark.parametrize("polish", [0, 1, 3])
@pytest.mark.parametrize("throw", [True, False])
def test_at_most_three_copies_of_the_objective(polish, throw):
    def solve(theta):
        sol = dl.minimize(
            objective, jnp.zeros(9), theta, solver=dl.LBFGS(polish=polish), throw=throw
        )
        return sol.value, sol.objective, sol.result, sol.stats

    assert 1 <= copies(solve, 1.0) <= 3


N = 3000


def large(x, theta):
    return jnp.sum(theta * jnp.cosh(x - 0.5)) + 0.1 * jnp.sum((x[1:] - x[:-1]) ** 2)


def gradient_program(max_steps):
    def loss(theta):
        return jnp.sum(dl.minimize(large, jnp.zeros(N), theta, max_steps=max_steps).value ** 2)

    return jax.jit(jax.grad(loss)).lower(jnp.ones(N)).compile()


@pytest.mark.slow
def test_no_dense_matrix_and_nothing_that_grows_with_max_steps():
    short, long = gradient_program(321), gradient_program(76543)
    for program in (short, long):
        sizes = re.findall(r"f64\[([\d,]+)\]", program.as_text())
        largest = max(eval(size.replace(",", "*")) for size in sizes)
        assert largest <= 10 * N  # the memory of pairs
    memory = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert memory[0] == memory[1]
    assert memory[0] < 8 * N * (2 * 10 + 30)


@pytest.mark.slow
@pytest.mark.parametrize("flatten", [True, False])
def test_a_million_parameters(flatten):
    n, memory_size = 1_000_000, 10
    start = {"a": jnp.zeros((500, 1000)), "b": jnp.zeros(n // 2)}

    def centres(leaf):
        return jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)

    def bowl(x, theta):
        return sum(jnp.sum(jnp.cosh(leaf - theta * centres(leaf))) for leaf in x.values())

    def loss(theta):
        solver = dl.LBFGS(memory_size=memory_size, flatten=flatten)
        x = dl.minimize(bowl, start, theta, solver=solver).value
        return sum(jnp.sum(leaf**2) for leaf in x.values())

    program = jax.jit(jax.grad(loss)).lower(1.5).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 8 * n * (2 * memory_size + 20)
    exact = sum(2 * 1.5 * jnp.sum(centres(leaf) ** 2) for leaf in start.values())
    assert abs(program(1.5) - exact) < 1e-8 * exact


def test_small_problems_assemble_one_matrix_for_all_cotangents():
    def jacobian(theta):
        return jax.jacrev(lambda t: dl.minimize(objective, jnp.zeros(9), t).value)(theta)

    text = jax.jit(jacobian).lower(jnp.ones(9)).compile().as_text()
    assert len(re.findall(r"custom_call_target=\"lapack_dpotrf", text)) == 1
    assert not re.search(r"f64\[9,9,9\]", text)


@pytest.mark.usefixtures("optimized")
def test_a_positive_definite_matrix_is_not_decomposed():
    """XLA moves what does not change out of loops, and would compute it at every call."""

    def hypergradient(theta):
        return jax.grad(lambda t: jnp.sum(dl.minimize(objective, jnp.zeros(9), t).value))(theta)

    text = jax.jit(hypergradient).lower(jnp.ones(9)).compile().as_text()
    computations = [part for part in text.split("\n\n") if "_dsyevd" in part]
    bodies = re.findall(r" body=%([\w.-]+)", text)
    assert len(computations) == 1
    name = re.search(r"^%([\w.-]+) ", computations[0], re.MULTILINE)
    assert name is not None
    assert name[1] in bodies


def traced(activation):
    return trace(lambda x: jnp.sum(activation(x)), jnp.ones(3))[0]


def test_a_program_is_forgotten_with_the_last_who_uses_it():
    def scaled(factor):
        return traced(lambda x: factor * x**2)

    first = scaled(2.0)
    known = set(_known)
    assert scaled(2.0) is first
    assert set(_known) == known
    assert scaled(3.0) is not first
    assert set(_known) == known  # the other one is gone


def test_threads_that_trace_the_same_have_the_same_program():
    def some(_):
        return [traced(lambda x, factor=factor: factor * x**2) for factor in range(20)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(some, range(8))
    assert len(set(first)) == 20
    assert all(other == first for other in others)


RATE = 2.0


def forward_rule(rate, inner=lambda x: x**2):
    @jax.custom_jvp
    def square(x):
        return x**2

    @square.defjvp
    def rule(primals, tangents):
        return square(primals[0]), rate() * inner(primals[0]) * tangents[0]

    return square


def reverse_rule(bound):
    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -bound, bound),))
    return identity


def test_programs_are_the_same_only_if_their_custom_rules_are(monkeypatch):
    assert traced(forward_rule(lambda: 2.0)) is traced(forward_rule(lambda: 2.0))
    assert traced(forward_rule(lambda: 2.0)) is not traced(forward_rule(lambda: 3.0))
    assert traced(reverse_rule(1.0)) is traced(reverse_rule(1.0))
    assert traced(reverse_rule(1.0)) is not traced(reverse_rule(2.0))
    # The same function, but a global that its rule reads has changed.
    function = forward_rule(lambda: RATE)
    before = traced(function)
    assert before is traced(function)
    monkeypatch.setitem(globals(), "RATE", 3.0)
    assert before is not traced(function)
    # The same rule, in which another custom rule differs: the second derivative.
    two, three = (forward_rule(lambda rate=rate: rate) for rate in (2.0, 3.0))
    assert traced(forward_rule(lambda: 1.0, two)) is traced(forward_rule(lambda: 1.0, two))
    assert traced(forward_rule(lambda: 1.0, two)) is not traced(forward_rule(lambda: 1.0, three))
    # A closure, also inside a nested program.
    jitted = [jax.jit(forward_rule(lambda rate=rate: rate)) for rate in (2.0, 3.0)]
    assert traced(jitted[0]) is not traced(jitted[1])


@pytest.mark.parametrize(
    "activation",
    [
        jax.nn.relu,
        jax.nn.relu6,
        jax.nn.silu,
        lambda x: jnp.logaddexp(0.0, x),
        lambda x: jax.scipy.special.xlogy(x**2, x**2 + 1),
        lambda x: jax.scipy.special.entr(x**2 + 1),
        jax.scipy.special.log_ndtr,
        jax.scipy.stats.norm.logcdf,
        lambda x: optax.sigmoid_binary_cross_entropy(x, 0.3),
        lambda x: optax.safe_norm(x, 1e-3),
    ],
)
def test_objectives_with_custom_rules_are_known_again(activation):
    first, second = traced(activation), traced(lambda x: activation(x))
    assert first is second


def test_an_eager_loop_over_custom_rules_compiles_once():
    rate = 1.0

    @jax.custom_vjp
    def scaled(x):
        return x

    scaled.defvjp(lambda x: (x, None), lambda _, g: (rate * g,))
    compiled = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    def solve(theta, max_steps=2):
        options = {"solver": dl.LBFGS(polish=0), "max_steps": max_steps, "throw": False}

        def fun(x, t):
            return jnp.sum(scaled(x) ** 2 + t * x)

        return dl.minimize(fun, jnp.ones(2), theta, **options).value

    first = solve(1.0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    again = [solve(1.0 + k) for k in range(3)]
    solve(1.0, max_steps=3)  # is no part of the program
    assert not compiled
    assert jnp.array_equal(first, again[0])
    rate = -1.0  # what the closure holds has changed
    assert not jnp.array_equal(solve(1.0), first)
    assert compiled
