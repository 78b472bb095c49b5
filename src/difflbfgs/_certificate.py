"""A hypergradient, and how right it is.

With the inner objective `f`, the outer `F` and

    L(x, u, θ) = F(x, θ) - uᵀ ∇ₓf(x, θ),

the minimizer, the adjoint and the hypergradient are one set of equations: `∂L/∂u = 0` says that `x`
is stationary, `∂L/∂x = 0` that `H u = ∇ₓF`, and then `∂L/∂θ = dF/dθ`. What both solves left undone
are the residuals of the first two. One Newton step on them, `(x, u) → (x₊, u₊)`, squares the error,
so that the change of the third,

    ‖∂L/∂θ(x₊, u₊) - ∂L/∂θ(x, u)‖,

is the error of the hypergradient at `(x, u)` but for a term of second order, which is estimated by
what the step leaves of `∇ₓf`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difflbfgs import _vector
from difflbfgs._face import Smooth
from difflbfgs._krylov import ConjugateGradient
from difflbfgs._linear import Accuracy, Dense, Report, System
from difflbfgs._operator import SymmetricOperator
from difflbfgs._problem import Problem, differentiation, interior
from difflbfgs._solution import RESULTS, Outcome, count, has_converged
from difflbfgs._system import default_system
from difflbfgs._task import Task
from difflbfgs._vector import Count, Scalar, Vector

# How well the two systems of the estimate are solved: it is to be right within a factor, not exact.
ROUGHLY = 0.1
# The Newton step must shrink the gradient by this factor, or reach this many times its noise. On
# the tail of an exponential it would by e, and above a degenerate minimum, |x|³ or flatter, by 4
# to e.
_CONTRACTION = 0.2
_NOISE = 4.0


class Certified(eqx.Module):
    """A hypergradient in the terms of the interior; the rest is as in `HypergradInfo`."""

    outcome: Outcome
    value: Scalar
    gradient: list[Array]
    u: Vector
    result: Any
    num_adjoint_steps: Count
    num_estimate_steps: Count
    adjoint_residual: Scalar
    error_estimate: Scalar
    min_curvature: Scalar
    max_curvature: Scalar


class Guess(eqx.Module):
    """What approximates the minimizer, with its gradient, the adjoint and the hypergradient."""

    x: Vector
    g: Vector
    u: Vector
    gradient: list[Array]


class Estimate(eqx.Module):
    """What a Newton step says of a guess.

    Attributes:
        error: the estimate; infinite if it does not hold.
        after: the guess that it leads to.
        inner, adjoint: how the systems for `x` and for `u` were solved.
    """

    error: Scalar
    after: Guess
    inner: Report
    adjoint: Report

    def num_steps(self) -> Count:
        """Return the steps of both linear solves."""
        return self.inner.num_steps + self.adjoint.num_steps


def certified(task: Task, inner: Problem, outer: Problem, start: Vector | None) -> Certified:
    """Solve `inner`, and differentiate `outer` at its minimizer by `theta`."""
    with interior(inner.name):
        return _certified(task, inner, outer, start)


def _certified(task, inner, outer, start):
    outcome = task.solve(inner)
    inner = task.on_face(inner, outcome)
    own, exact = systems(task, inner, outcome)
    value, v = outer.value_and_gradient(outcome.x)
    u, report = task.solve_system(own, outcome, v, start)
    trusted = task.trusts(outcome) & (report.result == RESULTS.successful)
    guess, residual = guessed(task, inner, outer, outcome, u)
    noise = rounding(inner, outcome.x, exact)
    found = estimate(inner, outer, guess, exact, noise, ROUGHLY)
    certified = (report.result != RESULTS.successful) | jnp.isfinite(found.error)
    result = RESULTS.where(certified, report.result, RESULTS.uncertified)
    low, high = extremes(exact, *curvatures(report, found.adjoint, found.inner))
    return Certified(
        outcome=outcome,
        value=value,
        gradient=_vector.scale(jnp.where(trusted, 1, jnp.nan), guess.gradient),
        u=u,
        result=RESULTS.where(has_converged(outcome.result), result, outcome.result),
        num_adjoint_steps=report.num_steps,
        num_estimate_steps=further(own, exact, found.num_steps()),
        adjoint_residual=own.length(residual) / _vector.nonzero(own.length(v)),
        error_estimate=jnp.where(trusted, found.error, jnp.inf),
        min_curvature=low,
        max_curvature=high,
    )


def systems(task: Task, inner: Smooth, outcome: Outcome) -> tuple[System, System]:
    """Return `H u = v` as the adjoint solves it, and as an estimate does: if it can be, the same.

    The estimate knows no ridge, and asks for solutions of any accuracy.
    """
    x, ridge = outcome.x, task.adjoint.ridge
    H = SymmetricOperator.of(lambda p: inner.product(x, p), x)
    shifted = H if _is_nothing(ridge) else _shifted(H, ridge, inner.free, x)
    own = task.system(inner, shifted, outcome)
    if shifted is H and isinstance(own.solver, Dense | ConjugateGradient):
        return own, own
    return own, default_system(H, own.slack, own.options.get("preconditioner"))


def further(own: System, exact: System, num_steps: Count) -> Count:
    """Return the steps that an estimate took further: none if the factor of the adjoint serves."""
    return count(0) if exact is own and isinstance(own.solver, Dense) else num_steps


def guessed(
    task: Task, inner: Smooth, outer: Problem, outcome: Outcome, u: Vector
) -> tuple[Guess, Vector]:
    """Return what a solve and its adjoint found, and the residual of the adjoint."""
    x, g = outcome.x, outcome.state.g
    _, bent, v, gradient = _derivatives(inner, outer, x, u)
    residual = _vector.add_scaled(_vector.sub(v, bent), -task.adjoint.ridge, inner.free(u))
    return Guess(x, inner.free(g), u, gradient), residual


def lagrangian(inner: Smooth, outer: Problem, x: Vector, u: Vector) -> Scalar:
    """Return `F(x) - uᵀ∇f(x)`."""
    return outer.value(x) - _vector.dot(u, inner.gradient(x))


def _derivatives(inner, outer, x, u):
    """Return `∇f(x)`, `H u`, `∇F(x)` and `∂L/∂θ` at `(x, u)`."""

    def gradients(problem, x):
        with differentiation(problem.name):
            return jax.grad(lambda x, theta: problem.at(theta).value(x), (0, 1))(x, inner.theta)

    # Forward mode goes over reverse mode: under a `custom_vjp` in `f` the other way is barred.
    (g, _), (bent, by_inner) = jax.jvp(lambda x: gradients(inner, x), (x,), (u,))
    v, by_outer = gradients(outer, x)
    return g, bent, v, jax.tree.map(jnp.subtract, by_outer, by_inner)


def estimate(
    inner: Smooth, outer: Problem, guess: Guess, system: System, noise: Scalar, wanted: Any
) -> Estimate:
    """Estimate the error of a guess by a Newton step, its systems solved to a part `wanted`."""
    # Evaluated one rounding away, the gradient shows its noise, and hides none of it in an `x` that
    # was chosen because the noise happened to cancel there.
    g = inner.gradient(_rounded_off(guess.x))
    noise = system.length(_vector.sub(g, guess.g)) + noise
    before = system.length(g)
    e, of_x = system.solve(g, _up_to(wanted, before, noise))
    x = _vector.sub(guess.x, inner.free(e))
    g_after, bent, v, halfway = _derivatives(inner, outer, x, guess.u)
    left, rounded = _vector.sub(v, bent), system.rounding(guess.u, bent)
    du, of_u = system.solve(left, _up_to(wanted, system.length(left), rounded))
    u = _vector.add_scaled(guess.u, 1, du)
    *_, gradient = _derivatives(inner, outer, x, u)
    after = system.length(g_after)
    contracts = after <= _CONTRACTION * before + _NOISE * noise
    solved = (of_x.result == RESULTS.successful) & (of_u.result == RESULTS.successful)
    # What x and u do to the hypergradient may cancel, and the second order does not: it is the part
    # of either that the step leaves of the gradient, beyond what its system and rounding do.
    curved = jnp.maximum(after - of_x.residual * before - _NOISE * noise, 0)
    parts = _distance(halfway, guess.gradient) + _distance(gradient, halfway)
    error = _distance(gradient, guess.gradient) + curved / _vector.nonzero(before) * parts
    known = contracts & solved & jnp.isfinite(error) & inner.reaches(x)
    return Estimate(jnp.where(known, error, jnp.inf), Guess(x, g_after, u, gradient), of_x, of_u)


def _up_to(wanted: Any, length: Scalar, noise: Scalar) -> Accuracy:
    """Return how well to solve for a right-hand side of this length, of which so much is noise.

    Along a symmetry of the objective there may be nothing else in it, and no solution.
    """
    least = _NOISE * noise / _vector.nonzero(length)
    return Accuracy(wanted=wanted, accepted=jnp.maximum(least, ROUGHLY))


def _rounded_off(x: Vector) -> Vector:
    """Return `x` with every entry moved by about one rounding, up and down in a fixed pattern."""

    def move(leaf):
        return leaf * (1 + _vector.signs(leaf) * jnp.finfo(leaf.dtype).eps)

    return jax.tree.map(move, x)


def rounding(inner: Smooth, x: Vector, system: System) -> Scalar:
    """Return the rounding error to expect of the gradient at the least.

    It is a sum that cancels: of terms as large as `Hx`, which one rounding of `x` shows, and as
    `Bθ`, which one of `θ` shows. With the signs of `θ` in a pattern, `Bθ` does not cancel itself.
    """

    def gradient(theta):
        return inner.at(theta).gradient(x)

    def length(theta):
        return system.length(jax.jvp(gradient, (inner.theta,), (theta,))[1])

    theta = [leaf if jnp.isrealobj(leaf) else jnp.zeros_like(leaf) for leaf in inner.theta]
    mixed = [leaf * _vector.signs(leaf) * (-1) ** k for k, leaf in enumerate(theta)]
    along = jnp.maximum(length(theta), length(mixed))
    return _vector.epsilon(x) * (along + system.length(system.operator.mv(x)))


def _distance(after: list[Array], before: list[Array]) -> Scalar:
    """Return the 2-norm of the difference, and at least the rounding error of `before`."""

    def distances(after, before):
        return jnp.abs(after - before) + jnp.finfo(before.dtype).eps * jnp.abs(before)

    return _vector.norm(jax.tree.map(distances, after, before))


def curvatures(*reports: Report) -> tuple[Scalar, Scalar]:
    """Return the least and the largest curvature that were seen."""
    low = jnp.stack([report.min_curvature for report in reports]).min()
    return low, jnp.stack([report.max_curvature for report in reports]).max()


def extremes(system: System, low: Scalar, high: Scalar) -> tuple[Scalar, Scalar]:
    """Return the extreme eigenvalues of `H`, or as estimates from inside what was seen of it."""
    if isinstance(system.solver, Dense):
        return spectrum(system.solver.matrix(system.state))
    return low, high


def spectrum(matrix: Float[Array, "n n"]) -> tuple[Scalar, Scalar]:
    """Return the least eigenvalue of a symmetric matrix, and the one of largest size."""
    values = jnp.linalg.eigvalsh(matrix)
    return jnp.min(values), jnp.max(jnp.abs(values))


def _is_nothing(ridge: Any) -> bool:
    return isinstance(ridge, float | int) and ridge == 0


def _shifted(H, ridge, free, like):
    """Return `H + ridge I`, `I` being that of the free variables."""
    return SymmetricOperator.of(lambda p: _vector.add_scaled(H.mv(p), ridge, free(p)), like)
