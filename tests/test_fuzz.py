"""Generated objectives: each solve ends, says truly how, and returns no point worse than its start.

An objective is a sum of terms `c · Σ φ(a (Mx - b))` with φ drawn from functions that bend, kink,
jump, flatten out, fall without limit or are not defined everywhere. All of them are one compiled
program, told at run time what to be. The draws are the same in every run, also if other modules are
loaded, of which Hypothesis would mix constants in; `pytest --fuzz 100000` takes more of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import difflbfgs as dl

N, TERMS, MAX_STEPS = 4, 3, 300

SHAPES = {
    "square": jnp.square,
    "quartic": lambda z: z**4,
    "saddle": lambda z: z**4 - z**2,
    "cosine": jnp.cos,
    "softplus": jax.nn.softplus,
    "plateau": jnp.tanh,
    "bump": lambda z: -jnp.exp(-(z**2)),
    "cauchy": lambda z: jnp.log1p(z**2),
    "exponential": jnp.exp,
    "line": lambda z: z,
    "logarithm": jnp.log,  # not a number below 0
    "barrier": lambda z: -jnp.log(1 - z**2),
    "pole": lambda z: 1 / z**2,
    "root": lambda z: jnp.sqrt(jnp.abs(z)),  # an infinite gradient at 0
    "modulus": jnp.abs,
    "ramp": lambda z: jnp.maximum(z, 0),
    "cliff": lambda z: z**2 + 10 * (z > 1),
    "stairs": jnp.floor,
    "ripple": lambda z: z**2 + 1e-3 * jnp.sin(1e3 * z),
    "nothing": jnp.zeros_like,
}
FALLING = {"line", "logarithm", "stairs"}  # without limit; the others are bounded below
RISING = {"square", "quartic", "saddle", "cauchy", "root", "modulus", "cliff", "ripple"}  # far out


def objective(x, theta):
    """Return the sum of the terms that `theta` describes."""

    def term(total, part):
        M, b = part["M"].astype(x.dtype), part["b"].astype(x.dtype)
        z = part["stretch"].astype(x.dtype) * (M @ x - b)
        shaped = jax.lax.switch(part["shape"], list(SHAPES.values()), z)
        return total + part["weight"].astype(x.dtype) * jnp.sum(shaped), None

    return jax.lax.scan(term, jnp.zeros((), x.dtype), theta)[0]


value_and_grad = jax.jit(jax.value_and_grad(objective))
values = jax.jit(jax.vmap(objective, in_axes=(0, None)))
hessian = jax.jit(jax.hessian(objective))


def scale(rng, exponent):
    """Return a number between 10**-exponent and 10**exponent, often one."""
    return 1.0 if rng.random() < 0.2 else 10.0 ** rng.uniform(-exponent, exponent)


def drawn_theta(rng):
    """Draw what the objective is to be."""
    count = rng.integers(1, TERMS + 1)
    kinds = list(rng.integers(0, len(SHAPES), count))
    M = rng.normal(size=(TERMS, N, N)) * np.logspace(0, -rng.uniform(0, 4), N)
    weights = [scale(rng, 2) for _ in range(count)]
    return {
        "shape": np.array(kinds + [list(SHAPES).index("nothing")] * (TERMS - count)),
        "weight": scale(rng, rng.choice([0, 12])) * np.array(weights + [0.0] * (TERMS - count)),
        "stretch": np.full(TERMS, scale(rng, rng.choice([0, 6]))),
        "M": M,
        "b": rng.normal(size=(TERMS, N)) * rng.choice([0.0, 1.0, 100.0]),
    }


def drawn_start(rng):
    """Draw a start: near, far, special; some of its entries are whole numbers."""
    size = rng.choice([3.0, 1e6])
    start = rng.uniform(-size, size, N)
    start = np.where(rng.random(N) < 0.2, np.round(start), start)
    special = [np.zeros(N), np.ones(N), np.full(N, np.nan), np.full(N, 1e30)]
    return special[rng.integers(len(special))] if rng.random() < 0.3 else start


@pytest.mark.parametrize("polish", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_any_objective_ends_truly(dtype, polish, pytestconfig):
    for k in range(pytestconfig.getoption("--fuzz")):
        rng = np.random.default_rng(k)
        theta, start, loose = drawn_theta(rng), drawn_start(rng), rng.choice([0.0, 1e-2, 0.3])
        x0 = jnp.asarray(start, dtype)
        rtol = max(loose, float(jnp.finfo(dtype).eps) ** 0.5)
        sol = dl.minimize(
            objective,
            x0,
            theta,
            solver=dl.LBFGS(rtol=jnp.asarray(rtol), polish=polish),
            max_steps=MAX_STEPS,
            throw=False,
        )
        try:
            check(sol, x0, theta, dtype, rtol, polish)
        except AssertionError as error:
            error.add_note(f"in draw {k}")
            raise


KEYS = st.sampled_from(["value", "grad", "count", "", "0", "a/b", "learning_rate", "x0", "ß"])
LEAVES = st.sampled_from(["vector", "matrix", "number", "float32", "half", "complex", "kept"])
TREES = st.recursive(
    LEAVES,
    lambda trees: st.one_of(
        st.lists(trees, max_size=2),
        st.tuples(trees),
        st.dictionaries(KEYS, trees, max_size=2),
    ),
    max_leaves=5,
)


def leaf(kind):
    """Return a leaf of this kind."""
    return {
        "vector": np.ones(2),
        "matrix": np.full((2, 1), 0.5),
        "number": 1.5,
        "float32": np.ones(1, np.float32),
        "half": np.ones(2, jnp.bfloat16),
        "complex": np.array([1 + 2j]),
        "kept": "a string",
    }[kind]


def bowl(x, centre):
    """Return `Σ |x - c|² + |x - c|⁴` over all leaves that are numbers."""
    squares = [
        jnp.abs(jnp.asarray(part) - centre).astype(jnp.float64) ** 2
        for part in jax.tree.leaves(x)
        if not isinstance(part, str)
    ]
    return sum((jnp.sum(square + square**2) for square in squares), jnp.zeros(()))


@pytest.mark.parametrize("flatten", [True, False])
def test_any_tree_comes_back_minimized(flatten):
    @settings(max_examples=max(8, settings.default.max_examples // 20))
    @given(TREES, st.floats(-3, 3))
    def check_tree(kinds, centre):
        x0 = jax.tree.map(leaf, kinds)
        if all(isinstance(part, str) for part in jax.tree.leaves(x0)):
            with pytest.raises(ValueError, match="x0"):
                dl.minimize(bowl, x0, centre, solver=dl.LBFGS(flatten=flatten))
            return
        sol = dl.minimize(bowl, x0, centre, solver=dl.LBFGS(flatten=flatten))
        assert jax.tree.structure(sol.value) == jax.tree.structure(x0)
        for before, after in zip(jax.tree.leaves(x0), jax.tree.leaves(sol.value), strict=True):
            if isinstance(before, str):
                assert after == before
                continue
            before = jnp.asarray(before)
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
            eps = float(jnp.finfo(before.dtype).eps)
            np.testing.assert_allclose(
                np.asarray(after, complex),
                centre,
                rtol=0,
                atol=4 * max(eps, 1e-7) * (1 + abs(centre)),
            )

    check_tree()


def falls(x, g, theta, eps):
    """Return whether the objective falls along `-g` by more than its rounding error.

    As for a quadratic, that is eps times `|f| + ‖H‖ ‖x‖²`, the size that its terms may have. The
    search goes no further than where the objective first rises: behind that is another valley.
    """
    curvature = np.linalg.norm(hessian(x, theta), 2)
    down = (1 + np.linalg.norm(x)) / np.linalg.norm(g) * g
    along = jnp.stack([x - (t * down).astype(x.dtype) for t in np.logspace(-16, 2, 181)])
    f, found = float(objective(x, theta)), np.asarray(values(along, theta), np.float64)
    error = 10 * eps * (abs(f) + curvature * (1 + np.linalg.norm(x)) ** 2)
    rising = ~(found <= f + error)
    valley = found[: np.argmax(rising)] if rising.any() else found
    return valley.min(initial=np.inf) < f - 2 * error


def is_near(x, x0, theta, rtol, dtype):
    """Return whether a Newton step from `x` is as small as was asked, in the energy norm.

    By a dense Hessian in float64: what the solve itself was told of it does not count.
    """
    x, x0, eps = np.asarray(x, np.float64), np.asarray(x0, np.float64), np.finfo(dtype).eps
    f, g = (np.asarray(part, np.float64) for part in value_and_grad(jnp.asarray(x), theta))
    if np.linalg.norm(g) < np.sqrt(np.finfo(dtype).tiny):
        return True  # in this precision its square is zero
    H = np.asarray(hessian(jnp.asarray(x), theta), np.float64)
    values, vectors = np.linalg.eigh(H)
    if values[0] < -1e-3 * values[-1]:
        return False
    seen = values > 100 * eps * values[-1]
    decrement = np.sum((vectors.T @ g)[seen] ** 2 / values[seen])
    energy = max(x @ H @ x, (x - x0) @ H @ (x - x0))
    return decrement <= (10 * rtol) ** 2 * energy + 100 * eps * (abs(f) + energy)


def check(sol, x0, theta, dtype, rtol, polish):
    """Assert that what the solution says of itself is so."""
    eps = float(jnp.finfo(dtype).eps)
    f0, g0 = (np.asarray(part, np.float64) for part in value_and_grad(x0, theta))
    f, g = (np.asarray(part, np.float64) for part in value_and_grad(sol.value, theta))
    grad_norm, reference = float(sol.stats.grad_norm), float(sol.stats.reference_grad_norm)
    assert int(sol.stats.num_steps) <= MAX_STEPS
    # A search tries 31 lengths at most, and a Newton step that is not taken is no step.
    assert int(sol.stats.num_fun_evals) <= 32 * (int(sol.stats.num_steps) + 2)

    defined = np.isfinite(x0).all() and np.isfinite(f0) and np.isfinite(g0).all()
    assert (sol.result == dl.RESULTS.nonfinite_start) == (not defined)
    if not defined:
        np.testing.assert_array_equal(sol.value, x0)
        return
    assert np.isfinite(sol.value).all()
    assert np.isfinite(g).all()
    assert f <= f0 + 10 * eps * abs(f0)
    if sol.result == dl.RESULTS.successful:
        if polish:
            assert is_near(sol.value, x0, theta, rtol, dtype)
        else:
            assert grad_norm <= rtol * reference
    elif sol.result == dl.RESULTS.no_minimizer:
        assert polish
    elif sol.result == dl.RESULTS.precision_limit:
        assert not falls(sol.value, g, theta, eps)
    elif sol.result == dl.RESULTS.max_steps_reached:
        assert int(sol.stats.num_steps) == MAX_STEPS
    elif sol.result == dl.RESULTS.unbounded:
        far = -(g0 / np.linalg.norm(g0) * 1e-3 * np.finfo(dtype).max).astype(dtype)
        assert f < f0 or value_and_grad(far, theta)[0] < f0
        kinds = {list(SHAPES)[kind] for kind in theta["shape"]}
        assert kinds & FALLING or not kinds & RISING
    else:
        assert sol.result == dl.RESULTS.line_search_failed
