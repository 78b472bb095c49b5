"""Functions to minimize, from many fields, to compare forward solvers on.

Each is made for float64 and float32 from the same numbers.
"""

import dataclasses
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from . import more_garbow_hillstrom
from .collection import cross_entropies, digits, rounded, standardised

# A choice from CUTEst (Gould, Orban & Toint 2015), 2 to 10000 variables, without those that are
# in Moré, Garbow & Hillstrom's collection too.
CUTEST = """
    AKIVA ALLINITU ARWHEAD BDQRTIC BROYDN7D CHNROSNB CLIFF COSINE CRAGGLVY CUBE DENSCHNA DENSCHND
    DENSCHNE DIXMAANE1 DIXMAANJ DJTL DQDRTIC DQRTIC EDENSCH EG2 EIGENALS ENGVAL1 EXPFIT FLETCHCR
    FMINSRF2 FREUROTH GENHUMPS GENROSE GROWTHLS HAIRY HEART6LS HILBERTB HIMMELBH HUMPS LIARWHD
    LOGHAIRY MEXHAT MSQRTALS NONCVXU2 NONDQUAR PALMER1C PENALTY3 POWER SISSER SNAIL SPARSINE
    TOINTGSS VIBRBEAM WAYSEA1 ZANGWIL2
""".split()


# Those with bounds and up to 1300 variables, degenerate ones among them; and quadratic programs.
BOUNDED = """
    AIRCRFTB BIGGS3 BIGGS5 BOX2 BRANIN CAMEL6 DEVGLA1B DEVGLA2B DGOSPEC DIAGIQB DIAGIQE DIAGIQT
    DIAGNQB DIAGNQE DIAGNQT DIAGPQB DIAGPQE DIAGPQT EGGCRATEB ELATVIDUB EXP2B EXPLIN EXPLIN2
    FBRAINLS HADAMALS HART6 HATFLDA HATFLDB HATFLDC HS1 HS110 HS2 HS25 HS3 HS38 HS3MOD HS4 HS45 HS5
    JUDGEB KOEBHELB LEVYMONT LEVYMONT5 LEVYMONT6 LEVYMONT7 LEVYMONT8 LEVYMONT9 LEVYMONT10 LOGROS
    PALMER1 PALMER1A PALMER2 PALMER2A PALMER2B PALMER2E PALMER3 PALMER3A PALMER3B PALMER3E PALMER4
    PALMER4B PALMER4E PALMER5B PALMER6A PALMER6E PALMER7E PALMER8A PALMER8E PFIT1LS PFIT2LS PFIT3LS
    PFIT4LS PRICE4B QINGB QUDLIN S368 TRIGON1B
""".split()
BOUNDED_QUADRATIC = ("BQP1VAR", "BQPGABIM", "BQPGASIM")


@dataclasses.dataclass(frozen=True)
class Objective:
    """A function of one vector, and where to start."""

    name: str
    family: str
    fun: Callable[[jax.Array], jax.Array]
    x0: jax.Array


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A function of one vector between bounds, and where to start."""

    name: str
    fun: Callable[[jax.Array], jax.Array]
    x0: jax.Array
    lower: jax.Array
    upper: jax.Array


def bounded(dtype: Any, names: tuple[str, ...] = ()) -> Iterator[Bounded]:
    """Yield the problems with bounds in this dtype; all, or those named."""
    for name in names or (*BOUNDED, *BOUNDED_QUADRATIC):
        folder = "_quadratic_problems" if name in BOUNDED_QUADRATIC else "_bounded_minimisation"
        problem = _cutest_problem(folder, name)
        args = jax.tree.map(lambda leaf: _cast(leaf, dtype), problem.args)
        x0, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem.y0))

        def fun(x, problem=problem, args=args, unravel=unravel):
            return problem.objective(unravel(x), args)

        def vector(side, x0=problem.y0):
            full = jax.tree.map(lambda b, leaf: jnp.broadcast_to(b, jnp.shape(leaf)), side, x0)
            return ravel_pytree(full)[0].astype(dtype)

        lower, upper = map(vector, problem.bounds)
        start = jnp.clip(x0, lower, upper)
        yield Bounded(name, _returning(dtype, fun), start, lower, upper)


def objectives(dtype: Any, families: tuple[str, ...] = ()) -> Iterator[Objective]:
    """Yield the collection in this dtype; all families, or those named."""
    for family in families or FAMILIES:
        for name, fun, x0 in FAMILIES[family](dtype):
            yield Objective(name, family, _returning(dtype, fun), jnp.asarray(x0, dtype))


def _returning(dtype, fun):
    """Return `fun` with its value in this dtype, which some of CUTEst's leave."""
    return lambda x: jnp.asarray(fun(x), dtype)


def _more_garbow_hillstrom(dtype):
    for problem in more_garbow_hillstrom.PROBLEMS:
        yield problem.name, problem.value, problem.x0


def _cutest(dtype):
    for name in CUTEST:
        problem = _cutest_problem("_unconstrained_minimisation", name)
        args = jax.tree.map(lambda leaf: _cast(leaf, dtype), problem.args)
        yield name, functools.partial(problem.objective, args=args), problem.y0


def _cutest_problem(folder, name):
    module = importlib.import_module(f"{_cutest_package(folder)}.{name.lower()}")
    return getattr(module, name)()


@functools.cache
def _cutest_package(folder):
    """Return the package of a kind of CUTEst's problems.

    Importing `sif2jax` as a whole builds every problem, for a minute and a half. So its packages
    are entered without running what they would import.
    """
    root, parts = _sif2jax_folder(), ("cutest", folder)
    for depth in range(len(parts) + 1):
        package = types.ModuleType(".".join(("sif2jax", *parts[:depth])))
        package.__path__ = ["/".join((root, *parts[:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return ".".join(("sif2jax", *parts))


@functools.cache
def _sif2jax_folder() -> str:
    """Return where the package is, which cannot be asked once it is entered."""
    spec = importlib.util.find_spec("sif2jax")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("CUTEst's problems come with the package sif2jax. Install it.")
    return spec.submodule_search_locations[0]


def _cast(leaf, dtype):
    floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, dtype) if floating else leaf


def _regressions(dtype):
    X, y, _, _ = standardised(load_breast_cancer, dtype)
    sign = rounded(2 * y - 1, dtype)
    for decay in (1e-2, 1e-5):

        def logistic(w, decay=decay):
            return jnp.mean(jax.nn.softplus(-sign * (X @ w))) + decay / 2 * jnp.sum(w**2)

        yield f"logistic {decay:.0e}", logistic, np.zeros(30)

    images, labels, _, _ = digits(600, 0, dtype)
    for decay in (1e-2, 1e-5):

        def softmax(w, decay=decay):
            logits = images @ w[:640].reshape(64, 10) + w[640:]
            return jnp.mean(cross_entropies(logits, labels)) + decay / 2 * jnp.sum(w**2)

        yield f"softmax {decay:.0e}", softmax, np.zeros(650)

    Z, z, _, _ = standardised(load_diabetes, dtype)
    z = rounded(z, dtype)

    def least_squares(w):
        return jnp.mean((Z @ w[1:] + w[0] - z) ** 2)

    def pseudo_huber(w):
        return jnp.mean(jnp.sqrt(1 + (Z @ w[1:] + w[0] - z) ** 2))

    def poisson(w):
        rate = Z @ w[1:] + w[0]
        return jnp.mean(jnp.exp(rate) - z * rate)

    def gaussian_process(log_scales):
        """Negative log marginal likelihood; lengths, amplitude and noise."""
        amplitude, noise = jnp.exp(log_scales[10]), jnp.exp(log_scales[11])
        points = Z[:100] * jnp.exp(log_scales[:10])
        squares = jnp.sum((points[:, None] - points) ** 2, axis=-1)
        K = amplitude * jnp.exp(-squares / 2) + (noise + 1e-3) * jnp.eye(100, dtype=dtype)
        L = jnp.linalg.cholesky(K)
        target = (z[:100] - jnp.mean(z[:100])) / jnp.std(z[:100])
        a = jax.scipy.linalg.cho_solve((L, True), target)
        return target @ a / 2 + jnp.sum(jnp.log(jnp.diag(L)))

    yield "least squares", least_squares, np.zeros(11)
    yield "pseudo-Huber", pseudo_huber, np.zeros(11)
    yield "Poisson", poisson, np.zeros(11)
    yield "Gaussian process", gaussian_process, np.full(12, -1.0)


def _networks(dtype):
    X, y, _, _ = standardised(load_wine, dtype)

    def classifier(w):
        first, bias, last = jnp.split(w, [104, 112])
        logits = jnp.tanh(X @ first.reshape(13, 8) + bias) @ last.reshape(8, 3)
        return jnp.mean(cross_entropies(logits, y)) + 1e-4 * jnp.sum(w**2)

    yield "classifier", classifier, 0.3 * np.random.default_rng(0).normal(size=136)

    t = jnp.linspace(-3, 3, 50, dtype=dtype)[:, None]
    sinusoid = jnp.sin(2 * t)

    def fit(w):
        a, b, C, d, e = jnp.split(w, [20, 40, 440, 460])
        hidden = jnp.tanh(jnp.tanh(t * a + b) @ C.reshape(20, 20) + d)
        return jnp.mean((hidden @ e[:, None] - sinusoid) ** 2) + 1e-3 * jnp.sum(w**2)

    yield "sinusoid", fit, 0.5 * np.random.default_rng(1).normal(size=480)

    images, _, _, _ = digits(300, 0, dtype)

    def autoencoder(w):
        down, up = w[:512].reshape(64, 8), w[512:].reshape(8, 64)
        error = jnp.mean((jax.nn.softplus(images @ down) @ up - images) ** 2)
        return error + 1e-4 * jnp.sum(w**2)

    yield "autoencoder", autoencoder, 0.1 * np.random.default_rng(2).normal(size=1024)


def _clusters(dtype):
    def lennard_jones(x):
        """4 Σ r⁻¹² - r⁻⁶ over all pairs of atoms."""
        atoms = x.reshape(-1, 3)
        i, j = np.triu_indices(len(atoms), 1)
        inverse = 1 / jnp.sum((atoms[i] - atoms[j]) ** 2, axis=-1) ** 3
        return 4 * jnp.sum(inverse**2 - inverse)

    # A jittered piece of a cubic lattice, wider than the bond length: nothing overlaps.
    for side, atoms in ((2, 8), (3, 13), (4, 38)):
        lattice = 1.3 * np.argwhere(np.ones((side, side, side)))
        nearest = np.argsort(np.linalg.norm(lattice - lattice.mean(0), axis=1), kind="stable")
        jitter = np.random.default_rng(atoms).uniform(-0.1, 0.1, (atoms, 3))
        start = lattice[nearest[:atoms]] + jitter
        yield f"Lennard-Jones {atoms}", lennard_jones, start.ravel()


def _rough(dtype):
    """No smooth minimum, or none at all, or noise: what cannot be solved must say so."""
    centre = rounded(np.linspace(-1, 2, 10), dtype)
    rows = rounded(np.random.default_rng(0).normal(size=(20, 10)), dtype)
    ones, tens = np.ones(10), np.full(10, 0.3)
    yield "sum of moduli", lambda x: jnp.sum(jnp.abs(x - centre)), ones
    yield "largest of planes", lambda x: jnp.max(rows @ x), ones
    yield "square root", lambda x: jnp.sum(jnp.sqrt(jnp.abs(x - centre))), ones
    yield "kinked bowl", lambda x: jnp.sum(x**2) + jnp.abs(x[0] - 0.5), ones
    yield "rounded", lambda x: jnp.sum((jnp.round(100 * x) / 100 - centre) ** 2), ones
    yield "staircase", lambda x: jnp.sum((x - centre) ** 2) + 0.1 * jnp.sum(jnp.floor(x)), ones
    yield "fast ripple", lambda x: jnp.sum(x**2) + 1e-6 * jnp.sum(jnp.sin(1e5 * x)), ones
    yield "cancelling", lambda x: (1e8 + jnp.sum((x - centre) ** 2)) - 1e8, ones
    yield "logarithm", lambda x: jnp.sum(x - centre * jnp.log(jnp.abs(x))), ones
    yield "barrier", lambda x: jnp.sum(x**2 - 1e-3 * jnp.log(0.31 - x)), tens
    yield "cosines", lambda x: jnp.sum(jnp.cos(x) + 0.01 * x**2), tens
    yield "plane", jnp.sum, ones
    yield "falling away", lambda x: jnp.sum(jnp.exp(-x)), ones
    yield "flat", lambda x: 0 * jnp.sum(x), ones
    yield "not a number", lambda x: jnp.sum(jnp.log(-x)), ones
    yield "ReLU network", _relu_network(dtype), np.random.default_rng(3).normal(size=136) / 3


def _relu_network(dtype):
    X, y, _, _ = standardised(load_wine, dtype)

    def fun(w):
        first, bias, last = jnp.split(w, [104, 112])
        logits = jax.nn.relu(X @ first.reshape(13, 8) + bias) @ last.reshape(8, 3)
        return jnp.mean(cross_entropies(logits, y))

    return fun


FAMILIES = {
    "MGH": _more_garbow_hillstrom,
    "CUTEst": _cutest,
    "regression": _regressions,
    "network": _networks,
    "cluster": _clusters,
    "rough": _rough,
}
