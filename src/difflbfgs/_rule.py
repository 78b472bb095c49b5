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

from difflbfgs import _vector
from difflbfgs._face import Face, Smooth
from difflbfgs._lanes import lane_by_lane
from difflbfgs._linear import differentiable_solve
from difflbfgs._problem import Problem, differentiation
from difflbfgs._solution import Outcome
from difflbfgs._task import Task
from difflbfgs._vector import Flag, Scalar, Vector


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
    outcome = task.guarded(outcome, jnp.asarray(True))

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
    outcome = task.guarded(outcome, cotangent != 0)
    face = task.on_face(problem, outcome)
    with differentiation(problem.name):
        _, pullback = jax.vjp(lambda p: _with_params(face, p, problem).value(outcome.x), params)
        (bar,) = pullback(spoil(cotangent, trusted))
    return _masked(bar, cotangent, trusted), None, None


reverse_objective.defvjp(_reverse_objective_fwd, _reverse_objective_bwd)


def _with_params(face: Smooth, params: PyTree, problem: Problem) -> Smooth:
    """Return the face, or the problem itself, with what the rule differentiates by."""
    problem = eqx.combine(params, problem)
    return face.of_problem(problem) if isinstance(face, Face) else problem


def differentiable(task: Task, problem: Problem) -> Outcome:
    """Solve; return an outcome whose `x` and `f` can be differentiated."""
    static, params, arrays = split(task, problem)
    if task.adjoint.forward_mode:
        outcome = forward(static, params, arrays)
        f = forward_objective(static, params, arrays, outcome)
    else:
        outcome = reverse(static, params, arrays)
        f = reverse_objective(static, params, arrays, outcome)
    return eqx.tree_at(lambda outcome: outcome.f, outcome, f)


def spoil(t: PyTree, trusted: Flag) -> PyTree:
    """Multiply `t` by NaN unless `trusted`, but keep a zero; linear, so that JAX transposes it."""

    def solve(_, b):
        return jax.tree.map(lambda b: jnp.where(trusted | (b == 0), b, b * jnp.nan), b)

    return differentiable_solve(lambda t: t, t, solve)


def _masked(bar: PyTree, cotangent: Vector, trusted: Flag) -> PyTree:
    """Return `bar`, or zero if the solve failed and its cotangent is zero.

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
