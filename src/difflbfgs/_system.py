"""What every way to differentiate has to say: how `H u = v` is solved, and in which mode."""

import abc
from typing import Any, cast

import equinox as eqx

from difflbfgs._checks import no_type_check
from difflbfgs._krylov import ConjugateGradient
from difflbfgs._linear import Dense, Report, System
from difflbfgs._operator import SymmetricOperator
from difflbfgs._vector import Scalar, Vector

# Up to this many variables the Hessian is assembled (see `crossover` in benchmarks/ablations.py).
DENSE_SIZE = 64
# With several right-hand sides, up to so many for each of them, as conjugate gradients take about
# that many products for each; and never more than the second, for the sake of memory.
_PER_SIDE = 30
_LARGEST = 1024
_MAX_PRODUCTS = 10_000


@no_type_check
class AbstractAdjoint(eqx.Module):
    """How the minimizer is differentiated: how `H u = v` is solved, and in which mode.

    Attributes:
        ridge: added to the diagonal of `H`.
        preconditioner: what approximates `H⁻¹`.
        approximate: whether a solve that did not converge may be differentiated.
    """

    # Without annotations these are no fields: a class below may have fields in their place.
    ridge = cast(Any, 0.0)
    preconditioner = cast(Any, None)
    approximate = cast(Any, False)

    @property
    def forward_mode(self) -> bool:
        """Whether the derivative is a `custom_jvp`, and not a `custom_vjp`."""
        return False

    @property
    def needs_products(self) -> bool:
        """Whether a solve with the Hessian multiplies by it."""
        return True

    @abc.abstractmethod
    def system(
        self,
        operator: SymmetricOperator,
        slack: Scalar,
        preconditioner: SymmetricOperator | None,
        num: int = 1,
    ) -> System:
        """Return `H u = v`, ready to be solved for so many `v`.

        Curvature of either sign below `slack` is none.
        """

    @abc.abstractmethod
    def solve_system(
        self, system: System, v: Vector, achieved: Scalar, start: Vector | None = None
    ) -> tuple[Vector, Report]:
        """Solve the system, the forward solve having left this relative error."""


def default_system(
    operator: SymmetricOperator,
    slack: Scalar,
    preconditioner: SymmetricOperator | None,
    num: int = 1,
) -> System:
    """Return `H u = v` with the solver that suits its size, and the number of right-hand sides."""
    n = operator.out_size()
    most = DENSE_SIZE if num == 1 else min(max(DENSE_SIZE, _PER_SIDE * num), _LARGEST)
    if n <= most and preconditioner is None:
        return System.of(operator, Dense(slack), slack)
    solver = ConjugateGradient(0.1, min(10 * n, _MAX_PRODUCTS))
    return System.of(operator, solver, slack, preconditioner)
