"""How dependable are bounds? Three L-BFGS codes on CUTEst's problems, and derivatives through them.

    pip install -e ".[benchmarks]"
    python benchmarks/bounds.py [--quick | --full] [--results file.json] [--output profile.png]

Every code is asked for a projected gradient of 2-norm `1e-6 max(1, ‖that at x0‖)^½`, within 3000
evaluations: the gradient without the components that point out of the box at a bound. SciPy's
L-BFGS-B is stopped when it gets there. The table counts problems solved; evaluations, for
difflbfgs with Hessian products among them, as the median ratio to SciPy's over what both solved;
false successes; and problems with an evaluation outside the box. JAXopt is run up to
100 variables. All 80 problems take `--full`.

Up to 100 variables the minimizer of `f(x) + Σ s θ x`, with `s` a slope of the objective, is
differentiated at a random `θ` in a random direction, along random weights, and compared with
differences of exact re-solves at two step lengths, which must agree. A derivative is silently wrong
if the code says that it converged and the error is above 1e-3.
"""

import functools
import multiprocessing
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize

import difflbfgs as dl
import harness
import report
from problems import objectives

MAX_EVALUATIONS = 3000
TAU = 1e-6
QUICK = ("BIGGS5", "HART6", "HATFLDB", "HS2", "HS45", "DEVGLA2B")
# JAXopt takes minutes a problem beyond, and so do exact re-solves.
SMALL = 100
# How many hyperparameters are drawn in search of one at which the re-solves agree.
DRAWS = 5


def projected(x: Any, g: jax.Array, problem: objectives.Bounded) -> float:
    """Return the norm of the gradient that the bounds leave."""
    out = ((x <= problem.lower) & (g > 0)) | ((x >= problem.upper) & (g < 0))
    out |= problem.lower == problem.upper
    return float(jnp.linalg.norm(jnp.where(out, 0, g)))


def difflbfgs(problem, tolerance, polish: int = 1) -> dict:
    """Run `difflbfgs.minimize`, and count evaluations outside."""
    outside = []

    def fun(x, _):
        wrong = jnp.any((x < problem.lower) | (x > problem.upper))
        jax.lax.cond(wrong, lambda: jax.debug.callback(lambda: outside.append(1)), lambda: None)
        return problem.fun(x)

    solution = dl.minimize(
        fun,
        problem.x0,
        bounds=(problem.lower, problem.upper),
        solver=dl.LBFGS(rtol=0.0, atol=tolerance, polish=polish),
        max_steps=MAX_EVALUATIONS,
        throw=False,
    )
    jax.effects_barrier()
    return {
        "x": solution.value,
        "claim": bool(solution.result == dl.RESULTS.successful),
        "evaluations": int(solution.stats.num_fun_evals + solution.stats.num_hvps),
        "outside": len(outside),
    }


def scipy_lbfgsb(problem, tolerance) -> dict:
    """Run SciPy's L-BFGS-B until the projected gradient passes."""
    value_and_grad = jax.jit(jax.value_and_grad(problem.fun))
    norms = {}

    def evaluate(x):
        f, g = value_and_grad(jnp.asarray(x))
        norms[float(f)] = projected(x, g, problem)
        return float(f), np.asarray(g)

    def watch(intermediate_result):
        if norms.get(float(intermediate_result.fun), np.inf) <= tolerance:
            raise StopIteration

    found = scipy.optimize.minimize(
        evaluate,
        np.asarray(problem.x0),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(np.asarray(problem.lower), np.asarray(problem.upper), strict=True)),
        callback=watch,
        options={"maxiter": MAX_EVALUATIONS, "maxfun": MAX_EVALUATIONS, "ftol": 0, "gtol": 0},
    )
    return {"x": found.x, "claim": False, "evaluations": found.nfev, "outside": 0}


def jaxopt_lbfgsb(problem, tolerance) -> dict:
    """Run `jaxopt.LBFGSB`, whose own test is on the step of the projected gradient."""
    solver = jaxopt.LBFGSB(problem.fun, tol=tolerance, maxiter=MAX_EVALUATIONS)
    x, state = jax.jit(solver.run)(problem.x0, (problem.lower, problem.upper))
    claim, count = float(state.error) <= tolerance, int(state.num_fun_eval)
    return {"x": x, "claim": claim, "evaluations": count, "outside": 0}


SOLVERS = {
    "difflbfgs": difflbfgs,
    "polish=0": functools.partial(difflbfgs, polish=0),
    "SciPy": scipy_lbfgsb,
    "JAXopt": jaxopt_lbfgsb,
}
OURS = ("difflbfgs", "polish=0")


def measure(name: str) -> dict:
    """Run all solvers on a problem, and differentiate."""
    jax.config.update("jax_enable_x64", True)
    (problem,) = objectives.bounded(jnp.float64, (name,))
    gradient = jax.jit(jax.grad(problem.fun))
    start = projected(problem.x0, gradient(problem.x0), problem)
    tolerance = TAU * max(1.0, start if np.isfinite(start) else 1.0) ** 0.5
    row = {"problem": name, "n": problem.x0.size, "tolerance": tolerance}
    for solver, solve in SOLVERS.items():
        if solver == "JAXopt" and problem.x0.size > SMALL:
            row[solver] = None
            continue
        found = solve(problem, tolerance)
        x = jnp.clip(jnp.asarray(found.pop("x")), problem.lower, problem.upper)
        norm = projected(x, gradient(x), problem)
        small = norm <= 1.01 * tolerance
        found["solved"] = bool(small and found["evaluations"] <= MAX_EVALUATIONS)
        found["false"] = bool(found["claim"] and not small)
        row[solver] = {**found, "grad_norm": norm}
    row["derivative"] = differentiated(problem) if problem.x0.size <= SMALL else None
    print(line(row), flush=True)
    return row


def differentiated(problem) -> dict | None:
    """Return the errors of a directional derivative, or `None` where no draw has a truth."""
    rng = np.random.default_rng(len(problem.name) + problem.x0.size)
    n = problem.x0.size
    bounds = problem.lower, problem.upper
    slope = float(jnp.median(jnp.abs(jax.grad(problem.fun)(problem.x0)))) or 1.0

    def inner(x, theta):
        return problem.fun(x) + slope * jnp.vdot(theta, x)

    def ours(t, theta, along, weights):
        x = dl.minimize(inner, problem.x0, theta + t * along, bounds=bounds, throw=False).value
        return jnp.vdot(weights, x)

    def jaxopts(t, theta, along, weights):
        solver = jaxopt.LBFGSB(inner, maxiter=1000)
        return jnp.vdot(weights, solver.run(problem.x0, bounds, theta + t * along).params)

    @jax.jit
    def resolved(x0, theta, weights):
        solver = dl.LBFGS(rtol=1e-12, polish=3)
        solution = dl.minimize(inner, x0, theta, bounds=bounds, solver=solver, throw=False)
        return jnp.vdot(weights, solution.value), solution.converged

    def truth_at(theta, along, weights):
        exact = dl.minimize(inner, problem.x0, theta, bounds=bounds, throw=False)
        if not exact.converged:
            return None
        return difference(lambda t: resolved(exact.value, theta + t * along, weights))

    for _ in range(DRAWS):
        theta, along, weights = (jnp.asarray(v) for v in rng.normal(size=(3, n)))
        theta = 1e-2 * theta
        truth = truth_at(theta, along, weights)
        if truth is not None:
            break
    else:
        return None
    at = 0.0, theta, along, weights
    size = max(abs(truth), 1e-9)
    return {
        name: abs(float(jax.grad(value)(*at)) - truth) / size
        for name, value in (("difflbfgs", ours), ("JAXopt", jaxopts))
    }


def difference(value) -> float | None:
    """Return the derivative of `value` at 0 if two central differences agree on one."""
    found = []
    for step in (1e-5, 5e-6):
        (after, one), (before, other) = value(step), value(-step)
        if not (one and other):
            return None
        found.append(float(after - before) / (2 * step))
    return found[1] if abs(found[0] - found[1]) <= 1e-5 * abs(found[1]) + 1e-9 else None


def line(row) -> str:
    """Return a problem's results in a line."""
    cells = []
    for name in SOLVERS:
        got = row[name]
        if got is None:
            cells.append("       ")
            continue
        mark = " " if got["solved"] else "f" if got["false"] else "-"
        cells.append(f"{got['evaluations']:6d}{mark}")
    errors = row["derivative"]
    shown = "" if errors is None else "  ".join(f"{e:8.0e}" for e in errors.values())
    return f"{row['problem']:12s} {row['n']:5d} {' '.join(cells)}   {shown}"


def draw(rows, path) -> None:
    """Save the performance profile."""
    figure, panel = plt.subplots(figsize=(6, 4))
    report.performance_profile(panel, rows, SOLVERS, OURS)
    panel.set_ylabel("share of bounded problems solved")
    panel.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    """Measure, print the tables, save numbers and picture, assert the claims."""
    options = harness.options(__doc__)
    every = (*objectives.BOUNDED, *objectives.BOUNDED_QUADRATIC)
    names = harness.sized(options, QUICK, every[::3], every)
    print(f"{'':18s}" + " ".join(f"{name:>9s}" for name in SOLVERS))
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, maxtasksperchild=10) as pool:
        rows = pool.map(measure, names, chunksize=1)
    known = ("problem", "n", "derivative")
    outcomes = [
        {key: row[key] for key in known} | report.outcome(row, SOLVERS, "outside") for row in rows
    ]
    harness.keep(options, outcomes, draw)
    print(f"\n{report.bounds_table(outcomes)}")
    check(rows)


def check(rows) -> None:
    """Assert that no success is false, nothing is evaluated outside, no derivative is wrong."""
    for row in rows:
        for name in OURS:
            assert not row[name]["false"], row
            assert not row[name]["outside"], row
        errors = row["derivative"]
        assert errors is None or not errors["difflbfgs"] > report.WRONG, row


if __name__ == "__main__":
    main()
