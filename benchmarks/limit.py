"""How far from the limit? The time of a hypergradient over that of the work in it.

    python benchmarks/limit.py [--quick | --full] [--results file.json] [--output file.png]

The limit is what the evaluations of the inner objective with its gradient, and the products with
its linearised Hessian, take by themselves: `evaluations · a + products · b`, with `a` and `b`
measured in loops that do nothing else, the evaluations at points that move. What comes on top is
the line search, the two-loop recursion, the checks, and the outer loss. Medians of interleaved
runs, default settings, float64.

A ratio near 1 is reached where the objective costs more than the `4 · memory_size · n`
multiplications of a step; on the smoothing problem, whose objective costs about `20 n`, the
recursion is most of the work, in every L-BFGS.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib

import collection
import contestants
import difflbfgs as dl
import growth
import harness
from collection import COLLECTION
from difflbfgs import _system

matplotlib.use("Agg")

import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

LOOP = 50
PROBLEMS = {
    "logistic": COLLECTION["logistic"],
    "network": COLLECTION["network"],
    "softmax": COLLECTION["softmax e-6"],
    "distillation": COLLECTION["distillation"],
    "hyper-cleaning": COLLECTION["hyper-cleaning"],
    "MNIST cleaning": collection.mnist_cleaning,
    "samples 1e4": functools.partial(growth.logistic, 10_000),
    "samples 1e5": functools.partial(growth.logistic, 100_000),
    "smoothing 1e3": functools.partial(growth.smoothing, 1000),
    "smoothing 1e5": functools.partial(growth.smoothing, 100_000),
}


USUAL = [name for name in PROBLEMS if name not in ("MNIST cleaning", "samples 1e5")]


def hessian_products(problem):
    """Return a program of `LOOP` products with the Hessian, linearised once.

    They are made as the adjoint makes most of them: at once where it assembles the Hessian, else
    one after the other.
    """

    def run(x0, theta):
        _, product = jax.linearize(lambda x: jax.grad(problem.inner)(x, theta), x0)
        if x0.size <= _system.DENSE_SIZE:
            return jax.vmap(product)(jnp.arange(1.0, 1 + LOOP)[:, None] * (1 + x0))  # no constants
        return jax.lax.fori_loop(0, LOOP, lambda _, v: product(v), jnp.ones_like(x0))

    return run


def hypergradient(problem):
    """Return the program that is to be near the limit."""

    def loss(x0, theta):
        sol = dl.minimize(problem.inner, x0, theta, max_steps=contestants.MAX_STEPS)
        return problem.outer(sol.value, theta)

    return jax.grad(loss, argnums=1)


def measure(name, repeats):
    """Return a row."""
    problem = PROBLEMS[name]()
    given = problem.x0, problem.theta
    programs = {
        "evaluations": harness.evaluations(problem.inner, LOOP),
        "products": hessian_products(problem),
        "hypergradient": hypergradient(problem),
    }
    runs = {
        key: functools.partial(harness.compiled(program, *given).run, *given)
        for key, program in programs.items()
    }
    seconds = harness.seconds(runs, repeats, 20.0)
    evaluations, products = contestants.counts(problem)
    row = {
        "problem": name,
        "variables": problem.x0.size,
        "evaluations": evaluations,
        "products": products,
        "evaluation_seconds": seconds["evaluations"] / LOOP,
        "product_seconds": seconds["products"] / LOOP,
        "seconds": seconds["hypergradient"],
    }
    row["limit_seconds"] = (
        row["evaluations"] * row["evaluation_seconds"] + row["products"] * row["product_seconds"]
    )
    return row


def draw(rows, path):
    """Save the ratios as bars."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = [f"{row['problem']} ({row['variables']})" for row in rows]
    axis.barh(labels[::-1], [row["seconds"] / row["limit_seconds"] for row in rows][::-1])
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xlabel("time of a hypergradient over that of its evaluations and products")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    """Print, record, draw."""
    options = harness.options(__doc__)
    rows = []
    print(f"{'problem':16s} {'n':>7s} {'evaluations':>18s} {'products':>18s} {'limit':>10s} ratio")
    for name in harness.sized(options, ("logistic",), USUAL, PROBLEMS):
        row = measure(name, 7)
        rows.append(row)
        print(
            f"{name:16s} {row['variables']:7d} "
            f"{row['evaluations']:4d} x {1e6 * row['evaluation_seconds']:8.0f} µs "
            f"{row['products']:4d} x {1e6 * row['product_seconds']:8.0f} µs "
            f"{1e3 * row['limit_seconds']:7.1f} ms {row['seconds'] / row['limit_seconds']:5.2f}",
            flush=True,
        )
        jax.clear_caches()
    harness.record(options.results, rows, options.quick)
    if options.output:
        draw(rows, options.output)
    # A ratio below 1 would mean that something is not counted.
    assert all(row["seconds"] > 0.7 * row["limit_seconds"] for row in rows)


if __name__ == "__main__":
    main()
