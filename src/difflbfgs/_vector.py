"""What a vector is: any PyTree of real arrays of one dtype.

With `flatten=True` it is one flat array, with `flatten=False` a list of leaves; nothing above this
module needs to know which. Most of what follows is `optax.tree`, with types.
"""

import functools
from typing import Any, TypeAlias, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

Vector: TypeAlias = PyTree[Float[Array, "..."]]
Scalar: TypeAlias = Float[Array, ""]
Count: TypeAlias = Int[Array, ""]
Flag: TypeAlias = Bool[Array, ""]


_T = TypeVar("_T")


def dot(x: Vector, y: Vector) -> Scalar:
    """Return `xᵀy`."""
    return jnp.asarray(optax.tree.vdot(x, y))


def sub(x: _T, y: _T) -> _T:
    """Return `x - y`."""
    return cast(Any, optax.tree.sub(x, y))


def scale(factor: Any, x: _T) -> _T:
    """Return `factor · x`."""
    return cast(Any, optax.tree.scale(factor, x))


def add_scaled(x: _T, factor: Any, y: _T) -> _T:
    """Return `x + factor · y`."""
    return cast(Any, optax.tree.add_scale(x, factor, y))


@overload
def where(condition: Flag, x: float, y: Array) -> Array: ...
@overload
def where(condition: Flag, x: Array, y: float) -> Array: ...
@overload
def where(condition: Flag, x: _T, y: _T) -> _T: ...
def where(condition: Flag, x: Any, y: Any) -> Any:
    """Return `x` or `y`, each any PyTree of arrays; as one instruction for each leaf."""

    def select(a, b):
        if not isinstance(a, jax.Array) and not isinstance(b, jax.Array):
            return jnp.where(condition, a, b)  # two numbers, whose dtype is still open
        kind = jnp.result_type(a, b)
        a, b = jnp.broadcast_arrays(jnp.asarray(a, kind), jnp.asarray(b, kind))
        return jax.lax.select(condition, a, b)

    return jax.tree.map(select, x, y)


def mul(x: _T, y: _T) -> _T:
    """Return the product of `x` and `y`, entry by entry."""
    return jax.tree.map(jnp.multiply, x, y)


def zeros_like(x: _T) -> _T:
    """Return zeros in the structure of `x`."""
    return cast(Any, optax.tree.zeros_like(x))


def norm(x: Vector) -> Scalar:
    """Return the 2-norm of `x`, free of overflow and underflow; not finite if an entry is not."""
    leaves = jax.tree.leaves(x)
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves))
    unit = nonzero(largest)
    return largest * jnp.sqrt(sum(jnp.sum((leaf / unit) ** 2) for leaf in leaves))


def nonzero(length: Scalar) -> Scalar:
    """Return a length to divide by: 1 instead of 0."""
    return jnp.where(length > 0, length, 1)


def signs(like: Array) -> Array:
    """Return ones of both signs, in a fixed pattern that no period matches.

    The first two differ, and random ones of a short array may not.
    """
    k = jax.lax.iota(jnp.uint32, like.size).reshape(like.shape)
    return jnp.where(jax.lax.population_count(k) % 2 == 0, 1, -1).astype(like.dtype)


def rademacher(like: Vector, number: Any) -> Vector:
    """Return a vector of random signs, always the same one for each number.

    They are a hash of their place, the finalizer of A. Appleby's MurmurHash3: in a program a tenth
    of a random generator of JAX.
    """
    leaves, structure = jax.tree.flatten(like)
    number = jnp.asarray(number, jnp.uint32) * len(leaves)

    def of_leaf(i, leaf):
        hashed = (number + i + 1) * np.uint32(0x9E3779B9)
        for d, size in enumerate(leaf.shape):
            place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, d)
            hashed = hashed * np.uint32(size) + place
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            hashed = (hashed ^ (hashed >> shift)) * np.uint32(factor)
        return jnp.where(hashed >> 31 == 0, 1, -1).astype(leaf.dtype)

    return structure.unflatten([of_leaf(i, leaf) for i, leaf in enumerate(leaves)])


def unit(x: _T) -> _T:
    """Return `x / ‖x‖`, or zero if `x` is zero."""
    length = nonzero(norm(x))
    return jax.tree.map(lambda leaf: leaf / length, x)


def is_zero(x: Vector) -> Flag:
    """Return whether every entry of `x` is exactly zero."""
    return jnp.stack([jnp.all(leaf == 0) for leaf in jax.tree.leaves(x)]).all()


def is_equal(x: PyTree, y: PyTree) -> Flag:
    """Return whether every entry of `x` is equal to that of `y`, NaN to nothing."""
    same = jax.tree.map(lambda x, y: jnp.all(x == y), x, y)
    return jnp.stack(jax.tree.leaves(same)).all()


def is_alike(x: PyTree, y: PyTree) -> bool:
    """Return whether `x` and `y` differ in their entries only."""
    kinds = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), z) for z in (x, y)]
    return kinds[0] == kinds[1]


def size(x: Vector) -> int:
    """Return the number of entries of `x`."""
    return sum(leaf.size for leaf in jax.tree.leaves(x))


def is_inexact(leaf: Any) -> bool:
    """Return whether `leaf` is a floating-point or complex array or Python number."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return jnp.issubdtype(leaf.dtype, jnp.inexact)
    return isinstance(leaf, float | complex)


def dtype(x: Vector) -> jnp.dtype:
    """Return the dtype that all entries of `x` share."""
    return jax.tree.leaves(x)[0].dtype


def epsilon(x: Vector) -> float:
    """Return the spacing of floating-point numbers at 1 in the dtype of `x`."""
    return float(jnp.finfo(dtype(x)).eps)
