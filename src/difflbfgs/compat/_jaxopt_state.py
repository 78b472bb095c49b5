"""JAXopt's state of L-BFGS, and what the solvers of this library make of it.

JAXopt puts the pair of step `k` into row `(k - 1) mod m` as soon as it exists. Optax forms it one
step later, in row `(count - 1) mod m`, of a point and a gradient that it remembers; and its first
row holds the pair with which a solve starts. So the rows are the same but for a rotation.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from difflbfgs import _memory, _vector
from difflbfgs._lbfgs import WarmStart
from difflbfgs._memory import Pair
from difflbfgs._problem import Variables
from difflbfgs._solution import RESULTS, Stats
from difflbfgs._vector import Count, Flag, Scalar


class OptStep(NamedTuple):
    """Parameters and state, as `run` and `update` return them."""

    params: Any
    state: Any


class LbfgsState(NamedTuple):
    """What JAXopt's state of L-BFGS holds, and how the solve ended.

    Attributes:
        iter_num: steps so far, those of a state that was continued included.
        value: objective at the parameters, in the dtype that the objective returns.
        grad: gradient there, as `jax.grad` returns it.
        stepsize: step size of the last `update`; after a `run` by line search, where the next
            search begins.
        error: 2-norm of the gradient.
        s_history: steps, newest in row `(iter_num - 1) % history_size`.
        y_history: changes of the gradient along them (of its conjugate, if complex).
        rho_history: `1 / sᵀy`; 0 for a row that is not in use.
        gamma: `sᵀy / yᵀy` of the newest pair, the scale of the inverse Hessian to begin with.
        aux: auxiliary output of the objective.
        failed_linesearch: whether the last line search found no acceptable step.
        num_fun_eval: evaluations of the objective.
        num_grad_eval: evaluations of its gradient.
        num_linesearch_iter: steps of the line search.
        result: a member of `difflbfgs.RESULTS`; not in JAXopt.
    """

    iter_num: Any
    value: Any
    grad: Any
    stepsize: Any
    error: Any
    s_history: Any
    y_history: Any
    rho_history: Any
    gamma: Any
    aux: Any = None
    failed_linesearch: Any = False
    num_fun_eval: Any = 0
    num_grad_eval: Any = 0
    num_linesearch_iter: Any = 0
    result: Any = None


class Iterate(eqx.Module):
    """What `LbfgsState` says, in vectors; `aux` is the pair of the user's value and auxiliary."""

    x: Float[Array, " n"]
    f: Scalar
    g: Float[Array, " n"]
    aux: tuple[Any, PyTree]
    S: Float[Array, "m n"]
    Y: Float[Array, "m n"]
    rho: Float[Array, " m"]
    gamma: Scalar
    stepsize: Scalar
    iter_num: Any
    failed: Flag
    num_fun_eval: Count
    num_grad_eval: Count
    num_linesearch_iter: Count
    result: Any


def to_state(variables: Variables, now: Iterate) -> LbfgsState:
    """Return the state that the user sees."""
    dtype = jnp.finfo(jnp.result_type(*jax.tree.leaves(variables.template))).dtype
    rows = eqx.filter_vmap(variables.outside)
    value, aux = now.aux
    return LbfgsState(
        iter_num=now.iter_num,
        value=value,
        grad=_conjugate(variables.outside(now.g)),
        stepsize=now.stepsize.astype(dtype),
        error=_vector.norm(jax.lax.stop_gradient(now.g)).astype(dtype),
        s_history=rows(now.S),
        y_history=rows(now.Y),
        rho_history=now.rho.astype(dtype),
        gamma=now.gamma.astype(dtype),
        aux=aux,
        failed_linesearch=now.failed,
        num_fun_eval=now.num_fun_eval,
        num_grad_eval=now.num_grad_eval,
        num_linesearch_iter=now.num_linesearch_iter,
        result=now.result,
    )


def from_state(variables: Variables, params: PyTree, state: LbfgsState) -> Iterate:
    """Return what `to_state` was given."""
    dtype = variables.dtype
    rows = eqx.filter_vmap(variables.to_vector)
    return Iterate(
        x=variables.to_vector(params),
        f=jnp.asarray(state.value, dtype),
        g=variables.to_vector(_conjugate(state.grad)),
        aux=(state.value, state.aux),
        S=rows(state.s_history),
        Y=rows(state.y_history),
        rho=jnp.asarray(state.rho_history, dtype),
        gamma=jnp.asarray(state.gamma, dtype),
        stepsize=jnp.asarray(state.stepsize, dtype),
        iter_num=jnp.asarray(state.iter_num),
        failed=jnp.asarray(state.failed_linesearch),
        num_fun_eval=jnp.asarray(state.num_fun_eval),
        num_grad_eval=jnp.asarray(state.num_grad_eval),
        num_linesearch_iter=jnp.asarray(state.num_linesearch_iter),
        result=RESULTS.max_steps_reached if state.result is None else state.result,
    )


def warm_start(now: Iterate) -> WarmStart:
    """Return what `minimize` takes to go on from here."""
    size = len(now.rho)
    row = (now.iter_num - 1) % size
    pair = Pair(now.S[row], now.Y[row])
    trusted = now.rho[row] > 0
    pair = _vector.where(trusted, pair, _vector.zeros_like(pair))
    memory = optax.ScaleByLBFGSState(
        count=jnp.asarray(now.iter_num % size + size, jnp.int32),
        params=now.x,
        updates=now.g,
        diff_params_memory=now.S,
        diff_updates_memory=now.Y,
        weights_memory=now.rho,
    )
    curvature = pair.curvature()
    reference = curvature * jnp.minimum(1, _vector.norm(now.x))
    moved = _memory.moved(memory, now.x, now.g, pair)
    return WarmStart(now.x, now.g, moved, reference, curvature)


def from_solve(
    warm: WarmStart, f: Scalar, aux: Any, result: Any, stats: Stats, before: Any, stepsize: Any
) -> Iterate:
    """Return where a solve of `minimize` ended that began after `before` steps."""
    x, g, memory = warm.x, warm.g, warm.memory
    pair = _memory.newest(memory, x, g)
    rho, gamma = pair.weights()
    count, size = jnp.asarray(memory.count), jnp.size(memory.weights_memory)
    iter_num = jnp.asarray(before + stats.num_steps, jnp.asarray(0).dtype)

    def rotated(rows, newest):
        return jnp.roll(rows.at[(count - 1) % size].set(newest), iter_num - count, axis=0)

    return Iterate(
        x=x,
        f=f,
        g=g,
        aux=aux,
        S=rotated(memory.diff_params_memory, pair.s),
        Y=rotated(memory.diff_updates_memory, pair.y),
        rho=rotated(jnp.asarray(memory.weights_memory, rho.dtype), rho),
        gamma=gamma,
        stepsize=jnp.asarray(stepsize, f.dtype),
        iter_num=iter_num,
        failed=result == RESULTS.line_search_failed,
        num_fun_eval=stats.num_fun_evals,
        num_grad_eval=stats.num_fun_evals,
        # The others are those at the start and, with a polish, at the end.
        num_linesearch_iter=jnp.maximum(stats.num_fun_evals - 2, 0),
        result=result,
    )


def _conjugate(tree):
    """Return the tree with its complex leaves conjugated; all others may be anything."""

    def conjugate(leaf):
        return jnp.conj(leaf) if eqx.is_array(leaf) and jnp.iscomplexobj(leaf) else leaf

    return jax.tree.map(conjugate, tree)
