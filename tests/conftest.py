"""Settings that all tests share: float64 on, so that errors show."""

import jax

jax.config.update("jax_enable_x64", True)
