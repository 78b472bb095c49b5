"""A symmetric linear operator given by a function of vectors, for Lineax.

It differs from `lineax.FunctionLinearOperator` in that it does not remember on which mesh it was
made, and so works inside `jax.shard_map`, where a program is made on one and batched on another.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from difflbfgs._program import Program, trace
from difflbfgs._vector import Vector

# So many products at once want little memory for what is computed on the way.
_BATCH = 64


class SymmetricOperator(lx.AbstractLinearOperator):
    """`v -> A v` with `A` symmetric positive semidefinite, as far as its maker knows."""

    program: Program = eqx.field(static=True)
    consts: PyTree
    structure: Any = eqx.field(static=True)
    shapes: tuple = eqx.field(static=True)

    @classmethod
    def of(cls, product: Callable[[Vector], Vector], like: Vector, **fields: Any) -> Any:
        """Make the operator that `product` computes on vectors like this one."""
        leaves, structure = jax.tree.flatten(like)

        def flat_product(*leaves):
            return jax.tree.leaves(product(structure.unflatten(leaves)))

        program, consts = trace(flat_product, *leaves)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return cls(program, consts, structure, shapes, **fields)

    def mv(self, vector):
        """Return `A v`."""
        return self.structure.unflatten(self.program(self.consts, *jax.tree.leaves(vector)))

    def as_matrix(self):
        """Return `A` as a matrix, from batched products."""
        zeros = self.structure.unflatten([jnp.zeros(*shape) for shape in self.shapes])
        flat, unravel = ravel_pytree(zeros)

        def row(unit):
            return ravel_pytree(self.mv(unravel(unit)))[0]

        units = jnp.eye(flat.size, dtype=flat.dtype)
        if flat.size <= _BATCH:
            return jax.vmap(row)(units)
        return jax.lax.map(row, units, batch_size=_BATCH)

    def transpose(self):
        """Return the operator itself."""
        return self

    def in_structure(self):
        """Return the structure of the vectors."""
        return jax.eval_shape(
            lambda: self.structure.unflatten([jnp.zeros(*shape) for shape in self.shapes])
        )

    def out_structure(self):
        """Return the structure of the vectors."""
        return self.in_structure()


class HessianOperator(SymmetricOperator):
    """The Hessian of an objective, which may be indefinite.

    Attributes:
        free: which entries of a vector have a row, or `None` for all; the rows of others are zero.
        slack: curvature that says nothing, see `_krylov.slack`.
    """

    free: Any = None
    slack: Any = 0.0


def kept(free: Any, v: Vector) -> Vector:
    """Return `v` where it is `free`, and zero elsewhere; all of it if that is `None`."""
    return v if free is None else jax.tree.map(lambda free, v: jnp.where(free, v, 0), free, v)


def _always(value: bool) -> Callable:
    return lambda operator: value


for _property in (lx.is_symmetric, lx.is_positive_semidefinite):
    _property.register(SymmetricOperator, _always(True))
for _property in (
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.has_unit_diagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_negative_semidefinite,
):
    _property.register(SymmetricOperator, _always(False))
for _unchanged in (lx.linearise, lx.conj):
    _unchanged.register(SymmetricOperator, lambda operator: operator)


lx.is_positive_semidefinite.register(HessianOperator, _always(False))


@lx.materialise.register(SymmetricOperator)
def _(operator):
    definite = lx.is_positive_semidefinite(operator)
    tag = lx.positive_semidefinite_tag if definite else lx.symmetric_tag
    return lx.MatrixLinearOperator(operator.as_matrix(), tag)


@lx.diagonal.register(SymmetricOperator)
def _(operator):
    return jnp.diagonal(operator.as_matrix())
