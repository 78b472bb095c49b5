"""A solve as a table: what a trial finds, what comes next, and when it is over.

A trial is an evaluation of the objective and its gradient at one point. `λ² = -gᵀd` is the Newton
decrement: with `H d = -g`, the square of the distance to the minimizer of the quadratic model in
the energy norm `√(xᵀHx)`. Rescaling single variables does not change it.

| phase: the trial is | what is found | next |
|---|---|---|
| START: the start | not finite | DONE, `nonfinite_start` |
| | an unfinished solve stood there; value and gradient agree to rounding | what follows there |
| | the gradient is zero, or below `atol` without a polish | DONE, `successful` |
| | a warm start, and the gradient is small enough to hand over | NEWTON |
| | else | SEARCH, down the gradient, or along the direction of a warm memory |
| SEARCH: `x + t d` | a cold start's first trial shows that the minimum is near | NEWTON, from `x` |
| | the Wolfe conditions do not hold yet | SEARCH, another `t` |
| | out of trials | SEARCH, the best `t` met, which is then taken |
| | out of trials, and none fell | SEARCH, down the gradient, the memory emptied |
| | the same, and the values contradict the slopes | the same, and their noise is measured |
| | they hold: taken; the gradient is below `atol` | DONE, `successful`; NEWTON with a polish |
| | taken; the gradient is small enough to hand over | NEWTON |
| | taken; without a polish, gradient and decrement are small | DONE, `successful` |
| | taken; else | SEARCH, along Optax's direction |
| | stuck: no progress, or no descent down the gradient | NEWTON, once; or DONE |
| NEWTON: `x + d` | contracts, and what is left is small | taken; DONE, `successful` |
| | does not; the step before did, or `x` is at rounding, and `λ²` is small | DONE, `successful` |
| | contracts, or leads down to another face of the bounds | taken; NEWTON |
| | does not; `λ²` is rounding of `xᵀHx`, or of `f` and the solve is stuck or long | DONE |
| | the same, but the gradient is large or `rtol=0`, and `f` is seen to fall by it | SEARCH |
| | the same, but `f` is seen to change, and the slope as at no degenerate minimum | SEARCH |
| | the same, but `f` is seen to change, and this is the first step, and taken | NEWTON |
| | the same, but values contradict slopes, and their noise is not known yet | SEARCH |
| | does not; stuck | DONE, `line_search_failed` |
| | does not, or there is no such step | SEARCH, to a smaller gradient before the next |
| any | stuck again, at rounding | DONE, `precision_limit` |
| | the same; the Hessian is indefinite, or zero along a slope | DONE, `line_search_failed` |
| | the same, with a slope along a variable that has no curvature | DONE, `no_minimizer` |
| | five searches in a row met no bottom | DONE, `unbounded` |
| | `max_steps` | DONE, `max_steps_reached` |

A step *contracts* if `|∇f(x+d)ᵀd| <= 0.1 λ²` and the objective falls by `λ²/4` or more, or by
less than its noise can show. It is taken if the norm of the gradient falls, too, and it is the last
only if that falls to a quarter, or noise hides it. *What is left* is
`√(q λ²)` with `q = |∇f(x+d)ᵀd| / λ²`, or what conjugate gradients left of the system. Small is
`rtol` of the energy norm of `x`, or of the step that led there if that is larger.

The derivative of the minimizer is that of its Hessian, which changes along `d` by about `2q` of
itself, and so along what is left by `2q √q`. That is to be `√rtol` at most: along a flat valley a
minimum may be near beside the energy of `x`, and not beside the length over which `H` changes.
Changes along several directions may cancel in `q`: the part of the norm of the gradient that the
step leaves, and conjugate gradients did not, counts like `q` if it is larger.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from difflbfgs import _vector, _wolfe
from difflbfgs._scale import Scale, at_noise_level, is_curved, rounding
from difflbfgs._solution import RESULTS, count
from difflbfgs._vector import Count, Flag, Scalar
from difflbfgs._wolfe import Judgement, Line, Trial

START, SEARCH, NEWTON, DONE = range(4)

# A Newton step contracts if the slope at its end is this part of that at its beginning.
CONTRACTION = 0.1
# The same of the norm of the gradient, of which inexact systems leave some.
_WHOLE = 0.25
# The part of the reference at which the search hands over to Newton's method, at first; see
# `hand_over`. Where a step does not contract, the gradient has to be much smaller before the next.
HAND_OVER = 1e-3
# At a degenerate minimum the decrement tends to zero beside the energy, and at infinity it does
# not: along exp(-x) the ratio of their roots is 1/x.
_DEGENERATE = 1e-2
# To a degenerate minimum, or down an exponential, a Newton step leaves at most 1/e of its slope.
_TAIL = 0.4
# This many steps without progress beyond rounding, or line searches in a row that lengthened their
# step by at least `_RUNAWAY_STEP`, to 1 or more, and found the objective as steep as before.
_STALLED = 12
# Newton's method is asked after so many steps whatever they say, and again after twice as many:
# where variables differ in curvature by many orders the search is slow far from the minimum, too.
_LONG = 64
_RUNAWAY = 5
_RUNAWAY_STEP = 1e3
# A step of L-BFGS meets a bottom if the slope at its end is this part of that at its beginning; on
# the tail of an exponential it is half. The curvature that is remembered counts up to so many times
# the one that it meets.
_BOTTOM = 0.25
_REMEMBERED = 16.0
# An objective whose values are wrong by more than this part of them jumps, and is not noisy.
_NOISIEST = 1e-5
# Trials after which a search within the noise of the objective is content with what it has.
_FEW = 5


class Terms(eqx.Module):
    """What a solve is asked for.

    Attributes:
        rtol: relative tolerance; see the module.
        atol: absolute tolerance on the gradient norm.
        noise: error of the objective's values relative to them, but for rounding, as far as known.
        polish: number of Newton steps.
        max_steps: bound on the steps, or `None`.
    """

    rtol: Any
    atol: Any
    noise: Any
    polish: int = eqx.field(static=True)
    max_steps: Any


class Here(eqx.Module):
    """The point where the solve stands, in scalars; `slope` is `gᵀd`."""

    f: Scalar
    grad_norm: Scalar
    slope: Scalar


class Wall(eqx.Module):
    """What bounds make of a trial.

    Attributes:
        promise: `gᵀs`; `t gᵀd` on a straight way.
        met: a variable met its bound on the way, which has a kink there.
        changed: so, or other variables are free at the trial than at the point.
    """

    promise: Scalar
    met: Flag
    changed: Flag


class Seen(eqx.Module):
    """What was measured at a trial: of the point, and of the step `s` there with its `y`.

    With bounds, in the space of the variables that are free there.
    """

    trial: Trial
    grad_norm: Scalar
    x_norm: Scalar
    travel: Scalar
    s_norm: Scalar
    y_norm: Scalar
    curved: Scalar  # sᵀy
    across: Scalar  # xᵀy
    back: Scalar  # (x - x0)ᵀy
    wall: Wall | None = None

    def promise(self, slope: Scalar) -> Scalar:
        """Return what the gradient promises of the step, along a direction of this slope."""
        return self.trial.t * slope if self.wall is None else self.wall.promise

    def kink(self) -> Flag | None:
        """Return whether there is a kink in the way, or `None` if there are no bounds."""
        return None if self.wall is None else self.wall.met

    def elsewhere(self) -> Flag:
        """Return whether the trial is on another face."""
        return jnp.asarray(False) if self.wall is None else self.wall.changed

    def finite(self) -> Flag:
        """Return whether objective and gradient are finite at the trial."""
        return jnp.isfinite(self.trial.f) & jnp.isfinite(self.grad_norm)

    def is_curved(self) -> Flag:
        """Return whether `sᵀy > eps ‖s‖ ‖y‖`."""
        return is_curved(self.curved, self.s_norm, self.y_norm)


class Findings(eqx.Module):
    """What is known of a Newton step.

    Attributes:
        valid: `d` is a descent direction, and the Hessian positive definite as far as was seen, or
            its negative curvature no more than the gradient explains.
        negative: negative curvature was seen.
        falls: there is a slope along a variable, and no curvature.
        steep: the same along a direction that conjugate gradients met.
        solved: its equations were solved as well as was asked.
        residual: the part of `λ²` that was left of them.
        rest: the norm of what was left of the gradient.
        noise: the part of the slope, and of the gradient, that may be rounding at the end.
        energy: `xᵀHx`, or `sᵀHs` of the step to `x` if that is larger.
        size: `xᵀHx`, of whose size the terms of the objective are.
        products: Hessian products spent.
    """

    valid: Flag
    negative: Flag
    falls: Flag
    steep: Flag
    solved: Flag
    residual: Scalar
    rest: Scalar
    noise: Scalar
    energy: Scalar
    size: Scalar
    products: Count


class Counts(eqx.Module):
    """What a solve has cost: see `Stats`."""

    num_steps: Count
    num_fun_evals: Count
    num_hvps: Count


class Ledger(eqx.Module):
    """What the table remembers.

    Attributes:
        phase: of the trial to come.
        following: of the trial that would come if the solve were not told to end.
        result: how the solve ended.
        scale: the size of things.
        least_f, least_grad_norm: the least so far.
        noise: error of the objective's values relative to them, as measured.
        stalled, runaway: steps without progress, and without a bottom.
        settled: the last step met the curvature that is remembered, or a bottom along it: on the
            tail of a cliff neither is so, and the gradient is small beside what it was.
        fresh: nothing was taken since the memory was last emptied.
        asked: Newton's method was asked since the solve got stuck.
        hand_over: the part of the reference at which it is asked.
        ask_at: the number of steps after which it is asked anyway.
        steps_energy: the energy of the last step, `sᵀy`.
        least_energy: a lower bound of `xᵀHx` by the last step, `(xᵀy)² / sᵀy`; or of that of the
            way from the start, cut to length 1, as the minimizer may be the origin.
        predicted: the decrement of the quasi-Newton model where it was last asked.
        newton: what is known of the Newton step to be tried.
        polished: Newton steps taken in a row.
        contracted: the last of them contracted.
        achieved: the relative error that is left.
        regular: whether a Newton step showed that the minimum is one that can be differentiated.
        num_steps, num_fun_evals, num_hvps: counts.
        resumed_at: what they were when it was last resumed; `None` in a solve that never is.
    """

    phase: Count
    following: Count
    result: Any
    scale: Scale
    least_f: Scalar
    least_grad_norm: Scalar
    noise: Scalar
    stalled: Count
    runaway: Count
    settled: Flag
    fresh: Flag
    asked: Flag
    hand_over: Scalar
    ask_at: Count
    steps_energy: Scalar
    least_energy: Scalar
    predicted: Scalar
    newton: Findings
    polished: Count
    contracted: Flag
    achieved: Scalar
    regular: Flag
    num_steps: Count
    num_fun_evals: Count
    num_hvps: Count
    resumed_at: Counts | None = None

    def over(self) -> Flag:
        """Return whether the solve has ended."""
        return self.phase == DONE

    def stopped(self, wanted: Flag) -> "Ledger":
        """Return the ledger of a solve that is to end here, if it is `wanted` and has not ended."""
        ends = wanted & ~self.over()
        return dataclasses.replace(
            self,
            phase=_vector.where(ends, DONE, self.phase),
            following=_vector.where(ends, self.phase, self.following),
            result=RESULTS.where(ends, RESULTS.stopped, self.result),
        )

    def is_unfinished(self) -> Flag:
        """Return whether the solve was told to end, and could go on."""
        told = (self.result == RESULTS.max_steps_reached) | (self.result == RESULTS.stopped)
        return self.over() & told

    def counts(self) -> "Counts":
        """Return the counts of the whole solve."""
        return Counts(self.num_steps, self.num_fun_evals, self.num_hvps)

    def spent(self) -> "Counts":
        """Return the counts since it began, or was last resumed."""
        counts = self.counts()
        return counts if self.resumed_at is None else _vector.sub(counts, self.resumed_at)

    def resumable(self) -> "Ledger":
        """Return the ledger of a solve that may be resumed at its start."""
        return dataclasses.replace(self, resumed_at=Counts(count(0), count(0), count(0)))

    def handed_over(self) -> "Ledger":
        """Return the ledger as the next solve takes it, whichever this one was."""
        return dataclasses.replace(self, resumed_at=None)

    def exhausted(self, terms: Terms) -> Flag:
        """Return whether no more steps are allowed."""
        if terms.max_steps is None:
            return jnp.asarray(False)
        return self.spent().num_steps >= terms.max_steps

    def at_noise_level(self, f: Scalar, grad_norm: Scalar) -> Flag:
        """Return whether rounding explains why there is no more progress."""
        return at_noise_level(f, grad_norm, self.predicted, self.scale)

    def tightened(self, grad_norm: Scalar) -> Scalar:
        """Return where to hand over next, after a Newton step that did not contract."""
        gradient = grad_norm / _vector.nonzero(self.scale.reference())
        decrement = jnp.sqrt(self.predicted / _vector.nonzero(self.measured_energy()))
        return jnp.minimum(self.hand_over, 0.1 * jnp.minimum(gradient, decrement))

    def measured_energy(self) -> Scalar:
        """Return the energy of `x`, as far as the last step of L-BFGS tells it."""
        return jnp.maximum(self.least_energy, self.steps_energy)


class Decision(eqx.Module):
    """What is to be done after a trial.

    Attributes:
        taken: the trial becomes the point.
        ask: a Newton step is to be found.
        turn: a direction is to be had from the memory, or down the gradient.
        restart: the memory is to be emptied first.
        step: a step was counted.
        length: multiple of the direction that was tried.
    """

    taken: Flag
    ask: Flag
    turn: Flag
    restart: Flag
    step: Flag
    length: Scalar


def change(q: Scalar, before: Scalar, after: Scalar, rest: Scalar, noise: Scalar) -> Scalar:
    """Return half of the part by which a Newton step shows the Hessian to change along it.

    The step leaves the part `q` of the slope, and a gradient of the norm `after` of one of norm
    `before`, of which the equations left `rest`. Less than `noise` may be rounding.
    """
    left = jnp.maximum(after - rest, 0) / _vector.nonzero(before)
    most = jnp.maximum(q, left)
    return _vector.where(most > noise, most, 0)


def hand_over(rtol: Any, zero: Scalar, assembles: bool) -> Scalar:
    """Return the part of the reference at which to hand over, at first.

    If a Newton step costs as many products as there are variables, whatever it is to gain, it waits
    until a single one will do: its error is squared.
    """
    if not assembles:
        return zero + jnp.maximum(HAND_OVER, rtol)
    least = min(HAND_OVER, _epsilon(zero) ** 0.25)
    return zero + jnp.maximum(jnp.clip(jnp.sqrt(rtol), least, HAND_OVER), rtol)


def first(zero: Scalar, hand_over: Any, reference: Scalar, curvature: Scalar) -> Ledger:
    """Return the ledger of a solve that begins; a warm one has a reference and a curvature."""
    no, none, inf = jnp.asarray(False), count(0), jnp.full_like(zero, jnp.inf)
    return Ledger(
        phase=count(START),
        following=count(START),
        result=RESULTS.max_steps_reached,
        scale=Scale(reference, curvature, zero, jnp.asarray(True)),
        least_f=inf,
        least_grad_norm=inf,
        noise=zero,
        stalled=none,
        runaway=none,
        settled=no,
        fresh=jnp.asarray(True),
        asked=no,
        hand_over=zero + hand_over,
        ask_at=count(_LONG),
        steps_energy=zero,
        least_energy=zero,
        predicted=inf,
        newton=Findings(no, no, no, no, no, zero, zero, zero, zero, zero, none),
        polished=none,
        contracted=no,
        achieved=inf,
        regular=jnp.asarray(True),
        num_steps=none,
        num_fun_evals=none,
        num_hvps=none,
    )


class _Searched(eqx.Module):
    """What a trial of a search is: its end, a way back to the best length met, or its failure."""

    judged: Judgement
    ended: Flag
    back: Flag
    failed: Flag

    @classmethod
    def of(cls, searching, line: Line, here: Here, seen: Seen, trial: Trial, level: Scalar):
        """Judge the trial; a bracket that is at rounding level has no room for another one."""
        promise = seen.promise(here.slope)
        judged = _wolfe.judge(
            line, here.f, here.slope, trial, level, seen.finite(), promise, seen.kink()
        )
        gap = jnp.abs(line.high.t - line.low.t) / _vector.nonzero(jnp.abs(trial.t)) * seen.s_norm
        # The objective rose by more than its noise where its slopes promise a decrease of less.
        hidden = -promise <= level - here.f
        # Or there is a length that does, and slopes at rounding level do not tell a better one.
        tried = (line.low.t > 0) & (line.trials >= _FEW)
        hidden &= (jnp.abs(trial.slope) <= -here.slope) | tried
        closed = line.bracketed & ((gap <= _epsilon(gap) * seen.x_norm) | hidden)
        last = line.last() | closed
        ended = searching & (judged.holds | (last & judged.best))
        back = searching & last & ~ended & (line.low.t > 0) & (line.t != line.low.t)
        return cls(judged, ended, back, searching & last & ~ended & ~back)


class _Polished(eqx.Module):
    """What a Newton step shows: see the table.

    Attributes:
        decrement: `λ²` at its beginning.
        hidden: the objective's noise hides a decrease of `λ²`.
        contracts, kept, enough: as in the table.
        left: what is left of the error where the solve stands then, squared.
        limit: the step says no more, as `λ²` is at rounding level, and it did not contract.
        doubtful: it would say so, but values tell more; the next one decides.
    """

    decrement: Scalar
    hidden: Flag
    contracts: Flag
    kept: Flag
    enough: Flag
    left: Scalar
    limit: Flag
    doubtful: Flag

    @classmethod
    def of(
        cls,
        polishing: Flag,
        ledger: Ledger,
        here: Here,
        seen: Seen,
        trial: Trial,
        holds: Flag,
        noise: Scalar,
        noisy: Flag,
        terms: Terms,
    ):
        """Judge the step from `here`; `holds` says that it would do for a line search."""
        energy, finite = ledger.newton.energy, seen.finite()
        decrement = _vector.where(polishing, -here.slope, 0)
        along, rounds = jnp.abs(trial.slope), rounding(ledger.newton.size)
        level = ledger.least_f + noise
        hidden = decrement <= noise + rounds
        falls = here.f - trial.f >= 0.25 * decrement
        seen_to_fall = falls & (decrement > noise)
        seen_to_change = seen_to_fall | (trial.f - here.f >= jnp.maximum(0.25 * decrement, noise))
        falls |= hidden & (trial.f <= level + rounds)
        contracts = (
            polishing & finite & (along <= CONTRACTION * decrement) & falls & ~seen.elsewhere()
        )
        # A step below one rounding of x gains nothing.
        tiny = decrement <= rounding(jnp.sqrt(energy)) ** 2
        # The gradient on another face says nothing of progress.
        less = (seen.grad_norm < here.grad_norm) | (seen.elsewhere() & (trial.f < here.f))
        lower = (trial.f <= level) & less
        kept = polishing & (contracts | (finite & holds)) & lower & ~tiny
        q = along / _vector.nonzero(decrement)
        ratio = jnp.maximum(q, ledger.newton.residual)
        left = decrement * _vector.where(kept & contracts, ratio, 1)
        solved = polishing & ledger.newton.solved & ~ledger.newton.negative
        small = terms.rtol**2 * energy
        # Along the step all may be well and across it not: the whole gradient falls, or one more.
        whole = (seen.grad_norm <= _WHOLE * here.grad_norm) | hidden
        # The Hessian changes little along what is left (see the module), or rounding hides it. A
        # step that is not taken shows noise, and another one would show no more.
        found = ledger.newton
        bent = change(q, here.grad_norm, seen.grad_norm, found.rest, found.noise)
        even = 4 * bent**2 * jnp.maximum(q, bent**2) <= terms.rtol
        even |= ~kept
        # After a step that contracted, the decrement is what that one left.
        seen_before = ledger.contracted | tiny
        enough = solved & _vector.where(
            contracts, whole & even & (left <= small), seen_before & (decrement <= small)
        )
        waited = ledger.asked | (ledger.num_steps >= _LONG)
        flat = tiny | (decrement <= rounds) | (waited & hidden)
        limit = solved & ~contracts & flat & ~noisy
        # `xᵀHx` may be larger than all terms of the objective, next to a wall or if the Hessian is
        # that of a ripple. It is no reason to end if values tell more: beside a large gradient, if
        # only a gradient norm was asked for, or along a slope that does not end as on a tail. One
        # step that does may be on its way past an inflection, and two are not.
        steep = (terms.rtol == 0) | ~ledger.scale.may_be_noise(here.grad_norm)
        tail = along <= _TAIL * decrement
        search = (seen_to_fall & steep) | (seen_to_change & ~tail)
        again = seen_to_change & kept & (ledger.polished == 0) & ~search
        doubtful = limit & again & ~ledger.asked
        limit &= ~(search | again) | ledger.asked
        return cls(decrement, hidden, contracts, kept, enough, left, limit, doubtful)

    def is_degenerate(self, energy: Scalar) -> Flag:
        """Return whether a step that does not contract is near a minimum all the same."""
        return self.decrement <= _DEGENERATE**2 * energy

    def is_regular(self, energy: Scalar, terms: Terms) -> Flag:
        """Return whether the point can be differentiated like a minimizer that was reached."""
        near = self.decrement <= jnp.maximum(
            terms.rtol**2 * energy, rounding(jnp.sqrt(energy)) ** 2
        )
        return ~self.limit | near


@jax.jit
def decide(
    ledger: Ledger, line: Line, here: Here, seen: Seen, terms: Terms
) -> tuple[Decision, Ledger, Line]:
    """Return what comes after a trial: see the table."""
    starting, searching, polishing = (ledger.phase == k for k in (START, SEARCH, NEWTON))
    finite, polish = seen.finite(), terms.polish > 0
    away = jnp.full_like(here.f, jnp.inf)
    trial = _vector.where(finite, seen.trial, Trial(seen.trial.t, away, away))
    # Two values are compared, and both are wrong.
    relative = jnp.maximum(terms.noise, ledger.noise)
    noise = rounding(ledger.least_f) + 2 * relative * jnp.abs(ledger.least_f)
    noise = _vector.where(starting, 0, noise)

    search = _Searched.of(searching, line, here, seen, trial, ledger.least_f + noise)
    holds = search.judged.holds
    # What slopes do not explain of the difference of two values is the noise of both.
    rest = jnp.maximum(line.unexplained, search.judged.unexplained)
    measured = 0.5 * rest / _vector.nonzero(jnp.abs(here.f))
    noisy = (rest > noise) & (measured <= _NOISIEST)
    newton = _Polished.of(polishing, ledger, here, seen, trial, holds, noise, noisy, terms)
    search, newton = jax.lax.optimization_barrier((search, newton))
    taken = (starting & finite) | search.ended | newton.kept
    step = search.ended | search.failed | newton.kept
    after = _after(ledger, here, seen, taken, step, noise)
    after, taken = jax.lax.optimization_barrier((after, taken))
    f, grad_norm = _vector.where(taken, (trial.f, seen.grad_norm), (here.f, here.grad_norm))

    more = ~newton.enough | (ledger.polished + 1 < terms.polish)
    again = newton.kept & (newton.contracts | newton.doubtful | seen.elsewhere()) & more
    failed = search.failed & ledger.fresh & ~noisy
    stuck = (searching & taken & (after.stalled >= _STALLED)) | failed
    zero = (taken | polishing) & (grad_norm == 0)
    least = (taken | polishing) & (grad_norm <= terms.atol)
    near = _is_near(ledger, after, line, here, seen, taken)
    ask = polish & ~zero & (near | again | (least & ~polishing) | (stuck & ~ledger.asked))

    lost = (stuck & (ledger.asked | (not polish))) | (
        polishing & ledger.asked & ~again & ~newton.kept
    )
    # A Newton step knows better than the norms of gradients whether noise hides a decrease.
    told = polishing & ledger.newton.solved & ~newton.hidden
    hopeless = after.at_noise_level(f, grad_norm) & ~told
    degenerate = newton.is_degenerate(ledger.newton.energy)
    done, result = _first_of(
        (starting & ~finite, RESULTS.nonfinite_start),
        (zero | (least & (polishing | (not polish))), RESULTS.successful),
        (newton.enough & ~again, RESULTS.successful),
        (~starting & (seen.trial.f == -jnp.inf), RESULTS.unbounded),
        (after.runaway >= _RUNAWAY, RESULTS.unbounded),
        (newton.limit & degenerate, RESULTS.precision_limit),
        (newton.limit, RESULTS.no_minimizer),
        (lost, _why_lost(hopeless, ledger.newton)),
        (after.exhausted(terms), RESULTS.max_steps_reached),
    )
    # What follows is noted whether or not the solve is over, and XLA would compute all twice.
    ask, done = jax.lax.optimization_barrier((ask, done))
    following = _vector.where(ask, count(NEWTON), SEARCH)
    away = polishing & ~again & ~newton.enough
    moving = taken & searching & (after.stalled == 0)
    energy = ledger.newton.energy
    error = jnp.sqrt(newton.left / _vector.nonzero(energy))
    ratio = grad_norm / _vector.nonzero(after.scale.reference())
    after = dataclasses.replace(
        after,
        phase=_vector.where(done, DONE, following),
        following=following,
        result=result,
        noise=_vector.where(search.failed & noisy, measured, ledger.noise),
        asked=_vector.where(stuck, ask, ledger.asked & ~moving),
        ask_at=_vector.where(
            ask & ~polishing, jnp.maximum(ledger.ask_at, 2 * after.num_steps), ledger.ask_at
        ),
        hand_over=_vector.where(away, after.tightened(grad_norm), ledger.hand_over),
        contracted=newton.kept & newton.contracts,
        # Where the energy of x vanishes, as along symmetries, the gradient says more.
        achieved=_vector.where(polishing & (energy > 0), jnp.minimum(error, ratio), ratio),
        regular=newton.is_regular(energy, terms),
    )
    line = _vector.where(
        search.back, _wolfe.settled(line), _wolfe.advance(line, trial, search.judged, finite)
    )
    ask = ask & ~done
    turn = ~done & ~ask & (taken | search.failed | polishing)
    return Decision(taken, ask, turn, search.failed, step, seen.trial.t), after, line


@jax.jit
def resumed(ledger: Ledger) -> tuple[Decision, Ledger]:
    """Return what comes next in an unfinished solve, and its ledger.

    At `max_steps` the way to the next trial was not looked for; where it was stopped, it was.
    """
    waits = ledger.result == RESULTS.max_steps_reached
    ask, turn = (waits & (ledger.following == phase) for phase in (NEWTON, SEARCH))
    no, counts = jnp.asarray(False), ledger.counts()
    decision = Decision(no, ask, turn, ledger.fresh, no, jnp.zeros_like(ledger.least_f))
    evaluated = counts.num_fun_evals + 1
    ledger = dataclasses.replace(
        ledger, phase=ledger.following, num_fun_evals=evaluated, resumed_at=counts
    )
    return decision, ledger


def _is_near(
    ledger: Ledger, after: Ledger, line: Line, here: Here, seen: Seen, taken: Flag
) -> Flag:
    """Return whether the minimum seems so near that Newton's method is to be asked.

    By the gradient norm beside its reference, or by the decrement of the quasi-Newton model beside
    the energy, which knows no units. The first trial of a cold start shows a curvature, and so
    whether the start is near. After many steps it is asked anyway.
    """
    searching, polishing = ledger.phase == SEARCH, ledger.phase == NEWTON
    small = seen.grad_norm <= after.hand_over * after.scale.reference()
    flat = after.predicted <= after.hand_over**2 * after.measured_energy()
    late = after.num_steps >= ledger.ask_at
    bent = seen.y_norm / _vector.nonzero(seen.s_norm) * jnp.minimum(1, after.scale.size)
    first = searching & ~taken & (ledger.num_steps == 0) & (line.trials == 0) & seen.finite()
    first &= ledger.num_hvps == 0  # Newton's method was not asked for that reason before
    beside = first & (here.grad_norm <= after.hand_over * bent)
    return (taken & ~polishing & (small | flat | late)) | beside


def _after(
    ledger: Ledger, here: Here, seen: Seen, taken: Flag, step: Flag, noise: Scalar
) -> Ledger:
    """Return the ledger with the trial in the books."""
    starting, polishing = ledger.phase == START, ledger.phase == NEWTON
    moved = taken & ~starting
    trial, scale = seen.trial, ledger.scale
    curvature = _vector.where(seen.is_curved(), seen.y_norm / _vector.nonzero(seen.s_norm), 0)
    start = _vector.where(scale.start > 0, scale.start, seen.grad_norm)
    begun = Scale(start, scale.curvature, seen.x_norm, scale.local)
    later = scale.after(seen.s_norm, curvature, seen.x_norm, seen.travel)
    progress = (trial.f < ledger.least_f - noise) | (seen.grad_norm < 0.5 * ledger.least_grad_norm)
    stalled = _vector.where(progress | polishing, 0, ledger.stalled + 1)
    steep = seen.curved <= -0.1 * seen.promise(here.slope)  # g⁺ᵀs is still 0.9 gᵀs
    bottom = jnp.abs(trial.t * trial.slope) <= _BOTTOM * jnp.abs(seen.promise(here.slope))
    settled = bottom | (_REMEMBERED * curvature >= later.curvature)
    far = (trial.t >= _RUNAWAY_STEP) & (seen.s_norm >= 1)
    runaway = _vector.where(steep & far & ~polishing, ledger.runaway + 1, 0)
    back = jnp.abs(seen.back) / jnp.maximum(seen.travel, 1)
    bent = jnp.maximum(jnp.abs(seen.across), back)
    bent = bent / jnp.sqrt(_vector.where(seen.is_curved(), seen.curved, 1))
    bound = _vector.where(seen.is_curved() & jnp.isfinite(bent), bent**2, 0)
    least_f = jnp.minimum(ledger.least_f, trial.f)
    least_grad_norm = jnp.minimum(ledger.least_grad_norm, seen.grad_norm)
    return dataclasses.replace(
        ledger,
        scale=_vector.where(starting, begun, _vector.where(moved, later, scale)),
        least_f=_vector.where(taken, least_f, ledger.least_f),
        least_grad_norm=_vector.where(taken, least_grad_norm, ledger.least_grad_norm),
        stalled=_vector.where(moved, stalled, ledger.stalled),
        runaway=_vector.where(moved, runaway, ledger.runaway),
        settled=_vector.where(moved, settled, ledger.settled),
        fresh=_vector.where(step, ~taken, ledger.fresh),
        polished=_vector.where(polishing & taken, ledger.polished + 1, 0),
        steps_energy=_vector.where(moved, jnp.maximum(seen.curved, 0), ledger.steps_energy),
        least_energy=_vector.where(moved, bound, ledger.least_energy),
        num_steps=ledger.num_steps + step,
        num_fun_evals=ledger.num_fun_evals + 1,
    )


@jax.jit
def answered(
    ledger: Ledger, asked: Flag, newton: Findings, grad_norm: Scalar, terms: Terms
) -> Ledger:
    """Return the ledger after Newton's method was `asked`, and what it found."""
    lost = asked & ~newton.valid
    least = grad_norm <= terms.atol
    ended = lost & (ledger.asked | least)
    phase = _vector.where(ended, DONE, _vector.where(lost, SEARCH, ledger.phase))
    tightened = ledger.tightened(grad_norm)
    hopeless = ledger.at_noise_level(ledger.least_f, grad_norm)
    how = RESULTS.where(least, RESULTS.successful, _why_lost(hopeless, newton))
    return dataclasses.replace(
        ledger,
        phase=phase,
        result=RESULTS.where(ended, how, ledger.result),
        hand_over=_vector.where(lost, tightened, ledger.hand_over),
        newton=_vector.where(asked, newton, ledger.newton),
        num_hvps=ledger.num_hvps + _vector.where(asked, newton.products, 0),
    )


@jax.jit
def turned(ledger: Ledger, known: Flag, grad_norm: Scalar, slope: Scalar, terms: Terms) -> Ledger:
    """Return the ledger after the memory, if `known`, gave a direction of this slope.

    Without a polish the solve ends when the gradient is small, and the decrement of the
    quasi-Newton model beside the energy, unless the last step shows neither the curvature that made
    the gradient small nor a bottom. (Along the eigenvector of a curvature `μ` an error that
    the first allows has a decrement of `rtol² c/μ` of the energy, `c` being the largest.)
    """
    predicted = _vector.where(known, -slope, ledger.predicted)
    small = ledger.scale.local & (grad_norm <= terms.atol + terms.rtol * ledger.scale.reference())
    little = -slope <= terms.rtol * ledger.measured_energy()
    done = known & small & little & ledger.settled & (terms.polish == 0)
    return dataclasses.replace(
        ledger,
        predicted=predicted,
        phase=_vector.where(done, DONE, ledger.phase),
        result=RESULTS.where(done, RESULTS.successful, ledger.result),
    )


def _why_lost(hopeless: Flag, newton: Findings) -> Any:
    """Return how a solve ends that is stuck: whether rounding explains it, and all of it.

    Noise in one unit is no reason where the Hessian, in the scales of the variables, is indefinite,
    or where it is zero and the gradient is not.
    """
    noise = RESULTS.where(newton.falls, RESULTS.no_minimizer, RESULTS.precision_limit)
    saddle = (newton.steep | (newton.negative & ~newton.valid)) & ~newton.falls
    return RESULTS.where(hopeless & ~saddle, noise, RESULTS.line_search_failed)


def _epsilon(like: Scalar) -> float:
    return float(jnp.finfo(like.dtype).eps)


def _first_of(*rows: tuple[Flag, Any]) -> tuple[Flag, Any]:
    """Return whether any flag is set, and the result beside the first that is."""
    done, result = jnp.asarray(False), RESULTS.max_steps_reached
    for flag, name in reversed(rows):
        done, result = done | flag, RESULTS.where(flag, name, result)
    return done, result
