"""Compile time and size of the program of one hypergradient, of each package.

    python benchmarks/compiling.py [--quick | --full] [--results file.json] [--output file.png]

Two objectives: a logistic regression, which compiles in no time, and the fit of an ordinary
differential equation (Diffrax, `DirectAdjoint`), of which every further copy in the program is
felt. Tracing with lowering, and XLA's compilation, are timed apart. With `--full` medians of three
interleaved repetitions are shown of the former problem, and more variants of the peers. Copies are
counted: a cube root in the objective marks it, and as many of them as one evaluation of value and
gradient has count for one copy.
"""

import statistics
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import harness
from collection import COLLECTION, Problem
from contestants import BY_NAME

matplotlib.use("Agg")

import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

NAMES = (
    "difflbfgs",
    "difflbfgs, polish=0",
    "JAXopt",
    "JAXopt, solve_cg",
    "Optimistix, L-BFGS",
    "Optimistix, L-BFGS, CG",
)
# The other of its package compiles faster.
SLOWER = ("JAXopt", "Optimistix, L-BFGS, CG")


def marked(problem: Problem) -> Problem:
    """Return the problem with a cube root in its objective."""

    def inner(x, theta):
        return problem.inner(x, theta) + 1e-3 * jnp.cbrt(1 + jnp.sum(x**2))

    return Problem(inner, problem.outer, problem.x0, problem.theta)


def differential_equation() -> Problem:
    """Return the fit of a damped oscillator with a small network in its right-hand side."""
    times = jnp.linspace(0, 5, 20)
    data = jnp.exp(-times / 5) * jnp.cos(times)

    def simulated(w):
        first, bias, last = w[:16].reshape(2, 8), w[16:24], w[24:].reshape(8, 2)

        def slope(t, state, _):
            return jnp.tanh(state @ first + bias) @ last

        solution: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Tsit5(),
            0.0,
            5.0,
            0.1,
            jnp.asarray([1.0, 0.0]),
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
            adjoint=diffrax.DirectAdjoint(),
            max_steps=64,
        )
        return solution.ys[:, 0]

    def inner(w, theta):
        return jnp.mean((simulated(w) - data) ** 2) + jnp.exp(theta[0]) * jnp.sum(w**2)

    def outer(w, theta):
        return jnp.sum(w**4)

    start = 0.5 * np.random.default_rng(0).normal(size=40)
    return Problem(inner, outer, jnp.asarray(start), jnp.asarray([-4.0]))


PROBLEMS = {"logistic": COLLECTION["logistic"], "differential equation": differential_equation}


def marks(text: str) -> int:
    """Return how many cube roots a compiled program has."""
    return text.count(" cbrt(")


def measure(name, contestants, repeats):
    """Return a row for each contestant."""
    problem = marked(PROBLEMS[name]())
    one = harness.compiled(jax.value_and_grad(problem.inner), problem.x0, problem.theta)
    made = {contestant: [] for contestant in contestants}
    for _ in range(repeats):
        for contestant in contestants:
            jax.clear_caches()
            program = BY_NAME[contestant].make(problem)
            made[contestant].append(
                harness.compiled(program, problem.theta, problem.x0, jnp.asarray(1e-6))
            )
    return [
        {
            "problem": name,
            "contestant": contestant,
            "trace_seconds": statistics.median(each.trace_seconds for each in runs),
            "compile_seconds": statistics.median(each.compile_seconds for each in runs),
            "instructions": runs[0].text.count(" = "),
            "copies": marks(runs[0].text) / marks(one.text),
        }
        for contestant, runs in made.items()
    ]


def total(row):
    """Return the seconds before the first run."""
    return row["trace_seconds"] + row["compile_seconds"]


def draw(rows, path):
    """Save bars of the seconds before the first run."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        own = [row for row in rows if row["problem"] == name][::-1]
        labels = [row["contestant"] for row in own]
        traced = [row["trace_seconds"] for row in own]
        axis.barh(labels, traced, color="0.6", label="tracing and lowering")
        axis.barh(labels, [row["compile_seconds"] for row in own], left=traced, label="XLA")
        for place, row in enumerate(own):
            axis.text(total(row), place, f" {row['copies']:.0f} copies", va="center", fontsize=8)
        axis.set(title=name, xlabel="seconds", xlim=(0, 1.25 * max(map(total, own))))
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    """Measure, print, record, draw, and assert what counts can show."""
    options = harness.options(__doc__)
    rows = []
    contestants = NAMES if options.full else [name for name in NAMES if name not in SLOWER]
    for name in ("logistic",) if options.quick else PROBLEMS:
        for row in measure(name, contestants, 3 if name == "logistic" and options.full else 1):
            rows.append(row)
            print(
                f"{name:22s} {row['contestant']:22s} tracing {row['trace_seconds']:5.2f} s  "
                f"XLA {row['compile_seconds']:5.2f} s  {row['instructions']:6d} instructions  "
                f"{row['copies']:4.1f} copies of the objective",
                flush=True,
            )
    harness.record(options.results, rows, options.quick)
    if options.output:
        draw(rows, options.output)
    copies = {(row["problem"], row["contestant"]): row["copies"] for row in rows}
    for (problem, contestant), count in copies.items():
        if contestant.startswith("difflbfgs"):
            assert count <= 4
            assert count < copies[problem, "JAXopt, solve_cg"]


if __name__ == "__main__":
    main()
