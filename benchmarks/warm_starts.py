"""What does `info.state` save? Thirty small outer steps, each started cold or warm.

    python benchmarks/warm_starts.py [--quick | --full] [--results file.json]

Gradient descent on the weight decays of a softmax regression on digits, on the weights of the
samples in hyper-cleaning, and on the images of a distillation; and, to see where the saving ends,
on two small problems, whose adjoint is a dense factorisation and costs the same either way. Counted
are evaluations of the inner objective with its gradient and Hessian products: those of the solve,
its polish and the adjoint. Warm must save at least 30 % on the large problems, and the trajectory
must be the same to 1e-6 on all.
"""

import jax
import jax.numpy as jnp
import numpy as np

import difflbfgs as dl
import harness
from collection import COLLECTION

jax.config.update("jax_enable_x64", True)


NAMES = ("softmax e-6", "hyper-cleaning", "distillation", "logistic", "ridge")


def descend(problem, num_steps, step_length, warm):
    """Return the last theta, and evaluations and products of every step."""
    step = jax.jit(dl.value_and_hypergrad(problem.outer, problem.inner, max_steps=5000))
    theta, state, costs = problem.theta, None, []
    for _ in range(num_steps):
        _, grad, info = step(theta, problem.x0, state if warm else None)
        state, stats = info.state, info.solution.stats
        costs.append((int(stats.num_fun_evals), int(stats.num_hvps + info.num_adjoint_steps)))
        theta = theta - step_length * grad / jnp.linalg.norm(grad)
    return theta, np.asarray(costs)


def main():
    """Print the table and assert the claim."""
    options = harness.options(__doc__, picture=False)
    rows = []
    print("every outer step moves theta by a hundredth or a thousandth of its norm")
    print(
        f"{'problem':16s} {'step':>6s} {'cold: evaluations':>18s} {'products':>9s} "
        f"{'warm: evaluations':>18s} {'products':>9s} {'saved':>7s} {'trajectory':>11s}"
    )
    for name in NAMES[1:2] if options.quick else NAMES:
        problem = COLLECTION[name]()
        for relative in (1e-2, 1e-3) if options.full else (1e-2,):
            length = relative * float(jnp.maximum(1, jnp.linalg.norm(problem.theta)))
            cold_theta, cold = descend(problem, 30, length, warm=False)
            warm_theta, warm = descend(problem, 30, length, warm=True)
            saved = 1 - warm.sum() / cold.sum()
            apart = np.linalg.norm(warm_theta - cold_theta) / np.linalg.norm(cold_theta)
            evaluations, products = cold.sum(0)
            fewer_evaluations, fewer_products = warm.sum(0)
            print(
                f"{name:16s} {relative:6.0e} {evaluations:18d} {products:9d} "
                f"{fewer_evaluations:18d} {fewer_products:9d} {100 * saved:6.0f}% {apart:11.1e}",
                flush=True,
            )
            rows.append({"problem": name, "step": relative, "saved": saved, "apart": float(apart)})
            assert saved >= (0.3 if problem.x0.size > 64 else 0)
            assert apart < 1e-6
    harness.record(options.results, rows, options.quick)


if __name__ == "__main__":
    main()
