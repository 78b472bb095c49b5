"""A traced function, and the same one for all functions that compute the same.

The user's objective is traced anew at every call, so that nothing it reads can go stale. Compiled
programs are looked up by what was traced: a loop without `jit` compiles once, and a changed global
compiles again. JAX makes hundreds of comparisons for that, so they are of identity, and those of
contents are made here. Custom derivative rules are compared by what they make of tangents and
cotangents, and so are the custom rules in that, up to the fourth derivative.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jaxtyping import Array, PyTree

_RULED = ("custom_jvp_call", "custom_vjp_call")
_PLAIN = ("call_jaxpr", "num_consts", "symbolic_zeros")  # what these have beside their rule
_ORDER = 4  # of the derivatives that are compared; a solve has two, a derivative of it one more


class _Rules(NamedTuple):
    """To which order of derivatives custom rules are compared, and those traced for that."""

    order: int
    mine: dict
    theirs: dict

    def inner(self) -> "_Rules":
        """Return what is left for the calls inside a rule."""
        return self._replace(order=self.order - 1)


class Program:
    """A jaxpr and the structure of its output; immutable."""

    def __init__(self, jaxpr: core.ClosedJaxpr, structure: Any, static: PyTree):
        self.jaxpr = jaxpr
        self.structure = structure
        self.static = static
        self.rules: dict = {}
        self.outline = tuple(eqn.primitive.name for eqn in jaxpr.jaxpr.eqns)

    def __call__(self, consts: PyTree, *args: Array) -> PyTree:
        """Run the program."""
        out = core.jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(consts), *args)
        return eqx.combine(jax.tree.unflatten(self.structure, out), self.static)

    def is_same(self, other: "Program") -> bool:
        """Return whether both compute the same, as do their derivatives."""
        if self.outline != other.outline or self.structure != other.structure:
            return False
        rules = _Rules(_ORDER, self.rules, other.rules)
        return _same(self.static, other.static, rules) and _same(self.jaxpr, other.jaxpr, rules)


# Those that are in use: compiled programs keep them alive.
_known: weakref.WeakSet[Program] = weakref.WeakSet()
_knowing = threading.RLock()


def _interned(program: Program) -> Program:
    """Return the known program that is the same, or this one, which is then known."""
    with _knowing:
        for known in list(_known):
            if program.is_same(known):
                return known
        _known.add(program)
    return program


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
    program = Program(jaxpr, jax.tree.structure(dynamic), static)
    if not isinstance(jnp.zeros(()), Tracer):  # inside jit nothing is looked up later
        _learn(jaxpr.jaxpr, program.rules, _ORDER)  # now: what a rule reads may change
    return _interned(program), consts


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


def _same(a: Any, b: Any, rules: _Rules) -> bool:
    """Return whether two values of jaxpr parameters certainly mean the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, core.Jaxpr | core.ClosedJaxpr):
        consts, others = getattr(a, "consts", ()), getattr(b, "consts", ())
        inner: Any = getattr(a, "jaxpr", a)
        return _same(consts, others, rules) and _same_jaxpr(inner, getattr(b, "jaxpr", b), rules)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y, rules) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key], rules) for key in a)
    if isinstance(a, jax.Array | np.ndarray):
        return False  # not the same object: not worth a comparison
    if isinstance(a, float | complex | np.generic):
        return repr(a) == repr(b)  # tells 0.0 from -0.0, and NaN is NaN
    try:
        return bool(a == b)
    except Exception:  # a parameter without a truth value is a parameter we do not know
        return False


def _same_calls(a: core.JaxprEqn, b: core.JaxprEqn, rules: _Rules) -> bool:
    """Return whether two equations do the same, as do their derivatives up to this order."""
    if a.primitive.name not in _RULED:
        return _same(a.params, b.params, rules)
    settings, others = ([eqn.params.get(name) for name in _PLAIN] for eqn in (a, b))
    if not _same(settings, others, rules) or a.params.get("symbolic_zeros"):
        return False
    if rules.order == 0:
        return True
    mine, theirs = rules.mine.get(id(a)), rules.theirs.get(id(b))
    if mine is None or theirs is None:
        return False
    return _same(mine[1], theirs[1], rules.inner())


def _learn(jaxpr: core.Jaxpr, known: dict, order: int) -> None:
    """Trace the rules of all custom calls in a program, and of those in their rules."""
    for eqn in jaxpr.eqns if order > 0 else ():
        if eqn.primitive.name in _RULED and not eqn.params.get("symbolic_zeros"):
            try:
                rule = _traced_rule(eqn)
            except Exception:  # a rule that can't be traced alone remains unknown
                continue
            known[id(eqn)] = eqn, rule  # with the equation, whose number stays its own
            _learn(rule.jaxpr, known, order - 1)
    for inner in core.subjaxprs(jaxpr):
        _learn(inner, known, order)


def _traced_rule(eqn: Any) -> core.ClosedJaxpr:
    """Trace the derivative of a call, forward or reverse as its rule is."""
    inputs: Any = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
    fixed = eqn.invars[: eqn.params.get("num_consts", 0)]
    outputs = [v for v in eqn.outvars if type(v).__name__ != "DropVar" and _is_inexact(v)]
    args, outs = (
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in some]
        for some in (inputs, outputs)
    )
    empty = jax.make_jaxpr(lambda *_: [jnp.zeros(out.shape, out.dtype) for out in outs])(*args)
    alone = empty.jaxpr.replace(invars=inputs, outvars=outputs, eqns=[eqn])
    call = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
    moves = [_is_inexact(v) and v not in fixed for v in inputs]

    def derivative(args, tangents, cotangents):
        def moving(*some):
            rest = iter(some)
            return call(*[next(rest) if m else v for v, m in zip(args, moves, strict=True)])

        some = tuple(v for v, m in zip(args, moves, strict=True) if m)
        if eqn.primitive.name == "custom_jvp_call":
            return jax.jvp(moving, some, tuple(tangents))
        out, pullback = jax.vjp(moving, *some)
        return out, pullback(list(cotangents))

    tangents = [v for v, m in zip(args, moves, strict=True) if m]
    return jax.make_jaxpr(derivative)(args, tangents, outs)


def _is_inexact(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _same_jaxpr(a: core.Jaxpr, b: core.Jaxpr, rules: _Rules) -> bool:
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
            and _same_calls(x, y, rules)
            and bind(x.outvars, y.outvars)
            for x, y in zip(a.eqns, b.eqns, strict=True)
        )
        and refer(a.outvars, b.outvars)
    )
