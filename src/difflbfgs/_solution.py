"""What a solve returns, and every way in which it can end."""

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Bool, Float, Int, PyTree

_T = TypeVar("_T")

_OptimistixResults: Any = optimistix.RESULTS


class RESULTS(_OptimistixResults):
    """How a solve ended. Each member's value is the message that its user reads.

    `successful` and `precision_limit` count as converged. `max_steps_reached` and the other
    members that are not listed here are inherited from Optimistix and Lineax.
    """

    precision_limit = (
        "The rounding error of the objective hides any further decrease, and the gradient is at "
        "that noise level: this is as close to the minimizer as this precision gets. For more "
        "digits use float64, or subtract a large constant from the objective."
    )
    nonfinite_start = (
        "The objective or its gradient is NaN or infinite at the starting point. Check `x0` and "
        "the data for NaN, start inside the objective's domain, and look for bounds that are "
        "crossed or NaN."
    )
    unbounded = (
        "The objective falls without limit, so there is no minimizer. Check its sign, add a "
        "regulariser, or pass `bounds`."
    )
    line_search_failed = (
        "No acceptable step was found, not even along the steepest descent, and the gradient is "
        "above the noise level. The objective may be non-smooth or discontinuous here, its "
        "gradient wrong, or its variables badly scaled; or its values are inexact, and "
        "`LBFGS(noise=...)` is to say how much. The best point found is returned under "
        "`throw=False`."
    )
    no_minimizer = (
        "The objective still falls along a direction without curvature: towards an infimum at "
        "infinity, as a likelihood does on separable data, or from a plateau, as a sigmoid far out "
        "in float32. Add a regulariser, or start elsewhere."
    )
    weakly_active = (
        "A variable is at its bound, or within the solve's error of it, with a multiplier within "
        "error of zero: the minimizer has one derivative on either side, and none there. Move the "
        "bound or `theta` a little, solve to a smaller `rtol`, or take the derivative of the free "
        "variable with `approximate=True`."
    )
    not_a_minimizer = (
        "The point given to `known_minimizer` is not shown to be a minimizer: the Newton step from "
        "it is longer than `rtol` of the energy norm of `x`, meets another Hessian, does not "
        "contract, or does not exist. "
        "Solve to a smaller gradient, or hand `x` to `minimize` as its start; if the point is "
        "right as it is, loosen `rtol`, or set `atol` above the norm of the gradient."
    )
    stopped = (
        "The solve ended because `stop` said so, and not at a minimizer: there is no derivative. "
        "Let it go on with `state=`, or differentiate where it stopped with `approximate=True`."
    )
    adjoint_not_converged = (
        "The adjoint system H u = v was not solved: its true residual is above tolerance. H may "
        "be singular with v outside its range, or too ill-conditioned for this precision; or the "
        "minimum is degenerate, and no Newton step contracts there. Add a regulariser or a "
        "`ridge`, allow the linear solver more steps, or use float64."
    )
    nonfinite_hessian = (
        "Hessian-vector products of the objective are not finite at the solution (NaN or "
        "infinite), as those of an eigenvalue are where it is multiple: there is no derivative. "
        "Rewrite the objective so that its second derivatives exist there."
    )
    uncertified = (
        "The solve and its adjoint converged, and yet there is no error estimate: a Newton step "
        "from the solution does not contract, so that the solution is not near enough, or the "
        "minimum is degenerate. Lower the solver's `rtol`, or check the gradient otherwise."
    )
    accuracy_not_reached = (
        "The hypergradient is not as exact as `accuracy` asks for, because of the precision, or of "
        "`max_steps`. The gradient is the best that was found, and `error_estimate` its error. Ask "
        "for less, allow more steps, use float64, or add an absolute accuracy: where the "
        "hypergradient vanishes, none is small beside it."
    )
    indefinite_hessian = (
        "The Hessian has negative curvature at the solution, which is therefore a saddle point "
        "and not a minimum: the implicit derivative does not apply. Start elsewhere, or add a "
        "regulariser."
    )


def has_failed(result: Any) -> Bool[Array, "*batch"]:
    """Return whether `result` is of a solve that neither converged nor was to stop."""
    return ~has_converged(result) & (result != RESULTS.stopped)


class Stats(eqx.Module):
    """What a solve cost, and how close it came.

    Attributes:
        num_steps: steps taken and searches that failed, Newton steps included.
        num_fun_evals: evaluations of the objective together with its gradient.
        num_hvps: Hessian-vector products.
        grad_norm: 2-norm of the gradient at the returned point, with bounds of its free part.
        reference_grad_norm: a gradient norm typical of the problem, see `LBFGS`.
        num_active: variables at their bounds; 0 without any.
        num_weakly_active: variables that may as well be at their bounds as not.
    """

    num_steps: Int[Array, "*batch"]
    num_fun_evals: Int[Array, "*batch"]
    num_hvps: Int[Array, "*batch"]
    grad_norm: Float[Array, "*batch"]
    reference_grad_norm: Float[Array, "*batch"]
    num_active: Int[Array, "*batch"] = eqx.field(default_factory=lambda: count(0))
    num_weakly_active: Int[Array, "*batch"] = eqx.field(default_factory=lambda: count(0))

    def __repr__(self) -> str:
        return eqx.tree_pformat(self, short_arrays=False)


class Outcome(eqx.Module):
    """Where a solve stopped, in the terms of the interior.

    Attributes:
        x, f: the point, and the objective there.
        result: how the solve ended.
        stats: what it cost.
        state: what the next one takes.
        achieved: the relative error that is left, as far as the solve can tell.
        regular: whether a minimum that can be differentiated was found, if any.
        active: which variables are at their bounds, as -1, 0 and 1; `None` without bounds.
        weak: which may as well be as not.
    """

    x: PyTree[Float[Array, "..."]]
    f: Float[Array, ""]
    result: Any
    stats: Stats
    state: Any
    achieved: Float[Array, ""]
    regular: Bool[Array, ""]
    active: Any = None
    weak: Any = None

    def between(self, active: Any, weak: Any) -> "Outcome":
        """Return the outcome of a solve between bounds, with these variables at them."""
        counts = {"num_active": number(active), "num_weakly_active": number(weak)}
        stats = dataclasses.replace(self.stats, **counts)
        return dataclasses.replace(self, stats=stats, active=active, weak=weak)

    def raised(self) -> "Outcome":
        """Return the outcome, whose use raises if the solve failed.

        What a check guards is copied, and so the curvature pairs in `state` are left out.
        """
        guarded = self.x, self.f, self.result, self.stats
        x, f, result, stats = raised(guarded, has_failed(self.result), self.result)
        state = eqx.tree_at(lambda state: state.x, self.state, x)
        changed = {"x": x, "f": f, "result": result, "stats": stats, "state": state}
        return dataclasses.replace(self, **changed)


class Solution(eqx.Module):
    """The answer of `difflbfgs.minimize`.

    Attributes:
        value: the minimizer, in the structure and dtypes of `x0`.
        objective: the objective at `value`, in the working dtype.
        aux: the objective's auxiliary output at `value`; `None` without `has_aux`.
        result: how the solve ended, a member of `difflbfgs.RESULTS`.
        stats: a `difflbfgs.Stats`.
        state: hand it to the next `minimize` as `state=` for a warm start.
        active: with bounds, -1 for a variable at its lower bound, 1 at its upper (between equal
            ones as the multiplier says) and 0 for a free one; int8, `None` for other leaves.
    """

    value: PyTree
    objective: Float[Array, "*batch"]
    aux: PyTree
    result: RESULTS
    stats: Stats
    state: PyTree
    active: PyTree = None

    @property
    def converged(self) -> Bool[Array, "*batch"]:
        """Whether `value` can be trusted as a minimizer."""
        return has_converged(self.result)


def has_converged(result: Any) -> Bool[Array, "*batch"]:
    """Return whether `result` is one of the two members that count as converged."""
    return (result == RESULTS.successful) | (result == RESULTS.precision_limit)


def raised(tree: _T, failed: Bool[Array, ""], result: Any) -> _T:
    """Return `tree`, whose use raises if `failed`, with the message of `result`.

    Of several devices that work on one solve, each calls Python: JAX would call it on the first
    one only for `tree`, and the others would wait for ever.
    """
    if jax.device_count() == 1:
        return _guarded(tree, failed, result)
    _raise_everywhere(failed, result)
    return tree


@jax.custom_jvp
def _guarded(tree, failed, result):
    failed, result = _worst(failed, result)
    like = jax.eval_shape(lambda: tree)
    return jax.lax.cond(failed, lambda: jax.pure_callback(_complain, like, result), lambda: tree)


@_guarded.defjvp
def _guarded_jvp(primals, tangents):
    return _guarded(*primals), tangents[0]


@jax.custom_batching.custom_vmap
def _worst(failed, result):
    """Return whether any lane failed, and how the first of them did."""
    return failed, result


@_worst.def_vmap
def _worst_of_lanes(axis_size, is_batched, failed, result):
    del is_batched
    failed, result = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, axis_size), (failed, result))
    lane = jnp.argmax(failed)
    found = _worst(*jax.tree.map(lambda leaf: leaf[lane], (failed, result)))
    return found, jax.tree.map(lambda _: False, found)


def _raise_everywhere(failed, result):
    def complain(result):
        jax.debug.callback(_complain, result, partitioned=True)

    failed, result = _worst(failed, result)
    jax.lax.cond(failed, complain, lambda _: None, result)


class _SolveFailed(RuntimeError):
    """What is raised while a program runs; JAX makes an error of its own from its text."""


def _complain(result):
    messages: Any = RESULTS
    raise _SolveFailed(messages[result]).with_traceback(_TRACEBACK)


def _difflbfgs() -> Any:
    yield


# JAX's text names all calls that lead to the innermost one of the traceback. Of a generator that
# was not started there are none.
_FRAME: Any = _difflbfgs().gi_frame
_TRACEBACK = types.TracebackType(None, _FRAME, _FRAME.f_lasti, _FRAME.f_lineno)


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """Raise the message of a failed solve alone, without what JAX adds to it."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # which of the two depends on JAX's dispatch
        _, ours, message = str(error).partition(f"{_SolveFailed.__name__}: ")
        if not ours:
            raise
        raise RuntimeError(message.strip()) from None


def number(flags: PyTree) -> Int[Array, ""]:
    """Return how many entries are not zero."""
    leaves = jax.tree.leaves(flags)
    return jnp.asarray(sum(jnp.sum(leaf != 0, dtype=jnp.int32) for leaf in leaves))


def count(value: int) -> Int[Array, ""]:
    """Return an integer statistic, in the dtype that all of them have."""
    return jnp.asarray(value, jnp.int32)
