"""Curvature pairs, kept in the memory of `optax.lbfgs`.

Nocedal & Wright, Numerical Optimization (2006), section 7.2: `s = x⁺ - x`, `y = g⁺ - g`,
`rho = 1 / sᵀy`. Optax forms the pair of a step at the beginning of the next one, from the point
and gradient that it remembers. Here that is put to use: placing the remembered point at `x - s` and
the remembered gradient at `g - y` makes any pair the newest, which is how a memory is started,
restarted and carried over to another problem.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from difflbfgs import _vector
from difflbfgs._scale import is_curved
from difflbfgs._vector import Count, Flag, Scalar, Vector


class Pair(eqx.Module):
    """A step `s` and the change `y` of the gradient along it."""

    s: Vector
    y: Vector

    def is_curved(self) -> Flag:
        """Return whether `sᵀy > eps ‖s‖ ‖y‖`, so that updating with this pair keeps P positive.

        If squares are out of range it is not.
        """
        s, y = (jnp.sqrt(_vector.dot(v, v)) for v in (self.s, self.y))
        return is_curved(_vector.dot(self.s, self.y), s, y)

    def curvature(self) -> Scalar:
        """Return `‖y‖ / ‖s‖`, a Rayleigh-like quotient of the Hessian along `s`; 0 if `s = 0`."""
        s, y = _vector.norm(self.s), _vector.norm(self.y)
        return jnp.where(s > 0, y / _vector.nonzero(s), 0)

    def weights(self) -> tuple[Scalar, Scalar]:
        """Return `rho = 1 / sᵀy` and `gamma = sᵀy / yᵀy`; 0 and 1 without positive curvature."""
        sy, yy = _vector.dot(self.s, self.y), _vector.dot(self.y, self.y)
        curved = self.is_curved()
        rho = jnp.where(curved, 1 / jnp.where(curved, sy, 1), 0)
        return rho, jnp.where(curved, sy / jnp.where(curved, yy, 1), 1)


def empty(x: Vector, size: int) -> optax.ScaleByLBFGSState:
    """Return a memory for so many pairs, and none in it."""
    engine: Any = optax.lbfgs(memory_size=size, linesearch=None)
    return engine.init(x)[0]


@jax.jit
def direction(
    memory: optax.ScaleByLBFGSState, x: Vector, g: Vector
) -> tuple[Vector, optax.ScaleByLBFGSState]:
    """Return the step `-P g` of Optax at `x`, and the memory with the newest pair formed."""
    engine: Any = optax.lbfgs(memory_size=jnp.size(memory.weights_memory), linesearch=None)
    _, *others = engine.init(x)
    d, (after, *_) = engine.update(g, (memory, *others), x)
    return d, after


def newest(memory: optax.ScaleByLBFGSState, x: Vector, g: Vector) -> Pair:
    """Return the pair of the last step, which Optax has not formed yet."""
    return Pair(_vector.sub(x, memory.params), _vector.sub(g, memory.updates))


def rows(memory: optax.ScaleByLBFGSState) -> tuple[Any, Any]:
    """Return the pairs that Optax has formed, as the rows of two arrays."""
    return memory.diff_params_memory, memory.diff_updates_memory


def moved(memory: optax.ScaleByLBFGSState, x: Vector, g: Vector, pair: Pair):
    """Return `memory` at the point `x` with gradient `g`, with `pair` as its newest pair."""
    return memory._replace(
        params=_vector.sub(x, pair.s),
        updates=_vector.sub(g, pair.y),
        count=jnp.maximum(memory.count, 1),
    )


def shifted(memory: optax.ScaleByLBFGSState, by: Vector) -> optax.ScaleByLBFGSState:
    """Return `memory` at a point moved by so much, with its newest pair kept."""
    return memory._replace(params=_vector.add_scaled(memory.params, 1, by))


def regraded(
    memory: optax.ScaleByLBFGSState, starting: Flag, change: Vector
) -> optax.ScaleByLBFGSState:
    """Return `memory`, of a solve that is `starting`, with its newest pair kept.

    The gradient at its point is another one than that of the solve before, by this change.
    """
    moved = _vector.add_scaled(memory.updates, 1, change)
    return memory._replace(updates=_vector.where(starting, moved, memory.updates))


def emptied(memory: optax.ScaleByLBFGSState) -> optax.ScaleByLBFGSState:
    """Return `memory` without its pairs, but for the newest, which Optax has yet to form."""
    return memory._replace(weights_memory=jnp.zeros_like(memory.weights_memory))


def inverse_hessian(
    memory: optax.ScaleByLBFGSState, x: Vector, g: Vector
) -> Callable[[Vector], Vector]:
    """Return `v -> P v`, the two-loop recursion of algorithm 7.4, newest pair included."""
    pair = newest(memory, x, g)
    rho_new, gamma = pair.weights()
    rho, newest_count = jnp.asarray(memory.weights_memory, gamma.dtype), jnp.asarray(memory.count)
    size = len(rho)
    slot = (newest_count - 1) % size
    rho = rho.at[slot].set(rho_new)
    S, Y = jax.tree.map(lambda rows, row: rows.at[slot].set(row), rows(memory), (pair.s, pair.y))
    return two_loop(S, Y, rho, gamma, newest_count)


def two_loop(
    S: Vector, Y: Vector, rho: Float[Array, " m"], gamma: Scalar, oldest: Count
) -> Callable[[Vector], Vector]:
    """Return `v -> P v` for the pairs in the rows of `S` and `Y`, from the row `oldest` on.

    Rows are numbered modulo their number; one whose `rho` is zero counts for nothing.
    """
    oldest_first = (oldest + jnp.arange(len(rho))) % len(rho)

    def backward(q, i):
        s, y = jax.tree.map(lambda rows: rows[i], (S, Y))
        alpha = rho[i] * _vector.dot(s, q)
        return _vector.add_scaled(q, -alpha, y), alpha

    def forward(r, step):
        i, alpha = step
        s, y = jax.tree.map(lambda rows: rows[i], (S, Y))
        beta = rho[i] * _vector.dot(y, r)
        return _vector.add_scaled(r, alpha - beta, s), None

    def product(v):
        q, alpha = jax.lax.scan(backward, v, oldest_first, reverse=True)
        return jax.lax.scan(forward, _vector.scale(gamma, q), (oldest_first, alpha))[0]

    return product
