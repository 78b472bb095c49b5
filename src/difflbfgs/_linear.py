"""`H u = v` for a symmetric `H`, solved with Lineax and verified.

No solver is taken at its word. The right-hand side is scaled to norm one, the residual `v - H u` is
computed anew from `H` itself, and the sign of the curvature along the way is kept: a symmetric
matrix that is not positive semidefinite is not the Hessian at a minimum.

Conjugate gradients: Nocedal & Wright, Numerical Optimization (2006), algorithm 5.3.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from difflbfgs import _vector
from difflbfgs._solution import RESULTS, count
from difflbfgs._vector import Count, Scalar, Vector

# Curvature within this many eps of zero, relative to the largest, is zero.
_ZERO_CURVATURE = 100.0


class Report(eqx.Module):
    """What is known about a solution of `H u = v`.

    Attributes:
        result: `successful`, `adjoint_not_converged` or `indefinite_hessian`.
        num_steps: steps of the linear solver; with conjugate gradients, products with `H`.
        residual: `‖v - H u‖ / ‖v‖`, recomputed.
        min_curvature: smallest curvature seen. Negative: `H` is not positive semidefinite.
        max_curvature: largest curvature seen.
    """

    result: Any
    num_steps: Count
    residual: Scalar
    min_curvature: Scalar
    max_curvature: Scalar


class ConjugateGradient(lx.AbstractLinearSolver):
    """Conjugate gradients that watch the curvature `pᵀHp`.

    It differs from `lineax.CG` in that it stops on the 2-norm of the residual and nothing else,
    stops where the curvature is zero or negative, reports the extreme Rayleigh quotients, and puts
    one copy of the operator into the program instead of three. Started from zero it stays in the
    range of `H`, so a singular but consistent system gets its solution of least norm.
    """

    rtol: Any
    max_steps: int = eqx.field(static=True)

    def init(self, operator, options):
        """Return the operator, linearised."""
        del options
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        """Solve from zero."""
        precondition = options["preconditioner"].mv if "preconditioner" in options else lambda r: r
        eps = _vector.epsilon(vector)
        target = self.rtol * _vector.norm(vector)

        def unfinished(carry):
            _, r, _, _, step, _, broken = carry
            return ~broken & (_vector.norm(r) > target) & (step < self.max_steps)

        def advance(carry):
            u, r, p, rz, step, (low, high), _ = carry
            hp = state.mv(p)
            curvature = _vector.dot(p, hp)
            quotient = curvature / _vector.dot(p, p)
            low, high = jnp.minimum(low, quotient), jnp.maximum(high, jnp.abs(quotient))
            broken = ~(quotient > eps * high)
            alpha = jnp.where(broken, 0, rz / jnp.where(broken, 1, curvature))
            u = _vector.add_scaled(u, alpha, p)
            r = _vector.add_scaled(r, -alpha, hp)
            z = precondition(r)
            rz_next = _vector.dot(r, z)
            p = _vector.add_scaled(z, rz_next / rz, p)
            return u, r, p, rz_next, step + 1, (low, high), broken

        z = precondition(vector)
        zero = jnp.zeros_like(target)
        start = (
            _vector.zeros_like(vector),
            vector,
            z,
            _vector.dot(vector, z),
            count(0),
            (zero + jnp.inf, zero),
            jnp.asarray(False),
        )
        u, r, _, _, step, (low, high), _ = jax.lax.while_loop(unfinished, advance, start)
        solved = _vector.norm(r) <= target
        result = lx.RESULTS.where(solved, lx.RESULTS.successful, lx.RESULTS.max_steps_reached)
        return u, result, {"num_steps": step, "min_curvature": low, "max_curvature": high}

    def transpose(self, state, options):
        """Return the state of the transpose, which is the same operator."""
        return state, options

    def conj(self, state, options):
        """Return the state of the conjugate, which is the same operator."""
        return state, options

    def assume_full_rank(self):
        """Return `True`, as `lineax.CG` does."""
        return True


class Dense(lx.AbstractLinearSolver):
    """Cholesky factorisation of the assembled matrix, once for all right-hand sides.

    Where it breaks down or meets a pivot at rounding level, an eigendecomposition takes over: it
    finds the solution of least norm if the matrix is singular, and tells how negative it is.
    """

    def init(self, operator, options):
        """Assemble and factorise."""
        del options
        matrix = operator.as_matrix()
        matrix = (matrix + matrix.T) / 2
        tagged = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
        factor = lx.Cholesky().init(tagged, {})
        pivots = jnp.diagonal(factor[0]) ** 2
        low, high = jnp.min(pivots), jnp.max(jnp.abs(jnp.diagonal(matrix)))
        sound = low > len(matrix) * jnp.finfo(matrix.dtype).eps * high
        return factor, self._spectrum(matrix, sound), (low, high), sound

    def _spectrum(self, matrix, sound):
        """Return the eigendecomposition, or zeros where the factorisation is `sound`.

        A loop of at most one trip, not a `cond`: under `vmap` it runs only if some lane needs it.
        """

        def decompose(_):
            return (*jnp.linalg.eigh(matrix), jnp.asarray(True))

        nothing = (jnp.zeros_like(matrix[0]), jnp.zeros_like(matrix), sound)
        finite = jnp.all(jnp.isfinite(matrix))
        return jax.lax.while_loop(lambda c: ~c[2] & finite, decompose, nothing)[:2]

    def compute(self, state, vector, options):
        """Solve with the factor, or with the eigendecomposition."""
        del options
        factor, (values, vectors), extremes, sound = state
        flat, unravel = ravel_pytree(vector)
        with_factor = lx.Cholesky().compute(factor, flat, {})[0]
        noise = _ZERO_CURVATURE * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(values))
        nonzero = jnp.abs(values) > noise
        inverse = jnp.where(nonzero, 1 / jnp.where(nonzero, values, 1), 0)
        with_spectrum = vectors @ (inverse * (vectors.T @ flat))
        low = jnp.where(sound, extremes[0], jnp.min(values))
        high = jnp.where(sound, extremes[1], jnp.max(jnp.abs(values)))
        solution = jnp.where(sound, with_factor, with_spectrum)
        stats = {"num_steps": count(flat.size), "min_curvature": low, "max_curvature": high}
        return unravel(solution), lx.RESULTS.successful, stats

    def transpose(self, state, options):
        """Return the state of the transpose, which is the same matrix."""
        return state, options

    def conj(self, state, options):
        """Return the state of the conjugate, which is the same matrix."""
        return state, options

    def assume_full_rank(self):
        """Return `True`: the adjoint's right-hand sides are not differentiated through here."""
        return True


def solve_verified(
    operator: lx.AbstractLinearOperator,
    v: Vector,
    solver: lx.AbstractLinearSolver,
    state: Any,
    options: dict[str, Any],
    accuracy: tuple[Any, Any],
    rounds: int,
) -> tuple[Vector, Report]:
    """Solve `H u = v` for `‖v‖ = 1`, verify, and refine on the true residual.

    Args:
        operator: `H`.
        v: right-hand side, of norm one or zero.
        solver: any Lineax solver.
        state: what `solver.init` made of the operator.
        options: the solver's options.
        accuracy: refine until the relative residual is below the first; accept below the second.
        rounds: how many times to solve, at most: once, and then for the residual that is left.

    Returns:
        `u` and a `Report`.
    """
    wanted, accepted = accuracy

    def unfinished(carry):
        _, _, (residual, before), report = carry
        return (report[0] == 0) | (
            (report[0] < rounds) & (residual > wanted) & (residual < 0.5 * before)
        )

    def refine(carry):
        u, r, (length, _), (rounds_done, steps, low, high) = carry
        unit = _vector.scale(1 / jnp.where(length > 0, length, 1), r)
        solution = lx.linear_solve(
            operator, unit, solver, options=options, state=state, throw=False
        )
        u = _vector.add_scaled(u, length, solution.value)
        r, before = _vector.sub(v, operator.mv(u)), r
        # Of a solver that does not watch, what is known is the curvature along its solution.
        along = _rayleigh(_vector.scale(length, solution.value), _vector.sub(before, r))
        along = jnp.where(_vector.norm(r) <= accepted * length, along, jnp.inf)
        low = jnp.minimum(low, solution.stats.get("min_curvature", along))
        high = jnp.maximum(
            high,
            solution.stats.get("max_curvature", jnp.where(jnp.isinf(along), 0, jnp.abs(along))),
        )
        steps = steps + jnp.asarray(solution.stats.get("num_steps", 0), jnp.int32)
        return u, r, (_vector.norm(r), length), (rounds_done + 1, steps, low, high)

    length = _vector.norm(v)
    extremes = (jnp.full_like(length, jnp.inf), jnp.zeros_like(length))
    start = (_vector.zeros_like(v), v, (length, length), (count(0), count(0), *extremes))
    u, _, (residual, _), (_, steps, low, high) = jax.lax.while_loop(unfinished, refine, start)
    converged = residual <= accepted
    indefinite = low < -_ZERO_CURVATURE * _vector.epsilon(v) * high
    result = RESULTS.where(converged, RESULTS.successful, RESULTS.adjoint_not_converged)
    result = RESULTS.where(indefinite, RESULTS.indefinite_hessian, result)
    return u, Report(result, steps, residual, low, high)


def _rayleigh(u, hu) -> Float[Array, ""]:
    """Return `uᵀHu / uᵀu`, given `H u`; infinite where `u` is zero."""
    square = _vector.dot(u, u)
    return jnp.where(square > 0, _vector.dot(u, hu) / jnp.where(square > 0, square, 1), jnp.inf)
