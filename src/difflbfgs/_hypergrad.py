"""`value_and_hypergrad`: an outer loss, its hypergradient, and how right that is."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from difflbfgs import _certificate, _rule
from difflbfgs._accuracy import Wanted, accurate
from difflbfgs._adjoint import ForwardImplicitAdjoint, ImplicitAdjoint, QuasiNewtonAdjoint
from difflbfgs._certificate import Certified, certified
from difflbfgs._checks import (
    check_callable,
    check_flag,
    check_instance,
    check_positive_integer,
    check_tolerance,
    no_type_check,
)
from difflbfgs._lanes import lane_by_lane
from difflbfgs._lbfgs import LBFGS
from difflbfgs._loop import State
from difflbfgs._minimize import check_watchers, make_solution, make_task, with_bounds
from difflbfgs._problem import Problem, make_problem, make_variables, split_theta
from difflbfgs._solution import RESULTS, Solution, short_errors
from difflbfgs._system import AbstractAdjoint
from difflbfgs._task import Task
from difflbfgs._vector import Scalar, Vector
from difflbfgs._watch import Step


class HypergradState(eqx.Module):
    """What one call hands to the next: the solve's state, and the adjoint vector."""

    solve: State
    adjoint: Vector


class HypergradInfo(eqx.Module):
    """What is known about a hypergradient.

    Attributes:
        solution: the inner `Solution`.
        state: hand it to the next call for a warm start: minimizer, curvature pairs and adjoint
            vector.
        result: how the inner solve ended or, if that converged, the adjoint solve, or the estimate
            (`uncertified`, `accuracy_not_reached`); a member of `difflbfgs.RESULTS`.
        num_adjoint_steps: steps of the adjoint's linear solver: products with the Hessian, or with
            a dense factorisation the number of variables.
        num_estimate_steps: the same for `error_estimate`. If the adjoint's factor serves, 0; with
            `accuracy`, what its curvatures take.
        adjoint_residual: `‖∇ₓF - H u‖ / ‖∇ₓF‖`, recomputed from `u`; of scaled variables if their
            rows of `H` differ by orders of magnitude.
        error_estimate: estimated 2-norm of `grad - exact`, over all leaves; infinite if the
            estimate does not hold.
        min_curvature: smallest eigenvalue of `H` up to 64 variables, else an upper bound of it.
            Negative: the solution is not a minimum.
        max_curvature: largest eigenvalue in magnitude, or a lower bound of it.
    """

    solution: Solution
    state: HypergradState
    result: RESULTS
    num_adjoint_steps: Int[Array, "*batch"]
    num_estimate_steps: Int[Array, "*batch"]
    adjoint_residual: Float[Array, "*batch"]
    error_estimate: Float[Array, "*batch"]
    min_curvature: Float[Array, "*batch"]
    max_curvature: Float[Array, "*batch"]

    def __repr__(self) -> str:
        brief = eqx.tree_at(lambda info: (info.solution, info.state), self, (..., ...))
        return eqx.tree_pformat(brief, short_arrays=False)


@no_type_check
def value_and_hypergrad(
    outer: Callable,
    inner: Callable,
    *,
    accuracy: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    bounds: tuple[PyTree, PyTree] | Callable[[PyTree], tuple[PyTree, PyTree]] | None = None,
    solver: LBFGS = LBFGS(),
    adjoint: ImplicitAdjoint | ForwardImplicitAdjoint | QuasiNewtonAdjoint = ImplicitAdjoint(),
    max_steps: int = 1000,
    throw: bool = True,
    callback: Callable[[Step], object] | None = None,
    stop: Callable[[Step], ArrayLike] | None = None,
) -> Callable[..., tuple[Float[Array, ""], PyTree, HypergradInfo]]:
    """Make a function that returns an outer loss, its hypergradient, and an error estimate of it.

    For `x*(θ) = argmin_x f(x, θ)` it returns `F(x*, θ)` and `dF/dθ = ∂_θF - (∂_θ∇ₓf)ᵀ u`, with
    `H u = ∇ₓF` and `H = ∇²ₓₓf`, as `jax.grad` over `minimize` does.

    Args:
        outer: the outer loss `F`, `outer(x, theta)`, a real scalar.
        inner: the inner objective `f`, `inner(x, theta)`, as for `minimize`.
        accuracy: error wanted relative to the 2-norm of the hypergradient, or `(relative,
            absolute)`, which add up. `None`: as exact as `solver` and `adjoint` make it.
        bounds: a pair `(lower, upper)` as for `minimize`, or a function `theta -> (lower, upper)`,
            by which `grad` goes, too.
        solver: `LBFGS(...)`. With `accuracy`, its `rtol` and `polish` do not count.
        adjoint: `ImplicitAdjoint(...)`, `QuasiNewtonAdjoint(...)`, or `ForwardImplicitAdjoint(...)`
            as the first. With `accuracy`, its `rtol` and `ridge` do not count.
        max_steps: bound on the steps of the inner solve.
        throw: raise if the inner solve or the adjoint did not converge, or the accuracy was not
            reached. If `False`, `info.result` says what happened.
        callback: called after every step of the inner solve, as in `minimize`.
        stop: ends the inner solve, as in `minimize`.

    Returns:
        A function `step(theta, x0, state=None)`, which returns `(value, grad, info)`, `info` being
        a `HypergradInfo`. `grad` has the structure of `theta`, with `None` for leaves that are not
        floating-point or complex. `state` is the `info.state` of an earlier call. The function
        works under `jax.jit` and `jax.vmap`.

    Raises:
        TypeError: if an argument has the wrong type, or a function returns something else.
        ValueError: if `x0` or `theta` has no floating-point leaf, or `state` does not fit.
        RuntimeError: if inner solve or adjoint did not converge, or the accuracy was not reached,
            and `throw` is set.

    Note:
        If inner solve or adjoint failed under `throw=False`, the gradient is NaN and the error
        estimate infinite. If only the accuracy was not reached, both are what was found.

        `value` can be differentiated again, once. The derivative of `grad` and `info` is NaN; for
        second derivatives there is `minimize`.

        The estimate costs two loose linear solves and a few gradients; up to 64 variables no
        products. Under `jax.jit` an estimate that is not used is not computed.
        docs/how_it_works.md has its equations, and how right it was.

    References:
        F. Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016.

        M. J. Ehrhardt and L. Roberts, Analyzing inexact hypergradients for bilevel learning, IMA
        Journal of Applied Mathematics, 2023.

    Examples:
        >>> import jax.numpy as jnp, difflbfgs as dl
        >>> def ridge(w, penalty):
        ...     return jnp.sum((w - jnp.arange(3.0)) ** 2) + penalty * jnp.sum(w**2)
        >>> step = dl.value_and_hypergrad(lambda w, penalty: jnp.sum(w), ridge)
        >>> value, grad, info = step(0.5, jnp.zeros(3))
        >>> print(f"{value:.4f} {grad:.4f} {bool(info.error_estimate < 1e-5)}")
        2.0000 -1.3333 True
        >>> value, grad, info = step(0.51, jnp.zeros(3), info.state)
        >>> print(f"{value:.4f}")
        1.9868
        >>> rough = dl.value_and_hypergrad(lambda w, penalty: jnp.sum(w), ridge, accuracy=1e-2)
        >>> value, grad, info = rough(0.5, jnp.zeros(3))
        >>> print(bool(info.error_estimate <= 1e-2 * abs(grad)))
        True
    """
    check_callable("outer", outer, "It is called as outer(x, theta).")
    check_callable("inner", inner, "It is called as inner(x, theta).")
    check_instance("solver", solver, (LBFGS,), "LBFGS()")
    check_instance("adjoint", adjoint, (AbstractAdjoint,), "ImplicitAdjoint()")
    check_positive_integer("max_steps", max_steps)
    check_flag("throw", throw)
    check_watchers(callback, stop)
    wanted = None if accuracy is None else _wanted(accuracy)

    def step(theta: PyTree, x0: PyTree, state: HypergradState | None = None):
        variables = make_variables(x0, solver.flatten)
        x = variables.to_vector(x0)
        leaves, structure, _ = split_theta(theta)
        _check(theta, leaves, state)
        problems = [
            make_problem(fun, theta, variables, x, name=name)
            for fun, name in ((inner, "inner"), (outer, "outer"))
        ]
        problems[0] = with_bounds(problems[0], bounds, theta, variables, x0, solver)
        warm = None if state is None else state.solve
        task = make_task(
            variables, x, warm, theta, solver, adjoint, max_steps, throw, callback, stop
        )
        u = None if state is None else jax.lax.stop_gradient(state.adjoint)
        with short_errors():
            found = _compiled(task, u, wanted, problems)
        info = HypergradInfo(
            solution=make_solution(variables, found.outcome),
            state=HypergradState(found.outcome.state, found.u),
            result=found.result,
            num_adjoint_steps=found.num_adjoint_steps,
            num_estimate_steps=found.num_estimate_steps,
            adjoint_residual=found.adjoint_residual,
            error_estimate=found.error_estimate,
            min_curvature=found.min_curvature,
            max_curvature=found.max_curvature,
        )
        return found.value, structure.unflatten(found.gradient), info

    return step


def _wanted(accuracy: Any) -> Wanted:
    pair = accuracy if isinstance(accuracy, tuple | list) else (accuracy, 0.0)
    if len(pair) != 2:
        raise ValueError(
            f"accuracy must be a number or a pair (relative, absolute), got {accuracy!r}. Pass for "
            "example 1e-3, or (1e-3, 1e-8)."
        )
    for part in pair:
        check_tolerance("accuracy", part)
    if not any(isinstance(part, Tracer) or part > 0 for part in pair):
        raise ValueError(f"accuracy must be positive, got {accuracy!r}. Pass for example 1e-3.")
    # Of a traced accuracy nobody could see that it is negative.
    return Wanted(*(jnp.maximum(jnp.asarray(part), 0) for part in pair))


@eqx.filter_jit
def _compiled(
    task: Task, start: Vector | None, wanted: Wanted | None, problems: list[Problem]
) -> Certified:
    wanted = jax.lax.stop_gradient(wanted)
    static, params, arrays = _rule.split((task, start, wanted), problems)
    return _differentiable_once(static, params, arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable_once(static, params, arrays) -> Certified:
    (task, start, wanted), (inner, outer) = _rule.merge(static, params, arrays)
    if wanted is None:
        return lane_by_lane(certified)(task, inner, outer, start)
    return lane_by_lane(accurate)(task, inner, outer, start, wanted)


@_differentiable_once.defjvp
def _once_jvp(static, primals, tangents):
    """The tangent of the value is that of `L(x, u, ·)`; all others are NaN."""
    found = _differentiable_once(static, *primals)
    params, arrays = primals

    def value(params):
        (task, *_), (inner, outer) = _rule.merge(static, params, arrays)
        inner = task.on_face(inner, found.outcome)
        return _certificate.lagrangian(inner, outer, found.outcome.x, found.u)

    tangent = _rule.directional(value, params, tangents[0])
    trusted = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in found.gradient]))
    poison = _rule.spoil(_weighted_sum(tangents[0]), jnp.asarray(False))

    def poisoned(leaf):
        zero = _rule.zero_tangent(leaf)
        return zero + poison.astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else zero

    others = jax.tree.map(poisoned, found)
    return found, eqx.tree_at(lambda f: f.value, others, _rule.spoil(tangent, trusted))


def _weighted_sum(tangents: PyTree) -> Scalar:
    """Return a linear function of the tangents that does not vanish by symmetry."""
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(tangents)]
    sums = [jnp.real(jnp.vdot(jnp.cos(jnp.arange(leaf.size)), leaf)) for leaf in leaves]
    return jnp.stack(sums).sum()


def _check(theta, leaves, state) -> None:
    if not leaves:
        raise ValueError(
            f"theta has nothing to differentiate by: it needs a floating-point or complex leaf, "
            f"got {theta!r}. Write 1.0 for 1, or convert with jnp.asarray(theta, float)."
        )
    if state is not None and not isinstance(state, HypergradState):
        raise TypeError(
            f"state must be the info.state of an earlier call of this function, got {state!r} of "
            f"type {type(state).__name__}. Pass state=info.state."
        )
