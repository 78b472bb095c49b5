"""JAXopt's `LBFGS`, on this library's solver and derivative: `from difflbfgs.compat.jaxopt import`.

JAXopt is archived, and nothing of it is needed here.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from difflbfgs import _vector
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
from difflbfgs._lbfgs import LBFGS as _Solver
from difflbfgs._minimize import make_task
from difflbfgs._problem import Variables, make_problem, make_variables
from difflbfgs._solution import RESULTS, has_converged
from difflbfgs.compat import _jaxopt_step as _step
from difflbfgs.compat._jaxopt_adjoint import make_adjoint
from difflbfgs.compat._jaxopt_objective import Objective, make_objective
from difflbfgs.compat._jaxopt_state import (
    Iterate,
    LbfgsState,
    OptStep,
    from_solve,
    from_state,
    to_state,
    warm_start,
)

__all__ = ["LBFGS", "LbfgsState", "OptStep"]


@no_type_check
@dataclasses.dataclass(eq=False, frozen=True)
class LBFGS:
    """L-BFGS with the arguments of `jaxopt.LBFGS` 0.8.5.

    Minimizes `f(x, *args, **kwargs)` over `x`; by default `run(...).params` is differentiated by
    the implicit function theorem, by `args`, `kwargs` and what `fun` closes over. `run` stops where
    `‖∇f(x)‖₂ <= tol`, with no reference to the scale of `f`, or where rounding hides any decrease.

    `run` is `difflbfgs.minimize`, safeguards, Newton polish and all, unless an argument asks for
    another iteration: a `stepsize`, `use_gamma=False`, `history_size=0`, `jit=False`, or
    backtracking that is to be unrolled. Then it repeats `update`, which is JAXopt's own step.

    **A solve that did not converge has the derivative NaN.** JAXopt differentiates wherever it
    stopped, as if that were a minimizer; `implicit_diff_solve=ImplicitAdjoint(approximate=True)`
    does so here. Nothing raises: `state.result` says what happened.

    Args:
        fun: the objective `fun(x, *args, **kwargs)`; see `value_and_grad` and `has_aux`.
        value_and_grad: `True` if `fun` returns the objective and its gradient, or a function that
            does. The gradient is taken as it is; the solve needs no second derivative then.
        has_aux: whether `fun` returns `(objective, aux)`, or `((objective, aux), gradient)`.
        maxiter: bound on the steps.
        tol: bound on the gradient norm.
        stepsize: a fixed step size, a function of the step's number that returns one, or 0 for a
            line search.
        linesearch: `"zoom"`, Optax's search for the strong Wolfe conditions; `"hager-zhang"`, the
            same one, which has their approximate condition; `"backtracking"`, Optax's, which
            asks for the Armijo condition alone, where JAXopt's asks for strong Wolfe too.
        linesearch_init: where a search begins: `"increase"`, at `increase_factor` times the last
            step size; `"current"`, at the last; `"max"`, at `max_stepsize`.
        stop_if_linesearch_fails: stop then. `minimize` does, once a restart did not help.
        condition: without effect, as in JAXopt.
        maxls: bound on the trials of a line search.
        decrease_factor: without effect, as in JAXopt.
        increase_factor: see `linesearch_init`.
        max_stepsize: bound on the step size of a line search.
        min_stepsize: `"increase"` begins at `max_stepsize` if the last step was no longer.
        history_size: number of curvature pairs kept.
        use_gamma: begin the inverse Hessian with `gamma I` instead of `I`.
        implicit_diff: differentiate the minimizer. `False`: the iterates, through every step, which
            takes a `stepsize` or backtracking; other line searches raise if differentiated.
        implicit_diff_solve: `None`; a function `solve(matvec, b)` on flat real vectors, whose
            solution is accepted at a relative residual of 1e-3; a Lineax solver; or an adjoint of
            this library.
        jit: compile. `False`: `fun` is called step by step with concrete arrays, for debugging.
        unroll: with `implicit_diff=False`, whether the loop may be differentiated in reverse mode.
            `"auto"`: yes. Otherwise without effect.
        verbose: 1 prints every step, 2 also what Optax reports of failing line searches.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range.

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

    fun: Callable
    value_and_grad: bool | Callable = False
    has_aux: bool = False
    maxiter: int = 500
    tol: Any = 1e-3
    stepsize: Any = 0.0
    linesearch: str = "zoom"
    linesearch_init: str = "increase"
    stop_if_linesearch_fails: bool = False
    condition: Any = None
    maxls: int = 30
    decrease_factor: Any = None
    increase_factor: Any = 1.5
    max_stepsize: Any = 1.0
    min_stepsize: Any = 1e-6
    history_size: int = 10
    use_gamma: bool = True
    implicit_diff: bool = True
    implicit_diff_solve: Any = None
    jit: bool = True
    unroll: str | bool = "auto"
    verbose: bool | int = False
    _objective: Objective = dataclasses.field(init=False, repr=False)
    _compiled_update: Callable = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        _check(self)
        objective = make_objective(self.fun, self.value_and_grad, self.has_aux)
        object.__setattr__(self, "_objective", objective)
        object.__setattr__(self, "_compiled_update", eqx.filter_jit(self._update))

    def run(self, init_params: PyTree, *args: Any, **kwargs: Any) -> OptStep:
        """Minimize from `init_params`.

        Args:
            init_params: where to begin, any PyTree, or an `OptStep` for a warm start with the
                memory in its state. The derivative by it is zero, but for unrolled iterates.
            *args: arguments of `fun`.
            **kwargs: arguments of `fun`.

        Returns:
            `OptStep(params, state)`.
        """
        params, state = _unpack(init_params)
        variables = make_variables(params, flatten=True)
        x = variables.to_vector(params)
        before = None if state is None else self._iterate(variables, params, state)
        how = self._repeats_update()
        if how is None:
            end = self._minimize(variables, x, before, (args, kwargs))
        else:
            end = self._repeat(how, variables, x, before, (args, kwargs))
        return OptStep(variables.outside(end.x), to_state(variables, end))

    def init_state(self, init_params: PyTree, *args: Any, **kwargs: Any) -> LbfgsState:
        """Return the state before the first `update`; of an `OptStep`, with its memory."""
        params, state = _unpack(init_params)
        variables = make_variables(params, flatten=True)
        before = None if state is None else self._iterate(variables, params, state)
        problem = _step.Direct(self._objective, (args, kwargs), variables)
        x = variables.to_vector(params)
        return to_state(variables, self._begin(problem, x, before))

    def update(self, params: PyTree, state: LbfgsState, *args: Any, **kwargs: Any) -> OptStep:
        """Take one step from `params`; `state` is of `init_state`, `update` or `run`."""
        params, _ = _unpack(params)
        with contextlib.nullcontext() if self.jit else jax.disable_jit():
            update = self._compiled_update if self.jit else self._update
            return update(params, state, (args, kwargs))

    def optimality_fun(self, params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        """Return the gradient, which is zero at a minimizer, as `jax.grad` does."""
        params, _ = _unpack(params)
        return eqx.filter_grad(lambda p: self._objective(p, (args, kwargs))[0])(params)

    def l2_optimality_error(self, params: PyTree, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the 2-norm of the gradient."""
        params, _ = _unpack(params)
        gradient = self.optimality_fun(params, *args, **kwargs)
        return _vector.norm(make_variables(params, flatten=True).to_vector(gradient))

    def attribute_names(self) -> tuple[str, ...]:
        """Return the names of the constructor's arguments."""
        return tuple(field.name for field in dataclasses.fields(self) if field.init)

    def attribute_values(self) -> tuple[Any, ...]:
        """Return what the constructor was given."""
        return tuple(getattr(self, name) for name in self.attribute_names())

    @property
    def _settings(self) -> _step.Settings:
        names = [field.name for field in dataclasses.fields(_step.Settings)]
        return _step.Settings(**{name: getattr(self, name) for name in names})

    def _repeats_update(self) -> str | None:
        """Return how `run` repeats `update`, or `None` if it is `minimize`."""
        searches = self._settings.searches()
        exact = not searches or self.linesearch == "backtracking"
        unrolled = exact and not self.implicit_diff
        plain = not searches or not self.use_gamma or 0 in (self.history_size, self.maxiter)
        if not self.jit:
            return "python"
        if plain or unrolled:
            return "scan" if unrolled and self.unroll else "while"
        return None

    def _update(self, params, state, theta):
        variables = make_variables(params, flatten=True)
        problem = _step.Direct(self._objective, theta, variables)
        with jax.numpy_dtype_promotion("standard"):
            now = self._iterate(variables, params, state)
            after = _step.advance(problem, self._settings, now)
        return OptStep(variables.outside(after.x), to_state(variables, after))

    def _iterate(self, variables: Variables, params, state) -> Iterate:
        kept = jnp.size(state.rho_history)
        if kept != self.history_size:
            raise ValueError(
                f"state holds {kept} curvature pairs and the solver has history_size="
                f"{self.history_size}. Keep history_size, or begin with init_state."
            )
        return from_state(variables, params, state)

    def _begin(self, problem, x, before: Iterate | None) -> Iterate:
        start = _step.begin(problem, self._settings, x, self.history_size)
        if before is None:
            return start

        def memory(now):
            return now.S, now.Y, now.rho, now.gamma, now.iter_num, now.stepsize

        return eqx.tree_at(memory, start, memory(before))

    def _minimize(self, variables, x, before, theta) -> Iterate:
        """Run `minimize`."""
        problem = make_problem(self._objective, theta, variables, x, has_aux=True)
        # A gradient that the user computes need not be differentiable, as the polish wants it.
        polish = int(self.implicit_diff and self.value_and_grad is False)
        solver = _Solver(
            rtol=0.0,
            atol=self.tol,
            memory_size=self.history_size,
            linesearch=self._settings.search(_vector.epsilon(x)),
            polish=polish,
        )
        warm = None if before is None else warm_start(before)
        outcome, aux = self._solve(variables, x, warm, theta, problem, solver, self.maxiter)
        if not self.implicit_diff:
            x, f, aux = _step.undifferentiable((outcome.x, outcome.f, aux), ())
            outcome = eqx.tree_at(lambda outcome: (outcome.x, outcome.f), outcome, (x, f))
        steps = 0 if before is None else before.iter_num
        end = from_solve(
            outcome.state, outcome.f, aux, outcome.result, outcome.stats, steps, self.max_stepsize
        )
        return eqx.tree_at(lambda end: end.x, end, outcome.x)

    def _repeat(self, how, variables, x, before, theta) -> Iterate:
        """Repeat `update`, and give its end the derivative of a minimizer if that is wanted."""
        problem = None
        if self.jit or self.implicit_diff:
            problem = make_problem(self._objective, theta, variables, x, has_aux=True)
        seen = problem if self.jit else _step.Direct(self._objective, theta, variables)
        if self.implicit_diff:
            seen, x, before = _step.without_derivative((seen, x, before))
        options = self.maxiter, self.stop_if_linesearch_fails, how
        with contextlib.nullcontext() if self.jit else jax.disable_jit():
            with jax.numpy_dtype_promotion("standard"):
                start = self._begin(seen, x, before)
                end = _loop(seen, self._settings, start, *options)
        if not self.implicit_diff:
            return end
        end = _step.without_derivative(end)
        solver = _Solver(0.0, self.tol, memory_size=max(1, self.history_size), polish=0)
        warm = warm_start(end) if self.history_size else None
        outcome, aux = self._solve(variables, end.x, warm, theta, problem, solver, 0)
        result = RESULTS.where(has_converged(outcome.result), outcome.result, end.result)
        return eqx.tree_at(
            lambda end: (end.x, end.aux, end.result),
            end,
            (outcome.x, aux, result),
            is_leaf=lambda leaf: leaf is end.aux,
        )

    def _solve(self, variables, x, warm, theta, problem, solver, max_steps):
        """Return the outcome of a solve, and the user's value and auxiliary output there."""
        callback = _step.print_step if self.verbose and max_steps else None
        adjoint = make_adjoint(self.implicit_diff_solve)
        task = make_task(
            variables, x, warm, theta, solver, adjoint, max_steps, False, callback=callback
        )
        outcome, aux = _differentiable(task, problem, self.has_aux)
        dtype = jax.eval_shape(problem.aux, outcome.x)[0].dtype
        return outcome, (outcome.f.astype(dtype), aux)


@eqx.filter_jit
def _differentiable(task, problem, has_aux):
    outcome = task.adjoint.differentiable(task, problem)
    return outcome, problem.aux(outcome.x)[1] if has_aux else None


_loop = eqx.filter_jit(_step.loop)


def _unpack(params: PyTree) -> tuple[PyTree, LbfgsState | None]:
    """Return parameters and state; the state is `None` unless there is one."""
    return tuple(params) if isinstance(params, OptStep) else (params, None)


def _check(self: LBFGS) -> None:
    check_callable("fun", self.fun, "It is called as fun(params, *args, **kwargs).")
    if not callable(self.value_and_grad):
        check_flag("value_and_grad", self.value_and_grad)
    for name in ("has_aux", "stop_if_linesearch_fails", "use_gamma", "implicit_diff", "jit"):
        check_flag(name, getattr(self, name))
    check_natural_number("maxiter", self.maxiter)
    check_natural_number("history_size", self.history_size)
    check_positive_integer("maxls", self.maxls)
    check_tolerance("tol", self.tol)
    check_tolerance("min_stepsize", self.min_stepsize)
    check_positive("max_stepsize", self.max_stepsize)
    check_positive("increase_factor", self.increase_factor)
    if not callable(self.stepsize):
        check_stepsize(self.stepsize)
    check_choice("linesearch", self.linesearch, _step.LINESEARCHES)
    check_choice("linesearch_init", self.linesearch_init, _step.GUESSES)
    check_choice("unroll", self.unroll, ("auto", True, False))
    check_choice("verbose", self.verbose, (False, True, 0, 1, 2))
    make_adjoint(self.implicit_diff_solve)
    for name in ("condition", "decrease_factor"):
        if getattr(self, name) is not None:
            warnings.warn(f"{name} has no effect. Drop it.", DeprecationWarning, stacklevel=4)


def check_stepsize(value: Any) -> None:
    """Raise unless `value` is a real scalar."""
    if isinstance(value, bool) or not eqx.is_array_like(value) or jnp.iscomplexobj(value):
        raise TypeError(
            f"stepsize must be a real number or a function, got {value!r}. Pass 0.0 for a line "
            "search, a positive number, or a function of the step's number."
        )
    if jnp.shape(value) != ():
        raise ValueError(f"stepsize must be a scalar, got {value!r}. Pass for example 1e-3.")
