"""Error against time of hypergradients: what a user would pick instead.

    pip install -e ".[benchmarks]"
    python benchmarks/hypergradient.py [--quick | --full] [--results file.json] [--output file.png]

Six problems, of 30 to 7840 variables and 30 to 2000 hyperparameters, in float64 and float32. Each
contestant computes one hypergradient from a cold start, as one compiled program where it can be, at
several tolerances or numbers of steps; see `contestants.py` for how each is set. The error is that
in the 2-norm, relative to a float64 reference; the time is the median of runs that take turns.
Without `--full`: float64 only, without the largest problem, and the fastest of each package.

Comparisons are at equal error, along the curve of each contestant (`report.seconds_at`). The claims
are asserted at the end.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import harness
import report
from contestants import CONTESTANTS, DENSE_LIMIT
from problems.collection import COLLECTION, exact_hypergradient, mnist_cleaning

jax.config.update("jax_enable_x64", True)

PROBLEMS = {
    "logistic": COLLECTION["logistic"],
    "softmax": COLLECTION["softmax e-6"],
    "network": COLLECTION["network"],
    "distillation": COLLECTION["distillation"],
    "hyper-cleaning": COLLECTION["hyper-cleaning"],
    "MNIST cleaning": mnist_cleaning,
}
LARGEST = "MNIST cleaning"
# In float32, in all but full mode, and where a matrix would not fit, only these take part.
SELECTED = (
    "difflbfgs",
    "difflbfgs, loose adjoint",
    "JAXopt, solve_cg",
    "Optimistix, L-BFGS, CG",
    "unrolled SGD",
    "SciPy",
)
REPEATS, BUDGET = 3, 0.5
# An unrolled method is not given more steps than may take so many seconds.
LONGEST = 10.0


def entrants(n, selected):
    """Return the contestants that take part, given the number of variables."""
    everyone = n <= DENSE_LIMIT and not selected
    return [each for each in CONTESTANTS if everyone or each.name in SELECTED]


def prepared(contestant, problem):
    """Yield each setting with a run without arguments."""
    theta, x0 = problem.theta, problem.x0
    if contestant.unrolled:
        seconds = 0.0
        for steps in contestant.settings:
            if seconds * steps > LONGEST:
                return
            made = harness.compiled(contestant.make(problem, num_steps=steps), theta, x0, 0.0)
            run = lambda made=made: made.run(theta, x0, 0.0)
            yield steps, run
            seconds = harness.seconds({0: run}, 1, LONGEST)[0] / steps
        return
    program = contestant.make(problem)
    if contestant.compiled:
        program = harness.compiled(program, theta, x0, jnp.zeros((), x0.dtype)).run
    for tolerance in contestant.settings:
        setting = jnp.asarray(tolerance, x0.dtype)
        yield tolerance, lambda s=setting: program(theta, x0, s)


@functools.cache
def exact(name):
    """Return the hypergradient to compare with."""
    return exact_hypergradient(PROBLEMS[name](jnp.float64))


def measure(name, dtype, selected):
    """Return a row for every contestant, with its settings, errors, seconds and evaluations."""
    reference = exact(name)
    # Optimistix's L-BFGS takes float32 only where float64 is off.
    with jax.enable_x64(dtype == jnp.float64):
        return compared(name, dtype, selected, reference)


def compared(name, dtype, selected, reference):
    """Return these rows, given the hypergradient to compare with."""
    problem = PROBLEMS[name](dtype)
    rows, runs = [], {}
    for contestant in entrants(problem.x0.size, selected):
        row = {
            "problem": name,
            "dtype": dtype.__name__,
            "variables": problem.x0.size,
            "hyperparameters": problem.theta.size,
            "package": contestant.package,
            "contestant": contestant.name,
            **{key: [] for key in ("setting", "error", "seconds", "evaluations")},
        }
        for setting, run in prepared(contestant, problem):
            try:
                gradient, evaluations = run()
            except RuntimeError as error:  # an adjoint that gives up: no gradient to compare
                print(f"{contestant.name} at {setting:g} raised: {str(error).strip()[:80]}")
                continue
            error = np.linalg.norm(np.asarray(gradient, np.float64) - reference)
            runs[len(rows), setting] = run
            row["setting"].append(setting)
            row["error"].append(float(error / np.linalg.norm(reference)))
            row["evaluations"].append(int(evaluations))
        if row["setting"]:
            rows.append(row)
    for (key, _), seconds in harness.seconds(runs, REPEATS, BUDGET).items():
        rows[key]["seconds"].append(seconds)
    jax.clear_caches()
    return rows


def main():
    """Measure, print, record, draw, and assert the claims."""
    options = harness.options(__doc__)
    rows = []
    smaller = [name for name in PROBLEMS if name != LARGEST]
    names = harness.sized(options, ["network"], smaller, list(PROBLEMS))
    for dtype in (jnp.float64, jnp.float32) if options.full else (jnp.float64,):
        for name in names:
            for row in measure(name, dtype, not options.full or dtype == jnp.float32):
                rows.append(row)
                columns = (row[key] for key in ("setting", "error", "seconds", "evaluations"))
                for setting, error, seconds, evaluations in zip(*columns, strict=True):
                    print(
                        f"{name:15s} {row['dtype']:8s} {row['contestant']:32s} {setting:6g} "
                        f"error {error:8.1e} {1e3 * seconds:10.2f} ms "
                        f"{evaluations:6d} evaluations",
                        flush=True,
                    )
            harness.keep(options, rows)  # an unfinished run is of use
    print(report.hypergradient_table(rows))
    harness.keep(options, rows, report.draw_hypergradients)
    report.assert_hypergradients(rows)


if __name__ == "__main__":
    main()
