"""Fit a neural ODE with L-BFGS, against Adam, and differentiate the fit by its weight decays.

The data are noisy trajectories of a predator and its prey (Lotka and Volterra), as logarithms,

    du/dt = 3/2 - exp(v),    dv/dt = exp(u) - 1,

and the model is an Equinox network for the right-hand side, integrated with Diffrax. It goes into
`minimize` as it is, activation functions and all, where `optax.lbfgs` wants it taken apart first;
both are shown. The objective is the mean squared error and a weight decay `exp(θ)` per layer,

    f(w, θ) = mean squared error on 16 trajectories + Σ_layers exp(θ_layer)/2 ‖w_layer‖².

Adam minimizes the same objective with all data in every step, and what either reached after how
many gradients and seconds is printed and drawn. Then the derivative of the error on trajectories
that were kept back is taken by `θ`, through the fit, and checked against central differences of
fits that were made anew.

Newton polish and implicit derivative take Hessian-vector products, forward mode over reverse mode.
Of Diffrax's ways to differentiate, `DirectAdjoint` allows that. The default,
`RecursiveCheckpointAdjoint`, allows first derivatives in reverse mode and no others: with it
`minimize` raises a `TypeError` that says so, unless `LBFGS(polish=0)` does without the
products, and then the minimizer is found but cannot be differentiated.

    python examples/neural_ode.py [--quick] [--output neural_ode.png]
"""

import argparse
import time
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

# The step, 1/4, is a binary fraction: no rounding adds a 13th.
DURATION, STEPS, NOISE = 3.0, 12, 0.05
TIMES = jnp.linspace(0, DURATION, STEPS + 1)[1:]
MODEL = eqx.nn.MLP(2, 2, width_size=16, depth=2, activation=jnp.tanh, key=jax.random.key(0))
THETA = jnp.log(jnp.full(3, 3e-3))
SOLVER = dl.LBFGS(rtol=1e-6, memory_size=20, polish=3)
DIRECT = diffrax.DirectAdjoint()


@eqx.filter_jit
def integrate(field, starts, adjoint):
    """Return the solution at `TIMES`, one trajectory for each row of `starts`, as one system.

    A fixed step, so that the objective is smooth in the weights; as one system of equations and
    under `jit`, as Diffrax is then traced once, not for every derivative that is taken.
    """
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jax.vmap(field)(y)),
        diffrax.Bosh3(),
        t0=0.0,
        t1=DURATION,
        dt0=DURATION / STEPS,
        y0=starts,
        saveat=diffrax.SaveAt(steps=True),
        max_steps=STEPS,
        adjoint=adjoint,
    )
    assert solution.ys is not None
    return solution.ys


def error(model, data, adjoint: diffrax.AbstractAdjoint = DIRECT):
    """Return the mean squared error of a model's trajectories."""
    starts, observed = data
    return jnp.mean((integrate(model, starts, adjoint) - observed) ** 2)


def objective(model, theta, adjoint: diffrax.AbstractAdjoint = DIRECT):
    """Return the error on the training data and the weight decay, a layer's by its own θ."""
    sizes = [jnp.sum(layer.weight**2) + jnp.sum(layer.bias**2) for layer in model.layers]
    return error(model, TRAIN, adjoint) + jnp.dot(jnp.exp(theta), jnp.stack(sizes)) / 2


def compiled(history):
    """Return the compiled program for fit, error on the validation data and its derivative by θ.

    Every step of the fit appends evaluations, time and objective to `history`.
    """

    def record(step):
        row = int(step.num_fun_evals), time.perf_counter(), float(step.objective)
        history.append(row)

    def outer(theta, model):
        fit = dl.minimize(objective, model, theta, solver=SOLVER, max_steps=10_000, callback=record)
        return error(fit.value, VALID), fit

    program: Any = eqx.filter_jit(jax.value_and_grad(outer, has_aux=True))
    return program.lower(THETA, MODEL).compile()


# What follows makes the data, checks, compares and draws.


def lotka_volterra(y):
    """Return the true right-hand side."""
    return jnp.stack([1.5 - jnp.exp(y[1]), jnp.exp(y[0]) - 1])


def sample(key, number):
    """Return starting points and what was observed of their trajectories."""
    of_start, of_noise = jax.random.split(key)
    starts = 0.6 * jax.random.normal(of_start, (number, 2))
    truth = integrate(lotka_volterra, starts, DIRECT)
    return starts, truth + NOISE * jax.random.normal(of_noise, truth.shape)


TRAIN, VALID = sample(jax.random.key(1), 16), sample(jax.random.key(2), 16)


def show_what_needs_care():
    """Print how Optax takes the model, and how `minimize` takes Diffrax's default adjoint."""
    model: Any = MODEL
    try:
        optax.lbfgs().init(model)
    except Exception as problem:
        print(f"optax.lbfgs().init(model): {type(problem).__name__}: {str(problem)[:90]}")
    other = diffrax.RecursiveCheckpointAdjoint()
    try:
        dl.minimize(lambda model, theta: objective(model, theta, other), MODEL, THETA)
    except TypeError as problem:
        print(f"minimize, {type(other).__name__}: TypeError: {problem}")


def adam(num_steps):
    """Return rate, objectives and seconds of Adam with the best of four learning rates."""
    weights, others = eqx.partition(MODEL, eqx.is_inexact_array)
    loss = jax.value_and_grad(lambda weights: objective(eqx.combine(weights, others), THETA))

    @jax.jit
    def run(rate):
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

        def step(carry, _):
            weights, state = carry
            value, gradient = loss(weights)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(weights, updates), state), value

        return jax.lax.scan(step, (weights, optimizer.init(weights)), length=num_steps)[1]

    program = run.lower(jnp.asarray(0.1)).compile()
    runs = []
    for rate in (0.003, 0.01, 0.03, 0.1):
        begin = time.perf_counter()
        values = np.asarray(program(jnp.asarray(rate)))
        runs.append((rate, values, time.perf_counter() - begin))
        print(f"Adam, rate {rate:5}: {values[-1]:.6f} after {num_steps} gradients")
    return min(runs, key=lambda run: run[1][-1])


def check(program, fit, gradient, components, width=1e-2):
    """Return the relative error of the hypergradient against central differences of new fits.

    The new fits start at the old one, as there are other minima, without its memory.
    """
    found = []
    for i in range(components):
        ends = [program(THETA.at[i].add(sign * width), fit.value)[0][0] for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * width))
    wanted = jnp.stack(found)
    print(f"hypergradient       {np.asarray(gradient[:components])}")
    print(f"central differences {np.asarray(wanted)}")
    return float(jnp.linalg.norm(gradient[:components] - wanted) / jnp.linalg.norm(wanted))


def draw(path, ours, others, seconds, model):
    """Save the objective against gradients and seconds, and three trajectories kept back."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    evaluations, clock, values = np.asarray(ours).T
    every = np.arange(1, len(others) + 1)
    for axis, x, y in ((left, evaluations, every), (middle, clock, every * seconds / len(every))):
        axis.loglog(y, others, color="tab:orange", label="Adam, the best of four rates")
        axis.loglog(x, values, color="tab:blue", label="difflbfgs.minimize")
        axis.axhline(others[-1], color="gray", lw=0.8, ls=":")
        axis.grid(alpha=0.3)
    left.set_xlabel("gradients")
    left.set_ylabel("objective")
    left.legend(frameon=False)
    middle.set_xlabel("seconds, without compilation")
    starts, observed = VALID
    fitted, truth = (integrate(field, starts, DIRECT) for field in (model, lotka_volterra))
    for i in range(3):
        color = f"C{i + 2}"
        for ys, style in ((truth, "--"), (fitted, "-")):
            path_ = np.exp(np.concatenate([starts[None, i], ys[:, i]]))
            right.plot(*path_.T, style, color=color)
        right.plot(*np.exp(observed[:, i]).T, "o", color=color, ms=3.5)
    for style, name in (("-", "fitted"), ("--", "true"), ("o", "observed, not fitted to")):
        right.plot([], [], style, color="gray", ms=3.5, label=name)
    right.set_xlabel("prey")
    right.set_ylabel("predators")
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    print(f"saved {path}")


def main():
    """Fit with both, compare, differentiate, check and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, for tests")
    parser.add_argument("--output", default="neural_ode.png", help="where to save the PNG")
    options = parser.parse_args()
    begin = time.perf_counter()
    show_what_needs_care()
    history = []
    program = compiled(history)
    print(f"compiled, {time.perf_counter() - begin:.0f} s\n")

    start = time.perf_counter()
    (validation, fit), gradient = jax.block_until_ready(program(THETA, MODEL))
    jax.effects_barrier()
    ours = [(evaluations, clock - start, value) for evaluations, clock, value in history]
    rises = np.diff([value for *_, value in ours]) / ours[-1][2]
    stats = fit.stats
    print(
        f"L-BFGS: objective {fit.objective:.6f}, {stats.num_fun_evals} gradients and "
        f"{stats.num_hvps} Hessian-vector products, gradient norm {stats.grad_norm:.0e}; "
        f"largest relative rise {max(rises):.0e}"
    )
    assert type(fit.value) is type(MODEL)
    assert fit.value.activation is MODEL.activation

    rate, others, seconds = adam(300 if options.quick else 5000)
    reached = next(row for row in ours if row[2] <= others[-1])
    print(
        f"what Adam (rate {rate}) reached with {len(others)} gradients in {seconds:.1f} s, L-BFGS "
        f"reached with {reached[0]} in {reached[1]:.1f} s; spikes of Adam: "
        f"{np.sum(np.diff(others) > 0)} steps upwards\n"
    )
    off = check(program, fit, gradient, 1 if options.quick else 3)
    print(f"relative error of the hypergradient, by central differences: {off:.0e}")
    print(f"validation error {validation:.5f}, noise {NOISE**2:.5f}")
    draw(options.output, ours, others, seconds, fit.value)
    print(f"total time {time.perf_counter() - begin:.0f} s")
    assert np.max(rises) <= 100 * np.finfo(float).eps
    assert reached[0] < len(others)
    assert off < 1e-3


if __name__ == "__main__":
    main()
