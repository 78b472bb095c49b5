"""What a solve knows about the size of things around its point.

All quantities scale with the objective, so that multiplying it by a constant changes no decision.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from difflbfgs._vector import Flag, Scalar, nonzero, where

# See `Scale`.
_LEAST_REFERENCE = 1e-2
_FADING = 0.25
# A step shorter than this, in units of `eps^(1/4)` times the size, counts for the curvature as if
# it were as long. A kink may turn the gradient by up to so many times its norm over any step.
_SHORT = 0.5
_TURN = 10.0
# Rounding errors of an objective and of its gradient, in units of eps times their size.
_ROUNDING = 10.0


class Scale(eqx.Module):
    """What the solve knows about the size of things around the present point.

    Attributes:
        start: gradient norm at the start, but no less than a hundredth of the gradient that the
            curvature there makes over one length.
        curvature: largest `‖y‖ / max(‖s‖, short)` of late, fading by a factor of four with every
            step that is not short, below `eps^(1/4) / 2 · size`. At a kink `‖y‖/‖s‖` grows without
            limit as the steps shrink. Zero before the first step.
        size: size of the variables, `max(‖x‖, min(1, ‖x - x0‖))`.
        local: whether the newest step was no longer than ten times that.
    """

    start: Scalar
    curvature: Scalar
    size: Scalar
    local: Flag

    def after(self, step_norm: Scalar, curvature: Scalar, x_norm: Scalar, travel: Scalar):
        """Return the scale of things after a step that met this `curvature` (0: none)."""
        size = jnp.maximum(x_norm, jnp.minimum(1, travel))
        local = step_norm <= 10 * size
        short = _short(size.dtype) * size
        fading = (curvature > 0) & (step_norm >= short)
        faded = where(local & self.local, _FADING, 0) * self.curvature
        kept = where(fading, faded, self.curvature)
        met = curvature * (step_norm / nonzero(jnp.maximum(step_norm, short)))
        now = jnp.maximum(met, kept)
        least = where(self.curvature == 0, _LEAST_REFERENCE * now * jnp.minimum(1, size), 0)
        return Scale(jnp.maximum(self.start, least), now, size, local)

    def reference(self) -> Scalar:
        """Return the gradient norm to which `rtol` is relative.

        It is the gradient norm at the start, but no larger than the gradient that the present
        curvature makes over one length, `min(1, size)`: a start from far away does not loosen
        the test. Nor does a start next to the minimum put it out of reach (see `start`).
        """
        return jnp.minimum(self.start, self.curvature * jnp.minimum(1, self.size))

    def may_be_noise(self, grad_norm: Scalar) -> Flag:
        """Return whether a gradient is so small, `eps^(1/4)` of the reference."""
        return grad_norm <= jnp.finfo(grad_norm.dtype).eps ** 0.25 * self.reference()

    def gradient_noise(self) -> Scalar:
        """Return the rounding error to expect of the gradient, of curvature times size."""
        return rounding(self.curvature * self.size)

    def noise(self, f: Scalar) -> Scalar:
        """Return the rounding error to expect of the objective.

        Its terms may be as large as the quadratic model's, `curvature · size²`, and cancel.
        """
        return rounding(jnp.abs(f) + self.curvature * self.size**2)


def is_curved(curved: Scalar, s_norm: Scalar, y_norm: Scalar) -> Flag:
    """Return whether `sᵀy > eps ‖s‖ ‖y‖`; if squares are out of range it is not."""
    limits = jnp.finfo(curved.dtype)
    least = jnp.maximum(float(limits.eps) * s_norm * y_norm, limits.tiny)
    return (curved > least) & (curved < jnp.inf)


def _short(dtype: Any) -> float:
    """Return the length, over the size, of a step too short to tell a curvature from a kink."""
    return _SHORT * float(jnp.finfo(dtype).eps) ** 0.25


def rounding(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the rounding error of quantities of this size."""
    return _ROUNDING * jnp.finfo(value.dtype).eps * jnp.abs(value)


def at_noise_level(f: Scalar, grad_norm: Scalar, predicted: Scalar, scale: Scale) -> Flag:
    """Return whether rounding explains why there is no more progress.

    Either the gradient is at its own rounding error, curvature times size; or the objective's
    rounding error exceeds the decrease that the quasi-Newton step predicts, `gᵀPg`. The latter says
    nothing at a kink, where P shrinks without limit; but there the curvature c is at most
    `10 ‖g‖ / short`, and so `c · size²` at most `(10 size / short)² ‖g‖² / c`. What makes the noise
    has to be larger. Both also ask for a gradient below `eps^(1/4)` of the reference.

    Both take the largest curvature for that of every variable. If scales differ, the noise is
    overestimated by orders of magnitude; so this is asked of a solve that is stuck, and does not
    end one that makes progress. One that is stuck because squares of its gradient underflow has not
    met this limit either.
    """
    own = scale.local & (grad_norm <= scale.gradient_noise())
    turn = _TURN / _short(f.dtype) * grad_norm
    kink = turn / nonzero(scale.curvature) * turn
    hidden = jnp.maximum(predicted, rounding(kink)) <= scale.noise(f)
    squarable = grad_norm >= jnp.finfo(f.dtype).tiny ** 0.5
    return (own | hidden) & squarable & scale.may_be_noise(grad_norm)
