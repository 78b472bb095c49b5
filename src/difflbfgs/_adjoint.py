"""The choices that a user has in differentiating the minimizer."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
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
    rtol: Any = None
    ridge: Any = 0.0
    preconditioner: Any = None
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

        The solver, its tolerance and a `ridge` are those of this adjoint. Of a Hessian with
        `active` variables (`hessian_operator`) the block of the others is solved, and `u` is zero
        at the active ones, whatever `b` is there. `u` is differentiable by `b` and by the operator,
        as often as wanted and in both modes.

        Cost: that of one adjoint. Up to 64 entries the matrix is assembled and factorised once,
        for any number of right-hand sides under `jax.vmap`.

        Args:
            operator: a real Lineax operator tagged symmetric or positive semidefinite, such as that
                of `hessian_operator`.
            b: right-hand side, in the structure of the operator's vectors.
            throw: raise if the system was not solved. If `False`, `u` is NaN then.

        Returns:
            `u`, and a report: its `result` is `successful`, `adjoint_not_converged`,
            `nonfinite_hessian` or `indefinite_hessian`; `residual` is `‖b - A u‖ / ‖b‖`, recomputed
            `num_steps` are the steps of the linear solver; `min_curvature` and `max_curvature` are
            the extreme curvatures of `A` that it saw. All but the count are those in scaled
            variables if rows of `A` differ by orders of magnitude.

        Raises:
            TypeError: if `operator` is not a symmetric Lineax operator.
            ValueError: if `b` does not fit, a value is complex, or there is a `preconditioner`,
                which belongs to a solve.
            RuntimeError: if the system was not solved and `throw` is set.

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

    def system(self, operator, slack, preconditioner):
        """Return `H u = v`, ready to be solved."""
        if self.linear_solver is None:
            return default_system(operator, slack, preconditioner)
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

    For a cotangent `v` of the minimizer it solves `H u = v` with the Hessian `H` of the objective
    and returns `-Bᵀ u`, where `B` is the derivative of the gradient by `theta`. `jax.grad`,
    `jax.jacrev`, `jax.hessian`, `jax.vmap` and `jax.jit` work in any order; only a bare `jax.jvp`
    needs `ForwardImplicitAdjoint`.

    Cost: up to 64 variables `n` Hessian-vector products, batched, and a Cholesky factorisation,
    for any number of cotangents; beyond that as many products as conjugate gradients takes, for
    each cotangent, and memory for a few vectors. No iteration of the solver is stored or repeated.

    Args:
        linear_solver: any Lineax solver. `None`: the choice above.
        rtol: relative residual `‖v - H u‖ / ‖v‖` above which the adjoint has not converged. It is
            recomputed from the solution, in scaled variables if their rows of `H` differ by orders
            of magnitude. `None`: follow the forward solve, whose relative error `a` in the energy
            norm says what more would be wasted. Aim for `a / 10`, but at least for 1e-2 and at most
            for 3e-11 in float64 and 3e-6 in float32, and accept what was aimed for or the square
            root of the machine epsilon. With `approximate` always aim for the latter of the two
            bounds.
        ridge: added to the diagonal of `H`.
        preconditioner: for conjugate gradients, which is then used at any size. `"lbfgs"`: the
            inverse Hessian that the solve left in its memory. Or a function `(x, theta) -> P` to a
            positive definite Lineax operator that approximates `H⁻¹`, on PyTrees like the inexact
            leaves of `x0` or on flat vectors of all their entries. On scikit-learn's digits with
            weight decays of e⁻⁴, e⁻⁶ and e⁻⁹, `"lbfgs"` took 58, 72 and 114 products instead of 65,
            85 and 124 with `memory_size=10`, and 34, 61 and 74 with `memory_size=100`.
        approximate: differentiate wherever the solver stopped, as if that were a minimizer.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `rtol` or `ridge` is negative.
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

    It takes `u = P v` for the solution of `H u = v`, where `P` is the L-BFGS inverse Hessian that
    the solve left in its memory, newest pair included, and improves that by `refine` steps of
    conjugate gradients preconditioned with `P`. There is no test of convergence. Second derivatives
    take `P` for `H⁻¹` wherever that occurs, and are approximate in the same way.

    Cost: no Hessian-vector product with `refine=0`, else `refine + 1`, against the 28 to 124 of
    `ImplicitAdjoint` on the problems below.

    Error: measured relative error of the hypergradient (`adjoints` in
    `benchmarks/ablations.py`: softmax
    regression at decays of e⁻⁴, e⁻⁶ and e⁻⁹, a small network, hyper-cleaning, distillation; best
    to worst problem):

    | `refine` | `memory_size=10` | `memory_size=100` |
    |---|---|---|
    | 0 | 0.3 to 2.2 | 0.2 to 0.9 |
    | 5 | 0.007 to 0.9 | 0.002 to 0.3 |
    | 10 | 5e-5 to 0.5 | 3e-6 to 0.05 |

    It is a choice for early outer steps, where the direction is all that counts. The error estimate
    of `value_and_hypergrad` says how wrong it is.

    Args:
        refine: number of conjugate gradient steps.

    Raises:
        TypeError: if `refine` is not an integer.
        ValueError: if it is negative.

    References:
        Z. Ramzi et al., SHINE: sharing the inverse estimate from the forward pass for bi-level
        optimization and implicit models, ICLR 2022.
    """

    refine: int = eqx.field(default=0, static=True)
    ridge: ClassVar[Any] = 0.0
    preconditioner: ClassVar[Any] = "lbfgs"
    approximate: ClassVar[Any] = False

    def __check_init__(self):
        check_natural_number("refine", self.refine)

    @property
    def needs_products(self) -> bool:
        """Whether a solve with the Hessian multiplies by it."""
        return self.refine > 0

    def system(self, operator, slack, preconditioner):
        """Return `H u = v`, ready to be solved."""
        return default_system(operator, slack, preconditioner)

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
