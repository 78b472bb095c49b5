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

from difflbfgs import _box, _krylov, _memory, _vector
from difflbfgs._box import Face
from difflbfgs._lanes import lane_by_lane
from difflbfgs._linear import Report, System
from difflbfgs._operator import SymmetricOperator
from difflbfgs._problem import Problem, differentiation, interior
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
        with interior(problem.name):
            outcome = self.find(problem)
        return outcome.raised() if self.throw else outcome

    def trusts_value(self, outcome: Outcome) -> Flag:
        """Return whether the objective at the outcome may be differentiated."""
        found = has_converged(outcome.result) & outcome.regular
        return found | self.adjoint.approximate

    def trusts(self, outcome: Outcome) -> Flag:
        """Return whether the outcome may be differentiated."""
        return self.trusts_value(outcome) & ~self._is_torn(outcome)

    def _is_torn(self, outcome: Outcome) -> Flag:
        """Return whether there is a derivative on either side only, and none is to be taken."""
        if outcome.weak is None or self.adjoint.approximate:
            return jnp.asarray(False)
        return outcome.stats.num_weakly_active > 0

    def on_face(self, problem: Problem, outcome: Outcome) -> Any:
        """Return the problem that is to be differentiated, active variables being held."""
        if outcome.active is None:
            return problem
        x, active, weak = jax.lax.stop_gradient((outcome.x, outcome.active, outcome.weak))
        if self.adjoint.approximate:
            active = _box.masked(weak, active)
        return Face.of(problem, active, x)

    def solve_adjoint(self, problem: Any, outcome: Outcome, v: Vector) -> tuple[Vector, Report]:
        """Solve `H u = v` at the outcome; of a problem with bounds, on its face.

        If the forward or the adjoint solve failed, this raises or multiplies `u` by NaN. (Selecting
        a NaN instead would have a derivative of zero.) A `v` of zero has the solution zero always.
        """

        def solve(_, b):
            return lane_by_lane(Task._solve_adjoint_alone)(self, problem, outcome, b)

        matvec = self._hessian(problem, outcome)  # for the derivatives of this solve
        with interior(problem.name):
            return _linear_solve(matvec, v, solve, has_aux=True)

    def _solve_adjoint_alone(self, problem: Any, outcome: Outcome, v: Vector):
        operator = SymmetricOperator.of(self._hessian(problem, outcome), v)
        u, report = self.solve_system(self.system(problem, operator, outcome), outcome, v)
        spoilt = (report.result != RESULTS.successful) | ~self.trusts(outcome)
        factor = jnp.where(spoilt & ~_vector.is_zero(v), jnp.nan, 1)
        return _vector.scale(factor, u), report

    def _hessian(self, problem: Any, outcome: Outcome) -> Callable[[Vector], Vector]:
        """Return the Hessian-vector product at the outcome, with the ridge of the adjoint."""
        product = problem.product if self.adjoint.needs_products else problem.product_if_any
        ridge = self.adjoint.ridge
        return lambda p: _vector.add_scaled(product(outcome.x, p), ridge, problem.free(p))

    def system(self, problem: Any, operator: SymmetricOperator, outcome: Outcome) -> System:
        """Return `H u = v`, preconditioned and ready to be solved."""
        apply = self._preconditioner(outcome)
        if apply is not None and isinstance(problem, Face):
            apply = problem.restricted(apply)
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
        result = RESULTS.where(self._is_torn(outcome), RESULTS.weakly_active, result)
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

    face = task.on_face(problem, outcome)

    def gradient(params):
        return _with_params(face, params, problem).gradient(outcome.x)

    with differentiation(problem.name):
        _, b = jax.jvp(gradient, (params,), (tangents[0],))
    u, _ = task.solve_adjoint(face, outcome, b)
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
    v = jax.tree.map(_instantiated, cotangent.x, outcome.x)
    face = task.on_face(problem, outcome)
    u, _ = task.solve_adjoint(face, outcome, v)
    with differentiation(problem.name):
        _, pullback = jax.vjp(lambda p: _with_params(face, p, problem).gradient(outcome.x), params)
        (bar,) = pullback(jax.tree.map(jnp.negative, u))
    return _masked(bar, v, task.trusts(outcome)), None


reverse.defvjp(_reverse_fwd, _reverse_bwd, symbolic_zeros=True)


def _instantiated(cotangent, like):
    """Return the cotangent of a leaf as an array, also if the leaf was not used."""
    return jnp.zeros_like(like) if isinstance(cotangent, SymbolicZero) else cotangent


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

    face = task.on_face(problem, outcome)

    def value(params):
        return _with_params(face, params, problem).value(outcome.x)

    f = forward_objective(static, params, arrays, outcome)
    with differentiation(problem.name):
        tangent = directional(value, params, tangents[0])
    return f, spoil(tangent, task.trusts_value(outcome))


def directional(value: Callable[[PyTree], Scalar], params: PyTree, tangent: PyTree) -> Scalar:
    """Return the derivative of a scalar along `tangent`, by reverse mode.

    The user's function need not have another one: a `jax.custom_vjp` in it has not.
    """
    f, gradient = jax.value_and_grad(value)(params)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
    return sum((jnp.sum((g * t).real).astype(f.dtype) for g, t in pairs), jnp.zeros_like(f))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reverse_objective(static, params, arrays, outcome) -> Scalar:
    return forward_objective(static, params, arrays, outcome)


def _reverse_objective_fwd(static, params, arrays, outcome):
    f = forward_objective(static, params, arrays, outcome)
    return f, (params, arrays, outcome)


def _reverse_objective_bwd(static, residuals, cotangent):
    params, arrays, outcome = residuals
    task, problem = merge(static, params, arrays)
    trusted = task.trusts_value(outcome)
    face = task.on_face(problem, outcome)
    with differentiation(problem.name):
        _, pullback = jax.vjp(lambda p: _with_params(face, p, problem).value(outcome.x), params)
        (bar,) = pullback(spoil(cotangent, trusted))
    return _masked(bar, cotangent, trusted), None, None


reverse_objective.defvjp(_reverse_objective_fwd, _reverse_objective_bwd)


def _with_params(face: Any, params: PyTree, problem: Problem) -> Any:
    """Return the face, or the problem itself, with what the rule differentiates by."""
    problem = eqx.combine(params, problem)
    return face.of_problem(problem) if isinstance(face, Face) else problem


def spoil(t: PyTree, trusted: Flag) -> PyTree:
    """Multiply `t` by NaN unless `trusted`, but keep a zero; linear, so that JAX transposes it."""

    def solve(_, b):
        return jax.tree.map(lambda b: jnp.where(trusted | (b == 0), b, b * jnp.nan), b)

    return _linear_solve(lambda t: t, t, solve)


def _linear_solve(matvec, b, solve, has_aux=False):
    """Solve a symmetric system by `solve`, and differentiate that by `matvec`."""
    b = _with_whole_tangent(b)
    return jax.lax.custom_linear_solve(matvec, b, solve, symmetric=True, has_aux=has_aux)


@jax.custom_jvp
def _with_whole_tangent(tree: PyTree) -> PyTree:
    """Return `tree`; if one leaf of its tangent is a symbolic zero, JAX's linear solve raises."""
    return tree


@_with_whole_tangent.defjvp
def _with_whole_tangent_jvp(primals, tangents):
    return primals[0], tangents[0]


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
