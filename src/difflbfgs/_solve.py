"""A whole solve: start, L-BFGS, Newton polish."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from difflbfgs import _curvature, _lanes, _search, _stopping, _vector
from difflbfgs._curvature import Pair
from difflbfgs._krylov import is_negative, slack
from difflbfgs._lbfgs import LBFGS, WarmStart
from difflbfgs._newton import Findings, newton_step
from difflbfgs._problem import Problem
from difflbfgs._search import Progress, Terms
from difflbfgs._solution import RESULTS, Outcome, Stats, count, has_converged
from difflbfgs._trial import Point, probe
from difflbfgs._vector import Count, Flag, Scalar, Vector
from difflbfgs._watch import Step

# A warm start takes up to this many Newton steps before L-BFGS.
_LEAD = 3
# Near the minimizer a Newton step shrinks the gradient by this factor. Where it does not, L-BFGS
# goes on, no further than to this part of the tolerance.
_CONTRACTION = 0.1
_TIGHTENING = 0.01


class _Round(eqx.Module):
    number: Count
    progress: Progress
    candidate: Vector
    seen: Findings  # of the Newton step to the candidate
    most: Scalar  # largest gradient norm at which L-BFGS may end
    num_hvps: Count


def run(
    problem: Problem,
    x0: Vector,
    warm: WarmStart | None,
    solver: LBFGS,
    max_steps: int,
    callback: Callable[[Step], None] | None,
) -> Outcome:
    """Minimize `problem`, from `x0` or from the minimizer in `warm`."""

    def search(start: Progress, x0: Vector, most: Any) -> Progress:
        terms = Terms(solver, x0, warm is not None, most)
        return _search.search(problem, start, terms, max_steps, callback)

    with jax.numpy_dtype_promotion("standard"):
        x = x0 if warm is None else warm.x
        if solver.polish == 0:
            at, pair, evaluations = _start(problem, x, warm)
            memory = _search.initial_memory(solver, x, warm)
            start = _search.begin(solver, at, pair, warm, memory, evaluations)
            end, num_hvps = search(start, at.x, math.inf), count(0)
        else:
            last = _polished(problem, x, warm, solver, search)
            end, num_hvps = last.progress, last.num_hvps
    stats = Stats(
        num_steps=end.num_steps,
        num_fun_evals=end.num_fun_evals,
        num_hvps=num_hvps,
        grad_norm=end.grad_norm,
        reference_grad_norm=end.reference,
    )
    state = WarmStart(end.x, end.g, end.engine[0], end.reference, end.scale.curvature)
    return Outcome(end.x, end.f, end.result, stats, state)


def _start(problem, x, warm) -> tuple[Point, Pair, Count]:
    """Return where L-BFGS begins, a first pair, and how many evaluations they took."""
    if warm is None:
        return probe(problem, x)
    nothing = Pair(_vector.zeros_like(x), _vector.zeros_like(x))
    return Point.of(problem, x), nothing, count(1)


def _polished(problem, x, warm, solver, search) -> _Round:
    """Run L-BFGS and then Newton steps, on one copy of the linearised gradient.

    A round linearises at the candidate that the one before left, keeps it if it is better, and
    proposes the next. In one of them L-BFGS searches from there. The rounds after that polish;
    those before, with a warm start, are there because near the minimizer Newton's method needs
    fewer products than L-BFGS needs evaluations. Rounds without a Newton step are skipped. Where
    a Newton step shows that the minimizer is not near, L-BFGS goes on, and polishing starts again.
    """
    lead = 0 if warm is None else _LEAD
    end = lead + solver.polish + 1

    def take(now: _Round):
        k = now.number
        (f, g), tangent = jax.linearize(problem.value_and_gradient, now.candidate)
        resuming = (k > lead + 1) & _is_far(now, g, solver)
        progress, accepted = _judge(now, f, g, solver)

        def hvp(p):
            return tangent(p)[1]

        def curvature():
            down = _vector.unit(progress.g)
            return Pair(down, hvp(down))

        leading = (k < lead) & accepted & _is_near(progress, solver)
        starting = (k <= lead) & ~leading
        searching = starting | resuming
        nothing = Pair(_vector.zeros_like(progress.x), _vector.zeros_like(progress.x))
        pair = jax.lax.cond(starting & (warm is None), curvature, lambda: nothing)
        point = Point(progress.x, progress.f, progress.g)
        memory, evaluations = progress.engine[0], progress.num_fun_evals
        start = _search.begin(solver, point, pair, warm, memory, evaluations)
        # Not to search is to search and be done: a `cond` would hold the memory twice. Under `vmap`
        # every lane goes through it as soon as one is to search.
        going_on = eqx.tree_at(lambda p: p.done, progress, ~resuming)
        most = jnp.where(resuming, _CONTRACTION * now.progress.grad_norm, now.most)
        progress = search(_vector.where(starting, start, going_on), x, most)
        progress = _credited(progress, resuming, solver)
        # The linearisation is of use only where the solve stands.
        here = jnp.where(
            searching, accepted & (progress.num_steps == 0), accepted | (k == lead + 1)
        )
        active = (k < end) & here & (leading | _is_worth_it(progress))
        # Before L-BFGS, further than its test asks would be work for the polish.
        floor = jnp.where(leading, 0.5 * _threshold(progress, solver), 0)
        target = jnp.maximum(floor, _target(progress))
        d, seen, products = newton_step(hvp, progress.g, target, active)
        polishing = jnp.where(here, jnp.where(active, lead + 2, end + 1), lead + 1)
        following = jnp.where(active, k + 1, end + 1)
        after = _Round(
            number=jnp.where(searching, polishing, following),
            progress=progress,
            candidate=_vector.sub(progress.x, d),
            seen=seen,
            most=most,
            num_hvps=now.num_hvps + products + (starting & (warm is None)),
        )
        waits = _lanes.waits(k > end)
        return _lanes.held(waits, now, after, lambda r: _curvature.rows(r.progress.engine[0]))

    zero = jnp.zeros((), _vector.dtype(x))

    def unstarted():
        nothing = _vector.zeros_like(x)
        memory = _search.initial_memory(solver, x, warm)
        at, pair = Point(x, zero, nothing), Pair(nothing, nothing)
        return _search.begin(solver, at, pair, warm, memory, count(0))

    # Of a cold start, nothing but the shapes is known before the first round.
    before = unstarted() if warm else _vector.zeros_like(jax.eval_shape(unstarted))
    unseen = Findings(jnp.asarray(False), zero, zero)
    first = _Round(count(0), before, x, unseen, jnp.full_like(zero, jnp.inf), count(0))
    return jax.lax.while_loop(lambda now: _lanes.anywhere(now.number <= end), take, first)


def _is_far(now: _Round, g: Vector, solver: LBFGS) -> Flag:
    """Return whether the Newton step to a candidate with gradient `g` says to go on with L-BFGS.

    A small gradient may be that of a flat stretch on the way. There the Hessian is indefinite, or
    the quadratic model does not hold and the step does not make the gradient ten times smaller.
    It says so no more where L-BFGS got no further, or the gradient is as small as the default
    tolerance asks or a hundredth of what was asked: at a degenerate minimum no step is ever good.
    """
    before = now.progress
    contracts = _vector.norm(g) <= _CONTRACTION * before.grad_norm
    conclusive = _is_indefinite(now) | (now.seen.solved & ~contracts)
    default = _stopping.threshold(0.0, None, before.reference, jnp.asarray(True))
    least = jnp.maximum(default, _TIGHTENING * _threshold(before, solver))
    gets_on = (before.grad_norm <= now.most) & (before.result == RESULTS.successful)
    return conclusive & gets_on & (before.grad_norm > least)


def _is_indefinite(now: _Round) -> Flag:
    low, high = now.seen.min_curvature, now.seen.max_curvature
    return is_negative(low, high, slack(now.progress.x, now.progress.grad_norm))


def _credited(progress: Progress, changed: Flag, solver: LBFGS) -> Progress:
    """Call a solve that `changed` successful, if its gradient is as small as was asked for."""
    small = progress.grad_norm <= _threshold(progress, solver)
    result = RESULTS.where(changed & small, RESULTS.successful, progress.result)
    return eqx.tree_at(lambda p: p.result, progress, result)


def _judge(now: _Round, f, g, solver) -> tuple[Progress, Flag]:
    """Keep the candidate if its gradient is smaller, and the objective no larger but for noise.

    In the first round it is where the solve starts.
    """
    before = now.progress
    before_norm, grad_norm = before.grad_norm, _vector.norm(g)
    better = (grad_norm < before_norm) & (f <= before.f + before.scale.noise(before.f))
    accepted = (now.number == 0) | (better & ~_is_indefinite(now))
    x, f, g, grad_norm = _vector.where(
        accepted,
        (now.candidate, f, g, grad_norm),
        (before.x, before.f, before.g, before_norm),
    )
    # The Newton step saw larger curvatures than the last steps of L-BFGS may have.
    curvature = jnp.maximum(before.scale.curvature, now.seen.max_curvature)
    scale = eqx.tree_at(lambda scale: scale.curvature, before.scale, curvature)
    limit = _stopping.at_noise_level(f, grad_norm, jnp.full_like(f, jnp.inf), scale)
    stuck = before.result == RESULTS.line_search_failed
    result = RESULTS.where(accepted & stuck & limit, RESULTS.precision_limit, before.result)
    least_f = jnp.minimum(f, before.least_f)  # above which L-BFGS, if it goes on, may not rise
    progress = eqx.tree_at(
        lambda p: (p.x, p.f, p.g, p.grad_norm, p.scale, p.result, p.least_f, p.num_fun_evals),
        before,
        (x, f, g, grad_norm, scale, result, least_f, before.num_fun_evals + 1),
    )
    return _credited(progress, accepted, solver), accepted


def _target(progress: Progress) -> Scalar:
    """Return the residual to which the Newton equations are solved.

    `‖g‖² / reference` makes the step converge quadratically (Eisenstat & Walker 1996). Where L-BFGS
    was stopped by the rounding error of the objective, the step goes to that of the gradient.
    """
    quadratic = progress.grad_norm**2 / progress.reference
    noise = _stopping.rounding(progress.reference)
    limit, stuck = RESULTS.precision_limit, RESULTS.line_search_failed
    stopped = (progress.result == limit) | (progress.result == stuck)
    return jnp.where(stopped, jnp.minimum(quadratic, noise), quadratic)


def _is_near(progress: Progress, solver: LBFGS) -> Flag:
    """Return whether Newton's method is to be tried before L-BFGS, and there is something to do."""
    above = _threshold(progress, solver) < progress.grad_norm
    return above & (progress.grad_norm <= progress.reference)


def _threshold(progress: Progress, solver: LBFGS) -> Scalar:
    reference, local = progress.reference, jnp.asarray(True)
    return _stopping.threshold(solver.atol, solver.rtol, reference, local)


def _is_worth_it(progress: Progress) -> Flag:
    """Return whether a Newton step is called for, and the gradient above its rounding error."""
    stuck = progress.result == RESULTS.line_search_failed
    floor = _stopping.rounding(progress.scale.curvature * progress.scale.size)
    return (has_converged(progress.result) | stuck) & (progress.grad_norm > 0.01 * floor)
