"""A model of any kind goes in whole and comes out whole, and is differentiated like an array."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import difflbfgs as dl
from problems import THETA, ridge, ridge_solution

CHOOSING = Path(__file__).parent.parent / "docs" / "choosing.md"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: jax.Array
    b: jax.Array
    name: str = dataclasses.field(metadata={"static": True}, default="layer")


class Stage(NamedTuple):
    steps: int
    mu: dict


# Five variables each, in the order of the leaves.
MODELS = {
    "dataclass": Layer(jnp.zeros((2, 2)), jnp.zeros(1)),
    "haiku": {
        "mlp/~/linear_0": {"b": jnp.zeros(1), "w": jnp.zeros((1, 2))},
        "mlp/~/linear_1": {"b": jnp.zeros(1), "w": jnp.zeros((1, 1))},
    },
    "linen": {"params": {"Dense_0": {"bias": jnp.zeros(1), "kernel": jnp.zeros((2, 2))}}},
    "optax": (Stage(3, {"a": {"w": jnp.zeros(4)}}), Stage(0, {"b": jnp.zeros(1)}), ()),
}


def flat(model):
    leaves = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_minimized_over_whatever_holds_its_leaves(name):
    start = MODELS[name]

    def solve(theta):
        return dl.minimize(lambda model, theta: ridge(flat(model), theta), start, theta).value

    found = solve(THETA)
    assert jax.tree.structure(found) == jax.tree.structure(start)
    assert jnp.allclose(flat(found), ridge_solution(THETA), rtol=0, atol=1e-8)
    got = jax.jacrev(lambda theta: flat(solve(theta)))(THETA)
    assert jnp.allclose(got, jax.jacfwd(ridge_solution)(THETA), rtol=0, atol=1e-6)


@pytest.mark.parametrize("package", ["flax", "haiku"])
def test_blocks_on_models_of_packages_that_are_not_required(package):
    """They are marked `py`, and run here where the package is installed."""
    pytest.importorskip(package)
    start = re.search(r"^```python\n(.*?)^```", CHOOSING.read_text(), re.M | re.S)
    blocks = re.findall(r"^```py\n(.*?)^```", CHOOSING.read_text(), re.M | re.S)
    blocks = [block for block in blocks if package in block]
    assert start
    assert blocks
    for block in blocks:
        names = {}
        exec(start[1], names)
        exec(block, names)
        model = names["fitted"].value
        assert jax.tree.structure(model) == jax.tree.structure(names["start"])
        assert names["fitted"].converged
        assert names["slope"] > 0  # more of a penalty, more of an objective
