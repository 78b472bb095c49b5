"""Does the Newton polish pay? Cost at equal error, polish on against polish off.

    python benchmarks/polish.py [--quick | --full] [--results file.json]

For each problem and each of three tolerances with the polish: its error, its cost, and that of the
loosest tolerance without polish that is at least as exact. The cost is that of one hypergradient,
solve and adjoint: evaluations of the inner objective with its gradient plus Hessian products, and
seconds, medians of interleaved runs of the compiled programs. On the average (geometric mean)
polish must be cheaper in both.
"""

import functools

import jax
import numpy as np

import difflbfgs as dl
import harness
from collection import COLLECTION, exact_hypergradient

jax.config.update("jax_enable_x64", True)
NAMES = ("softmax e-4", "softmax e-6", "softmax e-9", "network", "distillation")


def hypergradient(problem, polish):
    """Return the compiled `rtol -> (gradient, evaluations and products)`."""

    def gradient(rtol):
        solver = dl.LBFGS(rtol=rtol, polish=polish)
        step = dl.value_and_hypergrad(problem.outer, problem.inner, solver=solver, max_steps=5000)
        _, grad, info = step(problem.theta, problem.x0)
        stats = info.solution.stats  # the error estimate is not returned, and so not computed
        return grad, stats.num_fun_evals + stats.num_hvps + info.num_adjoint_steps

    return jax.jit(gradient).lower(1e-3).compile()


def main():
    """Print the table and assert the claim."""
    options = harness.options(__doc__, picture=False)
    rows = []
    names = harness.sized(options, NAMES[:1], NAMES[1::2], NAMES)
    print(
        f"{'problem':16s} {'rtol on':>8s} {'error':>8s} {'cost':>5s} {'rtol off':>9s} "
        f"{'error':>8s} {'cost':>5s} {'cost on/off':>12s} {'time on/off':>12s}"
    )
    costs, times = [], []
    for name in names:
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
            pair = {
                "on": functools.partial(polished, rtol),
                "off": functools.partial(plain, other_rtol),
            }
            seconds = harness.seconds(pair, 15)
            costs.append(int(cost) / int(other_cost))
            times.append(seconds["on"] / seconds["off"])
            rows.append({"problem": name, "rtol": rtol, "cost": costs[-1], "time": times[-1]})
            print(
                f"{name:16s} {rtol:8.0e} {error(gradient):8.1e} {cost:5d} {other_rtol:9.1e} "
                f"{error(other):8.1e} {other_cost:5d} {costs[-1]:12.2f} {times[-1]:12.2f}",
                flush=True,
            )
    mean_cost, mean_time = (np.exp(np.mean(np.log(ratios))) for ratios in (costs, times))
    harness.record(options.results, rows, options.quick)
    print(f"\ngeometric means: cost {mean_cost:.2f}, time {mean_time:.2f}")
    assert mean_cost < 1
    assert mean_time < 1


if __name__ == "__main__":
    main()
