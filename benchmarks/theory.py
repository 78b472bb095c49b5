"""The order of the error: hypergradients against the distance to the minimizer, log-log.

    python benchmarks/theory.py [--quick] [--results file.json] [--output theory.png]

An implicit gradient at a point `x` is wrong by `O(‖x - x*‖)` (Blondel et al. 2022, theorem 1), and
after one Newton step by `O(‖x - x*‖²)` (Ye, Peyré, Cremers and Ablin 2024); so is, but for a factor
that grows with the number of steps, the gradient of unrolled gradient descent: order one.
Measured with a robust regression (digits: odd or even?) and logistic regression (breast cancer),
one penalty for each feature, float64. (On a quadratic objective one Newton step leaves no error at
all.) The slopes are fitted by least squares where the error is between rounding and 30 %, printed,
and asserted: within 0.15 of 1 and within 0.25 of 2.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import difflbfgs as dl
import harness
from collection import Problem, digits, exact_hypergradient, logistic_regression

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

ROUNDING, COARSE = 1e-12, 0.3


def parity_regression():
    """Return a robust regression, one penalty for each pixel: is the digit odd or even?"""
    X, y, Xv, yv = digits(600, 600, jnp.float64)
    sign, sign_v = jnp.asarray(2.0 * (y % 2) - 1), jnp.asarray(2.0 * (yv % 2) - 1)

    def inner(w, theta):
        error = jnp.mean(jnp.sqrt(1 + (X @ w - sign) ** 2))
        return error + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean((Xv @ w - sign_v) ** 2)

    return Problem(inner, outer, jnp.zeros(64), jnp.full(64, -4.0))


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


def main():
    """Measure, print the slopes, draw, and assert."""
    options = harness.options(__doc__)
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
    harness.record(options.results, rows, options.quick)
    if options.output:
        figure.savefig(options.output, dpi=130)


if __name__ == "__main__":
    main()
