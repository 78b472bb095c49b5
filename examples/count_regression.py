"""Regress counts with a dispersion that may be at its bound; standard errors and influence.

An image of scikit-learn's digits has `y_i` pixels of full ink. For each of the ten digits these
counts have a negative binomial distribution whose mean depends on the image's slant and width,

    μ_i = exp(x_iᵀ β),    Var y_i = μ_i + a μ_i²,    a >= 1e-6,

and the maximum of the weighted likelihood is differentiated by the weights of the observations.
Counts that vary less than Poisson's have their dispersion `a` at the bound: there the fit is
Poisson's, only `β` has a standard error, and no weight moves `a`. The derivative by a weight, with
a minus sign, says by how much the slope changes without that observation; it is compared with fits
without it.

    python examples/count_regression.py [--quick] [--output count_regression.png]
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.scipy.special import gammaln
from sklearn.datasets import load_digits

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

FLOOR = 1e-6
BOUNDS = ({"beta": None, "alpha": FLOOR}, None)


def loss(model, theta):
    """Return the negative logarithm of the weighted likelihood."""
    weights, X, y = theta
    size, mean = 1 / model["alpha"], jnp.exp(X @ model["beta"])
    log_odds = jnp.log(mean) - jnp.log(size)
    terms = gammaln(y + size) - gammaln(size) - gammaln(y + 1)
    terms += y * jax.nn.log_sigmoid(log_odds) + size * jax.nn.log_sigmoid(-log_odds)
    return -jnp.sum(weights * terms)


def fit(weights, X, y):
    """Return the solution."""
    start = {"beta": jnp.zeros(3).at[0].set(jnp.log(jnp.mean(y))), "alpha": 0.1}
    return dl.minimize(loss, start, (weights, X, y), bounds=BOUNDS)


@jax.jit
@jax.vmap
def analyse(X, y):
    """Return estimates, which dispersions are at the bound, standard errors, and influences."""
    weights = jnp.ones(IMAGES)
    solution = fit(weights, X, y)
    H = dl.hessian_operator(loss, solution.value, (weights, X, y), active=solution.active)

    def variance(k):
        unit = {"beta": jnp.zeros(3).at[k].set(1.0), "alpha": jnp.zeros(())}
        return dl.ImplicitAdjoint().solve(H, unit)[0]["beta"][k]

    errors = jnp.sqrt(jax.vmap(variance)(jnp.arange(3)))
    influence = -jax.grad(lambda weights: fit(weights, X, y).value["beta"][1])(weights)
    moves = jax.grad(lambda weights: fit(weights, X, y).value["alpha"])(weights)
    return solution.value, solution.active["alpha"], errors, influence, moves


# What follows checks, compares and draws.

IMAGES = 174  # of the rarest digit


def load():
    """Return features and counts, for each digit and image."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8)
    ink = images / images.sum(axis=(1, 2), keepdims=True)
    rows, columns = np.mgrid[:8, :8]
    y, x = (np.sum(ink * at, axis=(1, 2))[:, None, None] for at in (rows, columns))
    slant = np.sum(ink * (rows - y) * (columns - x), axis=(1, 2))
    width = np.sqrt(np.sum(ink * (columns - x) ** 2, axis=(1, 2)))
    features = np.stack([slant, width], axis=1)
    counts = np.sum(images == 16, axis=(1, 2))
    chosen = [np.flatnonzero(labels == digit)[:IMAGES] for digit in range(10)]
    X, Y = np.stack([features[c] for c in chosen]), np.stack([counts[c] for c in chosen])
    X = (X - X.mean(axis=1, keepdims=True)) / X.std(axis=1, keepdims=True)
    return jnp.asarray(np.concatenate([np.ones((10, IMAGES, 1)), X], axis=2)), jnp.asarray(Y, float)


@jax.jit
def without(X, y, k):
    """Return the slope of a fit without the observation `k`."""
    return fit(jnp.ones(IMAGES).at[k].set(0.0), X, y).value["beta"][1]


def main():
    """Fit, print what was found, check the influences, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part, for tests")
    parser.add_argument("--output", help="where to save the picture")
    options = parser.parse_args()

    X, Y = load()
    values, active, errors, influence, moves = analyse(X, Y)
    print("digit  counts vary by  dispersion  slope by slant")
    for d in range(10):
        ratio = float(jnp.var(Y[d]) / jnp.mean(Y[d]))
        shown = "at its bound" if active[d] else f"{values['alpha'][d]:.3f}"
        slope = f"{values['beta'][d, 1]:6.3f} ± {errors[d, 1]:.3f}"
        print(f"{d:5d}  {ratio:5.2f} x Poisson  {shown:>12s}  {slope}")
    at_bound = np.asarray(active) == -1
    assert 0 < at_bound.sum() < 10
    assert not np.asarray(moves)[at_bound].any()  # no observation moves what its bound holds
    assert np.asarray(moves)[~at_bound].any(axis=1).all()

    digit = 4
    chosen = np.argsort(-np.abs(influence[digit]))[: 5 if options.quick else 60]
    exact = np.array([float(without(X[digit], Y[digit], k)) for k in chosen])
    exact -= float(values["beta"][digit, 1])
    told = np.asarray(influence[digit])[chosen]
    print(f"largest influence on the slope of {digit}: {told[0]:+.4f}, refitted {exact[0]:+.4f}")
    assert np.abs(told - exact).max() <= 0.2 * np.abs(exact).max()
    if options.output:
        draw(Y, values, at_bound, errors, digit, told, exact, options.output)


def draw(Y, values, at_bound, errors, digit, told, exact, path):
    """Save dispersions, slopes and influences."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6))
    ratio = np.asarray(jnp.var(Y, axis=1) / jnp.mean(Y, axis=1))
    for held, name in ((True, "at its bound"), (False, "free")):
        which = at_bound == held
        panels[0].plot(ratio[which], np.asarray(values["alpha"])[which], "o", label=name)
        where = np.arange(10)[which]
        slopes, bars = (np.asarray(v)[which, 1] for v in (values["beta"], errors))
        panels[1].errorbar(where, slopes, 2 * bars, fmt="o", capsize=3)
    panels[0].axvline(1, color="grey", lw=1)
    panels[0].set(xlabel="variance of the counts / Poisson's", ylabel="dispersion")
    panels[0].legend()
    panels[1].axhline(0, color="grey", lw=1)
    panels[1].set(xlabel="digit", ylabel="slope by slant, ± 2 standard errors", xticks=range(10))
    panels[2].plot(exact, told, ".")
    panels[2].axline((0, 0), slope=1, color="grey", lw=1)
    panels[2].set(xlabel="change of the slope, refitted", ylabel="predicted by the derivative")
    panels[2].set_title(f"leaving out images of {digit}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
