"""Watching a long solve from outside the compiled program."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int


class Step(eqx.Module):
    """What a `callback` receives after every step.

    Attributes:
        num_steps: steps so far.
        num_fun_evals: evaluations of the objective with its gradient so far.
        objective: objective at the present point.
        grad_norm: 2-norm of the gradient there.
        step_size: multiple of the proposed step that the line search chose; 0 if none was taken.
    """

    num_steps: Int[Array, ""]
    num_fun_evals: Int[Array, ""]
    objective: Float[Array, ""]
    grad_norm: Float[Array, ""]
    step_size: Float[Array, ""]


def watch(callback: Callable | None, step: Step) -> None:
    """Call `callback` with `step` when the compiled program gets here."""
    if callback is not None:
        jax.debug.callback(callback, step)


def progress_bar() -> Callable[[Step], None]:
    """Make a callback that draws a `tqdm` bar, one bar for each call.

    Returns:
        A function for the `callback` argument of `difflbfgs.minimize`.

    Raises:
        ImportError: if `tqdm` is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress_bar() draws with tqdm, which is not installed: pip install tqdm."
        ) from error
    bar = tqdm(unit=" steps", mininterval=0.2)

    def draw(step: Step) -> None:
        bar.set_postfix(
            objective=f"{float(step.objective):.6g}",
            grad_norm=f"{float(step.grad_norm):.2e}",
            refresh=False,
        )
        bar.update(max(int(step.num_steps) - bar.n, 0))

    return draw
