"""L-BFGS as one flat loop: `optax.lbfgs` inside `jax.lax.while_loop`, one evaluation a trip.

A trip evaluates value and gradient at a trial point, measures all inner products, decides on these
scalars (`_phases`, which has the table), and moves vectors in one fixed order: the point, a Newton
step if one is asked for, the direction. Optax owns the curvature pairs and makes the quasi-Newton
direction of them (Nocedal & Wright, Numerical Optimization, 2006, algorithms 7.4 and 7.5); the
lengths along it are tried by `_wolfe`. A line search of the user's is another way to make a trial:
its whole search is one trip.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from difflbfgs import _box, _lanes, _memory, _phases, _vector, _wolfe
from difflbfgs._box import Active, Box
from difflbfgs._face import Face, Smooth
from difflbfgs._lbfgs import LBFGS
from difflbfgs._memory import Pair
from difflbfgs._newton import assembles, newton_step
from difflbfgs._phases import Decision, Here, Ledger, Seen, Terms, Wall
from difflbfgs._problem import Problem
from difflbfgs._scale import Scale, rounding
from difflbfgs._solution import RESULTS, Outcome, Stats, count
from difflbfgs._vector import Count, Flag, Scalar, Vector
from difflbfgs._watch import Step, Stop, watch
from difflbfgs._wolfe import Line, Trial

# The first step down the gradient is no longer than this part of the size of x, or of 1.
_CAUTION = 0.1
# A Newton step takes so many products, and twice as many as the solve took evaluations, at most.
_LEAST_PRODUCTS = 200


class Search(eqx.Module):
    """A solve to be done, but for the problem itself."""

    x0: Vector
    warm: "State | None"
    solver: LBFGS
    max_steps: Any
    callback: Callable[[Step], None] | None = eqx.field(default=None, static=True)
    stop: Stop | None = None

    def __call__(self, problem: Problem) -> Outcome:
        """Minimize `problem`, from `x0` or from the point in `warm`."""
        with jax.numpy_dtype_promotion("standard"):
            return self._end(problem)

    def _end(self, problem: Problem) -> Outcome:
        settings = make_settings(self.solver, self.x0, self.max_steps, problem.box())
        start = begin(settings, self.x0, self.warm)
        if self.warm is not None and _vector.is_alike(self.warm, start):
            settings = dataclasses.replace(settings, unfinished=self.warm)
            start = dataclasses.replace(start, ledger=start.ledger.resumable())

        def advance(now: State) -> State:
            after, step = trip(problem, now, settings)
            if self.stop is not None:
                record = _record(after, step)
                wanted = step.taken & step.step & self.stop(record, after.point.x)
                after = eqx.tree_at(lambda a: a.ledger, after, after.ledger.stopped(wanted))
            waits = _lanes.waits(now.ledger.over())
            watched = step.step | (after.ledger.over() & (after.ledger.spent().num_steps > 0))
            watch(self.callback, _record(after, step), watched & ~waits)
            return _lanes.held(waits, now, after, _pairs)

        def unfinished(now: State) -> Flag:
            return _lanes.anywhere(~now.ledger.over())

        return outcome(jax.lax.while_loop(unfinished, advance, start), settings.box)


class Point(eqx.Module):
    """A point, and the objective and its gradient there; the norm is that of its free part."""

    x: Vector
    f: Scalar
    g: Vector
    grad_norm: Scalar


class State(eqx.Module):
    """Where a solve stands; the carry of its loop, and what it hands to the next.

    Attributes:
        x0: where it began.
        point: the best point met.
        d: the direction along which the trial to come lies.
        slope: `gᵀd`.
        memory: Optax's curvature pairs.
        search: the state of the user's line search, or `None`.
        line: the search along `d`.
        ledger: what the table remembers.
    """

    x0: Vector
    point: Point
    d: Vector
    slope: Scalar
    memory: optax.ScaleByLBFGSState
    search: Any
    line: Line
    ledger: Ledger

    # `equinox.tree_at` finds something else than vectors here: no annotation, which is checked.
    @property
    def x(self):
        """The best point met."""
        return self.point.x

    @property
    def g(self):
        """The gradient there."""
        return self.point.g


class Settings(eqx.Module):
    """What a trip is told, and does not change; `unfinished` may be resumed."""

    solver: LBFGS
    terms: Terms
    box: Box | None
    unfinished: State | None = None

    def active(self, point: Point) -> Active | None:
        """Return which variables are at their bounds, if there are any."""
        return None if self.box is None else self.box.active(point.x, point.g)


class _Evaluated(eqx.Module):
    x: Vector
    f: Scalar
    g: Vector
    t: Scalar
    search: Any
    evaluations: Count
    met: Any = None  # the variables that met their bounds on the way


def make_settings(solver: LBFGS, like: Vector, max_steps: Any, box: Box | None = None) -> Settings:
    """Return what all trips of a solve for a vector like this are told."""
    default = _vector.epsilon(like) ** 0.5
    rtol = default if solver.rtol is None else solver.rtol
    noise = 0.0 if solver.noise is None else solver.noise
    # Of a traced tolerance nobody could see that it is negative.
    rtol, atol, noise = (jnp.maximum(least, 0) for least in (rtol, solver.atol, noise))
    terms = Terms(rtol, atol, noise, solver.polish, max_steps)
    return Settings(solver, terms, box)


def begin(settings: Settings, x0: Vector, warm: State | None = None) -> State:
    """Return the state before the first evaluation, at `x0` or at the point in `warm`."""
    box, search = settings.box, settings.solver.linesearch
    start = x0 if warm is None else warm.x
    x = start if box is None else box.project(start)
    zero = jnp.zeros((), _vector.dtype(x))
    nothing = _vector.zeros_like(x)
    hand_over = _phases.hand_over(settings.terms.rtol, zero, assembles(x0))
    if warm is None:
        g, reference, curvature = nothing, zero, zero
        memory = _memory.empty(x, settings.solver.memory_size)
    else:
        scale = warm.ledger.scale
        g, reference, curvature = warm.g, scale.reference(), scale.curvature
        memory = warm.memory
        if box is not None:
            memory = _memory.shifted(memory, _vector.sub(x, start))
    return State(
        x0=x,
        point=Point(x, jnp.full_like(zero, jnp.inf), g, zero),
        d=nothing,
        slope=zero,
        memory=memory,
        search=None if search is None else search.init(x),
        line=_wolfe.begin(zero, zero, zero),
        ledger=_phases.first(zero, hand_over, reference, curvature),
    )


def arrived(
    x: Vector,
    g: Vector,
    memory: optax.ScaleByLBFGSState,
    reference: Scalar,
    curvature: Scalar,
) -> State:
    """Return the state of a solve that has ended here, for a warm start."""
    zero = jnp.zeros_like(reference)
    scale = Scale(reference, curvature, jnp.ones_like(zero), jnp.asarray(True))
    ledger = dataclasses.replace(
        _phases.first(zero, zero, zero, zero),
        phase=count(_phases.DONE),
        result=RESULTS.successful,
        scale=scale,
    )
    return State(
        x0=x,
        point=Point(x, zero, g, zero),
        d=_vector.zeros_like(x),
        slope=zero,
        memory=memory,
        search=None,
        line=_wolfe.begin(zero, zero, zero),
        ledger=ledger,
    )


def trip(problem: Problem, now: State, settings: Settings) -> tuple[State, Decision]:
    """Evaluate, measure, decide, move."""
    found = _evaluate(problem, now, settings)
    seen = _measure(now, found, settings)
    here = Here(now.point.f, now.point.grad_norm, now.slope)
    here, seen = jax.lax.optimization_barrier((here, seen))
    decided = _phases.decide(now.ledger, now.line, here, seen, settings.terms)
    decision, ledger, line = jax.lax.optimization_barrier(decided)
    ledger = eqx.tree_at(
        lambda a: a.num_fun_evals, ledger, now.ledger.num_fun_evals + found.evaluations
    )
    trial = Point(found.x, found.f, found.g, seen.grad_norm)
    before, point = now.point, _vector.where(decision.taken, trial, now.point)
    starting = now.ledger.phase == _phases.START
    memory = _memory.regraded(now.memory, starting, _vector.sub(found.g, before.g))
    now = State(now.x0, point, now.d, now.slope, memory, found.search, line, ledger)
    s = _vector.sub(point.x, before.x)
    if settings.unfinished is not None:
        now, decision, s = _resumed(now, decision, s, starting, settings.unfinished, settings.terms)
    if settings.terms.polish > 0:
        now, decision = _with_newton_step(problem, now, decision, s, settings)
    return _turned(now, decision, settings), decision


def _resumed(
    now: State, decision: Decision, s: Vector, starting: Flag, unfinished: State, terms: Terms
) -> tuple[State, Decision, Vector]:
    """Go on as the solve would have that was not finished, if this one starts where that stood.

    That is so if value and gradient are the same but for rounding, and the same variables free:
    inside Optax's line searches XLA may round another way. The pairs in memory are the same, too,
    and the newest has the step that led there.
    """
    following, ledger = _phases.resumed(unfinished.ledger)
    resumable = starting & unfinished.ledger.is_unfinished() & ~now.ledger.over()
    if terms.polish == 0:
        resumable &= ~following.ask  # there is no Newton's method to be asked

    def compare():
        here, there = now.point, unfinished.point
        scale = unfinished.ledger.scale
        level = rounding(there.grad_norm) + scale.gradient_noise()
        same = _vector.is_equal(here.x, there.x)
        same &= jnp.abs(here.f - there.f) <= scale.noise(there.f)
        same &= _vector.norm(_vector.sub(here.g, there.g)) <= level
        return same & (jnp.abs(here.grad_norm - there.grad_norm) <= level)

    same = jax.lax.cond(_lanes.anywhere(resumable), compare, lambda: jnp.asarray(False))
    same &= resumable
    line = _wolfe.begin(unfinished.point.f, unfinished.slope, jnp.ones_like(unfinished.slope))
    unfinished = dataclasses.replace(unfinished, line=line, ledger=ledger)
    step = _memory.newest(now.memory, now.point.x, now.point.g).s
    new, old = (
        (eqx.tree_at(_pairs, state, (None, None)), *others)
        for state, *others in ((unfinished, following, step), (now, decision, s))
    )
    found, decision, s = jax.lax.cond(
        _lanes.anywhere(same), lambda: _lanes.only(same, new, old), lambda: old
    )
    found = eqx.tree_at(_pairs, found, _pairs(now), is_leaf=lambda leaf: leaf is None)
    return found, decision, s


def _pairs(state: State) -> tuple[Any, Any]:
    return _memory.rows(state.memory)


def _evaluate(problem: Problem, now: State, settings: Settings) -> _Evaluated:
    """Return the trial: a length along `d`, or what the user's line search finds."""
    solver, box = settings.solver, settings.box

    def length():
        x, met = _vector.add_scaled(now.point.x, now.line.t, now.d), None
        if box is not None:
            straight, x = x, box.project(x)
            met = jax.tree.map(jnp.not_equal, straight, x)
        f, g = problem.value_and_gradient(x)
        if box is not None:
            f = _vector.where(box.is_empty(), jnp.nan, f)
        return _Evaluated(x, f, g, now.line.t, now.search, count(1), met)

    if solver.linesearch is None:
        return length()

    def searched():
        return _searched(problem, now, solver.linesearch)

    return jax.lax.cond(now.ledger.phase == _phases.SEARCH, searched, length)


def _searched(problem: Problem, now: State, linesearch: Any) -> _Evaluated:
    """Run the user's line search along `d`, as long as the first trial is to be."""
    x, d = now.point.x, _vector.scale(now.line.t, now.d)
    waits = _lanes.waits(now.ledger.over())

    def fun(x):  # Optax's searches compute in float64 under x64, whatever the dtype of x
        return _vector.where(waits, 0, problem.value(optax.tree.cast_like(x, now.point.x)))

    updates, search = linesearch.update(
        d, now.search, x, value=now.point.f, grad=now.point.g, value_fn=fun
    )
    x = optax.apply_updates(x, updates)
    info = getattr(search, "info", None)
    evaluations = jnp.asarray(getattr(info, "num_linesearch_steps", 0), jnp.int32)
    if getattr(search, "grad", None) is None:
        f, g = problem.value_and_gradient(x)
        evaluations = evaluations + 1
    else:
        f, g = search.value, search.grad
    t = jnp.asarray(getattr(search, "learning_rate", 1.0), now.line.t.dtype) * now.line.t
    return _Evaluated(x, f, g, t, search, evaluations)


def _measure(now: State, found: _Evaluated, settings: Settings) -> Seen:
    """Return all inner products that the decision asks for."""
    x0, box, dot = now.x0, settings.box, _vector.dot
    g, d, wall = found.g, now.d, None
    s = _vector.sub(found.x, now.point.x)
    y = _vector.sub(found.g, now.point.g)
    if box is not None:
        active = box.active(found.x, g)
        met = _box.any_of(found.met)
        changed = met | _box.differ(active, box.active(now.point.x, now.point.g))
        promise = _vector.where(met, dot(now.point.g, s), found.t * now.slope)
        wall = Wall(promise, met, changed)
        d = _box.masked(found.met, d)  # what meets its bound moves no more
        g, s, y = (_box.masked(active, v) for v in (g, s, y))
    grad_norm, x_norm, s_norm, y_norm = _norms(g, found.x, s, y)
    across = dot(found.x, y)
    return Seen(
        trial=Trial(found.t, found.f, dot(found.g, d)),
        grad_norm=grad_norm,
        x_norm=x_norm,
        travel=_distance(found.x, x0),
        s_norm=s_norm,
        y_norm=y_norm,
        curved=dot(s, y),
        across=across,
        back=across - dot(x0, y),
        wall=wall,
    )


def _distance(x: Vector, x0: Vector) -> Scalar:
    """Return `‖x - x0‖` from products, for one vector less; below 1 or not is what counts."""
    square = _vector.dot(x, x) - 2 * _vector.dot(x, x0) + _vector.dot(x0, x0)
    return _vector.where(jnp.isfinite(square), jnp.sqrt(jnp.maximum(square, 0)), jnp.inf)


def _norms(*vectors: Vector) -> tuple[Scalar, ...]:
    """Return the 2-norm of each vector, as `_vector.norm` does, for less.

    On a CPU `dot` is vectorized and the reductions in `norm` are not. Only if a square is out of
    range are all computed again, by `norm`.
    """
    squares = jnp.stack([_vector.dot(x, x) for x in vectors])
    limits = jnp.finfo(squares.dtype)
    least = float(limits.tiny) / float(limits.eps)
    lengths = jax.lax.cond(
        _lanes.anywhere(~jnp.all((squares >= least) & (squares < jnp.inf))),
        lambda: jnp.stack([_vector.norm(x) for x in vectors]),
        lambda: jnp.sqrt(squares),
    )
    return tuple(lengths[k] for k in range(len(vectors)))


def _with_newton_step(
    problem: Problem, now: State, decision: Decision, s: Vector, settings: Settings
) -> tuple[State, Decision]:
    """Ask Newton's method for a step; if it has none, the search goes on."""
    x, g, active = now.point.x, now.point.g, settings.active(now.point)
    face: Smooth = problem
    if active is not None:
        face = Face(problem, active, _vector.nonzero(now.ledger.scale.curvature))
        x, g, s = (_box.masked(active, v) for v in (x, g, s))

    def hvp(p):
        return face.product(now.point.x, p)

    def ask():
        rtol = jnp.asarray(settings.terms.rtol, now.slope.dtype)
        point, ledger = now.point, now.ledger
        curvature = _vector.nonzero(ledger.scale.curvature)
        guess = _vector.where(now.slope < 0, -now.slope, point.grad_norm**2 / curvature)
        most = _LEAST_PRODUCTS + 2 * ledger.num_fun_evals
        return newton_step(hvp, x, g, s, guess, rtol, most, decision.ask)

    def keep():
        return now.d, now.slope, now.ledger.newton

    d, slope, found = jax.lax.cond(_lanes.anywhere(decision.ask), ask, keep)
    ledger = _phases.answered(now.ledger, decision.ask, found, now.point.grad_norm, settings.terms)
    new = decision.ask & found.valid
    d, slope = _lanes.only(new, (d, slope), (now.d, now.slope))
    line = _vector.where(new, _wolfe.begin(now.point.f, slope, jnp.ones_like(slope)), now.line)
    turn = decision.turn | (decision.ask & ~found.valid & ~ledger.over())
    now = dataclasses.replace(now, d=d, slope=slope, line=line, ledger=ledger)
    return now, eqx.tree_at(lambda a: a.turn, decision, turn)


def _turned(now: State, decision: Decision, settings: Settings) -> State:
    """Take the next direction from the memory, or from the gradient if that has none."""
    x, grad_norm = now.point.x, now.point.grad_norm
    active = settings.active(now.point)

    def direction():
        g = now.point.g
        pair = _memory.newest(now.memory, x, g)
        if active is not None:
            pair = Pair(_box.masked(active, pair.s), _box.masked(active, pair.y))
            g = _box.masked(active, g)
        known = (jnp.asarray(now.memory.count) > 0) & pair.is_curved() & ~decision.restart
        memory = now.memory
        if active is not None:
            params, before = _vector.sub(x, pair.s), _vector.sub(g, pair.y)
            memory = memory._replace(params=params, updates=before)
        memory = _vector.where(known, memory, _memory.emptied(memory))
        updates, memory = _memory.direction(memory, x, g)
        if active is not None:
            updates = _box.masked(active, updates)
            memory = memory._replace(updates=now.point.g)
            # A step that only met bounds says nothing of curvature, and takes nothing away.
            kept = ~known & (jnp.asarray(now.memory.count) > 0) & ~decision.restart
            memory = _vector.where(kept, now.memory, memory)
        slope = _vector.dot(updates, g)
        least = _vector.epsilon(x) * grad_norm * jnp.sqrt(_vector.dot(updates, updates))
        known = known & (slope < -least) & jnp.isfinite(slope)
        length = _first_length(now.point, now.ledger.scale)
        d = _vector.where(known, updates, _vector.scale(-length, g))
        slope = _vector.where(known, slope, -(length * grad_norm) * grad_norm)
        return d, slope, memory, known

    def keep():
        return now.d, now.slope, now.memory, jnp.asarray(False)

    turned = decision.turn
    d, slope, memory, known = jax.lax.cond(_lanes.anywhere(turned), direction, keep)
    d, slope = _lanes.only(turned, (d, slope), (now.d, now.slope))
    memory = _lanes.held(_lanes.waits(~turned), now.memory, memory, _memory.rows)
    line = _wolfe.begin(now.point.f, slope, jnp.ones_like(slope))
    line = _vector.where(turned, line, now.line)
    ledger = _phases.turned(now.ledger, turned & known, grad_norm, slope, settings.terms)
    # Of a solve that ends here the newest pair is the one that Optax would form next.
    ended = eqx.tree_at(_memory.rows, now.memory, _memory.rows(memory))
    memory = _vector.where(ledger.over(), ended, memory)
    return dataclasses.replace(now, d=d, slope=slope, memory=memory, line=line, ledger=ledger)


def _first_length(point: Point, scale) -> Scalar:
    """Return the first length along `-g`, whatever the scales of objective and variables.

    `|f| / ‖g‖²` would be half of Newton's for `f = c/2 ‖x‖²`. What is remembered of the curvature
    may be that of a wall far away: no step is below rounding of the variables.
    """
    room = _CAUTION * jnp.maximum(1, scale.size)
    safe = _vector.nonzero(point.grad_norm)
    step = jnp.minimum(jnp.abs(point.f) / safe, room)
    step = _vector.where((step > 0) & jnp.isfinite(step), step, room)
    t = _vector.where(scale.curvature > 0, 1 / _vector.nonzero(scale.curvature), step / safe)
    t = jnp.maximum(t, rounding(scale.size) / safe)
    return jnp.minimum(t, 10 * room / _CAUTION / safe)


def _record(after: State, decision: Decision) -> Step:
    spent = after.ledger.spent()
    counts = spent.num_steps, spent.num_fun_evals
    step_size = _vector.where(decision.taken, decision.length, 0)
    return Step(*counts, after.point.f, after.point.grad_norm, step_size, after.ledger.over())


def outcome(end: State, box: Box | None = None) -> Outcome:
    """Return where the solve ended."""
    ledger, point, spent = end.ledger, end.point, end.ledger.spent()
    stats = Stats(
        num_steps=spent.num_steps,
        num_fun_evals=spent.num_fun_evals,
        num_hvps=spent.num_hvps,
        grad_norm=point.grad_norm,
        reference_grad_norm=ledger.scale.reference(),
    )
    found = Outcome(
        x=point.x,
        f=point.f,
        result=ledger.result,
        stats=stats,
        state=dataclasses.replace(end, ledger=ledger.handed_over()),
        achieved=ledger.achieved,
        regular=ledger.regular,
    )
    if box is None:
        return found
    active = box.active(point.x, point.g)
    weak = box.weakly_active(point.x, point.g, active, *_errors(end, active))
    return found.between(active, weak)


def _errors(end: State, active: Active) -> tuple[Vector, Vector]:
    """Return what errors to expect of `x` and of `g`, entry by entry.

    The last step shows in which variables the way still led, and the slopes at its ends, `q` times
    as steep, how much of it may be left: `√q` of it in the energy norm.
    """
    x, g, scale = end.point.x, end.point.g, end.ledger.scale
    pair = _memory.newest(end.memory, x, g)
    moved = jnp.asarray(end.memory.count) > 0
    s = _box.masked(active, pair.s)
    before = _vector.dot(_vector.sub(g, pair.y), s)
    left = jnp.abs(_vector.dot(g, s)) / _vector.nonzero(jnp.abs(before))
    left = jnp.clip(jnp.maximum(left, end.ledger.newton.residual), 0, 1)
    ratio = jnp.where(moved, jnp.sqrt(left), 0)
    least = scale.gradient_noise()
    x_error = jax.tree.map(lambda s, x: ratio * jnp.abs(s) + rounding(x), pair.s, x)
    g_error = jax.tree.map(lambda y: ratio * jnp.abs(y) + least, pair.y)
    return x_error, g_error
