"""Ways to a hypergradient, as users of each package would write them, at their best settings.

A contestant makes a program `(theta, x0, setting) -> (hypergradient, evaluations)`. Evaluations are
those of the inner objective, most of them with its gradient, as the package counts them. A setting
is a tolerance, which is traced, so that one compilation serves all; or the number of steps of an
unrolled method. With the inner tolerance goes that of the adjoint, where the package lets one
choose.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import scipy.optimize
from jaxopt.linear_solve import solve_cg
from scipy.sparse.linalg import cg

import difflbfgs as dl
from problems.collection import Problem, linear_operator

MAX_STEPS = 5000
# Above so many variables a dense matrix is not assembled: minutes and gigabytes.
DENSE_LIMIT = 1000


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to compute hypergradients.

    Attributes:
        package: whose it is.
        variant: which of the package's settings differ from its defaults.
        make: from a problem to the program; if unrolled, from a problem and a number of steps.
        settings: tolerances to try, from loose to tight, or numbers of steps.
        compiled: the program is JAX's, to be compiled whole.
        unrolled: its settings are numbers of steps.
    """

    package: str
    variant: str
    make: Callable
    settings: tuple[Any, ...]
    compiled: bool = True
    unrolled: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.package}, {self.variant}" if self.variant else self.package


def through_minimizer(problem: Problem, solve: Callable) -> Callable:
    """Return the program, given `solve(theta, x0, setting) -> (minimizer, evaluations)`."""

    def loss(theta, x0, setting):
        x, evaluations = solve(theta, x0, setting)
        return problem.outer(x, theta), evaluations

    return jax.grad(loss, has_aux=True)


def difflbfgs(problem: Problem, adjoint: Any = dl.ImplicitAdjoint(), polish: int = 1) -> Callable:
    """`difflbfgs.minimize`; the adjoint as given, or to the square of the tolerance."""

    def solve(theta, x0, rtol):
        options: Any = {
            "solver": dl.LBFGS(rtol=rtol, polish=polish),
            "adjoint": dl.ImplicitAdjoint(rtol=rtol**2) if adjoint is None else adjoint,
        }
        sol = dl.minimize(problem.inner, x0, theta, max_steps=MAX_STEPS, throw=False, **options)
        return sol.value, sol.stats.num_fun_evals

    return through_minimizer(problem, solve)


def counts(problem: Problem, **settings: Any) -> tuple[int, int]:
    """Return evaluations and Hessian products of one hypergradient of ours."""
    step = dl.value_and_hypergrad(problem.outer, problem.inner, max_steps=MAX_STEPS, **settings)
    info = jax.jit(step)(problem.theta, problem.x0)[2]
    stats = info.solution.stats
    return int(stats.num_fun_evals), int(stats.num_hvps + info.num_adjoint_steps)


def by_jaxopt(problem: Problem, cg: bool = False) -> Callable:
    """`jaxopt.LBFGS`; its adjoint by normal equations at a fixed tolerance, or by `solve_cg`."""

    def solve(theta, x0, tol):
        settings: Any = {}
        if cg:
            adjoint = functools.partial(solve_cg, tol=tol, maxiter=MAX_STEPS)
            settings["implicit_diff_solve"] = adjoint
        solver = jaxopt.LBFGS(problem.inner, tol=tol, maxiter=MAX_STEPS, **settings)
        found = solver.run(x0, theta)
        return found.params, found.state.num_fun_eval

    return through_minimizer(problem, solve)


def by_optimistix(problem: Problem, solver: Callable, cg: bool = False) -> Callable:
    """`optimistix.minimise`; its adjoint dense, or by conjugate gradients with tags."""

    def solve(theta, x0, tol):
        settings: Any = {"max_steps": 10 * MAX_STEPS, "throw": False}
        if cg:
            settings["adjoint"] = optx.ImplicitAdjoint(lx.CG(tol, tol, max_steps=MAX_STEPS))
            settings["tags"] = frozenset({lx.positive_semidefinite_tag})
        found = optx.minimise(problem.inner, solver(tol, tol), x0, theta, **settings)
        return found.value, found.stats["num_steps"]

    return through_minimizer(problem, solve)


def optimistix_checkpointed(problem: Problem, num_steps: int) -> Callable:
    """`optimistix.minimise` differentiated through its iterations."""

    def solve(theta, x0, _):
        solver = optx.LBFGS(0.0, 0.0)
        adjoint = optx.RecursiveCheckpointAdjoint()
        found = optx.minimise(
            problem.inner, solver, x0, theta, adjoint=adjoint, max_steps=num_steps, throw=False
        )
        return found.value, found.stats["num_steps"]

    return through_minimizer(problem, solve)


def unrolled(problem: Problem, num_steps: int, optimizer: Callable) -> Callable:
    """An Optax method differentiated through its iterations, as one would write it."""
    method = optimizer(problem)

    def solve(theta, x0, _):
        def step(carry, _):
            x, state = carry
            updates, state = method.update(jax.grad(problem.inner)(x, theta), state, x)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.lax.scan(step, (x0, method.init(x0)), length=num_steps)
        return x, num_steps

    return through_minimizer(problem, solve)


def largest_curvature(problem: Problem, x: jax.Array) -> float:
    """Return the largest eigenvalue of the inner Hessian, by 100 power iterations."""
    gradient = jax.grad(problem.inner)

    def iterate(_, v):
        v = jax.jvp(lambda x: gradient(x, problem.theta), (x,), (v,))[1]
        return v / jnp.linalg.norm(v)

    v = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype)
    v = jax.lax.fori_loop(0, 100, iterate, v)
    return float(v @ jax.jvp(lambda x: gradient(x, problem.theta), (x,), (v,))[1])


def sgd(problem: Problem) -> optax.GradientTransformation:
    """Gradient descent with Nesterov's momentum 0.95 and a step of one over the curvature."""
    curvature = largest_curvature(problem, problem.x0)
    return optax.sgd(0.9 / curvature, momentum=0.95, nesterov=True)


def adam(problem: Problem) -> optax.GradientTransformation:
    """Adam; without `eps_root` its derivative is NaN wherever a gradient is zero."""
    return optax.adam(0.02, eps_root=1e-12)


def by_scipy(problem: Problem) -> Callable:
    """SciPy's L-BFGS-B and conjugate gradients around compiled derivatives."""
    value_and_grad = jax.jit(jax.value_and_grad(problem.inner))
    gradient = jax.grad(problem.inner)
    outer_grads = jax.jit(jax.grad(problem.outer, argnums=(0, 1)))

    @jax.jit
    def product(x, theta, v):
        return jax.jvp(lambda x: gradient(x, theta), (x,), (v,))[1]

    @jax.jit
    def pull(x, theta, u):
        return jax.vjp(lambda theta: gradient(x, theta), theta)[1](u)[0]

    def hypergradient(theta, x0, tol):
        dtype = x0.dtype

        def evaluate(x):
            f, g = value_and_grad(jnp.asarray(x, dtype), theta)
            return float(f), np.asarray(g, np.float64)

        found = scipy.optimize.minimize(
            evaluate,
            np.asarray(x0, np.float64),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_STEPS, "maxfun": MAX_STEPS, "ftol": 0, "gtol": float(tol)},
        )
        x = jnp.asarray(found.x, dtype)
        v, direct = outer_grads(x, theta)
        hessian = linear_operator(lambda u: product(x, theta, jnp.asarray(u, dtype)), x0)
        u, _ = cg(hessian, np.asarray(v), rtol=float(tol), maxiter=MAX_STEPS)
        return direct - pull(x, theta, jnp.asarray(u, dtype)), found.nfev

    return hypergradient


LOOSE_TO_TIGHT = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10)
STEPS = (10, 100, 300, 1000)
partial = functools.partial

CONTESTANTS = (
    Contestant("difflbfgs", "", difflbfgs, LOOSE_TO_TIGHT),
    Contestant(
        "difflbfgs",
        "loose adjoint",
        partial(difflbfgs, adjoint=None),
        (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4),
    ),
    Contestant("difflbfgs", "polish=0", partial(difflbfgs, polish=0), LOOSE_TO_TIGHT),
    Contestant(
        "difflbfgs",
        "Cholesky",
        partial(difflbfgs, adjoint=dl.ImplicitAdjoint(lx.Cholesky())),
        LOOSE_TO_TIGHT,
    ),
    Contestant(
        "difflbfgs",
        "quasi-Newton adjoint",
        partial(difflbfgs, adjoint=dl.QuasiNewtonAdjoint(refine=5)),
        LOOSE_TO_TIGHT,
    ),
    Contestant("JAXopt", "", by_jaxopt, LOOSE_TO_TIGHT),
    Contestant("JAXopt", "solve_cg", partial(by_jaxopt, cg=True), LOOSE_TO_TIGHT),
    Contestant(
        "Optimistix",
        "L-BFGS",
        partial(by_optimistix, solver=optx.LBFGS),
        LOOSE_TO_TIGHT,
    ),
    Contestant(
        "Optimistix",
        "L-BFGS, CG",
        partial(by_optimistix, solver=optx.LBFGS, cg=True),
        LOOSE_TO_TIGHT,
    ),
    Contestant("Optimistix", "BFGS", partial(by_optimistix, solver=optx.BFGS), LOOSE_TO_TIGHT),
    Contestant(
        "Optimistix",
        "BFGS, CG",
        partial(by_optimistix, solver=optx.BFGS, cg=True),
        LOOSE_TO_TIGHT,
    ),
    Contestant(
        "Optimistix", "L-BFGS, checkpointed", optimistix_checkpointed, (30, 100), unrolled=True
    ),
    Contestant("unrolled SGD", "", partial(unrolled, optimizer=sgd), STEPS, unrolled=True),
    Contestant("unrolled Adam", "", partial(unrolled, optimizer=adam), STEPS, unrolled=True),
    Contestant("SciPy", "", by_scipy, LOOSE_TO_TIGHT, compiled=False),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
