"""The table of a solve, row by row, on scalars: nothing here compiles a solve."""

import dataclasses

import jax.numpy as jnp
import pytest

import difflbfgs as dl
from difflbfgs import _phases, _wolfe
from difflbfgs._phases import DONE, NEWTON, SEARCH, START, Findings, Here, Seen, Terms
from difflbfgs._scale import Scale

NAN, INF = float("nan"), float("inf")


def number(value):
    return jnp.asarray(value, jnp.float64)


def terms(rtol=1e-6, atol=0.0, noise=0.0, polish=1, max_steps=100):
    return Terms(rtol, atol, noise, polish, max_steps)


TERMS = terms()


def findings(
    solved=True,
    residual=0.0,
    rest=0.0,
    noise=1e-13,
    energy=1.0,
    falls=False,
    negative=False,
    steep=False,
):
    return Findings(
        valid=jnp.asarray(solved | steep),
        negative=jnp.asarray(falls or negative),
        falls=jnp.asarray(falls),
        steep=jnp.asarray(steep),
        solved=jnp.asarray(solved),
        residual=number(residual),
        rest=number(rest),
        noise=number(noise),
        energy=number(energy),
        size=number(energy),
        products=jnp.asarray(3),
    )


def ledger(phase, curvature=1.0, **changes):
    """Return the ledger of a solve that stands at f = 2 with a gradient of 0.1, after 5 steps."""
    made = _phases.first(number(0.0), _phases.HAND_OVER, number(1.0), number(curvature))
    scale = Scale(number(1.0), number(curvature), number(1.0), jnp.asarray(True))
    known = {"least_f": number(2.0), "least_grad_norm": number(0.1), "scale": scale}
    known |= {"num_steps": jnp.asarray(5), "fresh": jnp.asarray(False)}
    known |= {name: jnp.asarray(value) for name, value in changes.items() if name != "newton"}
    known |= {"newton": changes.get("newton", findings())}
    return dataclasses.replace(made, phase=jnp.asarray(phase, jnp.int32), **known)


def seen(t=1.0, f=1.9, slope=0.0, grad_norm=0.05, **others):
    """Return a trial that falls by 0.1, with a step of length 0.1 and a curvature of 1."""
    measured = {"x_norm": 1.0, "travel": 1.0, "s_norm": 0.1, "y_norm": 0.1, "curved": 0.01}
    measured |= {"across": 0.1, "back": 0.1, **others}
    trial = _wolfe.Trial(number(t), number(f), number(slope))
    return Seen(trial, number(grad_norm), **{k: number(v) for k, v in measured.items()})


def after(ledger, seen, terms=TERMS, slope=-0.2, grad_norm=0.1, line=None, f=2.0):
    """Return what the table says: the decision, and the ledger and line to go on with."""
    here = Here(number(f), number(grad_norm), number(slope))
    if line is None:
        line = _wolfe.begin(number(f), number(slope), seen.trial.t)
    return _phases.decide(ledger, line, here, seen, terms)


def out_of_trials(slope=-0.2, low=0.0):
    """Return the line of a search whose last trial is due, at 1."""
    line = _wolfe.begin(number(2.0), number(slope), number(1.0))
    best = _wolfe.Trial(number(low), number(1.95 if low else 2.0), number(slope / 2))
    return dataclasses.replace(line, low=best, trials=jnp.asarray(_wolfe.MAX_TRIALS - 1))


def test_start_not_finite():
    for bad in ({"f": NAN}, {"f": INF}, {"grad_norm": NAN}):
        decision, now, _ = after(ledger(START), seen(t=0.0, **bad))
        assert (now.phase, bool(decision.taken)) == (DONE, False)
        assert now.result == dl.RESULTS.nonfinite_start


def test_start_with_a_gradient_of_zero():
    decision, now, _ = after(ledger(START), seen(t=0.0, grad_norm=0.0))
    assert (now.phase, bool(decision.taken), bool(decision.ask)) == (DONE, True, False)
    assert now.result == dl.RESULTS.successful


@pytest.mark.parametrize("polish", [0, 1])
def test_start_below_atol(polish):
    decision, now, _ = after(ledger(START), seen(t=0.0), terms(atol=0.1, polish=polish))
    assert now.phase == (NEWTON if polish else DONE)
    assert bool(decision.ask) == bool(polish)


def test_warm_start_near_and_far_and_cold_start():
    near, far = seen(t=0.0, grad_norm=0.9e-3), seen(t=0.0, grad_norm=1.1e-3)
    assert after(ledger(START), near)[1].phase == NEWTON
    assert after(ledger(START), far)[1].phase == SEARCH
    assert after(ledger(START, curvature=0.0), near)[1].phase == SEARCH  # nothing is known


def test_the_first_trial_of_a_cold_start_shows_that_the_minimum_is_near():
    cold = ledger(SEARCH, curvature=0.0, num_steps=0)
    rises = seen(f=2.5, slope=0.7, y_norm=100.0)  # a curvature of 1000
    decision, now, _ = after(cold, rises)
    assert (now.phase, bool(decision.taken), bool(decision.ask)) == (NEWTON, False, True)
    assert after(cold, seen(f=2.5, slope=0.7))[1].phase == SEARCH
    assert after(ledger(SEARCH), rises)[1].phase == SEARCH  # not the first


def test_search_goes_on_until_the_wolfe_conditions_hold():
    decision, now, line = after(ledger(SEARCH), seen(f=2.1, slope=0.3))
    assert (now.phase, bool(decision.taken), bool(decision.turn)) == (SEARCH, False, False)
    assert 0 < line.t < 1
    decision, now, line = after(ledger(SEARCH), seen(f=1.9, slope=-0.19))
    assert (now.phase, bool(decision.taken)) == (SEARCH, False)
    assert line.t > 1
    assert now.num_steps == 5


def test_search_takes_what_holds_and_turns():
    decision, now, _ = after(ledger(SEARCH), seen())
    assert (now.phase, bool(decision.taken), bool(decision.turn)) == (SEARCH, True, True)
    assert not decision.restart
    assert (now.num_steps, now.num_fun_evals, now.least_f) == (6, 1, 1.9)


@pytest.mark.parametrize("polish", [0, 1])
def test_search_below_atol(polish):
    _, now, _ = after(ledger(SEARCH), seen(), terms(atol=0.06, polish=polish))
    assert now.phase == (NEWTON if polish else DONE)


@pytest.mark.parametrize("polish", [0, 1])
def test_search_hands_over_by_the_gradient_and_by_the_decrement(polish):
    wanted = NEWTON if polish else SEARCH
    assert after(ledger(SEARCH), seen(grad_norm=1e-4), terms(polish=polish))[1].phase == wanted
    little = ledger(SEARCH, predicted=1e-9)
    assert after(little, seen(), terms(polish=polish))[1].phase == wanted
    assert after(ledger(SEARCH, predicted=1e-3), seen())[1].phase == SEARCH


def test_search_out_of_trials_goes_back_to_the_best_length_and_takes_it():
    rises = seen(f=2.1, slope=0.3)
    decision, now, line = after(ledger(SEARCH), rises, line=out_of_trials(low=0.25))
    assert (now.phase, bool(decision.taken), float(line.t)) == (SEARCH, False, 0.25)
    again = seen(t=0.25, f=1.95, slope=-0.19)
    decision, now, _ = after(ledger(SEARCH), again, line=dataclasses.replace(line, t=line.low.t))
    assert (now.phase, bool(decision.taken), bool(decision.turn)) == (SEARCH, True, True)


def test_search_that_found_nothing_empties_the_memory_and_then_asks_newton():
    rises = seen(f=2.1, slope=0.3)
    decision, now, _ = after(ledger(SEARCH), rises, line=out_of_trials())
    assert (now.phase, bool(decision.restart), bool(decision.turn)) == (SEARCH, True, True)
    assert (bool(now.fresh), now.num_steps) == (True, 6)
    decision, now, _ = after(ledger(SEARCH, fresh=True), rises, line=out_of_trials())
    assert (now.phase, bool(decision.ask), bool(now.asked)) == (NEWTON, True, True)
    asked = ledger(SEARCH, fresh=True, asked=True)
    _, now, _ = after(asked, rises, line=out_of_trials())
    assert (now.phase, now.result == dl.RESULTS.line_search_failed) == (DONE, True)
    bare = terms(polish=0)
    _, now, _ = after(ledger(SEARCH, fresh=True), rises, bare, line=out_of_trials())
    assert (now.phase, now.result == dl.RESULTS.line_search_failed) == (DONE, True)


def test_search_without_progress_is_stuck_after_a_while():
    still = seen(f=2.0, slope=0.0, grad_norm=0.1)
    waiting = ledger(SEARCH, stalled=5)
    assert after(waiting, still, slope=-1e-20)[1].stalled == 6
    stuck = ledger(SEARCH, stalled=11)
    decision, now, _ = after(stuck, still, slope=-1e-20)
    assert (now.phase, bool(decision.taken), bool(now.asked)) == (NEWTON, True, True)


def test_five_searches_without_a_bottom_and_minus_infinity_are_unbounded():
    far = {"t": 1e4, "s_norm": 1e3, "y_norm": 0.0, "curved": 0.0}
    down = ledger(SEARCH, runaway=4)
    line = dataclasses.replace(out_of_trials(), t=number(1e4))
    _, now, _ = after(down, seen(f=-1e3, slope=-0.2, **far), line=line)
    assert (now.phase, now.result == dl.RESULTS.unbounded) == (DONE, True)
    _, now, _ = after(ledger(SEARCH), seen(f=-INF))
    assert (now.phase, now.result == dl.RESULTS.unbounded) == (DONE, True)


def test_out_of_steps():
    _, now, _ = after(ledger(SEARCH), seen(), terms(max_steps=6))
    assert (now.phase, now.result == dl.RESULTS.max_steps_reached) == (DONE, True)
    assert after(ledger(SEARCH), seen(), terms(max_steps=7))[1].phase == SEARCH


# A Newton step from f = 2 with a decrement of 1e-4: the objective falls by half of that.
FALLS = {"f": 2.0 - 0.5e-4, "grad_norm": 1e-4}


@pytest.mark.parametrize(
    ("slope", "residual", "expected"),
    [
        (
            1e-16,
            0.0,
            DONE,
        ),  # contracts, and 1e-16 is left of the energy: a millionth squared is 1e-12
        (1e-7, 0.0, NEWTON),  # contracts, and too much is left
        (1e-16, 1e-3, NEWTON),  # the same, of the system
        (2e-5, 0.0, SEARCH),  # does not contract
    ],
)
def test_newton(slope, residual, expected):
    polishing = ledger(NEWTON, newton=findings(residual=residual))
    decision, now, _ = after(polishing, seen(slope=slope, **FALLS), slope=-1e-4)
    assert now.phase == expected
    assert bool(decision.taken)
    assert bool(decision.ask) == (expected == NEWTON)
    assert bool(decision.turn) == (expected == SEARCH)
    assert (now.result == dl.RESULTS.successful) == (expected == DONE)
    assert (now.hand_over < _phases.HAND_OVER) == (expected == SEARCH)


@pytest.mark.parametrize(
    ("q", "rtol", "noise", "expected"),
    [
        (6e-3, 1e-6, 1e-6, DONE),  # the Hessian changes by 2 q √q, 9e-4 of itself, for 1e-3
        (7e-3, 1e-6, 1e-6, NEWTON),  # by 1.2e-3
        (0.05, 1e-6, 1e-6, NEWTON),
        (0.05, 1e-3, 1e-6, DONE),  # by 0.022, for 0.032
        (0.05, 1e-6, 0.07, DONE),  # slopes are wrong by that part of the decrement
    ],
)
def test_newton_ends_if_the_hessian_changes_little_along_what_is_left(q, rtol, noise, expected):
    trial = seen(slope=1e-4 * q, f=2.0 - 0.5e-4, grad_norm=1e-4)
    polishing = ledger(NEWTON, newton=findings(energy=1e-4 / rtol**2, noise=noise))
    _, now, _ = after(polishing, trial, terms(rtol=rtol), slope=-1e-4)
    assert now.phase == expected


@pytest.mark.parametrize(
    ("dtype", "rtol", "assembles", "expected"),
    [
        ("float64", 1e-8, False, 1e-3),
        ("float64", 1e-2, False, 1e-2),  # no sooner than the tolerance says
        ("float64", 0.0, True, 2.0**-13),  # the fourth root of the machine epsilon
        ("float64", 1e-12, True, 2.0**-13),
        ("float64", 2.0**-24, True, 2.0**-12),  # whose square the tolerance is
        ("float64", 1e-4, True, 1e-3),
        ("float64", 1e-2, True, 1e-2),
        ("float32", 0.0, True, 1e-3),
    ],
)
def test_where_a_step_has_a_price_one_is_to_do(dtype, rtol, assembles, expected):
    share = _phases.hand_over(rtol, jnp.zeros((), dtype), assembles)
    assert share.dtype == dtype
    assert float(share) == pytest.approx(expected, rel=1e-6)


def test_newton_several_steps_are_taken_if_they_are_asked_for():
    tried = seen(slope=1e-16, **FALLS)
    assert after(ledger(NEWTON), tried, terms(polish=3), slope=-1e-4)[1].phase == NEWTON
    last = ledger(NEWTON, polished=2)
    assert after(last, tried, terms(polish=3), slope=-1e-4)[1].phase == DONE


def test_newton_is_not_taken_if_the_objective_or_the_gradient_norm_rises():
    for worse in ({"f": 2.0 + 1e-3, "grad_norm": 1e-4}, {"f": FALLS["f"], "grad_norm": 0.2}):
        decision, _, _ = after(ledger(NEWTON), seen(slope=1e-16, **worse), slope=-1e-4)
        assert not decision.taken


def test_newton_that_was_not_solved_proves_nothing():
    polishing = ledger(NEWTON, newton=findings(solved=False))
    _, now, _ = after(polishing, seen(slope=1e-16, **FALLS), slope=-1e-4)
    assert now.phase == NEWTON


def test_newton_at_rounding_level_ends_where_it_does_not_contract():
    same = {"f": 2.0, "grad_norm": 0.1, "slope": 0.5e-18}
    decision, now, _ = after(ledger(NEWTON), seen(**same), slope=-1e-18)
    assert (now.phase, bool(decision.taken)) == (DONE, False)
    assert now.result == dl.RESULTS.precision_limit
    assert now.regular  # a decrement of 1e-18 is below what was asked, 1e-12
    _, now, _ = after(ledger(NEWTON), seen(**same), terms(rtol=1e-10), slope=-1e-18)
    assert now.result == dl.RESULTS.precision_limit
    assert not now.regular  # no minimum that can be differentiated was seen


def test_newton_at_rounding_level_goes_on_if_the_objective_is_seen_to_fall():
    """Beside `xᵀHx = 1e8` a decrement of 1e-10 is rounding, and `f = 1e-10` falls by half of it.

    That counts if the gradient is large, or if only a gradient norm was asked for.
    """
    cancelled = ledger(NEWTON, newton=findings(energy=1e8), least_f=1e-10)
    falls = seen(f=0.5e-10, slope=2e-11, grad_norm=1e-6)
    stays = seen(f=1e-10, slope=2e-11, grad_norm=1e-6)
    stuck = dataclasses.replace(cancelled, asked=jnp.asarray(True))
    second = dataclasses.replace(cancelled, polished=jnp.asarray(1))
    for before, tried, grad_norm, rtol, phase in (
        (cancelled, falls, 0.1, 0.0, SEARCH),
        (cancelled, falls, 0.1, 1e-10, SEARCH),
        (cancelled, falls, 1e-5, 0.0, SEARCH),
        (second, falls, 1e-5, 1e-10, DONE),
        (cancelled, stays, 0.1, 0.0, DONE),
        (stuck, falls, 0.1, 0.0, DONE),
    ):
        _, now, _ = after(before, tried, terms(rtol, 1e-8), -1e-10, grad_norm, f=1e-10)
        assert now.phase == phase
        assert (now.result == dl.RESULTS.precision_limit) == (phase == DONE)


def test_newton_at_rounding_level_goes_on_if_values_and_slopes_tell_of_no_tail():
    """Beside `xᵀHx = 1e8`, as in a ripple, a decrement of 1e-10 is rounding, and `f` sees it."""
    ripple = ledger(NEWTON, newton=findings(energy=1e8), least_f=1e-10)
    second = dataclasses.replace(ripple, polished=jnp.asarray(1))
    stuck = dataclasses.replace(ripple, asked=jnp.asarray(True))
    less, more, same = 0.5e-10, 1.5e-10, 1e-10
    for before, f, slope, grad_norm, phase in (
        (ripple, less, -3e-10, 1e-6, SEARCH),  # falls, and is steeper there
        (ripple, more, -3e-10, 1e-6, SEARCH),
        (ripple, same, -3e-10, 1e-6, DONE),
        (ripple, less, -3e-11, 1e-6, NEWTON),  # as down to a degenerate minimum; a second step
        (ripple, less, -3e-11, 1e-4, DONE),  # tells, but not from where the gradient is larger
        (second, less, -3e-11, 1e-6, DONE),
        (second, less, -5e-11, 1e-6, SEARCH),  # and this one shows that it was an inflection
        (stuck, less, -3e-10, 1e-6, DONE),
    ):
        tried = seen(f=f, slope=slope, grad_norm=grad_norm)
        _, now, _ = after(before, tried, terms(1e-10), -1e-10, grad_norm=1e-5, f=1e-10)
        assert now.phase == phase
        assert (now.result == dl.RESULTS.precision_limit) == (phase == DONE)


def test_newton_after_a_step_that_was_taken_and_did_not_contract_has_not_seen_the_minimum():
    """That the decrement is small says nothing unless the step before contracted."""
    for contracted, phase in ((True, DONE), (False, SEARCH)):
        before = ledger(NEWTON, polished=1, contracted=contracted)
        tried = seen(f=2 + 1e-12, slope=0.5e-12, grad_norm=0.1)
        _, now, _ = after(before, tried, terms(1e-5), slope=-1e-12, f=2.0)
        assert now.phase == phase


def test_newton_goes_on_as_the_hessian_changes_across_the_step():
    """Along it changes may cancel; what conjugate gradients left is not among them."""
    for grad_norm, rest, phase in ((1e-2, 0, NEWTON), (1e-2, 1e-2, DONE), (1e-4, 0, DONE)):
        before = ledger(NEWTON, newton=findings(energy=1e6, rest=rest))
        tried = seen(slope=1e-12, f=2.0 - 1e-4, grad_norm=grad_norm)
        decision, now, _ = after(before, tried, slope=-2e-4)
        assert (now.phase, bool(decision.taken)) == (phase, True)


NOISY = {"t": 1e-9, "f": 2 + 1e-7, "slope": -0.2}  # 1e-10 of a decrease is promised


def test_search_that_is_contradicted_by_values_measures_their_noise_and_goes_on():
    for polish in (0, 1):
        asked = ledger(SEARCH, fresh=True, asked=True)
        decision, now, _ = after(asked, seen(**NOISY), terms(polish=polish), line=out_of_trials())
        assert (now.phase, bool(decision.restart)) == (SEARCH, True)
        assert now.noise == pytest.approx(0.5e-7 / 2, rel=0.1)
        known = dataclasses.replace(asked, noise=now.noise)
        _, now, _ = after(known, seen(**NOISY), terms(polish=polish), line=out_of_trials())
        assert now.noise == known.noise


def test_a_jump_is_no_noise():
    high = seen(**{**NOISY, "f": 2.1})
    _, now, _ = after(ledger(SEARCH, fresh=True, asked=True), high, line=out_of_trials())
    assert (now.phase, now.result == dl.RESULTS.line_search_failed) == (DONE, True)
    assert now.noise == 0


def test_newton_at_rounding_level_does_not_end_before_the_noise_is_known():
    same = {"f": 2 + 1e-7, "grad_norm": 0.1, "slope": 0.5e-18}
    decision, now, _ = after(ledger(NEWTON), seen(**same), slope=-1e-18)
    assert (now.phase, bool(decision.taken)) == (SEARCH, False)
    _, now, _ = after(ledger(NEWTON, noise=1e-7), seen(**same), slope=-1e-18)
    assert (now.phase, now.result == dl.RESULTS.precision_limit) == (DONE, True)


def test_newton_at_rounding_level_far_from_any_minimum():
    """Along exp(-x) from x = 2 the decrement is a quarter of the energy."""
    flat = ledger(NEWTON, newton=findings(energy=4e-18), asked=True)
    _, now, _ = after(flat, seen(f=2.0, slope=0.4e-18, grad_norm=0.1), slope=-1e-18)
    assert (now.phase, now.result == dl.RESULTS.no_minimizer) == (DONE, True)


def test_newton_asked_as_the_last_resort():
    stuck = ledger(NEWTON, asked=True)
    _, now, _ = after(stuck, seen(f=3.0, slope=1.0), slope=-1e-4)
    assert (now.phase, now.result == dl.RESULTS.line_search_failed) == (DONE, True)
    assert after(ledger(NEWTON), seen(f=3.0, slope=1.0), slope=-1e-4)[1].phase == SEARCH


@pytest.mark.parametrize(
    ("seen_by_newton", "wanted"),
    [
        ({}, dl.RESULTS.precision_limit),
        ({"falls": True}, dl.RESULTS.no_minimizer),  # a variable has a slope and no curvature
        ({"negative": True}, dl.RESULTS.line_search_failed),
        ({"steep": True}, dl.RESULTS.line_search_failed),
    ],
)
def test_stuck_at_rounding_and_yet_the_hessian_tells_of_no_minimum(seen_by_newton, wanted):
    found = findings(solved=False, **seen_by_newton)
    small = ledger(NEWTON, asked=True, least_grad_norm=1e-17)
    lost = _phases.answered(small, jnp.asarray(True), found, number(1e-17), terms())
    still = dataclasses.replace(ledger(SEARCH, asked=True, fresh=True), newton=found)
    stuck = out_of_trials(slope=-1e-34)
    trial = seen(f=3.0, slope=1.0, grad_norm=1e-17)
    _, then, _ = after(still, trial, slope=-1e-34, grad_norm=1e-17, line=stuck)
    for now in (then,) if found.valid else (lost, then):
        assert (now.phase, now.result == wanted) == (DONE, True)


def test_newton_below_atol_is_the_end_whatever_the_step_shows():
    for trial in (seen(slope=1e-16, **FALLS), seen(f=3.0, slope=1.0)):
        _, now, _ = after(ledger(NEWTON), trial, terms(atol=0.2), slope=-1e-4)
        assert (now.phase, now.result == dl.RESULTS.successful) == (DONE, True)


def test_no_newton_step_sends_the_solve_back_or_ends_it():
    none = findings(solved=False)
    asked = ledger(NEWTON)
    now = _phases.answered(asked, jnp.asarray(True), none, number(1e-4), terms())
    assert (now.phase, now.num_hvps) == (SEARCH, 3)
    assert now.hand_over <= 1e-5
    last = ledger(NEWTON, asked=True)
    now = _phases.answered(last, jnp.asarray(True), none, number(0.1), terms())
    assert (now.phase, now.result == dl.RESULTS.line_search_failed) == (DONE, True)
    now = _phases.answered(asked, jnp.asarray(True), none, number(1e-4), terms(atol=1e-3))
    assert (now.phase, now.result == dl.RESULTS.successful) == (DONE, True)
    now = _phases.answered(asked, jnp.asarray(False), none, number(1e-4), terms())
    assert (now.phase, now.num_hvps) == (NEWTON, 0)


@pytest.mark.parametrize(
    ("grad_norm", "slope", "polish", "expected"),
    [
        (1e-7, -1e-12, 0, DONE),
        (1e-7, -1e-12, 1, SEARCH),  # a polish proves more
        (1e-5, -1e-12, 0, SEARCH),  # the gradient is not small
        (1e-7, -1e-3, 0, SEARCH),  # the decrement is not small
    ],
)
def test_without_a_polish_gradient_and_decrement_decide(grad_norm, slope, polish, expected):
    here = ledger(SEARCH, least_energy=1.0, settled=True)
    told = terms(polish=polish)
    now = _phases.turned(here, jnp.asarray(True), number(grad_norm), number(slope), told)
    assert now.phase == expected
    behind = dataclasses.replace(here, settled=jnp.asarray(False))
    now = _phases.turned(behind, jnp.asarray(True), number(grad_norm), number(slope), told)
    assert now.phase == SEARCH  # the gradient is small beside that of a cliff
    now = _phases.turned(here, jnp.asarray(False), number(grad_norm), number(slope), told)
    assert now.phase == SEARCH  # down the gradient there is no model


@pytest.mark.parametrize(
    ("y_norm", "slope", "settled"),
    [(0.1, -0.1, True), (1e-3, -0.1, False), (1e-3, -0.04, True)],  # curvatures 1 and 0.01; bottom
)
def test_a_step_shows_the_curvature_that_is_remembered_or_a_bottom(y_norm, slope, settled):
    trial = seen(slope=slope, y_norm=y_norm, curved=0.1 * y_norm)
    assert after(ledger(SEARCH), trial)[1].settled == settled


def test_the_whole_gradient_has_to_fall_before_the_end():
    for grad_norm, noise, phase in ((0.02, 1, DONE), (0.02, 0.1, NEWTON), (0.05, 1, NEWTON)):
        trial = seen(f=2 - 0.5e-12, slope=0.0, grad_norm=grad_norm)
        before = ledger(NEWTON, newton=findings(noise=noise))
        _, now, _ = after(before, trial, slope=-1e-12)
        assert now.phase == phase


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_no_decision_depends_on_the_unit_of_the_objective(factor):
    for f, slope in ((1.9, 0.0), (2.1, 0.3), (1.9, -0.19)):
        here = Here(number(2 * factor), number(0.1 * factor), number(-0.2 * factor))
        trial = seen(f=f * factor, slope=slope * factor, grad_norm=0.05 * factor)
        scaled = {"y_norm": 0.1, "curved": 0.01, "across": 0.1, "back": 0.1}
        scaled = {name: number(value * factor) for name, value in scaled.items()}
        trial = dataclasses.replace(trial, **scaled)
        scale = Scale(number(factor), number(factor), number(1.0), jnp.asarray(True))
        known = {"least_f": number(2 * factor), "least_grad_norm": number(0.1 * factor)}
        scaled = dataclasses.replace(ledger(SEARCH), scale=scale, **known)
        line = _wolfe.begin(here.f, here.slope, trial.trial.t)
        found, now, going = _phases.decide(scaled, line, here, trial, terms())
        wanted, plain, wanted_line = after(ledger(SEARCH), seen(f=f, slope=slope))
        assert (now.phase, bool(found.taken)) == (plain.phase, bool(wanted.taken))
        assert jnp.allclose(going.t, wanted_line.t, rtol=1e-12)
