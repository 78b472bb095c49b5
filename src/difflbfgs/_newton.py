"""A truncated Newton step, `H d = -g`, and what it says of the point.

Conjugate gradients end by decrease (Nash & Sofer, Operations Research Letters 9, 1990): with `q_k`
the model's value after `k` steps, at `k (q_k - q_{k-1}) / q_k <= η`. By itself that stops before a
variable in another unit is met, so if variables differ by orders of magnitude the system is
solved in scaled ones, `S⁻¹x` with scales `S` that make the rows of `S H S` of one size
(`_linear.equilibrate`), and the residual has to agree.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from difflbfgs import _lanes, _vector
from difflbfgs._krylov import slack, zero_curvature
from difflbfgs._linear import diagonal_scales, equilibrate
from difflbfgs._phases import Findings
from difflbfgs._scale import rounding
from difflbfgs._solution import count
from difflbfgs._vector import Count, Flag, Scalar, Vector

# In exact arithmetic as many products as variables would do; on ill-conditioned problems rounding
# makes it several times as many.
_PRODUCTS_PER_VARIABLE = 10
_MAX_PRODUCTS = 2000
# Up to this many variables all of the Hessian is assembled, and no product taken more than once.
_ASSEMBLED = 24
# The part of the residual, squared, that may be left.
_RESIDUAL = 1e-3


def assembles(x: Vector) -> bool:
    """Return whether a Newton step here assembles the Hessian, at a price that is fixed."""
    return _vector.size(x) <= _ASSEMBLED


def newton_step(
    hvp: Callable[[Vector], Vector],
    x: Vector,
    g: Vector,
    s: Vector,
    decrement: Scalar,
    rtol: Scalar,
    most: Count,
    wanted: Flag,
) -> tuple[Vector, Scalar, Findings]:
    """Return `d` with `H d ≈ -g`, `gᵀd` and what was found; a lane that wants none costs nothing.

    The system is solved so well that what is left of it is small beside `rtol` of the energy of
    `x` or of `s`, the step that led there, given a guess of the decrement.
    """
    small = assembles(x)
    forgiven = slack(x, jnp.sqrt(_vector.dot(g, g)))
    if small:
        hvp, diagonal, falls, energies = _assembled(hvp, x, s, g)
        scale, spent = diagonal_scales(diagonal, forgiven), count(_vector.size(x))
    else:
        falls = jnp.asarray(False)
        seen = equilibrate(hvp, x, x, s)
        scale, energies, spent = seen.scale, seen.energies, seen.products
    energy, size = jnp.maximum(jnp.max(energies), 0), jnp.maximum(energies[0], 0)
    aim = 1e-2 * jnp.square(jnp.asarray(rtol, energy.dtype)) * energy
    forcing = jnp.clip(aim / _vector.nonzero(decrement), 1e-12, 1e-3)
    if small:
        forcing = jnp.full_like(forcing, _vector.epsilon(x) ** 2)  # there products cost nothing

    b = _vector.mul(scale, g)
    limit = _PRODUCTS_PER_VARIABLE * _vector.size(x)
    most = count(limit) if small else jnp.minimum(most, min(limit, _MAX_PRODUCTS))
    first = _vector.dot(b, b)

    def unfinished(carry):
        _, _, _, (square, test), step, (*_, ended), _ = carry
        short = (test > forcing) | (square > _RESIDUAL * first)
        return wanted & short & (square > 0) & ~ended & (step < most)

    def advance(carry):
        u, r, p, (square, _), step, (low, high, *_), model = carry
        hp = _vector.mul(scale, hvp(_vector.mul(scale, p)))
        curvature, length = _vector.dot(p, hp), _vector.dot(p, p)
        quotient = curvature / length
        low, high = jnp.minimum(low, quotient), jnp.maximum(high, jnp.abs(quotient))
        ended = ~(quotient > zero_curvature(high, 0.0))
        alpha = jnp.where(ended, 0, square / jnp.where(ended, 1, curvature))
        flat = jnp.where(ended, square / jnp.sqrt(length), 0)  # the slope along `p`
        u = _vector.add_scaled(u, alpha, p)
        r = _vector.add_scaled(r, -alpha, hp)
        after = _vector.dot(r, r)
        gain = alpha * square
        model = model + gain
        test = (step + 1) * gain / _vector.nonzero(model)
        p = _vector.add_scaled(r, after / square, p)
        return u, r, p, (after, test), step + 1, (low, high, flat, ended), model

    zero, inf = jnp.zeros_like(energy), jnp.full_like(energy, jnp.inf)
    start = (
        _vector.zeros_like(b),
        b,
        b,
        (first, inf),
        count(0),
        (inf, zero, zero, jnp.asarray(False)),
        zero,
    )
    body = _lanes.active(unfinished, advance)
    end = jax.lax.while_loop(lambda c: _lanes.anywhere(unfinished(c)), body, start)
    u, r, _, (square, test), steps, (low, high, flat, ended), _ = end
    d = _vector.scale(-1, _vector.mul(scale, u))
    slope = _vector.dot(g, d)
    # The gradient is wrong by rounding of the largest curvature times the size of `x`, and what is
    # left of it by rounding of itself. A slope without curvature that is more leads far away.
    size_of_x = _vector.norm(jax.tree.map(jnp.divide, x, scale))
    hidden = rounding(high * size_of_x)
    sloping = flat > jnp.maximum(hidden, rounding(jnp.sqrt(first)))
    solved = (square <= _RESIDUAL * first) & ((test <= forcing) | ended | (square == 0))
    solved &= ~(ended & sloping) & jnp.isfinite(energy)
    negative = (low < -zero_curvature(high, 0.0)) | falls
    # Beside a minimum with a symmetry there is a little, and the step leads there all the same.
    explained = solved & (low >= -forgiven) & ~falls
    valid = (~negative | explained) & (slope < 0)
    valid &= jnp.isfinite(slope) & jnp.isfinite(_vector.norm(d))
    steep = ~solved & sloping
    residual = jnp.where(square == 0, 0, test)
    products = spent if small else spent + steps
    rest = _vector.norm(jax.tree.map(jnp.divide, r, scale))
    noise = hidden * _vector.norm(u) / _vector.nonzero(jnp.abs(slope))
    found = Findings(
        valid, negative, falls, steep, solved, residual, rest, noise, energy, size, products
    )
    return d, slope, found


def _assembled(
    hvp, x: Vector, s: Vector, g: Vector
) -> tuple[Callable, Vector, Flag, Float[Array, " 2"]]:
    """Return the product of the assembled Hessian, its diagonal, and `xᵀHx` and `sᵀHs`.

    Third, whether there is no curvature along an axis, and a gradient that is more than rounding of
    `Σⱼ |Hᵢⱼ xⱼ|`: then the objective falls there, if by less than all the rest of it shows.
    """
    flat, unravel = ravel_pytree(x)
    H = jax.lax.map(
        lambda row: ravel_pytree(hvp(unravel(row)))[0], jnp.eye(flat.size, dtype=flat.dtype)
    )
    diagonal = jnp.diagonal(H)
    slopes, step = jnp.abs(ravel_pytree(g)[0]), ravel_pytree(s)[0]
    falls = jnp.any((diagonal <= 0) & (slopes > rounding(jnp.abs(H) @ jnp.abs(flat))))
    energies = jnp.stack([flat @ H @ flat, step @ H @ step])

    def product(p):
        return unravel(jnp.sum(H * ravel_pytree(p)[0], axis=1))

    return product, unravel(diagonal), falls, energies
