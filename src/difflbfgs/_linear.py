"""`H u = v` for a symmetric `H`, solved with Lineax and verified.

No solver is taken at its word. The right-hand side is scaled to norm one, the residual `v - H u` is
computed anew from `H` itself, and the sign of the curvature along the way is kept: a symmetric
matrix that is not positive semidefinite is not the Hessian at a minimum.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from difflbfgs import _vector
from difflbfgs._krylov import ConjugateGradient, SymmetricSolver, is_negative, zero_curvature
from difflbfgs._operator import SymmetricOperator
from difflbfgs._solution import RESULTS, count
from difflbfgs._vector import Count, Flag, Scalar, Vector


class Report(eqx.Module):
    """What is known about a solution of `H u = v`.

    Attributes:
        result: `successful`, `adjoint_not_converged`, `nonfinite_hessian` or `indefinite_hessian`.
        num_steps: steps of the linear solver; with conjugate gradients, products with `H`.
        residual: `‖v - H u‖ / ‖v‖`, recomputed.
        min_curvature: smallest curvature seen. Negative: `H` is not positive semidefinite.
        max_curvature: largest curvature seen.
    """

    result: RESULTS
    num_steps: Count
    residual: Scalar
    min_curvature: Scalar
    max_curvature: Scalar


# Vectors of signs for row norms. Variables are scaled where these differ by the second, until they
# differ by no more than the third, in so many rounds at most.
_PROBES = 3
_SPREAD = 1e4
_EVEN = 1e2
_ROUNDS = 6
# What is left of `v` along curvature within the slack is solved for in the next round, if it is no
# more than turned directions leave. Below this part of the slack curvature is small by chance.
_CHANCE = 0.01


class Accuracy(eqx.Module):
    """Relative residuals: refine until below `wanted`, accept below `accepted`."""

    wanted: Any
    accepted: Any


class Dense(SymmetricSolver):
    """Cholesky factorisation of the assembled matrix, once for all right-hand sides.

    If it breaks down or meets a pivot at rounding level, an eigendecomposition takes over: it
    finds the solution of least norm if the matrix is singular, and tells how negative it is. There,
    eigenvalues within rounding or `slack` of zero are zero. Both see scaled variables, in which
    pivots, eigenvalues and residuals of variables in different units can be compared.

    Beside a minimum with a symmetry, such as the rotations of a molecule, the directions without
    curvature are `turned` by as much as the slack is of the least curvature that counts. They are
    not quite orthogonal to `v` then.
    """

    slack: Any = 0.0

    def init(self, operator, options):
        """Assemble and factorise."""
        del options
        matrix = operator.as_matrix()
        matrix = (matrix + matrix.T) / 2
        scale = diagonal_scales(jnp.diagonal(matrix), self.slack)
        matrix, scale = jax.lax.optimization_barrier((matrix, scale))  # computed once
        scaled = jax.lax.optimization_barrier(scale[:, None] * matrix * scale)
        tagged = lx.MatrixLinearOperator(scaled, lx.positive_semidefinite_tag)
        factor = lx.Cholesky().init(tagged, {})
        pivots = jnp.diagonal(factor[0]) ** 2
        low, high = jnp.min(pivots), jnp.max(jnp.abs(jnp.diagonal(scaled)))
        sound = low > len(matrix) * jnp.finfo(matrix.dtype).eps * high
        return (matrix, scale), factor, self._spectrum(scaled, sound), (low, high), sound

    def matrix(self, state):
        """Return the assembled matrix."""
        return state[0][0]

    def scale(self, state, like: Vector) -> Vector:
        """Return the scales of the variables in which it was factorised."""
        return ravel_pytree(like)[1](state[0][1])

    def extremes(self, state) -> tuple[Scalar, Scalar]:
        """Return the extreme curvatures, as far as pivots or eigenvalues tell them."""
        _, _, (values, _), (low, high), sound = state
        low = jnp.where(sound, low, jnp.min(values))
        return low, jnp.where(sound, high, jnp.max(jnp.abs(values)))

    def _spectrum(self, matrix, sound):
        """Return the eigendecomposition, or nothing of use if the factorisation is `sound`.

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
        (_, scale), factor, (values, vectors), _, sound = state
        flat, unravel = ravel_pytree(vector)
        flat = scale * flat
        with_factor = lx.Cholesky().compute(factor, flat, {})[0]
        nonzero = jnp.abs(values) > zero_curvature(jnp.max(jnp.abs(values)), self.slack)
        inverse = jnp.where(nonzero, 1 / jnp.where(nonzero, values, 1), 0)
        with_spectrum = vectors @ (inverse * (vectors.T @ flat))
        low, high = self.extremes(state)
        solution = jnp.where(sound, with_factor, with_spectrum)
        least = jnp.min(jnp.where(nonzero, jnp.abs(values), jnp.inf))
        stats = {
            "num_steps": count(flat.size),
            "min_curvature": low,
            "max_curvature": high,
            "turned": jnp.where(sound, 0, self.slack / least),
        }
        return unravel(scale * solution), lx.RESULTS.successful, stats


def diagonal_scales(diagonal: Any, slack: Any) -> Any:
    """Return scales `S` that make the diagonal of `S H S` one, or one if it is even already.

    An entry that is negative within `slack` is zero, and no curvature in a unit of its own.
    """
    rows = jax.tree.map(lambda d: jnp.where((d < 0) & (d >= -slack), 0, jnp.abs(d)), diagonal)
    apart = spread(rows) > _SPREAD
    return jax.tree.map(lambda leaf: jnp.where(apart, 1 / jnp.sqrt(leaf), 1), positive(rows))


def spread(rows: Any) -> Scalar:
    """Return the largest row norm over the smallest."""
    leaves = [leaf for leaf in jax.tree.leaves(positive(rows)) if leaf.size]
    least = jnp.stack([jnp.min(leaf) for leaf in leaves]).min()
    return jnp.stack([jnp.max(leaf) for leaf in leaves]).max() / least


def positive(rows: Any) -> Any:
    """Return row norms to divide by: those that are zero are as large as the largest."""
    largest = jnp.stack([jnp.max(leaf, initial=0) for leaf in jax.tree.leaves(rows)]).max()
    least, instead = jnp.finfo(largest.dtype).tiny, _vector.nonzero(largest)
    return jax.tree.map(lambda leaf: jnp.where(leaf > least, leaf, instead), rows)


class Equilibrium(eqx.Module):
    """Scales of variables, and what was seen of the Hessian on the way.

    Attributes:
        scale: scales `S` such that the rows of `S H S` are of one size, or one if those of `H` are.
        finite: whether the products are.
        energies: `vᵀHv` of the vectors that were asked for.
        products: Hessian products spent.
    """

    scale: Vector
    finite: Flag
    energies: Float[Array, " k"]
    products: Count


def equilibrate(hvp: Callable[[Vector], Vector], like: Vector, *others: Vector) -> Equilibrium:
    """Return scales of the variables of `H`, and the energies of `others`.

    Row norms are estimated from products with vectors of signs. Variables whose rows differ by
    orders of magnitude are scaled by `r^{-1/2}`, and again, as long as that is worth it: a row norm
    is no diagonal. (D. Ruiz, A scaling algorithm to equilibrate both rows and columns norms in
    matrices, RAL-TR-2001-034.) Elsewhere scaling would only cost products.
    """

    def vector(k):
        """Return a vector of signs, or one of the others."""
        p = _vector.rademacher(like, k)
        for i, other in enumerate(others):
            p = _vector.where(k == _PROBES + i, other, p)
        return p

    def unbalanced(carry):
        rounds, _, apart, *_ = carry
        return (rounds == 0) | (
            (apart > jnp.where(rounds == 1, _SPREAD, _EVEN)) & (rounds < _ROUNDS)
        )

    def probe(carry):
        rounds, scale, _, finite, energies = carry
        first = rounds == 0

        def add(total, k):
            p = vector(k)
            product = _vector.mul(scale, hvp(_vector.mul(scale, p)))
            square = jax.tree.map(lambda leaf: jnp.where(k < _PROBES, leaf**2, 0), product)
            return jax.tree.map(jnp.add, total, square), _vector.dot(p, product)

        nothing = _vector.zeros_like(like)
        squares, dots = jax.lax.scan(add, nothing, jnp.arange(_PROBES + len(others)))
        seen = jax.tree.map(lambda leaf: jnp.sqrt(leaf / _PROBES), squares)
        apart = spread(seen)
        uneven = (apart > jnp.where(first, _SPREAD, _EVEN)) & jnp.isfinite(apart)
        scale = jax.tree.map(
            lambda s, r: jnp.where(uneven, s / jnp.sqrt(r), s), scale, positive(seen)
        )
        finite = finite & jnp.all(jnp.isfinite(dots))
        energies = jnp.where(first, dots[_PROBES:], energies)
        return rounds + 1, scale, apart, finite, energies

    zero = jnp.zeros((), _vector.dtype(like))
    ones = jax.tree.map(jnp.ones_like, like)
    start = count(0), ones, zero, jnp.asarray(True), jnp.zeros(len(others), zero.dtype)
    rounds, scale, _, finite, energies = jax.lax.while_loop(unbalanced, probe, start)
    return Equilibrium(scale, finite, energies, rounds * (_PROBES + len(others)))


class System(eqx.Module):
    """`H u = v`, made ready once for any number of right-hand sides.

    Attributes:
        operator: `H`.
        scale: scales `S` of the variables; residuals are judged as `S (v - H u)`.
        finite: whether the products that told them are finite.
        scaled: the operator that conjugate gradients solve with: `S H S`.
        solver: any Lineax solver. `ConjugateGradient` is told by each solve how far to go.
        state: what `solver.init` made of the operator.
        options: the solver's options, perhaps a preconditioner.
        slack: curvature that says nothing, see `_krylov.slack`.
        rounds: how many times to solve, at most: once, and then for the residual that is left.
    """

    operator: lx.AbstractLinearOperator
    scale: Vector
    finite: Flag
    scaled: lx.AbstractLinearOperator
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
        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), operator.in_structure())
        scaled = operator
        if isinstance(solver, Dense):
            state = solver.init(operator, options)
            scale, finite = solver.scale(state, like), jnp.all(jnp.isfinite(solver.matrix(state)))
            return cls(operator, scale, finite, scaled, solver, state, options, slack, rounds)
        seen = equilibrate(operator.mv, like)
        scale, finite = seen.scale, seen.finite
        if isinstance(solver, ConjugateGradient) and preconditioner is None:
            scaled = SymmetricOperator.of(
                lambda p: _vector.mul(scale, operator.mv(_vector.mul(scale, p))), like
            )
        state = solver.init(scaled, options)
        return cls(operator, scale, finite, scaled, solver, state, options, slack, rounds)

    def length(self, r: Vector) -> Scalar:
        """Return the norm of a residual in scaled variables."""
        return _vector.norm(_vector.mul(self.scale, r))

    def rounding(self, u: Vector, hu: Vector) -> Scalar:
        """Return the rounding error of `H u`, given both: that of sums that cancel, if known."""
        eps = _vector.epsilon(u)
        if not isinstance(self.solver, Dense):
            return eps * self.length(hu)
        flat, unravel = ravel_pytree(u)
        return eps * self.length(unravel(jnp.abs(self.solver.matrix(self.state)) @ jnp.abs(flat)))

    def _left(self, r: Vector) -> Scalar:
        """Return the same of what is left of a right-hand side of norm one."""
        scaled = _vector.mul(self.scale, r)
        return jnp.sqrt(_vector.dot(scaled, scaled))

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
        length = self.length(v)
        unit = jax.tree.map(lambda leaf: leaf / _vector.nonzero(length), v)
        u, r = _vector.zeros_like(v), unit
        low, high = jnp.full_like(length, jnp.inf), jnp.zeros_like(length)
        if start is not None:
            guess = jax.tree.map(lambda leaf: leaf / _vector.nonzero(length), start)
            left = _vector.sub(unit, self.operator.mv(guess))
            better = self._left(left) < self._left(unit)
            u, r = _vector.where(better, (guess, left), (u, r))
            low, high = self._curvatures(u, _vector.sub(unit, r))
        u, report = self._refined(unit, u, r, (low, high), accuracy, indefinite)
        return _vector.scale(length, u), report

    def _in_scaled_variables(self) -> bool:
        """Return whether the solver is given `S H S`, as in `of`."""
        return isinstance(self.solver, ConjugateGradient) and not self.options

    def _curvatures(self, u, hu):
        """Return what a guess says of the curvature, as it may need no solve that does."""
        if isinstance(self.solver, Dense):
            return self.solver.extremes(self.state)
        if self._in_scaled_variables():
            u = jax.tree.map(jnp.divide, u, self.scale)
            hu = _vector.mul(self.scale, hu)
        along = _rayleigh(u, hu)
        return along, jnp.where(jnp.isinf(along), 0, jnp.abs(along))

    def _refined(self, v, u, r, extremes, accuracy, indefinite):
        """Solve from `u` with residual `r`, for a `v` of norm one or zero."""

        def unfinished(carry):
            _, _, (residual, before), (rounds, *_), _ = carry
            improving = (rounds == 0) | (residual < 0.5 * before)
            return (residual > accuracy.wanted) & (rounds < self.rounds) & improving

        def refine(carry):
            u, r, (length, _), (rounds, steps, low, high), turned = carry
            unit = jax.tree.map(lambda leaf: leaf / _vector.nonzero(length), r)
            step, solution = self._solution(unit, 0.5 * accuracy.wanted / length, length <= turned)
            refined = _vector.add_scaled(u, length, step)
            after = _vector.sub(v, self.operator.mv(refined))
            left = self._left(after)
            # Of a solver that does not watch, what is known is the curvature along its solution.
            along = _rayleigh(_vector.scale(length, step), _vector.sub(r, after))
            along = jnp.where(left <= accuracy.accepted * length, along, jnp.inf)
            low = jnp.minimum(low, solution.stats.get("min_curvature", along))
            size = jnp.where(jnp.isinf(along), 0, jnp.abs(along))
            high = jnp.maximum(high, solution.stats.get("max_curvature", size))
            steps = steps + jnp.asarray(solution.stats.get("num_steps", 0), jnp.int32)
            # A singular system that is not consistent can have grown worse.
            better = left < length
            u, r, left = _vector.where(better, (refined, after, left), (u, r, length))
            turned = jnp.maximum(turned, solution.stats.get("turned", 0))
            return u, r, (left, length), (rounds + 1, steps, low, high), turned

        length = self._left(r)
        counts = count(0), count(0), *extremes
        start = u, r, (length, length), counts, jnp.zeros_like(length)
        u, _, (residual, _), (_, steps, low, high), _ = jax.lax.while_loop(
            unfinished, refine, start
        )
        result = RESULTS.where(
            residual <= accuracy.accepted, RESULTS.successful, RESULTS.adjoint_not_converged
        )
        result = RESULTS.where(self.finite, result, RESULTS.nonfinite_hessian)
        if not indefinite:
            negative = is_negative(low, high, self.slack)
            result = RESULTS.where(negative, RESULTS.indefinite_hessian, result)
        return u, Report(result, steps, residual, low, high)

    def _solution(self, v, rtol, turned):
        """Return what the solver makes of `H u = v`, and what it says of it.

        If `v` is what `turned` directions left, they are not left out again.
        """
        solver = self.solver
        if isinstance(solver, Dense):
            solver = Dense(_vector.where(turned, _CHANCE * solver.slack, solver.slack))
        inner = self._in_scaled_variables()
        if isinstance(solver, ConjugateGradient):
            solver = ConjugateGradient(rtol, solver.max_steps)
        b = _vector.mul(self.scale, v) if inner else v
        found = lx.linear_solve(
            self.scaled, b, solver, options=self.options, state=self.state, throw=False
        )
        return _vector.mul(self.scale, found.value) if inner else found.value, found

    def steps(self, v: Vector, num_steps: int) -> lx.Solution:
        """Return what so many steps of conjugate gradients make of `H u = v`."""
        solver = ConjugateGradient(_vector.epsilon(v), num_steps)
        return lx.linear_solve(self.operator, v, solver, options=self.options, throw=False)


def _rayleigh(u, hu) -> Float[Array, ""]:
    """Return `uᵀHu / uᵀu`, given `H u`; infinite if `u` is zero."""
    square = _vector.dot(u, u)
    return jnp.where(square > 0, _vector.dot(u, hu) / jnp.where(square > 0, square, 1), jnp.inf)


def differentiable_solve(
    matvec: Callable, b: Vector, solve: Callable, has_aux: bool = False
) -> Any:
    """Solve a symmetric system by `solve`, and differentiate that by `matvec`."""
    b = _with_whole_tangent(b)
    return jax.lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=has_aux)


@jax.custom_jvp
def _with_whole_tangent(tree: PyTree) -> PyTree:
    """Return `tree`; if one leaf of its tangent is a symbolic zero, JAX's linear solve raises."""
    return tree


@_with_whole_tangent.defjvp
def _with_whole_tangent_jvp(primals, tangents):
    return primals[0], tangents[0]
