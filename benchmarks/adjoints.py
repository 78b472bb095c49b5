"""What do the quasi-Newton adjoint and the L-BFGS preconditioner cost, and how wrong is the first?

    python benchmarks/adjoints.py [--quick | --full] [--results file.json]

For each problem and memory size, at the default tolerance in float64: products with the Hessian
that conjugate gradients takes for the adjoint, plain and preconditioned with the solve's memory,
and the relative error of `QuasiNewtonAdjoint(refine=k)`, which takes k + 1 products (none for 0).
`ImplicitAdjoint` must stay exact either way, and the error estimate must tell the error of the
quasi-Newton adjoint within a factor of three.
"""

import jax
import numpy as np

import difflbfgs as dl
import harness
from collection import COLLECTION, exact_hypergradient

jax.config.update("jax_enable_x64", True)

NAMES = (
    "softmax e-4", "softmax e-6", "softmax e-9", "network", "hyper-cleaning", "distillation",
)  # fmt: skip
REFINE = (0, 1, 2, 5, 10)


def main():
    """Print the table and assert the claims."""
    options = harness.options(__doc__, picture=False)
    rows = []
    names = NAMES if options.full else ("network",)
    print(
        f"{'problem':16s} {'memory':>6s} {'products: plain':>16s} {'lbfgs':>6s}   "
        + "".join(f"{'refine=' + str(k):>11s}" for k in REFINE)
    )
    for name in names:
        problem = COLLECTION[name]()
        exact = exact_hypergradient(problem)
        for memory_size in (10, 30, 100) if options.full else (10,):

            def solved(adjoint, problem=problem, exact=exact, memory_size=memory_size):
                solver = dl.LBFGS(memory_size=memory_size)
                step = dl.value_and_hypergrad(
                    problem.outer, problem.inner, solver=solver, adjoint=adjoint, max_steps=5000
                )
                _, gradient, info = jax.jit(step)(problem.theta, problem.x0)
                error = np.linalg.norm(gradient - exact)
                return error / np.linalg.norm(exact), float(info.error_estimate) / error, info

            products = []
            for adjoint in (dl.ImplicitAdjoint(), dl.ImplicitAdjoint(preconditioner="lbfgs")):
                error, _, info = solved(adjoint)
                assert error < 1e-8
                products.append(int(info.num_adjoint_steps))
            errors = []
            for refine in REFINE:
                error, ratio, _ = solved(dl.QuasiNewtonAdjoint(refine=refine))
                assert 1 / 3 < ratio < 3
                errors.append(float(error))
            row = {"problem": name, "memory_size": memory_size, "products": products}
            rows.append(row | {"refine": REFINE, "errors": errors})
            print(
                f"{name:16s} {memory_size:6d} {products[0]:16d} {products[1]:6d}   "
                + "".join(f"{error:11.1e}" for error in errors),
                flush=True,
            )
    harness.record(options.results, rows, options.quick)


if __name__ == "__main__":
    main()
