"""`A u = b` for a symmetric operator that the user has, solved and verified as the adjoint is."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from difflbfgs import _vector
from difflbfgs._checks import shown
from difflbfgs._lanes import prepared
from difflbfgs._linear import Report, System, differentiable_solve
from difflbfgs._operator import HessianOperator, SymmetricOperator, kept
from difflbfgs._problem import interior
from difflbfgs._solution import RESULTS, raised, short_errors
from difflbfgs._system import AbstractAdjoint
from difflbfgs._vector import Scalar, Vector


def solve(adjoint: AbstractAdjoint, operator: Any, b: PyTree, throw: bool) -> tuple[PyTree, Report]:
    """Solve as the adjoint says, which is an `ImplicitAdjoint` or the like.

    Raises:
        TypeError: if `operator` is not a symmetric Lineax operator.
        ValueError: if `b` does not fit, or a value is complex.
    """
    _check(operator, b)
    with short_errors():
        return _solve(adjoint, operator, b, throw)


@eqx.filter_jit
def _solve(adjoint, operator, b, throw):
    """Solve in lanes, as one compiled program."""
    frozen = _without_derivative(operator)
    hessian = operator if isinstance(operator, HessianOperator) else None
    slack = jnp.zeros(()) if hessian is None else hessian.slack
    free = None if hessian is None or hessian.free is None else jax.tree.leaves(hessian.free)
    v = kept(free, _to_vector(b, _dtype(operator)))
    with interior("the operator"), jax.numpy_dtype_promotion("standard"):
        fill = None if free is None else _fill(_product(frozen), free, v)
        inner = SymmetricOperator.of(_completed(adjoint, _product(frozen), free, fill), v)
        slack = jax.lax.stop_gradient(jnp.asarray(slack, _vector.dtype(v)))

        def in_lanes(_, v):
            return _solve_prepared(adjoint, inner, slack, throw, v)

        matvec = _completed(adjoint, _product(operator), free, fill)
        found = differentiable_solve(matvec, v, in_lanes, has_aux=True)
    u, report = found
    return _from_vector(u, operator), report


def _prepare(adjoint, operator, slack, throw: bool, num: int) -> Callable[[Vector], Any]:
    """Return `v -> u` and a report, `A u = v` being made ready for so many `v`."""
    system = adjoint.system(operator, slack, None, num)
    return lambda v: _solved(adjoint, system, throw, v)


_solve_prepared = prepared(_prepare)


def _solved(adjoint, system: System, throw: bool, v: Vector) -> tuple[Vector, Report]:
    u, report = adjoint.solve_system(system, v, jnp.zeros((), _vector.dtype(v)))
    failed = (report.result != RESULTS.successful) & ~_vector.is_zero(v)
    if throw:
        u = raised(u, failed, report.result)
    return _vector.scale(jnp.where(failed, jnp.nan, 1), u), report


def _product(operator: lx.AbstractLinearOperator) -> Callable[[Vector], Vector]:
    """Return the product, on lists of leaves of the working dtype."""

    def product(p):
        return _to_vector(operator.mv(_from_vector(p, operator)), _vector.dtype(p))

    return product


def _completed(adjoint, product, free, fill: Scalar | None) -> Callable[[Vector], Vector]:
    """Return the product with a multiple of the identity in rows that are left out, and a ridge."""

    def complete(p):
        inner = _vector.add_scaled(product(p), adjoint.ridge, p)
        if free is None:
            return inner
        return jax.tree.map(lambda free, row, p: jnp.where(free, row, fill * p), free, inner, p)

    return complete


def _fill(product, free, like: Vector) -> Scalar:
    """Return a diagonal of the size of the rows that are there, as a product with signs shows it.

    Rows of another size would look like variables in another unit.
    """
    ones = jax.tree.map(jnp.ones_like, like)
    seen = _vector.norm(product(kept(free, _vector.rademacher(like, 0))))
    all_of_them = _vector.norm(kept(free, ones))
    size = seen / _vector.nonzero(all_of_them)
    return jnp.where(jnp.isfinite(size), _vector.nonzero(size), 1)


def _dtype(operator) -> Any:
    """Return the working dtype: that to which the leaves promote, float32 at least."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *_leaves(operator))


def _leaves(operator) -> list[Any]:
    return jax.tree.leaves(operator.in_structure())


def _to_vector(tree: PyTree, dtype: Any) -> Vector:
    return [jnp.asarray(leaf, dtype) for leaf in jax.tree.leaves(tree)]


def _from_vector(vector: Vector, operator) -> PyTree:
    structure = jax.tree.structure(operator.in_structure())
    leaves = zip(vector, _leaves(operator), strict=True)
    return structure.unflatten([leaf.astype(like.dtype) for leaf, like in leaves])


def _without_derivative(tree: Any) -> Any:
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def _check(operator: Any, b: PyTree) -> None:
    remedy = (
        "Pass what difflbfgs.hessian_operator returns, or for a matrix "
        "lineax.MatrixLinearOperator(A, lineax.symmetric_tag)."
    )
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise TypeError(
            f"operator must be a lineax operator, got {operator!r} of type "
            f"{type(operator).__name__}. {remedy}"
        )
    if not (lx.is_symmetric(operator) or lx.is_positive_semidefinite(operator)):
        raise TypeError(f"operator must be symmetric, and this one has no such tag. {remedy}")
    like = operator.in_structure()
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (b, like)]
    if jax.tree.structure(b) != jax.tree.structure(like) or shapes[0] != shapes[1]:
        raise ValueError(
            f"b must be like the vectors of the operator, {shown(like)}, got {shown(b)}. Give it "
            "the same structure and shapes."
        )
    for name, tree in (("operator", like), ("b", b)):
        kinds = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
        if any(jnp.issubdtype(kind, jnp.complexfloating) for kind in kinds):
            raise ValueError(
                f"{name} must be real, got {shown(tree)}. Write real and imaginary part as two."
            )
