"""On one accelerator: is it right, how fast are batches, and what does a large problem cost?

    python benchmarks/accelerator.py [--quick] [--only a,b] [--results x.json] [--output x.png]

It takes less than seven minutes with all compiling (`--budget`, in seconds). What is left when the
time is over is skipped, with a line that says so. `--quick` is a small version for the CPU.

- correctness: hypergradients of a ridge regression, a softmax regression on scikit-learn's digits
  with a weight decay for each feature, and a small network, under `jit`, `vmap` and `jacrev`, in
  both precisions, against dense Newton steps and dense solves in float64 on the host. In float32
  it is honesty that is checked: an error is below the tolerance, or a result code other than
  `successful`, a NaN, or an error estimate of at least a third of it tells. That is done at the
  highest precision of matrix products and at the default one, TF32 on recent GPUs. Then failed
  lanes, callbacks and the progress bar.
- networks, heads: batches of networks 1-40-40-1 (iMAML on sinusoids) and of logistic regressions in
  20 variables, vmapped, in float32: tasks per second with their hypergradients, ours and those of
  JAXopt and Optimistix, each at two tolerances. Errors are medians over the first 16 tasks,
  relative to a dense solve in float64 at a minimizer that Newton steps polished. The batches run
  without `jax_enable_x64`, which Optimistix's L-BFGS needs for float32. The ratio is the
  time of a batch over that of as many batched evaluations as its slowest lane takes, products with
  the Hessian counted as evaluations.
- large: a smoothing of 1e6 values and a logistic regression on 1e5 samples in 1e3 variables: the
  time of a hypergradient over that of its evaluations and products alone.
- compiling: seconds for tracing and for XLA.
- raising: whether a failed solve raises.

JAXopt, Optimistix, scikit-learn, Matplotlib and tqdm may be missing: what needs them is left out,
or stood in for, and a line says so. Except in `correctness`, matrix products are of the highest
precision.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import difflbfgs as dl
import harness

jax.config.update("jax_enable_x64", True)

PACKAGES = (
    *("difflbfgs", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "equinox", "optax"),
    *("lineax", "optimistix", "jaxopt", "scikit-learn", "numpy"),
)
CODES = (
    *("successful", "precision_limit", "max_steps_reached", "nonfinite_start", "unbounded"),
    *("line_search_failed", "adjoint_not_converged", "indefinite_hessian"),
)
TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
PRECISIONS = (("float64", "highest"), ("float32", "highest"), ("float32", "default"))
LANES = 3  # of a vmapped check
JACOBIAN_ROWS = 6
SIZES = (32, 256, 1024, 4096)
CHECKED = 16
PROXIMAL = 2.0
MAX_STEPS = 1000
# A run that takes longer is run once; after one that takes much longer, larger ones are left out.
LONG, TOO_LONG = 10.0, 15.0
# No case is begun with fewer seconds left.
LEAST_LEFT = 30.0
LOOP = 20  # evaluations that are timed together


def optional(name: str) -> Any:
    """Return a module, or `None` if it or what it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@dataclasses.dataclass
class Run:
    """What is measured, until when, and what came out.

    Attributes:
        options: the command line.
        begin: when it began.
        rows: what was measured.
        skipped: what the time did not suffice for, or what is not installed.
        failed: what raised.
    """

    options: argparse.Namespace
    begin: float = dataclasses.field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)

    @property
    def quick(self) -> bool:
        """Whether a small version is wanted."""
        return self.options.quick

    def elapsed(self) -> float:
        """Return the seconds since the begin."""
        return time.perf_counter() - self.begin

    def attempt(self, name: str, case: Callable[[], Any], needed: float = LEAST_LEFT) -> Any:
        """Return what a case returns, or `None` if there is no time for it or it raises."""
        if self.options.budget - self.elapsed() < needed:
            self.skip(name, f"{self.elapsed():.0f} s are over")
            return None
        try:
            return case()
        except Exception:  # the other cases are worth having
            traceback.print_exc(limit=-3)
            self.failed.append(name)
            print(f"FAILED {name}", flush=True)
            return None

    def skip(self, name: str, why: str) -> None:
        """Say and note what is left out."""
        self.skipped.append(f"{name}: {why}")
        print(f"skipped {name}: {why}", flush=True)

    def add(self, section: str, row: dict[str, Any], text: str) -> None:
        """Print and keep a row."""
        self.rows.append({"section": section, **row})
        print(text, flush=True)

    def save(self) -> None:
        """Save everything so far."""
        path = self.options.results
        if path is None:
            return
        found = {
            "quick": self.quick,
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "device": f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}",
            "versions": versions(),
            "seconds": self.elapsed(),
            "skipped": self.skipped,
            "failed": self.failed,
            "rows": self.rows,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed, and of what drives the device."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["platform"] = " ".join(jax.devices()[0].client.platform_version.split())
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        found["driver"] = asked.stdout.strip()
    return found


def compiled_together(lowered: Mapping[Any, Any]) -> dict[Any, concurrent.futures.Future]:
    """Have several threads compile what was traced."""
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return {key: pool.submit(each.compile) for key, each in lowered.items()}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a run returns, and its median seconds; of a long one, those of the first."""
    begin = time.perf_counter()
    found = jax.block_until_ready(run())
    first = time.perf_counter() - begin
    return found, first if first > LONG else harness.seconds({0: run}, 3, LONG)[0]


def code(result: Any) -> str:
    """Return the name of the one result that all lanes have, or `mixed`."""
    names = [name for name in CODES if bool(jnp.all(result == getattr(dl.RESULTS, name)))]
    return names[0] if names else "mixed"


def relative(found: Any, exact: Any) -> float:
    """Return the error in the 2-norm over the norm."""
    found, exact = np.asarray(found, np.float64), np.asarray(exact)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


# Correctness


@dataclasses.dataclass(frozen=True)
class Case:
    """A bilevel problem `F(x*(p))`, `x*(p) = argmin f(x, p)`, whose numbers float32 can hold.

    Attributes:
        name: what tables call it.
        inner: `f`, of variables, hyperparameters and data.
        outer: `F`, of the minimizer and data.
        start: where the solve starts.
        params: the hyperparameters `p`.
        data: what else the objectives read.
    """

    name: str
    inner: Callable
    outer: Callable
    start: np.ndarray
    params: np.ndarray
    data: tuple[np.ndarray, ...]

    def at(self, dtype: Any) -> tuple[Any, Any, Any]:
        """Return hyperparameters, start and data in this precision."""
        return jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype if leaf.dtype.kind == "f" else leaf.dtype),
            (self.params, self.start, self.data),
        )


def rounded(values: Any) -> np.ndarray:
    """Return values that float32 can hold, in float64."""
    return np.asarray(values, np.float32).astype(np.float64)


def ridge() -> Case:
    """Return a ridge regression with a penalty for each of eight variables."""
    rng = np.random.default_rng(0)
    X, Xv = rng.normal(size=(2, 30, 8))
    y, yv = (A @ np.arange(8) / 8 + 0.3 * rng.normal(size=30) for A in (X, Xv))

    def inner(w, p, data):
        X, y, _, _ = data
        return jnp.mean((X @ w - y) ** 2) + jnp.sum(jnp.exp(p) * w**2)

    def outer(w, data):
        _, _, X, y = data
        return jnp.mean((X @ w - y) ** 2)

    data = tuple(rounded(each) for each in (X, y, Xv, yv))
    return Case("ridge", inner, outer, np.zeros(8), rounded(np.linspace(-3, 0, 8)), data)


def ridge_in_closed_form(p: Any, data: Any) -> Any:
    """Return the outer loss of the ridge regression at its minimizer."""
    X, y, Xv, yv = data
    w = jnp.linalg.solve(X.T @ X / len(y) + jnp.diag(jnp.exp(p)), X.T @ y / len(y))
    return jnp.mean((Xv @ w - yv) ** 2)


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first of scikit-learn's digits, or noisy prototypes if that is missing."""
    if optional("sklearn"):
        X, y = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
        return X[:count] / 16, y[:count]
    print("scikit-learn is not installed: noisy prototypes stand in for its digits")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, count)
    return np.clip(rng.uniform(size=(10, 64))[y] + 0.4 * rng.normal(size=(count, 64)), 0, 1), y


def digits(samples: int) -> Case:
    """Return a softmax regression in 640 variables with a weight decay for each feature."""
    X, y = images(2 * samples)

    def cross_entropy(w, X, y):
        return -jnp.mean(jax.nn.log_softmax(X @ w.reshape(64, 10))[jnp.arange(len(y)), y])

    def inner(w, p, data):
        X, y, _, _ = data
        decay = jnp.sum(jnp.exp(p)[:, None] * w.reshape(64, 10) ** 2)
        return cross_entropy(w, X, y) + decay / 2

    def outer(w, data):
        _, _, X, y = data
        return cross_entropy(w, X, y)

    halves = rounded(X[:samples]), y[:samples], rounded(X[samples:]), y[samples:]
    return Case("digits", inner, outer, np.zeros(640), np.full(64, -4.0), halves)


def small_network() -> Case:
    """Return a network 4-12-1 that is held near its meta-parameters."""
    rng = np.random.default_rng(0)
    X = rounded(rng.normal(size=(80, 4)))
    y = rounded(np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2])

    def predict(w, X):
        A, a, b = w[:48].reshape(4, 12), w[48:60], w[60:72]
        return jnp.tanh(X @ A + a) @ b + w[72]

    def inner(w, p, data):
        X, y, _, _ = data
        return jnp.mean((predict(w, X) - y) ** 2) + jnp.sum((w - p) ** 2) / 4

    def outer(w, data):
        _, _, X, y = data
        return jnp.mean((predict(w, X) - y) ** 2)

    meta = rounded(rng.normal(size=73) / 2)
    return Case("network", inner, outer, meta, meta, (X[:40], y[:40], X[40:], y[40:]))


def newton(fun: Callable, x: Any) -> Any:
    """Return a minimizer by Newton's method with Levenberg's damping, 60 steps at most."""
    gradient, hessian = jax.grad(fun), jax.hessian(fun)

    def ahead(carry):
        x, _, count = carry
        return (jnp.linalg.norm(gradient(x)) > 1e-13) & (count < 60)

    def step(carry):
        x, damping, count = carry
        H = hessian(x) + damping * jnp.eye(x.size)
        trial = x - jnp.linalg.solve(H, gradient(x))
        # By the gradient where the values no longer tell.
        lower = (fun(trial) < fun(x)) | (
            jnp.linalg.norm(gradient(trial)) < jnp.linalg.norm(gradient(x))
        )
        return jnp.where(lower, trial, x), damping * jnp.where(lower, 0.1, 10.0), count + 1

    return jax.lax.while_loop(ahead, step, (x, 1e-2, 0))[0]


@dataclasses.dataclass
class Exact:
    """What is compared with, by the host in float64.

    Attributes:
        gradient: the hypergradient.
        jacobian: some rows of the derivative of the minimizer.
        residual: the norm of the inner gradient that is left.
    """

    gradient: np.ndarray
    jacobian: np.ndarray
    residual: float


def reference(case: Case) -> list[Exact]:
    """Return the exact results for every lane."""

    @jax.jit
    def solve(p, x, data):
        x = newton(lambda x: case.inner(x, p, data), x)
        gradient = jax.grad(case.inner)
        H = jax.hessian(case.inner)(x, p, data)
        mixed = jax.jacrev(gradient, argnums=1)(x, p, data)
        slope = jax.grad(case.outer)(x, data)
        picked = jnp.eye(x.size)[rows_of(x)]
        u = -jnp.linalg.solve(H, jnp.concatenate([slope[None], picked]).T).T @ mixed
        return u[0], u[1:], jnp.linalg.norm(gradient(x, p, data))

    with jax.default_device(jax.devices("cpu")[0]):
        found = [solve(p, case.start, case.data) for p in lanes(case.params)]
        return [Exact(np.asarray(g), np.asarray(J), float(r)) for g, J, r in found]


def rows_of(x: Any) -> np.ndarray:
    """Return the variables whose derivatives are compared."""
    return np.linspace(0, x.size - 1, JACOBIAN_ROWS).astype(int)


def lanes(params: np.ndarray) -> np.ndarray:
    """Return the hyperparameters of every lane, those of the case first."""
    return rounded(params + np.outer(np.arange(LANES) / 8, np.cos(np.arange(params.size))))


def minimized(case: Case, p: Any, start: Any, data: Any) -> dl.Solution:
    """Return the library's solution at its defaults."""
    return dl.minimize(lambda w, p: case.inner(w, p, data), start, p, throw=False)


def ways(case: Case, dtype: str, quick: bool) -> dict[str, tuple[Callable, tuple]]:
    """Return the programs that are checked, with their arguments."""
    p, start, data = case.at(dtype)

    def loss(p, start, data):
        sol = minimized(case, p, start, data)
        return case.outer(sol.value, data), sol.result

    def derivatives(p, start, data):
        def both(p):
            sol = minimized(case, p, start, data)
            return (case.outer(sol.value, data), sol.value[rows_of(start)]), sol.result

        return jax.jacrev(both, has_aux=True)(p)

    def certified(p, start, data):
        step = dl.value_and_hypergrad(
            lambda w, _: case.outer(w, data), lambda w, p: case.inner(w, p, data), throw=False
        )
        _, gradient, info = step(p, start)
        return gradient, info.result, info.error_estimate

    one, many = (p, start, data), (jnp.asarray(lanes(case.params), dtype), start, data)
    found = {
        "jacrev": (derivatives, one),
        "vmap": (jax.vmap(jax.grad(loss, has_aux=True), (0, None, None)), many),
        "value_and_hypergrad": (certified, one),
    }
    if quick:  # compiling takes most of the time
        names = ("jacrev", "vmap") if dtype == "float64" else ("value_and_hypergrad",)
        return {name: found[name] for name in names}
    return found


def accuracy(case: Case, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each way to a derivative of this case, in each precision."""
    exact = reference(case)
    left = max(each.residual for each in exact)
    yield row(f"{case.name}, reference", left, 1e-12, left <= 1e-12)
    if case.name == "ridge":
        with jax.default_device(jax.devices("cpu")[0]):
            closed = jax.grad(ridge_in_closed_form)(case.params, case.data)
        error = relative(exact[0].gradient, closed)
        yield row("ridge, reference against closed form", error, 1e-10, error <= 1e-10)
    lowered, arguments = {}, {}
    for dtype, precision in PRECISIONS:
        if precision == "default" and jax.default_backend() == "cpu":
            continue  # the same as the highest
        with matmul_precision(precision):
            for way, (fun, args) in ways(case, dtype, quick).items():
                lowered[dtype, precision, way] = jax.jit(fun).lower(*args)
                arguments[dtype, precision, way] = args
    for key, made in compiled_together(lowered).items():
        dtype, _, way = key
        found, result, *estimates = made.result()(*arguments[key])
        for what, one, wanted in compared(way, found, exact):
            estimates = [float(each / np.linalg.norm(wanted)) for each in estimates]
            name = ", ".join((case.name, *key, *what))
            error = relative(one, wanted)
            yield judged(name, error, TOLERANCE[dtype], code(result), *estimates)


def compared(way: str, found: Any, exact: list[Exact]) -> list[tuple[tuple[str, ...], Any, Any]]:
    """Return what is compared with what, by names."""
    if way == "jacrev":
        gradient, jacobian = found
        return [
            (("gradient",), gradient, exact[0].gradient),
            (("minimizer",), jacobian, exact[0].jacobian),
        ]
    if way == "vmap":
        return [((), found, np.stack([each.gradient for each in exact]))]
    return [((), found, exact[0].gradient)]


def matmul_precision(precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which matrix products have this precision."""
    if precision == "default":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)


def row(name: str, error: float, tolerance: float, ok: bool, **more: Any) -> dict[str, Any]:
    """Return a row of a check."""
    return {"name": name, "error": float(error), "tolerance": tolerance, "ok": bool(ok), **more}


def judged(
    name: str, error: float, tolerance: float, result: str, estimate: float = 0.0
) -> dict[str, Any]:
    """Return a row; the estimate is relative, too.

    An error above the tolerance passes in float32 if the code or the estimate tells of it, or if
    the derivative was refused as NaN.
    """
    refused = bool(np.isnan(error))
    told = "float32" in name and (result != "successful" or refused or 3 * estimate >= error)
    ok = bool(error <= tolerance or told)
    return row(name, float(error), tolerance, ok, result=result, estimate=float(estimate))


def failed_lanes() -> Iterator[dict[str, Any]]:
    """Yield checks of a batch in which the data of the second task are NaN."""
    case = ridge()
    X, y, Xv, yv = (jnp.asarray(each) for each in case.data)
    ys = jnp.stack([y, y.at[3].set(jnp.nan), 2 * y])
    params = jnp.asarray(np.stack([case.params] * 3))

    def one(p, y):
        sol = minimized(case, p, jnp.asarray(case.start), (X, y, Xv, yv))
        return case.outer(sol.value, (X, y, Xv, yv)), sol.result

    def total(params, masked):
        losses, results = jax.vmap(one)(params, ys)
        used = (results == dl.RESULTS.successful) | ~masked
        return jnp.sum(jnp.where(used, losses, 0.0)), results

    compiled = jax.jit(jax.grad(total, has_aux=True))
    unmasked, results = compiled(params, False)
    masked, _ = compiled(params, True)
    good = np.array([0, 2])
    names = [code(jax.tree.map(lambda leaf, k=k: leaf[k], results)) for k in range(3)]
    wanted = ["successful", "nonfinite_start", "successful"]
    yield row("failed lane, codes", 0.0, 0.0, names == wanted, result=", ".join(names))
    yield row("failed lane, gradient is NaN", 0.0, 0.0, bool(np.all(np.isnan(unmasked[1]))))
    stray = float(jnp.max(jnp.abs(masked[1])))
    yield row("failed lane, masked out", stray, 0.0, stray == 0)
    exact = [jax.grad(ridge_in_closed_form)(case.params, (X, ys[k], Xv, yv)) for k in good]
    for name, found in (("unmasked", unmasked), ("masked", masked)):
        error = relative(found[good], np.stack(exact))
        yield row(f"failed lane, the others, {name}", error, 1e-6, error <= 1e-6)


def watching() -> Iterator[dict[str, Any]]:
    """Yield checks of callbacks and of the progress bar."""
    case = ridge()
    p, start, data = case.at("float64")

    def solve(p, callback):
        objective = lambda w, p: case.inner(w, p, data)
        found = jax.jit(lambda p: dl.minimize(objective, start, p, callback=callback).stats)(p)
        jax.block_until_ready(found)
        jax.effects_barrier()
        return found

    seen: list[int] = []
    stats = solve(p, lambda step: seen.append(int(step.num_steps)))
    expected = list(range(1, int(stats.num_steps) + 1))
    yield row("callback, every step in turn", 0.0, 0.0, seen == expected, seen=len(seen))
    if optional("tqdm") is None:
        print("skipped progress bar: tqdm is not installed")
        return
    with contextlib.redirect_stderr(io.StringIO()):
        stats = solve(p, dl.progress_bar())
    yield row("progress bar", 0.0, 0.0, int(stats.num_steps) > 0)


def raising() -> Iterator[dict[str, Any]]:
    """Yield checks that a failed solve raises under `jit`, also if only its gradient is used."""
    case = ridge()
    p, start, data = case.at("float64")

    def loss(p, data):
        return jnp.sum(dl.minimize(lambda w, p: case.inner(w, p, data), start, p).value)

    for name, fun in (("value", loss), ("gradient", jax.grad(loss))):
        message = ""
        try:
            jax.block_until_ready(jax.jit(fun)(p, (data[0] * jnp.nan, *data[1:])))
        except RuntimeError as error:
            message = str(error)
        told = "NaN or infinite at the starting point" in message
        yield row(f"raises under jit, {name}", 0.0, 0.0, told)


def checks(quick: bool) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """Return the checks by their names."""
    cases = (ridge, small_network, functools.partial(digits, 100 if quick else 300))
    found: dict[str, Any] = {
        name: lambda make=make: accuracy(make(), quick)
        for name, make in zip(("ridge", "network", "digits"), cases, strict=True)
    }
    return found | {"failed lanes": failed_lanes, "watching": watching}


def correctness(quick: bool = True) -> list[dict[str, Any]]:
    """Return the rows of all checks: name, error, tolerance and whether it is `ok`."""
    return [each for check in (*checks(quick).values(), raising) for each in check()]


def check_all(run: Run) -> None:
    """Run the checks but those that raise."""
    for name, check in checks(run.quick).items():
        run.attempt(f"check of {name}", lambda check=check: add_checks(run, check))
        run.save()


def add_checks(run: Run, check: Callable[[], Iterator[dict[str, Any]]]) -> None:
    """Print and keep the rows of one check."""
    for each in check():
        text = f"{'ok' if each['ok'] else 'NOT OK':6s} {each['name']:46s} {each['error']:8.1e}"
        text += f" of {each['tolerance']:7.0e}  {each.get('result', '')}"
        if each.get("estimate"):
            text += f", estimate {each['estimate']:.1e}"
        run.add("correctness", each, text)


# Batches


@dataclasses.dataclass(frozen=True)
class Family:
    """Tasks that share hyperparameters, in float32.

    Attributes:
        name: what tables call it.
        inner: the training loss, of variables, hyperparameters and training data.
        outer: the validation loss, of the minimizer and validation data.
        start: where solves start.
        params: the hyperparameters.
        tasks: from a count to training and validation data.
        settings: of each contestant the tolerances that are tried.
    """

    name: str
    inner: Callable
    outer: Callable
    start: Any
    params: Any
    tasks: Callable[[int], Any]
    settings: Mapping[str, tuple[float, ...]]


def networks() -> Family:
    """Return networks 1-40-40-1, fitted to ten points of a sinusoid near meta-parameters."""
    rng = np.random.default_rng(0)
    shapes = ((1, 40), (40,), (40, 40), (40,), (40, 1), (1,))
    meta = [rng.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes]
    ends = np.cumsum([each.size for each in meta])

    def predict(w, x):
        A, a, B, b, C, c = (
            part.reshape(shape) for part, shape in zip(jnp.split(w, ends[:-1]), shapes, strict=True)
        )
        return jnp.tanh(jnp.tanh(x @ A + a) @ B + b) @ C + c

    def outer(w, data):
        x, y = data
        return jnp.mean((predict(w, x) - y) ** 2)

    def inner(w, meta, data):
        return outer(w, data) + PROXIMAL / 2 * jnp.sum((w - meta) ** 2)

    def tasks(count):
        rng = np.random.default_rng(1)
        x = rng.uniform(-5, 5, (SIZES[-1], 20, 1))
        amplitude, phase = rng.uniform((0.1, 0.0), (5.0, np.pi), (SIZES[-1], 2)).T[:, :, None, None]
        pairs = (x, amplitude * np.sin(x + phase))
        return tuple(
            tuple(jnp.asarray(each[:count, half], jnp.float32) for each in pairs)
            for half in (slice(10), slice(10, None))
        )

    start = jnp.asarray(np.concatenate([each.ravel() for each in meta]), jnp.float32)
    settings = {"difflbfgs": (1e-2, 3.5e-4), "JAXopt": (1e-3, 1e-4), "Optimistix": (1e-4, 1e-6)}
    return Family("networks", inner, outer, start, start, tasks, settings)


def heads() -> Family:
    """Return logistic regressions in 20 variables on 40 samples, with shared weight decays."""

    def outer(w, data):
        X, y = data
        return jnp.mean(jax.nn.softplus(-y * (X @ w)))

    def inner(w, decays, data):
        return outer(w, data) + jnp.sum(jnp.exp(decays) * w**2) / 2

    def tasks(count):
        rng = np.random.default_rng(2)
        X, truth = rng.normal(size=(SIZES[-1], 80, 20)), rng.normal(size=(SIZES[-1], 20, 1))
        y = np.sign(X @ truth + rng.normal(size=(SIZES[-1], 80, 1)))[..., 0]
        return tuple(
            tuple(jnp.asarray(each[:count, half], jnp.float32) for each in (X, y))
            for half in (slice(40), slice(40, None))
        )

    start, decays = jnp.zeros(20, jnp.float32), jnp.full(20, -4.0, jnp.float32)
    settings = {"difflbfgs": (1e-2, 3.5e-4), "JAXopt": (1e-4, 1e-5), "Optimistix": (1e-4, 1e-6)}
    return Family("heads", inner, outer, start, decays, tasks, settings)


def ours(family: Family, params: Any, task: Any, tolerance: Any) -> tuple[Any, Any, Any]:
    """Return hypergradient, evaluations and products by `difflbfgs.value_and_hypergrad`."""
    train, valid = task
    step = dl.value_and_hypergrad(
        lambda w, _: family.outer(w, valid),
        lambda w, params: family.inner(w, params, train),
        solver=dl.LBFGS(rtol=tolerance),
        max_steps=MAX_STEPS,
        throw=False,
    )
    _, gradient, info = step(params, family.start)
    stats = info.solution.stats
    return gradient, stats.num_fun_evals, stats.num_hvps + info.num_adjoint_steps


def through(family: Family, solve: Callable, params: Any, task: Any) -> tuple[Any, Any, Any]:
    """Return hypergradient and evaluations, given `solve(objective, params)` of a peer."""
    train, valid = task

    def loss(params):
        w, evaluations = solve(lambda w, params: family.inner(w, params, train), params)
        return family.outer(w, valid), evaluations

    gradient, evaluations = jax.grad(loss, has_aux=True)(params)
    return gradient, evaluations, jnp.zeros_like(evaluations)


def by_jaxopt(family: Family, params: Any, task: Any, tolerance: Any) -> tuple[Any, Any, Any]:
    """Return what `ours` does by `jaxopt.LBFGS`, with `solve_cg` for the adjoint."""
    jaxopt, linear = optional("jaxopt"), importlib.import_module("jaxopt.linear_solve")
    adjoint = functools.partial(linear.solve_cg, tol=tolerance, maxiter=MAX_STEPS)

    def solve(objective, params):
        solver = jaxopt.LBFGS(
            objective, tol=tolerance, maxiter=MAX_STEPS, implicit_diff_solve=adjoint
        )
        found = solver.run(family.start, params)
        return found.params, found.state.num_fun_eval

    return through(family, solve, params, task)


def by_optimistix(family: Family, params: Any, task: Any, tolerance: Any) -> tuple[Any, Any, Any]:
    """Return what `ours` does by `optimistix.LBFGS`, with conjugate gradients for the adjoint."""
    optimistix, lineax = optional("optimistix"), optional("lineax")
    linear_solver = lineax.CG(tolerance, tolerance, max_steps=MAX_STEPS)

    def solve(objective, params):
        found = optimistix.minimise(
            objective,
            optimistix.LBFGS(tolerance, tolerance),
            family.start,
            params,
            adjoint=optimistix.ImplicitAdjoint(linear_solver),
            tags=frozenset({lineax.positive_semidefinite_tag}),
            max_steps=MAX_STEPS,
            throw=False,
        )
        return found.value, found.stats["num_steps"]

    return through(family, solve, params, task)


CONTESTANTS = {"difflbfgs": ours, "JAXopt": by_jaxopt, "Optimistix": by_optimistix}


def installed(run: Run) -> dict[str, Callable]:
    """Return the contestants that are there."""
    found = {}
    for name, contestant in CONTESTANTS.items():
        if optional(name.lower()):
            found[name] = contestant
        else:
            run.skip(name, "not installed")
    return found


def exact_gradients(family: Family, count: int) -> np.ndarray:
    """Return the hypergradients of the first tasks in float64, from dense Hessians."""
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)
    start, params = wide((family.start, family.params))

    def minimizer(train):
        objective = lambda w, params: family.inner(w, params, train)
        return dl.minimize(objective, start, params, max_steps=5000, throw=False).value

    def gradient(given):
        w, (train, valid) = given
        slope, hessian = jax.grad(family.inner), jax.hessian(family.inner)
        for _ in range(2):
            w = w - jnp.linalg.solve(hessian(w, params, train), slope(w, params, train))
        u = jnp.linalg.solve(hessian(w, params, train), jax.grad(family.outer)(w, valid))
        return -jax.vjp(lambda params: slope(w, params, train), params)[1](u)[0]

    tasks = wide(family.tasks(count))
    minimizers = jax.jit(jax.vmap(minimizer))(tasks[0])
    return np.asarray(jax.jit(lambda given: jax.lax.map(gradient, given))((minimizers, tasks)))


def batched(family: Family, contestant: Callable) -> Callable:
    """Return the vmapped program `(params, tasks, tolerance)`."""
    return jax.vmap(functools.partial(contestant, family), (None, 0, None))


def batches(run: Run, family: Family) -> None:
    """Measure every contestant on batches of growing size."""
    sizes = (8,) if run.quick else SIZES
    contestants = installed(run)
    checked = 2 if run.quick else CHECKED
    exact = run.attempt(f"{family.name}, reference", lambda: exact_gradients(family, checked))
    if exact is None:
        return
    for count in sizes:
        name = f"{family.name}, {count} tasks"
        with jax.enable_x64(False):
            slow = run.attempt(
                name, lambda count=count: batch(run, family, count, contestants, exact)
            )
        for each in slow or ():
            run.skip(f"{each}, more than {name}", f"takes over {TOO_LONG:.0f} s")
            del contestants[each]
        run.save()


def batch(
    run: Run, family: Family, count: int, contestants: Mapping[str, Callable], exact: np.ndarray
) -> list[str]:
    """Measure the contestants on one batch; return which are too slow for larger ones."""
    tasks = family.tasks(count)
    starts = jnp.broadcast_to(family.start, (count, family.start.size))

    def total(starts, train):
        return jnp.sum(jax.vmap(family.inner, (0, None, 0))(starts, family.params, train))

    evaluate = jax.jit(harness.evaluations(total, LOOP))
    one = timed(lambda: evaluate(starts, tasks[0]))[1] / LOOP
    lowered = {}
    for name, contestant in contestants.items():
        trace = jax.jit(batched(family, contestant)).lower
        traced = run.attempt(
            f"tracing {name}, {family.name}, {count} tasks",
            functools.partial(trace, family.params, tasks, 1e-3),
        )
        if traced is not None:
            lowered[name] = traced
    slow = []
    for name, made in compiled_together(lowered).items():
        for tolerance in family.settings[name]:
            label = f"{name} {tolerance:g}, {family.name}, {count} tasks"
            if name in slow:
                run.skip(label, "too slow")
                continue
            measured = run.attempt(
                label,
                lambda made=made, tolerance=tolerance: batch_row(
                    lambda: made.result()(family.params, tasks, tolerance), exact, one
                ),
                LEAST_LEFT / 3,  # it is compiled
            )
            if measured:
                add_batch(run, family, count, f"{name} {tolerance:g}", measured)
                if measured["seconds"] > TOO_LONG:
                    slow.append(name)
    return slow


def batch_row(program: Callable[[], Any], exact: np.ndarray, one: float) -> dict[str, Any]:
    """Run and time the program of a batch, `one` being the seconds of a batched evaluation."""
    found, seconds = timed(program)
    gradients, evaluations, products = map(np.asarray, found)
    errors = [relative(*pair) for pair in zip(gradients, exact, strict=False)]
    return {
        "seconds": seconds,
        "median_error": float(np.median(errors)),
        "flagged": int(np.sum(~np.isfinite(gradients).all(1))),
        "evaluation_seconds": one,
        "evaluations": int(evaluations.max()),
        "evaluations_of_all": int(evaluations.sum()),
        "products": int(products.max()),
        "products_of_all": int(products.sum()),
        "ratio": seconds / (one * int((evaluations + products).max())),
    }


def add_batch(run: Run, family: Family, count: int, solver: str, measured: dict[str, Any]) -> None:
    """Print and keep the row of a batch."""
    row = {"tasks": count, "solver": solver, **measured}
    run.add(
        family.name,
        row,
        f"{count:5d} {family.name:8s} {solver:18s} {row['seconds']:9.4f} s "
        f"{count / row['seconds']:9.1f} /s, error {row['median_error']:.1e}, "
        f"{row['flagged']} NaN, slowest {row['evaluations']} evaluations + {row['products']} "
        f"products of {1e3 * row['evaluation_seconds']:.3f} ms: {row['ratio']:.2f} times",
    )


# One large problem


def smoothing(n: int) -> tuple[Callable, Callable, Any, Any, Any]:
    """Smooth a noisy step signal with a pseudo-Huber penalty; weight and width are learned."""
    rng = np.random.default_rng(0)
    clean = np.repeat(rng.normal(size=-(-n // 25)), 25)[:n]

    def inner(x, params, data):
        weight, width = jnp.exp(params)
        jumps = jnp.sqrt(1 + ((x[1:] - x[:-1]) / width) ** 2) - 1
        return (jnp.sum((x - data[0]) ** 2) / 2 + weight * width**2 * jnp.sum(jumps)) / n

    def outer(x, data):
        return jnp.mean((x - data[1]) ** 2)

    data = rounded(clean + 0.3 * rng.normal(size=n)), rounded(clean)
    return inner, outer, np.zeros(n), np.array([1.0, -1.0]), data


def wide_logistic(samples: int, features: int) -> tuple[Callable, Callable, Any, Any, Any]:
    """Fit a logistic regression with a weight decay for each feature; the device makes the data."""
    keys = jax.random.split(jax.random.key(0), 5)
    scale = features**-0.5
    X = scale * jax.random.normal(keys[0], (samples, features), jnp.float32)
    Xv = scale * jax.random.normal(keys[1], (1000, features), jnp.float32)
    truth = 3 * jax.random.normal(keys[2], (features,), jnp.float32)
    y, yv = (
        jnp.sign(A @ truth + jax.random.normal(key, (len(A),), jnp.float32))
        for A, key in ((X, keys[3]), (Xv, keys[4]))
    )

    def losses(w, X, y):
        return jnp.mean(jax.nn.softplus(-y * (X @ w)))

    def inner(w, params, data):
        return losses(w, *data[0]) + jnp.sum(jnp.exp(params) * w**2) / 2

    def outer(w, data):
        return losses(w, *data[1])

    return inner, outer, np.zeros(features), np.full(features, -8.0), ((X, y), (Xv, yv))


def products(fun: Callable, count: int) -> Callable:
    """Return a program `(x, *args)` of so many products with the Hessian of `fun`."""

    def run(x, *args):
        gradient = lambda x: jax.grad(fun)(x, *args)
        turn = lambda _, v: v + 1e-9 * jax.jvp(gradient, (x,), (v,))[1]
        return jax.lax.fori_loop(0, count, turn, jnp.ones_like(x))

    return run


def large(run: Run) -> None:
    """Measure the large problems, the more exact precision first."""
    n, samples, features = (10_000, 1000, 50) if run.quick else (1_000_000, 100_000, 1000)
    problems = {
        f"smoothing, {n} variables": lambda: smoothing(n),
        f"logistic, {samples} x {features}": lambda: wide_logistic(samples, features),
    }
    for name, make in problems.items():
        run.attempt(name, lambda name=name, make=make: large_problem(run, name, make()))
        run.save()


def large_problem(run: Run, name: str, problem: tuple[Callable, Callable, Any, Any, Any]) -> None:
    """Measure one problem in both precisions, against a tight solve in float64."""
    inner, outer, *numbers = problem

    @jax.jit
    def program(start, params, data, rtol):
        step = dl.value_and_hypergrad(
            lambda x, _: outer(x, data),
            lambda x, params: inner(x, params, data),
            solver=dl.LBFGS(rtol=rtol),
            throw=False,
        )
        _, gradient, info = step(params, start)
        stats = info.solution.stats
        counts = stats.num_fun_evals, stats.num_hvps + info.num_adjoint_steps
        return gradient, counts, info.result

    exact = program(*in_precision(numbers, "float64"), 1e-10)[0]
    for dtype in ("float64", "float32"):
        add_large(run, name, dtype, inner, program, in_precision(numbers, dtype), exact)


def in_precision(numbers: Any, dtype: str) -> Any:
    """Return arrays of this dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), numbers)


def add_large(
    run: Run, name: str, dtype: str, inner: Callable, program: Callable, given: Any, exact: Any
) -> None:
    """Measure, print and keep a large problem in one precision, at the default tolerance."""
    rtol = float(np.sqrt(jnp.finfo(dtype).eps))
    evaluate, multiply = jax.jit(harness.evaluations(inner, LOOP)), jax.jit(products(inner, LOOP))
    (gradient, counts, result), whole = timed(lambda: program(*given, rtol))
    one = timed(lambda: evaluate(*given))[1] / LOOP
    product = timed(lambda: multiply(*given))[1] / LOOP
    num_evaluations, num_products = map(int, counts)
    row = {
        "name": name,
        "dtype": dtype,
        "seconds": whole,
        "error": relative(gradient, exact),
        "result": code(result),
        "evaluations": num_evaluations,
        "products": num_products,
        "evaluation_seconds": one,
        "product_seconds": product,
        "ratio": whole / (num_evaluations * one + num_products * product),
    }
    run.add(
        "large",
        row,
        f"{name:28s} {dtype} {whole:8.4f} s, error {row['error']:.1e}, {row['result']}, "
        f"{num_evaluations} evaluations of {1e3 * one:.3f} ms and {num_products} products of "
        f"{1e3 * product:.3f} ms: {row['ratio']:.2f} times",
    )


# Compiling


def compiling(run: Run) -> None:
    """Measure tracing and XLA, one program at a time."""
    count = 4 if run.quick else 256
    contestants = installed(run)
    for family, many in ((heads(), False), (networks(), True))[: 1 if run.quick else 2]:
        tasks = family.tasks(count)
        for name, contestant in contestants.items():
            if many:
                fun, given = batched(family, contestant), tasks
            else:
                fun = functools.partial(contestant, family)
                given = jax.tree.map(lambda leaf: leaf[0], tasks)
            what = f"{family.name}, {count} tasks" if many else f"{family.name}, one task"
            run.attempt(
                f"compiling {what}, {name}",
                lambda what=what, name=name, fun=fun, args=(family.params, given, 1e-3): (
                    compile_one(run, what, name, fun, args)
                ),
            )


def compile_one(run: Run, what: str, name: str, fun: Callable, args: tuple) -> None:
    """Measure one program, with nothing of it traced before."""
    jax.clear_caches()
    with jax.enable_x64(False):
        made = harness.compiled(fun, *args)
    row = {
        "name": what,
        "solver": name,
        "trace_seconds": made.trace_seconds,
        "compile_seconds": made.compile_seconds,
    }
    run.add(
        "compiling",
        row,
        f"{what:22s} {name:12s} tracing {made.trace_seconds:6.2f} s, "
        f"XLA {made.compile_seconds:6.2f} s",
    )


# The whole


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Save tasks per second against tasks, and what batches cost beyond their evaluations."""
    importlib.import_module("matplotlib").use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axis, family in zip(axes, ("networks", "heads"), strict=False):
        own = [row for row in rows if row["section"] == family]
        for k, solver in enumerate(dict.fromkeys(row["solver"] for row in own)):
            picked = [row for row in own if row["solver"] == solver]
            sizes = [row["tasks"] for row in picked]
            rates = [row["tasks"] / row["seconds"] for row in picked]
            error = picked[-1]["median_error"]
            axis.loglog(sizes, rates, "o-", color=f"C{k}", label=f"{solver}, error {error:.0e}")
            if solver.startswith("difflbfgs"):
                ratios = [row["ratio"] for row in picked]
                axes[2].semilogx(sizes, ratios, "o-", label=f"{family}, {solver}")
        axis.set(title=family, xlabel="tasks", ylabel="hypergradients per second")
    axes[2].set(xlabel="tasks", ylabel="time over that of the slowest lane's evaluations")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "correctness": check_all,
    "networks": lambda run: batches(run, networks()),
    "large": large,
    "heads": lambda run: batches(run, heads()),
    "compiling": compiling,
    # Last, so that what an exception leaves behind on the device can harm nothing else.
    "raising": lambda run: add_checks(run, raising),
}


def options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small version, for the CPU")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for everything")
    parser.add_argument("--results", type=pathlib.Path, help="where to save every number (JSON)")
    parser.add_argument("--output", type=pathlib.Path, help="where to save the picture (PNG)")
    found = parser.parse_args()
    found.only = found.only.split(",")
    unknown = set(found.only) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return found


def main() -> None:
    """Run the sections, save after each, draw, and fail if a check did or a case raised."""
    run = Run(options())
    print(f"{jax.default_backend()}: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()), flush=True)
    for name, section in SECTIONS.items():
        if name not in run.options.only:
            continue
        print(f"\n{name}, after {run.elapsed():.0f} s", flush=True)
        with matmul_precision("default" if name == "correctness" else "highest"):
            needed = 0.0 if name == "raising" else LEAST_LEFT
            run.attempt(name, lambda section=section: section(run), needed)
        run.save()
    if run.options.output:
        if optional("matplotlib"):
            run.options.output.parent.mkdir(parents=True, exist_ok=True)
            draw(run.rows, run.options.output)
        else:
            run.skip("picture", "matplotlib is not installed")
    wrong = [row["name"] for row in run.rows if not row.get("ok", True)]
    print(f"\n{run.elapsed():.0f} s, {len(run.skipped)} skipped, {len(run.failed)} failed")
    run.save()
    if wrong or run.failed:
        raise SystemExit(f"not ok: {wrong}, failed: {run.failed}")


if __name__ == "__main__":
    main()
