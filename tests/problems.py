"""Problems with closed forms, and the tolerances of all tests.

The minimizers move with `theta`, and the cross derivatives are neither symmetric nor square.
"""

import jax
import jax.numpy as jnp
import numpy as np

import difflbfgs as dl

TIGHT = dl.LBFGS(rtol=1e-12)


def tolerance(dtype, factor):
    """Return `factor` times the dtype's machine epsilon: the one place tolerances come from."""
    return factor * float(jnp.finfo(dtype).eps)


def relative_error(found, exact):
    """Return the relative error in the 2-norm, over all leaves."""
    found, exact = (
        jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (found, exact)
    )
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


_rng = np.random.default_rng(0)
X = jnp.asarray(_rng.normal(size=(40, 5)))
Y = jnp.asarray(_rng.normal(size=40))
C = jnp.asarray(_rng.normal(size=5))
# Three hyperparameters for five weights, mixed by a matrix: nothing square, nothing symmetric.
MIX = jnp.asarray(_rng.normal(size=(5, 3)))
THETA = jnp.asarray([-1.0, 0.3, -0.4])


def ridge(w, theta):
    """½ mean (Xw - y)² + ½ Σ exp((Mθ)_j) w_j²."""
    X_, Y_, penalty = X.astype(w.dtype), Y.astype(w.dtype), jnp.exp(MIX.astype(w.dtype) @ theta)
    return 0.5 * jnp.mean((X_ @ w - Y_) ** 2) + 0.5 * jnp.sum(penalty * w**2)


def ridge_solution(theta):
    """Return the minimizer of `ridge`."""
    return jnp.linalg.solve(X.T @ X / 40 + jnp.diag(jnp.exp(MIX @ theta)), X.T @ Y / 40)


def outer(w):
    """Return an outer loss without symmetry."""
    return jnp.sum(jnp.sin(w) * C.astype(w.dtype))


def quadratic(condition, n=20, seed=1):
    """Return `f(x, θ) = ½ xᵀA(θ)x - b(θ)ᵀx` and its minimizer, `A` of this condition number."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = jnp.asarray(q @ np.diag(np.logspace(0, np.log10(condition), n)) @ q.T)
    a = (a + a.T) / 2
    m = jnp.asarray(rng.normal(size=(n, 4)))
    k = jnp.asarray(rng.normal(size=(n, 4)))

    def scale(theta):
        return jnp.exp(0.1 * jnp.tanh(k @ theta))

    def fun(x, theta):
        z = scale(theta).astype(x.dtype) * x
        b = (m @ theta).astype(x.dtype)
        return 0.5 * z @ (a.astype(x.dtype) @ z) - b @ z

    def solution(theta):
        return jnp.linalg.solve(a, m @ theta) / scale(theta)

    return fun, solution, jnp.asarray(rng.normal(size=4))


@jax.custom_jvp
def inexact(f, size, k):
    """Make a value wrong by a part of it that depends on `k`, and leave its derivatives exact."""
    return f * (1 + size * jnp.sin(1e9 * k))


inexact.defjvp(lambda primals, tangents: (inexact(*primals), tangents[0]))


@jax.custom_vjp
def _double(g):
    return 2 * g


@jax.custom_vjp
def stubborn_square(x):
    """Return `x²`, whose gradient JAX can't differentiate in forward mode: it has no products."""
    return x**2


_double.defvjp(lambda g: (2 * g, None), lambda _, h: (2 * h,))
stubborn_square.defvjp(lambda x: (x**2, x), lambda x, g: (_double(x) * g,))
