"""A traced function that equals another one if it computes the same.

The user's objective is traced anew at every call, so that nothing it reads can go stale. Compiled
programs are looked up by what was traced: a loop without `jit` compiles once, and a changed global
compiles again.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.extend import core
from jaxtyping import Array, PyTree


class Program:
    """A jaxpr and the structure of its output; immutable, and compared by content."""

    def __init__(self, jaxpr: core.ClosedJaxpr, structure: Any, static: PyTree):
        self.jaxpr = jaxpr
        self.structure = structure
        self.static = static

    def __call__(self, consts: PyTree, *args: Array) -> PyTree:
        """Run the program."""
        out = core.jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(consts), *args)
        return eqx.combine(jax.tree.unflatten(self.structure, out), self.static)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Program)
            and self.structure == other.structure
            and _same(self.static, other.static)
            and _same(self.jaxpr, other.jaxpr)
        )

    def __hash__(self) -> int:
        return hash((self.structure, tuple(eqn.primitive.name for eqn in self.jaxpr.jaxpr.eqns)))


def trace(fun: Callable, *args: Array) -> tuple[Program, PyTree]:
    """Trace `fun`; return the program and the arrays that it closed over.

    It is traced twice: a jaxpr may carry the arrays that it closes over, and in the second one they
    are arguments.

    Raises:
        ValueError: if it talks to other devices or lanes, or `jax.shard_map` is to check its types.
    """
    closed, dynamic, static = eqx.filter_make_jaxpr(fun)(*args)
    consts = list(closed.consts)
    _check_alone(closed, [*consts, *args])

    def opened(consts, *args):
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))(*args)

    jaxpr = jax.make_jaxpr(opened)(consts, *args)
    return Program(jaxpr, jax.tree.structure(dynamic), static), consts


def _check_alone(closed: core.ClosedJaxpr, inputs: list) -> None:
    """Raise a `ValueError` unless the function can be minimized on one device, in one lane."""
    axes = {getattr(effect, "name", effect) for effect in closed.effects if _is_of_axis(effect)}
    if axes:
        raise ValueError(
            f"the objective uses the axis {_listed(axes)} of a jax.shard_map or jax.vmap around "
            "the solve. Derivatives of what devices or lanes exchange there are not those of one "
            "objective, and solves that end earlier would let the others wait for ever. Put "
            "jax.shard_map inside the objective, or give sharded arrays to a solve under jax.jit."
        )
    kinds = [getattr(jax.typeof(leaf), "manual_axis_type", None) for leaf in inputs]
    if axes := {axis for kind in kinds for axis in getattr(kind, "varying", ())}:
        raise ValueError(
            f"the solve varies over the axis {_listed(axes)} of jax.shard_map, which the loops in "
            "Optax do not declare. Pass check_vma=False to jax.shard_map."
        )


def _is_of_axis(effect: Any) -> bool:
    return type(effect).__name__ == "NamedAxisEffect"


def _listed(axes: set) -> str:
    return ", ".join(sorted(map(repr, axes)))


def contains(jaxpr: core.Jaxpr, primitive: str) -> bool:
    """Return whether the program calls the primitive of this name."""
    inner = core.subjaxprs(jaxpr)
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    return primitive in names or any(contains(part, primitive) for part in inner)


def _same(a: Any, b: Any) -> bool:
    """Return whether two values of jaxpr parameters certainly mean the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, core.Jaxpr | core.ClosedJaxpr):
        consts, others = getattr(a, "consts", ()), getattr(b, "consts", ())
        inner: Any = getattr(a, "jaxpr", a)
        return _same(consts, others) and _same_jaxpr(inner, getattr(b, "jaxpr", b))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, jax.Array | np.ndarray):
        return False  # not the same object: not worth a comparison
    if isinstance(a, float | complex | np.generic):
        return repr(a) == repr(b)  # tells 0.0 from -0.0, and NaN is NaN
    try:
        return bool(a == b)
    except Exception:  # a parameter without a truth value is a parameter we do not know
        return False


def _same_jaxpr(a: core.Jaxpr, b: core.Jaxpr) -> bool:
    """Return whether two jaxprs are the same but for the names of their variables."""
    names: dict[Any, Any] = {}

    def bind(some, others):
        names.update(zip(some, others, strict=False))
        return len(some) == len(others) and all(
            x.aval == y.aval for x, y in zip(some, others, strict=True)
        )

    def refer(some, others):
        return len(some) == len(others) and all(map(same_atom, some, others))

    def same_atom(x, y):
        if isinstance(x, core.Literal) or isinstance(y, core.Literal):
            return (
                isinstance(x, core.Literal)
                and isinstance(y, core.Literal)
                and x.aval == y.aval
                and np.asarray(x.val).tobytes() == np.asarray(y.val).tobytes()
            )
        return names.get(x) is y

    return (
        len(a.eqns) == len(b.eqns)
        and a.effects == b.effects
        and bind(a.constvars, b.constvars)
        and bind(a.invars, b.invars)
        and all(
            x.primitive is y.primitive
            and refer(x.invars, y.invars)
            and _same(x.params, y.params)
            and bind(x.outvars, y.outvars)
            for x, y in zip(a.eqns, b.eqns, strict=True)
        )
        and refer(a.outvars, b.outvars)
    )
