"""JAXopt's `LBFGS`, on this library's solver and derivative, without JAXopt, which is archived.

Change the import, `from difflbfgs.compat.jaxopt import LBFGS, OptStep`, and read the list of
differences in `docs/migration.md`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from difflbfgs import _vector
from difflbfgs._checks import check_callable, no_type_check
from difflbfgs._problem import Variables, make_variables
from difflbfgs.compat import _jaxopt_step
from difflbfgs.compat._jaxopt_objective import Objective, make_objective
from difflbfgs.compat._jaxopt_run import Run
from difflbfgs.compat._jaxopt_settings import Settings
from difflbfgs.compat._jaxopt_state import Iterate, LbfgsState, OptStep, from_state, to_state

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
        jit: compile. `False`: take the steps in Python, without compilation, for debugging; a `fun`
            that returns its gradient need not be JAX then, if `implicit_diff=False`.
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
    _settings: Settings = dataclasses.field(init=False, repr=False)
    _objective: Objective = dataclasses.field(init=False, repr=False)
    _compiled_update: Callable = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        check_callable("fun", self.fun, "It is called as fun(params, *args, **kwargs).")
        names = [field.name for field in dataclasses.fields(Settings)]
        settings = Settings(**{name: getattr(self, name) for name in names})
        objective = make_objective(self.fun, self.value_and_grad, self.has_aux, self.jit)
        object.__setattr__(self, "_settings", settings)
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
        variables, x, before = self._start(init_params)
        task = Run(self._settings, self._objective, (args, kwargs), variables, x, before)
        end = task.end()
        return OptStep(variables.outside(end.x), to_state(variables, end))

    def init_state(self, init_params: PyTree, *args: Any, **kwargs: Any) -> LbfgsState:
        """Return the state before the first `update`; of an `OptStep`, with its memory."""
        variables, x, before = self._start(init_params)
        problem = _jaxopt_step.Direct(self._objective, (args, kwargs), variables)
        return to_state(variables, _jaxopt_step.begin(problem, self._settings, x, before))

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

    def _start(self, init_params) -> tuple[Variables, jax.Array, Iterate | None]:
        params, state = _unpack(init_params)
        variables = make_variables(params, flatten=True)
        before = None if state is None else self._iterate(variables, params, state)
        return variables, variables.to_vector(params), before

    def _update(self, params, state, theta):
        variables = make_variables(params, flatten=True)
        problem = _jaxopt_step.Direct(self._objective, theta, variables)
        with jax.numpy_dtype_promotion("standard"):
            now = self._iterate(variables, params, state)
            after = _jaxopt_step.advance(problem, self._settings, now)
        return OptStep(variables.outside(after.x), to_state(variables, after))

    def _iterate(self, variables: Variables, params, state) -> Iterate:
        kept = jnp.size(state.rho_history)
        if kept != self.history_size:
            raise ValueError(
                f"state holds {kept} curvature pairs and the solver has history_size="
                f"{self.history_size}. Keep history_size, or begin with init_state."
            )
        return from_state(variables, params, state)


def _unpack(params: PyTree) -> tuple[PyTree, LbfgsState | None]:
    """Return parameters and state; the state is `None` unless there is one."""
    return tuple(params) if isinstance(params, OptStep) else (params, None)
