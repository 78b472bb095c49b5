"""How the cost of a hypergradient grows: with variables, hyperparameters, samples and steps.

    python benchmarks/growth.py [--quick | --full] [--results file.json] [--output file.png]

- variables: smoothing of a signal of `n` values with a pseudo-Huber penalty on its differences, two
  hyperparameters. The condition number does not depend on `n`.
- hyperparameters: logistic regression in 20 variables on 100 000 samples, in `p` groups that have
  a learned weight each.
- samples: the same with a weight decay for each variable, on `m` samples.
- steps: the smoothing again, with the number of inner steps that are allowed.

All are solved from zero in float64, by compiled programs, to tolerances that leave errors of like
size; the error is the distance to a hypergradient of ours at `rtol=1e-11`. Of each are shown time
(medians of runs that take turns), temporary memory, evaluations, and, for ours, products with the
Hessian. The exponents are those of a least-squares line through the logarithms, over the upper
half of the sizes: time or memory grows like size to this power. Without `--full` every other size
is left out, and the largest.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import difflbfgs as dl
import harness
import report
from contestants import BY_NAME, counts
from problems.scalable import logistic, smoothing

jax.config.update("jax_enable_x64", True)


SWEEPS = {
    "variables": (smoothing, (100, 1000, 10_000, 100_000, 1_000_000)),
    "hyperparameters": (functools.partial(logistic, 100_000), (1, 10, 100, 1000, 10_000, 100_000)),
    "samples": (logistic, (100, 1000, 10_000, 100_000)),
}
STEPS = (10, 100, 1000)


unrolled_sgd = BY_NAME["unrolled SGD"].make
# Makers of programs, and the tolerance that each is given.
CONTEST = {
    "difflbfgs": (BY_NAME["difflbfgs, loose adjoint"].make, 1e-3),
    "JAXopt": (BY_NAME["JAXopt, solve_cg"].make, 1e-8),
    "Optimistix": (BY_NAME["Optimistix, L-BFGS, CG"].make, 1e-8),
    "unrolled SGD": (functools.partial(unrolled_sgd, num_steps=100), 0.0),
}


def products(problem, rtol):
    """Return the Hessian products of one hypergradient of ours."""
    solver, adjoint = dl.LBFGS(rtol=rtol), dl.ImplicitAdjoint(rtol=rtol**2)
    return counts(problem, solver=solver, adjoint=adjoint)[1]


def measure(sweep, size, problem):
    """Return a row for each contestant."""
    rows, runs = [], {}
    best = harness.compiled(BY_NAME["difflbfgs"].make(problem), problem.theta, problem.x0, 1.0)
    exact, _ = best.run(problem.theta, problem.x0, 1e-11)
    for name, (make, tolerance) in CONTEST.items():
        made = harness.compiled(make(problem), problem.theta, problem.x0, tolerance)
        run = functools.partial(made.run, problem.theta, problem.x0, tolerance)
        gradient, evaluations = run()
        row = {"sweep": sweep, "size": size, "contestant": name}
        row |= {"bytes": made.temporary_bytes, "evaluations": int(evaluations)}
        if name == "difflbfgs":
            row["products"] = products(problem, tolerance)
        row["error"] = float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact))
        rows.append(row)
        runs[len(runs)] = run
    for key, seconds in harness.seconds(runs, 3, 5.0).items():
        rows[key]["seconds"] = seconds
    jax.clear_caches()
    return rows


def memory_by_steps():
    """Yield rows of temporary memory against the number of steps allowed."""
    problem = smoothing(10_000)

    def ours(theta, x0, num_steps):
        sol = dl.minimize(problem.inner, x0, theta, max_steps=num_steps, throw=False)
        return problem.outer(sol.value, theta)

    for steps in STEPS:
        unrolled = unrolled_sgd(problem, num_steps=steps)
        gradient = jax.grad(functools.partial(ours, num_steps=steps))
        for name, made in (
            ("difflbfgs", harness.compiled(gradient, problem.theta, problem.x0)),
            ("unrolled SGD", harness.compiled(unrolled, problem.theta, problem.x0, 0.0)),
        ):
            yield {
                "sweep": "steps",
                "size": steps,
                "contestant": name,
                "bytes": made.temporary_bytes,
            }


def series(rows, sweep, name, quantity):
    """Return sizes and values of one curve."""
    own = [row for row in rows if (row["sweep"], row["contestant"]) == (sweep, name)]
    return np.array([row["size"] for row in own]), np.array([row[quantity] for row in own])


def draw(rows, path):
    """Save times of every sweep, and memory against steps."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for axis, (sweep, quantity) in zip(
        axes, [*((sweep, "seconds") for sweep in SWEEPS), ("steps", "bytes")], strict=True
    ):
        for k, name in enumerate(CONTEST):
            sizes, values = series(rows, sweep, name, quantity)
            if len(sizes):
                color = "black" if name == "difflbfgs" else f"C{k}"
                scale = 1e3 if quantity == "seconds" else 2**-20
                axis.loglog(sizes, scale * values, "o-", color=color, label=name)
        axis.set(xlabel=sweep, ylabel="ms" if quantity == "seconds" else "MiB, temporary")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    """Measure, print, record, draw, and assert what memory does."""
    options = harness.options(__doc__)
    rows = []
    for sweep, (make, sizes) in SWEEPS.items():
        if options.quick and sweep == "hyperparameters":
            continue  # one of these takes as long as all others
        for size in harness.sized(options, sizes[:2], sizes[:-1:2], sizes):
            for row in measure(sweep, size, make(size)):
                rows.append(row)
                print(
                    f"{sweep:15s} {size:8d} {row['contestant']:13s} {1e3 * row['seconds']:9.2f} ms "
                    f"{row['bytes'] / 2**20:8.2f} MiB {row['evaluations']:5d} evaluations "
                    f"error {row['error']:7.1e}"
                    + (f" {row['products']:4d} products" if "products" in row else ""),
                    flush=True,
                )
    rows += memory_by_steps()
    print(f"\n{report.growth_table(rows)}")
    harness.keep(options, rows, draw)
    assert all(row["error"] < 1e-3 for row in rows if row.get("products"))
    ours, unrolled = (
        series(rows, "steps", name, "bytes")[1] for name in ("difflbfgs", "unrolled SGD")
    )
    assert len(set(ours)) == 1, "temporary memory does not depend on the number of steps"
    assert unrolled[-1] > 10 * unrolled[0]


if __name__ == "__main__":
    main()
