"""One step of Optax: where it proposes to go, and what the objective is there."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from difflbfgs import _vector
from difflbfgs._curvature import Pair
from difflbfgs._problem import Problem
from difflbfgs._vector import Count, Flag, Scalar, Vector


class Trial(eqx.Module):
    """A proposed point.

    Attributes:
        x, f, g: the point, and the objective and its gradient there.
        engine: the state of the Optax transformation after the proposal.
        step_size: the multiple of the quasi-Newton step `d` that the line search chose.
        predicted: `-gᵀd`, twice the decrease that the quadratic model predicts for `d`.
        num_fun_evals: evaluations spent.
    """

    x: Vector
    f: Scalar
    g: Vector
    engine: Any
    step_size: Scalar
    predicted: Scalar
    num_fun_evals: Count


def propose(
    problem: Problem,
    engine: optax.GradientTransformationExtraArgs,
    state: Any,
    x: Vector,
    f: Scalar,
    g: Vector,
    done: Flag,
) -> Trial:
    """Ask Optax for a step from `x`; once `done`, the step is zero and costs one evaluation."""
    still = (state[0].params, jnp.zeros_like(f), _vector.zeros_like(g))
    x_seen, f_seen, g_seen = _vector.where(done, still, (x, f, g))
    fun = _silenced(problem, done, x)
    updates, state = engine.update(g_seen, state, x_seen, value=f_seen, grad=g_seen, value_fn=fun)
    x_new = optax.apply_updates(x, updates)
    search = state[-1]
    info = getattr(search, "info", None)
    evaluations = getattr(info, "num_linesearch_steps", 0)
    if getattr(search, "grad", None) is None:
        f_new, g_new = jax.value_and_grad(fun)(x_new)
        evaluations += 1
    else:
        f_new, g_new = search.value, search.grad
    step_size = jnp.asarray(getattr(search, "learning_rate", 1.0), _vector.dtype(x))
    moved = step_size > 0
    decrease = -_vector.dot(g, updates) / jnp.where(moved, step_size, 1)
    return Trial(
        x=x_new,
        f=f_new,
        g=g_new,
        engine=state,
        step_size=step_size,
        predicted=jnp.where(moved, decrease, jnp.inf),
        num_fun_evals=jnp.asarray(evaluations, jnp.int32),
    )


def probe(problem: Problem, x: Vector) -> tuple[Scalar, Vector, Pair]:
    """Return `f` and its gradient at `x`, and the pair of a short step down the gradient.

    Both points are evaluated by one loop, for one copy of the objective in the program.
    """
    reach = _vector.epsilon(x) ** 0.5 * jnp.maximum(1, _vector.norm(x))

    def evaluate(_, points):
        _, here, point = points
        f, g = problem.value_and_gradient(point)
        return here, (point, f, g), _vector.add_scaled(point, -reach, _vector.unit(g))

    nowhere = (x, jnp.zeros((), _vector.dtype(x)), _vector.zeros_like(x))
    (_, f, g), (x_near, _, g_near), _ = jax.lax.fori_loop(0, 2, evaluate, (nowhere, nowhere, x))
    return f, g, Pair(_vector.sub(x, x_near), _vector.sub(g, g_near))


def _silenced(problem, done, like):
    """Return the objective as Optax is to see it: zero, with a zero gradient, once `done`.

    Under `vmap` a line search runs until its last lane is satisfied, and a lane that has finished,
    perhaps at a NaN, must not be that one.
    """

    @jax.custom_jvp
    def fun(x):
        return jnp.where(done, 0, problem.value(x))

    @fun.defjvp
    def fun_jvp(primals, tangents):
        found = problem.value_and_gradient(primals[0])
        f, g = _vector.where(done, _vector.zeros_like(found), found)
        return f, _vector.dot(g, tangents[0])

    # Optax's searches compute in float64 under x64, whatever the dtype of x.
    return lambda x: fun(optax.tree.cast_like(x, like))
