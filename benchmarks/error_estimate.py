"""Is the error estimate right? `error_estimate / true error` on many problems and tolerances.

    python benchmarks/error_estimate.py [--quick | --full] [--results file.json]

In float64 each problem is solved to gradient tolerances of 1e-1, 1e-2 and 1e-3 (with the Newton
polish) and to the default. The true error is that against dense float64 algebra. The ratio must be
between 1/3 and 3 wherever the true error is above 1e-13 of the hypergradient; below, rounding of
the reference itself is all that is left, and the ratio is shown only.

The products are those of the adjoint and, on top, of the estimate.
"""

import jax
import jax.numpy as jnp
import numpy as np

import difflbfgs as dl
import harness
from collection import COLLECTION, exact_hypergradient

jax.config.update("jax_enable_x64", True)

ROUNDING = 1e-13
SMALL = ("ridge", "logistic", "robust", "poisson")
USUAL = (*SMALL, "softmax e-6", "network", "distillation")


def main():
    """Print the table and assert the claim."""
    options = harness.options(__doc__, picture=False)
    rows = []
    print(
        f"{'problem':18s} {'rtol':>8s} {'true error':>11s} {'estimate':>11s} {'ratio':>7s} "
        f"{'evaluations':>12s} {'products: adjoint':>18s} {'estimate':>9s}"
    )
    shares, ratios = [], []
    for name in harness.sized(options, SMALL, USUAL, COLLECTION):
        problem = COLLECTION[name]()
        exact = exact_hypergradient(problem)
        size = np.linalg.norm(exact)

        @jax.jit
        def step(rtol, problem=problem):
            solver = dl.LBFGS(rtol=rtol)
            made = dl.value_and_hypergrad(
                problem.outer, problem.inner, solver=solver, max_steps=20_000
            )
            return made(problem.theta, problem.x0)

        for rtol in (1e-1, 1e-2, 1e-3, float(jnp.finfo(jnp.float64).eps) ** 0.5):
            _, gradient, info = step(rtol)
            error = np.linalg.norm(gradient - exact)
            ratio = float(info.error_estimate) / error
            evaluations = info.solution.stats.num_fun_evals + info.solution.stats.num_hvps
            print(
                f"{name:18s} {rtol:8.0e} {error / size:11.1e} "
                f"{float(info.error_estimate) / size:11.1e} {ratio:7.3f} {evaluations:12d} "
                f"{info.num_adjoint_steps:18d} {info.num_estimate_steps:9d}",
                flush=True,
            )
            rows.append({"problem": name, "rtol": rtol, "error": error / size, "ratio": ratio})
            if error > ROUNDING * size:
                ratios.append(ratio)
            if problem.x0.size > 64:
                shares.append(float(info.num_estimate_steps / info.num_adjoint_steps))
    harness.record(options.results, rows, options.quick)
    print(f"\nratios where the error is not rounding: {min(ratios):.3f} to {max(ratios):.3f}")
    if shares:
        print(
            "products of the estimate over those of the adjoint: "
            f"{min(shares):.2f} to {max(shares):.2f}"
        )
    assert 1 / 3 < min(ratios)
    assert max(ratios) < 3


if __name__ == "__main__":
    main()
