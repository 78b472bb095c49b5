"""Bilevel problems of any size, made up, in float64."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from .collection import Problem


def smoothing(n: int) -> Problem:
    """Smooth a noisy step signal with a pseudo-Huber penalty on its differences."""
    rng = np.random.default_rng(0)
    clean = np.repeat(rng.normal(size=-(-n // 25)), 25)[:n]
    data, target = jnp.asarray(clean + 0.3 * rng.normal(size=n)), jnp.asarray(clean)

    def inner(x, theta):
        weight, width = jnp.exp(theta)
        jumps = jnp.sqrt(1 + ((x[1:] - x[:-1]) / width) ** 2) - 1
        return (jnp.sum((x - data) ** 2) / 2 + weight * width**2 * jnp.sum(jumps)) / n

    def outer(x, theta):
        return jnp.mean((x - target) ** 2)

    return Problem(inner, outer, jnp.zeros(n), jnp.asarray([1.0, -1.0]))


def logistic(samples: int, groups: int | None = None) -> Problem:
    """Fit a logistic regression in 20 variables, with group weights or else with weight decays."""
    rng = np.random.default_rng(0)
    X, Xv = jnp.asarray(rng.normal(size=(samples, 20))), jnp.asarray(rng.normal(size=(1000, 20)))
    truth = rng.normal(size=20)
    y, yv = (jnp.sign(A @ truth + rng.normal(size=len(A))) for A in (X, Xv))
    group = jnp.arange(samples) % (groups or 1)

    def inner(w, theta):
        losses = jax.nn.softplus(-y * (X @ w))
        if groups:
            return jnp.mean(jax.nn.sigmoid(theta)[group] * losses) + 5e-3 * jnp.sum(w**2)
        return jnp.mean(losses) + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean(jax.nn.softplus(-yv * (Xv @ w)))

    return Problem(inner, outer, jnp.zeros(20), jnp.full(groups or 20, 0.0 if groups else -4.0))


def _sine(x, theta):
    return jnp.sum(jnp.sin(x))


def softmax_regression(n: int) -> Problem:
    """Softmax regression: ten classes, `n / 10` features, 500 samples."""
    features, rng = n // 10, np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(500, features)) / np.sqrt(features))
    y = jnp.asarray(rng.integers(0, 10, size=500))

    def inner(w, theta):
        log_p = jax.nn.log_softmax(x @ w.reshape(features, 10))
        return -jnp.mean(log_p[jnp.arange(500), y]) + 0.5 * jnp.exp(theta) @ w**2

    return Problem(inner, _sine, jnp.zeros(n), jnp.full(n, -5.0))


def proximal_network(n: int) -> Problem:
    """One hidden layer, 100 samples, a proximal term."""
    hidden, rng = n // 10, np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(100, 8))), jnp.asarray(rng.normal(size=100))

    def inner(w, theta):
        first, bias, last = jnp.split(w, [8 * hidden, 9 * hidden])
        out = jnp.tanh(x @ first.reshape(8, hidden) + bias) @ last
        return jnp.mean((out - y) ** 2) + jnp.sum((w - theta) ** 2)

    return Problem(inner, _sine, jnp.zeros(n), 0.3 * jnp.asarray(rng.normal(size=n)))


def ill_conditioned_quadratic(n: int) -> Problem:
    """A quadratic of condition 1e6, rotated."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = jnp.asarray(q @ np.diag(np.logspace(-6, 0, n)) @ q.T)

    def inner(x, theta):
        return 0.5 * x @ (a @ x) - jnp.sin(theta) @ (a @ x)

    return Problem(inner, _sine, jnp.zeros(n), jnp.asarray(rng.normal(size=n)))


def differential_equation() -> Problem:
    """Fit a damped oscillator with a network of 40 weights in its right-hand side."""
    times = jnp.linspace(0, 5, 20)
    data = jnp.exp(-times / 5) * jnp.cos(times)

    def simulated(w):
        first, bias, last = w[:16].reshape(2, 8), w[16:24], w[24:].reshape(8, 2)

        def slope(t, state, _):
            return jnp.tanh(state @ first + bias) @ last

        solution: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Tsit5(),
            0.0,
            5.0,
            0.1,
            jnp.asarray([1.0, 0.0]),
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
            adjoint=diffrax.DirectAdjoint(),
            max_steps=64,
        )
        return solution.ys[:, 0]

    def inner(w, theta):
        return jnp.mean((simulated(w) - data) ** 2) + jnp.exp(theta[0]) * jnp.sum(w**2)

    def outer(w, theta):
        return jnp.sum(w**4)

    start = 0.5 * np.random.default_rng(0).normal(size=40)
    return Problem(inner, outer, jnp.asarray(start), jnp.asarray([-4.0]))


def quartic_chain(x: jax.Array, _: Any = None) -> jax.Array:
    """Return `Σ (x_i - 1)² + (x_{i+1} - x_i)⁴`, well conditioned and never quite solved."""
    return jnp.sum((x - 1) ** 2) + jnp.sum((x[1:] - x[:-1]) ** 4)
