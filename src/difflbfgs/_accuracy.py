"""A hypergradient as exact as was asked for, and no more.

Minimizer and adjoint are solved loosely, and the error of the hypergradient is estimated
(`_certificate`). If it is too large, the Newton step of the estimate is taken, and the error
estimated where it leads, with the Hessian of the first point: the step that shows an error of ten
times what was wanted has as good as removed it. If the step does not contract, the minimizer is
not near enough. Then the search goes on, to a tolerance a hundred times smaller.

M. J. Ehrhardt and L. Roberts, Analyzing inexact hypergradients for bilevel learning, IMA Journal of
Applied Mathematics, 2023.
"""

import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from difflbfgs import _box, _lanes, _vector
from difflbfgs._certificate import (
    ROUGHLY,
    Certified,
    Guess,
    curvatures,
    estimate,
    further,
    guessed,
    rounding,
    spectrum,
    systems,
)
from difflbfgs._face import Smooth
from difflbfgs._linear import Accuracy, Dense, Report, System
from difflbfgs._loop import Point, Search, State, begin, make_settings
from difflbfgs._loop import outcome as outcome_of
from difflbfgs._operator import SymmetricOperator
from difflbfgs._problem import Problem, interior
from difflbfgs._solution import RESULTS, Outcome, count, has_converged, raised
from difflbfgs._task import Task
from difflbfgs._vector import Count, Flag, Scalar, Vector

# The tolerance of the first solve and its adjoint, whatever the accuracy wanted. From there a
# Newton step gains the rest for less; from further away it may not contract.
_FIRST = 2e-2
# By so much the tolerance shrinks before the search goes on.
_NARROWER = 1e-2
# No system is solved to a smaller part than this, as the Newton step is no better.
_FINEST = 1e-3
_MOST_STEPS = 12
# An error that falls by less than this is at rounding level.
_PROGRESS = 0.5


class Wanted(eqx.Module):
    """An error of at most `relative ‖gradient‖ + absolute`."""

    relative: Any
    absolute: Any

    def target(self, gradient: list[Array]) -> Scalar:
        """Return the error that is allowed."""
        return self.relative * _vector.norm([jnp.abs(leaf) for leaf in gradient]) + self.absolute


class _Refined(eqx.Module):
    """The best guess so far with its error, and the next one, yet to be judged."""

    best: Guess
    error: Scalar
    next: Guess
    forcing: Scalar
    num_steps: Count
    num_trips: Count
    low: Scalar
    high: Scalar
    goes_on: Flag


class _Attempts(eqx.Module):
    best: Certified
    state: State
    u: Vector
    rtol: Scalar
    over: Flag


def accurate(
    task: Task, inner: Problem, outer: Problem, start: Vector | None, wanted: Wanted
) -> Certified:
    """Differentiate `outer` at the minimizer of `inner`, as exactly as is `wanted`."""
    with interior(inner.name):
        quiet = dataclasses.replace(task, throw=False)
        found = _accurate(quiet, inner, outer, start, wanted)
        if not task.throw:
            return found
        failed = found.result != RESULTS.successful
        parts = found.value, found.gradient, found.u, found.outcome.x
        value, gradient, u, x = raised(parts, failed, found.result)
        outcome = dataclasses.replace(found.outcome, x=x)
        return dataclasses.replace(found, value=value, gradient=gradient, u=u, outcome=outcome)


def _accurate(task, inner, outer, start, wanted) -> Certified:
    search: Search = task.find
    dtype = _vector.dtype(search.x0)
    wanted = Wanted(*(jnp.asarray(part, dtype) for part in (wanted.relative, wanted.absolute)))
    finest = _vector.epsilon(search.x0) ** 0.5
    box = inner.box()
    cold = begin(make_settings(search.solver, search.x0, search.max_steps, box), search.x0)

    def attempt(state, u, rtol, spent):
        solver = dataclasses.replace(search.solver, rtol=rtol, polish=0)
        left = search.max_steps - spent.num_steps
        again = dataclasses.replace(search, warm=state, solver=solver, max_steps=left)
        return _attempt(task, again, inner, outer, u, wanted)

    def advance(now: _Attempts) -> _Attempts:
        spent = now.best
        found = attempt(now.state, now.u, now.rtol, spent.outcome.stats)
        known = jnp.isfinite(spent.error_estimate)
        better = ~known | (found.error_estimate < spent.error_estimate)
        stuck = known & ~(found.error_estimate < _PROGRESS * spent.error_estimate)
        over = found.result == RESULTS.successful
        over |= ~has_converged(found.outcome.result) | stuck | (now.rtol <= finest)
        best = _with_counts(_vector.where(better, found, spent), spent, found)
        rtol = jnp.maximum(_NARROWER * now.rtol, finest)
        after = _Attempts(best, found.outcome.state, found.u, rtol, over)
        waits = _lanes.waits(now.over)
        return _vector.where(waits, now, after)

    warm = cold if search.warm is None else search.warm
    if warm.search is None:  # every state of the loop has the structure of the first
        warm = dataclasses.replace(warm, search=cold.search)
    u = _vector.zeros_like(search.x0)
    nothing = _nothing(outcome_of(cold, box), u, inner.theta)
    first = _Attempts(
        best=nothing,
        state=warm,
        u=u if start is None else start,
        rtol=jnp.asarray(_FIRST, dtype),
        over=jnp.asarray(False),
    )
    end: Any = jax.lax.while_loop(lambda now: _lanes.anywhere(~now.over), advance, first)
    return end.best


def _nothing(outcome: Outcome, u: Vector, theta: list[Array]) -> Certified:
    """Return what is known before the first attempt: that the error is infinite."""
    zero = jnp.zeros((), _vector.dtype(u))
    return Certified(
        outcome=outcome,
        value=zero,
        gradient=_vector.zeros_like(theta),
        u=u,
        result=RESULTS.accuracy_not_reached,
        num_adjoint_steps=count(0),
        num_estimate_steps=count(0),
        adjoint_residual=zero,
        error_estimate=zero + jnp.inf,
        min_curvature=zero,
        max_curvature=zero,
    )


def _with_counts(best: Certified, *all_of_them: Certified) -> Certified:
    """Return the best of what was found, with the counts of them all."""

    def counts(found):
        stats = found.outcome.stats
        return (
            stats.num_steps,
            stats.num_fun_evals,
            stats.num_hvps,
            found.num_adjoint_steps,
            found.num_estimate_steps,
        )

    return eqx.tree_at(counts, best, tuple(map(sum, zip(*map(counts, all_of_them), strict=True))))


def _attempt(
    task: Task, search: Search, problem: Problem, outer: Problem, u: Vector, wanted: Wanted
) -> Certified:
    """Search, solve the adjoint, and take Newton steps as long as the error is too large."""
    outcome = search(problem)
    inner = task.on_face(problem, outcome)
    own, exact = systems(task, inner, outcome)
    v = outer.gradient(outcome.x)
    if exact is own:
        u, report = exact.solve(v, Accuracy(search.solver.rtol, ROUGHLY), u)
        report = task.judged(outcome, report)
    else:
        u, report = task.solve_system(own, outcome, v, u)
    trusted = task.trusts(outcome) & (report.result == RESULTS.successful)
    guess, _ = guessed(task, inner, outer, outcome, u)
    refined = _refined(inner, outer, guess, exact, wanted, trusted, report)
    best, error = refined.best, jnp.where(trusted, refined.error, jnp.inf)
    reached = error <= wanted.target(best.gradient)
    result = RESULTS.where(reached, RESULTS.successful, RESULTS.accuracy_not_reached)
    result = RESULTS.where(report.result == RESULTS.successful, result, report.result)
    result = RESULTS.where(has_converged(outcome.result), result, outcome.result)
    value, v = outer.value_and_gradient(best.x)
    residual = exact.length(_vector.sub(v, inner.product(best.x, best.u)))
    low, high, products = refined.low, refined.high, further(own, exact, refined.num_steps)
    if isinstance(exact.solver, Dense):  # assembled where the search ended, and not at `best.x`
        low, high = spectrum(SymmetricOperator.of(partial(inner.product, best.x), u).as_matrix())
        products += _vector.size(u)
    return Certified(
        outcome=_moved(outcome, problem, best.x, refined.num_trips),
        value=value,
        gradient=_vector.scale(jnp.where(trusted, 1, jnp.nan), best.gradient),
        u=best.u,
        result=result,
        num_adjoint_steps=report.num_steps,
        num_estimate_steps=products,
        adjoint_residual=residual / _vector.nonzero(exact.length(v)),
        error_estimate=error,
        min_curvature=low,
        max_curvature=high,
    )


def _refined(
    inner: Smooth,
    outer: Problem,
    guess: Guess,
    system: System,
    wanted: Wanted,
    trusted: Flag,
    adjoint: Report,
) -> _Refined:
    """Estimate the error of the guess, and of those to which the Newton steps lead."""
    noise = rounding(inner, guess.x, system)

    def advance(now: _Refined) -> _Refined:
        found = estimate(inner, outer, now.next, system, noise, now.forcing)
        better = found.error < now.error
        progress = found.error < _PROGRESS * now.error
        best = _vector.where(better, now.next, now.best)
        error = _vector.where(better, found.error, now.error)
        target = wanted.target(best.gradient)
        num_trips = now.num_trips + 1
        goes_on = progress & (error > target) & (num_trips < _MOST_STEPS)
        # The step to come is to leave a third of what is allowed.
        forcing = target / (3 * now.forcing * _vector.nonzero(found.error))
        low, high = curvatures(found.inner, found.adjoint)
        after = _Refined(
            best=best,
            error=error,
            next=found.after,
            forcing=jnp.clip(forcing, _FINEST, ROUGHLY),
            num_steps=now.num_steps + found.num_steps(),
            num_trips=num_trips,
            low=jnp.minimum(now.low, low),
            high=jnp.maximum(now.high, high),
            goes_on=goes_on,
        )
        return _vector.where(_lanes.waits(~now.goes_on), now, after)

    zero = jnp.zeros_like(noise)
    low, high = curvatures(adjoint)
    first = _Refined(
        best=guess,
        error=zero + jnp.inf,
        next=guess,
        forcing=zero + ROUGHLY,
        num_steps=count(0),
        num_trips=count(0),
        low=low,
        high=high,
        goes_on=trusted,
    )
    end: Any = jax.lax.while_loop(lambda now: _lanes.anywhere(now.goes_on), advance, first)
    return end


def _moved(outcome: Outcome, problem: Problem, x: Vector, num_trips: Count) -> Outcome:
    """Return the outcome with the minimizer at `x`, to which so many evaluations led."""
    f, g = problem.value_and_gradient(x)
    free = g if outcome.active is None else _box.masked(outcome.active, g)
    grad_norm = _vector.norm(free)
    evaluations = outcome.stats.num_fun_evals + num_trips
    stats = dataclasses.replace(outcome.stats, num_fun_evals=evaluations, grad_norm=grad_norm)
    state = dataclasses.replace(outcome.state, point=Point(x, f, g, grad_norm))
    return dataclasses.replace(outcome, x=x, f=f, stats=stats, state=state)
