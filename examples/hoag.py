"""Adam over weight decays with inexact inner solves: warm starts and tightening tolerances (HOAG).

Far from the best decays, a rough hypergradient will do. So the inner tolerance starts loose and
shrinks by a constant factor with every outer step, the adjoint follows it by default, and each
solve starts from the last one's minimizer, curvature pairs and adjoint vector (F. Pedregosa,
Hyperparameter optimization with approximate gradient, ICML 2016). The same outer loop with cold
starts and the default tolerance is run beside it: what is spent on the inner level, evaluations of
the training loss with its gradient and products with its Hessian, is printed for every step.

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
def step(theta, optimizer_state, tolerance, state=None):
    """Take one outer step; the tolerance is an argument, so that it costs no compilation."""
    hypergradient = dl.value_and_hypergrad(
        validation_loss, training_loss, solver=dl.LBFGS(rtol=tolerance), max_steps=5000
    )
    value, grad, info = hypergradient(theta, START, state)
    updates, optimizer_state = OPTIMIZER.update(grad, optimizer_state)
    return optax.apply_updates(theta, updates), optimizer_state, value, grad, info


def run(num_steps, inexact):
    """Return the validation loss, what every step spent, and the relative error of its gradient."""
    theta, optimizer_state, state, rows = THETA, OPTIMIZER.init(THETA), None, []
    print(f"\n{'warm, tightening' if inexact else 'cold, default tolerance'}")
    print(
        f"{'step':>4s} {'tolerance':>10s} {'validation loss':>16s} {'evaluations':>12s} "
        f"{'products':>9s} {'error of the gradient':>22s}"
    )
    for k in range(num_steps):
        tolerance = max(FIRST_TOLERANCE * SHRINK**k, LAST_TOLERANCE) if inexact else 1.5e-8
        theta, optimizer_state, value, grad, info = step(
            theta, optimizer_state, tolerance, state if inexact else None
        )
        state, stats = info.state, info.solution.stats
        evaluations = int(stats.num_fun_evals)
        products = int(stats.num_hvps + info.num_adjoint_steps)
        error = float(info.error_estimate / jnp.linalg.norm(grad))
        rows.append((float(value), evaluations + products, error))
        print(
            f"{k:4d} {tolerance:10.1e} {float(value):16.6f} {evaluations:12d} {products:9d} "
            f"{error:22.1e}"
        )
    return np.asarray(rows)


def draw(path, inexact, exact):
    """Save the loss against the cost, and the cost and the error of every step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for rows, label in ((exact, "cold, default tolerance"), (inexact, "warm, tightening")):
        left.plot(np.cumsum(rows[:, 1]), rows[:, 0], ".-", label=label)
        right.semilogy(rows[:, 2], ".-", label=label)
    left.set_xlabel("evaluations and Hessian products")
    left.set_ylabel("validation loss")
    right.set_xlabel("outer step")
    right.set_ylabel("relative error of the hypergradient (estimate)")
    for axis in (left, right):
        axis.legend(frameon=False)
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
    inexact, exact = run(num_steps, inexact=True), run(num_steps, inexact=False)
    share = inexact[:, 1].sum() / exact[:, 1].sum()
    print(f"\nevaluations and products together: {100 * share:.0f} % of the cold, exact ones")
    print(f"validation loss: {inexact[-1, 0]:.6f} instead of {exact[-1, 0]:.6f}")
    draw(options.output, inexact, exact)
    assert share < 0.6
    assert abs(inexact[-1, 0] - exact[-1, 0]) < 1e-2 * exact[-1, 0]


if __name__ == "__main__":
    main()
