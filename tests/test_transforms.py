"""Every JAX transformation against the closed form, and proof that the rule ran."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import difflbfgs as dl
from problems import THETA, TIGHT, outer, relative_error, ridge, ridge_solution

REVERSE = dl.ImplicitAdjoint()
FORWARD = dl.ForwardImplicitAdjoint()


def minimizer(adjoint):
    return lambda theta: dl.minimize(ridge, jnp.zeros(5), theta, solver=TIGHT, adjoint=adjoint)


def outer_loss(adjoint):
    return lambda theta: outer(minimizer(adjoint)(theta).value)


def objective(adjoint):
    return lambda theta: minimizer(adjoint)(theta).objective


def aux(adjoint):
    """An auxiliary output that depends on theta directly and through the minimizer."""

    def fun(w, theta):
        return ridge(w, theta), jnp.sum(w**3) * theta[0] + theta[1] ** 2

    def solved(theta):
        return dl.minimize(
            fun, jnp.zeros(5), theta, solver=TIGHT, adjoint=adjoint, has_aux=True
        ).aux

    return solved


def exact_outer(theta):
    return outer(ridge_solution(theta))


def exact_objective(theta):
    return ridge(ridge_solution(theta), theta)


def exact_aux(theta):
    return jnp.sum(ridge_solution(theta) ** 3) * theta[0] + theta[1] ** 2


BATCH = jnp.stack([THETA, 2 * THETA, THETA - 1])
NESTED = jnp.stack([BATCH, BATCH + 0.5])

SCALAR_TRANSFORMS = {
    "grad": lambda f: jax.grad(f)(THETA),
    "jit-grad": lambda f: jax.jit(jax.grad(f))(THETA),
    "grad-jit": lambda f: jax.grad(jax.jit(f))(THETA),
    "vmap-grad": lambda f: jax.vmap(jax.grad(f))(BATCH),
    "grad-vmap": lambda f: jax.grad(lambda b: jnp.sum(jax.vmap(f)(b) ** 2))(BATCH),
    "vmap-vmap-grad": lambda f: jax.vmap(jax.vmap(jax.grad(f)))(NESTED),
    "jacrev-jacrev": lambda f: jax.jacrev(jax.jacrev(f))(THETA),
    "hessian": lambda f: jax.hessian(f)(THETA),
    "vmap-hessian": lambda f: jax.vmap(jax.hessian(f))(BATCH),
}
FORWARD_TRANSFORMS = {
    "jvp": lambda f: jax.jvp(f, (THETA,), (jnp.asarray([1.0, -2.0, 0.5]),))[1],
    "jacfwd": lambda f: jax.jacfwd(f)(THETA),
    "jacfwd-jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f))(THETA),
    "jacrev-jacfwd": lambda f: jax.jacrev(jax.jacfwd(f))(THETA),
    "vmap-jacfwd": lambda f: jax.vmap(jax.jacfwd(f))(BATCH),
}
CASES = [(REVERSE, name, output) for name in SCALAR_TRANSFORMS for output in ("value", "objective")]
CASES += [(FORWARD, name, "value") for name in [*FORWARD_TRANSFORMS, "grad", "hessian"]]
CASES += [(FORWARD, name, "objective") for name in ("jacfwd", "jacfwd-jacfwd")]


@pytest.mark.parametrize(
    ("adjoint", "name", "output"),
    CASES,
    ids=[f"{type(adjoint).__name__}-{name}-{output}" for adjoint, name, output in CASES],
)
def test_scalar_function(adjoint, name, output):
    """Against the same transformation of the closed form."""
    transform = {**SCALAR_TRANSFORMS, **FORWARD_TRANSFORMS}[name]
    found, exact = {
        "value": (outer_loss, exact_outer),
        "objective": (objective, exact_objective),
    }[output]
    jitted = transform if "jit" in name else jax.jit(transform, static_argnums=0)
    assert relative_error(jitted(found(adjoint)), transform(exact)) < 1e-9


@pytest.mark.parametrize("name", ["grad", "hessian"])
def test_aux_has_its_total_derivative(name):
    transform = SCALAR_TRANSFORMS[name]
    assert relative_error(transform(aux(REVERSE)), transform(exact_aux)) < 1e-9


@pytest.mark.parametrize(
    ("adjoint", "jacobian"),
    [
        (REVERSE, jax.jacrev),
        (REVERSE, lambda f: jax.jacrev(jax.jacrev(f))),
        (FORWARD, lambda f: jax.jacfwd(jax.jacfwd(f))),
    ],
    ids=["jacrev", "jacrev-jacrev", "jacfwd-jacfwd"],
)
def test_jacobians_of_the_minimizer(adjoint, jacobian):
    found = jax.jit(jacobian(lambda theta: minimizer(adjoint)(theta).value))(THETA)
    assert relative_error(found, jacobian(ridge_solution)(THETA)) < 1e-9


def test_forward_and_reverse_pass_the_dot_product_test():
    tangent, cotangent = jnp.asarray([0.3, -1.0, 2.0]), jnp.arange(5.0) - 1.7
    _, forward = jax.jvp(lambda t: minimizer(FORWARD)(t).value, (THETA,), (tangent,))
    _, pullback = jax.vjp(lambda t: minimizer(REVERSE)(t).value, THETA)
    (reverse,) = pullback(cotangent)
    assert abs(forward @ cotangent - reverse @ tangent) < 1e-12


def test_the_default_refuses_a_bare_jvp():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda t: minimizer(REVERSE)(t).value, (THETA,), (THETA,))


@jax.custom_vjp
def square(x):
    return x**2


square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * g * x,))


@pytest.mark.parametrize("transform", ["hessian", "jacfwd", "hypergradient"])
def test_reverse_mode_is_enough(transform):
    """An objective with a `jax.custom_vjp` has no forward mode; here parameters are mixed too."""

    def fun(x, theta):
        return jnp.sum(square(x - theta[0] * theta[1].imag)) + jnp.sum(x**2)

    def made(t):
        return t, jax.lax.complex(0.5 * t[0], t[1]).astype(jnp.complex64)

    x0, theta = jnp.zeros(2, jnp.float32), jnp.asarray([0.5, 1.5], jnp.float32)
    options = {"solver": dl.LBFGS(polish=0)}
    if transform == "hypergradient":
        step = dl.value_and_hypergrad(lambda x, t: jnp.sum(square(x)), fun, **options)
        derivative, scale = jax.grad(lambda t: step(made(t), x0)[0]), 0.25
    else:
        adjoint = FORWARD if transform == "jacfwd" else REVERSE
        derivative = getattr(jax, transform)(
            lambda t: dl.minimize(fun, x0, made(t), adjoint=adjoint, **options).objective
        )
        scale = 0.5
    exact = jax.hessian if transform == "hessian" else jax.grad
    found, right = jax.jit(derivative)(theta), exact(lambda t: scale * t[1] ** 2 * t @ t)(theta)
    assert found.dtype == jnp.float32
    assert relative_error(found, right) < 1e-5


def test_the_derivative_of_the_objective_alone_solves_no_adjoint_system():
    text = jax.jit(jax.grad(objective(REVERSE))).lower(THETA).compile().as_text()
    full = jax.jit(jax.grad(outer_loss(REVERSE))).lower(THETA).compile().as_text()
    assert "potrf" in full
    assert "potrf" not in text


def opaque_linesearch():
    """Return the zoom search, such that differentiating through it raises in either mode."""
    inner = optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one")

    @jax.custom_jvp
    def opaque(updates):
        return updates

    @opaque.defjvp
    def raising(primals, tangents):
        raise AssertionError("the inner loop was differentiated")

    def update(updates, state, params, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        return opaque(updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, adjoint: jax.grad(f(REVERSE)),
        lambda f, adjoint: jax.hessian(f(REVERSE)),
        lambda f, adjoint: jax.jacfwd(f(FORWARD)),
        lambda f, adjoint: jax.jacfwd(jax.jacfwd(f(FORWARD))),
    ],
    ids=["grad", "hessian", "jacfwd", "jacfwd-jacfwd"],
)
def test_the_rule_ran_and_not_the_loop(transform):
    solver = dl.LBFGS(rtol=1e-8, linesearch=opaque_linesearch())

    def loss(adjoint):
        return lambda t: outer(
            dl.minimize(ridge, jnp.zeros(5), t, solver=solver, adjoint=adjoint).value
        )

    derivative = jax.jit(transform(loss, None))(THETA)
    assert jnp.all(jnp.isfinite(derivative))


def test_the_derivative_by_x0_and_by_state_is_exactly_zero():
    def by_x0(x0):
        sol = dl.minimize(ridge, x0, THETA)
        return outer(sol.value) + sol.objective

    assert jnp.all(jax.jit(jax.grad(by_x0))(jnp.ones(5)) == 0)
    state = dl.minimize(ridge, jnp.ones(5), THETA).state

    def by_state(scale):
        warm = jax.tree.map(lambda s: s * scale.astype(s.dtype), state)
        return outer(dl.minimize(ridge, jnp.ones(5), THETA, state=warm).value)

    assert jax.grad(by_state)(jnp.asarray(1.0)) == 0


def test_the_proximal_form_brings_the_starting_point_back():
    """the anchor of a proximal term is differentiated, with dF/dθ = λ u."""
    weight = 2.0

    def fun(w, anchor):
        return ridge(w, THETA) + 0.5 * weight * jnp.sum((w - anchor) ** 2)

    def loss(anchor):
        return outer(dl.minimize(fun, anchor, anchor, solver=TIGHT).value)

    anchor = jnp.arange(5.0)
    w = dl.minimize(fun, anchor, anchor, solver=TIGHT).value
    hessian = jax.hessian(fun)(w, anchor)
    exact = weight * jnp.linalg.solve(hessian, jax.grad(outer)(w))
    assert relative_error(jax.grad(loss)(anchor), exact) < 1e-10


def test_closures_are_differentiated_like_theta():
    def loss(theta):
        return outer(dl.minimize(lambda w, _: ridge(w, theta), jnp.zeros(5), solver=TIGHT).value)

    exact = jax.grad(exact_outer)(THETA)
    assert relative_error(jax.jit(jax.grad(loss))(THETA), exact) < 1e-9
    assert relative_error(jax.vmap(jax.grad(loss))(BATCH)[0], exact) < 1e-9
    hessian = jax.hessian(exact_outer)(THETA)
    assert relative_error(jax.jit(jax.hessian(loss))(THETA), hessian) < 1e-9


def test_theta_may_hold_anything():
    theta = {"theta": THETA, "name": "ridge", "power": 2, "flag": True, "fun": jnp.sin, "no": None}

    def fun(w, theta):
        assert theta["name"] == "ridge"
        assert theta["flag"] is True
        return ridge(w, theta["theta"]) + 0 * jnp.sum(theta["fun"](w)) * theta["power"]

    def loss(values, ints):
        full = {**theta, "theta": values, "ints": ints}
        return outer(dl.minimize(fun, jnp.zeros(5), full, solver=TIGHT).value)

    gradient = jax.grad(loss)(THETA, jnp.arange(3))
    assert relative_error(gradient, jax.grad(exact_outer)(THETA)) < 1e-9


@pytest.mark.parametrize(("n", "columns"), [(8, 8), (70, 2), (70, 70), (1100, 34)])
def test_many_cotangents_are_solved_together_and_alike(n, columns):
    """By one factor, and beyond the dense limits in blocks of conjugate gradients and a rest."""
    A = np.random.default_rng(5).normal(size=(n, n))
    H = jnp.asarray(A @ A.T / n + np.eye(n))

    def fun(x, theta):
        return 0.5 * x @ (H @ x) - theta @ x + 0.1 * jnp.sum(jnp.cosh(x))

    def value(theta):
        return dl.minimize(fun, jnp.zeros(n), theta).value

    def rows(theta):
        _, vjp = jax.vjp(value, theta)
        return jax.vmap(lambda v: vjp(v)[0])(jnp.eye(n)[:columns])

    thetas = jnp.asarray(np.random.default_rng(6).normal(size=(2, n)))
    tasks = jax.jit(jax.vmap(rows))(thetas)
    for theta, task in zip(thetas, tasks, strict=True):
        x, vjp = jax.vjp(value, theta)
        exact = jnp.linalg.inv(H + 0.1 * jnp.diag(jnp.cosh(x)))
        assert relative_error(jax.jit(rows)(theta), exact[:columns]) < 1e-9
        assert relative_error(task, exact[:columns]) < 1e-9
        assert relative_error(vjp(jnp.eye(n)[3])[0], exact[3]) < 1e-9


def test_second_derivatives_factorise_once_for_all_of_their_columns():
    """`jax.hessian` is a `vmap` of 70 columns around one of a single one."""
    n = 70
    A = np.random.default_rng(5).normal(size=(n, n))
    H = jnp.asarray(A @ A.T / n + np.eye(n))

    def loss(theta):
        def fun(x, theta):
            return 0.5 * x @ (H @ x) - theta @ x

        return 0.5 * jnp.sum(dl.minimize(fun, jnp.zeros(n), theta).value ** 2)

    inverse = jnp.linalg.inv(H)
    theta = jnp.ones(n)
    assert relative_error(jax.hessian(loss)(theta), inverse @ inverse) < 1e-9
    assert "cholesky" in str(jax.make_jaxpr(jax.hessian(loss))(theta))
    assert "cholesky" not in str(jax.make_jaxpr(jax.grad(loss))(theta))


def test_one_of_many_cotangents_may_be_zero_or_refused():
    n = 70

    def fun(x, theta):
        return 0.5 * jnp.sum(jnp.arange(n) * (x - theta) ** 2)

    def value(theta):
        return dl.minimize(fun, jnp.ones(n), theta, throw=False).value

    _, vjp = jax.vjp(value, jnp.zeros(n))
    columns = jnp.eye(n)[jnp.asarray([0, 5, 7])].at[2].set(0.0)
    refused, right, zero = jax.vmap(lambda v: vjp(v)[0])(columns)
    assert jnp.all(jnp.isnan(refused) | (refused == 0)) & jnp.any(jnp.isnan(refused))
    assert relative_error(right, jnp.eye(n)[5]) < 1e-9
    assert jnp.all(zero == 0)
