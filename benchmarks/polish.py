"""Does the Newton polish pay? Cost at equal error, polish on against polish off.

    python benchmarks/polish.py [--quick]

For each problem and each of three tolerances with the polish: its error, its cost, and that of the
loosest tolerance without polish that is at least as exact. The cost is that of one hypergradient,
solve and adjoint: evaluations of the inner objective with its gradient plus Hessian products, and
seconds, medians of interleaved runs of the compiled programs. On the average (geometric mean)
polish must be cheaper in both.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import difflbfgs as dl
from collection import COLLECTION, exact_hypergradient

jax.config.update("jax_enable_x64", True)


def hypergradient(problem, polish):
    """Return the compiled `rtol -> (gradient, evaluations and products)`."""

    def gradient(rtol):
        solver = dl.LBFGS(rtol=rtol, polish=polish)
        step = dl.value_and_hypergrad(problem.outer, problem.inner, solver=solver, max_steps=5000)
        _, grad, info = step(problem.theta, problem.x0)
        stats = info.solution.stats  # the error estimate is not returned, and so not computed
        return grad, stats.num_fun_evals + stats.num_hvps + info.num_adjoint_steps

    return jax.jit(gradient).lower(1e-3).compile()


def seconds(runs, repeats):
    """Return the median time of each run, interleaved."""
    times = [[] for _ in runs]
    for _ in range(repeats):
        for (program, rtol), taken in zip(runs, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(program(rtol))
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


def main():
    """Print the table and assert the claim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one problem, for tests")
    quick = parser.parse_args().quick
    names = ("softmax e-4", "softmax e-6", "softmax e-9", "network", "distillation")
    print(
        f"{'problem':16s} {'rtol on':>8s} {'error':>8s} {'cost':>5s} {'rtol off':>9s} "
        f"{'error':>8s} {'cost':>5s} {'cost on/off':>12s} {'time on/off':>12s}"
    )
    costs, times = [], []
    for name in names[:1] if quick else names:
        problem = COLLECTION[name]()
        exact = exact_hypergradient(problem)
        polished, plain = (hypergradient(problem, polish) for polish in (1, 0))

        def error(gradient, exact=exact):
            return np.linalg.norm(gradient - exact) / np.linalg.norm(exact)

        grid = np.logspace(-1, -7, 37)
        without = [(rtol, *plain(rtol)) for rtol in grid]
        for rtol in (1e-1, 1e-2, 1e-3):
            gradient, cost = polished(rtol)
            enough = [row for row in without if error(row[1]) <= error(gradient)]
            other_rtol, other, other_cost = enough[0]
            on, off = seconds([(polished, rtol), (plain, other_rtol)], 15)
            costs.append(int(cost) / int(other_cost))
            times.append(on / off)
            print(
                f"{name:16s} {rtol:8.0e} {error(gradient):8.1e} {cost:5d} {other_rtol:9.1e} "
                f"{error(other):8.1e} {other_cost:5d} {costs[-1]:12.2f} {times[-1]:12.2f}",
                flush=True,
            )
    mean_cost, mean_time = (np.exp(np.mean(np.log(ratios))) for ratios in (costs, times))
    print(f"\ngeometric means: cost {mean_cost:.2f}, time {mean_time:.2f}")
    assert mean_cost < 1
    assert mean_time < 1


if __name__ == "__main__":
    main()
