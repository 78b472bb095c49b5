"""Bad input: every error names the argument, the value received and the remedy."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import difflbfgs as dl
from problems import stubborn_square


def fun(x, theta):
    return jnp.sum((x - 1.0) ** 2)


X0 = jnp.zeros(2)
BAD_SETTINGS = [
    (lambda: dl.LBFGS(memory_size=0), ValueError, ["memory_size", "0", "at least 1"]),
    (lambda: dl.LBFGS(memory_size=2.5), TypeError, ["memory_size", "2.5", "integer"]),
    (lambda: dl.LBFGS(memory_size=True), TypeError, ["memory_size", "True", "integer"]),
    (lambda: dl.LBFGS(rtol=-1e-3), ValueError, ["rtol", "-0.001", "nonnegative", "1e-6"]),
    (lambda: dl.LBFGS(rtol=float("nan")), ValueError, ["rtol", "nan", "nonnegative"]),
    (lambda: dl.LBFGS(rtol="tight"), TypeError, ["rtol", "'tight'", "1e-6"]),
    (lambda: dl.LBFGS(atol=-1.0), ValueError, ["atol", "-1.0", "nonnegative"]),
    (lambda: dl.LBFGS(atol=None), TypeError, ["atol", "None", "number"]),
    (lambda: dl.LBFGS(atol=jnp.zeros(2)), ValueError, ["atol", "scalar"]),
    (lambda: dl.LBFGS(polish=-1), ValueError, ["polish", "-1", "at least 0"]),
    (lambda: dl.LBFGS(polish=1.0), TypeError, ["polish", "1.0", "integer"]),
    (lambda: dl.LBFGS(linesearch="zoom"), TypeError, ["linesearch", "'zoom'", "optax"]),
    (lambda: dl.LBFGS(flatten=1), TypeError, ["flatten", "1", "True or False"]),
    (lambda: dl.Unrolled(optax.sgd(0.1), 0), ValueError, ["num_steps", "0", "at least 1"]),
    (lambda: dl.Unrolled(optax.sgd(0.1), 1.5), TypeError, ["num_steps", "1.5", "integer"]),
    (lambda: dl.Unrolled(optax.sgd, 3), TypeError, ["optimizer", "sgd", "optax.sgd(0.1)"]),
    (lambda: dl.Unrolled(0.1, 3), TypeError, ["optimizer", "0.1", "optax.sgd(0.1)"]),
    (lambda: dl.ImplicitAdjoint(rtol=-1.0), ValueError, ["rtol", "-1.0", "nonnegative"]),
    (lambda: dl.ImplicitAdjoint(ridge=-1.0), ValueError, ["ridge", "-1.0", "nonnegative"]),
    (lambda: dl.ImplicitAdjoint(ridge="x"), TypeError, ["ridge", "'x'"]),
    (lambda: dl.ImplicitAdjoint(lx.CG), TypeError, ["linear_solver", "class CG", "lineax.CG("]),
    (lambda: dl.ImplicitAdjoint("cg"), TypeError, ["linear_solver", "'cg'", "lineax.CG("]),
    (lambda: dl.ForwardImplicitAdjoint(approximate=1), TypeError, ["approximate", "1"]),
]
BAD_CALLS = [
    ({"solver": dl.LBFGS}, TypeError, ["solver", "class LBFGS", "solver=LBFGS()"]),
    ({"solver": optax.lbfgs()}, TypeError, ["solver", "LBFGS()"]),
    ({"adjoint": dl.ImplicitAdjoint}, TypeError, ["adjoint", "class", "ImplicitAdjoint()"]),
    ({"adjoint": "implicit"}, TypeError, ["adjoint", "'implicit'", "ImplicitAdjoint()"]),
    ({"max_steps": 0}, ValueError, ["max_steps", "0", "at least 1"]),
    ({"max_steps": -5}, ValueError, ["max_steps", "-5", "at least 1"]),
    ({"max_steps": 1e3}, TypeError, ["max_steps", "1000.0", "integer"]),
    ({"has_aux": 1}, TypeError, ["has_aux", "1"]),
    ({"throw": None}, TypeError, ["throw", "None"]),
    ({"callback": 3}, TypeError, ["callback", "3", "progress_bar()"]),
    ({"state": 3}, TypeError, ["state", "3", "solution.state"]),
    ({"has_aux": True}, TypeError, ["has_aux=True", "pair", "float64[]"]),
    ({"x0": jnp.arange(3)}, ValueError, ["x0", "int64[3]", "0.0"]),
    ({"x0": {}}, ValueError, ["x0", "none"]),
    ({"x0": None}, ValueError, ["x0", "none"]),
    ({"x0": jnp.zeros(0)}, ValueError, ["x0", "at least one entry"]),
    ({"x0": "start"}, ValueError, ["x0", "str"]),
    ({"fun": 3}, TypeError, ["fun", "3", "fun(x, theta)"]),
    ({"fun": lambda x, t: x}, ValueError, ["fun", "(2,)", "jnp.sum"]),
    ({"fun": lambda x, t: x[:1]}, ValueError, ["fun", "(1,)", "jnp.sum"]),
    ({"fun": lambda x, t: jnp.sum(x) * 1j}, TypeError, ["fun", "complex128", "jnp.real"]),
    ({"fun": lambda x, t: 3}, TypeError, ["fun", "int", "floating-point"]),
    ({"fun": lambda x, t: None}, TypeError, ["fun", "None", "Return"]),
    ({"fun": lambda x, t: (jnp.sum(x**2), x)}, TypeError, ["fun", "tuple", "has_aux=True"]),
    ({"fun": lambda x, t: jnp.sum(x), "has_aux": True}, TypeError, ["has_aux=True", "pair"]),
]


def check(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(("call", "error", "fragments"), BAD_SETTINGS)
def test_bad_settings(call, error, fragments):
    check(call, error, fragments)


@pytest.mark.parametrize(("options", "error", "fragments"), BAD_CALLS)
def test_bad_calls(options, error, fragments):
    options = {"fun": fun, "x0": X0, **options}
    check(lambda: dl.minimize(**options), error, fragments)


def test_a_state_of_another_problem_is_refused():
    state = dl.minimize(fun, jnp.zeros(3)).state
    check(lambda: dl.minimize(fun, X0, state=state), ValueError, ["state", "3", "2", "x0"])
    check(
        lambda: dl.minimize(fun, jnp.zeros(3, jnp.float32), state=state),
        ValueError,
        ["state", "float32", "dtype"],
    )
    check(
        lambda: dl.minimize(fun, jnp.zeros(3), state=state, solver=dl.LBFGS(memory_size=3)),
        ValueError,
        ["state", "memory_size", "10", "3"],
    )


def test_an_objective_without_hessian_products_says_what_to_do():
    def stubborn(x, theta):
        return jnp.sum(stubborn_square(x - theta))

    plain, outer = {"solver": dl.LBFGS(polish=0)}, lambda x, _: jnp.sum(x)
    calls = [
        lambda t: dl.minimize(stubborn, X0, t).value,
        jax.grad(lambda t: jnp.sum(dl.minimize(stubborn, X0, t, **plain).value)),
        lambda t: dl.value_and_hypergrad(outer, stubborn, **plain)(t, X0),
    ]
    for call in calls:
        fragments = ["Hessian", "custom_vjp", "jax.custom_jvp", "DirectAdjoint()", "polish=0"]
        # Traced and not compiled: the error is there before a long compilation.
        check(lambda call=call: jax.make_jaxpr(call)(1.0), TypeError, fragments)


def root(p):
    """A solution of `x + x³ = p`, by a loop of unknown length."""

    def newton(x):
        return x - (x**3 + x - p) / (3 * x**2 + 1)

    return jax.lax.while_loop(lambda x: jnp.abs(x**3 + x - p) > 1e-9, newton, jnp.ones_like(p))


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda t: dl.minimize(lambda x, t: (root(x) - t) ** 2, 0.5, t).value, ["fun", "by x"]),
        (
            lambda t: (
                dl.minimize(
                    lambda x, t: (root(x) - t) ** 2, 0.5, t, solver=dl.Unrolled(optax.sgd(0.1), 3)
                ).value
            ),
            ["fun", "by x"],
        ),
        (
            lambda t: dl.value_and_hypergrad(lambda x, _: root(x), lambda x, t: (x - t) ** 2)(
                t, 0.5
            ),
            ["outer", "by x"],
        ),
        (
            jax.grad(lambda t: dl.minimize(lambda x, t: (x - root(t)) ** 2, 0.5, t).value),
            ["fun", "by theta", "stop_gradient"],
        ),
        (
            jax.grad(lambda t: dl.minimize(lambda x, t: (x - root(t)) ** 2, 0.5, t).objective),
            ["fun", "by theta", "stop_gradient"],
        ),
    ],
    ids=["fun", "unrolled", "outer", "theta", "theta-objective"],
)
def test_an_objective_without_derivatives_says_what_to_do(call, fragments):
    fragments = [*fragments, "while_loop", "jax.custom_jvp", "jax.lax.scan"]
    check(lambda: jax.make_jaxpr(call)(1.0), TypeError, fragments)


def test_a_callback_needs_as_many_rules_as_there_are_derivatives():
    shape = jax.ShapeDtypeStruct((), jnp.float64)

    def value(x, t):
        return jax.pure_callback(lambda x, t: np.asarray((x - t) ** 2), shape, x, t)

    def slope(x, t):
        return jax.pure_callback(lambda x, t: np.asarray(2 * (x - t)), shape, x, t)

    fun, slope_of_fun = jax.custom_vjp(value), jax.custom_vjp(slope)
    fun.defvjp(
        lambda x, t: (fun(x, t), (x, t)),
        lambda res, g: (g * slope_of_fun(*res), -g * slope_of_fun(*res)),
    )
    slope_of_fun.defvjp(lambda x, t: (slope(x, t), None), lambda _, g: (2 * g, -2 * g))
    plain = {"solver": dl.LBFGS(polish=0)}
    fragments = ["fun", "no gradient", "callback", "jax.custom_vjp"]
    check(lambda: dl.minimize(value, 0.0, 1.0), TypeError, fragments)
    for call in (
        lambda t: dl.minimize(fun, 0.0, t).value,
        jax.grad(lambda t: dl.minimize(fun, 0.0, t, **plain).value),
    ):
        check(lambda call=call: jax.make_jaxpr(call)(1.0), TypeError, ["fun", "Hess", "polish=0"])

    def solve(t):
        sol = dl.minimize(fun, 0.0, t, adjoint=dl.QuasiNewtonAdjoint(), **plain)
        return sol.value + sol.objective, sol.value

    gradient, value = jax.jit(jax.grad(solve, has_aux=True))(3.0)
    assert jnp.allclose(gradient, 1)
    assert jnp.allclose(value, 3)
    check(lambda: jax.make_jaxpr(jax.hessian(lambda t: solve(t)[0]))(3.0), TypeError, ["fun"])


def test_errors_are_the_same_under_jit():
    check(
        lambda: jax.jit(lambda x: dl.minimize(lambda x, t: x, x).value)(X0),
        ValueError,
        ["fun", "(2,)", "jnp.sum"],
    )


def test_tolerances_may_be_traced():
    loose, tight = (
        jax.jit(lambda rtol: dl.minimize(fun, X0, solver=dl.LBFGS(rtol=rtol)).stats.grad_norm)(r)
        for r in (1e-2, 1e-10)
    )
    assert tight <= loose


@dataclasses.dataclass
class Plain:
    w: object


@pytest.mark.parametrize("kind", [Plain, types.SimpleNamespace])
def test_a_class_that_is_no_pytree_is_told_to_become_one(kind):
    check(
        lambda: dl.minimize(lambda x, _: jnp.sum(x.w**2), kind(w=X0)),
        ValueError,
        ["x0", kind.__name__, "register_dataclass", "equinox.Module", "dict"],
    )


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="it is float64 here")
def test_a_dtype_that_jax_does_not_have_is_named():
    for kind in (np.longdouble, np.clongdouble):
        wide = np.ones(2, kind)
        name = str(wide.dtype)
        check(lambda x=wide: dl.minimize(fun, x), TypeError, ["x0", name, "numpy.asarray"])
        check(lambda x=wide: dl.minimize(fun, X0, x), TypeError, ["theta", name, "numpy.asarray"])
    rtol = np.longdouble(1e-3)
    check(lambda: dl.LBFGS(rtol=rtol), TypeError, ["rtol", str(rtol.dtype)])


def test_unrolled_solvers_of_equal_settings_are_equal():
    def made(rate, steps=3, maker=optax.sgd):
        return dl.Unrolled(maker(rate), steps)

    for maker in (optax.sgd, optax.adam):
        assert made(0.1, maker=maker) == made(0.1, maker=maker)
        assert hash(made(0.1, maker=maker)) == hash(made(0.1, maker=maker))
        assert made(0.1, maker=maker) != made(0.2, maker=maker)
    assert made(0.1) != made(0.1, steps=4)
    assert made(0.1) != made(0.1, maker=optax.adam)
    assert made(jnp.asarray(0.1)) != made(jnp.asarray(0.2))
    assert made(0.1) != dl.LBFGS()


def test_a_traced_negative_tolerance_counts_as_zero():
    def norm(rtol):
        solver = dl.LBFGS(rtol=rtol, atol=rtol)
        return dl.minimize(lambda x, _: jnp.sum(jnp.cosh(x - 1)), X0, solver=solver).stats

    solve = jax.jit(norm)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, solve(-0.5), solve(0.0)))
    assert solve(0.5).num_fun_evals < solve(0.0).num_fun_evals
