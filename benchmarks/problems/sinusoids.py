"""iMAML's tasks: a network 1-40-40-1 is fitted to ten points of a sinusoid, in float64.

A proximal term ties its weights to meta-parameters; ten other points validate it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

jax.config.update("jax_enable_x64", True)
PROXIMAL = 2.0
MOST = 1024


def initial():
    """Return meta-parameters."""
    rng = np.random.default_rng(0)
    shapes = ((1, 40), (40,), (40, 40), (40,), (40, 1), (1,))
    return [jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0])) for shape in shapes]


META, RESTORE = ravel_pytree(initial())


def network(w, x):
    """Return the network's values at the points `x`."""
    A, a, B, b, C, c = RESTORE(w)
    return jnp.tanh(jnp.tanh(x @ A + a) @ B + b) @ C + c


def inner(w, theta):
    """Return the training loss of one task with its proximal term."""
    meta, (x, y) = theta
    return jnp.mean((network(w, x) - y) ** 2) + PROXIMAL / 2 * jnp.sum((w - meta) ** 2)


def outer(w, query):
    """Return the validation loss of one task."""
    x, y = query
    return jnp.mean((network(w, x) - y) ** 2)


def tasks(count):
    """Return training and validation points of the first `count` sinusoids."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.uniform(-5, 5, (MOST, 20, 1)))
    amplitude, phase = rng.uniform(0.1, 5, (MOST, 1, 1)), rng.uniform(0, np.pi, (MOST, 1, 1))
    y = amplitude * jnp.sin(x + phase)
    every = (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])
    return jax.tree.map(lambda leaf: leaf[:count], every)
