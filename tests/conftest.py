"""Settings that all tests share: float64 on, so that errors show."""

import os

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
# Nearly all of the suite's time is XLA's, which compiles small problems longer than they run.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # in processes that tests start
if jax.__version__.startswith("0.10."):
    # This code generator, gone since, takes twice as long.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=100, help="draws of each generated test")


def pytest_configure(config):
    hypothesis.settings.register_profile(
        "draws",
        max_examples=config.getoption("--fuzz"),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("draws")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Compiled programs are memory maps, of which Linux grants a process some ten thousand."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """Compile as users do: XLA moves things about, and programs of the same steps round alike."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
