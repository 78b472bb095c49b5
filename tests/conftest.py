"""Settings that all tests share: float64 on, so that errors show."""

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Compiled programs are memory maps, of which Linux grants a process some ten thousand."""
    yield
    jax.clear_caches()
