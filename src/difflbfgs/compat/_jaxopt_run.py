"""A whole solve of JAXopt's L-BFGS: by `minimize`, or by repeating JAXopt's step."""

import contextlib
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from difflbfgs import _vector
from difflbfgs._lbfgs import LBFGS, WarmStart
from difflbfgs._minimize import make_task
from difflbfgs._problem import Problem, Variables, make_problem
from difflbfgs._rule import Task
from difflbfgs._solution import RESULTS, Outcome, has_converged
from difflbfgs.compat import _jaxopt_step as step
from difflbfgs.compat._jaxopt_adjoint import make_adjoint
from difflbfgs.compat._jaxopt_objective import Objective
from difflbfgs.compat._jaxopt_settings import Settings
from difflbfgs.compat._jaxopt_state import Iterate, from_solve, warm_start


class Run(eqx.Module):
    """A solve to be done.

    Attributes:
        settings: the arguments of the solver.
        objective: the objective.
        theta: the pair of its positional and keyword arguments.
        variables: how to read its parameters from a vector.
        x: where to begin.
        before: an iterate whose memory to begin with.
    """

    settings: Settings
    objective: Objective
    theta: tuple
    variables: Variables
    x: Array
    before: Iterate | None

    def end(self) -> Iterate:
        """Return where the solve ends, with its derivative."""
        how = self.settings.repeats_update()
        return self._minimized() if how is None else self._repeated(how)

    def _problem(self) -> Problem:
        return make_problem(self.objective, self.theta, self.variables, self.x, has_aux=True)

    def _minimized(self) -> Iterate:
        settings = self.settings
        # A gradient that the user computes need not be differentiable, as the polish wants it.
        polish = settings.implicit_diff and settings.value_and_grad is False
        solver = LBFGS(
            rtol=0.0,
            atol=settings.tol,
            memory_size=settings.history_size,
            linesearch=settings.search(_vector.epsilon(self.x)),
            polish=int(polish),
        )
        warm = None if self.before is None else warm_start(self.before)
        outcome, aux = self._solve(self._problem(), self.x, warm, solver, settings.maxiter)
        x, f = outcome.x, outcome.f
        if not settings.implicit_diff:
            x, f, aux = step.undifferentiable((x, f, aux))
        steps = 0 if self.before is None else self.before.iter_num
        end = from_solve(
            outcome.state, f, aux, outcome.result, outcome.stats, steps, settings.max_stepsize
        )
        return eqx.tree_at(lambda end: end.x, end, x)

    def _repeated(self, how: str) -> Iterate:
        """Repeat the step, and give the end the derivative of a minimizer if that is wanted."""
        settings = self.settings
        compiled, implicit = settings.jit, settings.implicit_diff
        problem = self._problem() if compiled or implicit else None
        direct = step.Direct(self.objective, self.theta, self.variables)
        x, before, traced, seen = self.x, self.before, problem, problem if compiled else direct
        if implicit:
            x, before, traced, seen = step.without_derivative((x, before, traced, seen))
        with contextlib.nullcontext() if compiled else jax.disable_jit():
            start = _begin(traced or seen, settings, x, before)
            end = _loop(seen, settings, start, how)
        if problem is None or not implicit:
            return end
        end = step.without_derivative(end)
        solver = LBFGS(0.0, settings.tol, memory_size=max(1, settings.history_size), polish=0)
        warm = warm_start(end) if settings.history_size else None
        outcome, aux = self._solve(problem, end.x, warm, solver, 0)
        result = RESULTS.where(has_converged(outcome.result), outcome.result, end.result)
        changed = {"x": outcome.x, "aux": aux, "result": result}
        return Iterate(**{**vars(end), **changed})

    def _solve(
        self, problem: Problem, x: Array, warm: WarmStart | None, solver: LBFGS, max_steps: int
    ) -> tuple[Outcome, tuple[Any, Any]]:
        """Return the outcome, and the user's value and auxiliary output there."""
        settings = self.settings
        task = make_task(
            self.variables,
            x,
            warm,
            self.theta,
            solver,
            make_adjoint(settings.implicit_diff_solve),
            max_steps,
            throw=False,
            callback=step.print_step if settings.verbose and max_steps else None,
        )
        outcome, aux = _differentiable(task, problem, settings.has_aux)
        dtype = jax.eval_shape(problem.aux, x)[0].dtype
        return outcome, (outcome.f.astype(dtype), aux)


@eqx.filter_jit
def _differentiable(task: Task, problem: Problem, has_aux: bool) -> tuple[Outcome, Any]:
    outcome = task.adjoint.differentiable(task, problem)
    return outcome, problem.aux(outcome.x)[1] if has_aux else None


@eqx.filter_jit
def _begin(problem, settings, x, before):
    with jax.numpy_dtype_promotion("standard"):
        return step.begin(problem, settings, x, before)


@eqx.filter_jit
def _loop(problem, settings, start, how):
    with jax.numpy_dtype_promotion("standard"):
        return step.loop(problem, settings, start, how)
