"""The parts on their own, against naive second implementations."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import difflbfgs as dl
from difflbfgs import _linear, _memory, _vector
from difflbfgs._krylov import ConjugateGradient
from difflbfgs._program import trace
from problems import THETA, outer, quadratic, relative_error, ridge, ridge_solution


def test_norm_neither_overflows_nor_underflows():
    for scale in (1e-30, 1.0, 1e30):
        x = [jnp.asarray([3.0], jnp.float32) * scale, jnp.asarray([4.0], jnp.float32) * scale]
        assert jnp.allclose(_vector.norm(x), 5 * scale, rtol=1e-6)
    assert _vector.norm(jnp.zeros(3)) == 0
    assert not jnp.isfinite(_vector.norm(jnp.asarray([1.0, jnp.nan])))
    assert not jnp.isfinite(_vector.norm(jnp.asarray([1.0, jnp.inf])))


def dense_bfgs(pairs, gamma, n):
    """Return the inverse Hessian of the BFGS recursion, by N&W equation (7.16)."""
    P = gamma * np.eye(n)
    for s, y in pairs:
        rho = 1 / (s @ y)
        V = np.eye(n) - rho * np.outer(y, s)
        P = V.T @ P @ V + rho * np.outer(s, s)
    return P


def test_a_pair_placed_in_the_memory_is_the_one_optax_uses():
    rng = np.random.default_rng(3)
    x, g, s = (jnp.asarray(rng.normal(size=4)) for _ in range(3))
    y = jnp.asarray(np.diag([1.0, 2.0, 5.0, 9.0])) @ s
    engine = optax.lbfgs(memory_size=3, linesearch=None)
    state = engine.init(x)
    memory = _memory.moved(state[0], x, g, _memory.Pair(s, y))
    updates, _ = engine.update(g, (memory, *state[1:]), x)
    exact = -dense_bfgs([(np.asarray(s), np.asarray(y))], float(s @ y / (y @ y)), 4) @ np.asarray(g)
    assert relative_error(updates, exact) < 1e-12
    isotropic = _memory.Pair(g, 7 * g)
    memory = _memory.emptied(_memory.moved(memory, x, g, isotropic))
    updates, _ = engine.update(g, (memory, *state[1:]), x)
    assert relative_error(updates, -g / 7) < 1e-12


def operator(matrix):
    matrix = jnp.asarray(matrix)
    structure = jax.ShapeDtypeStruct((len(matrix),), matrix.dtype)
    tags = (lx.symmetric_tag, lx.positive_semidefinite_tag)
    return lx.FunctionLinearOperator(lambda p: matrix @ p, structure, tags)


def solve(matrix, b, solver, rounds=3, accuracy=(1e-11, 1e-8)):
    H = operator(matrix)
    b = jnp.asarray(b) / np.linalg.norm(b)
    return _linear.System.of(H, solver, jnp.zeros(()), rounds=rounds).solve(
        b, _linear.Accuracy(*accuracy)
    )


SOLVERS = [_linear.Dense(), ConjugateGradient(5e-12, 1000)]


def spd(condition, n=12, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return q @ np.diag(np.logspace(0, np.log10(condition), n)) @ q.T, q


@pytest.mark.parametrize("solver", SOLVERS, ids=["dense", "cg"])
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e6])
def test_linear_solve(solver, condition):
    H, q = spd(condition)
    b = q @ np.ones(12)
    u, report = solve(H, b, solver)
    assert report.result == dl.RESULTS.successful
    assert report.residual < 1e-10
    assert relative_error(u, np.linalg.solve(H, b / np.linalg.norm(b))) < 1e-10 * condition
    assert 0.99 <= report.min_curvature
    assert report.max_curvature <= 1.01 * condition


@pytest.mark.parametrize("solver", SOLVERS, ids=["dense", "cg"])
def test_indefinite_matrix_is_noticed(solver):
    H, q = spd(10.0)
    H = H - 12 * np.outer(q[:, 3], q[:, 3])
    _, report = solve(H, q @ np.ones(12), solver)
    assert report.result == dl.RESULTS.indefinite_hessian
    assert report.min_curvature < 0


@pytest.mark.parametrize("solver", SOLVERS, ids=["dense", "cg"])
@pytest.mark.parametrize("consistent", [True, False])
def test_singular_matrix(solver, consistent):
    H, q = spd(10.0)
    H = H @ (np.eye(12) - np.outer(q[:, 0], q[:, 0]))
    b = q[:, 1:] @ np.arange(1.0, 12.0) + (0 if consistent else 1) * q[:, 0]
    u, report = solve((H + H.T) / 2, b, solver)
    if consistent:
        assert report.result == dl.RESULTS.successful
        assert relative_error(u, np.linalg.pinv(H) @ (b / np.linalg.norm(b))) < 1e-8
    else:
        assert report.result == dl.RESULTS.adjoint_not_converged


def test_a_solver_that_lies_is_found_out():
    """lineax calls LU on a singular matrix successful, and CG with a tiny right-hand side too."""
    H, q = spd(10.0)
    H = H @ (np.eye(12) - np.outer(q[:, 0], q[:, 0]))
    _, report = solve((H + H.T) / 2, q[:, 0], lx.LU(), rounds=1)
    assert report.result == dl.RESULTS.adjoint_not_converged
    _, report = solve(spd(1e4)[0], q @ np.ones(12), lx.CG(0.5, 0.5), rounds=1)
    assert report.result == dl.RESULTS.adjoint_not_converged


@pytest.mark.slow
@pytest.mark.parametrize(
    "linear_solver", [lx.CG(1e-12, 1e-12), lx.Cholesky(), lx.LU(), lx.SVD(), lx.GMRES(1e-12, 1e-12)]
)
def test_any_lineax_solver_may_be_given(linear_solver):
    adjoint = dl.ImplicitAdjoint(linear_solver=linear_solver)

    def loss(theta):
        return outer(dl.minimize(ridge, jnp.zeros(5), theta, adjoint=adjoint).value)

    exact = jax.grad(lambda t: outer(ridge_solution(t)))(THETA)
    assert relative_error(jax.grad(loss)(THETA), exact) < 1e-8


def test_ridge_is_added_to_the_hessian():
    adjoint = dl.ImplicitAdjoint(ridge=0.7)

    def loss(theta):
        return outer(dl.minimize(ridge, jnp.zeros(5), theta, adjoint=adjoint).value)

    w = ridge_solution(THETA)
    H = jax.hessian(ridge)(w, THETA) + 0.7 * jnp.eye(5)
    B = jax.jacfwd(jax.grad(ridge), argnums=1)(w, THETA)
    exact = -B.T @ jnp.linalg.solve(H, jax.grad(outer)(w))
    assert relative_error(jax.grad(loss)(THETA), exact) < 1e-10


@pytest.mark.parametrize("checkpoint", [False, True])
def test_unrolled_is_differentiated_through_its_steps(checkpoint):
    def by_hand(x0, theta):
        for _ in range(7):
            x0 = x0 - 0.2 * jax.grad(ridge)(x0, theta)
        return outer(x0)

    def found(x0, theta):
        solver = dl.Unrolled(optax.sgd(0.2), 7, checkpoint=checkpoint)
        return outer(dl.minimize(ridge, x0, theta, solver=solver).value)

    for argument in (0, 1):
        exact = jax.grad(by_hand, argument)(jnp.ones(5), THETA)
        assert relative_error(jax.grad(found, argument)(jnp.ones(5), THETA), exact) < 1e-12


def test_unrolled_memory_grows_and_checkpointing_tames_it():
    def temporary(num_steps, checkpoint):
        def loss(theta):
            solver = dl.Unrolled(optax.sgd(0.1, momentum=0.9), num_steps, checkpoint)
            return outer(dl.minimize(ridge, jnp.zeros(5), theta, solver=solver).value)

        return jax.jit(jax.grad(loss)).lower(THETA).compile().memory_analysis().temp_size_in_bytes

    assert temporary(6400, False) > 3 * temporary(1600, False)
    assert temporary(6400, True) < 0.1 * temporary(6400, False)


def test_unrolled_that_diverges_says_so():
    solver = dl.Unrolled(optax.sgd(100.0), 300)
    with pytest.raises(RuntimeError, match="diverged"):
        dl.minimize(ridge, jnp.ones(5), THETA, solver=solver)
    sol = dl.minimize(ridge, jnp.ones(5), THETA, solver=solver, throw=False)
    assert not sol.converged
    warm = dl.minimize(ridge, jnp.ones(5), THETA, solver=dl.Unrolled(optax.sgd(0.1), 3))
    again = dl.minimize(
        ridge, jnp.ones(5), THETA, solver=dl.Unrolled(optax.sgd(0.1), 3), state=warm.state
    )
    six = dl.minimize(ridge, jnp.ones(5), THETA, solver=dl.Unrolled(optax.sgd(0.1), 6))
    assert jnp.allclose(again.value, six.value)


def test_programs_are_compared_by_what_they_compute():
    def made(factor, extra=0.0):
        return trace(lambda x: jnp.tanh(factor * x) + jax.nn.softplus(x) + extra, jnp.ones(3))[0]

    assert made(2.0) == made(2.0)
    assert hash(made(2.0)) == hash(made(2.0))
    assert made(2.0) != made(3.0)
    assert made(2.0, 0.0) != made(2.0, -0.0)
    assert made(2.0) != trace(lambda x: jnp.tanh(2.0 * x), jnp.ones(3))[0]

    def clipped(bound):
        @jax.custom_vjp
        def identity(x):
            return x

        identity.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -bound, bound),))
        return trace(identity, jnp.ones(3))[0]

    assert clipped(1.0) != clipped(2.0)


def test_inverse_hessian_equals_the_dense_recursion():
    fun, _, theta = quadratic(1e2, n=6)
    for steps in (3, 5, 12):
        solver = dl.LBFGS(memory_size=4, polish=0)
        state = dl.minimize(
            fun, jnp.zeros(6), theta, solver=solver, max_steps=steps, throw=False
        ).state
        memory = state.memory
        newest = _memory.newest(memory, state.x, state.g)
        slots = [(int(memory.count) + i) % 4 for i in range(4)]
        rows = [(memory.diff_params_memory[i], memory.diff_updates_memory[i]) for i in slots]
        rows[-1] = (newest.s, newest.y)
        pairs = [(np.asarray(s), np.asarray(y)) for s, y in rows if float(s @ y) > 0]
        s, y = pairs[-1]
        exact = dense_bfgs(pairs, s @ y / (y @ y), 6)
        product = _memory.inverse_hessian(memory, state.x, state.g)
        found = jnp.stack([product(e) for e in jnp.eye(6)])
        assert relative_error(found, exact) < 1e-10
        assert jnp.min(jnp.linalg.eigvalsh(found)) > 0


def preconditioned(preconditioner, flatten=True, throw=True):
    adjoint = dl.ImplicitAdjoint(preconditioner=preconditioner)
    solver = dl.LBFGS(flatten=flatten)

    def loss(theta):
        options = {"adjoint": adjoint, "solver": solver, "throw": throw}
        return outer(dl.minimize(ridge, jnp.zeros(5), theta, **options).value)

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("kind", ["lbfgs", "function"])
def test_preconditioners(kind, flatten):
    def exact_inverse(w, theta):
        H = jax.hessian(ridge)(w, theta)
        return lx.MatrixLinearOperator(jnp.linalg.inv(H), lx.positive_semidefinite_tag)

    loss = preconditioned("lbfgs" if kind == "lbfgs" else exact_inverse, flatten)
    exact = jax.grad(lambda t: outer(ridge_solution(t)))
    assert relative_error(jax.jit(jax.grad(loss))(THETA), exact(THETA)) < 1e-8
    hessian = jax.hessian(lambda t: outer(ridge_solution(t)))(THETA)
    assert relative_error(jax.jit(jax.hessian(loss))(THETA), hessian) < 1e-8


def test_a_preconditioner_that_is_not_positive_is_never_silently_wrong():
    def wrong(w, theta):
        return lx.MatrixLinearOperator(
            jnp.diag(jnp.asarray([1.0, -1.0, 1.0, -2.0, 1.0])), lx.positive_semidefinite_tag
        )

    exact = jax.grad(lambda t: outer(ridge_solution(t)))(THETA)
    error = relative_error(jax.grad(preconditioned(wrong, throw=False))(THETA), exact)
    assert not error > 1e-8  # right, or NaN


def test_bad_preconditioners_are_refused():
    with pytest.raises(ValueError, match="preconditioner must be None, 'lbfgs' or a function"):
        dl.ImplicitAdjoint(preconditioner="jacobi")
    with pytest.raises(TypeError, match="must return a lineax operator"):
        preconditioned(lambda w, theta: jnp.eye(5))(THETA)
    with pytest.raises(TypeError, match="positive_semidefinite_tag"):
        preconditioned(lambda w, theta: lx.MatrixLinearOperator(jnp.eye(5)))(THETA)
