"""A whole solve: start, L-BFGS, Newton polish."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from difflbfgs import _lbfgs, _stopping, _vector
from difflbfgs._curvature import Pair
from difflbfgs._lbfgs import LBFGS, Progress, WarmStart
from difflbfgs._newton import newton_step
from difflbfgs._problem import Problem
from difflbfgs._solution import RESULTS, Outcome, Stats, count, has_converged
from difflbfgs._trial import probe
from difflbfgs._vector import Count, Flag, Scalar, Vector
from difflbfgs._watch import Step


class _Polish(eqx.Module):
    progress: Progress
    candidate: Vector
    min_curvature: Scalar  # seen by the Newton step to the candidate
    max_curvature: Scalar
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

    def search(x, f, g, pair):
        start = _lbfgs.begin(solver, x, f, g, pair, warm)
        return _lbfgs.search(problem, start, solver, max_steps, callback, warm is not None)

    with jax.numpy_dtype_promotion("standard"):
        x = x0 if warm is None else warm.x
        if solver.polish == 0:
            f, g, pair, evaluations = _start(problem, x, warm)
            end, num_hvps = search(x, f, g, pair), count(0)
            num_fun_evals = end.num_fun_evals + evaluations
        else:
            end, num_hvps = _polished(problem, x, warm, solver, search)
            num_fun_evals = end.num_fun_evals + solver.polish + 2
    stats = Stats(
        num_steps=end.num_steps,
        num_fun_evals=num_fun_evals,
        num_hvps=num_hvps,
        grad_norm=_vector.norm(end.g),
        reference_grad_norm=end.reference,
    )
    state = WarmStart(end.x, end.g, end.engine[0], end.reference, end.scale.curvature)
    return Outcome(end.x, end.f, end.result, stats, state)


def _start(problem, x, warm):
    """Return `f`, `g`, a first pair, and how many evaluations they took."""
    if warm is None:
        return *probe(problem, x), 2
    nothing = Pair(_vector.zeros_like(x), _vector.zeros_like(x))
    return *problem.value_and_gradient(x), nothing, 1


def _polished(problem, x, warm, solver, search) -> tuple[Progress, Count]:
    """Run L-BFGS and then Newton steps, on one copy of the linearised gradient.

    Round 0 linearises at the start and searches from there. Every other round linearises at the
    candidate that the one before left, keeps it if it is better, and proposes the next.
    """
    zero = jnp.zeros((), _vector.dtype(x))

    def polish_round(k, now: _Polish):
        (f, g), tangent = jax.linearize(problem.value_and_gradient, now.candidate)

        def hvp(p):
            return tangent(p)[1]

        def first():
            down = _vector.unit(g)
            pair = Pair(down, hvp(down))
            progress = search(now.candidate, f, g, pair)
            num_hvps = now.num_hvps + (warm is None)
            return _Polish(progress, progress.x, zero, zero, num_hvps)

        def further():
            progress, accepted = _judge(now, f, g, solver)
            active = (k <= solver.polish) & ((k == 1) | accepted) & _is_worth_it(progress)
            d, low, high, products = newton_step(hvp, g, _target(progress), active)
            candidate = _vector.sub(progress.x, d)
            return _Polish(progress, candidate, low, high, now.num_hvps + products)

        return jax.lax.cond(k == 0, first, further)

    nowhere = Pair(_vector.zeros_like(x), _vector.zeros_like(x))
    before = _lbfgs.begin(solver, x, zero, _vector.zeros_like(x), nowhere, warm)
    start = _Polish(before, x, zero, zero, count(0))
    end = jax.lax.fori_loop(0, solver.polish + 2, polish_round, start)
    return end.progress, end.num_hvps


def _judge(now: _Polish, f, g, solver) -> tuple[Progress, Flag]:
    """Keep the candidate if its gradient is smaller, and the objective no larger but for noise."""
    before = now.progress
    grad_norm = _vector.norm(g)
    accepted = (
        (now.min_curvature > 0)
        & (grad_norm < _vector.norm(before.g))
        & (f <= before.f + before.scale.noise(before.f))
    )
    x, f, g = _vector.where(accepted, (now.candidate, f, g), (before.x, before.f, before.g))
    small = _stopping.passes(
        grad_norm, solver.atol, solver.rtol, before.reference, jnp.asarray(True)
    )
    # The Newton step saw larger curvatures than the last steps of L-BFGS may have.
    curvature = jnp.maximum(before.scale.curvature, now.max_curvature)
    scale = eqx.tree_at(lambda scale: scale.curvature, before.scale, curvature)
    limit = _stopping.at_noise_level(f, grad_norm, jnp.full_like(f, jnp.inf), scale)
    stuck = before.result == RESULTS.line_search_failed
    result = RESULTS.where(accepted & stuck & limit, RESULTS.precision_limit, before.result)
    result = RESULTS.where(accepted & small, RESULTS.successful, result)
    progress = eqx.tree_at(
        lambda p: (p.x, p.f, p.g, p.scale, p.result), before, (x, f, g, scale, result)
    )
    return progress, accepted


def _target(progress: Progress) -> Scalar:
    """Return the residual to which the Newton equations are solved.

    `‖g‖² / reference` makes the step converge quadratically (Eisenstat & Walker 1996). Where L-BFGS
    was stopped by the rounding error of the objective, the step goes to that of the gradient.
    """
    quadratic = _vector.norm(progress.g) ** 2 / progress.reference
    noise = _stopping.rounding(progress.reference)
    stopped = progress.result != RESULTS.successful
    return jnp.where(stopped, jnp.minimum(quadratic, noise), quadratic)


def _is_worth_it(progress: Progress) -> Flag:
    """Return whether a Newton step is called for, and the gradient above its rounding error."""
    stuck = progress.result == RESULTS.line_search_failed
    floor = _stopping.rounding(progress.scale.curvature * progress.scale.size)
    return (has_converged(progress.result) | stuck) & (_vector.norm(progress.g) > 0.01 * floor)
