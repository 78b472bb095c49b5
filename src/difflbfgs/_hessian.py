"""The exact Hessian of an objective, for the user."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import PyTree

from difflbfgs import _krylov, _vector
from difflbfgs._checks import check_callable, check_flag, no_type_check, shown
from difflbfgs._operator import HessianOperator, kept
from difflbfgs._problem import Variables, interior, make_problem, make_variables


@no_type_check
def hessian_operator(
    fun: Callable,
    x: PyTree,
    theta: PyTree = None,
    *,
    active: PyTree = None,
    has_aux: bool = False,
) -> lx.AbstractLinearOperator:
    """Return the Hessian of `fun(x, theta)` by `x`, as a Lineax operator.

    `H = ∇²ₓₓf(x, θ)` is exact, and differentiable by `x` and by `theta`. For a negative
    log-likelihood `f` the covariance of the estimate is `H⁻¹`.

    Args:
        fun: the objective, `fun(x, theta)`, as for `minimize`.
        x: the point, any PyTree. Its floating-point leaves are the variables.
        theta: any PyTree.
        active: integer or Boolean leaves in the shapes of the variables, not zero if a bound holds
            one, and `None` for other leaves of `x`. `None`: none is held.
        has_aux: whether `fun` returns an auxiliary output as well, which is ignored.

    Returns:
        A symmetric operator on PyTrees like `eqx.filter(x, eqx.is_inexact_array)`, in the working
        dtype: that to which the leaves promote, float32 at least. Rows and columns of active
        variables are zero.

    Raises:
        TypeError: if an argument has the wrong type, `fun` returns something else, or has no
            Hessian-vector products.
        ValueError: if `x` has no floating-point leaf or a complex one, or `active` does not fit.

    Note:
        `ImplicitAdjoint().solve(H, b)` solves with it and verifies the solution; with active
        variables it solves the block of the others. As `x` may be any point, `H` is not tagged
        positive semidefinite; `lineax.TaggedLinearOperator` does that.

        A product costs about two gradients, `as_matrix()` one product for each variable, batched.

    Examples:
        The standard errors of a logistic regression, their derivative, and `log det H`.

        >>> import jax, jax.numpy as jnp, difflbfgs as dl
        >>> X, y = jnp.array([[1.0, -1], [1, 0], [1, 1], [1, 2]]), jnp.array([0.0, 1, 0, 1])
        >>> def loss(w, prior):
        ...     return jnp.sum(jax.nn.softplus(X @ w) - y * (X @ w)) + prior * jnp.sum(w**2) / 2
        >>> def errors(prior):
        ...     H = dl.hessian_operator(loss, dl.minimize(loss, jnp.zeros(2), prior).value, prior)
        ...     covariance, _ = jax.vmap(lambda e: dl.ImplicitAdjoint().solve(H, e))(jnp.eye(2))
        ...     return jnp.sqrt(jnp.diag(covariance))
        >>> print(*(f"{value:.3f}" for value in (*errors(1.0), *jax.jacrev(errors)(1.0))))
        0.733 0.667 -0.212 -0.172
        >>> w = dl.minimize(loss, jnp.zeros(2), 1.0).value
        >>> H = dl.hessian_operator(loss, w, 1.0)
        >>> print(f"{jnp.linalg.slogdet(H.as_matrix())[1]:.3f}")
        1.473
    """
    check_callable("fun", fun, "It is called as fun(x, theta).")
    check_flag("has_aux", has_aux)
    variables = make_variables(x, False, "x")
    kinds = [leaf.dtype for leaf in jax.tree.leaves(variables.template)]
    if any(jnp.issubdtype(kind, jnp.complexfloating) for kind in kinds):
        raise ValueError(
            f"x must be real, got {shown(variables.template)}. Give real and imaginary part as "
            "two leaves, and put them together in fun with jax.lax.complex."
        )
    free = None if active is None else _free(active, variables)
    vector = variables.to_vector(x)
    problem = make_problem(fun, theta, variables, vector, has_aux)
    structure = jax.tree.structure(variables.template)

    def product(tree: PyTree) -> PyTree:
        rows = problem.product(vector, kept(free, jax.tree.leaves(tree)))
        return structure.unflatten(kept(free, rows))

    with interior("fun"):
        grad_norm = _vector.norm(kept(free, problem.gradient(vector)))
        slack = jax.lax.stop_gradient(_krylov.slack(vector, grad_norm))
        return HessianOperator.of(
            product,
            structure.unflatten(vector),
            free=None if free is None else structure.unflatten(free),
            slack=jnp.where(jnp.isfinite(slack), slack, 0),
        )


def _free(active: PyTree, variables: Variables) -> list[Any]:
    """Return which entries are not active."""
    leaves, structure = jax.tree.flatten(active)
    templates, wanted = jax.tree.flatten(variables.template)
    fits = structure == wanted and [jnp.shape(leaf) for leaf in leaves] == [
        like.shape for like in templates
    ]
    kinds = [jnp.result_type(leaf) for leaf in leaves]
    if not fits or any(jnp.issubdtype(kind, jnp.inexact) for kind in kinds):
        raise ValueError(
            f"active must have an integer or Boolean leaf in the shape of each variable, "
            f"{shown(variables.template)}, and None for other leaves of x, got {shown(active)}. "
            "Make it with jax.tree.map from equinox.filter(x, equinox.is_inexact_array)."
        )
    return [jnp.asarray(leaf) == 0 for leaf in leaves]
