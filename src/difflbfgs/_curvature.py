"""Curvature pairs, kept in the memory of `optax.lbfgs`.

Nocedal & Wright, Numerical Optimization (2006), section 7.2: `s = x⁺ - x`, `y = g⁺ - g`,
`rho = 1 / sᵀy`. Optax forms the pair of a step at the beginning of the next one, from the point
and gradient that it remembers. Here that is put to use: placing the remembered point at `x - s` and
the remembered gradient at `g - y` makes any pair the newest, which is how a memory is started,
restarted and carried over to another problem.
"""

import equinox as eqx
import jax.numpy as jnp
import optax

from difflbfgs import _vector
from difflbfgs._vector import Flag, Scalar, Vector


class Pair(eqx.Module):
    """A step `s` and the change `y` of the gradient along it."""

    s: Vector
    y: Vector

    def is_curved(self) -> Flag:
        """Return whether `sᵀy > eps ‖s‖ ‖y‖`, so that updating with this pair keeps P positive."""
        s, y = _unit(self.s), _unit(self.y)
        return _vector.dot(s, y) > _vector.epsilon(self.s)

    def curvature(self) -> Scalar:
        """Return `‖y‖ / ‖s‖`, a Rayleigh-like quotient of the Hessian along `s`; 0 if `s = 0`."""
        length = _vector.norm(self.s)
        return jnp.where(length > 0, _vector.norm(self.y) / _nonzero(length), 0)


def isotropic(x: Vector, g: Vector, curvature: Scalar) -> Pair:
    """Return the pair after which the inverse Hessian is `P = I / curvature`.

    It lies along the gradient, so that the next step is one along the steepest descent; it is as
    long as `x`, so that no digit is lost when Optax recovers it from a difference of points.
    """
    length = jnp.maximum(_vector.norm(x), _vector.norm(g) / _nonzero(curvature))
    s = _vector.scale(length / _nonzero(_vector.norm(g)), g)
    return Pair(s, _vector.scale(curvature, s))


def newest(memory: optax.ScaleByLBFGSState, x: Vector, g: Vector) -> Pair:
    """Return the pair of the last step, which Optax has not formed yet."""
    return Pair(_vector.sub(x, memory.params), _vector.sub(g, memory.updates))


def moved(memory: optax.ScaleByLBFGSState, x: Vector, g: Vector, pair: Pair):
    """Return `memory` at the point `x` with gradient `g`, with `pair` as its newest pair."""
    return memory._replace(
        params=_vector.sub(x, pair.s),
        updates=_vector.sub(g, pair.y),
        count=jnp.maximum(memory.count, 1),
    )


def emptied(memory: optax.ScaleByLBFGSState) -> optax.ScaleByLBFGSState:
    """Return `memory` without its pairs, but for the newest, which Optax has yet to form."""
    return memory._replace(weights_memory=jnp.zeros_like(memory.weights_memory))


def _unit(x):
    return _vector.scale(1 / _nonzero(_vector.norm(x)), x)


def _nonzero(value):
    return jnp.where(value > 0, value, 1)
