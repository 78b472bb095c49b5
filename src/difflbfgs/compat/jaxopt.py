"""JAXopt's `LBFGS` and `LBFGSB`, on this library's solver and derivative.

JAXopt, which is archived, need not be installed.

Change the import, `from difflbfgs.compat.jaxopt import LBFGS, OptStep`, and read the list of
differences in `docs/migration.md`.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import PyTree

from difflbfgs import _lbfgs, _loop, _vector
from difflbfgs._adjoint import ForwardImplicitAdjoint, ImplicitAdjoint, QuasiNewtonAdjoint
from difflbfgs._checks import (
    check_callable,
    check_choice,
    check_flag,
    check_natural_number,
    check_positive,
    check_positive_integer,
    check_tolerance,
    no_type_check,
)
from difflbfgs._minimize import make_task, with_bounds
from difflbfgs._problem import Problem, Variables, interior, make_problem, make_variables
from difflbfgs._rule import differentiable
from difflbfgs._solution import RESULTS, Outcome
from difflbfgs._task import Task
from difflbfgs._vector import Scalar, Vector
from difflbfgs._watch import Step, watch
from difflbfgs.compat._jaxopt import (
    LbfgsState,
    OptStep,
    check_stepsize,
    make_adjoint,
    make_objective,
    plain,
    to_state,
    warm_start,
)

__all__ = ["LBFGS", "LBFGSB", "LbfgsState", "OptStep"]

# How a user may have the adjoint solved.
Solve: TypeAlias = (
    Callable[..., PyTree]
    | lx.AbstractLinearSolver
    | ImplicitAdjoint
    | ForwardImplicitAdjoint
    | QuasiNewtonAdjoint
)
# What a solve begins with: a vector, a memory, and the objective.
Entry: TypeAlias = tuple[Vector, _loop.State | None, Problem]


@no_type_check
@dataclasses.dataclass(eq=False, frozen=True)
class _Solver:
    """The arguments of JAXopt's solvers, and a solve."""

    fun: Callable
    value_and_grad: bool | Callable = False
    has_aux: bool = False
    maxiter: int = 500
    tol: ArrayLike = 1e-3
    stepsize: ArrayLike | Callable[..., ArrayLike] = 0.0
    linesearch: str = "zoom"
    linesearch_init: str = "increase"
    stop_if_linesearch_fails: bool = False
    condition: object = None
    maxls: int = 30
    decrease_factor: object = None
    increase_factor: ArrayLike = 1.5
    max_stepsize: float | jax.Array = 1.0
    min_stepsize: ArrayLike = 1e-6
    history_size: int = 10
    use_gamma: bool = True
    implicit_diff: bool = True
    implicit_diff_solve: Solve | None = None
    jit: bool = True
    unroll: str | bool = "auto"
    verbose: bool | int = False

    def __post_init__(self):
        check_callable("fun", self.fun, "It is called as fun(params, *args, **kwargs).")
        if not callable(self.value_and_grad):
            check_flag("value_and_grad", self.value_and_grad)
        for name in ("has_aux", "stop_if_linesearch_fails", "use_gamma", "implicit_diff", "jit"):
            check_flag(name, getattr(self, name))
        check_natural_number("maxiter", plain(self.maxiter))
        check_positive_integer("maxls", plain(self.maxls))
        check_positive_integer("history_size", plain(self.history_size))
        check_tolerance("tol", self.tol)
        check_tolerance("min_stepsize", self.min_stepsize)
        check_positive("increase_factor", self.increase_factor)
        check_positive("max_stepsize", self.max_stepsize)
        check_stepsize(self.stepsize)
        check_choice("linesearch", self.linesearch, ("zoom", "backtracking", "hager-zhang"))
        check_choice("linesearch_init", self.linesearch_init, ("increase", "max", "current"))
        check_choice("unroll", self.unroll, ("auto", True, False))
        check_choice("verbose", plain(self.verbose), (False, True, 0, 1, 2))
        make_adjoint(self.implicit_diff_solve)
        if isinstance(self.max_stepsize, Tracer) or self.max_stepsize < 1:
            raise ValueError(
                f"max_stepsize must be at least 1, got {self.max_stepsize!r}: the line search "
                "begins there. Drop it; no step that raises the objective is taken."
            )
        if not self.use_gamma:
            raise ValueError("use_gamma must be True, got False: H⁻¹ begins with gamma I. Drop it.")
        for name in ("condition", "decrease_factor"):
            if getattr(self, name) is not None:
                warnings.warn(f"{name} has no effect. Drop it.", DeprecationWarning, stacklevel=3)

    def _minimized(self, start: PyTree, bounds: Any, theta: tuple) -> OptStep:
        """Minimize from `start`, with `bounds` if there are any."""
        variables, before, entry = self._enter(start, bounds, theta)
        x, warm, problem = entry if self.implicit_diff else _undifferentiable(entry)
        # A gradient that the user computes need not be differentiable, as a Newton step wants it.
        newton = self.implicit_diff and self.value_and_grad is False
        task = make_task(
            variables,
            x,
            warm,
            theta,
            self._solver(self.tol, polish=int(newton)),
            make_adjoint(self.implicit_diff_solve),
            plain(self.maxiter),
            throw=False,
            callback=_print if self.verbose else None,
        )
        outcome, value, aux = _solve(task, problem, self.has_aux)
        steps = before + outcome.stats.num_steps
        state = to_state(variables, outcome, value, aux, steps, stepsize=1.0)
        return OptStep(variables.outside(outcome.x), state)

    def optimality_fun(self, params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Return the gradient, which is zero at a minimizer, as `jax.grad` does."""
        params, _ = _unpack(params)
        objective = make_objective(self.fun, self.value_and_grad, self.has_aux)
        return eqx.filter_grad(lambda p: objective(p, (args, kwargs))[0])(params)

    def l2_optimality_error(self, params: PyTree, *args: PyTree, **kwargs: PyTree) -> jax.Array:
        """Return the 2-norm of the gradient."""
        params, _ = _unpack(params)
        gradient = self.optimality_fun(params, *args, **kwargs)
        return _vector.norm(make_variables(params, flatten=True).to_vector(gradient))

    def attribute_names(self) -> tuple[str, ...]:
        """Return the names of the constructor's arguments."""
        return tuple(field.name for field in dataclasses.fields(self))

    def attribute_values(self) -> tuple[object, ...]:
        """Return what the constructor was given."""
        return tuple(getattr(self, name) for name in self.attribute_names())

    def _solver(self, atol: Any, polish: int) -> _lbfgs.LBFGS:
        size = plain(self.history_size)
        return _lbfgs.LBFGS(rtol=0.0, atol=atol, memory_size=size, polish=polish)

    def _enter(self, start: PyTree, bounds: Any, theta: tuple) -> tuple[Variables, Any, Entry]:
        """Return how to read vectors, the steps before, and what a solve begins with."""
        params, state = _unpack(start)
        variables = make_variables(params, flatten=True)
        x = variables.to_vector(params)
        objective = make_objective(self.fun, self.value_and_grad, self.has_aux)
        try:
            problem = make_problem(objective, theta, variables, x, has_aux=True)
        except jax.errors.JAXTypeError as error:
            if self.jit:
                raise
            raise TypeError(
                "jit=False is without effect, and fun cannot be traced by JAX, got "
                f"{self.fun!r}. Write it with jax.numpy, or call it in a jax.pure_callback and "
                "pass value_and_grad=True."
            ) from error
        problem = with_bounds(problem, bounds, theta, variables, params, self._solver(0.0, 0))
        if state is None:
            return variables, 0, (x, None, problem)
        kept = jnp.size(state.rho_history)
        if kept != self.history_size:
            raise ValueError(
                f"state holds {kept} curvature pairs and the solver has history_size="
                f"{self.history_size}. Keep history_size, or begin with init_state."
            )
        return variables, state.iter_num, (x, warm_start(variables, x, state), problem)


@no_type_check
@dataclasses.dataclass(eq=False, frozen=True)
class LBFGS(_Solver):
    """L-BFGS with the arguments of `jaxopt.LBFGS` 0.8.5.

    Minimizes `f(x, *args, **kwargs)` over `x`, until `‖∇f(x)‖₂ <= tol`. `run(...).params` is
    differentiated by the implicit function theorem; if a solve did not converge it is NaN.

    Args:
        fun: the objective `fun(x, *args, **kwargs)`; see `value_and_grad` and `has_aux`.
        value_and_grad: `True` if `fun` returns the objective and its gradient, or a function that
            does. The gradient is taken as it is; the solve needs no second derivative then.
        has_aux: whether `fun` returns `(objective, aux)`, or `((objective, aux), gradient)`.
        maxiter: bound on the steps, an integer that is not traced.
        tol: bound on the gradient norm.
        stepsize: 0 or less, for a line search. A fixed step size is refused.
        linesearch: `"zoom"`, `"hager-zhang"` or `"backtracking"`. All ask for the strong Wolfe
            conditions, and get this library's search for them.
        linesearch_init: without effect. A search begins with a step size of 1.
        stop_if_linesearch_fails: without effect. A search that failed is followed by one down the
            gradient; if that fails too, `run` stops.
        condition: without effect, as in JAXopt.
        maxls: without effect. A search has 30 trials.
        decrease_factor: without effect, as in JAXopt.
        increase_factor: without effect.
        max_stepsize: at least 1, and without effect: a search may end beyond.
        min_stepsize: without effect.
        history_size: number of curvature pairs kept, at least 1.
        use_gamma: must be `True`: the inverse Hessian begins with `gamma I`.
        implicit_diff: differentiate the minimizer. `False`: a derivative raises, since iterates are
            not differentiated; there is no Newton step at the end then.
        implicit_diff_solve: `None`, an adjoint of this library, a Lineax solver, or a function
            `solve(matvec, b)` on flat vectors, accepted at a relative residual of 1e-3.
        jit: without effect: the solve is compiled.
        unroll: without effect.
        verbose: 1 or 2 prints every step.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range, or asks for another iteration.

    Note:
        `run` is `difflbfgs.minimize`, and also stops if rounding hides any decrease. `update` is
        one step of the same loop without a Newton step: a line search for the strong Wolfe
        conditions along the direction of the memory. Derivatives are by `args`, `kwargs` and what
        `fun` closes over.

        JAXopt differentiates wherever it stopped, as if that were a minimizer;
        `implicit_diff_solve=ImplicitAdjoint(approximate=True)` does so here. Nothing raises:
        `state.result` says what happened.

    References:
        M. Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from difflbfgs.compat.jaxopt import LBFGS
        >>> def ridge(w, penalty, target):
        ...     return jnp.sum((w - target) ** 2) + penalty * jnp.sum(w**2)
        >>> solver = LBFGS(ridge, tol=1e-4)
        >>> def outer(penalty):
        ...     return jnp.sum(solver.run(jnp.zeros(3), penalty, target=jnp.arange(3.0)).params)
        >>> print(f"{outer(0.5):.4f} {jax.grad(outer)(0.5):.4f}")
        2.0000 -1.3333
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ("init_state", "update"):
            if getattr(cls, name) is not getattr(LBFGS, name):
                raise TypeError(
                    f"{cls.__name__} overrides {name}, got {getattr(cls, name)!r}: run would not "
                    f"call it. Write a loop around {name} of an LBFGS instead, in a function."
                )

    def run(self, init_params: PyTree, *args: PyTree, **kwargs: PyTree) -> OptStep:
        """Minimize from `init_params`.

        Args:
            init_params: where to begin, any PyTree, or an `OptStep` for a warm start with the
                memory in its state. The derivative by it is zero.
            *args: arguments of `fun`.
            **kwargs: arguments of `fun`.

        Returns:
            `OptStep(params, state)`.
        """
        return self._minimized(init_params, None, (args, kwargs))

    def init_state(self, init_params: PyTree, *args: PyTree, **kwargs: PyTree) -> LbfgsState:
        """Return the state before the first `update`; of an `OptStep`, with its memory."""
        return self._advance(init_params, (args, kwargs), max_steps=0).state

    def update(self, params: PyTree, state: LbfgsState, *args: PyTree, **kwargs: PyTree) -> OptStep:
        """Take one step from `params`; `state` is of `init_state`, `update` or `run`.

        It begins with an evaluation at `params`, which may be others than those of `state`. If the
        gradient is zero, or the line search fails, `params` stay; that counts as a step.
        """
        params, _ = _unpack(params)
        step = self._advance(OptStep(params, state), (args, kwargs), max_steps=1)
        new = step.state
        names = ("num_fun_eval", "num_grad_eval", "num_linesearch_iter")
        counts = {name: getattr(state, name) + getattr(new, name) for name in names}
        if self.verbose:
            watch(_print, Step(new.iter_num, new.num_fun_eval, new.value, new.error, new.stepsize))
        return OptStep(step.params, new._replace(**counts))

    def _advance(self, start: PyTree, theta: tuple, max_steps: int) -> OptStep:
        """Take so many steps, none or one, whatever `tol` says, without a derivative."""
        variables, before, entry = self._enter(start, None, theta)
        entry, solver = _undifferentiable(entry), self._solver(0.0, polish=0)
        outcome, value, aux, t = _trips(entry, solver, max_steps, self.has_aux)
        state = to_state(variables, outcome, value, aux, before + max_steps, t)
        small = outcome.stats.grad_norm <= self.tol
        result = RESULTS.where(small, RESULTS.successful, outcome.result)
        state = state._replace(failed_linesearch=t == 0, result=result)
        return OptStep(variables.outside(outcome.x), state)


@no_type_check
@dataclasses.dataclass(eq=False, frozen=True)
class LBFGSB(_Solver):
    """L-BFGS between bounds, with the arguments of `jaxopt.LBFGSB` 0.8.5 and its `run`.

    Minimizes `f(x, *args, **kwargs)` over `lower <= x <= upper`, until the projected gradient has a
    2-norm of `tol`. `run(...).params` is differentiated by the bounds, too.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range, or asks for another iteration.

    Note:
        The arguments are those of `LBFGS`; `history_size` is 20 by default.

        It is `difflbfgs.minimize` with `bounds=(lower, upper)`, and evaluates the objective inside
        them only. The projected gradient is that without the components that point out of the box
        at a bound; JAXopt tests the step `P(x - ∇f(x)) - x`, which changes with the scale of `f`.
        If a variable is at its bound with a multiplier of zero, the derivative is NaN.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from difflbfgs.compat.jaxopt import LBFGSB
        >>> def distance(x, target):
        ...     return jnp.sum((x - target) ** 2)
        >>> def nearest(upper):
        ...     bounds = (jnp.zeros(2), jnp.full(2, upper))
        ...     return LBFGSB(distance).run(jnp.zeros(2), bounds, jnp.array([0.5, 3.0])).params
        >>> print(nearest(1.0).round(3), jax.grad(lambda u: nearest(u).sum())(1.0).round(3))
        [0.5 1. ] 1.0
    """

    history_size: int = 20

    def run(self, init_params: PyTree, bounds: tuple, *args: PyTree, **kwargs: PyTree) -> OptStep:
        """Minimize from `init_params`, which may be an `OptStep`, between `bounds`.

        Args:
            init_params: where to begin, as for `LBFGS`; projected into the bounds.
            bounds: `(lower, upper)`, PyTrees like the parameters, numbers, or `None`.
            *args: arguments of `fun`.
            **kwargs: arguments of `fun`.

        Returns:
            `OptStep(params, state)`.
        """
        return self._minimized(init_params, bounds, (args, kwargs))


def _unpack(params: PyTree) -> tuple[PyTree, LbfgsState | None]:
    """Return parameters and state; the state is `None` unless there is one."""
    return tuple(params) if isinstance(params, OptStep) else (params, None)


@eqx.filter_jit
def _solve(task: Task, problem: Problem, has_aux: bool) -> tuple[Outcome, Any, Any]:
    outcome = differentiable(task, problem)
    return outcome, *_value_and_aux(problem, outcome, has_aux)


@eqx.filter_jit
def _trips(
    entry: Entry, solver: _lbfgs.LBFGS, max_steps: int, has_aux: bool
) -> tuple[Outcome, Any, Any, Scalar]:
    """Evaluate, and take trips of the loop until so many steps are taken."""
    x, warm, problem = entry
    settings = _loop.make_settings(solver, x, max_steps)

    def advance(carry):
        now, t = carry
        after, decision = _loop.trip(problem, now, settings)
        stays = jnp.all(after.point.x == now.point.x)
        return after, _vector.where(decision.step, _vector.where(stays, 0, decision.length), t)

    with interior(problem.name), jax.numpy_dtype_promotion("standard"):
        start = _loop.begin(settings, x, warm), jnp.ones((), x.dtype)
        end, t = jax.lax.while_loop(lambda carry: ~carry[0].ledger.over(), advance, start)
    outcome = _loop.outcome(end)
    return outcome, *_value_and_aux(problem, outcome, has_aux), t


def _value_and_aux(problem: Problem, outcome: Outcome, has_aux: bool) -> tuple[Any, PyTree]:
    """Return the objective in the user's dtype, and its auxiliary output."""
    dtype = eqx.filter_eval_shape(problem.aux, outcome.x)[0].dtype
    return outcome.f.astype(dtype), problem.aux(outcome.x)[1] if has_aux else None


@eqx.filter_custom_jvp
def _undifferentiable(entry):
    return entry


@_undifferentiable.def_jvp
def _undifferentiable_jvp(primals, tangents):
    del primals, tangents
    raise NotImplementedError(
        "The iterations of difflbfgs.compat.jaxopt.LBFGS cannot be differentiated: neither update "
        "and init_state, nor run with implicit_diff=False. Pass implicit_diff=True and call run, "
        "for the derivative of the minimizer; for that of iterates use difflbfgs.minimize with "
        "solver=difflbfgs.Unrolled(optax.sgd(0.1), num_steps=100)."
    )


def _print(step: Step) -> None:
    """Print what JAXopt prints under `verbose`."""
    if step.last and step.step_size == 0:
        return  # the last step once more
    print(
        f"INFO: difflbfgs.compat.jaxopt.LBFGS: Iter: {int(step.num_steps)} "
        f"Gradient Norm (stopping criterion): {float(step.grad_norm):.6g} "
        f"Objective Value: {float(step.objective):.6g} Stepsize: {float(step.step_size):.6g}"
    )
