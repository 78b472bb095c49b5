"""How exact is the default hypergradient, and is a wrong one ever silent?

    python benchmarks/precision.py [--quick | --full] [--results file.json]

First table: softmax regression on digits at default settings, in both precisions, against dense
float64 algebra. The relative error must be below 1e-6 in float64 and below 2e-5 in float32.

Second table: quadratics with condition numbers from 1e2 to 1e8, assembled and matrix-free, in both
precisions, with `throw=False`. Every hypergradient must be within tolerance, or be flagged: by a
result code and NaN, or by an error estimate of at least a third of the true error.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import difflbfgs as dl
import harness
from problems import collection

jax.config.update("jax_enable_x64", True)

DTYPES = (jnp.float64, jnp.float32)
TOLERANCE = {jnp.float64: 1e-6, jnp.float32: 2e-5}


def measured(make, dtype, adjoint):
    """Return the relative error, the relative estimate, and what else is known."""
    problem = make(dtype)
    exact = collection.exact_hypergradient(make(jnp.float64))
    step = dl.value_and_hypergrad(
        problem.outer, problem.inner, adjoint=adjoint, max_steps=50_000, throw=False
    )
    _, gradient, info = jax.jit(step)(problem.theta, problem.x0)
    size = np.linalg.norm(exact)
    error = np.linalg.norm(np.asarray(gradient, np.float64) - exact) / size
    return error, float(info.error_estimate) / size, info


def message(result):
    """Return the beginning of what a user reads."""
    results: Any = dl.RESULTS
    return results[result][:45]


def digits(decays):
    """Print the first table and assert its claim; return its rows."""
    rows = []
    print("softmax regression on digits, default settings")
    print(
        f"{'decay':>6s} {'dtype':>8s} {'error':>8s} {'estimate':>9s} {'evaluations':>12s} "
        f"{'products: polish':>17s} {'adjoint':>8s} {'estimate':>9s}"
    )
    for log_decay in decays:
        for dtype in DTYPES:
            error, estimate, info = measured(
                lambda dtype, e=log_decay: collection.softmax_regression(e, dtype),
                dtype,
                dl.ImplicitAdjoint(),
            )
            stats = info.solution.stats
            print(
                f"  e^{log_decay:<3.0f} {dtype.__name__:>8s} {error:8.1e} {estimate:9.1e} "
                f"{stats.num_fun_evals:12d} {stats.num_hvps:17d} {info.num_adjoint_steps:8d} "
                f"{info.num_estimate_steps:9d}",
                flush=True,
            )
            assert error < TOLERANCE[dtype]
            rows.append(row("digits", log_decay, dtype, 650, error, estimate))
    return rows


def row(problem, parameter, dtype: Any, n, error, estimate):
    """Return what is recorded of a hypergradient."""
    return {
        "problem": problem,
        "parameter": parameter,
        "dtype": dtype.__name__,
        "variables": n,
        "error": error,
        "estimate": estimate,
    }


def quadratics(conditions):
    """Print the second table and assert its claim; return its rows."""
    rows = []
    print("\nquadratics in 20 variables (assembled) and in 100 (conjugate gradients)")
    print(
        f"{'condition':>9s} {'dtype':>8s} {'n':>4s} {'error':>8s} {'estimate':>9s} "
        f"{'min, max curvature':>19s}   verdict"
    )
    silent = 0
    for condition in conditions:
        for dtype in DTYPES:
            for n in (20, 100):
                error, estimate, info = measured(
                    lambda dtype, c=condition, n=n: collection.quadratic(c, dtype, n),
                    dtype,
                    dl.ImplicitAdjoint(),
                )
                flagged = np.isnan(error) and not np.isfinite(estimate)
                right, told = error < TOLERANCE[dtype], estimate >= error / 3
                silent += not (flagged or right or told)
                verdict = (
                    "code, NaN"
                    if flagged
                    else "within tolerance"
                    if right
                    else "told by the estimate"
                    if told
                    else "SILENTLY WRONG"
                )
                print(
                    f"{condition:9.0e} {dtype.__name__:>8s} {n:4d} {error:8.1e} {estimate:9.1e} "
                    f"{float(info.min_curvature):9.2g} {float(info.max_curvature):9.2g}   "
                    f"{verdict}: {message(info.result)}",
                    flush=True,
                )
                rows.append(row("quadratic", condition, dtype, n, error, estimate))
    print(f"\nsilently wrong: {silent}")
    assert silent == 0
    return rows


def main():
    """Print both tables, assert the claims, record."""
    options = harness.options(__doc__, picture=False)
    decays = (-4.0, -6.0, -9.0) if options.full else (-6.0,)
    conditions = harness.sized(options, (1e2, 1e6), (1e6, 1e8), (1e2, 1e4, 1e6, 1e8))
    rows = digits(decays) + quadratics(conditions)
    harness.keep(options, rows)


if __name__ == "__main__":
    main()
