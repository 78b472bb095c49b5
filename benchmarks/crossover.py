"""Where should the adjoint stop assembling the Hessian? Dense against CG, one hypergradient.

    python benchmarks/crossover.py [--quick | --full] [--results file.json]

For each size: compile both, interleave the runs, print medians and their ratio, for three kinds of
problem: softmax regression, a small network with a proximal term, and an ill-conditioned quadratic,
on which CG takes more steps than there are variables. What dense costs more on the easy ones buys
certainty: it sees every curvature. Up to the threshold in use, `DENSE_SIZE`, it must not take more
than three times as long, and no more than half as long again on the ill-conditioned one; beyond,
CG must win on the easy problems. The claims are asserted at the end.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import difflbfgs as dl
import harness
from difflbfgs import _krylov, _linear, _system

jax.config.update("jax_enable_x64", True)


def softmax_regression(n):
    """Return objective, start and theta: ten classes, `n / 10` features, 500 samples."""
    features, rng = n // 10, np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(500, features)) / np.sqrt(features))
    y = jnp.asarray(rng.integers(0, 10, size=500))

    def fun(w, theta):
        log_p = jax.nn.log_softmax(x @ w.reshape(features, 10))
        return -jnp.mean(log_p[jnp.arange(500), y]) + 0.5 * jnp.exp(theta) @ w**2

    return fun, jnp.zeros(n), jnp.full(n, -5.0)


def proximal_network(n):
    """Return objective, start and theta: one hidden layer, 100 samples, a proximal term."""
    hidden, rng = n // 10, np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(100, 8))), jnp.asarray(rng.normal(size=100))

    def fun(w, theta):
        first, bias, last = jnp.split(w, [8 * hidden, 9 * hidden])
        out = jnp.tanh(x @ first.reshape(8, hidden) + bias) @ last
        return jnp.mean((out - y) ** 2) + jnp.sum((w - theta) ** 2)

    return fun, jnp.zeros(n), 0.3 * jnp.asarray(rng.normal(size=n))


def ill_conditioned_quadratic(n):
    """Return objective, start and theta: condition 1e6, rotated."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    a = jnp.asarray(q @ np.diag(np.logspace(-6, 0, n)) @ q.T)

    def fun(x, theta):
        return 0.5 * x @ (a @ x) - jnp.sin(theta) @ (a @ x)

    return fun, jnp.zeros(n), jnp.asarray(rng.normal(size=n))


def compiled(problem, n, linear_solver):
    """Return the compiled hypergradient."""
    fun, x0, theta = problem(n)
    adjoint = dl.ImplicitAdjoint(linear_solver=linear_solver, rtol=1e-6)
    # The adjoint's own cost is what matters here, so the forward solve is loose.
    solver = dl.LBFGS(rtol=1e-3, polish=0)

    def outer(theta):
        return jnp.sum(jnp.sin(dl.minimize(fun, x0, theta, solver=solver, adjoint=adjoint).value))

    return functools.partial(harness.compiled(jax.grad(outer), theta).run, theta)


def main():
    """Measure and print the table; assert that the threshold is a fair one."""
    options = harness.options(__doc__, picture=False)
    rows, short = [], []
    print(f"{'problem':26s} {'n':>5s} {'dense':>10s} {'CG':>10s} {'dense / CG':>11s}")
    for problem in (softmax_regression, proximal_network, ill_conditioned_quadratic):
        easy = problem is not ill_conditioned_quadratic
        for n in (20, 40, 60, 100, 200, 400) if options.full else (20, 60):
            solvers = [_linear.Dense(), _krylov.ConjugateGradient(1e-7, 100 * n)]
            runs = {k: compiled(problem, n, solver) for k, solver in enumerate(solvers)}
            dense, cg = harness.seconds(runs, 15).values()
            name = problem.__name__
            rows.append({"problem": name, "variables": n, "dense": dense, "cg": cg})
            print(f"{name:26s} {n:5d} {dense * 1e3:7.2f} ms {cg * 1e3:7.2f} ms {dense / cg:11.2f}")
            if n > _system.DENSE_SIZE:
                holds = not easy or cg < dense
            else:
                holds = dense < (3 if easy else 1.5) * cg
            if not holds:
                short.append(f"{name}, n = {n}: dense / CG = {dense / cg:.2f}")
    harness.record(options.results, rows, options.quick)
    assert not short, short


if __name__ == "__main__":
    main()
