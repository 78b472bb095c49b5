"""Bounds on the variables as vectors, and which variables are active: at their bounds."""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, PyTree

from difflbfgs._program import Program
from difflbfgs._vector import Flag, Vector

Active: TypeAlias = PyTree[Int8[Array, "..."]]


class Box(eqx.Module):
    """`lower <= x <= upper`, infinite where there is no bound."""

    lower: Vector
    upper: Vector

    def project(self, x: Vector) -> Vector:
        """Return the point of the box that is nearest to `x`."""
        return jax.tree.map(jnp.clip, x, self.lower, self.upper)

    def active(self, x: Vector, g: Vector) -> Active:
        """Return -1 and 1 where `x` is at its lower and its upper bound, and 0 where it is free.

        Between equal bounds the sign of the multiplier tells.
        """

        def sign(x, g, lower, upper):
            fixed = lower == upper
            low = ((x <= lower) & (g > 0)) | (fixed & (g >= 0))
            high = ((x >= upper) & (g < 0)) | (fixed & (g < 0))
            return high.astype(jnp.int8) - low.astype(jnp.int8)

        return jax.tree.map(sign, x, g, self.lower, self.upper)

    def weakly_active(
        self, x: Vector, g: Vector, active: Active, x_error: Vector, g_error: Vector
    ) -> PyTree:
        """Return which variables may as well be active as free, given the errors of `x` and `g`."""

        def weak(x, g, active, x_error, g_error, lower, upper):
            near = jnp.minimum(x - lower, upper - x) <= x_error
            undecided = jnp.where(active == 0, near, jnp.abs(g) <= g_error)
            return undecided & (lower < upper)

        return jax.tree.map(weak, x, g, active, x_error, g_error, self.lower, self.upper)

    def is_empty(self) -> Flag:
        """Return whether some bounds are crossed, or not a number."""
        return any_of(jax.tree.map(lambda low, high: ~(low <= high), self.lower, self.upper))


def masked(flags: PyTree, x: Any) -> Any:
    """Return `x` with zeros at the flagged entries, such as the active variables."""
    return jax.tree.map(lambda flag, leaf: jnp.where(flag == 0, leaf, 0), flags, x)


def any_of(flags: PyTree) -> Flag:
    """Return whether any flag is set."""
    return jnp.stack([jnp.any(leaf) for leaf in jax.tree.leaves(flags)]).any()


def differ(a: PyTree, b: PyTree) -> Flag:
    """Return whether any entry differs."""
    return any_of(jax.tree.map(jnp.not_equal, a, b))


class Bounds(eqx.Module):
    """The bounds as a function of the inexact leaves of `theta`, and of what they are made of."""

    program: Program = eqx.field(static=True)
    consts: PyTree

    def box(self, theta: list[Array]) -> Box:
        """Return the box."""
        return self.program(self.consts, *theta)
