"""L-BFGS: its settings."""

import equinox as eqx
import optax
from jax.typing import ArrayLike

from difflbfgs._checks import (
    check_flag,
    check_linesearch,
    check_natural_number,
    check_positive_integer,
    check_tolerance,
    no_type_check,
)


@no_type_check
class LBFGS(eqx.Module):
    """Limited-memory BFGS with a strong-Wolfe line search, and Newton's method at the end.

    It is over when a Newton step contracts and leaves at most `rtol` of the energy norm
    `√(xᵀHx)`, or at `‖∇f(x)‖₂ <= atol`. docs/how_it_works.md has the formulas.

    Args:
        rtol: relative tolerance. `None`: square root of the working dtype's machine epsilon, 1.5e-8
            in float64 and 3.5e-4 in float32.
        atol: absolute tolerance on the gradient norm.
        memory_size: number of curvature pairs kept.
        linesearch: an Optax line search transformation. `None`: interpolation in a bracket, for the
            strong Wolfe conditions with constants 1e-4 and 0.9.
        polish: number of Newton steps once the minimum seems near; more if the test asks for them.
            0 for none: the search goes on until the test of the gradient holds.
        flatten: work on one flat vector. `False` keeps the leaves of `x0` and their sharding.
        noise: error of the objective's values, relative to them, if that is above rounding, as with
            an adaptive integrator inside. `None`: measured if a search gets stuck, to 1e-5.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a tolerance is negative, or a count too small. A traced tolerance that is
            negative counts as 0.

    Note:
        With `polish=0` the test is `‖∇f(x)‖₂ <= atol + rtol · reference`, with a gradient norm
        typical of the problem for the reference. It says little if variables differ in units.

        A step takes one evaluation of the objective with its gradient, or a few, and about
        `4 · memory_size · n` multiplications. Memory is about `2 · memory_size + 15` vectors. A
        Newton step takes up to ten Hessian products a variable, and 2000 in all.
    """

    rtol: ArrayLike | None = None
    atol: ArrayLike = 0.0
    memory_size: int = eqx.field(default=10, static=True)
    linesearch: optax.GradientTransformation | None = None
    polish: int = eqx.field(default=1, static=True)
    flatten: bool = eqx.field(default=True, static=True)
    noise: ArrayLike | None = None

    def __check_init__(self):
        check_tolerance("rtol", self.rtol, optional=True)
        check_tolerance("atol", self.atol)
        check_positive_integer("memory_size", self.memory_size)
        check_natural_number("polish", self.polish)
        check_flag("flatten", self.flatten)
        check_tolerance("noise", self.noise, optional=True)
        check_linesearch(self.linesearch)
