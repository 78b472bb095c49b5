"""The problem on a face of its bounds: active variables held, all others free.

At a minimizer in the box `lower <= x <= upper` a variable is active, at a bound with the gradient
`g` pointing out of the box, or free, and there `g` is zero. The component of `g` at an active
variable is its multiplier. With the active variables `A` at their bounds `b` and the free ones `F`,
the minimizer is that of

    φ(x, θ, b) = f(b_A, x_F, θ) + κ/2 ‖x_A - b_A‖²

without bounds, and so the implicit function theorem, said of `φ`, holds for it: where no multiplier
is zero, the same variables stay active nearby (A. V. Fiacco, Introduction to Sensitivity and
Stability Analysis in Nonlinear Programming, 1983, section 3.2). The Hessian of `φ` is `H_FF` beside
`κ I`, with a curvature `κ` of the face, so that the two parts have one unit.
"""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from difflbfgs import _vector
from difflbfgs._box import Active, Box, differ, masked
from difflbfgs._problem import Problem
from difflbfgs._vector import Flag, Scalar, Vector


class Face(eqx.Module):
    """A problem with its active variables held at their bounds: `φ`, in a `Problem`'s place."""

    problem: Problem
    active: Active
    curvature: Scalar

    @classmethod
    def of(cls, problem: Problem, active: Active, x: Vector) -> "Face":
        """Return the face of `problem` at `x`; `κ` is a Rayleigh quotient of its Hessian."""
        face = cls(problem, active, jnp.ones((), _vector.dtype(x)))
        along = masked(active, jax.tree.map(_vector.signs, x))
        square = _vector.dot(along, along)
        bent = _vector.dot(along, face.product(x, along)) / _vector.nonzero(square)
        kappa = _vector.nonzero(jnp.where(jnp.isfinite(bent), jnp.abs(bent), 1))
        return cls(problem, active, jax.lax.stop_gradient(kappa))

    @property
    def theta(self) -> list[Array]:
        """The leaves that one can differentiate by."""
        return self.problem.theta

    @property
    def name(self) -> str:
        """What its user calls the objective."""
        return self.problem.name

    def at(self, theta: list[Array]) -> "Face":
        """Return the face with other values for the inexact leaves of `theta`."""
        return self.of_problem(self.problem.at(theta))

    def of_problem(self, problem: Problem) -> "Face":
        """Return the same face of another problem."""
        return Face(problem, self.active, self.curvature)

    def value(self, x: Vector) -> Scalar:
        """Return `φ(x)`."""
        off = jax.tree.map(
            lambda a, x, bound: jnp.where(a == 0, 0, x - bound), self.active, x, self._bounds()
        )
        return self.problem.value(self._placed(x)) + self.curvature / 2 * _vector.dot(off, off)

    def gradient(self, x: Vector) -> Vector:
        """Return the gradient of `φ` at `x`."""
        return jax.grad(self.value)(x)

    def product(self, x: Vector, p: Vector) -> Vector:
        """Return the Hessian-vector product of `φ`."""
        return self._beside(self.problem.product(self._placed(x), self.free(p)), p)

    def product_if_any(self, x: Vector, p: Vector) -> Vector:
        """Return the product, or zero for the free variables if there is none."""
        return self._beside(self.problem.product_if_any(self._placed(x), self.free(p)), p)

    def free(self, v: Vector) -> Vector:
        """Return `v` with zeros at the active variables."""
        return masked(self.active, v)

    def reaches(self, x: Vector) -> Flag:
        """Return whether `x`, a point of the face, is in the box, and the same variables active."""
        box = self._box()
        active = box.active(x, self.problem.gradient(self._placed(x)))
        free = [jax.tree.map(lambda a: a == 0, some) for some in (active, self.active)]
        return ~differ(x, box.project(x)) & ~differ(*free)

    def restricted(self, inverse: Callable[[Vector], Vector]) -> Callable[[Vector], Vector]:
        """Return an approximate inverse of `H`, cut to the face, with `1/κ` beside it."""

        def apply(v):
            free = inverse(self.free(v))
            return jax.tree.map(
                lambda a, u, v: jnp.where(a == 0, u, v / self.curvature), self.active, free, v
            )

        return apply

    def _beside(self, hp: Vector, p: Vector) -> Vector:
        """Return `hp` for the free variables, and `κ p` for the others."""
        return jax.tree.map(
            lambda a, hp, p: jnp.where(a == 0, hp, self.curvature * p), self.active, hp, p
        )

    def _box(self) -> Box:
        if self.problem.bounds is None:
            raise ValueError("a problem without bounds has no face")
        return self.problem.bounds.box(self.problem.theta)

    def _bounds(self) -> Vector:
        """Return the bounds that are active, and zero elsewhere."""
        box = self._box()

        def bound(active, lower, upper):
            return jnp.where(active < 0, lower, jnp.where(active > 0, upper, 0))

        return jax.tree.map(bound, self.active, box.lower, box.upper)

    def _placed(self, x: Vector) -> Vector:
        """Return `x` with the active variables at their bounds, and the free ones in the box."""
        inside = jax.tree.map(
            lambda x, nearest: x + jax.lax.stop_gradient(nearest - x), x, self._box().project(x)
        )
        return jax.tree.map(
            lambda a, bound, x: jnp.where(a == 0, x, bound), self.active, self._bounds(), inside
        )


# What is differentiated at a minimizer: the problem, or with bounds the face that they leave.
Smooth: TypeAlias = Problem | Face
