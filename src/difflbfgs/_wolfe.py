"""A line search for the strong Wolfe conditions, one trial at a time, on scalars.

Along `φ(t) = f(x + t d)` a length `t` is looked for that satisfies

    φ(t) <= φ(0) + c₁ t φ'(0)    and    |φ'(t)| <= c₂ |φ'(0)|,    c₁ = 1e-4, c₂ = 0.9

(Nocedal & Wright, Numerical Optimization, 2006, section 3.5). If the decrease is lost in the
rounding of `f`, the first is replaced by `φ'(t) <= (2 c₁ - 1) φ'(0)`, the approximate Wolfe
condition of Hager & Zhang (SIAM Journal on Optimization 16, 2005). Lengths grow by the secant of
the slopes until a bracket is found, and are interpolated by a cubic inside it.

A `Line` is all that a search remembers. `judge` says what a trial is worth, `advance` chooses the
next.
"""

import equinox as eqx
import jax.numpy as jnp

from difflbfgs import _vector
from difflbfgs._vector import Count, Flag, Scalar

DECREASE = 1e-4
CURVATURE = 0.9
# In float64 a bracket that shrinks tenfold at every trial is at rounding level after 16.
MAX_TRIALS = 30
# An extrapolated length is at least and at most so many times the last.
_SHY, _BOLD = 1.1, 10.0
# An interpolated length keeps so far away from both ends of the bracket, which is halved where it
# does not shrink by a third; next to a trial that was not finite it shrinks tenfold.
_MARGIN = 0.1
_SHRINKING = 0.66
_RETREAT = 0.1
# A change in the objective is noise if it is so many times what the slopes promise.
_FAR_ABOVE = 10.0


class Trial(eqx.Module):
    """A length, and the objective and its slope there."""

    t: Scalar
    f: Scalar
    slope: Scalar


class Line(eqx.Module):
    """The state of a search.

    Attributes:
        t: the length to be tried next.
        low: of the lengths that fall far enough, that of the least objective; 0 at first.
        high: the other end of the bracket.
        width: the width of the bracket, infinite as long as there is none.
        bracketed: whether there is a bracket.
        trials: how many lengths were tried.
        unexplained: the most that slopes did not explain of a change in the objective, far above
            what they promise.
    """

    t: Scalar
    low: Trial
    high: Trial
    width: Scalar
    bracketed: Flag
    trials: Count
    unexplained: Scalar

    def last(self) -> Flag:
        """Return whether the trial to come is the last."""
        return self.trials >= MAX_TRIALS - 1


class Judgement(eqx.Module):
    """What a trial is worth.

    Attributes:
        falls: it falls enough.
        holds: the search may end there.
        best: no better one was met.
        unexplained: what slopes do not explain of its change in the objective.
    """

    falls: Flag
    holds: Flag
    best: Flag
    unexplained: Scalar


def begin(f: Scalar, slope: Scalar, t: Scalar) -> Line:
    """Return the line of a search that starts with the length `t`."""
    start = Trial(jnp.zeros_like(f), f, slope)
    none, zero = jnp.asarray(False), jnp.zeros_like(f)
    return Line(t, start, start, zero + jnp.inf, none, jnp.asarray(0, jnp.int32), zero)


def judge(
    line: Line,
    f: Scalar,
    slope: Scalar,
    trial: Trial,
    level: Scalar,
    finite: Flag,
    promise: Scalar,
    kink: Flag | None = None,
) -> Judgement:
    """Judge a trial of a search from `f` with this slope; `level` is `f` and its noise.

    `promise` is what the gradient promises of the step, `t · slope` on a straight way. With a
    `kink` in the way its slopes may jump from fall to rise: the weak Wolfe conditions have to do.
    """
    armijo = trial.f <= f + DECREASE * promise
    even = jnp.abs(trial.f - f) <= level - f
    hidden = even & (trial.slope <= (2 * DECREASE - 1) * slope)
    falls = finite & (armijo | hidden) & (trial.t > 0)
    level_out = jnp.abs(trial.slope) <= -CURVATURE * slope
    if kink is not None:
        falls &= ~kink | (promise < 0)
        level_out |= kink & (trial.slope >= CURVATURE * slope)
    holds = falls & level_out
    noise = level - f
    best = falls & ~(line.bracketed & (trial.f > line.low.f + noise))
    return Judgement(falls, holds, best, unexplained(f, slope, trial, kink))


def unexplained(f: Scalar, slope: Scalar, trial: Trial, kink: Flag | None = None) -> Scalar:
    """Return what slopes between those at both ends do not explain of the change in the objective.

    It is 0 if that is not far more than they promise: what a wrong gradient leaves shrinks with the
    step as the promise does, and noise does not. With a `kink` in the way slopes say nothing.
    """
    mean, half = 0.5 * (trial.slope + slope), 0.5 * jnp.abs(trial.slope - slope)
    rest = jnp.abs(trial.f - f - trial.t * mean) - trial.t * half
    promise = trial.t * jnp.maximum(jnp.abs(slope), jnp.abs(trial.slope))
    noise = (rest > _FAR_ABOVE * promise) & (rest < jnp.inf)
    return _vector.where(noise if kink is None else noise & ~kink, rest, 0)


def advance(line: Line, trial: Trial, judged: Judgement, finite: Flag) -> Line:
    """Return the line with the next length to try."""
    low, high = line.low, line.high
    # The bracket lies between `low` and where the objective rises, by its value or by its slope.
    ahead = _vector.where(line.bracketed, high.t - low.t, 1)
    turned = judged.best & (trial.slope * ahead >= 0)
    new_high = _vector.where(~judged.best, trial, _vector.where(turned, low, high))
    new_low = _vector.where(judged.best, trial, low)
    bracketed = line.bracketed | ~judged.best | turned
    width = jnp.abs(new_high.t - new_low.t)
    inside = _inside(new_low, new_high, width < _SHRINKING * line.width, finite)
    t = _vector.where(bracketed, inside, _beyond(low, trial))
    width = _vector.where(bracketed, width, jnp.inf)
    most = jnp.maximum(line.unexplained, judged.unexplained)
    return Line(t, new_low, new_high, width, bracketed, line.trials + 1, most)


def _inside(low: Trial, high: Trial, shrinking: Flag, finite: Flag) -> Scalar:
    """Return a length between the ends of a bracket."""
    part = (_cubic(low, high) - low.t) / (high.t - low.t)
    believed = shrinking & (part > 0) & (part < 1)
    part = _vector.where(believed, jnp.clip(part, _MARGIN, 1 - _MARGIN), 0.5)
    return low.t + _vector.where(finite, part, _RETREAT) * (high.t - low.t)


def _beyond(low: Trial, trial: Trial) -> Scalar:
    """Return a longer length, by the secant of the slopes."""
    rise = trial.slope - low.slope
    secant = trial.t - trial.slope * (trial.t - low.t) / _vector.where(rise == 0, 1, rise)
    longer = _vector.where((rise > 0) & jnp.isfinite(secant), secant, _BOLD * trial.t)
    return jnp.clip(longer, _SHY * trial.t, _BOLD * trial.t)


def _cubic(a: Trial, b: Trial) -> Scalar:
    """Return the minimizer of the cubic through two trials and their slopes (N&W, eq. 3.59)."""
    d1 = a.slope + b.slope - 3 * (a.f - b.f) / (a.t - b.t)
    d2 = jnp.sqrt(jnp.maximum(d1 * d1 - a.slope * b.slope, 0)) * jnp.sign(b.t - a.t)
    return b.t - (b.t - a.t) * (b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)


def settled(line: Line) -> Line:
    """Return the line whose next trial is the best length met."""
    return eqx.tree_at(lambda line: line.t, line, line.low.t)
