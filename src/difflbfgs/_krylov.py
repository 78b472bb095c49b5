"""Conjugate gradients that watch the curvature, and the Ritz values that they find on the way.

Conjugate gradients: Nocedal & Wright, Numerical Optimization (2006), algorithm 5.3. Their
coefficients are those of a Lanczos tridiagonal matrix `T = RᵀR` with `R` upper bidiagonal, whose
eigenvalues, the Ritz values, lie in the spectrum of `H`. The extreme ones are followed without
storing `T`: G. Meurant and P. Tichý, Approximating the extreme Ritz values and upper bounds for the
A-norm of the error in CG, Numerical Algorithms 82 (2019).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from difflbfgs import _vector
from difflbfgs._solution import count
from difflbfgs._vector import Flag, Scalar, Vector

# Curvature within this many eps of zero, relative to the largest, is zero.
_ROUNDING = 100.0
_SLACK = 10.0


def slack(x: Vector, grad_norm: Scalar) -> Scalar:
    """Return the curvature, of either sign, that a gradient of this norm explains.

    Along a symmetry of the objective, such as the rotations of a molecule, there is none at the
    minimum. Beside it there is: with `A` the generator of a rotation, `H A x = A g`.
    """
    length = _vector.norm(x)
    return jnp.where(length > 0, _SLACK * grad_norm / _vector.nonzero(length), 0)


def zero_curvature(high: Scalar, slack: Any) -> Scalar:
    """Return how far from zero a curvature may be and mean nothing, given the largest.

    No more than `√eps` of the largest is forgiven for the sake of a slack.
    """
    eps = jnp.finfo(high.dtype).eps
    return jnp.maximum(_ROUNDING * eps * high, jnp.minimum(slack, eps**0.5 * high))


def is_negative(low: Scalar, high: Scalar, slack: Scalar) -> Flag:
    """Return whether the lowest curvature is negative beyond rounding and a `slack`."""
    return low < -zero_curvature(high, slack)


class Ritz(eqx.Module):
    """Estimates from inside of the extreme eigenvalues of `H`, for one more column of `R` a step.

    With unit vectors `z` and `y` that nearly maximize `‖Rz‖` and `‖R⁻¹y‖`, and `q` the last column
    of `R⁻¹`: `high = ‖Rz‖²`, `inverse = ‖R⁻¹y‖²`, `last` is the last entry of `z`, `square = ‖q‖²`
    and `product = qᵀR⁻¹y`.
    """

    high: Scalar
    last: Scalar
    inverse: Scalar
    square: Scalar
    product: Scalar

    @classmethod
    def initial(cls, zero: Scalar) -> "Ritz":
        """Return what the first step, with `previous` one and `beta` zero, starts from."""
        return cls(zero, zero, zero, zero, zero)

    def after(self, alpha: Scalar, previous: Scalar, beta: Scalar) -> "Ritz":
        """Return the estimates after a step of length `alpha`, the one before being `previous`."""
        cross = jnp.sqrt(beta) / previous * self.last
        high, (_, last) = _largest_eigenpair(self.high, cross, beta / previous + 1 / alpha)
        square = alpha * (beta / previous * self.square + 1)
        cross = -jnp.sqrt(beta * alpha / previous) * self.product
        inverse, (s, c) = _largest_eigenpair(self.inverse, cross, square)
        return Ritz(high, last, inverse, square, s * cross + c * square)


def _largest_eigenpair(a, b, d):
    """Return the largest eigenvalue of `[[a, b], [b, d]]` and its unit eigenvector."""
    half = (a - d) / 2
    radius = jnp.hypot(half, b)
    s, c = jnp.where(half >= 0, half + radius, b), jnp.where(half >= 0, b, radius - half)
    length = _vector.nonzero(jnp.hypot(s, c))
    return (a + d) / 2 + radius, (s / length, c / length)


class SymmetricSolver(lx.AbstractLinearSolver):
    """What solvers for real symmetric operators have in common."""

    def transpose(self, state, options):
        """Return the state of the transpose, which is the same operator."""
        return state, options

    def conj(self, state, options):
        """Return the state of the conjugate, which is the same operator."""
        return state, options

    def assume_full_rank(self):
        """Return `True`: Lineax is not asked to differentiate by the operator."""
        return True


class ConjugateGradient(SymmetricSolver):
    """Conjugate gradients that watch the curvature `pᵀHp`.

    It differs from `lineax.CG` in that it stops on the 2-norm of the residual and nothing else,
    stops where the curvature is zero or negative, returns the iterate of least residual, reports
    the extreme curvatures, and puts one copy of the operator into the program instead of three.
    Started from zero it stays in the range of `H`, so a singular but consistent system gets its
    solution of least norm.

    The curvatures are Ritz values; with a preconditioner, whose Ritz values are not those of `H`,
    Rayleigh quotients of the search directions.
    """

    rtol: Any
    max_steps: int = eqx.field(static=True)

    def init(self, operator, options):
        """Return the operator, linearised."""
        del options
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        """Solve from zero."""
        preconditioned = "preconditioner" in options
        precondition = options["preconditioner"].mv if preconditioned else lambda r: r
        eps = _vector.epsilon(vector)
        target = self.rtol * _vector.norm(vector)

        def unfinished(carry):
            _, _, _, (square, _), step, *_, broken, _ = carry
            return ~broken & (jnp.sqrt(square) > target) & (step < self.max_steps)

        def advance(carry):
            u, r, p, (_, rz), step, (low, high), ritz, (previous, beta), _, best = carry
            hp = state.mv(p)
            curvature = _vector.dot(p, hp)
            quotient = curvature / _vector.dot(p, p)
            low, high = jnp.minimum(low, quotient), jnp.maximum(high, jnp.abs(quotient))
            broken = ~(quotient > eps * high)
            alpha = jnp.where(broken, 0, rz / jnp.where(broken, 1, curvature))
            ritz = _vector.where(broken, ritz, ritz.after(alpha, previous, beta))
            u = _vector.add_scaled(u, alpha, p)
            r = _vector.add_scaled(r, -alpha, hp)
            z = precondition(r)
            rz_next = _vector.dot(r, z)
            beta = rz_next / rz
            p = _vector.add_scaled(z, beta, p)
            square = _vector.dot(r, r)
            best = _vector.where(square < best[1], (u, square), best)
            extremes, last = (low, high), (alpha, beta)
            return u, r, p, (square, rz_next), step + 1, extremes, ritz, last, broken, best

        z = precondition(vector)
        zero, one = jnp.zeros_like(target), jnp.ones_like(target)
        nothing, first = _vector.zeros_like(vector), _vector.dot(vector, vector)
        start = (
            nothing,
            vector,
            z,
            (first, _vector.dot(vector, z)),
            count(0),
            (zero + jnp.inf, zero),
            Ritz.initial(zero),
            (one, zero),
            jnp.asarray(False),
            (nothing, first),
        )
        end: Any = jax.lax.while_loop(unfinished, advance, start)
        *_, step, (low, high), ritz, _, _, (u, square) = end
        if not preconditioned:
            low, high = jnp.minimum(low, 1 / ritz.inverse), jnp.maximum(high, ritz.high)
        solved = jnp.sqrt(square) <= target
        result = lx.RESULTS.where(solved, lx.RESULTS.successful, lx.RESULTS.max_steps_reached)
        return u, result, {"num_steps": step, "min_curvature": low, "max_curvature": high}
