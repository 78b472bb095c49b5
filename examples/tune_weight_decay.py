"""Tune 64 weight decays of a softmax regression by hypergradient, on scikit-learn's digits.

The inner problem fits weights `W` and biases `b` to 150 training images, with one weight decay for
each of the 64 pixels,

    min_{W, b}  mean cross-entropy + ½ Σ_j (1e-5 + exp(θ_j)) ‖W_j‖².

The outer problem picks `θ` for the least cross-entropy on 600 validation images. It starts from the
best single decay of a grid, and is judged on 1047 test images: both losses fall, and fewer images
are wrong. So it was in five splits of five, by 1 to 21 images. The second part compares the
hypergradient with that of unrolled SGD: error, time and memory.

    python examples/tune_weight_decay.py [--quick] [--output tune_weight_decay.png]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


def load():
    """Return images and labels: 150 for training, 600 for validation, the others for the test."""
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    rest, test_x, rest_y, test_y = train_test_split(
        images, labels, train_size=750, stratify=labels, random_state=0
    )
    train_x, valid_x, train_y, valid_y = train_test_split(
        rest, rest_y, train_size=150, stratify=rest_y, random_state=0
    )
    pairs = [(train_x, train_y), (valid_x, valid_y), (test_x, test_y)]
    return [(jnp.asarray(x), jnp.asarray(y)) for x, y in pairs]


TRAIN, VALID, TEST = load()
FLOOR = 1e-5
RATE = 8.0  # of unrolled SGD: the best of 2, 4, 6, 8 and 12 for 300 steps
START = {"W": jnp.zeros((64, 10)), "b": jnp.zeros(10)}


def cross_entropy(weights, data):
    """Return the mean cross-entropy of a softmax regression."""
    x, y = data
    logits = x @ weights["W"] + weights["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(weights, data):
    """Return the share of images classified correctly."""
    x, y = data
    return float(jnp.mean(jnp.argmax(x @ weights["W"] + weights["b"], axis=1) == y))


def decays(theta):
    """Return the 64 weight decays; with the floor the inner problem stays well-posed."""
    return FLOOR + jnp.exp(theta)


def training_loss(weights, theta):
    """Return the inner objective; the biases get a fixed decay, which makes them unique."""
    penalty = jnp.sum(decays(theta)[:, None] * weights["W"] ** 2) + 1e-3 * jnp.sum(
        weights["b"] ** 2
    )
    return cross_entropy(weights, TRAIN) + 0.5 * penalty


def fit(theta, solver=dl.LBFGS()):
    """Return the solution of the inner problem, which gets harder as decays vanish."""
    return dl.minimize(training_loss, START, theta, solver=solver, max_steps=5000)


def validation_loss(theta, solver=dl.LBFGS()):
    """Return the outer objective: fit, then evaluate on the validation images."""
    return cross_entropy(fit(theta, solver).value, VALID)


def best_single(num_decays=8):
    """Return 64 times the logarithm of the single decay with the least validation loss."""
    grid = jnp.linspace(-11.0, -4.0, num_decays)[:, None] * jnp.ones(64)
    losses = jax.jit(jax.vmap(lambda theta: validation_loss(theta, dl.LBFGS(rtol=1e-4))))(grid)
    return grid[jnp.argmin(losses)]


def tune(theta, num_steps):
    """Minimize the validation loss over `theta` with Adam, showing a progress bar."""
    optimizer = optax.adam(0.2)

    @jax.jit
    def step(theta, state):
        loss, gradient = jax.value_and_grad(validation_loss)(theta, dl.LBFGS(rtol=1e-4))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(theta, updates), state, loss

    begin = time.perf_counter()
    state, best = optimizer.init(theta), (float("inf"), theta)
    with tqdm(range(num_steps), desc="tuning 64 weight decays", disable=None) as bar:
        for _ in bar:
            after, state, loss = step(theta, state)
            best = min(best, (float(loss), theta), key=lambda pair: pair[0])
            theta = after
            bar.set_postfix(validation_loss=f"{float(loss):.4f}")
    print(f"tuned 64 weight decays: {num_steps} steps in {time.perf_counter() - begin:.0f} s\n")
    return best[1]


def reference_hypergradient(theta):
    """Return the hypergradient from a dense Hessian, at a minimizer solved to rounding."""
    solution = dl.minimize(training_loss, START, theta, solver=dl.LBFGS(rtol=1e-13, polish=3))
    flat, unravel = ravel_pytree(solution.value)
    inner = lambda w, theta: training_loss(unravel(w), theta)
    H = np.asarray(jax.hessian(inner)(flat, theta))
    B = np.asarray(jax.jacfwd(jax.grad(inner), argnums=1)(flat, theta))
    v = np.asarray(jax.grad(lambda w: cross_entropy(unravel(w), VALID))(flat))
    return -B.T @ np.linalg.solve(H, v)


def measure(solver, theta, exact, repeats):
    """Return error, seconds and temporary bytes of the hypergradient with this inner solver."""
    gradient = jax.jit(jax.grad(lambda theta: validation_loss(theta, solver)))
    program = gradient.lower(theta).compile()
    found = jax.block_until_ready(program(theta))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(theta))
        seconds.append(time.perf_counter() - begin)
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    memory = program.memory_analysis()
    assert memory is not None
    return error, statistics.median(seconds), memory.temp_size_in_bytes


def compare(theta, quick):
    """Measure implicit L-BFGS against unrolled SGD, and print the table."""
    exact = reference_hypergradient(theta)
    repeats = 3 if quick else 5
    implicit = {
        f"implicit L-BFGS, rtol {rtol:.0e}": dl.LBFGS(rtol=rtol)
        for rtol in ([1e-3] if quick else [1e-1, 1e-2, 1e-3, 1e-5])
    }
    implicit["implicit L-BFGS, default"] = dl.LBFGS()
    lengths = [100, 300] if quick else [100, 300, 1000]
    momentum = optax.sgd(RATE, momentum=0.9)
    unrolled = {f"unrolled SGD, {k} steps": dl.Unrolled(momentum, k) for k in lengths}
    print(
        f"\n{'hypergradient':30s} {'relative error':>15s} {'time':>11s} {'temporary memory':>17s}"
    )
    rows = {}
    for name, solver in {**implicit, **unrolled}.items():
        rows[name] = measure(solver, theta, exact, repeats)
        error, seconds, size = rows[name]
        print(f"{name:30s} {error:15.1e} {seconds * 1e3:8.1f} ms {size / 2**20:13.1f} MiB")
    return [rows[name] for name in implicit], [rows[name] for name in unrolled]


def draw(path, theta, implicit, unrolled):
    """Save error against time, and the learned decays as an image."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for rows, label, marker in (
        (implicit, "implicit L-BFGS (tolerance 1e-1 to default)", "o-"),
        (unrolled, "unrolled SGD (100 to 1000 steps)", "s--"),
    ):
        error, seconds, _ = zip(*rows, strict=True)
        left.loglog(np.asarray(seconds) * 1e3, error, marker, label=label)
    left.set_xticks(ticks := [5, 10, 20, 50, 100], labels=map(str, ticks))
    left.tick_params(axis="x", which="minor", labelbottom=False)
    left.set_xlabel("time of one hypergradient [ms]")
    left.set_ylabel("relative error of the hypergradient")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    left.grid(alpha=0.3)
    image = right.imshow(np.log10(decays(theta)).reshape(8, 8), cmap="viridis")
    right.set_title("learned weight decay of each pixel")
    right.set_xticks([])
    right.set_yticks([])
    figure.colorbar(image, ax=right, label="log10 of the weight decay")
    figure.savefig(path, dpi=130)
    print(f"\nsaved {path}")


def report(name, theta):
    """Print how well the weights that these decays lead to classify; return the three figures."""
    weights = fit(theta).value
    losses = [float(cross_entropy(weights, data)) for data in (VALID, TEST)]
    wrong = round((1 - accuracy(weights, TEST)) * len(TEST[1]))
    share = 1 - wrong / len(TEST[1])
    print(f"{name:20s} {losses[0]:15.4f} {losses[1]:12.4f} {share:15.4f}")
    return *losses, wrong


def conclude(before, after, implicit, unrolled):
    """Say in plain words what came out."""
    valid, test = (100 * (1 - after[k] / before[k]) for k in range(2))
    right = [
        f"right to {-np.log10(error):.0f} digits, in {1e3 * time:.0f} ms and {size / 2**20:.1f} MiB"
        for error, time, size in (implicit, unrolled[-1])
    ]
    print(
        f"\n64 decays instead of one: validation loss {valid:.0f} % lower, test loss {test:.0f} % "
        f"lower, {after[2]} instead of {before[2]} of {len(TEST[1])} test images wrong.\n"
        f"One hypergradient is {right[0]}.\nThe longest unrolled SGD is {right[1]}; its rate was "
        "tuned for it."
    )


def main():
    """Tune, compare and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    parser.add_argument("--output", default="tune_weight_decay.png", help="where to save the PNG")
    options = parser.parse_args()
    begin = time.perf_counter()
    single = best_single(3 if options.quick else 8)
    tuned = tune(single, 4 if options.quick else 60)
    print(f"{'':20s} {'validation loss':>15s} {'test loss':>12s} {'test accuracy':>15s}")
    before, after = report("best single decay", single), report("64 tuned decays", tuned)
    implicit, unrolled = compare(single, options.quick)
    draw(options.output, tuned, implicit, unrolled)
    print(f"total time {time.perf_counter() - begin:.0f} s")
    conclude(before, after, implicit[-1], unrolled)
    assert after[0] < before[0]
    if not options.quick:
        assert after[1] < before[1]
        assert after[2] < before[2]
    error, _, size = implicit[-1]
    assert error < 1e-8
    assert size < min(row[2] for row in unrolled) / 10


if __name__ == "__main__":
    main()
