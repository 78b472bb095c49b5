"""Compiled programs that outlive their process, as docs/large_problems.md says."""

import os
import subprocess
import sys

import jax
import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp, difflbfgs as dl

def ridge(w, penalty):
    return jnp.sum((w - jnp.arange(3.0)) ** 2) + penalty * jnp.sum(w**2)

def slope(penalty):
    how = {"solver": dl.LBFGS(polish=0), "throw": THROW, "max_steps": MOST}
    return jnp.sum(dl.minimize(ridge, jnp.zeros(3), penalty, **how).value)

lowered = jax.jit(jax.grad(slope)).lower(0.5)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
program = lowered.compile()
print("kept" if "cache_hits" in events else "new")
try:
    print(f"{program(0.5):.2f}")
except RuntimeError as error:
    print("maximum number of solver steps" in str(error))
"""


def runs(folder, throw, most=100):
    """Return what the program prints when it is run for the first and for the second time."""
    program = PROGRAM.replace("THROW", str(throw)).replace("MOST", str(most))
    caching = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", program]
    return [
        subprocess.run(
            command, env={**os.environ, **caching}, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]


@pytest.mark.slow
def test_a_solve_that_does_not_raise_is_kept(tmp_path):
    assert runs(tmp_path, throw=False) == [["new", "-1.33"], ["kept", "-1.33"]]


@pytest.mark.slow
@pytest.mark.skipif(jax.__version__.startswith("0.11."), reason="tried with 0.10 and 0.12 only")
def test_a_solve_that_raises_is_kept_by_new_versions_of_jax_and_raises_again(tmp_path):
    again = "new" if jax.__version__.startswith("0.10.") else "kept"
    assert runs(tmp_path, throw=True, most=1) == [["new", "True"], [again, "True"]]
