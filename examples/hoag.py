"""Adam over weight decays with hypergradients that are only as exact as they need to be.

A hypergradient with an error of a tenth of its length is a descent direction as good as any. So the
outer loop asks for that, `accuracy=0.1`, and needs no tolerance: as the hypergradient gets shorter,
the error that is allowed does, too. Each solve starts from the last one's minimizer, curvature
pairs and adjoint vector. Beside it run the same outer loop with cold starts and the default
tolerance, and with warm starts and a tolerance that shrinks by a constant factor with every step
(F. Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016), whose first value
and factor somebody has to choose. What is spent on the inner level, evaluations of the training
loss with its gradient and products with its Hessian, is printed for every step.

    python examples/hoag.py [--quick] [--output hoag.png]
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

ACCURACY = 0.1
FIRST_TOLERANCE, SHRINK, LAST_TOLERANCE = 1e-1, 0.8, 1e-6


def load():
    """Return images and labels for training and for validation."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16), jnp.asarray(labels)
    return (images[:600], labels[:600]), (images[600:1200], labels[600:1200])


TRAIN, VALID = load()
START, THETA = jnp.zeros((64, 10)), jnp.full(64, -6.0)


def cross_entropy(weights, data):
    """Return the mean cross-entropy of a softmax regression."""
    x, y = data
    return optax.softmax_cross_entropy_with_integer_labels(x @ weights, y).mean()


def training_loss(weights, theta):
    """Return the inner objective: one weight decay for each pixel."""
    decays = 1e-5 + jnp.exp(theta)
    return cross_entropy(weights, TRAIN) + jnp.sum(decays[:, None] * weights**2) / 2


def validation_loss(weights, theta):
    """Return the outer objective."""
    del theta
    return cross_entropy(weights, VALID)


OPTIMIZER = optax.adam(0.1)


@jax.jit
def step(theta, optimizer_state, state=None, accuracy=None, tolerance=None):
    """Take one outer step; the tolerance is an argument, so that it costs no compilation."""
    hypergradient = dl.value_and_hypergrad(
        validation_loss,
        training_loss,
        accuracy=accuracy,
        solver=dl.LBFGS(rtol=tolerance),
        max_steps=5000,
    )
    value, grad, info = hypergradient(theta, START, state)
    updates, optimizer_state = OPTIMIZER.update(grad, optimizer_state)
    return optax.apply_updates(theta, updates), optimizer_state, value, grad, info


def accurate(k, state):
    """Ask for an accuracy, and start warm."""
    del k
    return {"state": state, "accuracy": ACCURACY}


def scheduled(k, state):
    """Let the tolerance shrink, and start warm."""
    return {"state": state, "tolerance": max(FIRST_TOLERANCE * SHRINK**k, LAST_TOLERANCE)}


def exact(k, state):
    """Start cold, and solve to the default tolerance."""
    del k, state
    return {}


WAYS = {
    "warm, accuracy 0.1": accurate,
    "warm, tolerances on a schedule": scheduled,
    "cold, default tolerance": exact,
}


@jax.jit
def final_loss(theta):
    """Return the validation loss of an exact fit."""
    return validation_loss(dl.minimize(training_loss, START, theta, max_steps=5000).value, theta)


def run(name, num_steps):
    """Return, for every step, the loss, what was spent, and the error of the gradient; and the end.

    The last is the validation loss of the decays that were found, of an exact fit.
    """
    theta, optimizer_state, state, rows = THETA, OPTIMIZER.init(THETA), None, []
    print(f"\n{name}")
    print(
        f"{'step':>4s} {'validation loss':>16s} {'evaluations':>12s} {'products':>9s} "
        f"{'error of the gradient':>22s}"
    )
    for k in range(num_steps):
        theta, optimizer_state, value, grad, info = step(
            theta, optimizer_state, **WAYS[name](k, state)
        )
        state, stats = info.state, info.solution.stats
        evaluations = int(stats.num_fun_evals)
        products = int(stats.num_hvps + info.num_adjoint_steps)
        if WAYS[name] is accurate:  # elsewhere nobody asked for the estimate
            products += int(info.num_estimate_steps)
        error = float(info.error_estimate / jnp.linalg.norm(grad))
        rows.append((float(value), evaluations + products, error))
        print(f"{k:4d} {float(value):16.6f} {evaluations:12d} {products:9d} {error:22.1e}")
    print(f"validation loss of the decays found: {final_loss(theta):.6f}")
    return np.asarray(rows), final_loss(theta)


def draw(path, found):
    """Save the loss against the cost, and the cost and the error of every step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, (rows, _) in found.items():
        left.plot(np.cumsum(rows[:, 1]), rows[:, 0], ".-", label=name)
        right.semilogy(rows[:, 2], ".-", label=name)
    left.set_xlabel("evaluations and Hessian products")
    left.set_ylabel("validation loss")
    right.set_xlabel("outer step")
    right.set_ylabel("relative error of the hypergradient (estimate)")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    print(f"saved {path}")


def main():
    """Run both, draw, and check that the cheap one gets as far."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    parser.add_argument("--output", default="hoag.png", help="where to save the PNG")
    options = parser.parse_args()
    num_steps = 8 if options.quick else 50
    found = {name: run(name, num_steps) for name in WAYS}
    costs = {name: rows[:, 1].sum() for name, (rows, _) in found.items()}
    ours, schedule, default = WAYS
    print()
    for name, (_, end) in found.items():
        share = costs[name] / costs[default]
        print(f"{name:32s} cost {100 * share:4.0f} %   validation loss {end:.6f}")
    draw(options.output, found)
    ends = {name: end for name, (_, end) in found.items()}
    assert costs[ours] < costs[default] / 3
    assert costs[ours] < 1.2 * costs[schedule]
    assert abs(ends[ours] - ends[default]) < 1e-3 * ends[default]


if __name__ == "__main__":
    main()
