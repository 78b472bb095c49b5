"""How dependable is the forward solve? Five L-BFGS codes on other people's problems.

    pip install -e ".[benchmarks]"
    python benchmarks/forward.py [--quick | --full] [--results file.json] [--output profile.png]

Every code is asked for `‖∇f(x)‖₂ <= τ max(1, ‖∇f(x0)‖₂)^½` with τ = 1e-6 in float64 and 1e-3 in
float32, within 3000 evaluations. Optimistix has no test on the gradient: it is run at up to ten
tolerances, the cheapest run that got there counts as its solution, and the one at rtol = τ shows
what it claims. The table counts problems solved, of those with a smooth minimum; evaluations, for
difflbfgs with the Hessian products of its Newton polish among them, as the median ratio to SciPy's
over what both solved; and, over all problems, false successes (claimed, the gradient above
tolerance) and solves in which an accepted step raised the objective beyond rounding. The picture
has the performance profiles of Dolan & Moré (2002): the share of problems solved with at most r
times the evaluations of the best.

The peers are driven step by step, as their documentation shows; a step is compiled once.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxopt
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx
import scipy.optimize

import difflbfgs as dl
import harness
import report
from problems import objectives

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


SOLVERS = {
    "difflbfgs": difflbfgs,
    "no polish": functools.partial(difflbfgs, polish=0),
    "SciPy": scipy_lbfgsb,
    "Optax loop": optax_loop,
    "JAXopt": jaxopt_lbfgs,
    "Optimistix": optimistix_lbfgs,
}
OURS = ("difflbfgs", "no polish")
TAU = {"float64": 1e-6, "float32": 1e-3}
USUAL = ("network", "cluster")  # without `--full`


def measure(family: str, dtype: str) -> list[dict]:
    """Run all solvers on the problems of a family in this dtype."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    rows = []
    for problem in objectives.objectives(jnp.dtype(dtype), (family,)):
        value_and_grad = jax.jit(jax.value_and_grad(problem.fun))
        start = float(jnp.linalg.norm(value_and_grad(problem.x0)[1]))
        tolerance = TAU[dtype] * max(1.0, start if np.isfinite(start) else 1.0) ** 0.5
        row = {"problem": problem.name, "family": problem.family, "n": problem.x0.size}
        for name, solve in SOLVERS.items():
            found = solve(problem.fun, problem.x0, tolerance)
            row[name] = judged(found, value_and_grad, problem.x0, tolerance)
        rows.append({**row, "dtype": dtype, "tolerance": tolerance})
        print(line(rows[-1]), flush=True)
        jax.clear_caches()
    return rows


def judged(runs, value_and_grad, x0, tolerance) -> dict:
    """Return what a solver achieved, by an evaluation of our own."""
    runs = runs if isinstance(runs, list) else [runs]
    first = float(value_and_grad(x0)[0])
    reports = []
    for run in runs:
        x = jnp.asarray(run.x, x0.dtype)
        f, g = value_and_grad(x)
        noise = conditioning(value_and_grad, x, float(f))
        norm = float(jnp.linalg.norm(g))
        # The program that judges rounds a little differently from the one that was judged.
        small = norm <= 1.01 * tolerance
        reports.append(
            {
                "claim": run.claim,
                "evaluations": run.evaluations,
                "solved": bool(small and run.evaluations <= MAX_EVALUATIONS),
                "false": bool(run.claim == "success" and not small),
                "worse": bool(np.isfinite(first) and not f <= first + rounding(first, x0.dtype)),
                "rises": rises(run.values, x0.dtype, noise),
                "objective": float(f),
                "grad_norm": norm,
            }
        )
    nominal = reports[min(NOMINAL, len(reports) - 1)]
    best = next((report for report in reports if report["solved"]), nominal)
    return {**best, "false": nominal["false"]}


def rises(values, dtype, noise) -> int:
    """Return how many steps raised the objective beyond its rounding error and this noise."""
    return sum(
        bool(not after <= before + max(rounding(before, dtype), noise))
        for before, after in itertools.pairwise(values)
    )


def conditioning(value_and_grad, x, f) -> float:
    """Return ten times what a rounding of the variables changes of the objective `f`.

    If large terms cancel in it, that is more than the rounding of its value. Zero if not finite.
    """
    every = np.where(np.random.default_rng(0).integers(2, size=(8, *x.shape)), 1, -1)
    moved = (x * (1 + jnp.finfo(x.dtype).eps * jnp.asarray(signs, x.dtype)) for signs in every)
    change = max(abs(float(value_and_grad(each)[0]) - f) for each in moved)
    return 10 * change if np.isfinite(change) else 0.0


def rounding(value, dtype) -> float:
    """Return the rounding error to expect of an objective of this size, and that of the bound."""
    return 11 * float(jnp.finfo(dtype).eps) * abs(value)


def line(row) -> str:
    """Return a problem's results in a line."""
    cells = []
    for name in SOLVERS:
        got = row[name]
        mark = "" if got["solved"] else "f" if got["false"] else "-"
        cells.append(f"{got['evaluations']:6d}{mark or ' '}{'^' if got['rises'] else ' '}")
    return f"{row['dtype']} {row['problem'][:26]:26s} {row['n']:5d} " + " ".join(cells)


def draw(rows, path) -> None:
    """Save the performance profiles."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for panel, dtype in zip(panels, TAU, strict=True):
        smooth = [row for row in rows if row["dtype"] == dtype and row["family"] != "rough"]
        report.performance_profile(panel, smooth, SOLVERS, OURS)
        panel.set_title(dtype)
    panels[0].set_ylabel("share of smooth problems solved")
    panels[1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    """Measure, print the tables, save numbers and picture, assert the claims."""
    options = harness.options(__doc__)
    families = objectives.FAMILIES if options.full else USUAL
    print(f"{'':41s}" + " ".join(f"{name:>8s}" for name in SOLVERS))
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tasks = zip(*itertools.product(families, TAU), strict=True)
        rows = [row for part in pool.map(measure, *tasks) for row in part]
    known = ("problem", "family", "n", "dtype")
    outcomes = [
        {key: row[key] for key in known} | report.outcome(row, SOLVERS, "rises") for row in rows
    ]
    harness.keep(options, outcomes, draw)
    print(f"\n{report.forward_table(outcomes)}")
    check(rows)


def check(rows) -> None:
    """Assert that no success is false, nothing rises, and nothing ends worse than it started."""
    for row in rows:
        for name in OURS:
            assert not row[name]["false"], row
            assert not row[name]["rises"], row
            assert not row[name]["worse"], row


if __name__ == "__main__":
    main()
