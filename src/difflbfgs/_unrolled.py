"""The comparison: a fixed number of Optax steps, differentiated one by one."""

import math
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from difflbfgs import _vector
from difflbfgs._checks import check_flag, check_instance, check_positive_integer, no_type_check
from difflbfgs._problem import Problem
from difflbfgs._solution import RESULTS, Outcome, Stats, count
from difflbfgs._vector import Vector


@no_type_check
class Unrolled(eqx.Module):
    """Run an Optax gradient method for a fixed number of steps and differentiate through it.

    The derivative is that of the iterate `x_K`, not of the minimizer: it is off by about as much as
    `x_K` is. It depends on the starting point, by which it can be differentiated too.

    Args:
        optimizer: an Optax gradient transformation without line search, such as `optax.sgd(0.1)`. A
            traced learning rate is differentiated too.
        num_steps: number of steps.
        checkpoint: recompute steps in the backward pass instead of storing them.
        flatten: work on one flat vector. `False` keeps the leaves of `x0` and their sharding.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `num_steps` is not positive.

    Note:
        Memory of the gradient grows with `num_steps`; with `checkpoint=True` with its square root,
        for one more evaluation of each step.

        There is no test of convergence: `converged` is true unless the iterates stopped being
        finite. Then `result` is `RESULTS.nonlinear_divergence`.
    """

    optimizer: optax.GradientTransformation
    num_steps: int = eqx.field(static=True)
    checkpoint: bool = eqx.field(default=False, static=True)
    flatten: bool = eqx.field(default=True, static=True)

    def __check_init__(self):
        example = "optax.sgd(0.1)"
        check_instance("optimizer", self.optimizer, (optax.GradientTransformation,), example)
        check_positive_integer("num_steps", self.num_steps)
        check_flag("checkpoint", self.checkpoint)
        check_flag("flatten", self.flatten)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Unrolled)
            and self._settings() == other._settings()
            and _same(self.optimizer, other.optimizer)
        )

    def __hash__(self) -> int:
        return hash(self._settings())

    def _settings(self):
        return self.num_steps, self.checkpoint, self.flatten


def _same(a: Any, b: Any) -> bool:
    """Return whether two parts of an Optax transformation certainly do the same.

    Optax makes new functions at every call: of the same code, which hold what it was given.
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, types.FunctionType):
        return (
            a.__code__ is b.__code__
            and a.__globals__ is b.__globals__
            and _same(a.__defaults__, b.__defaults__)
            and a.__kwdefaults__ == b.__kwdefaults__
            and _same(_held(a), _held(b))
        )
    return isinstance(a, bool | int | float | str) and repr(a) == repr(b)


def _held(function: types.FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


class UnrolledState(eqx.Module):
    """The iterate, and the state of the Optax transformation."""

    x: Vector
    optimizer: Any


def run(problem: Problem, x0: Vector, state: UnrolledState | None, solver: Unrolled) -> Outcome:
    """Take the steps; the outcome is differentiable in the ordinary way."""
    optimizer = optax.with_extra_args_support(solver.optimizer)

    def step(carry, _):
        x, inner = carry
        updates, inner = optimizer.update(problem.gradient(x), inner, x)
        return (optax.apply_updates(x, updates), inner), None

    def steps(carry, length):
        return jax.lax.scan(step, carry, length=length)[0]

    with jax.numpy_dtype_promotion("standard"):
        carry = (x0, optimizer.init(x0)) if state is None else (state.x, state.optimizer)
        if solver.checkpoint:
            segment = math.isqrt(solver.num_steps)
            whole, rest = divmod(solver.num_steps, segment)
            body = jax.checkpoint(lambda carry, _: (steps(carry, segment), None))
            carry = jax.lax.scan(body, carry, length=whole)[0]
            x, inner = jax.checkpoint(lambda carry: steps(carry, rest))(carry)
        else:
            x, inner = steps(carry, solver.num_steps)
        f, g = problem.value_and_gradient(x)
    grad_norm = _vector.norm(jax.lax.stop_gradient(g))
    finite = jnp.isfinite(f) & jnp.isfinite(grad_norm)
    stats = Stats(
        num_steps=count(solver.num_steps),
        num_fun_evals=count(solver.num_steps + 1),
        num_hvps=count(0),
        grad_norm=grad_norm,
        reference_grad_norm=grad_norm,
    )
    result = RESULTS.where(finite, RESULTS.successful, RESULTS.nonlinear_divergence)
    state = jax.lax.stop_gradient(UnrolledState(x, inner))
    return Outcome(x, f, result, stats, state, jnp.zeros_like(grad_norm), jnp.asarray(True))
