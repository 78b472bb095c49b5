"""What the JAXopt adapter translates: its forms of an objective, its state, its adjoint solver.

An objective `fun(x, *args, **kwargs)`, perhaps with an auxiliary output, perhaps with its gradient,
becomes `objective(x, (args, kwargs)) -> (f, (f, aux))`; the second `f` keeps the dtype in which the
user computes it.

JAXopt puts the pair of step `k` into row `(k - 1) mod m` as soon as it exists. Optax forms it one
step later, in row `(count - 1) mod m`, of a point and a gradient that it remembers; and its first
row holds the pair with which a solve starts. So the rows are the same but for a rotation.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import PyTree

from difflbfgs import _loop, _memory, _vector
from difflbfgs._adjoint import ImplicitAdjoint
from difflbfgs._checks import check_callable
from difflbfgs._krylov import SymmetricSolver
from difflbfgs._memory import Pair
from difflbfgs._problem import Variables
from difflbfgs._solution import RESULTS, Outcome
from difflbfgs._system import AbstractAdjoint
from difflbfgs._vector import Vector

# JAXopt's solvers stop at 1e-5 if not told otherwise; what is above this was not solved.
_ACCEPTED = 1e-3

Objective = Callable[[PyTree, tuple], tuple[Any, tuple[Any, PyTree]]]


def make_objective(fun: Callable, value_and_grad: bool | Callable, has_aux: bool) -> Objective:
    """Return `objective(x, (args, kwargs)) -> (f, (f, aux))`.

    Raises (when called):
        TypeError: if `fun` or `value_and_grad` does not return what `has_aux` says it does.
    """
    if value_and_grad is False:

        def objective(x, theta):
            f, aux = _split("fun", fun(x, *theta[0], **theta[1]), has_aux)
            return f, (f, aux)

        return objective
    given = fun if value_and_grad is True else value_and_grad
    return _with_given_gradient(given, has_aux)


def _with_given_gradient(given: Any, has_aux: bool) -> Objective:
    """Return the objective whose derivative by `x` is the gradient that the user computes.

    All other derivatives, and those of the gradient, are taken by JAX where they are asked for.
    """

    def both(x, theta):
        out = given(x, *theta[0], **theta[1])
        if not (isinstance(out, tuple | list) and len(out) == 2):
            form = "((objective, aux), gradient)" if has_aux else "(objective, gradient)"
            raise TypeError(
                f"value_and_grad needs a function that returns {form}, and it returned {out!r}. "
                "Return that, or drop value_and_grad and let JAX take the gradient."
            )
        return _split("value_and_grad", out[0], has_aux), out[1]

    @eqx.filter_custom_jvp
    def value(both, x, theta):
        return both(x, theta)[0][0]

    @value.def_jvp
    def value_jvp(primals, tangents):
        both, x, theta = primals
        by_closure, by_x, by_theta = tangents
        (f, _), g = both(x, theta)
        slope = jnp.zeros_like(f)
        # JAX's gradient of a real function of complex z: df = Re Σ g dz, without a conjugate.
        for tangent, gradient in zip(
            jax.tree.leaves(by_x, is_leaf=_is_none),
            jax.tree.leaves(_like(g, by_x), is_leaf=_is_none),
            strict=True,
        ):
            if tangent is not None:
                slope += jnp.sum(jnp.real(gradient * tangent)).astype(slope.dtype)
        if jax.tree.leaves((by_closure, by_theta)):
            _, partial = eqx.filter_jvp(
                lambda both, theta: both(x, theta)[0][0], (both, theta), (by_closure, by_theta)
            )
            slope += partial
        return f, slope

    def objective(x, theta):
        # A custom rule must be handed what it depends on.
        f = value(eqx.filter_closure_convert(both, x, theta), x, theta)
        return f, (f, both(x, theta)[0][1] if has_aux else None)

    return objective


def _split(name, out, has_aux):
    is_pair = isinstance(out, tuple | list) and len(out) == 2
    if has_aux and not is_pair:
        raise TypeError(
            f"has_aux=True needs {name} to return a pair (objective, aux), and it returned "
            f"{out!r}. Return such a pair, or drop has_aux=True."
        )
    if not has_aux and isinstance(out, tuple | list):
        raise TypeError(
            f"{name} must return a real scalar and returned a {type(out).__name__} of {len(out)} "
            "elements. If the second is an auxiliary output, pass has_aux=True; if it is the "
            "gradient, value_and_grad=True."
        )
    return out if has_aux else (out, None)


def _like(gradient, x):
    """Return the gradient in the structure of `x`, in which static leaves are `None`."""
    leaves = jax.tree.leaves(gradient)
    structure = jax.tree.structure(x, is_leaf=_is_none)
    if structure.num_leaves != len(leaves):
        raise TypeError(
            f"value_and_grad must return a gradient like the parameters, {structure}, and returned "
            f"{jax.tree.structure(gradient)}."
        )
    return structure.unflatten(leaves)


def _is_none(leaf):
    return leaf is None


class UserSolver(SymmetricSolver):
    """A function `solve(matvec, b)`, taken for a Lineax solver."""

    solve: Callable

    def init(self, operator, options):
        """Return the operator."""
        del options
        return operator

    def compute(self, state, vector, options):
        """Call the function."""
        del options
        return self.solve(state.mv, vector), lx.RESULTS.successful, {}


def make_adjoint(solve: Any) -> AbstractAdjoint:
    """Return the adjoint for an `implicit_diff_solve`.

    Raises:
        TypeError: if it is none of the things that it may be.
    """
    if solve is None:
        return ImplicitAdjoint()
    if isinstance(solve, AbstractAdjoint):
        return solve
    if isinstance(solve, lx.AbstractLinearSolver):
        return ImplicitAdjoint(linear_solver=solve)
    check_callable(
        "implicit_diff_solve",
        solve,
        "Pass a function solve(matvec, b), a lineax solver, a difflbfgs adjoint such as "
        "ImplicitAdjoint(ridge=1e-6), or None for the default.",
    )
    return ImplicitAdjoint(linear_solver=UserSolver(solve), rtol=_ACCEPTED)


class OptStep(NamedTuple):
    """Parameters and state, as `run` and `update` return them."""

    params: PyTree
    state: PyTree


class LbfgsState(NamedTuple):
    """What JAXopt's state of L-BFGS holds, and how the solve ended.

    Attributes:
        iter_num: steps so far, those of a state that was continued included.
        value: objective at the parameters, in the dtype that the objective returns.
        grad: gradient there, as `jax.grad` returns it.
        stepsize: step size of the last `update`, 0 if its line search failed; 1 if there was none,
            and after `init_state` and `run`.
        error: 2-norm of the gradient.
        s_history: steps, newest in row `(iter_num - 1) % history_size`.
        y_history: changes of the gradient along them (of its conjugate, if complex).
        rho_history: `1 / sᵀy`; 0 for a row that is not in use.
        gamma: `sᵀy / yᵀy` of the newest pair, the scale of the inverse Hessian to begin with.
        aux: auxiliary output of the objective.
        failed_linesearch: whether the last line search found no acceptable step.
        num_fun_eval: evaluations of the objective.
        num_grad_eval: evaluations of its gradient, as many.
        num_linesearch_iter: evaluations but for those at the start of a `run` or an `update`.
        result: a member of `difflbfgs.RESULTS`; not in JAXopt.
    """

    iter_num: ArrayLike
    value: ArrayLike
    grad: PyTree
    stepsize: ArrayLike
    error: ArrayLike
    s_history: PyTree
    y_history: PyTree
    rho_history: ArrayLike
    gamma: ArrayLike
    aux: PyTree = None
    failed_linesearch: ArrayLike = False
    num_fun_eval: ArrayLike = 0
    num_grad_eval: ArrayLike = 0
    num_linesearch_iter: ArrayLike = 0
    result: RESULTS | None = None


def to_state(
    variables: Variables, outcome: Outcome, value: Any, aux: PyTree, iter_num: Any, stepsize: Any
) -> LbfgsState:
    """Return what JAXopt says of a solve that ended here, after so many steps in all."""
    x, g, memory = outcome.state.x, outcome.state.g, outcome.state.memory
    dtype = jnp.finfo(jnp.result_type(*jax.tree.leaves(variables.template))).dtype
    rows = eqx.filter_vmap(variables.outside)
    count, size = jnp.asarray(memory.count), jnp.size(memory.weights_memory)
    iter_num = jnp.asarray(iter_num, jnp.asarray(0).dtype)
    pair = _memory.newest(memory, x, g)
    pair = _vector.where(count > 0, pair, _vector.zeros_like(pair))
    rho, gamma = pair.weights()

    def rotated(history, newest):
        return jnp.roll(history.at[(count - 1) % size].set(newest), iter_num - count, axis=0)

    evaluations = outcome.stats.num_fun_evals
    return LbfgsState(
        iter_num=iter_num,
        value=value,
        grad=_conjugate(variables.outside(g)),
        stepsize=jnp.asarray(stepsize, dtype),
        error=outcome.stats.grad_norm.astype(dtype),
        s_history=rows(rotated(memory.diff_params_memory, pair.s)),
        y_history=rows(rotated(memory.diff_updates_memory, pair.y)),
        rho_history=rotated(memory.weights_memory, rho).astype(dtype),
        gamma=gamma.astype(dtype),
        aux=aux,
        failed_linesearch=outcome.result == RESULTS.line_search_failed,
        num_fun_eval=evaluations,
        num_grad_eval=evaluations,
        num_linesearch_iter=evaluations - 1,
        result=outcome.result,
    )


def warm_start(variables: Variables, x: Vector, state: LbfgsState) -> _loop.State:
    """Return what a solve takes to go on from `x` with the memory in `state`."""
    rows = eqx.filter_vmap(variables.to_vector)
    S, Y = rows(state.s_history), rows(state.y_history)
    g = variables.to_vector(_conjugate(state.grad))
    rho, iter_num = jnp.asarray(state.rho_history, variables.dtype), jnp.asarray(state.iter_num)
    row = (iter_num - 1) % len(rho)
    pair = Pair(S[row], Y[row])
    pair = _vector.where(rho[row] > 0, pair, _vector.zeros_like(pair))
    memory = optax.ScaleByLBFGSState(
        count=jnp.asarray(iter_num % len(rho) + len(rho), jnp.int32),
        params=x,
        updates=g,
        diff_params_memory=S,
        diff_updates_memory=Y,
        weights_memory=rho,
    )
    curvature = pair.curvature()
    reference = curvature * jnp.minimum(1, _vector.norm(x))
    return _loop.arrived(x, g, _memory.moved(memory, x, g, pair), reference, curvature)


def _conjugate(tree):
    """Return the tree with its complex leaves conjugated; all others may be anything."""

    def conjugate(leaf):
        return jnp.conj(leaf) if eqx.is_array(leaf) and jnp.iscomplexobj(leaf) else leaf

    return jax.tree.map(conjugate, tree)


def plain(value: Any) -> Any:
    """Return an integer of NumPy's or JAX's as one of Python's, and anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def check_stepsize(value: Any) -> None:
    """Raise unless `value` asks for a line search."""
    remedy = (
        "Drop it, or pass 0.0: the step size is found by a line search. For steps of a given size "
        "use difflbfgs.minimize with solver=difflbfgs.Unrolled(optax.sgd(0.1), num_steps=100)."
    )
    known = not isinstance(value, bool) and eqx.is_array_like(value) and not jnp.iscomplexobj(value)
    if not known and not callable(value):
        raise TypeError(f"stepsize must be a real number, got {value!r}. {remedy}")
    if callable(value) or isinstance(value, Tracer) or np.shape(value) or not value <= 0:
        raise ValueError(f"stepsize must be a scalar of at most 0, got {value!r}. {remedy}")
