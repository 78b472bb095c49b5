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
"""

import concurrent.futures
import functools
import itertools
import multiprocessing

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import harness
import minimizers
import objectives
import report

SOLVERS = {
    "difflbfgs": minimizers.difflbfgs,
    "no polish": functools.partial(minimizers.difflbfgs, polish=0),
    "SciPy": minimizers.scipy_lbfgsb,
    "Optax loop": minimizers.optax_loop,
    "JAXopt": minimizers.jaxopt_lbfgs,
    "Optimistix": minimizers.optimistix_lbfgs,
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
        f, g = value_and_grad(jnp.asarray(run.x, x0.dtype))
        norm = float(jnp.linalg.norm(g))
        # The program that judges rounds a little differently from the one that was judged.
        small = norm <= 1.01 * tolerance
        reports.append(
            {
                "claim": run.claim,
                "evaluations": run.evaluations,
                "solved": bool(small and run.evaluations <= minimizers.MAX_EVALUATIONS),
                "false": bool(run.claim == "success" and not small),
                "worse": bool(np.isfinite(first) and not f <= first + rounding(first, x0.dtype)),
                "rises": rises(run.values, x0.dtype),
                "objective": float(f),
                "grad_norm": norm,
            }
        )
    nominal = reports[min(minimizers.NOMINAL, len(reports) - 1)]
    best = next((report for report in reports if report["solved"]), nominal)
    return {**best, "false": nominal["false"]}


def rises(values, dtype) -> int:
    """Return how many steps raised the objective beyond its rounding error."""
    return sum(
        bool(not after <= before + rounding(before, dtype))
        for before, after in itertools.pairwise(values)
    )


def rounding(value, dtype) -> float:
    """Return the rounding error to expect of an objective of this size."""
    return 10 * float(jnp.finfo(dtype).eps) * abs(value)


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
        costs = np.array(
            [
                [row[name]["evaluations"] if row[name]["solved"] else np.inf for name in SOLVERS]
                for row in smooth
            ]
        )
        report.performance_profile(panel, costs, SOLVERS, OURS)
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
    harness.record(options.results, rows, options.quick)
    print(f"\n{report.forward_table(rows)}")
    check(rows)
    if options.output:
        draw(rows, options.output)


def check(rows) -> None:
    """Assert that no success is false, nothing rises, and nothing ends worse than it started."""
    for row in rows:
        for name in OURS:
            assert not row[name]["false"], row
            assert not row[name]["rises"], row
            assert not row[name]["worse"], row


if __name__ == "__main__":
    main()
