"""How the minimizer is differentiated: one rule, in two shapes.

At a minimizer `∇f(x, θ) = 0`. With `H = ∇²ₓₓf` and `B = ∂_θ∇ₓf`, the implicit function theorem says

    ẋ = -H⁻¹ B θ̇        and        θ̄ = -Bᵀ u,  H u = v,

where `v` is the cotangent of `x`. The first is a `jax.custom_jvp` whose linear solve JAX can
transpose and differentiate again. The second is a `jax.custom_vjp` around it, whose forward rule
calls the first, so that second derivatives meet a rule and never the solver's loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import PyTree

from difflbfgs import _krylov, _memory, _vector
from difflbfgs._lanes import lane_by_lane
from difflbfgs._linear import Report, System
from difflbfgs._operator import SymmetricOperator
from difflbfgs._problem import Problem, interior
from difflbfgs._solution import RESULTS, Outcome, has_converged, raised
from difflbfgs._vector import Flag, Scalar, Vector


class Task(eqx.Module):
    """A solve to be done, and what its derivative needs to know, but for the problem itself.

    Attributes:
        find: how the minimizer is found: by a search, or by checking a point.
        adjoint: how it is differentiated.
        preconditioner: the user's, if any.
        throw: whether to raise.
    """

    find: Callable[[Problem], Outcome]
    adjoint: Any
    preconditioner: Callable[[Vector, Vector], Vector] | None
    throw: bool = eqx.field(static=True)

    def solve(self, problem: Problem) -> Outcome:
        """Solve, and raise here, where the derivative will see it, if that failed."""
        with interior():
            outcome = self.find(problem)
        return outcome.raised() if self.throw else outcome

    def trusts(self, outcome: Outcome) -> Flag:
        """Return whether the outcome may be differentiated."""
        found = has_converged(outcome.result) & outcome.regular
        return found | self.adjoint.approximate

    def solve_adjoint(self, problem: Problem, outcome: Outcome, v: Vector) -> tuple[Vector, Report]:
        """Solve `H u = v` at the outcome.

        If the forward or the adjoint solve failed, this raises or multiplies `u` by NaN. (Selecting
        a NaN instead would have a derivative of zero.) A `v` of zero has the solution zero always.
        """

        def hvp(p):
            return problem.product(outcome.x, p)

        def solve(_, b):
            return lane_by_lane(Task._solve_adjoint_alone)(self, problem, outcome, b)

        matvec = self.ridged(hvp)  # for the derivatives of this solve
        with interior():
            return jax.lax.custom_linear_solve(matvec, v, solve, symmetric=True, has_aux=True)

    def _solve_adjoint_alone(self, problem: Problem, outcome: Outcome, v: Vector):
        def hvp(p):
            return problem.product(outcome.x, p)

        operator = SymmetricOperator.of(self.ridged(hvp), v)
        u, report = self.solve_system(self.system(operator, outcome), outcome, v)
        spoilt = (report.result != RESULTS.successful) | ~self.trusts(outcome)
        factor = jnp.where(spoilt & ~_vector.is_zero(v), jnp.nan, 1)
        return _vector.scale(factor, u), report

    def ridged(self, hvp: Callable[[Vector], Vector]) -> Callable[[Vector], Vector]:
        """Return the Hessian-vector product with the ridge that the adjoint adds."""
        return lambda p: _vector.add_scaled(hvp(p), self.adjoint.ridge, p)

    def system(self, operator: SymmetricOperator, outcome: Outcome) -> System:
        """Return `H u = v`, preconditioned and ready to be solved."""
        apply = self._preconditioner(outcome)
        preconditioner = None if apply is None else SymmetricOperator.of(apply, outcome.x)
        grad_norm = jax.lax.stop_gradient(outcome.stats.grad_norm)
        slack = _krylov.slack(jax.lax.stop_gradient(outcome.x), grad_norm)
        return self.adjoint.system(operator, slack, preconditioner)

    def solve_system(
        self, system: System, outcome: Outcome, v: Vector, start: Vector | None = None
    ) -> tuple[Vector, Report]:
        """Solve `H u = v` as the adjoint says; raise if that failed and `throw` is set."""
        achieved, regular = jax.lax.stop_gradient((outcome.achieved, outcome.regular))
        u, report = self.adjoint.solve_system(system, v, achieved, start)
        refused = ~regular & ~jnp.asarray(self.adjoint.approximate)
        result = RESULTS.where(refused, RESULTS.adjoint_not_converged, report.result)
        report = eqx.tree_at(lambda report: report.result, report, result)
        if self.throw:
            failed = (report.result != RESULTS.successful) & ~_vector.is_zero(v)
            u = raised(u, failed, report.result)
        return u, report

    def _preconditioner(self, outcome):
        """Return the approximate inverse Hessian to precondition with, as a function, or `None`."""
        x, state = jax.lax.stop_gradient((outcome.x, outcome.state))
        if self.preconditioner is not None:
            return functools.partial(jax.lax.stop_gradient(self.preconditioner), x)
        if self.adjoint.preconditioner == "lbfgs":
            return _memory.inverse_hessian(state.memory, x, state.g)
        return None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward(static, params, arrays) -> Outcome:
    task, problem = merge(static, params, arrays)
    return lane_by_lane(Task.solve)(task, problem)


@forward.defjvp
def _forward_jvp(static, primals, tangents):
    params, arrays = primals
    outcome = forward(static, params, arrays)
    task, problem = merge(static, params, arrays)

    def gradient(params):
        return eqx.combine(params, problem).gradient(outcome.x)

    _, b = jax.jvp(gradient, (params,), (tangents[0],))
    u, _ = task.solve_adjoint(problem, outcome, b)
    tangent = jax.tree.map(zero_tangent, outcome)
    return outcome, eqx.tree_at(lambda o: o.x, tangent, jax.tree.map(jnp.negative, u))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reverse(static, params, arrays) -> Outcome:
    return forward(static, params, arrays)


def _reverse_fwd(static, params, arrays):
    params, arrays = custom_vjp_primal_tree_values((params, arrays))
    outcome = forward(static, params, arrays)
    return outcome, (params, arrays, outcome)


def _reverse_bwd(static, residuals, cotangent):
    params, arrays, outcome = residuals
    if all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(cotangent.x)):
        return None, None  # the minimizer was not used: no adjoint to solve
    task, problem = merge(static, params, arrays)
    u, _ = task.solve_adjoint(problem, outcome, cotangent.x)
    _, pullback = jax.vjp(lambda p: eqx.combine(p, problem).gradient(outcome.x), params)
    (bar,) = pullback(jax.tree.map(jnp.negative, u))
    return _masked(bar, cotangent.x, task.trusts(outcome)), None


reverse.defvjp(_reverse_fwd, _reverse_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward_objective(static, params, arrays, outcome) -> Scalar:
    return outcome.f


@forward_objective.defjvp
def _forward_objective_jvp(static, primals, tangents):
    """The envelope theorem: as `∇ₓf = 0`, only the partial derivative by `params` is left.

    It is a function of `x` still, so that the second derivative finds `dx/dθ` in it.
    """
    params, arrays, outcome = primals
    task, problem = merge(static, params, arrays)

    def value(params):
        return eqx.combine(params, problem).value(outcome.x)

    _, tangent = jax.jvp(value, (params,), (tangents[0],))
    f = forward_objective(static, params, arrays, outcome)
    return f, spoil(tangent, task.trusts(outcome))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reverse_objective(static, params, arrays, outcome) -> Scalar:
    return forward_objective(static, params, arrays, outcome)


def _reverse_objective_fwd(static, params, arrays, outcome):
    f = forward_objective(static, params, arrays, outcome)
    return f, (params, arrays, outcome)


def _reverse_objective_bwd(static, residuals, cotangent):
    params, arrays, outcome = residuals
    task, problem = merge(static, params, arrays)
    trusted = task.trusts(outcome)
    _, pullback = jax.vjp(lambda p: eqx.combine(p, problem).value(outcome.x), params)
    (bar,) = pullback(spoil(cotangent, trusted))
    return _masked(bar, cotangent, trusted), None, None


reverse_objective.defvjp(_reverse_objective_fwd, _reverse_objective_bwd)


def spoil(t: PyTree, trusted: Flag) -> PyTree:
    """Multiply `t` by NaN unless `trusted`, but keep a zero; linear, so that JAX transposes it."""

    def solve(_, b):
        return jax.tree.map(lambda b: jnp.where(trusted | (b == 0), b, b * jnp.nan), b)

    return jax.lax.custom_linear_solve(lambda t: t, t, solve, symmetric=True)


def _masked(bar: PyTree, cotangent: Vector, trusted: Flag) -> PyTree:
    """Return `bar`, or zero where the solve failed and its cotangent is zero.

    There the problem itself may be NaN, and `0 · NaN` would reach the lanes that are well.
    """
    masked = ~trusted & _vector.is_zero(cotangent)
    spoilt = [jnp.sum(leaf) for leaf in jax.tree.leaves(spoil(cotangent, trusted))]
    zero = jnp.stack(spoilt).sum()
    return jax.tree.map(lambda leaf: jnp.where(masked, zero.astype(leaf.dtype), leaf), bar)


def split(task: PyTree, problem: PyTree):
    """Split all that a rule needs: what is constant, what is differentiated, all other arrays."""
    params, rest = eqx.partition(problem, eqx.is_inexact_array)
    arrays, static = eqx.partition((task, rest), _is_array)
    return static, params, arrays


def merge(static, params, arrays) -> tuple[Any, Any]:
    """Return what was split."""
    task, rest = eqx.combine(arrays, static)
    return task, eqx.combine(params, rest)


def _is_array(leaf):
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray)


def zero_tangent(leaf):
    """Return a tangent of zero."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
