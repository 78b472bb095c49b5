"""What `jax.vmap` does to a solve: the lanes one after the other, or all at once.

A batched `while_loop` runs until its last lane is done, and a batched `cond` takes both its
branches. An accelerator has room for that, and starts one kernel for all lanes. A CPU has not:
there the lanes are faster in turn, each for just as long as it needs. Which of the two is decided
when the program is lowered for a platform.

All at once, JAX would also copy every lane's carry, memory and all, at every trip, to leave those
that are done alone. A loop that asks `anywhere` whether to go on is not made to do so: `waits`
tells it which these are, and `held` leaves them where they are.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from difflbfgs import _vector
from difflbfgs._vector import Flag

_T = TypeVar("_T")

# So many right-hand sides of one system run together on a CPU; more would want more memory, and
# wait longer for the last of them.
_BLOCK = 32


def lane_by_lane(
    fun: Callable[..., _T], together: Callable[..., _T] | None = None
) -> Callable[..., _T]:
    """Return `fun` of any PyTrees, whose lanes under `jax.vmap` run in turn on a CPU.

    It returns arrays. The result cannot be differentiated: to be used inside a custom rule. Lanes
    that differ in the last argument only, right-hand sides of one system, are left to `together`:
    it takes them all, along a first axis.
    """
    # Every transformation asks for the program again, and several of them many times over.
    traced = eqx.filter_jit(fun)

    def wrapped(*args):
        arrays, rest = eqx.partition(args, eqx.is_array)

        @jax.custom_batching.custom_vmap
        def call(arrays):
            return traced(*eqx.combine(arrays, rest))

        @call.def_vmap
        def in_lanes(axis_size, is_batched, arrays):
            batched, shared = eqx.partition(arrays, is_batched[0])

            def in_turn(batched, shared):
                # A further `vmap` around meets `call` again.
                return jax.lax.map(lambda lane: call(eqx.combine(lane, shared)), batched)

            def at_once(batched, shared):
                return jax.vmap(lambda lane: traced(*eqx.combine(lane, shared, rest)))(batched)

            def at_length(leaf, is_batched):
                return leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))

            if together is None or any(jax.tree.leaves(is_batched[0][:-1])):
                found: Any = by_platform(batched, shared, cpu=in_turn, default=at_once)
            else:
                last = jax.tree.map(at_length, arrays[-1], is_batched[0][-1])
                many = lane_by_lane(together, _flattened(together))
                found = many(*eqx.combine((*arrays[:-1], last), rest))
            return found, jax.tree.map(lambda _: True, found)

        return call(arrays)

    return wrapped


def _flattened(together: Callable[..., _T]) -> Callable[..., _T]:
    """Return `together` for right-hand sides along two axes, as of a `vmap` in a `vmap`."""

    def call(*args):
        *shared, batch = args
        one, other = jax.tree.leaves(batch)[0].shape[:2]
        flat = jax.tree.map(lambda leaf: leaf.reshape(one * other, *leaf.shape[2:]), batch)
        found = together(*shared, flat)
        return jax.tree.map(lambda leaf: leaf.reshape(one, other, *leaf.shape[1:]), found)

    return call


def prepared(prepare: Callable[..., Callable[[Any], _T]]) -> Callable[..., _T]:
    """Return `(..., v) -> prepare(..., 1)(v)`, whose lanes run in turn on a CPU.

    Lanes that differ in the right-hand side `v` only are prepared once for their number, and solved
    as many at once as is good. To be made once: compiled programs are looked up by what it returns.
    """

    def alone(*args):
        *shared, v = args
        return prepare(*shared, 1)(v)

    def together(*args):
        *shared, vs = args
        solve = prepare(*shared, len(jax.tree.leaves(vs)[0]))
        blocks = functools.partial(jax.lax.map, solve, batch_size=_BLOCK)
        return by_platform(vs, cpu=blocks, default=jax.vmap(solve))

    return lane_by_lane(alone, together)


def by_platform(*args, cpu: Callable[..., _T], default: Callable[..., _T]) -> _T:
    """Call `cpu` on a CPU, and `default` elsewhere; what no device here can run is not traced."""
    if all(device.platform == "cpu" for device in jax.devices()):
        return cpu(*args)
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


@jax.custom_batching.custom_vmap
def anywhere(flag: Flag) -> Flag:
    """Return `flag`, and if lanes run at once, whether it is set in any of them."""
    return flag


@anywhere.def_vmap
def _anywhere(axis_size, is_batched, flag):
    del axis_size, is_batched
    return anywhere(jnp.any(flag)), False


@jax.custom_batching.custom_vmap
def waits(done: Flag) -> Flag:
    """Return whether a lane that is done goes along with others: never, if it runs alone."""
    return jnp.zeros_like(done)


@waits.def_vmap
def _waits(axis_size, is_batched, done):
    del axis_size
    return (done, True) if is_batched[0] else (waits(done), False)


def held(waiting: Flag, now: _T, after: _T, settled: Callable[[_T], Any]) -> _T:
    """Return `now` if a lane is waiting for others, and `after` if it goes on.

    What is `settled` is taken from `after` in any case, and not copied: a step changes nothing in
    it, of a lane that waits, that the next one would not.
    """
    return _vector.where(waiting, eqx.tree_at(settled, now, settled(after)), after)


def only(flag: Flag, new: _T, old: _T) -> _T:
    """Return `new`, for use if `flag` is set in some lane: alone that is this one.

    In a branch that a lane takes because another one does, it keeps what is `old`.
    """
    return _vector.where(~waits(~flag), new, old)


def active(unfinished: Callable[[_T], Flag], advance: Callable[[_T], _T]) -> Callable[[_T], _T]:
    """Return `advance` for a loop that runs while `anywhere` a lane is unfinished."""
    return lambda carry: _vector.where(waits(~unfinished(carry)), carry, advance(carry))
