"""The border: the user's problem in, `objective(vector)` out, and the answer back.

Everything behind this module sees a vector of real numbers of one dtype and an objective of that
vector alone. Equinox modules, static leaves, mixed or low precision, complex leaves, `theta`,
closures and auxiliary outputs are dealt with here and nowhere else.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from difflbfgs import _vector
from difflbfgs._box import Bounds, Box
from difflbfgs._checks import check_dtypes
from difflbfgs._program import Program, contains, trace
from difflbfgs._vector import Flag, Scalar, Vector
from difflbfgs._watch import Step, Stop


class Problem(eqx.Module):
    """A function `f(x)` and all arrays that it depends on: those in `theta`, and others.

    Its `bounds` on `x`, if any, may depend on `theta`, too.
    """

    program: Program = eqx.field(static=True)
    theta: list[Array]
    consts: PyTree
    name: str = eqx.field(static=True)
    bounds: Bounds | None = None

    def at(self, theta: list[Array]) -> "Problem":
        """Return the problem with other values for the inexact leaves of `theta`."""
        return Problem(self.program, theta, self.consts, self.name, self.bounds)

    def box(self) -> Box | None:
        """Return the bounds, if there are any."""
        return None if self.bounds is None else self.bounds.box(self.theta)

    def free(self, v: Vector) -> Vector:
        """Return the part of `v` that no bound holds: all of it, see `Face`."""
        return v

    def reaches(self, x: Vector) -> Flag:
        """Return whether no bound is in the way to `x`, and none lets go there: see `Face`."""
        del x
        return jnp.asarray(True)

    def objective(self, x: Vector) -> tuple[Scalar, PyTree]:
        """Return `f(x)` and the auxiliary output."""
        return self.program(self.consts, *self.theta, *jax.tree.leaves(x))

    def value(self, x: Vector) -> Scalar:
        """Return `f(x)`."""
        return self.objective(x)[0]

    def aux(self, x: Vector) -> PyTree:
        """Return the auxiliary output at `x`."""
        return self.objective(x)[1]

    def gradient(self, x: Vector) -> Vector:
        """Return the gradient of `f` at `x`."""
        self._check(_value_and_gradient, _NO_GRADIENT, x)
        return jax.grad(self.value)(x)

    def value_and_gradient(self, x: Vector) -> tuple[Scalar, Vector]:
        """Return `f` and its gradient at `x`."""
        self._check(_value_and_gradient, _NO_GRADIENT, x)
        return _value_and_gradient(self, x)

    def product(self, x: Vector, p: Vector) -> Vector:
        """Return the Hessian-vector product `H(x) p`."""
        self._check(_product, _NO_PRODUCT, x, p)
        return _product(self, x, p)

    def product_if_any(self, x: Vector, p: Vector) -> Vector:
        """Return the product, or zero if there is none; a derivative of that raises."""
        try:
            return self.product(x, p)
        except TypeError as error:
            return _no_product(str(error), jax.tree.map(jnp.zeros_like, p), x)

    def _check(self, derivative: Callable, message: str, *args: Vector) -> None:
        """Raise a `TypeError` unless JAX can compute this derivative of the objective."""
        with _explained(message, self.name):
            program: Any = jax.make_jaxpr(derivative)(self, *args)  # traced once, and kept
            if contains(program.jaxpr, "custom_lin"):  # which would raise as soon as it is used
                raise TypeError(_NO_FORWARD_MODE)


# What is asked of an objective is traced once for all who ask: these are nested programs.


@jax.jit
def _value_and_gradient(problem: Problem, x: Vector) -> tuple[Scalar, Vector]:
    return jax.value_and_grad(problem.value)(x)


@jax.jit
def _product(problem: Problem, x: Vector, p: Vector) -> Vector:
    return jax.jvp(jax.grad(problem.value), (x,), (p,))[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _no_product(message: str, zero: Vector, x: Vector) -> Vector:
    return zero


@_no_product.defjvp
def _no_product_jvp(message, primals, tangents):
    raise TypeError(message)


@contextlib.contextmanager
def interior(name: str) -> Iterator[None]:
    """Compute with the user's function of this name as this library does: in full precision.

    What it computes is traced already, in the precision of matrix products that its user chose.

    Raises:
        TypeError: if its Hessian-vector products have no derivative, and that is asked for.
    """
    try:
        with jax.default_matmul_precision("highest"):
            yield
    except TypeError as error:
        if str(error).startswith(_NO_FORWARD_MODE):
            raise TypeError(_text(_NO_PRODUCT, name, error)) from error
        raise


def differentiation(name: str) -> contextlib.AbstractContextManager[None]:
    """Differentiate the user's function of this name by `theta`.

    Raises:
        TypeError: if JAX can't do that.
    """
    return _explained(_NO_THETA, name)


@contextlib.contextmanager
def _explained(message: str, name: str) -> Iterator[None]:
    """Say what an objective lacks if JAX can't differentiate it; its value is traced already."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(_text(message, name, error)) from error


def _text(message: str, name: str, error: Exception) -> str:
    said = str(error).strip().split("\n")[0].rstrip(".")
    return message.format(name=name, said=said)


_WAY_OUT = (
    "A loop of fixed length (jax.lax.scan, or jax.lax.fori_loop between Python integers) has all "
    "derivatives; to a jax.lax.while_loop or a callback give one by jax.custom_jvp"
)
_NO_GRADIENT = (
    "{name} has no gradient by x in reverse mode, which every solve needs. JAX says: {said}. "
    + _WAY_OUT
    + " or jax.custom_vjp."
)
_NO_PRODUCT = (
    "{name} has no Hessian-vector products, which the Newton polish and the implicit derivative "
    "need. JAX says: {said}. Write a jax.custom_vjp as a jax.custom_jvp; in Diffrax choose "
    "adjoint=diffrax.DirectAdjoint(). "
    + _WAY_OUT
    + ", and its gradient too. To minimize without a derivative, solver=LBFGS(polish=0) is enough."
)
_NO_THETA = (
    "{name} can't be differentiated by theta, or by what it closes over, as this derivative of the "
    "solve needs. JAX says: {said}. " + _WAY_OUT + ", and its gradient too. What needs no "
    "derivative goes through jax.lax.stop_gradient."
)
_NO_FORWARD_MODE = "can't apply forward-mode autodiff (jvp) to a custom_vjp function"


class Variables(eqx.Module):
    """The shape of the user's variables: how to read them from a vector, and back.

    Complex leaves are pairs of real ones. `template` holds abstract arrays for the leaves that are
    minimized over and `static` everything else.
    """

    template: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    static: PyTree
    dtype: Any = eqx.field(static=True)
    flatten: bool = eqx.field(static=True)

    def to_vector(self, x: PyTree) -> Vector:
        """Return the inexact leaves of `x` as one vector of the working dtype."""
        leaves = jax.tree.leaves(eqx.filter(x, _vector.is_inexact))
        parts = [part.astype(self.dtype) for leaf in leaves for part in _real_parts(leaf)]
        return jnp.concatenate([part.ravel() for part in parts]) if self.flatten else parts

    def inside(self, vector: Vector) -> PyTree:
        """Return `vector` in the user's structure and the working precision."""
        return self._restore(vector, lambda leaf, _: leaf)

    def outside(self, vector: Vector) -> PyTree:
        """Return `vector` in the user's structure and the user's dtypes."""
        return self._restore(vector, lambda leaf, like: leaf.astype(like.dtype))

    def flags(self, vector: Any) -> PyTree:
        """Return flags of the entries of a vector, in the user's structure; `None` elsewhere."""
        templates, structure = jax.tree.flatten(self.template)
        parts = iter(self._cut(vector, templates) if self.flatten else vector)
        leaves = []
        for like in templates:
            leaves.append(next(parts))
            if _is_complex(like):
                next(parts)  # has no bounds
        return jax.tree.unflatten(structure, leaves)

    def _restore(self, vector, cast):
        templates, structure = jax.tree.flatten(self.template)
        parts = iter(self._cut(vector, templates) if self.flatten else vector)
        leaves = [
            cast(
                jax.lax.complex(next(parts), next(parts)) if _is_complex(like) else next(parts),
                like,
            )
            for like in templates
        ]
        return eqx.combine(jax.tree.unflatten(structure, leaves), self.static)

    def _cut(self, vector, templates):
        shapes = [like.shape for like in templates for _ in range(2 if _is_complex(like) else 1)]
        ends = itertools.accumulate(math.prod(shape) for shape in shapes)
        pieces = jnp.split(vector, list(ends)[:-1])
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def make_variables(x0: PyTree, flatten: bool, name: str = "x0") -> Variables:
    """Read the user's `x0`, called `name`: which leaves are variables, and in which dtype to work.

    Raises:
        ValueError: if `x0` has no inexact array leaf, or none with an entry.
        TypeError: if one has a dtype that JAX does not have.
    """
    inexact, static = eqx.partition(x0, _vector.is_inexact)
    leaves = jax.tree.leaves(inexact)
    check_dtypes("x0", leaves)
    if sum(jnp.size(leaf) for leaf in leaves) == 0:
        raise ValueError(
            f"{name} has nothing to minimize over: it needs at least one floating-point or complex "
            f"array with at least one entry, and its leaves are {_describe(x0)}. "
            f"{_remedy(name, x0)}"
        )
    with jax.numpy_dtype_promotion("standard"):
        promoted = jnp.result_type(*leaves)
    real = jnp.finfo(promoted).dtype
    working = jnp.dtype(jnp.float32) if real.itemsize < 4 else real
    template = jax.tree.map(lambda leaf: jax.eval_shape(jnp.asarray, leaf), inexact)
    return Variables(template, static, working, flatten)


def _remedy(argument: str, x0: PyTree) -> str:
    for leaf in jax.tree.leaves(x0):
        if dataclasses.is_dataclass(leaf) or isinstance(leaf, types.SimpleNamespace):
            name = type(leaf).__name__
            return (
                f"{name} is no PyTree: register it with jax.tree_util.register_dataclass, make it "
                "an equinox.Module, or pass a dict."
            )
    return f"Write 0.0 for 0, or convert with jnp.asarray({argument}, float)."


def make_problem(
    fun: Callable,
    theta: PyTree,
    variables: Variables,
    x: Vector,
    has_aux: bool = False,
    name: str = "fun",
) -> Problem:
    """Trace the user's function, called `name`, and make all that it depends on a leaf.

    Raises:
        TypeError: if it does not return a real scalar (with `has_aux`, one and an auxiliary).
        ValueError: if it returns an array that is not a scalar.
    """
    parameters, theta_structure, static = split_theta(theta)
    entries, structure = jax.tree.flatten(x)

    def objective(*leaves):
        theta = theta_structure.unflatten(leaves[: len(parameters)])
        vector = structure.unflatten(leaves[len(parameters) :])
        out = fun(variables.inside(vector), eqx.combine(theta, static))
        value, aux = _split(name, out, has_aux)
        return _check_value(name, value).astype(variables.dtype), aux

    program, consts = trace(objective, *parameters, *entries)
    return Problem(program, parameters, consts, name)


def split_theta(theta: PyTree) -> tuple[list[Array], Any, PyTree]:
    """Return the leaves that one can differentiate by, their structure, and everything else."""
    inexact, static = eqx.partition(theta, _vector.is_inexact)
    check_dtypes("theta", jax.tree.leaves(inexact))
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, inexact))
    return leaves, structure, static


class Preconditioner(eqx.Module):
    """The user's approximate inverse Hessian, `(x, v) -> P(x) v` on vectors."""

    program: Program = eqx.field(static=True)
    consts: PyTree

    def __call__(self, x: Vector, v: Vector) -> Vector:
        """Return `P(x) v`."""
        return self.program(self.consts, *jax.tree.leaves((x, v)))


def make_preconditioner(
    make: Callable, theta: PyTree, variables: Variables, x: Vector
) -> Preconditioner:
    """Trace the user's `(x, theta) -> lineax operator` as a function of vectors.

    Raises:
        TypeError: if it does not return a Lineax operator tagged positive semidefinite.
    """

    def apply(x, v):
        operator = make(variables.inside(x), theta)
        if not isinstance(operator, lx.AbstractLinearOperator):
            raise TypeError(
                f"preconditioner must return a lineax operator, got {operator!r}. Wrap a matrix: "
                "lineax.MatrixLinearOperator(P, lineax.positive_semidefinite_tag)."
            )
        if not lx.is_positive_semidefinite(operator):
            raise TypeError(
                "preconditioner must return a positive definite operator, and this one has no such "
                "tag. Add tags=lineax.positive_semidefinite_tag."
            )
        structure = jax.tree.leaves(operator.in_structure())
        if variables.flatten and [leaf.shape for leaf in structure] == [v.shape]:
            return operator.mv(v)
        return variables.to_vector(operator.mv(eqx.filter(variables.inside(v), _vector.is_inexact)))

    leaves, pair = jax.tree.flatten((x, x))
    program, consts = trace(lambda *leaves: apply(*pair.unflatten(leaves)), *leaves)
    return Preconditioner(program, consts)


def make_stop(stop: Callable, variables: Variables, x: Vector) -> Stop:
    """Trace the user's `stop(step) -> bool`, the variables being a vector.

    Raises:
        TypeError: if it does not return a boolean scalar.
    """
    zero, number, no = jnp.zeros((), variables.dtype), jnp.asarray(0, jnp.int32), jnp.asarray(False)
    leaves, structure = jax.tree.flatten((Step(number, number, zero, zero, zero, no), x))

    def traced(*leaves):
        step, x = structure.unflatten(leaves)
        out = stop(dataclasses.replace(step, value=variables.outside(x)))
        scalar = eqx.is_array_like(out) and jnp.shape(out) == ()
        if not scalar or not jnp.issubdtype(jnp.result_type(out), jnp.bool_):
            raise TypeError(
                f"stop must return a boolean scalar, and it returned {out!r}. Compare arrays in "
                "it, as in step.grad_norm < 1e-3, and reduce what is larger with jnp.all."
            )
        return jnp.asarray(out)

    program, consts = trace(traced, *leaves)
    return Stop(program, jax.lax.stop_gradient(consts))


def _split(name, out, has_aux):
    if not has_aux:
        if isinstance(out, tuple | list):
            remedy = (
                "If the second is an auxiliary output, pass has_aux=True."
                if name == "fun"
                else "Return the scalar alone: there is no has_aux here."
            )
            raise TypeError(
                f"{name} must return a real scalar and returned a {type(out).__name__} of "
                f"{len(out)} elements. {remedy}"
            )
        return out, None
    if isinstance(out, tuple) and len(out) == 2:
        return out
    raise TypeError(
        f"has_aux=True needs {name} to return a pair (objective, aux), and it returned "
        f"{_describe(out)}. Return such a pair, or drop has_aux=True."
    )


def _check_value(name, value):
    if not eqx.is_array_like(value):
        raise TypeError(
            f"{name} must return a real scalar and returned {value!r} of type "
            f"{type(value).__name__}. Return the objective, for example jnp.sum(residual**2)."
        )
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(
            f"{name} must return a scalar and returned an array of shape {value.shape}. "
            "Reduce it, for example with jnp.sum or jnp.mean."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a real floating-point scalar and returned one of dtype "
            f"{value.dtype}. Take jnp.real or jnp.abs of a complex value; convert an integer."
        )
    return value


def _real_parts(leaf):
    leaf = jnp.asarray(leaf)
    return (leaf.real, leaf.imag) if _is_complex(leaf) else (leaf,)


def _is_complex(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _describe(tree: PyTree) -> str:
    kinds = [
        f"{leaf.dtype}{list(leaf.shape)}" if eqx.is_array(leaf) else type(leaf).__name__
        for leaf in jax.tree.leaves(tree)
    ]
    shown = ", ".join(kinds[:6]) + (", ..." if len(kinds) > 6 else "")
    return shown or "none"


def check_same_shape(state_vector: Vector, x: Vector) -> None:
    """Raise a `ValueError` if a warm start's minimizer does not have the shape of `x0`."""
    found, wanted = (jax.eval_shape(lambda v: v, v) for v in (state_vector, x))
    if jax.tree.structure(found) != jax.tree.structure(wanted) or jax.tree.leaves(
        found
    ) != jax.tree.leaves(wanted):
        raise ValueError(
            f"state belongs to another problem: it was made for {_vector.size(state_vector)} "
            f"variables ({_describe(state_vector)}) and x0 has {_vector.size(x)} "
            f"({_describe(x)}). Drop state=, or pass the one of a solve with the same x0, "
            "dtype and flatten."
        )
