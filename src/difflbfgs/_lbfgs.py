"""L-BFGS: its settings, and what one solve hands to the next."""

from typing import Any

import equinox as eqx
import optax

from difflbfgs._checks import (
    check_flag,
    check_linesearch,
    check_natural_number,
    check_positive_integer,
    check_tolerance,
    no_type_check,
)
from difflbfgs._vector import Scalar, Vector


@no_type_check
class LBFGS(eqx.Module):
    """Limited-memory BFGS with a strong-Wolfe line search.

    It stops at `‖∇f(x)‖₂ <= atol + rtol · reference`. The reference is the gradient norm at the
    start, but at least 1/100 of `c · l` at the start and at most `c · l` at `x`. Here `c` is the
    largest curvature `‖y‖/‖s‖` met of late, fading by a factor of four with every step, and
    `l = min(1, max(‖x‖, ‖x - x0‖))` a length. At a kink the curvature grows without limit as steps
    shrink: one below `eps^(1/4) / 2 · max(‖x‖, l)` counts as if it were as long, and does not fade
    what was met before. The reference scales with the objective; a far-off start does not loosen
    the test and a start next to the minimum does not put it out of reach.
    A warm start keeps the reference of the solve that it continues.

    Multiplying the objective by a constant changes nothing but roundings. So does multiplying the
    variables and their start by a constant below 1; one above 1 lengthens the path a little, to a
    gradient smaller by that constant again, as `l` is at most 1. In float32 that may be out of
    reach from 1e4 on, and the solve ends in `line_search_failed`: choose larger units.

    A step costs one or a few evaluations of the objective with its gradient and about
    `4 · memory_size · n` multiplications; memory is about `2 · memory_size + 15` vectors.

    Args:
        rtol: relative tolerance on the gradient norm. `None`: square root of the working dtype's
            machine epsilon, 1.5e-8 in float64 and 3.5e-4 in float32.
        atol: absolute tolerance on the gradient norm.
        memory_size: number of curvature pairs kept.
        linesearch: an Optax line search transformation. `None`: Optax's zoom search, with 20
            evaluations at most, for the strong Wolfe conditions with constants 1e-4 and 0.9.
        polish: number of Newton-CG steps that follow, each with up to ten Hessian products a
            variable and 2000 in all; 0 for none. Otherwise a warm start takes up to three before
            L-BFGS too, where it is near enough; and where a step meets negative curvature or does
            not make the gradient ten times smaller, a loose tolerance was met far from a minimum:
            L-BFGS goes on, to a hundredth of the tolerance or the default one at most.
        flatten: work on one flat vector. `False` keeps the leaves of `x0` and their sharding.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a tolerance is negative, or a count too small.
    """

    rtol: Any = None
    atol: Any = 0.0
    memory_size: int = eqx.field(default=10, static=True)
    linesearch: Any = None
    polish: int = eqx.field(default=1, static=True)
    flatten: bool = eqx.field(default=True, static=True)

    def __check_init__(self):
        check_tolerance("rtol", self.rtol, optional=True)
        check_tolerance("atol", self.atol)
        check_positive_integer("memory_size", self.memory_size)
        check_natural_number("polish", self.polish)
        check_flag("flatten", self.flatten)
        check_linesearch(self.linesearch)

    def engine(self, eps: float) -> optax.GradientTransformationExtraArgs:
        """Return the Optax transformation; `eps` bounds how far its search may let f rise."""
        search = self.linesearch
        if search is None:
            search = optax.scale_by_zoom_linesearch(
                max_linesearch_steps=20, approx_dec_rtol=10 * eps, initial_guess_strategy="one"
            )
        return optax.lbfgs(memory_size=self.memory_size, linesearch=search)


class WarmStart(eqx.Module):
    """What one solve hands to the next: minimizer, memory, and the scale of things."""

    x: Vector
    g: Vector
    memory: optax.ScaleByLBFGSState
    reference: Scalar
    curvature: Scalar
