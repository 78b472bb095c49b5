"""The L-BFGS approximation of the inverse Hessian, for the user."""

import lineax as lx
from jaxtyping import PyTree

from difflbfgs import _memory
from difflbfgs._checks import no_type_check
from difflbfgs._hypergrad import HypergradState
from difflbfgs._loop import State
from difflbfgs._operator import SymmetricOperator


@no_type_check
def inverse_hessian_operator(state: PyTree) -> lx.AbstractLinearOperator:
    """Return the inverse Hessian that a solve left in its memory, as a Lineax operator.

    It approximates `H⁻¹` in the directions that the solve went last, and is a multiple of the
    identity in all others: a preconditioner, or a rough covariance of a Laplace approximation.

    Args:
        state: `state` of a `Solution` of `LBFGS`, or of a `HypergradInfo`.

    Returns:
        A symmetric positive definite operator, tagged so, on vectors of all the entries that were
        minimized over, in the order of `jax.tree.leaves` (complex leaves as real and imaginary
        part); with `flatten=False`, on the list of those leaves. The dtype is the solve's.

    Raises:
        TypeError: if `state` is something else.

    Note:
        A product costs `4 · memory_size · n` multiplications. docs/how_it_works.md has the formula.

    References:
        J. Nocedal and S. J. Wright, Numerical Optimization, 2nd ed., 2006, equation (7.16) and
        algorithm 7.4.

    Examples:
        >>> import jax.numpy as jnp, difflbfgs as dl
        >>> sol = dl.minimize(lambda x, _: jnp.sum(jnp.arange(1.0, 4.0) * x**2), jnp.ones(3))
        >>> P = dl.inverse_hessian_operator(sol.state)
        >>> print(P.mv(jnp.ones(3)).shape, bool(jnp.all(jnp.linalg.eigvalsh(P.as_matrix()) > 0)))
        (3,) True
    """
    if isinstance(state, HypergradState):
        state = state.solve
    if not isinstance(state, State):
        raise TypeError(
            f"state must be the state of a Solution of LBFGS, got {state!r} of type "
            f"{type(state).__name__}. Pass solution.state."
        )
    product = _memory.inverse_hessian(state.memory, state.x, state.g)
    return SymmetricOperator.of(product, state.x)
