"""`H u = v` for a symmetric `H`, solved with Lineax and verified.

No solver is taken at its word. The right-hand side is scaled to norm one, the residual `v - H u` is
computed anew from `H` itself, and the sign of the curvature along the way is kept: a symmetric
matrix that is not positive semidefinite is not the Hessian at a minimum.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from difflbfgs import _vector
from difflbfgs._krylov import ConjugateGradient, SymmetricSolver, is_negative, zero_curvature
from difflbfgs._solution import RESULTS, count
from difflbfgs._vector import Count, Scalar, Vector


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


class Accuracy(eqx.Module):
    """Relative residuals: refine until below `wanted`, accept below `accepted`."""

    wanted: Any
    accepted: Any


class Dense(SymmetricSolver):
    """Cholesky factorisation of the assembled matrix, once for all right-hand sides.

    Where it breaks down or meets a pivot at rounding level, an eigendecomposition takes over: it
    finds the solution of least norm if the matrix is singular, and tells how negative it is. There,
    eigenvalues within rounding or `slack` of zero are zero.
    """

    slack: Any = 0.0

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
        return matrix, factor, self._spectrum(matrix, sound), (low, high), sound

    def matrix(self, state):
        """Return the assembled matrix."""
        return state[0]

    def _spectrum(self, matrix, sound):
        """Return the eigendecomposition, or nothing of use where the factorisation is `sound`.

        A loop of at most one trip, not a `cond`: under `vmap` it runs only if some lane needs it.
        The matrix is what the loop carries, as XLA moves what does not change out of loops, to
        where it would always be computed.
        """

        def decompose(carry):
            _, matrix, _ = carry
            return (*jnp.linalg.eigh(matrix), jnp.asarray(True))

        finite = jnp.all(jnp.isfinite(matrix))
        start = (jnp.zeros_like(matrix[0]), matrix, sound)
        return jax.lax.while_loop(lambda c: ~c[2] & finite, decompose, start)[:2]

    def compute(self, state, vector, options):
        """Solve with the factor, or with the eigendecomposition."""
        del options
        _, factor, (values, vectors), extremes, sound = state
        flat, unravel = ravel_pytree(vector)
        with_factor = lx.Cholesky().compute(factor, flat, {})[0]
        nonzero = jnp.abs(values) > zero_curvature(jnp.max(jnp.abs(values)), self.slack)
        inverse = jnp.where(nonzero, 1 / jnp.where(nonzero, values, 1), 0)
        with_spectrum = vectors @ (inverse * (vectors.T @ flat))
        low = jnp.where(sound, extremes[0], jnp.min(values))
        high = jnp.where(sound, extremes[1], jnp.max(jnp.abs(values)))
        solution = jnp.where(sound, with_factor, with_spectrum)
        stats = {"num_steps": count(flat.size), "min_curvature": low, "max_curvature": high}
        return unravel(solution), lx.RESULTS.successful, stats


class System(eqx.Module):
    """`H u = v`, made ready once for any number of right-hand sides.

    Attributes:
        operator: `H`.
        solver: any Lineax solver. `ConjugateGradient` is told by each solve how far to go.
        state: what `solver.init` made of the operator.
        options: the solver's options, perhaps a preconditioner.
        slack: curvature that says nothing, see `_krylov.slack`.
        rounds: how many times to solve, at most: once, and then for the residual that is left.
    """

    operator: lx.AbstractLinearOperator
    solver: lx.AbstractLinearSolver
    state: Any
    options: dict[str, Any]
    slack: Scalar
    rounds: int = eqx.field(static=True)

    @classmethod
    def of(
        cls,
        operator: lx.AbstractLinearOperator,
        solver: lx.AbstractLinearSolver,
        slack: Scalar,
        preconditioner: lx.AbstractLinearOperator | None = None,
        rounds: int = 3,
    ) -> "System":
        """Let the solver prepare."""
        options = {} if preconditioner is None else {"preconditioner": preconditioner}
        state = solver.init(operator, options)
        return cls(operator, solver, state, options, slack, rounds)

    def solve(
        self,
        v: Vector,
        accuracy: Accuracy,
        start: Vector | None = None,
        indefinite: bool = False,
    ) -> tuple[Vector, Report]:
        """Solve `H u = v`, verify, and refine on the true residual.

        Args:
            v: right-hand side, of any norm.
            accuracy: how far to go.
            start: a guess, used if it leaves a smaller residual than zero does.
            indefinite: take the solution of an indefinite system too.

        Returns:
            `u` and a `Report`.
        """
        length = _vector.norm(v)
        unit = _vector.unit(v)
        u, r = _vector.zeros_like(v), unit
        if start is not None:
            guess = jax.tree.map(lambda leaf: leaf / _vector.nonzero(length), start)
            left = _vector.sub(unit, self.operator.mv(guess))
            better = _vector.norm(left) < _vector.norm(unit)
            u, r = _vector.where(better, (guess, left), (u, r))
        u, report = self._refined(unit, u, r, accuracy, indefinite)
        return _vector.scale(length, u), report

    def _refined(self, v, u, r, accuracy, indefinite):
        """Solve from `u` with residual `r`, for a `v` of norm one or zero."""

        def unfinished(carry):
            _, _, (residual, before), (rounds, *_) = carry
            improving = (rounds == 0) | (residual < 0.5 * before)
            return (residual > accuracy.wanted) & (rounds < self.rounds) & improving

        def refine(carry):
            u, r, (length, _), (rounds, steps, low, high) = carry
            solution = self._solution(_vector.unit(r), 0.5 * accuracy.wanted / length)
            u = _vector.add_scaled(u, length, solution.value)
            r, before = _vector.sub(v, self.operator.mv(u)), r
            # Of a solver that does not watch, what is known is the curvature along its solution.
            along = _rayleigh(_vector.scale(length, solution.value), _vector.sub(before, r))
            along = jnp.where(_vector.norm(r) <= accuracy.accepted * length, along, jnp.inf)
            low = jnp.minimum(low, solution.stats.get("min_curvature", along))
            size = jnp.where(jnp.isinf(along), 0, jnp.abs(along))
            high = jnp.maximum(high, solution.stats.get("max_curvature", size))
            steps = steps + jnp.asarray(solution.stats.get("num_steps", 0), jnp.int32)
            return u, r, (_vector.norm(r), length), (rounds + 1, steps, low, high)

        length = _vector.norm(r)
        extremes = (jnp.full_like(length, jnp.inf), jnp.zeros_like(length))
        start = (u, r, (length, length), (count(0), count(0), *extremes))
        u, _, (residual, _), (_, steps, low, high) = jax.lax.while_loop(unfinished, refine, start)
        result = RESULTS.where(
            residual <= accuracy.accepted, RESULTS.successful, RESULTS.adjoint_not_converged
        )
        if not indefinite:
            negative = is_negative(low, high, self.slack)
            result = RESULTS.where(negative, RESULTS.indefinite_hessian, result)
        return u, Report(result, steps, residual, low, high)

    def _solution(self, v, rtol):
        solver = self.solver
        if isinstance(solver, ConjugateGradient):
            solver = ConjugateGradient(rtol, solver.max_steps)
        return lx.linear_solve(
            self.operator, v, solver, options=self.options, state=self.state, throw=False
        )

    def steps(self, v: Vector, num_steps: int) -> lx.Solution:
        """Return what so many steps of conjugate gradients make of `H u = v`."""
        solver = ConjugateGradient(_vector.epsilon(v), num_steps)
        return lx.linear_solve(self.operator, v, solver, options=self.options, throw=False)


def _rayleigh(u, hu) -> Float[Array, ""]:
    """Return `uᵀHu / uᵀu`, given `H u`; infinite where `u` is zero."""
    square = _vector.dot(u, u)
    return jnp.where(square > 0, _vector.dot(u, hu) / jnp.where(square > 0, square, 1), jnp.inf)
