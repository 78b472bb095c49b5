"""JAXopt's iteration of L-BFGS, one step at a time.

With the pairs `(s, y)` in memory, `P` their inverse Hessian (Nocedal & Wright, algorithm 7.4) that
begins with `gamma I`, and a step size `η` that is given or found by one of Optax's line searches,

    x⁺ = x - η P ∇f(x).

It differs from JAXopt's in two ways. A pair without positive curvature counts for nothing, where
JAXopt lets it make `P` indefinite. A step of a line search that raises the objective is not taken,
and the memory is emptied; JAXopt takes it.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from difflbfgs import _memory, _scale, _vector
from difflbfgs._memory import Pair
from difflbfgs._problem import Problem, Variables
from difflbfgs._solution import RESULTS
from difflbfgs._vector import Flag, Scalar
from difflbfgs._watch import Step, watch
from difflbfgs.compat._jaxopt_objective import Objective
from difflbfgs.compat._jaxopt_settings import Settings
from difflbfgs.compat._jaxopt_state import Iterate

_T = TypeVar("_T")


class Direct(eqx.Module):
    """The user's objective, called as it is, where `Problem` runs what was traced of it."""

    call: Objective
    theta: PyTree
    variables: Variables

    def objective(self, x: Array) -> tuple[Any, tuple[Any, PyTree]]:
        """Return `f(x)` in the working dtype, and the user's value and auxiliary output."""
        f, aux = self.call(self.variables.inside(x), self.theta)
        return jnp.asarray(f, self.variables.dtype), aux


def begin(
    problem: Problem | Direct, settings: Settings, x: Array, before: Iterate | None = None
) -> Iterate:
    """Return the iterate before the first step, with the memory of the one `before`."""
    (f, aux), g = jax.value_and_grad(problem.objective, has_aux=True)(x)
    one = jnp.ones((), x.dtype)
    none = jnp.zeros((settings.history_size, x.size), x.dtype)
    start = Iterate(
        x=x,
        f=f,
        g=g,
        aux=aux,
        S=none,
        Y=none,
        rho=none[:, 0],
        gamma=one,
        stepsize=jnp.asarray(settings.max_stepsize, x.dtype),
        iter_num=jnp.asarray(0),
        failed=jnp.asarray(False),
        num_fun_eval=_count(1),
        num_grad_eval=_count(1),
        num_linesearch_iter=_count(0),
        result=_result(f, g, jnp.asarray(False), settings),
    )
    if before is None:
        return start

    def memory(now):
        return now.S, now.Y, now.rho, now.gamma, now.iter_num, now.stepsize

    return eqx.tree_at(memory, start, memory(before))


def advance(problem: Problem | Direct, settings: Settings, now: Iterate) -> Iterate:
    """Take one step."""
    d = -_inverse_hessian(now)(now.g)
    stepsize, trials = _step_size(problem, settings, now, d)
    x = now.x + stepsize * d
    (f, aux), g = jax.value_and_grad(problem.objective, has_aux=True)(x)
    taken = jnp.asarray(True)
    if settings.searches():
        if settings.linesearch != "backtracking":
            x, f, g = undifferentiable((x, f, g))
        bound = now.f + _scale.rounding(now.f)
        taken = jnp.isfinite(f) & jnp.all(jnp.isfinite(g)) & (f <= bound) & jnp.any(x != now.x)
        x, f, g, aux = _vector.where(taken, (x, f, g, aux), (now.x, now.f, now.g, now.aux))
    S, Y, rho, gamma = _remembered(now, Pair(x - now.x, g - now.g), taken, settings)
    after = Iterate(
        x=x,
        f=f,
        g=g,
        aux=aux,
        S=S,
        Y=Y,
        rho=rho,
        gamma=gamma,
        stepsize=stepsize,
        iter_num=now.iter_num + 1,
        failed=~taken,
        num_fun_eval=now.num_fun_eval + trials + 1,
        num_grad_eval=now.num_grad_eval + 1,
        num_linesearch_iter=now.num_linesearch_iter + trials,
        result=_result(f, g, ~taken, settings),
    )
    if settings.verbose:
        record = Step(after.iter_num, after.num_fun_eval, f, _vector.norm(g), stepsize)
        watch(print_step, jax.lax.stop_gradient(record))
    return after


def _inverse_hessian(now):
    if len(now.rho) == 0:
        return lambda v: v
    return _memory.two_loop(now.S, now.Y, now.rho, now.gamma, _count(now.iter_num))


def _step_size(problem, settings, now, d) -> tuple[Scalar, Any]:
    """Return the step size, and how often the line search tried."""
    if callable(settings.stepsize):
        return jnp.asarray(settings.stepsize(now.iter_num), now.x.dtype), _count(0)
    if not settings.searches():
        return jnp.asarray(settings.stepsize, now.x.dtype), _count(0)
    problem, before, d = without_derivative((problem, now, d))
    search = settings.search(_vector.epsilon(before.x))
    state = search.init(before.x)._replace(learning_rate=before.stepsize)

    def value(x):  # under x64 Optax's searches compute in float64, whatever the dtype of x
        return problem.objective(x.astype(before.x.dtype))[0]

    _, state = search.update(d, state, before.x, value=before.f, grad=before.g, value_fn=value)
    # Backtracking's step sizes are locally constant, and without a derivative exactly.
    return state.learning_rate, _count(state.info.num_linesearch_steps)


def _remembered(now, pair, taken, settings):
    """Return the memory with the pair in it, or empty if no step was taken."""
    rho, gamma = pair.weights()
    gamma = gamma if settings.use_gamma else jnp.ones_like(gamma)
    if len(now.rho) == 0:
        return now.S, now.Y, now.rho, jnp.ones_like(gamma)
    row = now.iter_num % len(now.rho)
    rhos = jnp.where(taken, now.rho, 0).at[row].set(rho)
    return now.S.at[row].set(pair.s), now.Y.at[row].set(pair.y), rhos, gamma


def _result(f, g, failed, settings):
    finite = jnp.isfinite(f) & jnp.all(jnp.isfinite(g))
    result = RESULTS.where(
        _vector.norm(jax.lax.stop_gradient(g)) <= settings.tol,
        RESULTS.successful,
        RESULTS.max_steps_reached,
    )
    result = RESULTS.where(failed, RESULTS.line_search_failed, result)
    return RESULTS.where(finite, result, RESULTS.nonlinear_divergence)


def loop(problem: Problem | Direct, settings: Settings, start: Iterate, how: str | None) -> Iterate:
    """Take steps until the solve is over.

    Args:
        problem: the objective.
        settings: of the solve.
        start: the iterate to begin from.
        how: `"while"`, a compiled loop; `"scan"`, one that JAX can differentiate in reverse mode,
            for the memory of `maxiter` steps; `"python"`, a loop in Python without compilation.
    """

    def unfinished(now: Iterate) -> Flag:
        error = _vector.norm(jax.lax.stop_gradient(now.g))
        again = now.iter_num < start.iter_num + settings.maxiter
        return (error > settings.tol) & again & ~(now.failed & settings.stop_if_linesearch_fails)

    def step(now: Iterate) -> Iterate:
        return advance(problem, settings, now)

    if how == "while":
        return jax.lax.while_loop(unfinished, step, start)
    if how == "scan":

        def body(now, _):
            return jax.lax.cond(unfinished(now), step, lambda now: now, now), None

        return jax.lax.scan(body, start, length=settings.maxiter)[0]
    now = start
    while unfinished(now):
        now = step(now)
    return now


def without_derivative(tree: _T) -> _T:
    """Return `tree`, whose arrays are constants to whoever differentiates."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def undifferentiable(tree: _T) -> _T:
    """Return `tree`; JAX raises if it comes to differentiate it."""

    @jax.custom_jvp
    def constant(tree):
        return tree

    @constant.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(_REFUSAL)

    return constant(tree)


_REFUSAL = (
    "The iterations of a zoom line search cannot be unrolled and differentiated: Optax searches in "
    "a while_loop. Pass implicit_diff=True and call run (the derivative of the minimizer), or for "
    "that of the iterates linesearch='backtracking', whose step sizes are locally constant, or a "
    "stepsize."
)


def print_step(step: Step) -> None:
    """Print what JAXopt prints under `verbose`."""
    print(
        f"INFO: difflbfgs.compat.jaxopt.LBFGS: Iter: {int(step.num_steps)} "
        f"Gradient Norm (stopping criterion): {float(step.grad_norm):.6g} "
        f"Objective Value: {float(step.objective):.6g} Stepsize: {float(step.step_size):.6g}"
    )


def _count(value) -> Any:
    return jnp.asarray(value, jnp.int32)
