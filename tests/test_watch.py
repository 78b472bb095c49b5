"""Callbacks and the progress bar: in a terminal, in a log, in a notebook, in batches."""

import contextlib
import os
import re
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
import tqdm.auto
import tqdm.notebook

import difflbfgs as dl
from difflbfgs import _loop, _watch
from difflbfgs._problem import make_problem, make_variables
from problems import THETA, ridge

fcntl, termios = map(pytest.importorskip, ("fcntl", "termios"))

# A line search that compiles fast.
PLAIN = dl.LBFGS(polish=0, linesearch=optax.scale_by_backtracking_linesearch(30))
COUNT = r"(\d+) steps \[[^]]*grad_norm=[-+.e0-9]+, objective=[-+.e0-9]+\]"


def test_callback_sees_every_step():
    steps = []
    sol = dl.minimize(ridge, jnp.zeros(5), THETA, callback=steps.append)
    jax.effects_barrier()
    assert [int(step.num_steps) for step in steps] == list(range(1, int(sol.stats.num_steps) + 1))
    assert [bool(step.last) for step in steps] == [False] * (len(steps) - 1) + [True]
    assert all(float(step.step_size) > 0 for step in steps)


def test_lanes_of_a_batch_that_have_ended_are_silent():
    x0, steps = jnp.zeros(5), []
    problem = make_problem(ridge, THETA, make_variables(x0, True), x0)

    def num_steps(theta):  # as on an accelerator, where the lanes are not taken in turn
        end = _loop.Search(x0, None, PLAIN, 100, steps.append)(problem.at([theta]))
        return end.stats.num_steps

    counts = jax.vmap(num_steps)(THETA + jnp.asarray([[0.0], [3.0], [-3.0]]))
    jax.effects_barrier()
    assert len(set(counts.tolist())) > 1
    assert len(steps) == jnp.sum(counts)
    assert sorted(int(step.num_steps) for step in steps if step.last) == sorted(counts.tolist())


def play(bar, *solves):
    """Show `bar` solves of so many steps each."""
    for num_steps in solves:
        for k in range(1, num_steps + 1):
            bar(dl.Step(*map(jnp.asarray, (k, k + 1, 1.5, 0.1 / k, 1.0, k == num_steps))))


def in_terminal(show):
    """Return what `show()` writes to a standard error that is a terminal of 120 columns."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stderr(stream):
        show()
    pieces = []
    with os.fdopen(reader, "rb", buffering=0) as end, contextlib.suppress(OSError):
        while piece := end.read(4096):  # at the end Linux raises
            pieces.append(piece)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def shown(text):
    """Return the lines that a terminal shows in the end."""
    return [re.split(r"\r(?=.)", line.rstrip("\r "))[-1].strip() for line in text.split("\n")]


def set_clock(monkeypatch, *seconds):
    """Let the bar, but nothing else of the process, read `seconds` from the clock, one a call."""
    clock = iter(seconds)
    monkeypatch.setattr(_watch, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_in_a_terminal_the_last_state_stays_on_a_line():
    text = in_terminal(lambda: play(dl.progress_bar(), 25))
    last, rest = shown(text)
    assert re.fullmatch(COUNT, last).group(1) == "25"
    assert rest == ""
    assert text.count("\r") > 1


def test_in_a_terminal_one_line_stays_each_second(monkeypatch):
    set_clock(monkeypatch, 0.0, 0.5, 0.9, 1.1)
    text = in_terminal(lambda: play(dl.progress_bar(), 3, 4, 5, 6))
    assert re.findall(COUNT, "\n".join(shown(text))) == ["3", "6"]


def test_below_a_bar_of_the_users_no_line_stays():
    def show():
        for _ in tqdm.tqdm(range(2)):
            play(dl.progress_bar(), 3)

    text = in_terminal(show)
    assert "1 steps" in text
    assert not re.search(COUNT, text)


def test_a_log_gets_a_line_for_a_solve(tmp_path):
    program = """
import jax, jax.numpy as jnp, difflbfgs as dl
valley = lambda x, scale: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (scale - x[:-1]) ** 2)
bar, settings = dl.progress_bar(), {"max_steps": 500, "throw": False}
solver = dl.LBFGS(rtol=0.0, polish=0, memory_size=1)
solve = lambda scale: dl.minimize(
    valley, jnp.zeros(300), scale, solver=solver, callback=bar, **settings
).stats.num_steps
print(jax.jit(jax.vmap(solve))(jnp.ones(3)).tolist())
"""
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, check=True)
    assert run.stdout == "[500, 500, 500]\n"
    lines = log.read_text().splitlines()
    # One where the first solve ended; a slow machine takes more than ten seconds for all of them.
    assert 1 <= len(lines) <= 3
    assert re.fullmatch(COUNT, lines[0]).group(1) == "500"


def test_a_log_gets_a_line_every_ten_seconds(capsys, monkeypatch):
    set_clock(monkeypatch, 0.0, 9.0, 11.0)
    bar = dl.progress_bar()
    play(bar, 3, 4, 5)
    assert re.findall(COUNT + "\n", capsys.readouterr().err) == ["3", "5"]
    set_clock(monkeypatch, 30.0)
    monkeypatch.setattr(_watch, "_LONG", 0.0)  # every step is late
    play(bar, 4)
    assert re.findall(COUNT + "\n", capsys.readouterr().err) == ["2", "3", "4", "4"]


def test_a_notebook_gets_one_widget(monkeypatch):
    drawn, made = [], []

    class Widget(tqdm.std.tqdm):
        def __init__(self, **settings):
            made.append(settings)
            super().__init__(**settings)

        def display(self, *_, **__):
            drawn.append(self.n)

        def close(self):
            pass

    monkeypatch.setattr(tqdm.auto, "tqdm", Widget)
    monkeypatch.setattr(tqdm.notebook, "tqdm", Widget)
    play(dl.progress_bar(), 3, 4)
    assert len(made) == 1
    assert 3 in drawn
    assert drawn[-1] == 4


def test_progress_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        dl.progress_bar()


class _Quarter(NamedTuple):
    learning_rate: jax.Array


def test_the_length_that_the_users_line_search_found_is_shown():
    def init(params):
        del params
        return _Quarter(jnp.asarray(0.25))

    def update(updates, state, params=None, **others):
        del params, others
        return optax.tree.scale(0.25, updates), state

    steps = []
    dl.minimize(
        lambda x, _: jnp.sum(jnp.cosh(x)),
        jnp.ones(3),
        solver=dl.LBFGS(
            linesearch=optax.GradientTransformationExtraArgs(init, update), polish=0, rtol=1e-2
        ),
        callback=steps.append,
    )
    jax.effects_barrier()
    # Down the gradient 1 is too short, and the next trial of the search 6.25 times as long.
    assert [float(step.step_size) for step in steps][:2] == [0.25 * 6.25, 0.25]
