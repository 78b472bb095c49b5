"""L-BFGS as several packages have it, each run to one gradient tolerance and watched on the way.

The peers are driven step by step, as their documentation shows; a step is compiled once.
"""

import dataclasses
import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import optimistix as optx
import scipy.optimize

import difflbfgs as dl

MAX_EVALUATIONS = MAX_STEPS = 3000
# Of the tolerances at which Optimistix is run, the place of the one that the others are run at.
NOMINAL = 2


@dataclasses.dataclass
class Run:
    """How a solver went.

    Attributes:
        x: the point it returned.
        claim: "success", "limit" (as far as rounding lets it) or "failure".
        evaluations: of the objective, most of them with the gradient.
        values: the objective at the start and after every step.
    """

    x: np.ndarray
    claim: str
    evaluations: int
    values: list[float]


def difflbfgs(fun: Callable, x0: jax.Array, tolerance: float, **settings) -> Run:
    """Run `difflbfgs.minimize`."""
    steps = []
    solver = dl.LBFGS(rtol=0.0, atol=tolerance, **settings)
    solution = dl.minimize(
        lambda x, _: fun(x),
        x0,
        solver=solver,
        max_steps=MAX_STEPS,
        throw=False,
        callback=lambda step: steps.append((int(step.num_steps), float(step.objective))),
    )
    limit = solution.result == dl.RESULTS.precision_limit
    claim = "limit" if limit else "success" if solution.converged else "failure"
    jax.effects_barrier()
    values = [float(fun(x0)), *(f for _, f in sorted(steps))]
    evaluations = int(solution.stats.num_fun_evals + solution.stats.num_hvps)
    return Run(np.asarray(solution.value), claim, evaluations, values)


def scipy_lbfgsb(fun: Callable, x0: jax.Array, tolerance: float) -> Run:
    """Run SciPy's L-BFGS-B, in float64, until the 2-norm of the gradient passes."""
    value_and_grad = jax.jit(jax.value_and_grad(fun))
    values, norms = [float(fun(x0))], {}

    def evaluate(x):
        f, g = value_and_grad(jnp.asarray(x, x0.dtype))
        norms[float(f)] = float(jnp.linalg.norm(g))
        return float(f), np.asarray(g, np.float64)

    def watch(intermediate_result):
        values.append(float(intermediate_result.fun))
        if norms.get(values[-1], np.inf) <= tolerance:
            raise StopIteration

    found = scipy.optimize.minimize(
        evaluate,
        np.asarray(x0, np.float64),
        jac=True,
        method="L-BFGS-B",
        callback=watch,
        options={"maxiter": MAX_STEPS, "maxfun": MAX_EVALUATIONS, "ftol": 0, "gtol": 0},
    )
    stopped_by_watch = 99
    claim = "success" if found.success or found.status == stopped_by_watch else "failure"
    return Run(found.x, claim, found.nfev, values)


def optax_loop(fun: Callable, x0: jax.Array, tolerance: float) -> Run:
    """Run `optax.lbfgs` in the loop of Optax's documentation."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(fun)

    @jax.jit
    def step(x, state):
        f, g = value_and_grad(x, state=state)
        updates, state = solver.update(g, state, x, value=f, grad=g, value_fn=fun)
        return optax.apply_updates(x, updates), state

    x, state = x0, jax.jit(solver.init)(x0)
    values, evaluations = [float(fun(x0))], 1
    while len(values) <= MAX_STEPS and evaluations < MAX_EVALUATIONS:
        x, state = step(x, state)
        values.append(float(state[-1].value))
        evaluations += int(state[-1].info.num_linesearch_steps)
        if float(jnp.linalg.norm(state[-1].grad)) <= tolerance:
            return Run(np.asarray(x), "success", evaluations, values)
    return Run(np.asarray(x), "failure", evaluations, values)


def jaxopt_lbfgs(fun: Callable, x0: jax.Array, tolerance: float) -> Run:
    """Run `jaxopt.LBFGS`; its loop ends when the norm of the gradient passes."""
    solver = jaxopt.LBFGS(fun, tol=tolerance, maxiter=MAX_STEPS)
    step = jax.jit(solver.update)
    x, state = x0, jax.jit(solver.init_state)(x0)
    values = [float(state.value)]
    while len(values) <= MAX_STEPS and int(state.num_fun_eval) < MAX_EVALUATIONS:
        x, state = step(x, state)
        values.append(float(state.value))
        if float(state.error) <= tolerance:
            return Run(np.asarray(x), "success", int(state.num_fun_eval), values)
    return Run(np.asarray(x), "failure", int(state.num_fun_eval), values)


def optimistix_lbfgs(fun: Callable, x0: jax.Array, tolerance: float) -> list[Run]:
    """Run `optimistix.LBFGS` at several tolerances; it tests differences of x and f.

    One run serves all: its iterates do not depend on the tolerance, but for where they end.
    """

    def objective(x, _):
        return fun(x), None

    f_struct = jax.eval_shape(fun, x0)

    @eqx.filter_jit
    def advance(x, state, rtol):
        solver = optx.LBFGS(rtol, rtol)
        x, state, _ = solver.step(objective, x, None, {}, state, frozenset())
        return x, state

    solver = optx.LBFGS(1.0, 1.0)
    x, state = x0, solver.init(objective, x0, None, {}, f_struct, None, frozenset())
    values, runs = [], []
    nominal, digits = (
        (1e-6, range(-NOMINAL, 8)) if x0.dtype == jnp.float64 else (1e-3, range(-NOMINAL, 5))
    )
    rtols = (jnp.asarray(nominal * 10.0**-digit, x0.dtype) for digit in digits)
    rtol = next(rtols)
    for evaluation in itertools.count(1):
        before = (x, state)
        x, state = advance(*before, rtol)
        while bool(state.terminate):
            runs.append(Run(np.asarray(x), "success", evaluation, list(values)))
            rtol = next(rtols, None)
            if rtol is None:
                return runs
            x, state = advance(*before, rtol)
        accepted = int(state.num_accepted_steps) > len(values)
        if accepted:
            values.append(float(state.f_info.f))
        if evaluation >= MAX_EVALUATIONS or not bool(jnp.all(jnp.isfinite(state.y_eval))):
            return [*runs, Run(np.asarray(x), "failure", evaluation, values)]
    raise AssertionError
