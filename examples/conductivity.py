"""Calibrate the conductivity of a plate, a coefficient of a PDE, from few measured temperatures.

The temperature `u` of a plate, cooled at its rim and heated inside, minimizes the energy

    E(u, θ) = ∫ ½ k(θ) |∇u|² + ¼ u⁴ - s u,

so that `-∇·(k ∇u) + u³ = s`. The conductivity `k` is the exponential of 16 smooth bumps with the
heights `θ`. At 36 points the temperature is measured, with errors of 0.01. The outer problem picks
`θ` for the least misfit: L-BFGS outside, whose gradient goes through L-BFGS inside, one adjoint
solve for all 16 heights. The gradient is compared with differences of solves.

    python examples/conductivity.py [--quick] [--output conductivity.png]
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

SIDE, NOISE, PRIOR = 27, 0.01, 1e-3
H = 1 / (SIDE + 1)
# Bumps and sensors are on grids of their own; conductivities belong to cells between nodes.
MIDDLES = jnp.linspace(0.15, 0.85, 4)
CELLS = (jnp.arange(SIDE + 1) + 0.5) * H
BUMPS = jnp.exp(-((CELLS[:, None] - MIDDLES) ** 2) / (2 * 0.15**2))
SENSORS = (slice(3, None, 4), slice(3, None, 4))


def conductivity(theta):
    """Return the conductivity of each cell."""
    return jnp.exp(BUMPS @ theta.reshape(4, 4) @ BUMPS.T)


def energy(u, theta):
    """Return the energy of a temperature that is zero at the rim."""
    k, u = conductivity(theta), jnp.pad(u, 1)
    down, across = jnp.diff(u, axis=0) ** 2, jnp.diff(u, axis=1) ** 2
    # The square of the gradient in a cell is the mean over its opposite edges.
    slopes = (down[:, 1:] + down[:, :-1] + across[1:] + across[:-1]) / 2
    return jnp.sum(k * slopes) / 2 + H**2 * jnp.sum(u**4 / 4 - 30 * u)


def temperature(theta):
    """Return the temperatures at the nodes: the inner problem."""
    return dl.minimize(energy, jnp.zeros((SIDE, SIDE)), theta).value


def misfit(theta, measured):
    """Return how badly the sensors are explained, plus a prior: the outer problem."""
    error = (temperature(theta)[SENSORS] - measured) / NOISE
    return jnp.mean(error**2) / 2 + PRIOR * jnp.sum(theta**2) / 2


def calibrate(measured, max_steps):
    """Return the solution of the outer problem, by L-BFGS without a Newton polish."""
    solver = dl.LBFGS(rtol=1e-4, polish=0)
    start = jnp.zeros(16)
    return dl.minimize(
        misfit, start, measured, solver=solver, max_steps=max_steps, throw=False, callback=show
    )


def show(step):
    """Print the progress of the outer problem."""
    if step.num_steps % 5 == 1 or step.last:
        print(f"outer step {step.num_steps:3d}: misfit {step.objective:9.3f}", flush=True)


def main():
    """Make measurements, calibrate, check the gradient, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    parser.add_argument("--output", default="conductivity.png", help="where to save the picture")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    truth = jnp.asarray(0.7 * rng.normal(size=16))
    exact = temperature(truth)
    noise = NOISE * jnp.asarray(rng.normal(size=exact[SENSORS].shape))
    measured = exact[SENSORS] + noise
    print(f"{SIDE**2} temperatures from 0 to {exact.max():.2f}, {measured.size} measured")

    value_and_grad = jax.jit(jax.value_and_grad(misfit))
    direction = jnp.asarray(rng.normal(size=16))
    slope = value_and_grad(jnp.zeros(16), measured)[1] @ direction
    ends = [value_and_grad(t * direction, measured)[0] for t in (1e-5, -1e-5)]
    difference = (ends[0] - ends[1]) / 2e-5
    print(f"slope {slope:.6f}, by differences of solves {difference:.6f}")
    assert abs(slope - difference) <= 1e-6 * abs(slope)

    solution = calibrate(measured, 5 if options.quick else 200)
    theta = solution.value
    k, true_k = conductivity(theta), conductivity(truth)
    error, before = (jnp.mean(jnp.abs(jnp.log(a / true_k))) for a in (k, jnp.ones_like(k)))
    print(
        f"conductivity from {true_k.min():.2f} to {true_k.max():.2f}: the calibrated one is off by "
        f"{100 * error:.0f} % (mean over the cells), a constant one by {100 * before:.0f} %"
    )
    if not options.quick:
        assert solution.converged
        assert error < before / 3
    draw(exact, k, true_k, options.output)


def draw(exact, k, true_k, path):
    """Save the temperature with its sensors, and both conductivities."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    ends = {"origin": "lower", "extent": (0, 1, 0, 1)}
    image = panels[0].imshow(np.pad(np.asarray(exact), 1).T, cmap="inferno", **ends)
    at = H * (np.arange(SIDE)[SENSORS[0]] + 1)
    panels[0].plot(*np.meshgrid(at, at), ".", color="white", ms=3)
    panels[0].set(title="temperature, and where it is measured")
    figure.colorbar(image, ax=panels[0])
    low, high = float(true_k.min()), float(true_k.max())
    for panel, field, name in ((panels[1], true_k, "true"), (panels[2], k, "calibrated")):
        image = panel.imshow(np.asarray(field).T, vmin=low, vmax=high, **ends)
        panel.set(title=f"{name} conductivity")
    figure.colorbar(image, ax=panels[1:])
    figure.savefig(path, dpi=120)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
