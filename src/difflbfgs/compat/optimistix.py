"""L-BFGS for `optimistix.minimise`: a step of its loop is one of ours."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from difflbfgs import _lbfgs, _loop, _vector
from difflbfgs._checks import no_type_check
from difflbfgs._problem import Problem, Variables, make_problem, make_variables
from difflbfgs._solution import RESULTS, has_converged
from difflbfgs._vector import Vector


class _State(eqx.Module):
    """Where the solve is, and the length of the step that led there.

    `shown` says that a step was given the point at which the solve ended. Only after that it is
    over for Optimistix, whose `BestSoFarMinimiser` sees what steps are given.
    """

    solve: _loop.State
    length: Array
    shown: Bool[Array, ""]

    @property
    def f_info(self) -> Any:
        """What Optimistix calls `f_info`, with the objective `f` alone."""
        return optx.FunctionInfo.Eval(self.solve.point.f)

    @property
    def num_accepted_steps(self) -> Array:
        """The number of steps that were taken."""
        return self.solve.ledger.num_steps


@no_type_check
class LBFGS(optx.AbstractMinimiser):
    """L-BFGS with a strong-Wolfe line search, for `optimistix.minimise`.

    It takes the steps of `difflbfgs.LBFGS(rtol, atol, memory_size, linesearch, polish=0)` and stops
    at `‖∇f(y)‖₂ <= atol + rtol · reference`. How to differentiate is left to `optimistix.minimise`.

    Args:
        rtol: relative tolerance on the gradient norm. `None`: square root of machine epsilon.
        atol: absolute tolerance on the gradient norm.
        memory_size: number of curvature pairs kept, Optimistix's `history_length`.
        linesearch: an Optax line search transformation. `None`: Optax's zoom search.
        verbose: `True` prints a line at every step. A function is called while the step is
            traced, as `verbose(num_steps=("Step", array), loss=..., grad_norm=..., step_size=...)`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a tolerance is negative, or `memory_size` less than 1.

    Note:
        `sol.stats` holds `num_fun_evals`, `grad_norm`, `reference_grad_norm` and, as `result`, the
        member of `difflbfgs.RESULTS` that says how the solve ended. Optimistix knows fewer ways:
        `precision_limit` is its `successful`, `nonfinite_start` its `nonfinite`, and `unbounded`
        and `line_search_failed` are its `nonlinear_divergence`.

        With Optimistix's `ImplicitAdjoint`, pass
        `tags=frozenset({lineax.positive_semidefinite_tag})` to have the dense Hessian factorised by
        Cholesky, or `linear_solver=lineax.CG(rtol, atol)` to have none. Its derivative of a solve
        that failed under `throw=False` is not NaN. `RecursiveCheckpointAdjoint` raises: Optax's
        line searches are loops of unknown length.

        A step costs what one of `difflbfgs.LBFGS` does, mostly one evaluation; with `has_aux` also
        an evaluation of `fn`. One more step, without an evaluation, shows Optimistix the last
        point. Under `vmap` all lanes wait for the longest line search of every step.

    Examples:
        >>> import jax.numpy as jnp, optimistix as optx
        >>> from difflbfgs.compat.optimistix import LBFGS
        >>> def fn(y, a):
        ...     return (1 - y[0]) ** 2 + a * (y[1] - y[0] ** 2) ** 2
        >>> sol = optx.minimise(fn, LBFGS(rtol=1e-4, atol=1e-4), jnp.array([-1.2, 1.0]), 100.0)
        >>> print(sol.value.round(2))
        [1. 1.]
    """

    rtol: Any  # Optimistix's is a float
    atol: Any
    norm: Callable[[PyTree], Array] = eqx.field(static=True)  # of the gradient test
    memory_size: int = eqx.field(static=True)
    linesearch: optax.GradientTransformation | None
    verbose: bool | Callable[..., None] = eqx.field(static=True)

    def __init__(
        self,
        rtol: ArrayLike | None,
        atol: ArrayLike,
        memory_size: int = 10,
        linesearch: optax.GradientTransformation | None = None,
        verbose: bool | Callable[..., None] = False,
    ):
        _lbfgs.LBFGS(rtol, atol, memory_size, linesearch)  # checks what it is given
        if not isinstance(verbose, bool) and not callable(verbose):
            raise TypeError(
                f"verbose must be True, False or a function of keyword arguments, got "
                f"{verbose!r}. Pass verbose=True to print every step."
            )
        self.rtol, self.atol, self.norm = rtol, atol, optx.two_norm
        self.memory_size, self.linesearch, self.verbose = memory_size, linesearch, verbose

    def init(self, fn, y, args, options, f_struct, aux_struct, tags) -> _State:
        """Evaluate the objective at the start."""
        del f_struct, aux_struct, tags
        mode = options.get("autodiff_mode", "bwd")
        if mode != "bwd":
            raise ValueError(
                f"options['autodiff_mode'] must be 'bwd', got {mode!r}: Optax's line searches "
                "differentiate in reverse mode. Drop the option."
            )
        problem, _, x = _interior(fn, y, args)
        with jax.numpy_dtype_promotion("standard"):
            settings = self._settings(x)
            solve, _ = _loop.trip(problem, _loop.begin(settings, x), settings)
        nothing = jnp.zeros_like(solve.line.t)
        return _undifferentiable(_State(solve, nothing, jnp.asarray(False)))

    def step(self, fn, y, args, options, state, tags) -> tuple[PyTree, _State, PyTree]:
        """Take a step from `y`; return the new one, and the auxiliary output at the old one.

        If `y` is not what the last step returned, the solve begins anew there.
        """
        del options, tags
        problem, variables, x = _interior(fn, y, args)
        with jax.numpy_dtype_promotion("standard"):
            moved = ~_equal(y, variables.outside(state.solve.point.x))
            settings = self._settings(x)
            afresh = _counted(_loop.begin(settings, x), state.solve)
            before = _vector.where(moved, afresh, state.solve)
            shown = before.ledger.over()
            after, length = _step(problem, before, settings)
        verbose = _print if self.verbose is True else self.verbose
        if verbose:
            verbose(
                num_steps=("Step", before.ledger.num_steps),
                loss=("Loss", before.point.f),
                grad_norm=("Gradient norm", before.point.grad_norm),
                step_size=("Step size", state.length),
            )
        state = _undifferentiable(_State(after, length, shown))
        return variables.outside(after.point.x), state, fn(y, args)[1]

    def terminate(self, fn, y, args, options, state, tags) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Return whether the solve is over, and how, in Optimistix's terms."""
        del fn, y, args, options, tags
        ledger = state.solve.ledger
        failed = ledger.over() & ~has_converged(ledger.result)
        result = optx.RESULTS.where(
            failed, optx.RESULTS.nonlinear_divergence, optx.RESULTS.successful
        )
        nonfinite = ledger.over() & (ledger.result == RESULTS.nonfinite_start)
        return state.shown, optx.RESULTS.where(nonfinite, optx.RESULTS.nonfinite, result)

    def postprocess(
        self, fn, y, aux, args, options, state, tags, result
    ) -> tuple[PyTree, PyTree, dict[str, Any]]:
        """Return `y`, the auxiliary output there, and what the solve cost."""
        del options, tags, result
        solve = state.solve
        if jax.tree.leaves(aux):
            aux = fn(y, args)[1]
        stats = {
            "result": solve.ledger.result,
            "num_fun_evals": solve.ledger.num_fun_evals,
            "grad_norm": solve.point.grad_norm,
            "reference_grad_norm": solve.ledger.scale.reference(),
        }
        return y, aux, stats

    def _settings(self, like: Vector) -> _loop.Settings:
        solver = _lbfgs.LBFGS(self.rtol, self.atol, self.memory_size, self.linesearch, polish=0)
        return _loop.make_settings(solver, like, max_steps=None)


def _step(
    problem: Problem, now: _loop.State, settings: _loop.Settings
) -> tuple[_loop.State, Array]:
    """Go on until a step is taken or the solve is over; return its length, too."""

    def searching(carry):
        solve, _, stepped = carry
        return ~(stepped | solve.ledger.over())

    def trip(carry):
        solve, decision = _loop.trip(problem, carry[0], settings)
        return solve, jnp.where(decision.taken, decision.length, 0), decision.step

    start = now, jnp.zeros_like(now.slope), jnp.asarray(False)
    solve, length, _ = jax.lax.while_loop(searching, trip, start)
    return solve, length


def _interior(fn, y, args) -> tuple[Problem, Variables, Vector]:
    """Return the objective as one of a vector, its variables, and `y` as that vector."""
    variables = make_variables(y, flatten=True)
    x = variables.to_vector(y)

    def objective(promoted, _):  # Optimistix's functions take no other dtypes than those of y
        return fn(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), promoted, y), args)[0]

    return make_problem(objective, None, variables, x), variables, x


def _equal(a: PyTree, b: PyTree) -> Bool[Array, ""]:
    """Return whether two trees of arrays are the same, NaN being NaN."""
    same = jax.tree.map(lambda a, b: jnp.array_equal(a, b, equal_nan=True), a, b)
    return jnp.stack(jax.tree.leaves(same)).all()


def _counted(solve: _loop.State, before: _loop.State) -> _loop.State:
    """Return the state, with the counts of an earlier one."""

    def counts(solve):
        return solve.ledger.num_steps, solve.ledger.num_fun_evals

    return eqx.tree_at(counts, solve, counts(before))


@eqx.filter_custom_jvp
def _undifferentiable(state):
    return state


@_undifferentiable.def_jvp
def _undifferentiable_jvp(primals, tangents):
    del primals, tangents
    raise TypeError(
        "the steps of difflbfgs.compat.optimistix.LBFGS cannot be differentiated: Optax's line "
        "searches are loops of unknown length. Pass adjoint=optimistix.ImplicitAdjoint(), or for "
        "an unrolled solver use difflbfgs.minimize with solver=difflbfgs.Unrolled(...)."
    )


def _print(**shown) -> None:
    text = ", ".join(f"{name}: {{{key}}}" for key, (name, _) in shown.items())
    jax.debug.print(text, **{key: value for key, (_, value) in shown.items()})
