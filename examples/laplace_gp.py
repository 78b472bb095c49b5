"""Learn the kernel of a Gaussian process classifier from its Laplace evidence.

The labels `y = ±1` of two interleaved moons have the likelihood `Π 1/(1 + exp(-y_i f_i))`, and
`f = L z` is a Gaussian process with the kernel matrix `K = L Lᵀ` (amplitude, length scale and
jitter). The inner problem finds the mode of the whitened variables `z`,

    z*(θ) = argmin_z  Ψ(z, θ) = Σ_i log(1 + exp(-y_i f_i)) + ½ ‖z‖²,

and the outer problem minimizes the negative logarithm of Laplace's approximation of the evidence,

    F(θ) = Ψ(z*, θ) + ½ log det H,    H = ∇²Ψ(z*, θ) = I + Lᵀ W L.

`H` depends on `θ` also through the mode, a term that textbooks derive by hand from third
derivatives (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 5.5.1).
Here the implicit derivative supplies it. At the end `H⁻¹`, the covariance of `z`, is compared with
what L-BFGS remembers of it, `inverse_hessian_operator`.

    python examples/laplace_gp.py [--quick] [--output laplace_gp.png]
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.optimize
from sklearn.datasets import make_moons

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

JITTER = 1e-4


def load():
    """Return points and labels -1 and 1, for training and for testing."""
    X, y = make_moons(600, noise=0.3, random_state=0)
    X, y = jnp.asarray(X), 2.0 * jnp.asarray(y) - 1
    return (X[:120], y[:120]), (X[120:], y[120:])


(X, Y), TEST = load()
START = {"amplitude": jnp.asarray(0.0, float), "length": jnp.asarray(1.0, float)}


def kernel(a, b, theta):
    """Return the squared exponential kernel; both parameters are logarithms."""
    distances = jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)
    return jnp.exp(2 * theta["amplitude"] - distances * jnp.exp(-2 * theta["length"]) / 2)


def factor(theta):
    """Return the Cholesky factor of the kernel matrix."""
    scale = jnp.exp(2 * theta["amplitude"])
    return jnp.linalg.cholesky(kernel(X, X, theta) + JITTER * scale * jnp.eye(len(X)))


def energy(z, inputs):
    """Return the negative logarithm of the joint density, up to a constant."""
    return jnp.sum(jax.nn.softplus(-Y * (inputs @ z))) + z @ z / 2


def precision(z, L):
    """Return the Hessian of the energy."""
    p = jax.nn.sigmoid(L @ z)
    return jnp.eye(len(z)) + L.T @ ((p * (1 - p))[:, None] * L)


def mode(L, memory_size=10):
    """Return the solution of the inner problem."""
    # The memory serves as a covariance, so L-BFGS goes all the way, for more pairs.
    solver = dl.LBFGS(rtol=1e-11, memory_size=memory_size, polish=0)
    return dl.minimize(energy, jnp.zeros(len(X)), L, solver=solver)


def laplace(z, theta):
    """Return the negative logarithm of the approximate evidence at given `z`."""
    L = factor(theta)
    return energy(z, L) + jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(precision(z, L)))))


@jax.jit
@jax.value_and_grad
def evidence(theta):
    """Return the outer objective, and by the decorator its derivative."""
    return laplace(mode(factor(theta)).value, theta)


# What follows learns, predicts, checks and draws.


def learn(max_steps):
    """Minimize over two parameters by SciPy, which sees nothing of the inner level."""
    names, history = list(START), []

    def fun(values):
        value, gradient = evidence({name: jnp.asarray(values[k]) for k, name in enumerate(names)})
        return float(value), np.array([float(gradient[name]) for name in names])

    def show(intermediate_result):
        history.append(intermediate_result.fun)
        print(f"outer step {len(history) - 1:2d}: negative log evidence {history[-1]:.6f}")

    start = np.array([float(START[name]) for name in names])
    history.append(fun(start)[0])
    options = {"maxiter": max_steps}
    found = scipy.optimize.minimize(
        fun, start, jac=True, method="L-BFGS-B", callback=show, options=options
    )
    return {name: jnp.asarray(value) for name, value in zip(names, found.x, strict=True)}, history


@jax.jit
def predict(points, theta, L, z):
    """Return the probability of the label 1, and the variance of the latent function."""
    across = jax.scipy.linalg.solve_triangular(L, kernel(X, points, theta), lower=True)
    outside = jnp.exp(2 * theta["amplitude"]) - jnp.sum(across**2, axis=0)
    variance = outside + jnp.sum(across * jnp.linalg.solve(precision(z, L), across), axis=0)
    return jax.nn.sigmoid(across.T @ z / jnp.sqrt(1 + jnp.pi * variance / 8)), variance


@functools.partial(jax.jit, static_argnames="memory_sizes")
def fit(theta, memory_sizes):
    """Return the factor of the kernel matrix, the mode, and the covariances found by L-BFGS."""
    L = factor(theta)
    solutions = {memory_size: mode(L, memory_size) for memory_size in memory_sizes}
    covariances = {
        memory_size: dl.inverse_hessian_operator(solution.state).as_matrix()
        for memory_size, solution in solutions.items()
    }
    return L, solutions[memory_sizes[0]].value, covariances


def check_gradient(theta, memory_sizes):
    """Return the relative errors of the hypergradient with and without the mode's derivative."""
    h, differences = 1e-3, []
    for name in theta:
        f = [float(evidence({**theta, name: theta[name] + k * h})[0]) for k in (-2, -1, 1, 2)]
        differences.append((f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h))
    z = fit(theta, memory_sizes)[1]
    errors = []
    for gradient in (evidence(theta)[1], jax.jit(jax.grad(laplace, argnums=1))(z, theta)):
        found = np.array([float(gradient[name]) for name in theta])
        errors.append(np.linalg.norm(found - differences) / np.linalg.norm(differences))
    return errors


def compare_covariances(L, z, covariances):
    """Return the posterior variances at the data: exact, and those of L-BFGS by memory size."""
    exact = np.asarray(jnp.diag(L @ jnp.linalg.inv(precision(z, L)) @ L.T))
    found = {size: np.asarray(jnp.diag(L @ P @ L.T)) for size, P in covariances.items()}
    prior = np.asarray(jnp.diag(L @ L.T))
    rows = {f"L-BFGS, {size} pairs": variances for size, variances in found.items()}
    for name, variances in {**rows, "the prior": prior}.items():
        ratio = variances / exact
        print(
            f"variances of {name}: {np.median(ratio):.2f} times the exact ones (median), "
            f"{ratio.min():.2f} to {ratio.max():.2f}"
        )
    return exact, found


def draw(path, mesh, plane, history, exact, found):
    """Save probabilities and latent deviation over the plane, the evidence and the variances."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6), layout="constrained")
    (u, v), (probability, variance) = mesh, plane
    panels = (
        (axes[0, 0], probability, "probability of a red moon", "RdBu_r", np.linspace(0, 1, 21)),
        (
            axes[0, 1],
            jnp.sqrt(variance),
            "standard deviation of the latent function",
            "viridis",
            20,
        ),
    )
    for axis, values, title, colours, levels in panels:
        values = np.asarray(values).reshape(u.shape)
        filled = axis.contourf(u, v, values, levels=levels, cmap=colours, alpha=0.8)
        figure.colorbar(filled, ax=axis)
        axis.contour(u, v, np.asarray(probability).reshape(u.shape), levels=[0.5], colors="k")
        for label, colour in ((-1, "tab:blue"), (1, "tab:red")):
            chosen = np.asarray(X[label == Y])
            axis.scatter(chosen[:, 0], chosen[:, 1], s=14, c=colour, edgecolors="w", linewidths=0.4)
        axis.set_title(title)
    axes[1, 0].plot(history, "o-")
    axes[1, 0].set_xlabel("outer step")
    axes[1, 0].set_ylabel("negative log evidence (Laplace)")
    for memory_size, variances in found.items():
        axes[1, 1].loglog(exact, variances, ".", label=f"L-BFGS, {memory_size} pairs")
    axes[1, 1].loglog([exact.min(), exact.max()], [exact.min(), exact.max()], "k-", lw=0.8)
    axes[1, 1].set_xlabel("posterior variance at the data, exact Laplace")
    axes[1, 1].set_ylabel("from the memory of L-BFGS")
    axes[1, 1].legend(frameon=False)
    for axis in axes[1]:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"saved {path}")


def main():
    """Check the gradient, learn the kernel, look at predictions and covariances, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    parser.add_argument("--output", default="laplace_gp.png", help="where to save the PNG")
    options = parser.parse_args()
    memory_sizes = (40,) if options.quick else (40, 10)
    error, frozen = check_gradient(START, memory_sizes)
    print(f"hypergradient against central differences: relative error {error:.0e}")
    print(f"without the derivative of the mode: {frozen:.0e}\n")
    theta, history = learn(3 if options.quick else 30)
    L, z, covariances = fit(theta, memory_sizes)
    mesh = np.meshgrid(np.linspace(-2.5, 3.5, 90), np.linspace(-2, 2.5, 70))
    plane = np.stack([mesh[0].ravel(), mesh[1].ravel()], axis=1)
    points = jnp.concatenate([TEST[0], plane])
    probability, variance = map(np.asarray, predict(points, theta, L, z))
    test, target = probability[: len(TEST[1])], np.asarray(TEST[1]) > 0
    accuracy = np.mean((test > 0.5) == target)
    loss = -np.mean(np.log(np.where(target, test, 1 - test)))
    amplitude, length = (float(jnp.exp(theta[name])) for name in START)
    print(f"amplitude {amplitude:.2f}, length scale {length:.2f}")
    print(f"test accuracy {accuracy:.3f}, negative log probability {loss:.3f}\n")
    exact, found = compare_covariances(L, z, covariances)
    plane = [values[len(target) :] for values in (probability, variance)]
    draw(options.output, mesh, plane, history, exact, found)
    assert error < 1e-7
    assert error < 1e-3 * frozen
    assert history[-1] < history[0]
    assert accuracy > 0.85
    assert np.all(np.abs(np.log(found[40] / exact)) < np.log(3))


if __name__ == "__main__":
    main()
