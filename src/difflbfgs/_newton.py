"""One truncated Newton step: what is left after L-BFGS, squared.

Nocedal & Wright, Numerical Optimization (2006), section 7.1. Where L-BFGS leaves an error `e` of
the minimizer, and so of the derivative, a Newton step leaves one of order `e²`; and as it asks the
gradient and not the objective, it goes below the rounding error at which a line search stalls.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from difflbfgs import _vector
from difflbfgs._krylov import ConjugateGradient
from difflbfgs._operator import SymmetricOperator
from difflbfgs._vector import Count, Flag, Scalar, Vector

# In exact arithmetic as many products as variables would do; on ill-conditioned problems rounding
# makes it several times as many.
_PRODUCTS_PER_VARIABLE = 10
_MAX_PRODUCTS = 2000
# A residual any larger could hide that the step makes the gradient ten times smaller.
_LEAST_ACCURACY = 0.05


class Findings(eqx.Module):
    """What a Newton step found out: whether its equations were solved, and extreme curvatures."""

    solved: Flag
    min_curvature: Scalar
    max_curvature: Scalar


def newton_step(
    hvp: Callable[[Vector], Vector], g: Vector, target: Scalar, active: Flag
) -> tuple[Vector, Findings, Count]:
    """Return `d` with `H d ≈ g`, what was found out along the way, and the products used.

    The residual is brought below `target`, but at least below `‖g‖ / 20`. Unless `active`, `d` is
    zero and costs nothing.
    """
    grad_norm = _vector.norm(g)
    forcing = jnp.clip(target / _vector.nonzero(grad_norm), _vector.epsilon(g), _LEAST_ACCURACY)
    most = min(_PRODUCTS_PER_VARIABLE * _vector.size(g), _MAX_PRODUCTS)
    solver = ConjugateGradient(forcing, most)
    operator = SymmetricOperator.of(hvp, g)
    unit = _vector.where(active, _vector.unit(g), _vector.zeros_like(g))
    solution = lx.linear_solve(operator, unit, solver, throw=False)
    seen = Findings(
        solution.result == lx.RESULTS.successful,
        solution.stats["min_curvature"],
        solution.stats["max_curvature"],
    )
    return _vector.scale(grad_norm, solution.value), seen, solution.stats["num_steps"]
