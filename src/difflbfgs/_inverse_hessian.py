"""The L-BFGS approximation of the inverse Hessian, for the user."""

import lineax as lx

from difflbfgs import _memory
from difflbfgs._checks import no_type_check
from difflbfgs._hypergrad import HypergradState
from difflbfgs._loop import State
from difflbfgs._operator import SymmetricOperator


@no_type_check
def inverse_hessian_operator(state: State | HypergradState) -> lx.AbstractLinearOperator:
    """Return the inverse Hessian that a solve left in its memory, as a Lineax operator.

    With the pairs `s = x⁺ - x`, `y = ∇f(x⁺) - ∇f(x)`, oldest first, and `rho = 1 / sᵀy`, it is
    the last of

        P ← (I - rho s yᵀ) P (I - rho y sᵀ) + rho s sᵀ,    at first P = gamma I,

    `gamma = sᵀy / yᵀy` of the newest pair, which is included. `P` is symmetric positive definite,
    and tagged so. It approximates `H⁻¹` in the directions that the solve went last, and is a
    multiple of the identity in all others: a preconditioner, or with that grain of salt the
    covariance of a Laplace approximation.

    A product costs `4 · memory_size · n` multiplications.

    Args:
        state: `state` of a `Solution` of `LBFGS`, or of a `HypergradInfo`.

    Returns:
        An operator on vectors of all the entries that were minimized over, in the order of
        `jax.tree.leaves` (complex leaves as real and imaginary part); with `flatten=False`, on the
        list of those leaves. The dtype is the solve's working dtype.

    Raises:
        TypeError: if `state` is something else.

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
