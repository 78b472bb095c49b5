"""What `jax.vmap` does to a solve: the lanes one after the other, or all at once.

A batched `while_loop` runs until its last lane is done and copies every lane's carry, memory and
all, at every trip; a batched `cond` takes both its branches. An accelerator has room for that, and
starts one kernel for all lanes. A CPU has not: there the lanes are faster in turn, each for just as
long as it needs. Which of the two is decided when the program is lowered for a platform.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax

_T = TypeVar("_T")


def lane_by_lane(fun: Callable[..., _T]) -> Callable[..., _T]:
    """Return `fun` of any PyTrees, whose lanes under `jax.vmap` run in turn on a CPU.

    It returns arrays. The result cannot be differentiated: to be used inside a custom rule.
    """

    def wrapped(*args):
        arrays, rest = eqx.partition(args, eqx.is_array)

        @jax.custom_batching.custom_vmap
        def call(arrays):
            return fun(*eqx.combine(arrays, rest))

        @call.def_vmap
        def in_lanes(axis_size, is_batched, arrays):
            del axis_size
            batched, shared = eqx.partition(arrays, is_batched[0])

            def in_turn(batched, shared):
                # A further `vmap` around meets `call` again.
                return jax.lax.map(lambda lane: call(eqx.combine(lane, shared)), batched)

            def at_once(batched, shared):
                return jax.vmap(lambda lane: fun(*eqx.combine(lane, shared, rest)))(batched)

            found: Any = jax.lax.platform_dependent(batched, shared, cpu=in_turn, default=at_once)
            return found, jax.tree.map(lambda _: True, found)

        return call(arrays)

    return wrapped
