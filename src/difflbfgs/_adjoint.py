"""The choices that a user has in differentiating the minimizer."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from difflbfgs import _linear, _rule
from difflbfgs._checks import (
    check_flag,
    check_instance,
    check_preconditioner,
    check_tolerance,
    no_type_check,
)
from difflbfgs._problem import Problem
from difflbfgs._rule import Task
from difflbfgs._solution import Outcome
from difflbfgs._vector import Scalar

# Up to this many variables the Hessian is assembled and factorised; see benchmarks/crossover.py.
DENSE_SIZE = 64
_MAX_PRODUCTS = 10_000
_ROUNDS = 3


@no_type_check
class AbstractAdjoint(eqx.Module):
    """Base of `ImplicitAdjoint` and `ForwardImplicitAdjoint`, which share their settings."""

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

    @abc.abstractmethod
    def differentiable(self, task: Task, problem: Problem) -> Outcome:
        """Solve; return an outcome whose `x` and `f` can be differentiated."""

    def accuracy(self, dtype: Any) -> tuple[Any, Any]:
        """Return the relative residual to aim for, and the one to accept."""
        eps = float(jnp.finfo(dtype).eps)
        return (eps ** (2 / 3), eps**0.5) if self.rtol is None else (self.rtol, self.rtol)

    def solver(self, n: int, wanted: Any) -> tuple[lx.AbstractLinearSolver, int]:
        """Return the linear solver for `n` variables, and how often it may be called to refine."""
        if self.linear_solver is not None:
            return self.linear_solver, 1
        if n <= DENSE_SIZE and self.preconditioner is None:
            return _linear.Dense(), _ROUNDS
        return _linear.ConjugateGradient(0.5 * wanted, min(10 * n, _MAX_PRODUCTS)), _ROUNDS


@no_type_check
class ImplicitAdjoint(AbstractAdjoint):
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
            recomputed from the solution. `None`: aim for `eps**(2/3)` of the working dtype (3.7e-11
            in float64, 2.4e-5 in float32) and accept `eps**(1/2)`.
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
class ForwardImplicitAdjoint(AbstractAdjoint):
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
