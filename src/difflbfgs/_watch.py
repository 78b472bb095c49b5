"""Watching a long solve from outside the compiled program."""

import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

from difflbfgs._program import Program
from difflbfgs._vector import Flag, Vector

# Seconds from one line that stays to the next, in a terminal and in a log.
_SHORT, _LONG = 1.0, 10.0


class Step(eqx.Module):
    """What a `callback`, or `stop`, receives after every step.

    Attributes:
        num_steps: steps so far.
        num_fun_evals: evaluations of the objective with its gradient so far.
        objective: objective at the present point.
        grad_norm: 2-norm of the gradient there.
        step_size: multiple of the direction that was taken; 0 if none was.
        last: whether the solve is over, once; the record may be the last one again. The adjoint
            follows and is not watched.
        value: the variables, in the structure of `x0`; for `stop` only.
    """

    num_steps: Int[Array, ""]
    num_fun_evals: Int[Array, ""]
    objective: Float[Array, ""]
    grad_norm: Float[Array, ""]
    step_size: Float[Array, ""]
    last: Bool[Array, ""] | bool = False
    value: PyTree = None

    def __repr__(self) -> str:
        """Show the numbers, not only their types."""
        return eqx.tree_pformat(self, short_arrays=False)


def watch(callback: Callable | None, step: Step, taken: Bool[Array, ""] | bool = True) -> None:
    """Call `callback` with `step` when the compiled program gets here and the step is `taken`.

    Lanes that are batched go through the loop until the last of them has ended. What those that
    have ended before compute there is thrown away, and no step.
    """
    if callback is None:
        return

    def call(step, taken):
        if taken:
            callback(step)

    jax.debug.callback(call, step, taken)


class Stop(eqx.Module):
    """The user's `stop`, as a function of a record and a vector."""

    program: Program = eqx.field(static=True)
    consts: PyTree

    def __call__(self, step: Step, x: Vector) -> Flag:
        """Return whether the solve is to end here."""
        return self.program(self.consts, *jax.tree.leaves((step, x)))


def progress_bar() -> Callable[[Step], None]:
    """Make a callback that draws a `tqdm` bar for each solve, from its first step to its last.

    Make it once and use it again: outside `jax.jit` a new callback compiles the solve anew.

    Returns:
        A function for the `callback` argument of `difflbfgs.minimize`.

    Raises:
        ImportError: if `tqdm` is not installed.

    Note:
        In a terminal the bar moves, and its line stays when the solve ends, unless another line did
        within the last second. In a notebook with `ipywidgets` it is one widget for all solves.
        Elsewhere, as in a log file, there is a line on standard error every ten seconds and one
        when a solve ends, unless another ended less than ten seconds before.

        Under `jax.vmap` on a CPU tasks are solved, and drawn, one after the other. On an
        accelerator, and on several devices, the bar shows now one of them and now another.
    """
    try:
        import tqdm.auto
        import tqdm.notebook
    except ImportError as error:
        raise ImportError(
            "progress_bar() draws with tqdm, which is not installed: pip install tqdm."
        ) from error
    return _Bar(tqdm.auto.tqdm, issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm))


class _Bar:
    """What `progress_bar` makes; `tqdm` is the kind of bar that suits where it is drawn."""

    def __init__(self, tqdm: Any, is_widget: bool):
        self.tqdm = tqdm
        self.is_widget = is_widget
        self.bar: Any = None
        self.is_over = False  # whether the bar, a widget, shows a solve that has ended
        self.is_log = False
        self.kept_at = -_LONG

    def __call__(self, step: Step) -> None:
        with self.tqdm.get_lock():  # several devices call from several threads
            self._draw(step)

    def _draw(self, step):
        if self.bar is None:
            self.bar = self._open(int(step.num_steps))
        elif self.is_over:
            self.bar.reset()
        self.bar.set_postfix(
            objective=f"{float(step.objective):.6g}",
            grad_norm=f"{float(step.grad_norm):.2e}",
            refresh=False,
        )
        self.bar.update(int(step.num_steps) - self.bar.n)
        self.is_over = bool(step.last)
        if self.is_over and self.is_widget:
            self.bar.refresh()
        elif self.is_over:
            self._close()

    def _open(self, num_steps):
        settings = {"unit": " steps", "initial": num_steps, "miniters": 1}
        self.is_log = not self.is_widget and not sys.stderr.isatty()
        if self.is_log:
            settings |= {"mininterval": _LONG, "delay": _LONG, "position": 0, "file": _Lines()}
        if not self.is_widget:
            settings["leave"] = None  # it stays, but not below a bar of the user's
        return self.tqdm(**settings)

    def _close(self):
        """Close the bar; its line stays unless another one came to stay shortly before."""
        now = time.monotonic()
        stays = now - self.kept_at >= (_LONG if self.is_log else _SHORT)
        if stays:
            self.kept_at = now
        if stays and self.is_log:
            self.bar.refresh()
        if self.is_log or not stays:
            self.bar.leave = False
        self.bar.close()
        self.bar = None


class _Lines:
    """A file for `tqdm` that makes a line of what it draws over and over."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()
