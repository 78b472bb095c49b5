"""Does a unit mislead? Other people's problems, every variable multiplied by a constant of its own.

    pip install -e ".[benchmarks]"
    python benchmarks/rescaled.py [--quick | --full] [--results rescaled.json]

The constants are drawn between 1e-3 and 1e3, once for each problem. A norm of the gradient, or of a
step, says little there, and so the end is judged by the Newton decrement `λ²` of a dense Hessian in
float64: a problem is solved if that is at most 1e-8 of the whole decrease (float32: 1e-4) at a
point that is no saddle. The peers run until they can go no further, or for 3000 evaluations, and
have solved it however they end. difflbfgs runs at its default settings, with 3000 steps at most.
What it claims is false if it is not solved, and `λ > 10 rtol √(xᵀHx)`, a saddle included. Problems
of at most 100 variables.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import difflbfgs as dl
import forward
import harness
import report
from problems import objectives

SOLVED = {"float64": 1e-8, "float32": 1e-4}
LARGEST = 100
FAMILIES = {"usual": ("regression",), "full": ("MGH", "CUTEst", "regression")}
# Below this part of the largest, an eigenvalue of the scaled Hessian is rounding.
ROUNDING = 1e-12


def ours(fun, x0, polish):
    """Return where a solve at its default settings ends, its claim and its cost."""
    sol = dl.minimize(
        lambda x, _: fun(x), x0, solver=dl.LBFGS(polish=polish), max_steps=3000, throw=False
    )
    return sol.value, bool(sol.converged), int(sol.stats.num_fun_evals + sol.stats.num_hvps)


def peer(solve):
    """Return a solver that goes as far as it can."""

    def run(fun, x0):
        found = solve(fun, x0, 0.0)
        last = found[-1] if isinstance(found, list) else found
        return last.x, False, last.evaluations

    return run


SOLVERS = {
    "difflbfgs": lambda fun, x0: ours(fun, x0, 1),
    "polish=0": lambda fun, x0: ours(fun, x0, 0),
    "SciPy": peer(forward.scipy_lbfgsb),
    "JAXopt": peer(forward.jaxopt_lbfgs),
    "Optimistix": peer(forward.optimistix_lbfgs),
}


def remaining(fun, x0, x) -> tuple[float, float]:
    """Return the Newton decrement at `x` over the decrease to there, and `λ / √(xᵀHx)`.

    Both are infinite at a saddle, and if nothing was gained.
    """
    f, g = jax.value_and_grad(fun)(x)
    H = np.asarray(jax.hessian(fun)(x))
    fall = float(fun(x0) - f)
    if not (np.isfinite(H).all() and np.isfinite(g).all() and fall > 0):
        return np.inf, np.inf
    scale = 1 / np.sqrt(np.maximum(np.abs(np.diagonal(H)), np.finfo(float).tiny))
    values, vectors = np.linalg.eigh(scale[:, None] * H * scale)
    if values[0] < -1e-6 * values[-1]:
        return np.inf, np.inf
    seen = values > ROUNDING * values[-1]
    square = float(np.sum((vectors.T @ (scale * np.asarray(g)))[seen] ** 2 / values[seen]))
    energy = float(x @ H @ x)
    return square / fall, (square / energy) ** 0.5 if energy > 0 else np.inf


def measure(dtype: str, families) -> list[dict]:
    """Run all solvers on all problems, rescaled."""
    rows = []
    wide = objectives.objectives(jnp.dtype("float64"), families)
    narrow = objectives.objectives(jnp.dtype(dtype), families)
    for k, (problem, exact) in enumerate(zip(narrow, wide, strict=True)):
        if problem.x0.size > LARGEST:
            continue
        units = 10.0 ** np.random.default_rng(k).uniform(-3, 3, problem.x0.shape)
        units = jnp.asarray(units, problem.x0.dtype)
        unit = jnp.asarray(units, jnp.float64)
        start = problem.x0 / units

        def fun(z, problem=problem, units=units):
            return problem.fun(units * z)

        @jax.jit
        def judge(z, exact=exact, unit=unit):
            return exact.fun(unit * z)

        row = {"problem": problem.name, "n": problem.x0.size, "dtype": dtype}
        for name, solve in SOLVERS.items():
            jax.config.update("jax_enable_x64", dtype == "float64")  # Optimistix mixes them else
            x, claim, evaluations = solve(fun, start)
            jax.config.update("jax_enable_x64", True)
            ends = (jnp.asarray(end, jnp.float64) for end in (start, x))
            left, error = remaining(judge, *ends)
            solved = left <= SOLVED[dtype]
            false = claim and not solved and error > 10 * float(jnp.finfo(dtype).eps) ** 0.5
            row[name] = {"left": left, "error": error, "cost": evaluations}
            row[name] |= {"claim": claim, "solved": solved, "false": false}
        rows.append(row)
        print(line(row), flush=True)
        jax.clear_caches()
    return rows


def line(row) -> str:
    """Return a problem's results in a line."""
    cells = []
    for name in SOLVERS:
        got = row[name]
        mark = " " if got["solved"] else "!" if got["false"] else "-"
        cells.append(f"{got['cost']:5d}{mark}{got['left']:8.0e}")
    return f"{row['dtype']} {row['problem'][:24]:24s} {row['n']:3d} " + "  ".join(cells)


def main():
    """Measure, print the counts, and assert that no claim is false."""
    options = harness.options(__doc__, picture=False)
    jax.config.update("jax_enable_x64", True)
    families = FAMILIES["full" if options.full else "usual"]
    dtypes = ("float64",) if options.quick else tuple(SOLVED)
    print(f"{'':36s} " + "  ".join(f"{name:>14s}" for name in SOLVERS))
    rows = list(itertools.chain(*(measure(dtype, families) for dtype in dtypes)))
    harness.keep(options, rows)
    print(f"\n{report.rescaled_table(rows)}")
    assert not any(row["difflbfgs"]["false"] for row in rows)


if __name__ == "__main__":
    main()
