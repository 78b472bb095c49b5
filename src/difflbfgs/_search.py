"""L-BFGS: `optax.lbfgs` inside `jax.lax.while_loop`, and the checks that make it dependable.

Nocedal & Wright, Numerical Optimization (2006), algorithms 7.4 and 7.5, with the line search of
algorithms 3.5 and 3.6. Optax proposes each step. The loop here takes it only if the objective does
not rise and everything is finite, keeps its curvature pair only if that is positive, restarts the
memory otherwise, and says how it ended.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from difflbfgs import _curvature, _lanes, _stopping, _trial, _vector
from difflbfgs._curvature import Pair
from difflbfgs._lbfgs import LBFGS, WarmStart
from difflbfgs._problem import Problem
from difflbfgs._solution import count
from difflbfgs._stopping import Patience, Scale
from difflbfgs._trial import Point, Trial
from difflbfgs._vector import Count, Flag, Scalar, Vector
from difflbfgs._watch import Step, watch


class Terms(eqx.Module):
    """What a search is told, and does not change.

    Attributes:
        solver: its settings.
        x0: where the solve began.
        fixed_reference: whether the reference of the gradient test stays what it is at the start.
        most: largest gradient norm to end with, if it is above that of the default tolerance.
    """

    solver: LBFGS
    x0: Vector
    fixed_reference: bool = eqx.field(static=True)
    most: Any = math.inf

    def threshold(self, reference: Scalar, local: Flag) -> Scalar:
        """Return the gradient norm at which a search ends."""
        return _stopping.threshold(self.solver.atol, self.solver.rtol, reference, local, self.most)


class Progress(eqx.Module):
    """Where a solve stands; the carry of its loop."""

    x: Vector
    f: Scalar
    g: Vector
    grad_norm: Scalar
    engine: Any
    scale: Scale
    reference: Scalar
    least_f: Scalar
    least_grad_norm: Scalar
    patience: Patience
    predicted: Scalar  # decrease predicted by the step last rejected; inf if it was accepted
    fresh: Flag  # nothing was accepted since the memory was last restarted
    done: Flag
    result: Any
    num_steps: Count
    num_fun_evals: Count


def initial_memory(solver: LBFGS, x: Vector, warm: WarmStart | None) -> optax.ScaleByLBFGSState:
    """Return the memory to begin with: that of `warm`, or an empty one."""
    empty: Any = solver.engine(_vector.epsilon(x)).init(x)
    return empty[0] if warm is None else warm.memory


def begin(
    solver: LBFGS,
    at: Point,
    pair: Pair,
    warm: WarmStart | None,
    memory: optax.ScaleByLBFGSState,
    num_fun_evals: Count,
) -> Progress:
    """Return the progress before the first step, with an empty `memory` and `pair`, or `warm`'s.

    `pair` makes the first step as long as the curvature says, whatever the scale of the objective.
    """
    x, f, g = at.x, at.f, at.g
    curvature = pair.curvature() if warm is None else warm.curvature
    pair = pair if warm is None else _curvature.newest(warm.memory, warm.x, warm.g)
    x_norm, grad_norm = _vector.norm(x), _vector.norm(g)
    # The first step is no longer than 100 times the size of x, whatever the curvature says.
    room = jnp.maximum(1, x_norm)
    believed = jnp.isfinite(curvature) & (grad_norm <= 100 * room * curvature)
    curvature = jnp.where(believed, curvature, grad_norm / room)
    trusted = believed & pair.is_curved()
    pair = _vector.where(trusted, pair, _curvature.isotropic(x, g, curvature))
    initial: Any = solver.engine(_vector.epsilon(x)).init(x)
    scale = Scale.first(grad_norm, curvature, x_norm)
    reference = scale.reference()
    if warm is not None:
        memory = _vector.where(trusted, memory, _curvature.emptied(memory))
        reference = jnp.where(trusted, warm.reference, reference)
    finite = jnp.isfinite(f) & jnp.isfinite(grad_norm) & jnp.isfinite(x_norm)
    sound = _vector.where(finite, (x, g, pair), _vector.zeros_like((x, g, pair)))
    memory = _curvature.moved(memory, *sound)
    nothing = jnp.asarray(False)
    at_limit = nothing  # of a cold start the scales are not known
    if warm is not None:
        at_limit = _stopping.at_noise_level(f, grad_norm, jnp.full_like(f, jnp.inf), scale)
    threshold = _stopping.threshold(solver.atol, solver.rtol, reference, scale.local)
    done, result = _stopping.ending(
        successful=grad_norm <= threshold,
        unbounded=nothing,
        noise=at_limit,
        stuck=nothing,
        nonfinite_start=~finite,
    )
    return Progress(
        x=x,
        f=f,
        g=g,
        grad_norm=grad_norm,
        engine=(memory, *initial[1:]),
        scale=scale,
        reference=reference,
        least_f=f,
        least_grad_norm=grad_norm,
        patience=Patience(count(0), count(0)),
        predicted=jnp.full_like(f, jnp.inf),
        fresh=jnp.asarray(True),
        done=done,
        result=result,
        num_steps=count(0),
        num_fun_evals=num_fun_evals,
    )


def search(
    problem: Problem,
    start: Progress,
    terms: Terms,
    max_steps: int,
    callback: Callable[[Step], None] | None,
) -> Progress:
    """Take steps until the solve is over."""
    if max_steps == 0:
        return start

    def unfinished(now: Progress):
        return ~now.done & (now.num_steps < max_steps)

    def advance(now: Progress):
        waits = _lanes.waits(~unfinished(now))
        after, step_size = take_step(problem, now, terms)
        counts, last = (after.num_steps, after.num_fun_evals), ~unfinished(after)
        record = Step(*counts, after.f, after.grad_norm, step_size, last)
        watch(callback, record, ~waits)
        return _lanes.held(waits, now, after, lambda progress: _curvature.rows(progress.engine[0]))

    return jax.lax.while_loop(lambda now: _lanes.anywhere(unfinished(now)), advance, start)


def take_step(problem: Problem, now: Progress, terms: Terms) -> tuple[Progress, Scalar]:
    """Take one step; also return its size, 0 if it was rejected."""
    engine = terms.solver.engine(_vector.epsilon(now.x))
    trial = _trial.propose(problem, engine, now.engine, now.x, now.f, now.g, now.done)
    after = _judge(trial, now, engine, terms)
    return after, jnp.where(after.fresh, 0, trial.step_size)


def _judge(trial: Trial, now: Progress, engine, terms: Terms) -> Progress:
    """Accept or reject the trial, keep or drop its pair, and see whether that was the end."""
    pair = Pair(_vector.sub(trial.x, now.x), _vector.sub(trial.g, now.g))
    s_norm, y_norm, x_norm, travel, g_norm = _vector.norms(
        pair.s, pair.y, trial.x, _vector.sub(trial.x, terms.x0), trial.g
    )
    level = now.least_f + _stopping.rounding(now.least_f)
    finite = jnp.isfinite(trial.f) & jnp.isfinite(s_norm) & jnp.isfinite(g_norm)
    accepted = finite & (trial.f <= level) & (s_norm > 0)
    curved = accepted & pair.is_curved((s_norm, y_norm))
    here, there = (now.x, now.f, now.g, now.grad_norm), (trial.x, trial.f, trial.g, g_norm)
    x, f, g, grad_norm = _vector.where(accepted, there, here)

    curvature = jnp.where(curved, pair.curvature((s_norm, y_norm)), 0)
    scale = now.scale.after(s_norm, curvature, x_norm, travel)
    scale = _vector.where(accepted, scale, now.scale)
    reference = now.reference if terms.fixed_reference else scale.reference()
    patience = _patience(trial, now, pair, s_norm, accepted, grad_norm)
    # After a restart, what the rejected quasi-Newton step promised counts, not what a step down
    # the gradient does.
    predicted = jnp.where(jnp.isinf(now.predicted), trial.predicted(), now.predicted)
    over = jnp.where(accepted, patience.exhausted(), now.fresh)
    done, result = _stopping.ending(
        successful=grad_norm <= terms.threshold(reference, scale.local),
        unbounded=(trial.f == -jnp.inf) | patience.unbounded(),
        noise=over & _stopping.at_noise_level(f, grad_norm, predicted, scale),
        stuck=over,
        nonfinite_start=jnp.asarray(False),
    )

    def restarted():
        return _restarted(trial.engine, engine.init(x), x, g, scale.curvature)

    return Progress(
        x=x,
        f=f,
        g=g,
        grad_norm=grad_norm,
        engine=jax.lax.cond(curved, lambda: trial.engine, restarted),
        scale=scale,
        reference=reference,
        least_f=jnp.minimum(f, now.least_f),
        least_grad_norm=jnp.minimum(grad_norm, now.least_grad_norm),
        patience=patience,
        predicted=jnp.where(accepted, jnp.inf, predicted),
        fresh=~accepted,
        done=done,
        result=result,
        num_steps=now.num_steps + 1,
        num_fun_evals=now.num_fun_evals + trial.num_fun_evals,
    )


def _patience(trial: Trial, now: Progress, pair: Pair, s_norm, accepted, grad_norm) -> Patience:
    """Count the steps that made no progress, and those that found no bottom."""
    progress = (trial.f < now.least_f - _stopping.rounding(now.least_f)) | (
        grad_norm < 0.5 * now.least_grad_norm
    )
    steep = _vector.dot(pair.s, pair.y) <= -0.1 * trial.slope  # g⁺ᵀs is still 0.9 gᵀs
    far = (trial.step_size >= _stopping.RUNAWAY_STEP) & (s_norm >= 1)
    runaway = accepted & steep & far
    return Patience(
        stalled=jnp.where(accepted & progress, 0, now.patience.stalled + accepted),
        runaway=jnp.where(runaway, now.patience.runaway + 1, 0),
    )


def _restarted(state, initial, x, g, curvature):
    """Return the engine's state with its memory emptied, about to step down the gradient."""
    pair = _curvature.isotropic(x, g, curvature)
    return _curvature.emptied(_curvature.moved(state[0], x, g, pair)), *initial[1:]
