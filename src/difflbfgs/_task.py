"""A solve and its adjoint, each as the user asked for it, with a problem to be put in."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from difflbfgs import _box, _krylov, _memory, _vector
from difflbfgs._face import Face, Smooth
from difflbfgs._lanes import prepared
from difflbfgs._linear import Report, System, differentiable_solve
from difflbfgs._operator import SymmetricOperator
from difflbfgs._problem import Problem, interior
from difflbfgs._solution import RESULTS, Outcome, has_converged, raised
from difflbfgs._system import AbstractAdjoint
from difflbfgs._vector import Flag, Vector


class Task(eqx.Module):
    """A solve to be done, and what its derivative needs to know, but for the problem itself.

    Attributes:
        find: how the minimizer is found: by a search, or by checking a point.
        adjoint: how it is differentiated.
        preconditioner: the user's, if any.
        throw: whether to raise.
        stops: whether the search may be told to stop.
    """

    find: Callable[[Problem], Outcome]
    adjoint: AbstractAdjoint
    preconditioner: Callable[[Vector, Vector], Vector] | None
    throw: bool = eqx.field(static=True)
    stops: bool = eqx.field(default=False, static=True)

    def solve(self, problem: Problem) -> Outcome:
        """Solve, and raise here, where the derivative will see it, if that failed."""
        with interior(problem.name):
            outcome = self.find(problem)
        return outcome.raised() if self.throw else outcome

    def trusts_value(self, outcome: Outcome) -> Flag:
        """Return whether the objective at the outcome may be differentiated."""
        found = has_converged(outcome.result) & outcome.regular
        return found | self.adjoint.approximate

    def trusts(self, outcome: Outcome) -> Flag:
        """Return whether the outcome may be differentiated."""
        return self.trusts_value(outcome) & ~self._is_torn(outcome)

    def _is_torn(self, outcome: Outcome) -> Flag:
        """Return whether there is a derivative on either side only, and none is to be taken."""
        if outcome.weak is None or self.adjoint.approximate:
            return jnp.asarray(False)
        return outcome.stats.num_weakly_active > 0

    def _was_stopped(self, outcome: Outcome) -> Flag:
        """Return whether a solve that is not to raise for it has to in its derivative."""
        if not self.stops or self.adjoint.approximate:
            return jnp.asarray(False)
        return outcome.result == RESULTS.stopped

    def guarded(self, outcome: Outcome, used: Flag) -> Outcome:
        """Return the outcome, whose use raises if it was stopped, and a derivative is `used`."""
        if not self.throw or not self.stops:
            return outcome
        failed = self._was_stopped(outcome) & used
        x = raised(outcome.x, failed, RESULTS.stopped)
        return eqx.tree_at(lambda outcome: outcome.x, outcome, x)

    def on_face(self, problem: Problem, outcome: Outcome) -> Smooth:
        """Return the problem that is to be differentiated, active variables being held."""
        if outcome.active is None:
            return problem
        x, active, weak = jax.lax.stop_gradient((outcome.x, outcome.active, outcome.weak))
        if self.adjoint.approximate:
            active = _box.masked(weak, active)
        return Face.of(problem, active, x)

    def solve_adjoint(self, problem: Smooth, outcome: Outcome, v: Vector) -> tuple[Vector, Report]:
        """Solve `H u = v` at the outcome; of a problem with bounds, on its face.

        If the forward or the adjoint solve failed, this raises or multiplies `u` by NaN. (Selecting
        a NaN instead would have a derivative of zero.) A `v` of zero has the solution zero always.
        """

        def solve(_, b):
            return _solve_adjoint(self, problem, outcome, b)

        matvec = self._hessian(problem, outcome)  # for the derivatives of this solve
        with interior(problem.name):
            return differentiable_solve(matvec, v, solve, has_aux=True)

    def prepare(self, problem: Smooth, outcome: Outcome, num: int) -> Callable[[Vector], Any]:
        """Return `v -> u` and a report, `H u = v` being made ready for so many `v`."""
        operator = SymmetricOperator.of(self._hessian(problem, outcome), outcome.x)
        system = self.system(problem, operator, outcome, num)
        return lambda v: self._solved(system, outcome, v)

    def _solved(self, system: System, outcome: Outcome, v: Vector) -> tuple[Vector, Report]:
        u, report = self.solve_system(system, outcome, v)
        spoilt = (report.result != RESULTS.successful) | ~self.trusts(outcome)
        factor = jnp.where(spoilt & ~_vector.is_zero(v), jnp.nan, 1)
        return _vector.scale(factor, u), report

    def _hessian(self, problem: Smooth, outcome: Outcome) -> Callable[[Vector], Vector]:
        """Return the Hessian-vector product at the outcome, with the ridge of the adjoint."""
        product = problem.product if self.adjoint.needs_products else problem.product_if_any
        ridge = self.adjoint.ridge
        return lambda p: _vector.add_scaled(product(outcome.x, p), ridge, problem.free(p))

    def system(
        self, problem: Smooth, operator: SymmetricOperator, outcome: Outcome, num: int = 1
    ) -> System:
        """Return `H u = v`, preconditioned and ready to be solved for so many `v`."""
        apply = self._preconditioner(outcome)
        if apply is not None and isinstance(problem, Face):
            apply = problem.restricted(apply)
        preconditioner = None if apply is None else SymmetricOperator.of(apply, outcome.x)
        grad_norm = jax.lax.stop_gradient(outcome.stats.grad_norm)
        slack = _krylov.slack(jax.lax.stop_gradient(outcome.x), grad_norm)
        return self.adjoint.system(operator, slack, preconditioner, num)

    def solve_system(
        self, system: System, outcome: Outcome, v: Vector, start: Vector | None = None
    ) -> tuple[Vector, Report]:
        """Solve `H u = v` as the adjoint says; raise if that failed and `throw` is set."""
        achieved = jax.lax.stop_gradient(outcome.achieved)
        u, report = self.adjoint.solve_system(system, v, achieved, start)
        report = self.judged(outcome, report)
        if self.throw:
            failed = (report.result != RESULTS.successful) & ~_vector.is_zero(v)
            u = raised(u, failed, report.result)
        return u, report

    def judged(self, outcome: Outcome, report: Report) -> Report:
        """Return the report of an adjoint that may be right, and yet not be a derivative."""
        refused = ~jax.lax.stop_gradient(outcome.regular) & ~jnp.asarray(self.adjoint.approximate)
        result = RESULTS.where(refused, RESULTS.adjoint_not_converged, report.result)
        result = RESULTS.where(self._is_torn(outcome), RESULTS.weakly_active, result)
        result = RESULTS.where(self._was_stopped(outcome), RESULTS.stopped, result)
        return eqx.tree_at(lambda report: report.result, report, result)

    def _preconditioner(self, outcome):
        """Return the approximate inverse Hessian to precondition with, as a function, or `None`."""
        x, state = jax.lax.stop_gradient((outcome.x, outcome.state))
        if self.preconditioner is not None:
            return functools.partial(jax.lax.stop_gradient(self.preconditioner), x)
        if self.adjoint.preconditioner == "lbfgs":
            return _memory.inverse_hessian(state.memory, x, state.g)
        return None


_solve_adjoint = prepared(Task.prepare)
