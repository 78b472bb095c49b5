"""Many small tasks at once: hypergradients per second against the number of tasks.

    pip install -e ".[benchmarks]"
    python benchmarks/tasks.py [--quick | --full] [--results file.json] [--output tasks.png]

The tasks are iMAML's: a network 1-40-40-1 is fitted to ten points of a sinusoid, with a proximal
term to meta-parameters, and the loss on ten other points is differentiated by these. Each package
solves all tasks under `jax.vmap` and one after the other in `jax.lax.map`, as one compiled program
that returns the gradient of every task. Medians of interleaved runs. Errors are those of the median
and of the worst of the first 128 tasks, relative to a dense reference at a minimizer polished by
Newton's method; only rows where neither is larger are compared. A NaN is no error but a flag, and
counted apart. A contestant that would take over half a minute is left out. The claims are about 128
tasks and are asserted at the end; other numbers of tasks are for `--full`.
"""

import functools

import jax
import jax.numpy as jnp
import jaxopt
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import difflbfgs as dl
import harness
from problems.sinusoids import META, PROXIMAL, inner, outer, tasks

jax.config.update("jax_enable_x64", True)
SIZES = (1, 32, 128, 1024)  # with `--full`
USUAL = (128,)
CHECKED = 128
# How much longer peers must take for 128 tasks: vmapped, and one after the other.
LEAST = {"JAXopt": 4, "Optimistix": 3, "map": 0.7}
SLOW = 30.0


def ours(theta, **settings):
    """Return the minimizer by `difflbfgs.minimize`."""
    return dl.minimize(inner, META, theta, solver=dl.LBFGS(**settings), throw=False).value


def by_jaxopt(theta, tol):
    """Return the minimizer by `jaxopt.LBFGS`."""
    return jaxopt.LBFGS(inner, tol=tol, maxiter=1000).run(META, theta).params


def by_optimistix(theta, tol):
    """Return the minimizer by `optimistix.LBFGS`, with conjugate gradients for the adjoint."""
    positive = frozenset({lx.positive_semidefinite_tag})
    adjoint = optx.ImplicitAdjoint(linear_solver=lx.CG(tol, tol))
    solver, options = optx.LBFGS(tol, tol), {"max_steps": 5000, "throw": False}
    return optx.minimise(
        inner, solver, META, theta, adjoint=adjoint, tags=positive, **options
    ).value


SOLVERS = {
    "difflbfgs": ours,
    "difflbfgs 1e-5": lambda theta: ours(theta, rtol=1e-5),
    "difflbfgs 1e-2": lambda theta: ours(theta, rtol=1e-2),
    "difflbfgs 1e-2, polish=0": lambda theta: ours(theta, rtol=1e-2, polish=0),
    "JAXopt 1e-3": lambda theta: by_jaxopt(theta, 1e-3),
    "JAXopt 1e-6": lambda theta: by_jaxopt(theta, 1e-6),
    "Optimistix 1e-4": lambda theta: by_optimistix(theta, 1e-4),
    "Optimistix 1e-7": lambda theta: by_optimistix(theta, 1e-7),
}


def gradient(solve):
    """Return the function from a task to the gradient of its validation loss by `META`."""

    def loss(meta, task):
        train, query = task
        return outer(solve((meta, train)), query)

    return lambda task: jax.grad(loss)(META, task)


@jax.jit
def reference(task):
    """Return the same gradient, by a dense Hessian at a minimizer that Newton's method polished."""
    train, query = task
    theta = (META, train)
    w = dl.minimize(inner, META, theta, max_steps=5000).value
    for _ in range(2):
        w = w - jnp.linalg.solve(jax.hessian(inner)(w, theta), jax.grad(inner)(w, theta))
    return PROXIMAL * jnp.linalg.solve(jax.hessian(inner)(w, theta), jax.grad(outer)(w, query))


def measure(sizes, repeats):
    """Yield a row for every contestant and number of tasks."""
    checked = min(CHECKED, max(sizes))
    exact = np.asarray(jax.lax.map(reference, tasks(checked)))
    each = {}  # seconds for a task, as measured last
    for count in sizes:
        given, programs, found = tasks(count), {}, {}
        for name, solve in SOLVERS.items():
            gradients = gradient(solve)
            for how, mapped in (
                ("vmap", jax.vmap(gradients)),
                ("map", lambda t, g=gradients: jax.lax.map(g, t)),
            ):
                key = name, how
                if count * each.get(key, 0) <= SLOW:
                    program = harness.compiled(mapped, given).run
                    programs[key] = functools.partial(keep, found, key, program, given)
        for key, median in harness.seconds(programs, repeats, SLOW / 3).items():
            each[key] = median / count
            yield {
                "tasks": count,
                "solver": key[0],
                "how": key[1],
                "seconds": median,
                **errors(np.asarray(found[key])[:checked], exact[:count]),
            }
        jax.clear_caches()


def keep(found, key, program, given):
    """Run a program, and keep what it returns."""
    found[key] = program(given)
    return found[key]


def errors(found, exact):
    """Return how many gradients are NaN, and the errors of the median and the worst of the rest."""
    relative = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    flagged = np.isnan(relative)
    return {
        "flagged": int(flagged.sum()),
        "median_error": float(np.median(relative[~flagged])),
        "error": float(np.max(relative[~flagged])),
    }


def is_ours(row):
    """Return whether the row is of this package."""
    return row["solver"].startswith("difflbfgs")


def comparisons(rows):
    """Yield each peer's row with how much longer it takes than ours, vmapped, as exact or more."""
    for peer in rows:
        exact = [
            row
            for row in rows
            if is_ours(row)
            and (row["tasks"], row["how"]) == (peer["tasks"], "vmap")
            and row["error"] <= peer["error"]
            and row["median_error"] <= peer["median_error"]
            and row["flagged"] == 0
        ]
        if exact and not is_ours(peer):
            yield peer, peer["seconds"] / min(row["seconds"] for row in exact)


def draw(rows, path):
    """Save tasks per second against tasks."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for k, name in enumerate(SOLVERS):
        for how, style in (("vmap", "-o"), ("map", "--x")):
            own = [row for row in rows if (row["solver"], row["how"]) == (name, how)]
            axis.loglog(
                [row["tasks"] for row in own],
                [row["tasks"] / row["seconds"] for row in own],
                style,
                color=f"C{k}",
                label=f"{name}, {how}",
            )
    axis.set(xlabel="tasks", ylabel="hypergradients per second")
    axis.legend(fontsize=7, ncols=2)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    """Print the table, save numbers and picture."""
    options = harness.options(__doc__)
    rows = []
    for row in measure(harness.sized(options, (4,), USUAL, SIZES), 3):
        rows.append(row)
        print(
            f"{row['tasks']:5d} {row['solver']:28s} {row['how']:4s} {row['seconds']:9.3f} s "
            f"{row['tasks'] / row['seconds']:8.1f} /s  "
            f"error {row['median_error']:.1e}, of the worst {row['error']:.1e}, "
            f"{row['flagged']} NaN",
            flush=True,
        )
    harness.keep(options, rows, draw)
    print("\ntimes over those of difflbfgs, vmapped, at errors no larger")
    short = []
    for peer, ratio in comparisons(rows):
        print(f"{peer['tasks']:5d} {peer['solver']:28s} {peer['how']:4s} {ratio:8.2f}")
        least = LEAST["map" if peer["how"] == "map" else peer["solver"].split()[0]]
        if peer["tasks"] == 128 and ratio < least:
            short.append(f"{peer['solver']}, {peer['how']}: {ratio:.2f}, not {least}")
    assert not short, short


if __name__ == "__main__":
    main()
