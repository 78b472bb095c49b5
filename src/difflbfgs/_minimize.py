"""`minimize`: from the user's problem through border, solver and rule to a `Solution`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from difflbfgs import _unrolled
from difflbfgs._adjoint import ForwardImplicitAdjoint, ImplicitAdjoint, QuasiNewtonAdjoint
from difflbfgs._bounds import make_bounds
from difflbfgs._checks import (
    check_callable,
    check_flag,
    check_instance,
    check_positive_integer,
    no_type_check,
)
from difflbfgs._lbfgs import LBFGS
from difflbfgs._loop import Search, State
from difflbfgs._problem import (
    Preconditioner,
    Problem,
    Variables,
    check_same_shape,
    make_preconditioner,
    make_problem,
    make_stop,
    make_variables,
)
from difflbfgs._rule import differentiable
from difflbfgs._solution import Outcome, Solution, count, short_errors
from difflbfgs._system import AbstractAdjoint
from difflbfgs._task import Task
from difflbfgs._unrolled import Unrolled, UnrolledState
from difflbfgs._vector import Vector
from difflbfgs._watch import Step


@no_type_check
def minimize(
    fun: Callable,
    x0: PyTree,
    theta: PyTree = None,
    *,
    bounds: tuple[PyTree, PyTree] | None = None,
    solver: LBFGS | Unrolled = LBFGS(),
    adjoint: ImplicitAdjoint | ForwardImplicitAdjoint | QuasiNewtonAdjoint = ImplicitAdjoint(),
    has_aux: bool = False,
    max_steps: int = 1000,
    throw: bool = True,
    state: PyTree = None,
    callback: Callable[[Step], object] | None = None,
    stop: Callable[[Step], ArrayLike] | None = None,
) -> Solution:
    """Minimize `fun(x, theta)` over `x`, such that the minimizer is differentiable by `theta`.

    Computes `x*(θ) = argmin_x f(x, θ)`, with `dx*/dθ = -H⁻¹ B`, `H = ∇²ₓₓf` and `B = ∂_θ∇ₓf`. No
    iteration is unrolled, and the derivative by `x0` and by `state` is zero.

    Args:
        fun: the objective, `fun(x, theta)`, a real scalar that JAX differentiates twice; a pair
            `(objective, aux)` under `has_aux`.
        x0: starting point, any PyTree. Its floating-point and complex leaves are minimized over,
            all others are passed through.
        theta: what to differentiate by, any PyTree; what `fun` closes over is differentiated, too.
        bounds: `(lower, upper)`, each `None`, a number, or a PyTree like `x0` or a prefix of it, in
            which `None` and infinities are no bounds. The minimizer is differentiable by them.
        solver: `LBFGS(...)`, or `Unrolled(...)`, whose derivative goes through its iterations.
        adjoint: `ImplicitAdjoint(...)`, `ForwardImplicitAdjoint(...)` or `QuasiNewtonAdjoint(...)`.
        has_aux: whether `fun` returns an auxiliary output as well.
        max_steps: bound on the steps of `LBFGS`.
        throw: raise if the solve or its adjoint did not converge, jitted or not. If `False`,
            `result` says what happened and the derivative of a failed solve is NaN.
        state: `state` of an earlier solution: a warm start, or the rest of a solve that `max_steps`
            or `stop` had ended.
        callback: called as `callback(step)` with a `difflbfgs.Step` after every step of `LBFGS`,
            jitted or not. What it raises ends the solve.
        stop: a JAX function `stop(step) -> bool` of the same record with `step.value`, the
            variables. `True` ends the solve as `stopped`, which does not raise.

    Returns:
        A `difflbfgs.Solution`.

    Raises:
        TypeError: if an argument has the wrong type, or `fun` returns something else.
        ValueError: if `x0` has nothing to minimize over, or a value is out of range.
        RuntimeError: if the solve or its adjoint did not converge and `throw` is set.

    Note:
        The work is done in one real dtype, to which the variables promote, float32 at least.
        Complex ones are minimized over real and imaginary part.

        Outside `jax.jit` the solve is compiled once for all objectives that trace to the same
        program. Tracing takes 10 to 100 ms a call if `fun` has custom derivative rules.

    References:
        J. Nocedal and S. J. Wright, Numerical Optimization, 2nd ed., Springer, 2006.

        M. Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022.

    Examples:
        >>> import jax, jax.numpy as jnp, difflbfgs as dl
        >>> def ridge(w, penalty):
        ...     return jnp.sum((w - jnp.arange(3.0)) ** 2) + penalty * jnp.sum(w**2)
        >>> def outer(penalty):
        ...     return jnp.sum(dl.minimize(ridge, jnp.zeros(3), penalty).value)
        >>> print(f"{outer(0.5):.4f} {jax.grad(outer)(0.5):.4f}")
        2.0000 -1.3333
    """
    check_callable("fun", fun, "It is called as fun(x, theta).")
    check_instance("solver", solver, (LBFGS, Unrolled), "LBFGS()")
    check_instance("adjoint", adjoint, (AbstractAdjoint,), "ImplicitAdjoint()")
    check_flag("has_aux", has_aux)
    check_positive_integer("max_steps", max_steps)
    check_flag("throw", throw)
    check_watchers(callback, stop)
    variables = make_variables(x0, solver.flatten)
    x = variables.to_vector(x0)
    problem = make_problem(fun, theta, variables, x, has_aux)
    problem = with_bounds(problem, bounds, theta, variables, x0, solver)
    if isinstance(solver, Unrolled):
        if stop is not None:
            raise ValueError(
                f"stop ends a solve of LBFGS, got {stop!r} with {solver!r}, which takes its "
                "num_steps. Drop it, or pass solver=LBFGS()."
            )
        _check_state(state, UnrolledState)
        if state is not None:
            check_same_shape(state.x, x)
        outcome = _unrolled.run(problem, x, jax.lax.stop_gradient(state), solver)
        if throw:
            with short_errors():
                outcome = _raised(outcome)
    else:
        _check_state(state, State)
        task = make_task(
            variables, x, state, theta, solver, adjoint, max_steps, throw, callback, stop
        )
        outcome = solve_differentiably(task, problem)
    return make_solution(variables, outcome, problem.aux(outcome.x) if has_aux else None)


def check_watchers(callback: Any, stop: Any) -> None:
    """Raise a `TypeError` unless these are functions, or `None`."""
    if callback is not None:
        check_callable("callback", callback, "Pass for example callback=progress_bar().")
    if stop is not None:
        check_callable("stop", stop, "It is called as stop(step) and returns a boolean.")


def make_task(
    variables: Variables,
    x: Vector,
    state: State | None,
    theta: PyTree,
    solver: LBFGS,
    adjoint: AbstractAdjoint,
    max_steps: int,
    throw: bool,
    callback: Callable | None = None,
    stop: Callable | None = None,
) -> Task:
    """Return the solve that the user's settings describe; nothing of it can be differentiated by.

    Raises:
        ValueError: if the state belongs to another problem or solver.
        TypeError: if a preconditioner is not what it should be.
    """
    if state is not None:
        check_same_shape(state.x, x)
        kept = jnp.size(state.memory.weights_memory)
        if kept != solver.memory_size:
            raise ValueError(
                f"state holds {kept} curvature pairs and the solver has memory_size="
                f"{solver.memory_size}. Keep memory_size, or drop state=."
            )
    x, state = jax.lax.stop_gradient((x, state))
    wanted = None if stop is None else make_stop(stop, variables, x)
    # An array is an input of the compiled program, which any number of steps share.
    search = Search(x, state, solver, count(max_steps), callback, wanted)
    preconditioner = own_preconditioner(adjoint, theta, variables, x)
    return Task(search, adjoint, preconditioner, throw, stops=stop is not None)


def own_preconditioner(
    adjoint: AbstractAdjoint, theta: PyTree, variables: Variables, x: Vector
) -> Preconditioner | None:
    """Return the adjoint's preconditioner that is a function of the user's, traced, if any."""
    if not callable(adjoint.preconditioner):
        return None
    return make_preconditioner(adjoint.preconditioner, theta, variables, x)


def with_bounds(
    problem: Problem,
    bounds: Any,
    theta: PyTree,
    variables: Variables,
    x0: PyTree,
    solver: LBFGS | Unrolled,
) -> Problem:
    """Return the problem with its bounds, if there are any.

    Raises:
        TypeError: if they are no pair of bounds.
        ValueError: if they do not fit, or the solver has no way to keep them.
    """
    if bounds is None:
        return problem
    if isinstance(solver, Unrolled) or solver.linesearch is not None:
        what = "Unrolled" if isinstance(solver, Unrolled) else f"linesearch={solver.linesearch!r}"
        raise ValueError(
            f"bounds are kept by LBFGS with its own line search only, got {what}. Drop it, or "
            "drop bounds and change variables."
        )
    made = make_bounds(bounds, theta, variables, x0)
    return dataclasses.replace(problem, bounds=made)


def make_solution(variables: Variables, outcome: Outcome, aux: PyTree = None) -> Solution:
    """Return the outcome in the user's terms."""
    return Solution(
        value=variables.outside(outcome.x),
        objective=outcome.f,
        aux=aux,
        result=outcome.result,
        stats=outcome.stats,
        state=outcome.state,
        active=None if outcome.active is None else variables.flags(outcome.active),
    )


def solve_differentiably(task: Task, problem: Problem) -> Outcome:
    """Solve, as one compiled program even if the user did not ask for `jit`."""
    with short_errors():
        return _compiled(task, problem)


@eqx.filter_jit
def _compiled(task: Task, problem: Problem) -> Outcome:
    return differentiable(task, problem)


_raised = eqx.filter_jit(Outcome.raised)


def _check_state(state, kind) -> None:
    if state is not None and not isinstance(state, kind):
        raise TypeError(
            f"state must be the state of an earlier Solution of the same solver, got {state!r} "
            f"of type {type(state).__name__}. Pass state=solution.state."
        )
