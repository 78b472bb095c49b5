"""Press a membrane onto an obstacle, and differentiate the contact force by the obstacle's shape.

The membrane `x` over the unit square is fixed at its rim, pushed down by a load and held up by an
obstacle `b(θ)`, a bump of some height and radius:

    x* = argmin_{x >= b(θ)}  f(x) = ½ ∫ |∇x|² + p ∫ x.

Its multipliers are the forces by which the obstacle pushes back, `λ = ∂f(x*)/∂b`. Their sum is the
contact force, and its derivative by height and radius a second derivative of the minimum. The set
of points in contact changes with the shape, so the force has kinks where a point of the grid comes
in; between them the derivative is exact, and it is compared with differences of solves.

    python examples/membrane.py [--quick] [--output membrane.png]
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

LOAD = 1.0
SHAPE = {"height": 0.05, "radius": 0.36}


def grid(side):
    """Return the coordinates of the points inside the rim, and their spacing."""
    h = 1 / (side + 1)
    s = jnp.linspace(h, 1 - h, side)
    return jnp.meshgrid(s, s, indexing="ij"), h


def obstacle(shape, side):
    """Return the height of a bump that leans on one side."""
    (a, b), _ = grid(side)
    square = (a - 0.45) ** 2 + (b - 0.55) ** 2 + 0.5 * (a - 0.45) * (b - 0.55)
    return shape["height"] * (1 - square / shape["radius"] ** 2)


def energy(x, theta):
    """Return the energy of the membrane."""
    h = 1 / (len(x) + 1)
    padded = jnp.pad(x, 1)
    bent = jnp.sum(jnp.diff(padded, axis=0) ** 2) + jnp.sum(jnp.diff(padded, axis=1) ** 2)
    return bent / 2 + LOAD * h**2 * jnp.sum(x)


def pressed(bump):
    """Return the solution above a bump."""
    return dl.minimize(energy, jnp.zeros_like(bump), bounds=(bump, None))


def forces(bump):
    """Return the multipliers: by how much the energy grows with each entry of the bound."""
    return jax.grad(lambda bump: pressed(bump).objective)(bump)


def contact_force(shape, side):
    """Return the force between membrane and obstacle."""
    return jnp.sum(forces(obstacle(shape, side)))


# What follows checks, compares and draws.


def main():
    """Solve, differentiate, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part, for tests")
    parser.add_argument("--output", help="where to save the picture")
    options = parser.parse_args()
    side = 12 if options.quick else 40

    value_and_grad = jax.jit(jax.value_and_grad(lambda shape: contact_force(shape, side)))
    force, by_shape = value_and_grad(SHAPE)
    bump = obstacle(SHAPE, side)
    solution = pressed(bump)
    print(f"{int(solution.stats.num_active)} of {side**2} points in contact, force {force:.5f}")
    for name in SHAPE:
        h = 1e-6
        after, before = (value_and_grad({**SHAPE, name: SHAPE[name] + k * h})[0] for k in (1, -1))
        difference = (after - before) / (2 * h)
        print(f"by {name:6s}: {by_shape[name]:.6f}, by differences of solves {difference:.6f}")
        assert abs(by_shape[name] - difference) <= 1e-5 * abs(difference)
    if options.output:
        draw(side, bump, solution, by_shape, options.output)


def draw(side, bump, solution, by_shape, path):
    """Save the membrane, its contact, and the force with its derivative along the height."""
    figure = plt.figure(figsize=(11, 4))
    (a, b), _ = grid(side)
    panel = figure.add_subplot(1, 3, 1, projection="3d")
    panel.plot_surface(a, b, solution.value, cmap="viridis", alpha=0.9)
    panel.set(title="membrane", zticks=[])
    panel = figure.add_subplot(1, 3, 2)
    image = panel.imshow(np.asarray(forces(bump)).T, origin="lower", extent=(0, 1, 0, 1))
    panel.set(title="force of the obstacle")
    figure.colorbar(image, ax=panel, shrink=0.7)
    panel = figure.add_subplot(1, 3, 3)
    heights = np.linspace(0.5, 1.5, 11) * SHAPE["height"]
    curve = jax.jit(lambda height: contact_force({**SHAPE, "height": height}, side))
    values = [float(curve(height)) for height in heights]
    panel.plot(heights, values, "o-", ms=3, label="contact force")
    middle = float(curve(SHAPE["height"]))
    panel.axline((SHAPE["height"], middle), slope=float(by_shape["height"]), ls="--", color="C1")
    panel.plot([], [], "--", color="C1", label="its derivative")
    panel.set(xlabel="height of the obstacle")
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
