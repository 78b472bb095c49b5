"""What does a step cost beyond the objective? Loop and update of each L-BFGS, n = 10 to 1e6.

    python benchmarks/overhead.py [--quick | --full] [--results file.json]

The objective is a chained quartic, cheap for its size, so that what the solver adds is seen. All
solvers run as one compiled program for a fixed number of steps from the same start, memory 10, in
float64. The table has seconds per step over the seconds of one evaluation of value and gradient
alone: 1 would be a solver that costs nothing and evaluates once a step. Optimistix counts trials as
steps, the others search a line in one. Medians of interleaved repetitions.
"""

import functools

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import optimistix as optx

import difflbfgs as dl
import harness

jax.config.update("jax_enable_x64", True)
STEPS = 30
SIZES = (10, 100, 1000, 10_000, 100_000, 1_000_000)


def objective(x, _=None):
    """Return `Σ (x_i - 1)² + (x_{i+1} - x_i)⁴`, well conditioned and never quite solved."""
    return jnp.sum((x - 1) ** 2) + jnp.sum((x[1:] - x[:-1]) ** 4)


def ours(x0):
    """Return how many steps a solve took."""
    solver = dl.LBFGS(rtol=0.0, polish=0)
    return dl.minimize(objective, x0, solver=solver, max_steps=STEPS, throw=False).stats.num_steps


def optax_loop(x0):
    """Return how many updates were made."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        x, state, count = carry
        f, g = value_and_grad(x, state=state)
        updates, state = solver.update(g, state, x, value=f, grad=g, value_fn=objective)
        return optax.apply_updates(x, updates), state, count + 1

    def unfinished(carry):
        norm = jnp.linalg.norm(carry[1][-1].grad)
        return (carry[2] == 0) | ((norm > 0) & (carry[2] < STEPS))

    start = (x0, solver.init(x0), jnp.asarray(0))
    _, _, count = jax.lax.while_loop(unfinished, step, start)
    return count


def jaxopt_lbfgs(x0):
    """Return how many iterations a run took."""
    solver = jaxopt.LBFGS(objective, tol=0.0, maxiter=STEPS, implicit_diff=False)
    return solver.run(x0).state.iter_num


def optimistix_lbfgs(x0):
    """Return how many trials a run took."""
    solver = optx.LBFGS(0.0, 0.0)
    solution = optx.minimise(objective, solver, x0, max_steps=STEPS, throw=False)
    return solution.stats["num_steps"]


SOLVERS = {
    "difflbfgs": ours,
    "Optax loop": optax_loop,
    "JAXopt": jaxopt_lbfgs,
    "Optimistix": optimistix_lbfgs,
}


def measure(n):
    """Return seconds per step of each solver over those of an evaluation."""
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=n))
    programs = {
        name: functools.partial(harness.compiled(run, x0).run, x0)
        for name, run in {"alone": harness.evaluations(objective, STEPS), **SOLVERS}.items()
    }
    steps = {name: STEPS if name == "alone" else int(run()) for name, run in programs.items()}
    seconds = harness.seconds(programs, 5 if n >= 100_000 else 25)
    each = {name: taken / steps[name] for name, taken in seconds.items()}
    return {
        "n": n,
        "seconds alone": each["alone"],
        **{name: each[name] / each["alone"] for name in SOLVERS},
    }


def main():
    """Print the table and save the numbers."""
    options = harness.options(__doc__, picture=False)
    rows = []
    print(f"{'n':>8s} {'µs alone':>9s} " + " ".join(f"{name:>11s}" for name in SOLVERS))
    for n in harness.sized(options, (10, 1000), SIZES[:-1], SIZES):
        rows.append(measure(n))
        cells = " ".join(f"{rows[-1][name]:11.1f}" for name in SOLVERS)
        print(f"{n:8d} {1e6 * rows[-1]['seconds alone']:9.1f} {cells}", flush=True)
    harness.record(options.results, rows, options.quick)


if __name__ == "__main__":
    main()
