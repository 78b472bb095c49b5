"""One row for each choice in the design: what does it cost, and what is it worth?

    pip install -e ".[benchmarks]"
    python benchmarks/ablations.py NAME [--quick | --full] [--results x.json] [--output x.png]

| NAME | question | asserted |
|---|---|---|
| limit | how far is a hypergradient from the work in it? | the time is at least 0.7 of the work's |
| compiling | what precedes the first run? | four copies of the objective, fewer than JAXopt's |
| overhead | what does a step cost beyond the objective? | |
| theory | of which order is the error? | 1, and 2 after a Newton step |
| error_estimate | is it right, and what does an accuracy cost? | within a factor of three; 0.6 |
| polish | what does it cost? | at most a tenth more, work and time, at equal error |
| warm_starts | what does `info.state` save? | 15 % on large problems, the same trajectory |
| adjoints | what do the cheap adjoints cost, how wrong are they? | the estimate tells |
| crossover | where should the adjoint stop assembling the Hessian? | the threshold is fair |

All are in float64. The docstring of each function says what it measures. `limit`, `compiling` and
`theory` draw.
"""

import functools
import statistics

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxopt
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix as optx

import contestants
import difflbfgs as dl
import harness
from difflbfgs import _krylov, _linear, _system
from problems import scalable
from problems.collection import (
    COLLECTION,
    Problem,
    exact_hypergradient,
    logistic_regression,
    mnist_cleaning,
    parity_regression,
)
from problems.scalable import quartic_chain

jax.config.update("jax_enable_x64", True)


LOOP = 50
LIMIT = {
    "logistic": COLLECTION["logistic"],
    "network": COLLECTION["network"],
    "softmax": COLLECTION["softmax e-6"],
    "distillation": COLLECTION["distillation"],
    "hyper-cleaning": COLLECTION["hyper-cleaning"],
    "MNIST cleaning": mnist_cleaning,
    "samples 1e4": functools.partial(scalable.logistic, 10_000),
    "samples 1e5": functools.partial(scalable.logistic, 100_000),
    "smoothing 1e3": functools.partial(scalable.smoothing, 1000),
    "smoothing 1e5": functools.partial(scalable.smoothing, 100_000),
}


def limit(options):
    """How far from the limit? The time of a hypergradient over that of the work in it.

    The limit is what the evaluations of the inner objective with its gradient, and the products
    with its linearised Hessian, take by themselves: `evaluations · a + products · b`, with `a` and
    `b` measured in loops that do nothing else, the evaluations at points that move. What comes on
    top is the line search, the two-loop recursion, the checks, and the outer loss. Medians of
    interleaved runs, default settings, float64.

    A ratio near 1 is reached where the objective costs more than the `4 · memory_size · n`
    multiplications of a step; on the smoothing problem, whose objective costs about `20 n`, the
    recursion is most of the work, in every L-BFGS.
    """
    rows = []
    usual = [name for name in LIMIT if name not in ("MNIST cleaning", "samples 1e5")]
    print(f"{'problem':16s} {'n':>7s} {'evaluations':>18s} {'products':>18s} {'limit':>10s} ratio")
    for name in harness.sized(options, ("logistic",), usual, LIMIT):
        row = work(name, 7)
        rows.append(row)
        print(
            f"{name:16s} {row['variables']:7d} "
            f"{row['evaluations']:4d} x {1e6 * row['evaluation_seconds']:8.0f} µs "
            f"{row['products']:4d} x {1e6 * row['product_seconds']:8.0f} µs "
            f"{1e3 * row['limit_seconds']:7.1f} ms {row['seconds'] / row['limit_seconds']:5.2f}",
            flush=True,
        )
        jax.clear_caches()
    harness.keep(options, rows, draw_limit)
    # A ratio below 1 would mean that something is not counted.
    assert all(row["seconds"] > 0.7 * row["limit_seconds"] for row in rows)


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


def work(name, repeats):
    """Return a row of `limit`."""
    problem = LIMIT[name]()
    given = problem.x0, problem.theta

    def loss(x0, theta):
        sol = dl.minimize(problem.inner, x0, theta, max_steps=contestants.MAX_STEPS)
        return problem.outer(sol.value, theta)

    programs = {
        "evaluations": harness.evaluations(problem.inner, LOOP),
        "products": hessian_products(problem),
        "hypergradient": jax.grad(loss, argnums=1),
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


def draw_limit(rows, path):
    """Save the ratios as bars."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = [f"{row['problem']} ({row['variables']})" for row in rows]
    axis.barh(labels[::-1], [row["seconds"] / row["limit_seconds"] for row in rows][::-1])
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xlabel("time of a hypergradient over that of its evaluations and products")
    figure.savefig(path, dpi=110)
    plt.close(figure)


COMPILED = (
    "difflbfgs",
    "difflbfgs, polish=0",
    "JAXopt",
    "JAXopt, solve_cg",
    "Optimistix, L-BFGS",
    "Optimistix, L-BFGS, CG",
)
# The other of its package compiles faster.
SLOWER = ("JAXopt", "Optimistix, L-BFGS, CG")
COMPILED_PROBLEMS = {
    "logistic": logistic_regression,
    "differential equation": scalable.differential_equation,
}


def compiling(options):
    """Compile time and size of the program of one hypergradient, of each package.

    Two objectives: a logistic regression, which compiles in no time, and the fit of an ordinary
    differential equation (Diffrax, `DirectAdjoint`), of which every further copy in the program is
    felt. Tracing with lowering, and XLA's compilation, are timed apart. With `--full` medians of
    three interleaved repetitions are shown of the former problem, and more variants of the peers.
    Copies are counted: a cube root in the objective marks it, and as many of them as one evaluation
    of value and gradient has count for one copy.
    """
    rows = []
    names = [name for name in COMPILED if options.full or name not in SLOWER]
    for name in ("logistic",) if options.quick else COMPILED_PROBLEMS:
        for row in programs(name, names, 3 if name == "logistic" and options.full else 1):
            rows.append(row)
            print(
                f"{name:22s} {row['contestant']:22s} tracing {row['trace_seconds']:5.2f} s  "
                f"XLA {row['compile_seconds']:5.2f} s  {row['instructions']:6d} instructions  "
                f"{row['copies']:4.1f} copies of the objective",
                flush=True,
            )
    harness.keep(options, rows, draw_compiling)
    copies = {(row["problem"], row["contestant"]): row["copies"] for row in rows}
    for (problem, contestant), count in copies.items():
        if contestant.startswith("difflbfgs"):
            assert count <= 4
            assert count < copies[problem, "JAXopt, solve_cg"]


def marked(problem: Problem) -> Problem:
    """Return the problem with a cube root in its objective."""

    def inner(x, theta):
        return problem.inner(x, theta) + 1e-3 * jnp.cbrt(1 + jnp.sum(x**2))

    return Problem(inner, problem.outer, problem.x0, problem.theta)


def marks(text: str) -> int:
    """Return how many cube roots a compiled program has."""
    return text.count(" cbrt(")


def programs(name, names, repeats):
    """Return a row of `compiling` for each contestant."""
    problem = marked(COMPILED_PROBLEMS[name]())
    one = harness.compiled(jax.value_and_grad(problem.inner), problem.x0, problem.theta)
    made = {contestant: [] for contestant in names}
    for _ in range(repeats):
        for contestant in names:
            jax.clear_caches()
            program = contestants.BY_NAME[contestant].make(problem)
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


def draw_compiling(rows, path):
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


STEPS = 30
SIZES = (10, 100, 1000, 10_000, 100_000, 1_000_000)


def overhead(options):
    """What does a step cost beyond the objective? Loop and update of each L-BFGS, n = 10 to 1e6.

    The objective is a chained quartic, cheap for its size, so that what the solver adds is seen.
    All solvers run as one compiled program for a fixed number of steps from the same start, memory
    10, in float64. The table has seconds per step over the seconds of one evaluation of value and
    gradient alone: 1 would be a solver that costs nothing and evaluates once a step. Optimistix
    counts trials as steps, the others search a line in one. Medians of interleaved repetitions.
    """
    rows = []
    print(f"{'n':>8s} {'µs alone':>9s} " + " ".join(f"{name:>11s}" for name in SOLVERS))
    for n in harness.sized(options, (10, 1000), SIZES[:-1], SIZES):
        rows.append(steps_of(n))
        cells = " ".join(f"{rows[-1][name]:11.1f}" for name in SOLVERS)
        print(f"{n:8d} {1e6 * rows[-1]['seconds alone']:9.1f} {cells}", flush=True)
    harness.keep(options, rows)


def by_us(x0):
    """Return how many steps a solve took."""
    solver = dl.LBFGS(rtol=0.0, polish=0)
    return dl.minimize(
        quartic_chain, x0, solver=solver, max_steps=STEPS, throw=False
    ).stats.num_steps


def by_optax(x0):
    """Return how many updates were made."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(quartic_chain)

    def step(carry):
        x, state, count = carry
        f, g = value_and_grad(x, state=state)
        updates, state = solver.update(g, state, x, value=f, grad=g, value_fn=quartic_chain)
        return optax.apply_updates(x, updates), state, count + 1

    def unfinished(carry):
        norm = jnp.linalg.norm(carry[1][-1].grad)
        return (carry[2] == 0) | ((norm > 0) & (carry[2] < STEPS))

    start = (x0, solver.init(x0), jnp.asarray(0))
    _, _, count = jax.lax.while_loop(unfinished, step, start)
    return count


def by_jaxopt(x0):
    """Return how many iterations a run took."""
    solver = jaxopt.LBFGS(quartic_chain, tol=0.0, maxiter=STEPS, implicit_diff=False)
    return solver.run(x0).state.iter_num


def by_optimistix(x0):
    """Return how many trials a run took."""
    solver = optx.LBFGS(0.0, 0.0)
    solution = optx.minimise(quartic_chain, solver, x0, max_steps=STEPS, throw=False)
    return solution.stats["num_steps"]


SOLVERS = {
    "difflbfgs": by_us,
    "Optax loop": by_optax,
    "JAXopt": by_jaxopt,
    "Optimistix": by_optimistix,
}


def steps_of(n):
    """Return seconds per step of each solver over those of an evaluation."""
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=n))
    programs = {
        name: functools.partial(harness.compiled(run, x0).run, x0)
        for name, run in {"alone": harness.evaluations(quartic_chain, STEPS), **SOLVERS}.items()
    }
    steps = {name: STEPS if name == "alone" else int(run()) for name, run in programs.items()}
    seconds = harness.seconds(programs, 5 if n >= 100_000 else 25)
    each = {name: taken / steps[name] for name, taken in seconds.items()}
    return {
        "n": n,
        "seconds alone": each["alone"],
        **{name: each[name] / each["alone"] for name in SOLVERS},
    }


ROUNDING, COARSE = 1e-12, 0.3


def theory(options):
    """The order of the error: hypergradients against the distance to the minimizer, log-log.

    An implicit gradient at a point `x` is wrong by `O(‖x - x*‖)` (Blondel et al. 2022, theorem 1),
    and after one Newton step by `O(‖x - x*‖²)` (Ye, Peyré, Cremers and Ablin 2024); so is, but for
    a factor that grows with the number of steps, the gradient of unrolled gradient descent: order
    one. Measured with a robust regression (digits: odd or even?) and logistic regression (breast
    cancer), one penalty for each feature, float64. (On a quadratic objective one Newton step leaves
    no error at all.) The slopes are fitted by least squares where the error is between rounding and
    30 %, printed, and asserted: within 0.15 of 1 and within 0.25 of 2.
    """
    rows = []
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
    for axis, (name, problem, learning_rate) in zip(
        axes,
        (
            ("robust regression, digits", parity_regression(), 0.1),
            ("logistic regression, breast cancer", logistic_regression(), 0.5),
        ),
        strict=True,
    ):
        found = curves(problem, learning_rate, options.quick)
        for (method, (distance, error, order)), marker in zip(found.items(), "os^", strict=True):
            fitted = slope(distance, error)
            print(f"{name:36s} {method:30s} slope {fitted:5.2f}, theory {order}")
            axis.loglog(distance, error, marker, ms=4, label=f"{method}: slope {fitted:.2f}")
            rows.append({"problem": name, "method": method, "slope": fitted, "theory": order})
            assert abs(fitted - order) < (0.15 if order == 1 else 0.25)
        axis.set_title(name)
        axis.set_xlabel("relative distance to the minimizer, before any polish")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_ylabel("relative error of the hypergradient")
    harness.keep(options, rows)
    if options.output:
        figure.savefig(options.output, dpi=130)


def family(problem, solvers):
    """Return the minimizer and the hypergradient that each solver gives."""

    def loss(theta, solver):
        sol = dl.minimize(problem.inner, problem.x0, theta, solver=solver)
        return problem.outer(sol.value, theta), sol.value

    gradient = eqx.filter_jit(jax.grad(loss, has_aux=True))
    found = [gradient(problem.theta, solver) for solver in solvers]
    return [x for _, x in found], [g for g, _ in found]


def polished(problem, points):
    """Return the hypergradients one Newton step from each point."""
    solver = dl.LBFGS(rtol=0.0, atol=1e6)  # which is met at once, and polished by one step

    @jax.jit
    def gradient(x0):
        def loss(theta):
            return problem.outer(dl.minimize(problem.inner, x0, theta, solver=solver).value, theta)

        return jax.grad(loss)(problem.theta)

    return [gradient(x) for x in points]


def curves(problem, learning_rate, quick):
    """Return, by method, distances to the minimizer and relative errors of the hypergradient."""
    exact = exact_hypergradient(problem)
    best = dl.minimize(problem.inner, problem.x0, problem.theta, solver=dl.LBFGS(1e-12, polish=3))
    tolerances = np.logspace(-1.5, -7, 14 if quick else 40)
    lengths = np.unique(np.logspace(1, 3.6, 6 if quick else 14).astype(int))
    plain, at_plain = family(problem, [dl.LBFGS(rtol, polish=0) for rtol in tolerances])
    at_polished = polished(problem, plain)
    descent = optax.sgd(learning_rate)
    unrolled, at_unrolled = family(problem, [dl.Unrolled(descent, int(k)) for k in lengths])

    def distances(points):
        scale = np.linalg.norm(best.value)
        return np.asarray([np.linalg.norm(x - best.value) / scale for x in points])

    def errors(gradients):
        return np.asarray([np.linalg.norm(g - exact) for g in gradients]) / np.linalg.norm(exact)

    return {
        "implicit gradient": (distances(plain), errors(at_plain), 1),
        "implicit gradient, polished": (distances(plain), errors(at_polished), 2),
        "unrolled gradient descent": (distances(unrolled), errors(at_unrolled), 1),
    }


def slope(distance, error):
    """Return the slope of the least-squares line through the logarithms."""
    used = (error > ROUNDING) & (error < COARSE)
    return np.polyfit(np.log(distance[used]), np.log(error[used]), 1)[0]


SMALL = ("ridge", "logistic", "robust", "poisson")


def error_estimate(options):
    """Is the error estimate right, and what does an accuracy cost that it steers?

    In float64 each problem is solved to gradient tolerances of 1e-1, 1e-2 and 1e-3 (with the Newton
    polish) and to the default. The true error is that against dense float64 algebra. The ratio must
    be between 1/3 and 3 wherever the true error is above 1e-13 of the hypergradient; below,
    rounding of the reference itself is all that is left, and the ratio is shown only.

    The products are those of the adjoint and, on top, of the estimate.

    Then each problem is solved with `accuracy=` 1e-1 to 1e-6. The true error is to be below 1.5
    times what was asked in 98 % of cases and below three times in all. The cost is all evaluations
    and products, over those of the default settings without an estimate that is thrown away. Beyond
    64 variables a tenth is to cost at most 0.6; up to there a product costs next to nothing.
    """
    usual = (*SMALL, "softmax e-6", "network", "distillation")
    names = harness.sized(options, SMALL, usual, COLLECTION)
    problems = {name: COLLECTION[name]() for name in names}
    exact = {name: exact_hypergradient(problem) for name, problem in problems.items()}
    rows = estimates(problems, exact)
    rows += accuracies(problems, exact)
    harness.keep(options, rows)


def estimates(problems, exact) -> list[dict]:
    """Compare the estimate with the true error, for some tolerances."""
    print(
        f"{'problem':18s} {'rtol':>8s} {'true error':>11s} {'estimate':>11s} {'ratio':>7s} "
        f"{'evaluations':>12s} {'products: adjoint':>18s} {'estimate':>9s}"
    )
    rows, shares, ratios = [], [], []
    for name, problem in problems.items():
        size = np.linalg.norm(exact[name])

        @jax.jit
        def step(rtol, problem=problem):
            solver = dl.LBFGS(rtol=rtol)
            made = dl.value_and_hypergrad(
                problem.outer, problem.inner, solver=solver, max_steps=20_000
            )
            return made(problem.theta, problem.x0)

        for rtol in (1e-1, 1e-2, 1e-3, float(jnp.finfo(jnp.float64).eps) ** 0.5):
            _, gradient, info = step(rtol)
            error = np.linalg.norm(gradient - exact[name])
            ratio = float(info.error_estimate) / error
            evaluations = info.solution.stats.num_fun_evals + info.solution.stats.num_hvps
            print(
                f"{name:18s} {rtol:8.0e} {error / size:11.1e} "
                f"{float(info.error_estimate) / size:11.1e} {ratio:7.3f} {evaluations:12d} "
                f"{info.num_adjoint_steps:18d} {info.num_estimate_steps:9d}",
                flush=True,
            )
            rows.append({"problem": name, "rtol": rtol, "error": error / size, "ratio": ratio})
            if error > 1e-13 * size:
                ratios.append(ratio)
            if problem.x0.size > 64:
                shares.append(float(info.num_estimate_steps / info.num_adjoint_steps))
    print(f"\nratios where the error is not rounding: {min(ratios):.3f} to {max(ratios):.3f}")
    if shares:
        print(
            "products of the estimate over those of the adjoint: "
            f"{min(shares):.2f} to {max(shares):.2f}"
        )
    assert 1 / 3 < min(ratios)
    assert max(ratios) < 3
    return rows


def accuracies(problems, exact) -> list[dict]:
    """Ask for the hypergradient, and compare errors and costs."""
    print(
        f"\n{'problem':18s} {'asked':>8s} {'true error':>11s} {'over asked':>11s} "
        f"{'evaluations':>12s} {'products':>9s} {'over default':>13s}"
    )
    rows = []
    for name, problem in problems.items():
        size = np.linalg.norm(exact[name])

        @jax.jit
        def step(accuracy, problem=problem):
            made = dl.value_and_hypergrad(
                problem.outer, problem.inner, accuracy=accuracy, max_steps=20_000
            )
            return made(problem.theta, problem.x0)

        default = dl.value_and_hypergrad(problem.outer, problem.inner, max_steps=20_000)
        info = jax.jit(default)(problem.theta, problem.x0)[2]
        usual = sum(costs(info)) - int(info.num_estimate_steps)
        for accuracy in (1e-1, 1e-2, 1e-4, 1e-6):
            _, gradient, info = step(accuracy)
            error = np.linalg.norm(gradient - exact[name]) / size
            evaluations, products = costs(info)
            cost = (evaluations + products) / usual
            print(
                f"{name:18s} {accuracy:8.0e} {error:11.1e} {error / accuracy:11.3f} "
                f"{evaluations:12d} {products:9d} {cost:13.2f}",
                flush=True,
            )
            row = {"problem": name, "variables": problem.x0.size, "accuracy": accuracy}
            rows.append({**row, "error": error, "cost": cost})
    missed = np.array([row["error"] / row["accuracy"] for row in rows])
    print(f"\nerrors over what was asked for: at most {max(missed):.2f}")
    assert np.mean(missed < 1.5) >= 0.98
    assert max(missed) < 3
    large = [row for row in rows if row["variables"] > 64 and row["accuracy"] == 1e-1]
    if large:
        cost = [row["cost"] for row in large]
        print(f"cost of a tenth over that of the default: {min(cost):.2f} to {max(cost):.2f}")
        assert max(cost) <= 0.6
    return rows


def costs(info) -> tuple[int, int]:
    """Return evaluations, and products."""
    stats = info.solution.stats
    products = stats.num_hvps + info.num_adjoint_steps + info.num_estimate_steps
    return int(stats.num_fun_evals), int(products)


def polish(options):
    """What does the Newton polish cost? Cost at equal error, polish on against polish off.

    For each problem and each of three tolerances with the polish: its error, its cost, and that of
    the loosest tolerance without polish that is at least as exact. The cost is that of one
    hypergradient, solve and adjoint: evaluations of the inner objective with its gradient plus
    Hessian products, and seconds, medians of interleaved runs of the compiled programs. On the
    average (geometric mean) the polish must not cost a tenth more than that tolerance, which nobody
    knows beforehand.
    """
    rows = []
    names = ("softmax e-4", "softmax e-6", "softmax e-9", "network", "distillation")
    names = harness.sized(options, names[:1], names[1::2], names)
    print(
        f"{'problem':16s} {'rtol on':>8s} {'error':>8s} {'cost':>5s} {'rtol off':>9s} "
        f"{'error':>8s} {'cost':>5s} {'cost on/off':>12s} {'time on/off':>12s}"
    )
    costs, times = [], []
    for name in names:
        problem = COLLECTION[name]()
        exact = exact_hypergradient(problem)
        polished, plain = (at_tolerance(problem, polish) for polish in (1, 0))

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
    harness.keep(options, rows)
    print(f"\ngeometric means: cost {mean_cost:.2f}, time {mean_time:.2f}")
    assert mean_cost < 1.1
    assert mean_time < 1.1


def at_tolerance(problem, polish):
    """Return the compiled `rtol -> (gradient, evaluations and products)`."""

    def gradient(rtol):
        solver = dl.LBFGS(rtol=rtol, polish=polish)
        step = dl.value_and_hypergrad(problem.outer, problem.inner, solver=solver, max_steps=5000)
        _, grad, info = step(problem.theta, problem.x0)
        stats = info.solution.stats  # the error estimate is not returned, and so not computed
        return grad, stats.num_fun_evals + stats.num_hvps + info.num_adjoint_steps

    return jax.jit(gradient).lower(1e-3).compile()


def warm_starts(options):
    """What does `info.state` save? Thirty small outer steps, each started cold or warm.

    Gradient descent on the weight decays of a softmax regression on digits, on the weights of the
    samples in hyper-cleaning, and on the images of a distillation; and, to see where the saving
    ends, on two small problems, whose adjoint is a dense factorisation and costs the same either
    way. Counted are evaluations of the inner objective with its gradient and Hessian products:
    those of the solve, its polish and the adjoint. Most of them are products of conjugate
    gradients, to whose many digits a start that has two adds little. Warm must save at least 15 %
    on the large problems, and the trajectory must be the same to 1e-6 on all.
    """
    rows = []
    names = ("softmax e-6", "hyper-cleaning", "distillation", "logistic", "ridge")
    print("every outer step moves theta by a hundredth or a thousandth of its norm")
    print(
        f"{'problem':16s} {'step':>6s} {'cold: evaluations':>18s} {'products':>9s} "
        f"{'warm: evaluations':>18s} {'products':>9s} {'saved':>7s} {'trajectory':>11s}"
    )
    for name in names[1:2] if options.quick else names:
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
            assert saved >= (0.15 if problem.x0.size > 64 else 0)
            assert apart < 1e-6
    harness.keep(options, rows)


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


ADJOINT_PROBLEMS = (
    "softmax e-4", "softmax e-6", "softmax e-9", "network", "hyper-cleaning", "distillation",
)  # fmt: skip
REFINE = (0, 1, 2, 5, 10)


def adjoints(options):
    """What do the quasi-Newton adjoint and the L-BFGS preconditioner cost, how wrong is the first?

    For each problem and memory size, at the default tolerance in float64: products with the Hessian
    that conjugate gradients takes for the adjoint, plain and preconditioned with the solve's
    memory, and the relative error of `QuasiNewtonAdjoint(refine=k)`, which takes k + 1 products
    (none for 0). `ImplicitAdjoint` must stay exact either way, and the error estimate must tell the
    error of the quasi-Newton adjoint within a factor of three.
    """
    rows = []
    names = ADJOINT_PROBLEMS if options.full else ("network",)
    print(
        f"{'problem':16s} {'memory':>6s} {'products: plain':>16s} {'lbfgs':>6s}   "
        + "".join(f"{'refine=' + str(k):>11s}" for k in REFINE)
    )
    for name in names:
        problem = COLLECTION[name]()
        exact = exact_hypergradient(problem)
        for memory_size in (10, 30, 100) if options.full else (10,):

            def solved(adjoint, problem=problem, exact=exact, memory_size=memory_size):
                solver = dl.LBFGS(memory_size=memory_size)
                step = dl.value_and_hypergrad(
                    problem.outer, problem.inner, solver=solver, adjoint=adjoint, max_steps=5000
                )
                _, gradient, info = jax.jit(step)(problem.theta, problem.x0)
                error = np.linalg.norm(gradient - exact)
                return error / np.linalg.norm(exact), float(info.error_estimate) / error, info

            products = []
            for adjoint in (dl.ImplicitAdjoint(), dl.ImplicitAdjoint(preconditioner="lbfgs")):
                error, _, info = solved(adjoint)
                assert error < 1e-8
                products.append(int(info.num_adjoint_steps))
            errors = []
            for refine in REFINE:
                error, ratio, _ = solved(dl.QuasiNewtonAdjoint(refine=refine))
                assert 1 / 3 < ratio < 3
                errors.append(float(error))
            row = {"problem": name, "memory_size": memory_size, "products": products}
            rows.append(row | {"refine": REFINE, "errors": errors})
            print(
                f"{name:16s} {memory_size:6d} {products[0]:16d} {products[1]:6d}   "
                + "".join(f"{error:11.1e}" for error in errors),
                flush=True,
            )
    harness.keep(options, rows)


def crossover(options):
    """Where should the adjoint stop assembling the Hessian? Dense against CG, one hypergradient.

    For each size: compile both, interleave the runs, print medians and their ratio, for three kinds
    of problem: softmax regression, a small network with a proximal term, and an ill-conditioned
    quadratic, on which CG takes more steps than there are variables. What dense costs more on the
    easy ones buys certainty: it sees every curvature. Up to the threshold in use, `DENSE_SIZE`, it
    must not take more than three times as long; beyond, CG must win on the easy problems. The
    claims are asserted at the end.
    """
    rows, short = [], []
    print(f"{'problem':26s} {'n':>5s} {'dense':>10s} {'CG':>10s} {'dense / CG':>11s}")
    for make in (
        scalable.softmax_regression,
        scalable.proximal_network,
        scalable.ill_conditioned_quadratic,
    ):
        easy = make is not scalable.ill_conditioned_quadratic
        for n in (20, 40, 60, 100, 200, 400) if options.full else (20, 60):
            solvers = [_linear.Dense(), _krylov.ConjugateGradient(1e-7, 100 * n)]
            runs = {k: adjoint_by(solver, make(n)) for k, solver in enumerate(solvers)}
            dense, cg = harness.seconds(runs, 15).values()
            name = make.__name__
            rows.append({"problem": name, "variables": n, "dense": dense, "cg": cg})
            print(f"{name:26s} {n:5d} {dense * 1e3:7.2f} ms {cg * 1e3:7.2f} ms {dense / cg:11.2f}")
            if n > _system.DENSE_SIZE:
                holds = not easy or cg < dense
            else:
                holds = dense < 3 * cg
            if not holds:
                short.append(f"{name}, n = {n}: dense / CG = {dense / cg:.2f}")
    harness.keep(options, rows)
    assert not short, short


def adjoint_by(linear_solver, problem):
    """Return the compiled hypergradient."""
    adjoint = dl.ImplicitAdjoint(linear_solver=linear_solver, rtol=1e-6)
    # The adjoint's own cost is what matters here, so the forward solve is loose.
    solver = dl.LBFGS(rtol=1e-3, polish=0)

    def loss(theta):
        sol = dl.minimize(problem.inner, problem.x0, theta, solver=solver, adjoint=adjoint)
        return problem.outer(sol.value, theta)

    return functools.partial(harness.compiled(jax.grad(loss), problem.theta).run, problem.theta)


ABLATIONS = {
    each.__name__: each
    for each in (
        limit,
        compiling,
        overhead,
        theory,
        error_estimate,
        polish,
        warm_starts,
        adjoints,
        crossover,
    )
}


def main():
    """Run the one that is named."""
    options = harness.options(__doc__, names=ABLATIONS)
    ABLATIONS[options.name](options)


if __name__ == "__main__":
    main()
