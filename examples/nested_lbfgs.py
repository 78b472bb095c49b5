"""L-BFGS over hyperparameters through L-BFGS over weights: `minimize` inside `minimize`.

A logistic regression on scikit-learn's breast cancer data gets a weight decay for each of its 30
features. The inner `minimize` fits the weights; the outer one picks the decays for the least loss
on the validation half, plus a little that keeps them in range,

    min_θ  validation loss at w*(θ) + 1e-3 ‖θ - θ₀‖²,    w*(θ) = argmin_w training loss(w, θ).

Every outer evaluation is one inner solve and one adjoint solve. What each outer step spends on them
is printed; Adam with as many inner solves is shown beside it.

    python examples/nested_lbfgs.py [--quick] [--output nested_lbfgs.png]
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


def load():
    """Return features and labels -1 and 1, for training and for validation."""
    X, y = load_breast_cancer(return_X_y=True)
    X, y = jnp.asarray(StandardScaler().fit_transform(X)), jnp.asarray(2.0 * y - 1)
    return (X[0::2], y[0::2]), (X[1::2], y[1::2])


TRAIN, VALID = load()
START, THETA = jnp.zeros(30), jnp.full(30, -6.0)


def logistic_loss(w, data):
    """Return the mean logistic loss."""
    X, y = data
    return jnp.mean(jax.nn.softplus(-y * (X @ w)))


def training_loss(w, theta):
    """Return the inner objective."""
    return logistic_loss(w, TRAIN) + jnp.sum(jnp.exp(theta) * w**2) / 2


def validation_loss(w, theta):
    """Return the outer objective at given weights."""
    return logistic_loss(w, VALID) + 1e-3 * jnp.sum((theta - THETA) ** 2)


def nested(theta, _=None):
    """Return the outer objective: this is all that the pattern takes."""
    return validation_loss(dl.minimize(training_loss, START, theta).value, theta)


# An outer Newton polish would need second derivatives through the inner solve. They are there, but
# at this tolerance nobody would notice.
OUTER = dl.LBFGS(rtol=1e-4, polish=0)


def tuned(max_steps):
    """Return the solution of the outer problem: `minimize` inside `minimize`."""
    return dl.minimize(nested, THETA, solver=OUTER, max_steps=max_steps, throw=False)


# What follows checks, compares and draws.


def tune(max_steps):
    """Minimize over theta, printing what every outer step spends on the inner level.

    The same as `nested`, by way of `value_and_hypergrad`, which counts.
    """
    hypergradient = dl.value_and_hypergrad(validation_loss, training_loss)
    spent, history = {"evaluations": 0, "products": 0, "solves": 0}, []

    def tally(evaluations, products):
        spent["evaluations"] += int(evaluations)
        spent["products"] += int(products)
        spent["solves"] += 1

    def objective(theta, _):
        value, _, info = hypergradient(theta, START)
        stats = info.solution.stats
        products = stats.num_hvps + info.num_adjoint_steps
        jax.debug.callback(tally, stats.num_fun_evals, products)
        return value

    def show(step):
        history.append((spent["solves"], float(step.objective)))
        print(
            f"{int(step.num_steps):10d} {float(step.objective):15.6f} "
            f"{float(step.grad_norm):14.1e} {spent['solves']:13d} "
            f"{spent['evaluations']:18d} {spent['products']:15d}"
        )

    print(
        f"{'outer step':>10s} {'validation loss':>15s} {'gradient norm':>14s} "
        f"{'inner solves':>13s} {'inner evaluations':>18s} {'inner products':>15s}"
    )
    throw = max_steps >= 100
    solution = dl.minimize(
        objective, THETA, solver=OUTER, max_steps=max_steps, throw=throw, callback=show
    )
    jax.effects_barrier()
    return solution, history


def adam(num_solves):
    """Return the outer objective after each of so many steps of Adam."""
    optimizer = optax.adam(0.2)

    @jax.jit
    def step(theta, state):
        value, gradient = jax.value_and_grad(nested)(theta)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(theta, updates), state, value

    theta, state, values = THETA, optimizer.init(THETA), []
    for _ in range(num_solves):
        theta, state, value = step(theta, state)
        values.append(float(value))
    return values


def draw(path, history, values, theta):
    """Save the objective against inner solves, and the weight decays found."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    best = min(min(value for _, value in history), min(values))
    solves, losses = zip(*history, strict=True)
    left.semilogy(solves, np.asarray(losses) - best + 1e-8, "o-", ms=3, label="L-BFGS")
    left.semilogy(range(1, len(values) + 1), np.asarray(values) - best + 1e-8, "-", label="Adam")
    left.set_xlabel("inner solves")
    left.set_ylabel("outer objective above the best found")
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    right.bar(np.arange(30), np.asarray(theta - THETA))
    right.set_xlabel("feature")
    right.set_ylabel("log of the weight decay over its start")
    figure.savefig(path, dpi=130)
    print(f"saved {path}")


def main():
    """Tune with L-BFGS, check against the plain nested form, compare with Adam, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    parser.add_argument("--output", default="nested_lbfgs.png", help="where to save the PNG")
    options = parser.parse_args()
    max_steps = 5 if options.quick else 200
    solution, history = tune(max_steps)
    plain = tuned(max_steps)
    apart = float(jnp.linalg.norm(plain.value - solution.value) / jnp.linalg.norm(solution.value))
    print(f"minimize inside minimize gives the same decays to {apart:.0e}")
    values = adam(history[-1][0])
    print(f"validation loss {values[0]:.4f}, by L-BFGS {history[-1][1]:.4f}, Adam {values[-1]:.4f}")
    draw(options.output, history, values, solution.value)
    assert apart < 1e-6
    assert history[-1][1] < values[0]
    assert options.quick or history[-1][1] <= min(values) + 1e-6


if __name__ == "__main__":
    main()
