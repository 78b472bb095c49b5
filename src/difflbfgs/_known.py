"""`known_minimizer`: a minimizer that was found elsewhere, checked and made differentiable.

The check stands where a search would: the rule that differentiates what a search finds takes the
point in the same way, and its messages, its lanes and its derivatives with it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from difflbfgs import _box, _krylov, _loop, _memory, _phases, _vector
from difflbfgs._adjoint import ForwardImplicitAdjoint, ImplicitAdjoint
from difflbfgs._checks import (
    check_callable,
    check_flag,
    check_instance,
    check_tolerance,
    no_type_check,
)
from difflbfgs._face import Face, Smooth
from difflbfgs._lbfgs import LBFGS
from difflbfgs._linear import Accuracy
from difflbfgs._minimize import (
    make_solution,
    own_preconditioner,
    solve_differentiably,
    with_bounds,
)
from difflbfgs._newton import newton_step
from difflbfgs._operator import SymmetricOperator
from difflbfgs._problem import Problem, make_problem, make_variables
from difflbfgs._scale import rounding
from difflbfgs._solution import RESULTS, Outcome, Solution, Stats, count
from difflbfgs._system import DENSE_SIZE, default_system
from difflbfgs._task import Task
from difflbfgs._vector import Count, Flag, Scalar

# As many products as the Newton step cares to take.
_UNBOUNDED = 2**31 - 1
# How well a factor has to solve the step's equations: it is to be right within a factor.
_ACCURACY = Accuracy(wanted=1e-4, accepted=1e-2)


@no_type_check
def known_minimizer(
    fun: Callable,
    x: PyTree,
    theta: PyTree = None,
    *,
    bounds: tuple[PyTree, PyTree] | None = None,
    rtol: ArrayLike | None = None,
    atol: ArrayLike = 0.0,
    adjoint: ImplicitAdjoint | ForwardImplicitAdjoint = ImplicitAdjoint(),
    has_aux: bool = False,
    throw: bool = True,
) -> Solution:
    """Check a minimizer that was found elsewhere, and make it differentiable by `theta`.

    `x` comes from another solver or from a closed form, and is returned as it is. Its derivative is
    that of `minimize(...).value`: zero by `x`, `-H⁻¹ B` by `theta`, with the error that `x` has.

    Args:
        fun: the objective, `fun(x, theta)`, as for `minimize`.
        x: the minimizer, any PyTree. Its floating-point and complex leaves are the variables.
        theta: what to differentiate by, any PyTree.
        bounds: `(lower, upper)`, as for `minimize`: the check is that of the free variables. A
            point outside is no minimizer.
        rtol: tolerance on the Newton step, relative to the energy norm `√(xᵀHx)`. `None`: fourth
            root of the machine epsilon, 1.2e-4 in float64 and 1.9e-2 in float32.
        atol: absolute tolerance on the gradient norm.
        adjoint: `ImplicitAdjoint(...)` or `ForwardImplicitAdjoint(...)`.
        has_aux: whether `fun` returns an auxiliary output as well.
        throw: raise if `x` is not the minimizer or the adjoint did not converge, jitted or not. If
            `False`, `result` says what happened and the derivative is NaN.

    Returns:
        A `difflbfgs.Solution`. Its `value` is `x`; its `state` has no curvature pairs, and starts
        `minimize` with the default `memory_size` at `x`.

    Raises:
        TypeError: if an argument has the wrong type, or `fun` returns something else.
        ValueError: if `x` has nothing to minimize over, a value is out of range, or `adjoint` asks
            for a memory that there is none of.
        RuntimeError: if `x` is not a minimizer or the adjoint did not converge, and `throw` is set.

    Note:
        `x` counts as the minimizer if the Newton step from it is short and contracts, and the
        Hessian changes by at most `rtol` along it, or the gradient is at most `atol`; and if no
        negative curvature was seen. docs/how_it_works.md has the formulas.

        It costs two evaluations of `f` with its gradient and the Hessian-vector products of one
        Newton step: up to 64 variables as many as variables, batched, and all eigenvalues are
        looked at; beyond, up to ten a variable and 2000 in all.

    References:
        M. Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022.

    Examples:
        >>> import jax, jax.numpy as jnp, difflbfgs as dl
        >>> def ridge(w, penalty):
        ...     return jnp.sum((w - jnp.arange(3.0)) ** 2) + penalty * jnp.sum(w**2)
        >>> w = jnp.arange(3.0) / 1.5  # from elsewhere, at a penalty of 0.5
        >>> def outer(penalty):
        ...     return jnp.sum(dl.known_minimizer(ridge, w, penalty).value)
        >>> print(f"{outer(0.5):.4f} {jax.grad(outer)(0.5):.4f}")
        2.0000 -1.3333
        >>> sol = dl.known_minimizer(ridge, w, 0.8, throw=False)
        >>> print(bool(sol.result == dl.RESULTS.not_a_minimizer))
        True
    """
    check_callable("fun", fun, "It is called as fun(x, theta).")
    check_tolerance("rtol", rtol, optional=True)
    check_tolerance("atol", atol)
    check_instance(
        "adjoint", adjoint, (ImplicitAdjoint, ForwardImplicitAdjoint), "ImplicitAdjoint()"
    )
    check_flag("has_aux", has_aux)
    check_flag("throw", throw)
    if adjoint.preconditioner == "lbfgs":
        raise ValueError(
            "adjoint has preconditioner='lbfgs', the memory of a solve, and known_minimizer has "
            "none. Pass a function (x, theta) -> lineax operator, or leave the preconditioner out."
        )
    variables = make_variables(x, True, "x")
    vector = variables.to_vector(x)
    problem = make_problem(fun, theta, variables, vector, has_aux)
    problem = with_bounds(problem, bounds, theta, variables, x, LBFGS())
    vector = jax.lax.stop_gradient(vector)
    preconditioner = own_preconditioner(adjoint, theta, variables, vector)
    rtol = _vector.epsilon(vector) ** 0.25 if rtol is None else rtol
    task = Task(Check(vector, rtol, atol), adjoint, preconditioner, throw)
    outcome = solve_differentiably(task, problem)
    return make_solution(variables, outcome, problem.aux(outcome.x) if has_aux else None)


class Check(eqx.Module):
    """A point to be checked, in place of a search."""

    x: Float[Array, " n"]
    rtol: Any
    atol: Any

    def __call__(self, problem: Problem) -> Outcome:
        """Return the point as the outcome of a solve, and whether it is a minimizer."""
        with jax.numpy_dtype_promotion("standard"):
            return self._outcome(problem)

    def _outcome(self, problem: Problem) -> Outcome:
        x, box = self.x, problem.box()
        f, gradient = problem.value_and_gradient(x)
        face: Smooth = problem
        active, inside = None, jnp.asarray(True)
        if box is not None:
            active = box.active(x, gradient)
            face = Face.of(problem, active, x)
            inside = ~_box.differ(box.project(x), x)
        g, free = face.free(gradient), face.free(x)
        grad_norm = _vector.norm(g)
        finite = jnp.isfinite(f) & jnp.isfinite(grad_norm)
        step = _Step.of(functools.partial(face.product, x), free, g, grad_norm, finite)
        after = x + step.d if box is None else box.project(x + step.d)
        _, gradient_after = problem.value_and_gradient(after)
        g_after = face.free(gradient_after)
        unit = _vector.unit(step.d)
        along, before = jnp.abs(_vector.dot(g_after, unit)), jnp.abs(_vector.dot(g, unit))
        size = jnp.sqrt(step.energy)
        q = along / _vector.nonzero(before)
        change = _phases.change(q, grad_norm, _vector.norm(g_after), step.rest, step.noise)
        even = 2 * change <= self.rtol
        contracts = step.solved & (along <= _phases.CONTRACTION * before)
        small = step.solved & (step.decrement <= self.rtol * size)
        tiny = step.decrement <= rounding(size)
        # As a search: a step at rounding level cannot contract, and says no more.
        limit = step.solved & even & (step.decrement <= _vector.epsilon(x) ** 0.5 * size)

        curvature = jnp.maximum(step.curvature, _memory.Pair(step.d, g_after - g).curvature())
        curvature = jnp.where(jnp.isfinite(curvature), curvature, 0)
        x_norm = _vector.norm(free)
        stationary = (grad_norm <= self.atol) | (grad_norm <= self.rtol * curvature * x_norm)
        result = RESULTS.not_a_minimizer
        for flag, name in (
            (limit, RESULTS.precision_limit),
            (small & ((contracts & even) | tiny), RESULTS.successful),
            (grad_norm <= self.atol, RESULTS.successful),
            (step.negative, RESULTS.not_a_minimizer),
            (step.negative & stationary, RESULTS.indefinite_hessian),
            (~step.finite, RESULTS.nonfinite_hessian),
            (~inside, RESULTS.not_a_minimizer),
            (~finite, RESULTS.nonfinite_start),
        ):
            result = RESULTS.where(flag, name, result)
        reference = curvature * jnp.minimum(1, x_norm)
        # An empty memory at this point is one whose newest pair is nothing.
        memory = _memory.empty(x, LBFGS().memory_size)._replace(params=x, updates=gradient)
        outcome = Outcome(
            x=x,
            f=f,
            result=result,
            stats=Stats(count(0), count(2), step.products, grad_norm, reference),
            state=_loop.arrived(x, gradient, memory, reference, curvature),
            achieved=step.decrement / _vector.nonzero(size),
            regular=jnp.asarray(True),
        )
        if box is None:
            return outcome
        least = rounding(curvature * x_norm)
        moved, turned = jnp.abs(step.d), jnp.abs(gradient_after - gradient)
        errors = moved + rounding(x), turned + least
        return outcome.between(active, box.weakly_active(x, gradient, active, *errors))


class _Step(eqx.Module):
    """A Newton step, and what it says of the point.

    Attributes:
        d: the step.
        decrement: `λ = √(-gᵀd)`.
        rest: `‖H d + g‖`.
        noise: the part of `gᵀd` that may be rounding.
        energy: `xᵀHx`.
        curvature: the largest curvature seen, or that along `x`.
        solved: `H d = -g` was solved, and `d` is a descent direction, or `g` zero.
        negative: negative curvature was seen.
        finite: the products are finite.
        products: Hessian products spent.
    """

    d: Float[Array, " n"]
    decrement: Scalar
    rest: Scalar
    noise: Scalar
    energy: Scalar
    curvature: Scalar
    solved: Flag
    negative: Flag
    finite: Flag
    products: Count

    @classmethod
    def of(cls, hvp: Callable, x, g, grad_norm: Scalar, wanted: Flag) -> "_Step":
        """Find the step, from a gradient of norm one, as squares of it may be out of range.

        If it is zero, a vector of signs stands for it, to meet negative curvature all the same.
        """
        b = _vector.unit(_vector.where(grad_norm > 0, g, _vector.rademacher(x, 0)))
        if x.size <= DENSE_SIZE:
            step = cls._direct(hvp, x, b, _krylov.slack(x, grad_norm))
        else:
            step = cls._iterative(hvp, x, b, wanted)
        nothing, zero = jnp.zeros_like(x), jnp.zeros_like(grad_norm)
        flat = grad_norm == 0
        return dataclasses.replace(
            step,
            d=_vector.where(flat, nothing, grad_norm * step.d),
            decrement=_vector.where(flat, zero, grad_norm * step.decrement),
            rest=_vector.where(flat, zero, grad_norm * step.rest),
            noise=step.noise / _vector.nonzero(grad_norm),
            solved=step.solved | flat,
            negative=step.negative & wanted,
            finite=step.finite | ~wanted,
        )

    @classmethod
    def _direct(cls, hvp, x, b, slack: Scalar) -> "_Step":
        """Find the step with the factor of the Hessian, which shows all of its curvature."""
        matrix = SymmetricOperator.of(hvp, x).as_matrix()
        operator = SymmetricOperator.of(lambda p: matrix @ p, x)
        system = default_system(operator, slack, None)
        u, report = system.solve(b, _ACCURACY)
        square = _vector.dot(b, u)
        return cls(
            d=-u,
            decrement=jnp.sqrt(_vector.where(square > 0, square, 0)),
            rest=_vector.norm(matrix @ u - b),
            noise=rounding(jnp.abs(u) @ (jnp.abs(matrix) @ jnp.abs(x))) / _vector.nonzero(square),
            energy=jnp.maximum(_vector.dot(x, matrix @ x), 0),
            curvature=jnp.max(jnp.abs(matrix)),
            solved=(report.result == RESULTS.successful) & (square > 0),
            negative=report.result == RESULTS.indefinite_hessian,
            finite=system.finite,
            products=count(x.size),
        )

    @classmethod
    def _iterative(cls, hvp, x, b, wanted: Flag) -> "_Step":
        """Find the step as a search does."""
        # The least guess of the decrement: if it is larger, the point is refused anyway.
        guess = jnp.full((), jnp.finfo(x.dtype).tiny, x.dtype)
        one, nowhere = jnp.ones_like(guess), jnp.zeros_like(x)
        d, slope, found = newton_step(hvp, x, b, nowhere, guess, one, count(_UNBOUNDED), wanted)
        length = _vector.nonzero(_vector.norm(x))
        return cls(
            d=d,
            decrement=jnp.sqrt(_vector.where(slope < 0, -slope, 0)),
            rest=found.rest,
            noise=found.noise,
            energy=found.size,
            curvature=found.size / length / length,
            solved=found.valid & found.solved,
            negative=found.negative,
            finite=jnp.isfinite(found.size) & jnp.isfinite(slope),
            products=found.products,
        )
