"""JAXopt's three forms of an objective, brought to the one that this library takes.

`fun(x, *args, **kwargs)` returns the objective, perhaps with an auxiliary output, perhaps with its
gradient. Inside it is `objective(x, (args, kwargs)) -> (f, (f, aux))`; the second `f` keeps the
dtype in which the user computes it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

Objective = Callable[[PyTree, tuple], tuple[Any, tuple[Any, PyTree]]]


def make_objective(
    fun: Callable, value_and_grad: bool | Callable, has_aux: bool, traceable: bool
) -> Objective:
    """Return `objective(x, (args, kwargs)) -> (f, (f, aux))`.

    Unless it is `traceable`, a function that returns its gradient sees concrete arrays where there
    are any, and is not differentiated by what it closes over: JAX raises.

    Raises (when called):
        TypeError: if `fun` or `value_and_grad` does not return what `has_aux` says it does.
    """
    if value_and_grad is False:

        def objective(x, theta):
            f, aux = _split("fun", fun(x, *theta[0], **theta[1]), has_aux)
            return f, (f, aux)

        return objective
    given = fun if value_and_grad is True else value_and_grad
    return _with_given_gradient(given, has_aux, traceable)


def _with_given_gradient(given: Any, has_aux: bool, traceable: bool) -> Objective:
    """Return the objective whose derivative by `x` is the gradient that the user computes.

    All other derivatives, and those of the gradient, are taken by JAX where they are asked for.
    """

    def both(x, theta):
        out = given(x, *theta[0], **theta[1])
        if not (isinstance(out, tuple | list) and len(out) == 2):
            form = "((objective, aux), gradient)" if has_aux else "(objective, gradient)"
            raise TypeError(
                f"value_and_grad needs a function that returns {form}, and it returned {out!r}. "
                "Return that, or drop value_and_grad and let JAX take the gradient."
            )
        return _split("value_and_grad", out[0], has_aux), out[1]

    @eqx.filter_custom_jvp
    def value(both, x, theta):
        return both(x, theta)[0][0]

    @value.def_jvp
    def value_jvp(primals, tangents):
        both, x, theta = primals
        by_closure, by_x, by_theta = tangents
        (f, _), g = both(x, theta)
        slope = jnp.zeros_like(f)
        # JAX's gradient of a real function of complex z: df = Re Σ g dz, without a conjugate.
        for tangent, gradient in zip(
            jax.tree.leaves(by_x, is_leaf=_is_none),
            jax.tree.leaves(_like(g, by_x), is_leaf=_is_none),
            strict=True,
        ):
            if tangent is not None:
                slope += jnp.sum(jnp.real(gradient * tangent)).astype(slope.dtype)
        if jax.tree.leaves((by_closure, by_theta)):
            _, partial = eqx.filter_jvp(
                lambda both, theta: both(x, theta)[0][0], (both, theta), (by_closure, by_theta)
            )
            slope += partial
        return f, slope

    def objective(x, theta):
        # A custom rule must be handed what it depends on.
        known = eqx.filter_closure_convert(both, x, theta) if traceable else both
        f = value(known, x, theta)
        return f, (f, both(x, theta)[0][1] if has_aux else None)

    return objective


def _split(name, out, has_aux):
    is_pair = isinstance(out, tuple | list) and len(out) == 2
    if has_aux and not is_pair:
        raise TypeError(
            f"has_aux=True needs {name} to return a pair (objective, aux), and it returned "
            f"{out!r}. Return such a pair, or drop has_aux=True."
        )
    if not has_aux and isinstance(out, tuple | list):
        raise TypeError(
            f"{name} must return a real scalar and returned a {type(out).__name__} of {len(out)} "
            "elements. If the second is an auxiliary output, pass has_aux=True; if it is the "
            "gradient, value_and_grad=True."
        )
    return out if has_aux else (out, None)


def _like(gradient, x):
    """Return the gradient in the structure of `x`, in which static leaves are `None`."""
    leaves = jax.tree.leaves(gradient)
    structure = jax.tree.structure(x, is_leaf=_is_none)
    if structure.num_leaves != len(leaves):
        raise TypeError(
            f"value_and_grad must return a gradient like the parameters, {structure}, and returned "
            f"{jax.tree.structure(gradient)}."
        )
    return structure.unflatten(leaves)


def _is_none(leaf):
    return leaf is None
