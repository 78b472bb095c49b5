"""The arguments of JAXopt's L-BFGS: what they may be and what they ask for."""

import functools
import warnings
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax

from difflbfgs._checks import (
    check_choice,
    check_flag,
    check_natural_number,
    check_positive,
    check_positive_integer,
    check_tolerance,
    no_type_check,
)
from difflbfgs.compat._jaxopt_adjoint import make_adjoint


@no_type_check
class Settings(eqx.Module):
    """The arguments, checked; `difflbfgs.compat.jaxopt.LBFGS` says what they mean.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range.
    """

    value_and_grad: Any
    has_aux: Any
    maxiter: Any
    tol: Any
    stepsize: Any
    linesearch: Any
    linesearch_init: Any
    stop_if_linesearch_fails: Any
    condition: Any
    maxls: Any
    decrease_factor: Any
    increase_factor: Any
    max_stepsize: Any
    min_stepsize: Any
    history_size: Any
    use_gamma: Any
    implicit_diff: Any
    implicit_diff_solve: Any
    jit: Any
    unroll: Any
    verbose: Any

    def __check_init__(self):
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
        _check_stepsize(self.stepsize)
        check_choice("linesearch", self.linesearch, ("zoom", "backtracking", "hager-zhang"))
        check_choice("linesearch_init", self.linesearch_init, ("increase", "max", "current"))
        check_choice("unroll", self.unroll, ("auto", True, False))
        check_choice("verbose", self.verbose, (False, True, 0, 1, 2))
        make_adjoint(self.implicit_diff_solve)
        for name in ("condition", "decrease_factor"):
            if getattr(self, name) is not None:
                message = f"{name} has no effect. Drop it."
                warnings.warn(message, DeprecationWarning, stacklevel=6)

    def repeats_update(self) -> str | None:
        """Return how a solve repeats JAXopt's step, or `None` if it is `minimize`.

        `"while"` is a compiled loop, `"scan"` one that JAX can differentiate in reverse mode, for
        the memory of `maxiter` steps, and `"python"` one without compilation.
        """
        if not self.jit:
            return "python"
        searches = self.searches()
        differentiable = not searches or self.linesearch == "backtracking"
        unrolled = differentiable and not self.implicit_diff
        other = not searches or not self.use_gamma or 0 in (self.history_size, self.maxiter)
        if other or unrolled:
            return "scan" if unrolled and self.unroll else "while"
        return None

    def searches(self) -> bool:
        """Return whether the step size is found by a line search."""
        known = isinstance(self.stepsize, int | float)
        return known and self.stepsize <= 0

    def search(self, eps: float) -> optax.GradientTransformationExtraArgs:
        """Return Optax's line search, begun where JAXopt begins it; f rises by rounding at most."""
        numbers = (self.increase_factor, self.max_stepsize, self.min_stepsize, eps)
        return _search(
            self.linesearch,
            self.linesearch_init,
            self.maxls,
            self.verbose > 1,
            *map(float, numbers),
        )


@functools.lru_cache
def _search(
    name, guess, trials, verbose, increase_factor, max_stepsize, min_stepsize, eps
) -> optax.GradientTransformationExtraArgs:
    """Make the line search: the same one for the same arguments, so that programs are found."""
    if name == "backtracking":
        search = optax.scale_by_backtracking_linesearch(
            trials, increase_factor=1.0, max_learning_rate=max_stepsize, verbose=verbose
        )
    else:
        search = optax.scale_by_zoom_linesearch(
            trials,
            max_learning_rate=max_stepsize,
            approx_dec_rtol=10 * eps,
            initial_guess_strategy="keep",
            verbose=verbose,
        )
    factor = increase_factor if guess == "increase" else 1
    # A search that failed leaves 0.
    least = min_stepsize if guess == "increase" else 0
    longest = 1.0 if max_stepsize == float("inf") else max_stepsize

    def first(last):
        if guess == "max":
            return jnp.full_like(last, longest)
        return jnp.where(last <= least, longest, jnp.minimum(factor * last, max_stepsize))

    def init(params):
        state: Any = search.init(params)
        return state._replace(learning_rate=jnp.full_like(state.value, longest))

    def update(updates, state, params=None, **others):
        state = state._replace(learning_rate=first(state.learning_rate))
        return search.update(updates, state, params, **others)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_stepsize(value):
    remedy = "Pass 0.0 for a line search, a positive number, or a function of the step's number."
    if callable(value):
        return
    if isinstance(value, bool) or not eqx.is_array_like(value) or jnp.iscomplexobj(value):
        raise TypeError(f"stepsize must be a real number or a function, got {value!r}. {remedy}")
    if jnp.shape(value) != ():
        raise ValueError(f"stepsize must be a scalar, got {value!r}. {remedy}")
