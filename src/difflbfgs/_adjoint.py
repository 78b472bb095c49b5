"""The choices that a user has in differentiating the minimizer."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from difflbfgs import _rule, _vector
from difflbfgs._checks import (
    check_flag,
    check_instance,
    check_preconditioner,
    check_tolerance,
    no_type_check,
)
from difflbfgs._krylov import ConjugateGradient
from difflbfgs._linear import Accuracy, Dense, Report, System
from difflbfgs._operator import SymmetricOperator
from difflbfgs._problem import Problem
from difflbfgs._rule import Task
from difflbfgs._solution import Outcome
from difflbfgs._vector import Scalar, Vector

# Up to this many variables the Hessian is assembled and factorised; see benchmarks/crossover.py.
DENSE_SIZE = 64
_MAX_PRODUCTS = 10_000
# However early the forward solve stopped, the adjoint is solved to this.
_LOOSEST = 1e-2


@no_type_check
class AbstractAdjoint(eqx.Module):
    """How the minimizer is differentiated: how `H u = v` is solved, and in which mode.

    Attributes:
        ridge: added to the diagonal of `H`.
        preconditioner: what approximates `H⁻¹`.
        approximate: whether a solve that did not converge may be differentiated.
    """

    ridge: eqx.AbstractVar[Any]
    preconditioner: eqx.AbstractVar[Any]
    approximate: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def solve(
        self,
        operator: SymmetricOperator,
        v: Vector,
        preconditioner: SymmetricOperator | None,
        achieved: Scalar,
        start: Vector | None = None,
    ) -> tuple[Vector, Report]:
        """Solve `H u = v`, the forward solve having achieved this relative gradient norm."""

    @abc.abstractmethod
    def differentiable(self, task: Task, problem: Problem) -> Outcome:
        """Solve; return an outcome whose `x` and `f` can be differentiated."""


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

    def solve(self, operator, v, preconditioner, achieved, start=None):
        """Solve `H u = v`, the forward solve having achieved this relative gradient norm."""
        if self.linear_solver is None:
            system = default_system(operator, v, preconditioner)
        else:
            system = System.of(operator, self.linear_solver, preconditioner, rounds=1)
        return system.solve(v, self._accuracy(v, achieved), start, self.approximate)

    def _accuracy(self, v, achieved):
        """Return how well to solve: a little better than the forward solve has, if not told."""
        if self.rtol is not None:
            return Accuracy(self.rtol, self.rtol)
        eps = _vector.epsilon(v)
        wanted = eps ** (2 / 3)
        if not self.approximate:
            wanted = jnp.clip(0.1 * achieved, wanted, _LOOSEST)
        return Accuracy(wanted, jnp.maximum(wanted, eps**0.5))


def default_system(
    operator: SymmetricOperator, v: Vector, preconditioner: SymmetricOperator | None
) -> System:
    """Return `H u = v` with the solver that suits its size."""
    n = _vector.size(v)
    if n <= DENSE_SIZE and preconditioner is None:
        return System.of(operator, Dense())
    return System.of(operator, ConjugateGradient(0.1, min(10 * n, _MAX_PRODUCTS)), preconditioner)


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
            recomputed from the solution. `None`: follow the forward solve, whose relative gradient
            norm `a = stats.grad_norm / stats.reference_grad_norm` says what more would be wasted.
            Aim for `a / 10`, within `eps**(2/3)` of the working dtype (3.7e-11 in float64, 2.4e-5
            in float32) and 1e-2, and accept `eps**(1/2)` or what was aimed for. With `approximate`
            aim for `eps**(2/3)`.
        ridge: added to the diagonal of `H`.
        preconditioner: for conjugate gradients, which is then used at any size. `"lbfgs"`: the
            inverse Hessian that the solve left in its memory. Or a function `(x, theta) -> P` to a
            positive definite Lineax operator that approximates `H⁻¹`, on PyTrees like the inexact
            leaves of `x0` or on flat vectors of all their entries. On scikit-learn's digits with
            weight decays of e⁻⁴, e⁻⁶ and e⁻⁹, `"lbfgs"` took 57, 75 and 116 products instead of 63,
            86 and 128 with `memory_size=10`, and 34, 40 and 71 with `memory_size=100`.
        approximate: differentiate wherever the solver stopped, as if that were a minimizer.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `rtol` or `ridge` is negative.
    """

    def differentiable(self, task: Task, problem: Problem) -> Outcome:
        """Solve; return an outcome whose `x` and `f` can be differentiated."""
        static, params, arrays = _rule.split(task, problem)
        outcome = _rule.reverse(static, params, arrays)
        return _with_objective(outcome, _rule.reverse_objective(static, params, arrays, outcome))


@no_type_check
class ForwardImplicitAdjoint(_Exact):
    """The derivative of `ImplicitAdjoint` as a `custom_jvp`, for `jax.jvp` and `jax.jacfwd`.

    For a tangent `θ̇` it solves `H ẋ = -B θ̇`. Reverse mode works too, by transposing that solve.
    The arguments are those of `ImplicitAdjoint`.
    """

    def differentiable(self, task: Task, problem: Problem) -> Outcome:
        """Solve; return an outcome whose `x` and `f` can be differentiated."""
        static, params, arrays = _rule.split(task, problem)
        outcome = _rule.forward(static, params, arrays)
        return _with_objective(outcome, _rule.forward_objective(static, params, arrays, outcome))


def _with_objective(outcome: Any, f: Scalar) -> Outcome:
    return eqx.tree_at(lambda outcome: outcome.f, outcome, f)
