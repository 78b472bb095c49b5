"""Fit a force field to molecular geometries: the gradient goes through relaxed molecules.

The inner problem relaxes the atoms `x` of alkanes in the energy of molecular mechanics,

    E(x, θ) = Σ_bonds k_b (r - r₀)² + Σ_angles k_a (φ - φ₀)² + Σ_torsions V(ω)
              + Σ_pairs 4 ε ((s/r)¹² - (s/r)⁶),

with the constants of OPLS-AA (Jorgensen, Maxwell and Tirado-Rives, J. Am. Chem. Soc. 118, 11225,
1996), of which charges are left out. The outer problem picks seven of them, `r₀`, `φ₀` and the
diameters `s` of carbon and hydrogen, such that the distances between the atoms of relaxed molecules
match measured ones,

    min_θ  F = ½ Σ_ij (‖x*_i - x*_j‖ - d_ij)² / δ²,    x*(θ) = argmin_x E(x, θ).

No parameter can be read off a distance, since crowded atoms stretch bonds and open angles. What is
at rest does not show the unit of energy, so that `k`, `V` and `ε` are kept.

The measured distances are not from a laboratory: they come from the published parameters, which the
fit does not see, with noise of `δ` = 0.003 Å, about what electron diffraction reaches. So it is
known what should be found, also for hexamethylethane, which is not fitted to and whose central bond
is stretched by the crowd around it. The inverse Hessian of `F`, as BFGS leaves it behind, gives
standard errors: bonds are known to 0.0004 Å, but angles to 2° only, since those around an atom
cannot all grow, and a common shift of the three `φ₀` does little.

All molecules are relaxed in one solve: a system of molecules that do not interact. Shifting or
turning one changes nothing, so that each has six eigenvalues of `H` that are zero at the minimum,
and beside it, where any solver stops, those of turns may be negative: it looks like a saddle point.
Hence six linear conditions for each, which shifts and turns alone can meet: that the mean of its
`x_i` and that of the vector products of `y_i` and `x_i` are zero, `y` being the start, centred.
Their squares are added to the energy; they vanish at the minimum and change no distance there. The
start is shaken, as a symmetric one leads to a true saddle point: hexamethylethane is twisted.

    python examples/force_field.py [--quick] [--output force_field.png]
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.optimize

import difflbfgs as dl

jax.config.update("jax_enable_x64", True)
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

# Other names in capitals, made below, say which atoms a term is of, and have its constants.
GUESS = np.array([1.600, 1.000, 109.5, 109.5, 109.5, 3.20, 2.80])
SCALE = np.array([0.02, 0.02, 3.0, 3.0, 3.0, 0.3, 0.3])
DELTA = 0.003


def dot(a, b):
    """Return the inner products of the rows."""
    return jnp.sum(a * b, axis=1)


def norm(a):
    """Return the lengths of the rows."""
    return jnp.sqrt(dot(a, a))


def energy(x, theta):
    """Return the energy in kcal/mol, without what fixes place and orientation."""
    r0, phi0, s = theta[:2], jnp.deg2rad(theta[2:5]), theta[5:]
    bond, a, b, u, v, w, far = jnp.split(x[TO] - x[FROM], ENDS)
    bonds = STRETCH * (norm(bond) - OF_BONDS @ r0) ** 2
    phi = jnp.arccos(dot(a, b) / (norm(a) * norm(b)))
    angles = BEND * (phi - OF_ANGLES @ phi0) ** 2
    axis = v / norm(v)[:, None]
    u, w = (side - dot(side, axis)[:, None] * axis for side in (u, w))
    c = dot(u, w) / (norm(u) * norm(w))
    torsions = V1 * (1 + c) / 2 + V2 * (1 - c**2) + V3 * (1 - 3 * c + 4 * c**3) / 2
    squares = OF_FAR @ jnp.stack([s[0] ** 2, s[0] * s[1], s[1] ** 2])
    q = (squares / dot(far, far)) ** 3
    return sum(map(jnp.sum, (bonds, angles, torsions, DEPTH * (q**2 - q))))


def placement(x):
    """Return what fixes place and orientation of every molecule: zero at the minimum."""
    return 50 * (jnp.sum((MEAN @ x) ** 2) + jnp.sum((MEAN @ jnp.cross(START, x)) ** 2))


def placed_energy(x, theta):
    """Return the inner objective."""
    return energy(x, theta) + placement(x)


def distances(x):
    """Return the distance between every two atoms of the same molecule."""
    return norm(x[PAIRS[:, 0]] - x[PAIRS[:, 1]])


@jax.jit
def evaluate(theta, measured):
    """Return the outer objective, the relaxed atoms, and the hypergradient."""

    def objective(theta):
        x = dl.minimize(placed_energy, jnp.asarray(START), theta, max_steps=5000).value
        return jnp.sum((FITTED * (distances(x) - measured) / DELTA) ** 2) / 2, x

    (value, x), gradient = jax.value_and_grad(objective, has_aux=True)(theta)
    return value, x, gradient


# What follows builds the molecules, checks, fits and draws.

PARAMETERS = ("r₀ CC", "r₀ CH", "φ₀ CCC", "φ₀ CCH", "φ₀ HCH", "s C", "s H")  # Å and degrees
HIDDEN = np.array([1.529, 1.090, 112.7, 110.7, 107.8, 3.50, 2.50])
# Carbon atoms on a diamond lattice: bonds lead from even sites to odd ones along these vectors.
LATTICE = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
MOLECULES = {
    "ethane": [(0, 0, 0), (1, 1, 1)],
    "propane": [(0, 0, 0), (1, 1, 1), (2, 2, 0)],
    "butane, anti": [(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 3, 1)],
    "butane, gauche": [(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 1, -1)],
    "isobutane": [(0, 0, 0), (1, 1, 1), (1, -1, -1), (-1, 1, -1)],
    "hexamethylethane": [(0, 0, 0), *map(tuple, LATTICE), (0, 2, 2), (2, 0, 2), (2, 2, 0)],
}


def build():
    """Return positions, which atoms are hydrogen, the molecule of every atom, and the bonds."""
    rng = np.random.default_rng(0)
    positions, hydrogen, molecule, bonds = [], [], [], []
    for index, carbons in enumerate(MOLECULES.values()):
        first, sites = len(hydrogen), list(carbons)
        for i, site in enumerate(carbons):
            for step in LATTICE if sum(site) % 2 == 0 else -LATTICE:
                neighbour = tuple(site + step)
                if neighbour not in carbons:
                    bonds.append((first + i, first + len(sites)))
                    sites.append(site + 0.7 * step)
                elif carbons.index(neighbour) > i:
                    bonds.append((first + i, first + carbons.index(neighbour)))
        shaken = 0.89 * np.array(sites) + 0.05 * rng.normal(size=(len(sites), 3))
        positions.append(shaken - shaken.mean(axis=0))
        hydrogen += [i >= len(carbons) for i in range(len(sites))]
        molecule += [index] * len(sites)
    return np.concatenate(positions), np.array(hydrogen), np.array(molecule), np.array(bonds)


START, HYDROGEN, MOLECULE, BONDS = build()
ATOMS = np.arange(len(START))
SAME = np.equal.outer(MOLECULE, MOLECULE)


def find_terms():
    """Return angles, torsions, pairs three bonds apart or more, and what share of them counts."""
    bonded = np.zeros((len(ATOMS), len(ATOMS)), int)
    bonded[tuple(BONDS.T)] = bonded[tuple(BONDS.T[::-1])] = 1
    neighbours = [np.flatnonzero(row) for row in bonded]
    angles = [(i, j, k) for j in ATOMS for i, k in itertools.combinations(neighbours[j], 2)]
    torsions = [
        (i, j, k, l)
        for j, k in BONDS
        for i in neighbours[j]
        for l in neighbours[k]
        if i != k != j != l
    ]
    near = np.linalg.matrix_power(bonded + np.eye(len(ATOMS), dtype=int), 2) > 0
    pairs = np.argwhere(np.triu(SAME & ~near))
    shares = np.where((bonded @ bonded @ bonded)[tuple(pairs.T)] > 0, 0.5, 1.0)
    return np.array(angles), np.array(torsions), pairs, shares


ANGLES, TORSIONS, FAR, SHARES = find_terms()
PAIRS = np.argwhere(np.triu(SAME, 1))
FITTED = MOLECULE[PAIRS[:, 0]] < len(MOLECULES) - 1


def kinds(atoms, number):
    """Return the matrix that picks a term's parameter by how many of its atoms are hydrogen."""
    return np.eye(number)[HYDROGEN[atoms].sum(axis=1)]


# From where to where all vectors lead that the energy is made of.
BLOCKS = [
    BONDS,
    ANGLES[:, [1, 0]],
    ANGLES[:, [1, 2]],
    TORSIONS[:, [1, 0]],
    TORSIONS[:, [1, 2]],
    TORSIONS[:, [2, 3]],
    FAR,
]
FROM, TO = np.concatenate(BLOCKS).T
ENDS = np.cumsum([len(block) for block in BLOCKS])[:-1]
MEAN = np.eye(len(MOLECULES))[:, MOLECULE] / np.bincount(MOLECULE)[:, None]
OF_BONDS, OF_ANGLES, OF_FAR = kinds(BONDS, 2), kinds(ANGLES, 3), kinds(FAR, 3)
STRETCH, BEND = OF_BONDS @ [268.0, 340.0], OF_ANGLES @ [58.35, 37.5, 33.0]
TORSION = np.array([[1.740, 0, 0], [-0.157, 0, 0], [0.279, 0.366, 0.318]])
V1, V2, V3 = TORSION @ kinds(TORSIONS[:, [0, 3]], 3).T
DEPTH = 4 * SHARES * (OF_FAR @ np.sqrt([0.066**2, 0.066 * 0.030, 0.030**2]))


def check_gradient(theta, measured):
    """Return the relative error of the hypergradient in a direction that moves all parameters."""
    direction = SCALE * np.random.default_rng(0).normal(size=len(SCALE))
    h, steps = 1e-2, (-2, -1, 1, 2)
    f = [float(evaluate(theta + k * h * direction, measured)[0]) for k in steps]
    difference = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
    return abs(float(evaluate(theta, measured)[2] @ direction) / difference - 1)


def fit(measured, max_steps):
    """Return parameters, their standard errors, and the misfit after every step, by BFGS."""
    misfits = []

    def fun(z):
        value, _, gradient = evaluate(GUESS + SCALE * z, measured)
        return float(value), SCALE * np.asarray(gradient)

    def show(intermediate_result):
        misfits.append(2 * intermediate_result.fun / FITTED.sum())
        print(f"outer step {len(misfits):2d}: mean squared error {misfits[-1]:10.4f} δ²")

    options = {"maxiter": max_steps, "gtol": 1e-2}
    found = scipy.optimize.minimize(
        fun, np.zeros(len(GUESS)), jac=True, method="BFGS", callback=show, options=options
    )
    return GUESS + SCALE * found.x, SCALE * np.sqrt(np.diag(found.hess_inv)), misfits


def draw(path, atoms, misfits, deviations):
    """Save the molecule that was not fitted to, its distances, the misfit and the parameters."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8), layout="constrained")
    colours = {"hidden": "k", "guess": "tab:red", "fitted": "tab:blue"}
    view = np.array([[1, 1, 1], [1, -1, 0]]).T / np.sqrt([3, 2])
    crowded = BONDS[MOLECULE[BONDS[:, 0]] == len(MOLECULES) - 1]
    for name, colour in colours.items():
        ends = (atoms[name] @ view)[crowded]
        width, order = (4, 1) if name == "hidden" else (1.5, 2)
        axes[0, 0].plot(*ends.transpose(2, 1, 0), "-", color=colour, lw=width, zorder=order)
        axes[0, 0].plot([], [], color=colour, lw=width, label=name)
    axes[0, 0].set_aspect("equal")
    axes[0, 0].set_title("hexamethylethane at rest, not fitted to")
    axes[0, 0].set_xlabel("Å, along the central bond")
    axes[0, 0].set_ylabel("Å")
    exact = np.asarray(distances(atoms["hidden"]))[~FITTED]
    for name in ("guess", "fitted"):
        errors = np.asarray(distances(atoms[name]))[~FITTED] - exact
        axes[0, 1].plot(exact, errors, ".", color=colours[name], label=name)
    axes[0, 1].set_title("its distances")
    axes[0, 1].set_xlabel("distance [Å]")
    axes[0, 1].set_ylabel("error [Å]")
    axes[1, 0].semilogy(range(len(misfits)), misfits, "o-")
    axes[1, 0].axhline(1, color="k", lw=0.8, ls="--", label="noise")
    axes[1, 0].set_xlabel("outer step")
    axes[1, 0].set_ylabel("mean squared error of fitted distances / δ²")
    places = np.arange(len(PARAMETERS))
    axes[1, 1].axhspan(-1, 1, color="tab:gray", alpha=0.2, lw=0)
    axes[1, 1].plot(places, deviations, "o")
    axes[1, 1].set_xticks(places, PARAMETERS)
    axes[1, 1].set_ylim(-4, 4)
    axes[1, 1].set_ylabel("(found - hidden) / standard error")
    for axis in (axes[0, 0], axes[0, 1], axes[1, 0]):
        axis.legend(frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"saved {path}")


def main():
    """Make measurements, check the gradient, fit, look at the molecule left out, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    parser.add_argument("--output", default="force_field.png", help="where to save the PNG")
    options = parser.parse_args()
    atoms = {"hidden": evaluate(HIDDEN, np.zeros(len(PAIRS)))[1]}
    exact = np.asarray(distances(atoms["hidden"]))
    measured = exact + DELTA * np.random.default_rng(1).normal(size=len(exact))
    error = check_gradient(GUESS, measured)
    print(f"hypergradient against central differences: relative error {error:.0e}\n")
    value, atoms["guess"], _ = evaluate(GUESS, measured)
    theta, standard_errors, misfits = fit(measured, 12 if options.quick else 100)
    misfits.insert(0, 2 * float(value) / FITTED.sum())
    _, atoms["fitted"], _ = evaluate(theta, measured)
    deviations = (theta - HIDDEN) / standard_errors
    print("\nparameter      guess    found   hidden  standard error")
    for row in zip(PARAMETERS, GUESS, theta, HIDDEN, standard_errors, strict=True):
        print("{:10s} {:9.4f}{:9.4f}{:9.4f} {:15.4f}".format(*row))
    print(f"\n{'hexamethylethane':18s} central bond   error of all distances (rms)")
    errors = {}
    for name, x in atoms.items():
        found = np.asarray(distances(x))[~FITTED]
        errors[name] = np.sqrt(np.mean((found - exact[~FITTED]) ** 2))
        print(f"{name:18s} {found[0]:10.4f} Å {errors[name]:20.4f} Å")
    draw(options.output, atoms, misfits, deviations)
    assert error < 1e-7
    assert placement(atoms["fitted"]) < 1e-12
    assert misfits[-1] < 0.1 * misfits[0]
    assert options.quick or abs(misfits[-1] - 1) < 0.3
    assert options.quick or np.all(np.abs(deviations) < 3)
    assert options.quick or errors["fitted"] < DELTA


if __name__ == "__main__":
    main()
