"""JAXopt's `implicit_diff_solve`, as an adjoint of this library."""

from collections.abc import Callable
from typing import Any

import lineax as lx

from difflbfgs._adjoint import AbstractAdjoint, ImplicitAdjoint
from difflbfgs._checks import check_callable
from difflbfgs._krylov import SymmetricSolver

# JAXopt's solvers stop at 1e-5 if not told otherwise; what is above this was not solved.
_ACCEPTED = 1e-3


class UserSolver(SymmetricSolver):
    """A function `solve(matvec, b)`, taken for a Lineax solver."""

    solve: Callable

    def init(self, operator, options):
        """Return the operator."""
        del options
        return operator

    def compute(self, state, vector, options):
        """Call the function."""
        del options
        return self.solve(state.mv, vector), lx.RESULTS.successful, {}


def make_adjoint(solve: Any) -> AbstractAdjoint:
    """Return the adjoint for an `implicit_diff_solve`.

    Raises:
        TypeError: if it is none of the things that it may be.
    """
    if solve is None:
        return ImplicitAdjoint()
    if isinstance(solve, AbstractAdjoint):
        return solve
    if isinstance(solve, lx.AbstractLinearSolver):
        return ImplicitAdjoint(linear_solver=solve)
    check_callable(
        "implicit_diff_solve",
        solve,
        "Pass a function solve(matvec, b), a lineax solver, a difflbfgs adjoint such as "
        "ImplicitAdjoint(ridge=1e-6), or None for the default.",
    )
    return ImplicitAdjoint(linear_solver=UserSolver(solve), rtol=_ACCEPTED)
