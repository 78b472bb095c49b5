"""The choices that a user has in differentiating the minimizer."""

from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jax.typing import ArrayLike
from jaxtyping import PyTree

from difflbfgs import _symmetric, _vector
from difflbfgs._checks import (
    check_flag,
    check_instance,
    check_natural_number,
    check_preconditioner,
    check_tolerance,
    no_type_check,
)
from difflbfgs._krylov import is_negative
from difflbfgs._linear import Accuracy, Report, System
from difflbfgs._solution import RESULTS, count
from difflbfgs._system import AbstractAdjoint, default_system

# Relative residuals: however exact the forward solve is, the adjoint is not solved any further than
# to the first; however early that stopped, it is solved to the second.
_FINEST = 3e-11
_LOOSEST = 1e-2


class _Exact(AbstractAdjoint):
    """The settings that `ImplicitAdjoint` and `ForwardImplicitAdjoint` share."""

    linear_solver: lx.AbstractLinearSolver | None = None
    rtol: ArrayLike | None = None
    ridge: ArrayLike = 0.0
    preconditioner: (
        Literal["lbfgs"] | Callable[[PyTree, PyTree], lx.AbstractLinearOperator] | None
    ) = None
    approximate: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        if self.linear_solver is not None:
            check_instance(
                "linear_solver",
                self.linear_solver,
                (lx.AbstractLinearSolver,),
                "lineax.CG(rtol=1e-6, atol=0)",
            )
        check_tolerance("rtol", self.rtol, optional=True)
        check_tolerance("ridge", self.ridge)
        check_preconditioner(self.preconditioner)
        check_flag("approximate", self.approximate)

    @no_type_check
    def solve(
        self, operator: lx.AbstractLinearOperator, b: PyTree, *, throw: bool = True
    ) -> tuple[PyTree, Report]:
        """Solve `A u = b` for a symmetric operator, with all that the adjoint checks.

        The solver, its tolerance and a `ridge` are those of this adjoint. `u` is differentiable by
        `b` and by the operator, as often as wanted and in both modes.

        Args:
            operator: a real Lineax operator tagged symmetric or positive semidefinite, such as that
                of `hessian_operator`. With `active` variables the block of the others is solved.
            b: right-hand side, in the structure of the operator's vectors.
            throw: raise if the system was not solved. If `False`, `u` is NaN then.

        Returns:
            `u`, which is zero at active variables, and a report. Its `result` is `successful`,
            `adjoint_not_converged`, `nonfinite_hessian` or `indefinite_hessian`; `residual` is
            `‖b - A u‖ / ‖b‖`, recomputed; `num_steps` are the steps of the linear solver;
            `min_curvature` and `max_curvature` are the extreme curvatures of `A` that it saw. All
            but the count are those in scaled variables if rows of `A` differ by orders of
            magnitude.

        Raises:
            TypeError: if `operator` is not a symmetric Lineax operator.
            ValueError: if `b` does not fit, a value is complex, or there is a `preconditioner`,
                which belongs to a solve.
            RuntimeError: if the system was not solved and `throw` is set.

        Note:
            It costs what one adjoint does. Up to 64 entries the matrix is assembled and factorised
            once, for any number of right-hand sides under `jax.vmap`; for many of them, up to 1024.

        Examples:
            >>> import jax.numpy as jnp, difflbfgs as dl
            >>> H = dl.hessian_operator(lambda x, _: jnp.sum(jnp.cosh(x)), jnp.zeros(2))
            >>> u, report = dl.ImplicitAdjoint().solve(H, jnp.array([1.0, 2.0]))
            >>> print(u.round(3), bool(report.result == dl.RESULTS.successful))
            [1. 2.] True
        """
        check_flag("throw", throw)
        if self.preconditioner is not None:
            raise ValueError(
                f"preconditioner belongs to the solve of an objective, and here is none, got "
                f"{self.preconditioner!r}. Leave it out, or give a linear_solver."
            )
        return _symmetric.solve(self, operator, b, throw)

    def system(self, operator, slack, preconditioner, num=1):
        """Return `H u = v`, ready to be solved."""
        if self.linear_solver is None:
            return default_system(operator, slack, preconditioner, num)
        return System.of(operator, self.linear_solver, slack, preconditioner, rounds=1)

    def solve_system(self, system, v, achieved, start=None):
        """Solve the system, the forward solve having left this relative error."""
        return system.solve(v, self._accuracy(v, achieved), start, self.approximate)

    def _accuracy(self, v, achieved):
        """Return how well to solve: a little better than the forward solve has, if not told."""
        if self.rtol is not None:
            return Accuracy(self.rtol, self.rtol)
        eps = _vector.epsilon(v)
        wanted = max(eps**0.8, _FINEST)
        if not self.approximate:
            wanted = jnp.clip(0.1 * achieved, wanted, _LOOSEST)
        return Accuracy(wanted, jnp.maximum(wanted, eps**0.5))


@no_type_check
class ImplicitAdjoint(_Exact):
    """Reverse-mode derivative of the minimizer by the implicit function theorem.

    For a cotangent `v` it solves `H u = v` with the Hessian `H` and returns `-Bᵀ u`, `B = ∂_θ∇ₓf`.
    `jax.grad`, `jax.jacrev`, `jax.hessian`, `jax.vmap` and `jax.jit` work in any order.

    Args:
        linear_solver: any Lineax solver. `None`: Cholesky's factorisation up to 64 variables, and
            conjugate gradients beyond.
        rtol: relative residual `‖v - H u‖ / ‖v‖` above which the adjoint has not converged. `None`:
            follow the forward solve.
        ridge: added to the diagonal of `H`.
        preconditioner: `"lbfgs"`, the memory of the solve, or a function `(x, theta) -> P` to a
            positive definite Lineax operator `P ≈ H⁻¹`: for conjugate gradients, at any size.
        approximate: differentiate wherever the solver stopped, as if that were a minimizer.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `rtol` or `ridge` is negative.

    Note:
        Only a bare `jax.jvp` or `jax.jacfwd` needs `ForwardImplicitAdjoint`.

        Up to 64 variables `n` it costs `n` Hessian-vector products, batched, and a factorisation,
        for any number of cotangents; for many of them at once, up to 1024 variables. Beyond that it
        costs as many products as conjugate gradients takes, for each cotangent, and memory for a
        few vectors.

        The residual is recomputed from the solution, in scaled variables if their rows of `H`
        differ by orders of magnitude. `P` is an operator on PyTrees like the inexact leaves of
        `x0`, or on flat vectors of all their entries.
    """


@no_type_check
class ForwardImplicitAdjoint(_Exact):
    """The derivative of `ImplicitAdjoint` as a `custom_jvp`, for `jax.jvp` and `jax.jacfwd`.

    For a tangent `dθ` it solves `H dx = -B dθ`. Reverse mode works too, by transposing that solve.
    The arguments are those of `ImplicitAdjoint`.
    """

    @property
    def forward_mode(self) -> bool:
        """Whether the derivative is a `custom_jvp`: yes."""
        return True


@no_type_check
class QuasiNewtonAdjoint(AbstractAdjoint):
    """An approximate derivative: the memory of the forward solve stands in for `H⁻¹` (SHINE).

    It takes `u = P v` for the solution of `H u = v`, with the L-BFGS inverse Hessian `P`, and
    improves that by `refine` steps of conjugate gradients preconditioned with `P`.

    Args:
        refine: number of conjugate gradient steps.

    Raises:
        TypeError: if `refine` is not an integer.
        ValueError: if it is negative.

    Note:
        It costs no Hessian-vector product with `refine=0`, else `refine + 1`. There is no test of
        convergence; the error estimate of `value_and_hypergrad` says how wrong it is, and
        docs/choosing.md how wrong it was. Second derivatives are approximate in the same way.

    References:
        Z. Ramzi et al., SHINE: sharing the inverse estimate from the forward pass for bi-level
        optimization and implicit models, ICLR 2022.
    """

    refine: int = eqx.field(default=0, static=True)
    preconditioner: ClassVar[str] = "lbfgs"

    def __check_init__(self):
        check_natural_number("refine", self.refine)

    @property
    def needs_products(self) -> bool:
        """Whether a solve with the Hessian multiplies by it."""
        return self.refine > 0

    def system(self, operator, slack, preconditioner, num=1):
        """Return `H u = v`, ready to be solved."""
        return default_system(operator, slack, preconditioner, num)

    def solve_system(self, system, v, achieved, start=None):
        """Return `P v`, refined."""
        del start
        u = system.options["preconditioner"].mv(v)
        low, high = jnp.full_like(achieved, jnp.inf), jnp.zeros_like(achieved)
        result, products = RESULTS.successful, 0
        if self.refine > 0:
            left = _vector.sub(v, system.operator.mv(u))
            step = system.steps(left, self.refine)
            u, products = _vector.add_scaled(u, 1, step.value), self.refine + 1
            low, high = step.stats["min_curvature"], step.stats["max_curvature"]
            negative = is_negative(low, high, system.slack)
            result = RESULTS.where(negative, RESULTS.indefinite_hessian, result)
        return u, Report(result, count(products), jnp.full_like(low, jnp.nan), low, high)
