"""Checks of arguments: each error names the argument, the value received and the remedy."""

import inspect
from typing import Any, TypeVar, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

_T = TypeVar("_T")

_WITHOUT = {np.dtype(np.longdouble), np.dtype(np.clongdouble)} - {
    np.dtype(np.float64),
    np.dtype(np.complex128),
}


def no_type_check(checked: _T) -> _T:
    """Mark what checks its own arguments, so that a run-time type checker leaves that to it.

    `typing.no_type_check` would hide the signature from static checkers as well.
    """
    cast(Any, checked).__no_type_check__ = True
    return checked


def shown(tree: Any) -> str:
    """Return a PyTree as a message shows it: structure, dtypes and shapes."""
    return eqx.tree_pformat(tree, struct_as_array=True)


def check_positive_integer(name: str, value: Any) -> None:
    """Raise unless `value` is a Python integer of at least 1."""
    _check_integer(name, value, 1)


def check_natural_number(name: str, value: Any) -> None:
    """Raise unless `value` is a Python integer of at least 0."""
    _check_integer(name, value, 0)


def check_tolerance(name: str, value: Any, optional: bool = False) -> None:
    """Raise unless `value` is a nonnegative real scalar, or `None` if that is allowed."""
    if optional and value is None:
        return
    alternative = " or None for the default" if optional else ""
    remedy = f"Pass a nonnegative number such as 1e-6{alternative}."
    if value is None or isinstance(value, bool) or not eqx.is_array_like(value):
        raise TypeError(f"{name} must be a real number, got {value!r}. {remedy}")
    check_dtypes(name, [value])
    if jnp.shape(value) != () or jnp.iscomplexobj(value):
        raise ValueError(f"{name} must be a real scalar, got {value!r}. {remedy}")
    if not isinstance(value, Tracer) and not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be nonnegative and finite, got {value!r}. {remedy}")


def check_dtypes(name: str, leaves: list[Any]) -> None:
    """Raise a `TypeError` if an array has a dtype that JAX does not, as `numpy.longdouble` is."""
    for leaf in leaves:
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype in _WITHOUT:
            kind = "complex" if np.iscomplexobj(leaf) else "float"
            raise TypeError(
                f"{name} has a leaf of dtype {leaf.dtype}, which JAX does not have. Convert it, "
                f"for example with numpy.asarray({name}, {kind})."
            )


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a positive real scalar; it may be infinite."""
    remedy = "Pass a positive number such as 1.0."
    if isinstance(value, bool) or not eqx.is_array_like(value) or jnp.iscomplexobj(value):
        raise TypeError(f"{name} must be a real number, got {value!r}. {remedy}")
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got {value!r}. {remedy}")
    if not isinstance(value, Tracer) and not float(value) > 0:
        raise ValueError(f"{name} must be positive, got {value!r}. {remedy}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        *others, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is `True` or `False`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_instance(name: str, value: Any, kinds: tuple[type, ...], example: str) -> None:
    """Raise unless `value` is an instance of one of `kinds`; a class gets a hint of its own."""
    if isinstance(value, kinds):
        return
    if inspect.isclass(value):
        raise TypeError(
            f"{name} must be an instance and is the class {value.__name__}. "
            f"Call it: {name}={example}."
        )
    names = " or ".join(kind.__name__ for kind in kinds)
    raise TypeError(
        f"{name} must be an instance of {names}, got {value!r} of type {type(value).__name__}. "
        f"Pass for example {name}={example}."
    )


def check_callable(name: str, value: Any, remedy: str) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function, got {value!r} of type {type(value).__name__}. {remedy}"
        )


def check_preconditioner(value: Any) -> None:
    """Raise unless `value` is `None`, `"lbfgs"` or a function."""
    if value is not None and value != "lbfgs" and not callable(value):
        raise ValueError(
            f"preconditioner must be None, 'lbfgs' or a function (x, theta) -> lineax operator, "
            f"got {value!r}."
        )


def check_linesearch(value: Any) -> None:
    """Raise unless `value` is `None` or an Optax transformation."""
    if value is not None and not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"linesearch must be an Optax line search transformation, got {value!r}. Pass for "
            "example optax.scale_by_backtracking_linesearch(30), or None for the library's own."
        )


def _check_integer(name, value, least):
    remedy = f"Pass a Python integer of at least {least}."
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an integer, got {value!r} of type {type(value).__name__}. {remedy}"
        )
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}. {remedy}")
