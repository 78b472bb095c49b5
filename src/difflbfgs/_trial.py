"""Where to begin, and one step of Optax: where it proposes to go, and the objective there."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from difflbfgs import _lanes, _vector
from difflbfgs._curvature import Pair
from difflbfgs._problem import Problem
from difflbfgs._solution import count
from difflbfgs._vector import Count, Flag, Scalar, Vector


class Trial(eqx.Module):
    """A proposed point.

    Attributes:
        x, f, g: the point, and the objective and its gradient there.
        engine: the state of the Optax transformation after the proposal.
        step_size: the multiple of the quasi-Newton step `d` that the line search chose.
        slope: `gᵀs`, the change of the objective that its gradient predicts for the step `s`.
        num_fun_evals: evaluations spent.
    """

    x: Vector
    f: Scalar
    g: Vector
    engine: Any
    step_size: Scalar
    slope: Scalar
    num_fun_evals: Count

    def predicted(self) -> Scalar:
        """Return `-gᵀd`, twice the decrease that the quadratic model predicts for `d`."""
        moved = self.step_size > 0
        return jnp.where(moved, -self.slope / jnp.where(moved, self.step_size, 1), jnp.inf)


def propose(
    problem: Problem,
    engine: optax.GradientTransformationExtraArgs,
    state: Any,
    x: Vector,
    f: Scalar,
    g: Vector,
    done: Flag,
) -> Trial:
    """Ask Optax for a step from `x`.

    A lane that is `done` but waits for others gets no step, for one evaluation. Its newest pair is
    formed, as that is what Optax begins with, and its memory stays what it was.
    """
    waits = _lanes.waits(done)
    x_seen, g_seen = _vector.where(waits, _finite((x, g)), (x, g))
    f_flat, g_flat = _vector.where(waits, _vector.zeros_like((f, g)), (f, g))
    fun = _silenced(problem, waits, x)
    updates, state = engine.update(g_seen, state, x_seen, value=f_flat, grad=g_flat, value_fn=fun)
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
    return Trial(
        x=x_new,
        f=f_new,
        g=g_new,
        engine=state,
        step_size=step_size,
        slope=_vector.dot(g, updates),
        num_fun_evals=jnp.asarray(evaluations, jnp.int32),
    )


class Point(eqx.Module):
    """A point, and the objective and its gradient there."""

    x: Vector
    f: Scalar
    g: Vector

    @staticmethod
    def of(problem: Problem, x: Vector) -> "Point":
        """Evaluate the objective at `x`."""
        return Point(x, *problem.value_and_gradient(x))


def probe(problem: Problem, x: Vector) -> tuple[Point, Pair, Count]:
    """Return where L-BFGS is to begin, a first pair, and the number of evaluations.

    The first try is a step down the gradient that would be half of Newton's for `f = c/2 ‖x‖²`:
    `|f| / ‖g‖` long, whatever the scales of objective and variables, but no longer than a tenth of
    the size of `x`. Where the objective falls along it (Armijo's condition) and curves upwards, the
    solve begins at its end. If not, a short step shows the curvature at `x`, and it begins there.

    All points are evaluated by one loop, for one copy of the objective in the program.
    """
    room = jnp.maximum(1, _vector.norm(x))

    def unfinished(carry):
        evaluations, _, _, found = carry
        return (evaluations < 2) | ((evaluations == 2) & ~found)

    def evaluate(carry):
        evaluations, start, _, _ = carry
        slope = _vector.norm(start.g)
        step = jnp.minimum(jnp.abs(start.f) / _vector.nonzero(slope), 0.1 * room)
        short = _vector.epsilon(x) ** 0.5 * room
        length = jnp.where(evaluations == 1, step, short)
        moved = _vector.add_scaled(x, -length, _vector.unit(start.g))
        point = Point.of(problem, _vector.where(evaluations == 0, x, moved))
        start = _vector.where(evaluations == 0, point, start)
        return evaluations + 1, start, point, _is_progress(start, point)

    nowhere = Point(x, jnp.zeros((), _vector.dtype(x)), _vector.zeros_like(x))
    carry = count(0), nowhere, nowhere, jnp.asarray(False)
    evaluations, start, last, found = jax.lax.while_loop(unfinished, evaluate, carry)
    return _vector.where(found, last, start), _between(start, last), evaluations


def _is_progress(start: Point, last: Point) -> Flag:
    """Return whether a step is worth taking: Armijo's condition holds, and so does curvature."""
    pair = _between(start, last)
    finite = jnp.isfinite(_vector.norm(last.g))
    falls = last.f < start.f + 1e-4 * _vector.dot(start.g, pair.s)
    return finite & falls & pair.is_curved()


def _between(start: Point, last: Point) -> Pair:
    return Pair(_vector.sub(last.x, start.x), _vector.sub(last.g, start.g))


def _finite(tree):
    return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), tree)


def _silenced(problem, waits, like):
    """Return the objective as Optax is to see it: zero, with a zero gradient, where a lane `waits`.

    A line search runs until its last lane is satisfied, and one that has finished, perhaps at a
    NaN, must not be that one.
    """

    @jax.custom_jvp
    def fun(x):
        return jnp.where(waits, 0, problem.value(x))

    @fun.defjvp
    def fun_jvp(primals, tangents):
        found = problem.value_and_gradient(primals[0])
        f, g = _vector.where(waits, _vector.zeros_like(found), found)
        return f, _vector.dot(g, tangents[0])

    # Optax's searches compute in float64 under x64, whatever the dtype of x.
    return lambda x: fun(optax.tree.cast_like(x, like))
