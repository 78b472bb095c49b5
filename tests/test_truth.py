"""Drawn problems whose minimizers and derivatives are known: no wrong number has a success code.

A family is an objective, compiled once, and a rule by which starts and data are drawn. The truth
comes from Newton's method in float64, begun at the closed form, and from the implicit function
theorem with a dense Hessian there. The draws are the same in every run; `pytest --fuzz 1000` takes
more of them, and `python tests/test_truth.py 1000` prints the share solved of every family.
"""

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difflbfgs as dl
from problems import inexact

FAMILIES = {}


def everything(x, fixed):
    """Return `x`, all of which a minimizer determines."""
    del fixed
    return x


@dataclasses.dataclass(frozen=True)
class Family:
    """An objective `fun(x, theta, fixed)`, and draws of `x0`, `theta` and `fixed`.

    `draw(rng, digits)` knows how many digits the precision has.

    `known(theta, fixed)` is a minimizer, and `seen(x, fixed)` are the numbers that a minimizer
    determines, of which the derivative is taken; all of `x` if it is unique. Where `known` is not
    exact, or not the only minimizer, the derivative is that of the one that was found (`local`).
    """

    fun: Callable
    draw: Callable
    known: Callable
    seen: Callable = everything
    local: bool = False
    exists: bool = True
    regular: bool = True


def family(known, **options):
    """Register a family: the function decorated returns the objective, and how to draw."""

    def register(make):
        FAMILIES[make.__name__] = Family(*make(), known, **options)
        return make

    return register


N = 4


def spd(rng, spread):
    """Return a symmetric matrix with eigenvalues from 1 down to `10**-spread`."""
    Q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    return Q @ np.diag(np.logspace(0, -spread, N)) @ Q.T


def power(rng, low, high):
    return 10.0 ** rng.uniform(low, high)


def bent(z):
    """Return `exp(z) - 1 - z`, which is `z²/2` near 0."""
    return jnp.expm1(z) - z


@family(lambda theta, fixed: fixed["units"] * theta, seen=lambda x, fixed: x / fixed["units"])
def units():
    """Every variable in its own unit, from 1e-6 to 1e6."""

    def fun(x, theta, fixed):
        z = x / fixed["units"] - theta
        return 0.5 * z @ fixed["A"] @ z + jnp.sum(bent(z))

    def draw(rng, digits):
        scale = 10.0 ** (rng.uniform(0, 6) * rng.uniform(-1, 1, N))
        theta = rng.normal(size=N)
        start = scale * (theta + power(rng, -2, 0.5) * rng.normal(size=N))
        return start, theta, {"units": scale, "A": spd(rng, rng.uniform(0, 3))}

    return fun, draw


GROWTHS = [
    lambda z: jnp.abs(z) ** 1.5,
    lambda z: jnp.abs(z) ** 3,
    lambda z: z**4,
    lambda z: z**8,
    bent,
    lambda z: jnp.logaddexp(z, -z),
]


@family(lambda theta, fixed: theta)
def growth():
    """A flank steeper or flatter than a quadratic, from up to 1e6 away."""

    def fun(x, theta, fixed):
        z = x - theta
        grown = jax.lax.switch(fixed["kind"], GROWTHS, z)
        return fixed["weight"] * jnp.sum(grown) + 0.5 * z @ fixed["A"] @ z

    def draw(rng, digits):
        theta = rng.normal(size=N)
        start = theta + power(rng, -1, 6) * rng.normal(size=N)
        kind = np.asarray(rng.integers(len(GROWTHS)))
        return start, theta, {"kind": kind, "weight": power(rng, -3, 3), "A": spd(rng, 2)}

    return fun, draw


@family(lambda theta, fixed: jnp.log(theta / (fixed["upper"] - theta)))
def plateaus():
    """Standard deviations below a bound, `upper · sigmoid(x)`, begun where all is flat."""

    def fun(x, theta, fixed):
        sigma = fixed["upper"] * jax.nn.sigmoid(x)
        return jnp.sum(fixed["weight"] * (jnp.log(sigma) + 0.5 * (theta / sigma) ** 2))

    def draw(rng, digits):
        upper = power(rng, -2, 2) * np.ones(N)
        theta = upper * rng.uniform(0.1, 0.9, N)
        fixed = {"upper": upper, "weight": 10.0 ** rng.uniform(-2, 2, N)}
        return rng.uniform(0.1, 12) * rng.normal(size=N), theta, fixed

    return fun, draw


@family(lambda theta, fixed: theta, local=True)
def cliffs():
    """A cliff between the start and the minimum, whose curvature says nothing of the latter."""

    def fun(x, theta, fixed):
        z = x - theta
        cliff = jax.nn.sigmoid(fixed["steep"] * (fixed["across"] @ x - fixed["at"]))
        return fixed["height"] * cliff + 0.5 * z @ fixed["A"] @ z

    def draw(rng, digits):
        theta, across = rng.normal(size=N), rng.normal(size=N)
        across /= np.linalg.norm(across)
        steep, away = power(rng, 0, 2), rng.uniform(20, 40)
        at = across @ theta + away / steep * rng.uniform(1, 10)
        start = theta + across * (at - across @ theta + rng.normal() / steep)
        fixed = {"height": power(rng, 0, 10), "steep": steep, "across": across, "at": at}
        return start, theta, {**fixed, "A": spd(rng, 1)}

    return fun, draw


@family(lambda theta, fixed: theta)
def noise():
    """Values wrong by up to 1e-6, as those of an adaptive integrator, with exact gradients."""

    def fun(x, theta, fixed):
        z = x - theta
        f = 0.5 * z @ fixed["A"] @ z + jnp.sum(bent(z)) + fixed["constant"]
        return inexact(f, fixed["size"], jax.lax.stop_gradient(jnp.sum(x)))

    def draw(rng, digits):
        theta = rng.normal(size=N)
        start = theta + power(rng, -2, 0.5) * rng.normal(size=N)
        fixed = {"size": power(rng, -12, -6), "constant": rng.choice([0, 1, 10, -5.0])}
        return start, theta, {**fixed, "A": spd(rng, rng.uniform(0, 2))}

    return fun, draw


@family(
    lambda theta, fixed: fixed["B"].T @ theta,
    seen=lambda x, fixed: fixed["B"] @ x,
)
def zero_modes():
    """A symmetry: the objective depends on two combinations of the four variables."""

    def fun(x, theta, fixed):
        z = fixed["B"] @ x - theta
        return 0.5 * fixed["bend"] @ z**2 + jnp.sum(bent(z))

    def draw(rng, digits):
        B = np.linalg.qr(rng.normal(size=(N, N)))[0][:2]
        theta = rng.normal(size=2)
        fixed = {"B": B, "bend": 10.0 ** rng.uniform(-1, 2, 2)}
        return 3 * rng.normal(size=N), theta, fixed

    return fun, draw


@family(lambda theta, fixed: theta)
def flat_directions():
    """Curvatures of many orders, and a constant in the value."""

    def fun(x, theta, fixed):
        z = x - theta
        return fixed["scale"] * (0.5 * z @ fixed["A"] @ z + fixed["constant"])

    def draw(rng, digits):
        theta = rng.normal(size=N)
        start = theta + power(rng, -3, 3) * rng.normal(size=N)
        fixed = {"scale": power(rng, -6, 6), "constant": rng.choice([0.0, 1.0, -100.0])}
        return start, theta, {**fixed, "A": spd(rng, rng.uniform(0, digits - 1))}

    return fun, draw


def across_a_valley(theta, fixed):
    return jnp.concatenate([theta[:1], fixed["length"] * jnp.log(theta[1:])]) @ fixed["Q"]


@family(across_a_valley, seen=lambda x, fixed: (fixed["Q"] @ x)[1:] / fixed["length"])
def valleys():
    """Steep walls, beside whose energy a valley counts little, which bends within a short way."""

    def fun(x, theta, fixed):
        z = fixed["Q"] @ x
        along = z[1:] / fixed["length"]
        valley = jnp.sum(jnp.exp(along) - theta[1:] * along)
        return 0.5 * fixed["height"] * (z[0] - theta[0]) ** 2 + fixed["length"] ** 2 * valley

    def draw(rng, digits):
        theta, length = rng.uniform(0.5, 2, N), power(rng, -3, 0)
        Q = np.linalg.qr(rng.normal(size=(N, N)))[0]
        start = (theta + np.append(1, 3 * length * np.ones(N - 1)) * rng.normal(size=N)) @ Q
        return start, theta, {"Q": Q, "height": power(rng, 0, digits / 2), "length": length}

    return fun, draw


@family(lambda theta, fixed: theta, regular=False)
def degenerate():
    """`Σ |x - θ|^p`, flat at its minimum: there is a value, and no derivative."""

    def fun(x, theta, fixed):
        return jnp.sum(fixed["weight"] * jnp.abs(x - theta) ** fixed["p"])

    def draw(rng, digits):
        theta = rng.normal(size=N)
        start = theta + power(rng, -1, 1) * rng.normal(size=N)
        return (
            start,
            theta,
            {"p": rng.choice([3.0, 4.0, 6.0]), "weight": 10.0 ** rng.normal(size=N)},
        )

    return fun, draw


@family(lambda theta, fixed: theta, local=True)
def ripples():
    """A bowl with many small valleys: any of them will do, and no point between."""

    def fun(x, theta, fixed):
        z = x - theta
        rippled = jnp.sum(jnp.cos(z / fixed["length"]))
        return 0.5 * z @ fixed["A"] @ z - fixed["height"] * fixed["length"] ** 2 * rippled

    def draw(rng, digits):
        theta = rng.normal(size=N)
        start = theta + power(rng, -2, 1) * rng.normal(size=N)
        fixed = {"length": power(rng, -3, 0), "height": power(rng, -2, 2)}
        return start, theta, {**fixed, "A": spd(rng, 1)}

    return fun, draw


@family(lambda theta, fixed: jnp.sqrt(theta), local=True)
def edges():
    """`x + θ/x` for positive `x`, infinite elsewhere, begun up to 1e6 away or next to the edge."""

    def fun(x, theta, fixed):
        inside = jnp.where(x > 0, x, 1)
        return jnp.where(jnp.all(x > 0), fixed["weight"] @ (inside + theta / inside), jnp.inf)

    def draw(rng, digits):
        theta = 10.0 ** rng.uniform(-2, 2, N)
        fixed = {"weight": 10.0 ** rng.uniform(-2, 2, N)}
        return 10.0 ** rng.uniform(-3, rng.uniform(0, 6), N), theta, fixed

    return fun, draw


@family(lambda theta, fixed: jnp.sqrt(theta), local=True)
def stationary_starts():
    """`Σ (x² - θ)²` from where some or all of its gradient is zero: a maximum, or a minimum."""

    def fun(x, theta, fixed):
        return jnp.sum(fixed["weight"] * (x**2 - theta) ** 2)

    def draw(rng, digits):
        theta = rng.integers(1, 4, N).astype(float) ** 2
        kinds = rng.integers(0, 3, N)
        start = np.choose(kinds, [np.zeros(N), np.sqrt(theta), rng.normal(size=N)])
        return start, theta, {"weight": 10.0 ** rng.uniform(-2, 2, N)}

    return fun, draw


@family(lambda theta, fixed: theta * jnp.ones(N), exists=False)
def at_infinity():
    """Separable data: the loss falls for ever, and there is no minimizer."""

    def fun(x, theta, fixed):
        return jnp.sum(jax.nn.softplus(-fixed["data"] @ x)) + 0 * theta

    def draw(rng, digits):
        data = rng.normal(size=(6, N)) * 10.0 ** rng.uniform(-1, 1, N)
        w = rng.normal(size=N)
        data *= np.sign(data @ w)[:, None]
        return rng.normal(size=N) * rng.choice([0.0, 1.0]), np.asarray(1.0), {"data": data}

    return fun, draw


def outer(family):
    """Return the outer objective: a sum of what a minimizer determines, with weights."""

    def weighed(x, data):
        seen = family.seen(x, data["fixed"])
        return seen @ jnp.arange(1.0, seen.size + 1).astype(seen.dtype)

    return weighed


def inner(family):
    """Return the inner objective of `x` and of all that was drawn; the derivative is by `theta`."""

    def fun(x, data):
        return family.fun(x, data["theta"], jax.lax.stop_gradient(data["fixed"]))

    return fun


def solve_all(name, draws, dtype, polish):
    """Return what `value_and_hypergrad` says of every draw."""
    family, solver = FAMILIES[name], dl.LBFGS(polish=polish)
    rtol = float(jnp.finfo(dtype).eps) ** 0.5
    step = dl.value_and_hypergrad(outer(family), inner(family), solver=solver, throw=False)

    def one(draw):
        x0, data = draw
        _, grad, info = step(data, x0)
        sol = info.solution
        g, H = (d(inner(family))(sol.value, data) for d in (jax.grad, jax.hessian))
        return {
            "x": sol.value,
            "converged": sol.converged,
            "result": sol.result,
            "grad": grad["theta"],
            "certified": info.result == dl.RESULTS.successful,
            "estimate": info.error_estimate,
            "evaluations": sol.stats.num_fun_evals,
            "small": sol.stats.grad_norm <= rtol * sol.stats.reference_grad_norm,
            "still": jnp.any(jax.grad(inner(family))(x0, data) == 0),
            "flat": jnp.any((g == 0) & (jnp.diagonal(H) == 0)),
            "exhausted": sol.result == dl.RESULTS.precision_limit,
        }

    return jax.jit(lambda draws: jax.lax.map(one, draws))(draws)


def truths(name, draws, found):
    """Return for every draw how far off the answers are."""
    family = FAMILIES[name]
    fun, loss = inner(family), outer(family)

    def newton(x, data):
        """Descend to the minimizer in whose valley `x` lies, with the curvatures' sizes."""
        lengths = 0.5 ** jnp.arange(20)

        def advance(_, x):
            H, g = jax.hessian(fun)(x, data), jax.grad(fun)(x, data)
            scale = 1 / jnp.sqrt(jnp.where(jnp.diagonal(H) == 0, 1, jnp.abs(jnp.diagonal(H))))
            values, vectors = jnp.linalg.eigh(scale[:, None] * H * scale)
            seen = jnp.abs(values) > 1e-13 * jnp.max(jnp.abs(values))
            inverse = jnp.where(seen, 1 / jnp.where(seen, jnp.abs(values), 1), 0)
            d = -scale * (vectors @ (inverse * (vectors.T @ (scale * g))))
            f = jax.vmap(lambda t: fun(x + t * d, data))(lengths)
            falls = f <= fun(x, data) + 1e-4 * lengths * (g @ d)
            # At rounding level no length falls, and Newton's is the best there is.
            t = jnp.where(jnp.any(falls), lengths[jnp.argmax(falls)], 1)
            return x + t * d

        return jax.lax.fori_loop(0, 20, advance, x)

    def curvature(at, data):
        """Return scales of the variables, and the Hessian in these."""
        scale = jnp.abs(at) + (at == 0)
        return scale, jax.hessian(fun)(at, data) * scale * scale[:, None]

    def error(x, at, data):
        """Return `‖x - x*‖` over `√E`, both in the energy norm at a minimizer; else infinity."""
        scale, H = curvature(at, data)
        d, size = (x - at) / scale, at / scale
        off = jnp.sqrt(jnp.abs(d @ H @ d) / jnp.abs(size @ H @ size))
        least = jnp.linalg.eigvalsh(H)
        minimum = (least[0] >= -1e-9 * least[-1]) & (least[-1] > 0)
        off = jnp.where(minimum & jnp.isfinite(off), off, jnp.inf)
        plain = jnp.linalg.norm(x - at) / jnp.linalg.norm(at)  # if the curvature is infinite
        off = jnp.where(jnp.all(jnp.isfinite(H)), off, plain)
        return jnp.where(jnp.isnan(off), jnp.inf, off)

    def slopes(at, data):
        """Return the derivative of the loss by the implicit function theorem."""
        scale, H = curvature(at, data)
        v = scale * jax.grad(loss)(at, data)
        u = scale * (jnp.linalg.pinv(H, rtol=1e-13, hermitian=True) @ v)
        mixed = jax.grad(lambda data: jax.grad(fun)(at, data) @ u)(data)
        return -mixed["theta"]

    def one(draw, x):
        _, data = draw
        known = family.known(data["theta"], data["fixed"])
        near, best = newton(x, data), newton(known, data)
        errors = jnp.stack([error(x, at, data) for at in (near, best, known)])
        if family.local:
            exact = slopes(near, data)
        else:

            def closed(theta):
                at = family.known(theta, data["fixed"])
                return loss(at, {**data, "theta": theta})

            exact = jax.grad(closed)(data["theta"])
        return {
            "error": jnp.min(errors),
            "exact": exact,
            "gap": fun(x, data) - fun(known, data),
            "started": fun(draw[0], data) - fun(known, data),
        }

    return jax.jit(lambda draws, found: jax.lax.map(lambda a: one(*a), (draws, found)))(
        draws, found
    )


def in_precision(tree, dtype):
    """Return the leaves that are not integers in this precision."""

    def cast(leaf):
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(cast, tree)


def norms(rows):
    """Return the norm of every row, a number being one."""
    return np.linalg.norm(rows.reshape(len(rows), -1), axis=1)


def run(name, numbers, dtype, polish):
    """Return which of these draws are wrong, by value and by derivative, and which are solved."""
    family = FAMILIES[name]
    rtol = float(jnp.finfo(dtype).eps) ** 0.5
    digits = -np.log10(float(jnp.finfo(dtype).eps))
    count, index = len(numbers), list(FAMILIES).index(name)  # a new family goes to the end
    rngs = [np.random.default_rng([k, index]) for k in numbers]
    drawn = [family.draw(rng, digits) for rng in rngs]
    draws = [(x0, {"theta": theta, "fixed": fixed}) for x0, theta, fixed in drawn]
    draws = in_precision(jax.tree.map(lambda *parts: np.stack(parts), *draws), dtype)
    found = jax.device_get(solve_all(name, draws, dtype, polish))
    wide = in_precision(draws, jnp.float64)
    true = jax.device_get(truths(name, wide, jnp.asarray(found["x"], jnp.float64)))

    if not family.exists:
        right = np.zeros(count, bool)
    elif family.regular:
        right = true["error"] <= 10 * rtol
    else:
        right = true["gap"] <= 1e-3 * true["started"]
    converged, certified = found["converged"], found["certified"]
    size = norms(true["exact"])
    off = norms(found["grad"] - true["exact"])
    least = 1e-4 if dtype == jnp.float64 else 1e-2
    excused = np.maximum(3 * found["estimate"], least * size)
    # A search never leaves where it is along variables whose slopes are exactly zero at its start,
    # and what underflows has no slope and no curvature at its end. Neither has a derivative.
    wrong_value = converged & ~right & ~found["still"] & ~found["flat"]
    # Without Hessian products the norm of the gradient is all that is said: of values this checks
    # that there is nothing else behind `converged`, and the derivatives are held to the truth.
    if polish == 0:
        wrong_value &= ~(found["small"] | found["exhausted"])
    wrong_derivative = certified & (~(off <= excused) if family.exists else True)
    # Of a derivative without an estimate the tolerance of the solve is all that is known.
    told = converged & np.isfinite(off) & family.regular & family.exists
    wrong_plainly = told & (off > least * size) & (polish > 0) & (dtype == jnp.float64)
    return {
        "wrong value": wrong_value,
        "wrong derivative": wrong_derivative | wrong_plainly,
        "solved": converged & right,
        "derivative": certified & (off <= least * size),
        "draws": draws,
        "found": found,
        "true": true,
        "off": off,
    }


@pytest.mark.slow
@pytest.mark.parametrize("polish", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_wrong_number_has_a_success_code(name, dtype, polish, pytestconfig):
    ran = run(name, range(pytestconfig.getoption("--fuzz")), dtype, polish)
    assert not np.flatnonzero(ran["wrong value"]).size
    assert not np.flatnonzero(ran["wrong derivative"]).size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "numbers"),
    [
        ("flat_directions", jnp.float64, [128]),  # a slope without curvature was left
        ("valleys", jnp.float64, [1034, 2194, 2286]),  # changes of the Hessian cancelled
        ("valleys", jnp.float32, [1068, 1123, 1182]),  # steps below rounding, next to a wall
        ("ripples", jnp.float32, [62, 108]),  # the Hessian was that of a ripple
    ],
)
def test_draws_that_were_wrong_once(name, dtype, numbers):
    ran = run(name, numbers, dtype, 1)
    assert ran["solved"].all()
    assert not ran["wrong derivative"].any()


def main(count):
    """Print the share of draws solved, and how many are wrong."""
    print(
        f"{'family':20} dtype   polish  solved  derivative  wrong: value  derivative  evaluations"
    )
    for name in FAMILIES:
        for dtype in (jnp.float64, jnp.float32):
            for polish in (1, 0):
                ran = run(name, range(count), dtype, polish)
                print(
                    f"{name:20} {jnp.dtype(dtype).name:8} {polish:5} {ran['solved'].mean():7.3f}"
                    f"  {ran['derivative'].mean():10.3f}  {ran['wrong value'].sum():12}"
                    f"  {ran['wrong derivative'].sum():10}"
                    f"  {np.median(ran['found']['evaluations']):11.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(int(sys.argv[1]))
