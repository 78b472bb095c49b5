"""The user's bounds, read: numbers, PyTrees and prefixes in, two vectors out."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from difflbfgs import _vector
from difflbfgs._box import Bounds, Box
from difflbfgs._problem import Variables, split_theta
from difflbfgs._program import trace

_FORM = (
    "Pass bounds=(lower, upper), each None, a number for all variables, or a PyTree like x0 or a "
    "prefix of it; for SciPy's list of pairs that is (jnp.array(lowers), jnp.array(uppers))."
)


def make_bounds(bounds: Any, theta: PyTree, variables: Variables, x0: PyTree) -> Bounds:
    """Read `(lower, upper)`, or a function from `theta` to that.

    Raises:
        TypeError: if it is not a pair of what bounds may be.
        ValueError: if bounds are crossed or NaN, do not fit their leaf, or are of a leaf that is
            complex or no variable.
    """
    of_theta = bounds if callable(bounds) else lambda _: bounds
    leaves, structure, static = split_theta(theta)

    def box(*leaves):
        pair = of_theta(eqx.combine(structure.unflatten(leaves), static))
        return _read(pair, variables, x0)

    _check_order(box(*leaves))
    program, consts = trace(box, *leaves)
    return Bounds(program, consts)


def _read(pair: Any, variables: Variables, x0: PyTree) -> Box:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"bounds must be a pair (lower, upper), got {pair!r}. {_FORM}")
    if all(isinstance(side, tuple | list) and len(side) == 2 for side in pair) and not isinstance(
        x0, tuple | list
    ):
        raise TypeError(f"bounds look like SciPy's list of pairs, got {pair!r}. {_FORM}")
    lower, upper = (
        variables.to_vector(_like(side, x0, name, limit))
        for side, name, limit in zip(pair, ("lower", "upper"), (-jnp.inf, jnp.inf), strict=True)
    )
    return Box(lower, upper)


def _like(side: PyTree, x0: PyTree, name: str, limit: float) -> PyTree:
    """Return bounds of one side in the structure of `x0`, infinite where there is none."""
    leaves, structure = jax.tree.flatten(side, is_leaf=_is_none)
    try:
        parts = structure.flatten_up_to(x0)
    except ValueError as error:
        raise ValueError(
            f"the {name} bounds have the structure {structure}, which is no prefix of that of x0, "
            f"{jax.tree.structure(x0)}. {_FORM}"
        ) from error
    return structure.unflatten(
        [_part(bound, part, name, limit) for bound, part in zip(leaves, parts, strict=True)]
    )


def _part(bound: Any, part: PyTree, name: str, limit: float) -> PyTree:
    """Return the bounds of a leaf of `x0`, or of all variables in a part of it."""
    alone = jax.tree_util.all_leaves([part], is_leaf=_is_none)

    def read(leaf):
        if not _vector.is_inexact(leaf):
            if bound is None or bound is leaf or not alone or _equal(bound, leaf):
                return leaf
            raise ValueError(
                f"the {name} bounds have {bound!r} for the leaf {leaf!r} of x0, which is no "
                "variable. Write None there."
            )
        like = jnp.asarray(leaf)
        if bound is None:
            none = jnp.full(like.shape, limit, jnp.finfo(like.dtype).dtype)
            return jax.lax.complex(none, none) if jnp.iscomplexobj(like) else none
        return _broadcast(bound, like, name)

    return jax.tree.map(read, part, is_leaf=_is_none)


def _broadcast(bound: Any, leaf: Array, name: str) -> Array:
    if not _vector.is_inexact(bound) and not isinstance(
        bound, int | np.integer | jax.Array | np.ndarray
    ):
        raise TypeError(f"the {name} bounds have {bound!r} for a variable. {_FORM}")
    if isinstance(bound, bool) or jnp.iscomplexobj(bound):
        raise TypeError(f"the {name} bounds must be real numbers, got {bound!r}. {_FORM}")
    if jnp.iscomplexobj(leaf):
        raise ValueError(
            f"the {name} bounds have {bound!r} for a complex variable, and complex numbers have no "
            "order. Write None there, or minimize over real and imaginary part."
        )
    try:
        return jnp.broadcast_to(jnp.asarray(bound).astype(leaf.dtype), leaf.shape)
    except ValueError as error:
        raise ValueError(
            f"the {name} bounds have shape {jnp.shape(bound)} for a variable of shape "
            f"{leaf.shape}, and do not broadcast to it. Pass a number, or that shape."
        ) from error


def _check_order(box: Box) -> None:
    """Raise a `ValueError` if the bounds are known and cross, or are not a number."""
    pairs = zip(jax.tree.leaves(box.lower), jax.tree.leaves(box.upper), strict=True)
    for lower, upper in pairs:
        if isinstance(lower, Tracer) or isinstance(upper, Tracer):
            continue
        wrong = np.asarray(~(lower <= upper)).ravel()
        if wrong.any():
            k = int(np.argmax(wrong))
            found = float(lower.ravel()[k]), float(upper.ravel()[k])
            raise ValueError(
                f"bounds must have lower <= upper, got {found[0]} and {found[1]} for a variable "
                f"({int(wrong.sum())} of {wrong.size}). Swap them, or use None where there is none."
            )


def _equal(bound: Any, leaf: Any) -> bool:
    try:
        return bool(bound == leaf)
    except Exception:
        return False


def _is_none(leaf: Any) -> bool:
    return leaf is None
