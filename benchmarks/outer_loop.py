"""Does an outer loop need a schedule of tolerances? Ways to choose how exact a hypergradient is.

    python benchmarks/outer_loop.py [--quick | --full] [--results file.json] [--output file.png]

Four problems: weight decays of a softmax regression on digits, weights of samples in
hyper-cleaning, filters of a denoiser, and the kernel of a Gaussian process classifier. One
optimizer, Adam or momentum with a constant rate, takes the same number of steps with
hypergradients that are

- exact: solved to the default tolerance, from a cold start or a warm one;
- as exact as `accuracy=0.1` asks for;
- of an accuracy that follows the loss: twice as loose after a step whose gain stands out from the
  errors of the values, twice as tight after one whose gain does not;
- solved to a tolerance that stays the same, 1e-2 or 1e-3, with the polish;
- solved without a polish to a tolerance that shrinks by a factor with every step, or stays, as in
  HOAG (F. Pedregosa, ICML 2016), for a grid of first tolerances and factors. Shown are the cheapest
  of them, which somebody has to find, and the dearest.

And gradient descent with backtracking takes the optimizer's place, in the manner of MAID (Salehi,
Mukherjee, Roberts and Ehrhardt, arXiv 2308.10098). A step is accepted if the loss falls by a tenth
of what the gradient promises and, on top, by the errors of both values. Then the tolerance is
doubled. If the errors are all that forbids the step, the tolerance is divided by four, else the
step is shortened. Their constants are replaced by an estimate: the error of the outer loss is
`|uᵀ∇f|` to first order. The next length is that of the parabola through both losses and the slope.
The tolerance is that of the inner solve, without the polish, and its adjoint, or the `accuracy`.
Beside them runs the same with exact solves, and with tolerances that stay the same.

All runs but one start warm. The goal is the last loss of the exact way, within 1e-3 of it, or less.
Losses are those of exact fits, which cost nothing here. The cost of a way is what it spends until
it is there, of an optimizer at least that of all its steps: evaluations of the inner objective and
products with its Hessian, those of the estimate included where it is asked for. Not counted are the
gradients by `theta` and, with an accuracy, those around the estimate, about fifteen a step.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_sample_images, make_moons

import difflbfgs as dl
import harness
from problems import collection

jax.config.update("jax_enable_x64", True)

SAME = 1e-3
DEFAULT = float(jnp.finfo(jnp.float64).eps) ** 0.5
FIRST = (1e-1, 1e-2)
SHRINK = (1.0, 0.95, 0.9, 0.8)
LAST = 1e-6
LOOSEST, TIGHTEST = 0.5, 1e-3
SUFFICIENT = 0.1
EXACT, HOAG, WORST = "exact, cold", "HOAG, the best", "HOAG, the worst"
ACCURACY, FOLLOWING = "accuracy 0.1", "accuracy by progress"
OURS = "backtracking, tolerance by progress"
DRAWN = (EXACT, ACCURACY, HOAG, OURS)


@dataclasses.dataclass
class Task:
    """A bilevel problem, the optimizer of its outer level, and how many steps that takes.

    `rate` is the first step of gradient descent with backtracking.
    """

    problem: collection.Problem
    optimizer: optax.GradientTransformation
    num_steps: int
    rate: float


def denoising() -> collection.Problem:
    """Eight filters of 3 by 3 pixels for an energy that denoises patches of a photograph."""
    image = load_sample_images().images[0] @ [0.299, 0.587, 0.114] / 255
    rng = np.random.default_rng(0)
    corners = [(40, 330), (130, 350), (200, 420), (260, 500), (320, 380), (120, 560)]
    clean = np.stack([image[i : i + 24, j : j + 24] for i, j in corners])
    clean, noisy = map(jnp.asarray, (clean, clean + 0.1 * rng.normal(size=clean.shape)))
    waves = np.cos(np.pi * np.outer(np.arange(3), 2 * np.arange(3) + 1) / 6)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    basis = jnp.asarray(np.einsum("ai,bj->abij", waves, waves).reshape(9, 3, 3)[1:])

    def inner(x, theta):
        filters = jnp.einsum("jb,bkl->jkl", theta["mix"], basis)
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
        responses = jax.lax.conv(padded[:, None], filters[:, None], (1, 1), "VALID")
        weight, width = (jnp.exp(theta[name])[:, None, None] for name in ("weight", "width"))
        potentials = width**2 * (jnp.sqrt(1 + (responses / width) ** 2) - 1)
        return jnp.sum((x - noisy) ** 2) / 2 + jnp.sum(weight * potentials)

    def outer(x, theta):
        del theta
        return 1e3 * jnp.mean((x - clean) ** 2)

    theta = {"mix": jnp.eye(8), "weight": jnp.full(8, -1.0), "width": jnp.full(8, -4.0)}
    return collection.Problem(inner, outer, noisy, theta)


def gaussian_process() -> collection.Problem:
    """Amplitude and length scale of a classifier, by Laplace's evidence; two moons."""
    X, y = make_moons(80, noise=0.3, random_state=0)
    X, sign = jnp.asarray(X), 2.0 * jnp.asarray(y) - 1
    squares = jnp.sum((X[:, None] - X) ** 2, axis=-1)

    def factor(theta):
        kernel = jnp.exp(-squares * jnp.exp(-2 * theta[1]) / 2) + 1e-4 * jnp.eye(len(X))
        return jnp.exp(theta[0]) * jnp.linalg.cholesky(kernel)

    def inner(z, theta):
        return jnp.sum(jax.nn.softplus(-sign * (factor(theta) @ z))) + z @ z / 2

    def outer(z, theta):
        L = factor(theta)
        p = jax.nn.sigmoid(L @ z)
        precision = jnp.eye(len(X)) + L.T @ ((p * (1 - p))[:, None] * L)
        return inner(z, theta) + jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(precision))))

    return collection.Problem(inner, outer, jnp.zeros(len(X)), jnp.asarray([0.0, 1.0]))


TASKS: dict[str, Callable[[], Task]] = {
    "digits": lambda: Task(collection.softmax_regression(-6.0), optax.adam(0.1), 50, 30.0),
    "hyper-cleaning": lambda: Task(
        collection.hyper_cleaning(), optax.sgd(300.0, momentum=0.5), 30, 300.0
    ),
    "denoising": lambda: Task(denoising(), optax.adam(0.02), 60, 0.01),
    "Gaussian process": lambda: Task(gaussian_process(), optax.adam(0.05), 60, 0.01),
}


@dataclasses.dataclass
class Found:
    """What one call found, and what it spent.

    Attributes:
        value, grad: the outer loss and the hypergradient, as exact as was asked for.
        state: for a warm start.
        cost: evaluations and products.
        doubt: how wrong the value is, to first order.
    """

    value: float
    grad: Any
    state: Any
    cost: int
    doubt: float


class Steps:
    """The compiled calls of a problem. What failed has the value NaN."""

    def __init__(self, problem: collection.Problem) -> None:
        def made(**options):
            return dl.value_and_hypergrad(
                problem.outer, problem.inner, max_steps=10_000, throw=False, **options
            )

        @jax.jit
        def polished(theta, state, rtol):
            return made(solver=dl.LBFGS(rtol=rtol))(theta, problem.x0, state)

        @jax.jit
        def plain(theta, state, rtol):
            return made(solver=dl.LBFGS(rtol=rtol, polish=0))(theta, problem.x0, state)

        @jax.jit
        def accurate(theta, state, accuracy):
            return made(accuracy=accuracy)(theta, problem.x0, state)

        self._calls = {True: polished, False: plain}
        self._accurate = accurate

    def solved(self, theta: Any, state: Any, rtol: float, polish: bool = True) -> Found:
        """Solve to a tolerance."""
        return _found(*self._calls[polish](theta, state, rtol), estimated=False)

    def plain(self, theta: Any, state: Any, rtol: float) -> Found:
        """Solve to a tolerance without a polish."""
        return self.solved(theta, state, rtol, polish=False)

    def exact(self, theta: Any, state: Any, rtol: float = DEFAULT) -> Found:
        """Solve to the default tolerance."""
        del rtol
        return self.solved(theta, state, DEFAULT)

    def accurate(self, theta: Any, state: Any, accuracy: float) -> Found:
        """Solve as exactly as is asked for."""
        return _found(*self._accurate(theta, state, accuracy), estimated=True)


def _found(value, grad, info, estimated) -> Found:
    stats = info.solution.stats
    cost = stats.num_fun_evals + stats.num_hvps + info.num_adjoint_steps
    cost += info.num_estimate_steps if estimated else 0
    doubt = float(abs(jnp.vdot(info.state.adjoint, info.state.solve.point.g)))
    known = np.isfinite(norm(grad))
    return Found(float(value) if known else np.nan, grad, info.state, int(cost), doubt)


def norm(tree: Any) -> float:
    """Return the 2-norm over all leaves."""
    return float(optax.tree.norm(tree))


def exact(start: str) -> Callable:
    """Return the way that solves to the default tolerance, from a cold start or a warm one."""

    def call(k, theta, last, steps):
        del k
        return steps.exact(theta, last.state if last and start == "warm" else None)

    return call


def constant(accuracy: float) -> Callable:
    """Return the way that asks for the same accuracy in every step."""

    def call(k, theta, last, steps):
        del k
        return steps.accurate(theta, last and last.state, accuracy)

    return call


def following() -> Callable:
    """Return the way whose accuracy follows the loss."""
    accuracy = 0.1

    def call(k, theta, last, steps):
        nonlocal accuracy
        del k
        found = steps.accurate(theta, last and last.state, accuracy)
        if last is not None:
            clear = last.value - found.value > last.doubt + found.doubt
            accuracy = np.clip(accuracy * (2 if clear else 0.5), TIGHTEST, LOOSEST)
        return found

    return call


def scheduled(first: float, shrink: float = 1.0, polish: bool = True) -> Callable:
    """Return the way whose tolerance shrinks with every step, or stays the same."""

    def call(k, theta, last, steps):
        rtol = max(first * shrink**k, LAST)
        return steps.solved(theta, last and last.state, rtol, polish)

    return call


class Run:
    """What an outer loop came to, and what it spent.

    Attributes:
        losses, costs: the loss as the loop saw it, and what was spent until then.
        last: the loss of an exact fit after the last step; of an optimizer, after the steps that
            all its ways take.
        reached: what was spent until the goal was reached; infinite if it was not.
        calls: how many hypergradients that took.
        ratios: of the errors of the losses to their estimates.
    """

    def __init__(self, steps: Steps, goal: float) -> None:
        self.steps, self.goal = steps, (1 + SAME) * goal
        self.losses, self.costs, self.ratios = [], [], []
        self.last, self.reached, self.calls, self._spent = np.nan, np.inf, 0, 0
        self._fit = None

    def pay(self, found: Found) -> Found:
        """Count what was spent."""
        self._spent += found.cost
        self.calls += 1
        return found

    def note(self, found: Found) -> None:
        """Note where the loop is."""
        self.losses.append(found.value)
        self.costs.append(self._spent)

    def judge(self, theta: Any) -> float:
        """Return the loss of an exact fit, and note whether that is good enough."""
        self._fit = self.steps.exact(theta, self._fit and self._fit.state)
        if self._fit.value <= self.goal:
            self.reached = self._spent
        return self._fit.value


def optimized(task: Task, steps: Steps, call: Callable, goal: float = np.inf) -> Run:
    """Take the optimizer's steps, and up to twice as many if the goal is not reached by then."""
    theta, memory = task.problem.theta, task.optimizer.init(task.problem.theta)
    found, run = None, Run(steps, goal)
    for k in range(2 * task.num_steps):
        found = run.pay(call(k, theta, found, steps))
        run.note(found)
        updates, memory = task.optimizer.update(found.grad, memory)
        theta = optax.apply_updates(theta, updates)
        if k + 1 >= task.num_steps:
            loss = run.judge(theta)
            run.last = loss if k + 1 == task.num_steps else run.last
            if np.isfinite(run.reached):
                break
    return run


def backtracked(
    task: Task,
    evaluate: Callable,
    steps: Steps,
    goal: float,
    limits: Any,
    factor: float = 1.0,
    of_gradients: bool = False,
) -> Run:
    """Descend along inexact hypergradients, by steps that inexact losses accept.

    The length of the next step comes of the losses or, if it is `of_gradients`, of the gradients.
    """
    rate = factor * task.rate
    loosest, tightest = limits
    theta, tolerance, run = task.problem.theta, min(loosest, 0.1), Run(steps, goal)
    now = run.pay(evaluate(theta, None, tolerance))
    run.note(now)
    while run.calls < 4 * task.num_steps and not np.isfinite(run.reached):
        promised = rate * norm(now.grad) ** 2
        there = jax.tree.map(lambda leaf, g, rate=rate: leaf - rate * g, theta, now.grad)
        new = run.pay(evaluate(there, now.state, tolerance))
        doubt, gain = now.doubt + new.doubt, now.value - new.value
        # The parabola through both losses and the slope is least at so many times this step.
        best = promised / (2 * max(promised - gain, 1e-9 * promised)) if gain > -np.inf else 0.0
        if gain - doubt >= SUFFICIENT * promised:
            if of_gradients:
                best = _barzilai_borwein(now.grad, new.grad)
            theta, now, rate = there, new, rate * np.clip(best, 0.5, 2)
            tolerance = min(2 * tolerance, loosest)
            run.note(now)
            run.last = run.judge(theta)
            run.ratios.append(abs(now.value - run.last) / now.doubt)
        elif gain + doubt >= SUFFICIENT * promised and tolerance > tightest:
            tolerance = max(tolerance / 4, tightest)
            now = run.pay(evaluate(theta, now.state, tolerance))
        else:
            rate *= np.clip(best, 0.1, 0.5)
    return run


def _barzilai_borwein(before: Any, after: Any) -> float:
    """Return how many times the last step, one along the gradient, the next is to be."""
    change = optax.tree.sub(before, after)
    curvature = float(jnp.asarray(optax.tree.vdot(before, change)))
    return curvature / norm(change) ** 2 if curvature > 0 else np.inf


def measured(task: Task, quick: bool) -> dict[str, Run]:
    """Return what every way came to."""
    steps = Steps(task.problem)
    runs = {EXACT: optimized(task, steps, exact("cold"))}
    goal = runs[EXACT].last
    ways = {
        "exact, warm": exact("warm"),
        ACCURACY: constant(0.1),
        FOLLOWING: following(),
        "tolerance 1e-2": scheduled(1e-2),
        "tolerance 1e-3": scheduled(1e-3),
    }
    for name, call in ways.items():
        runs[name] = optimized(task, steps, call, goal)
    schedules = itertools.product(FIRST, SHRINK[:1] if quick else SHRINK)
    tuned = {
        schedule: optimized(task, steps, scheduled(*schedule, polish=False), goal)
        for schedule in schedules
    }
    best = min(tuned, key=lambda schedule: tuned[schedule].reached)
    worst = max(tuned, key=lambda schedule: tuned[schedule].reached)
    runs |= {HOAG: tuned[best], WORST: tuned[worst]}
    print(f"the best schedule: first {best[0]}, factor {best[1]}")
    solves, accuracies = (0.1, DEFAULT), (LOOSEST, TIGHTEST)
    descents: dict[str, Any] = {
        "backtracking, exact": (steps.exact, (DEFAULT, DEFAULT)),
        "backtracking, tolerance 1e-1": (steps.plain, (0.1, 0.1)),
        "backtracking, tolerance 1e-2": (steps.plain, (0.01, 0.01)),
        "backtracking, accuracy by progress": (steps.accurate, accuracies),
        OURS: (steps.plain, solves),
        "the same, tolerance at most 1e-2": (steps.plain, (0.01, DEFAULT)),
        "the same, first step a tenth": (steps.plain, solves, 0.1),
        "the same, first step ten times": (steps.plain, solves, 10.0),
        "the same, lengths by Barzilai and Borwein": (steps.plain, solves, 1.0, True),
    }
    for name, (evaluate, *settings) in descents.items():
        if not quick or name == OURS:
            runs[name] = backtracked(task, evaluate, steps, goal, *settings)
    return runs


def main():
    """Measure, print the tables, save numbers and picture, assert the claims."""
    options = harness.options(__doc__)
    names = harness.sized(options, ("hyper-cleaning",), tuple(TASKS)[:2], tuple(TASKS))
    everything: dict[str, dict[str, Run]] = {}
    rows = []
    for name in names:
        task = TASKS[name]()
        print(f"\n{name}: {task.num_steps} steps of the optimizer")
        runs = everything[name] = measured(task, options.quick)
        print(f"{'':40s} {'loss over exact':>16s} {'cost':>8s} {'over exact':>11s} {'calls':>6s}")
        for way, run in runs.items():
            ahead, share = run.last / runs[EXACT].last - 1, run.reached / runs[EXACT].reached
            print(f"{way:40s} {ahead:+16.1e} {run.reached:8.0f} {share:11.3f} {run.calls:6d}")
            row = {"problem": name, "way": way, "ahead": ahead, "calls": run.calls}
            rows.append({**row, "cost": run.reached, "share": share})
        ratios = runs[OURS].ratios
        print(
            f"{OURS}: errors of the losses over their estimates: median "
            f"{np.median(ratios):.2f}, largest {max(ratios):.2f}",
            flush=True,
        )
        jax.clear_caches()
    means = {way: mean(everything, way) for way in next(iter(everything.values()))}
    best = means[HOAG]
    print(f"\n{'geometric means':40s} {'over exact':>11s} {'over HOAG, the best':>20s}")
    for way, share in means.items():
        print(f"{way:40s} {share:11.3f} {share / best:20.2f}")
    harness.keep(options, rows, lambda _, path: draw(everything, path))
    assert means[OURS] <= 1 / 3
    # On hyper-cleaning alone the best schedule is cheaper.
    assert not options.full or means[OURS] <= 1.2 * best
    assert means[ACCURACY] <= 1 / 3


def mean(everything: dict[str, dict[str, Run]], way: str) -> float:
    """Return the geometric mean of the cost over that of exact solves."""
    shares = [runs[way].reached / runs[EXACT].reached for runs in everything.values()]
    return float(np.exp(np.mean(np.log(shares))))


def draw(everything: dict[str, dict[str, Run]], path: Any) -> None:
    """Save the loss against the cost."""
    figure, axes = plt.subplots(1, len(everything), figsize=(3.6 * len(everything), 3.8))
    for axis, (name, runs) in zip(np.atleast_1d(axes), everything.items(), strict=True):
        for way in DRAWN:
            axis.semilogx(runs[way].costs, runs[way].losses, ".-", ms=3, label=way)
        axis.axhline(runs[EXACT].last, color="black", lw=0.6)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("evaluations and products")
        axis.grid(alpha=0.3)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("outer loss, as the loop sees it")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
