"""What a vector is: any PyTree of real arrays of one dtype.

With `flatten=True` it is one flat array, with `flatten=False` a list of leaves; nothing above this
module needs to know which. Sums, products and selections are `optax.tree`'s.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

Vector: TypeAlias = PyTree[Float[Array, "..."]]
Scalar: TypeAlias = Float[Array, ""]
Count: TypeAlias = Int[Array, ""]
Flag: TypeAlias = Bool[Array, ""]


def norm(x: Vector) -> Scalar:
    """Return the 2-norm of `x`, free of overflow and underflow; not finite if an entry is not."""
    leaves = jax.tree.leaves(x)
    largest = jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]).max()
    unit = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(sum(jnp.sum((leaf / unit) ** 2) for leaf in leaves))


def is_zero(x: Vector) -> Flag:
    """Return whether every entry of `x` is exactly zero."""
    return jnp.stack([jnp.all(leaf == 0) for leaf in jax.tree.leaves(x)]).all()


def size(x: Vector) -> int:
    """Return the number of entries of `x`."""
    return sum(leaf.size for leaf in jax.tree.leaves(x))


def is_inexact(leaf: Any) -> bool:
    """Return whether `leaf` is a floating-point or complex array or Python number."""
    kinds = (jax.Array, np.ndarray, np.generic, float, complex)
    return isinstance(leaf, kinds) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def dtype(x: Vector) -> jnp.dtype:
    """Return the dtype that all entries of `x` share."""
    return jax.tree.leaves(x)[0].dtype


def epsilon(x: Vector) -> float:
    """Return the spacing of floating-point numbers at 1 in the dtype of `x`."""
    return float(jnp.finfo(dtype(x)).eps)
