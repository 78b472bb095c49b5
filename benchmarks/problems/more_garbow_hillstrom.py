"""The test problems of Moré, Garbow and Hillstrom: minimize `f(x) = sum_i f_i(x)^2`.

"Testing Unconstrained Optimization Software", ACM Transactions on Mathematical Software 7(1), 1981.
Names, numbers, starts and letters are the paper's. Data are made in the dtype of `x`, so a problem
is float32 or float64 as its argument is. Residuals multiply and sum where `@` would be shorter: a
GPU may round the float32 products of `@`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Problem:
    """Minimize `f(x) = sum_i f_i(x)^2` from the standard start.

    Attributes:
        name: Name of the function, and `n` where the paper leaves it open.
        number: Number of the function in the paper.
        residuals: `x` to the array of `f_i(x)`, in the dtype of `x`.
        x0: Standard start.
        minimum: Published values of `f` at its minimizers, local ones and ones at infinity too.
    """

    name: str
    number: int
    residuals: Callable[[jax.Array], jax.Array]
    x0: tuple[float, ...]
    minimum: tuple[float, ...]

    def value(self, x: jax.Array) -> jax.Array:
        """Return `f(x)`."""
        return jnp.sum(self.residuals(x) ** 2)


def indices(m: int, x: jax.Array) -> jax.Array:
    """Return `1, ..., m` in the dtype of `x`."""
    return jnp.arange(1, m + 1, dtype=x.dtype)


def neighbours(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `x_{i-1}` and `x_{i+1}` for each `i`, zero beyond the ends."""
    padded = jnp.pad(x, 1)
    return padded[:-2], padded[2:]


def rosenbrock(x: jax.Array) -> jax.Array:
    """Rosenbrock, 1."""
    x1, x2 = x
    return jnp.stack([10 * (x2 - x1**2), 1 - x1])


def freudenstein_roth(x: jax.Array) -> jax.Array:
    """Freudenstein and Roth, 2; 48.9842 is a local minimum."""
    x1, x2 = x
    return jnp.stack([-13 + x1 + ((5 - x2) * x2 - 2) * x2, -29 + x1 + ((x2 + 1) * x2 - 14) * x2])


def powell_badly_scaled(x: jax.Array) -> jax.Array:
    """Powell badly scaled, 3."""
    x1, x2 = x
    return jnp.stack([1e4 * x1 * x2 - 1, jnp.exp(-x1) + jnp.exp(-x2) - 1.0001])


def brown_badly_scaled(x: jax.Array) -> jax.Array:
    """Brown badly scaled, 4."""
    x1, x2 = x
    return jnp.stack([x1 - 1e6, x2 - 2e-6, x1 * x2 - 2])


def beale(x: jax.Array) -> jax.Array:
    """Beale, 5."""
    x1, x2 = x
    return jnp.array([1.5, 2.25, 2.625], x.dtype) - x1 * (1 - x2 ** jnp.arange(1, 4))


def jennrich_sampson(x: jax.Array, m: int = 10) -> jax.Array:
    """Jennrich and Sampson, 6."""
    x1, x2 = x
    i = indices(m, x)
    return 2 + 2 * i - (jnp.exp(i * x1) + jnp.exp(i * x2))


def helical_valley(x: jax.Array) -> jax.Array:
    """Helical valley, 7; its angle in turns is in (-1/4, 3/4], as in the paper."""
    x1, x2, x3 = x
    turns = jnp.arctan2(x2, x1) / (2 * math.pi)
    theta = jnp.where(turns <= -0.25, turns + 1, turns)
    return jnp.stack([10 * (x3 - 10 * theta), 10 * (jnp.sqrt(x1**2 + x2**2) - 1), x3])


def bard(x: jax.Array) -> jax.Array:
    """Bard, 8; 17.4286 is the limit as `x2` and `x3` go to minus infinity."""
    x1, x2, x3 = x
    u = indices(15, x)
    v = 16 - u
    w = jnp.minimum(u, v)
    y = jnp.array(
        [.14, .18, .22, .25, .29, .32, .35, .39, .37, .58, .73, .96, 1.34, 2.10, 4.39], x.dtype
    )  # fmt: skip
    return y - (x1 + u / (v * x2 + w * x3))


def gaussian(x: jax.Array) -> jax.Array:
    """Gaussian, 9."""
    x1, x2, x3 = x
    t = (8 - indices(15, x)) / 2
    rising = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]
    y = jnp.array([*rising, 0.3989, *reversed(rising)], x.dtype)
    return x1 * jnp.exp(-x2 * (t - x3) ** 2 / 2) - y


def meyer(x: jax.Array) -> jax.Array:
    """Meyer, 10."""
    x1, x2, x3 = x
    t = 45 + 5 * indices(16, x)
    y = jnp.array(
        [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744,
         8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872], x.dtype
    )  # fmt: skip
    return x1 * jnp.exp(x2 / (t + x3)) - y


def gulf(x: jax.Array, m: int = 99) -> jax.Array:
    """Gulf research and development, 11, where the paper misprints `y_i - x2` as `y_i m i x2`."""
    x1, x2, x3 = x
    t = indices(m, x) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x2) ** x3) / x1) - t


def box(x: jax.Array, m: int = 10) -> jax.Array:
    """Box three-dimensional, 12."""
    x1, x2, x3 = x
    t = indices(m, x) / 10
    return jnp.exp(-t * x1) - jnp.exp(-t * x2) - x3 * (jnp.exp(-t) - jnp.exp(-10 * t))


def powell_singular(x: jax.Array) -> jax.Array:
    """Powell singular, 13."""
    x1, x2, x3, x4 = x
    return jnp.stack(
        [
            x1 + 10 * x2,
            math.sqrt(5) * (x3 - x4),
            (x2 - 2 * x3) ** 2,
            math.sqrt(10) * (x1 - x4) ** 2,
        ]
    )


def wood(x: jax.Array) -> jax.Array:
    """Wood, 14."""
    x1, x2, x3, x4 = x
    return jnp.stack(
        [
            10 * (x2 - x1**2),
            1 - x1,
            math.sqrt(90) * (x4 - x3**2),
            1 - x3,
            math.sqrt(10) * (x2 + x4 - 2),
            (x2 - x4) / math.sqrt(10),
        ]
    )


def kowalik_osborne(x: jax.Array) -> jax.Array:
    """Kowalik and Osborne, 15; 1.02734e-3 is the limit as `x1`, `-x3` and `-x4` go to infinity."""
    x1, x2, x3, x4 = x
    y = jnp.array(
        [.1957, .1947, .1735, .1600, .0844, .0627, .0456, .0342, .0323, .0235, .0246], x.dtype
    )  # fmt: skip
    u = jnp.array([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625], x.dtype)
    return y - x1 * (u**2 + u * x2) / (u**2 + u * x3 + x4)


def brown_dennis(x: jax.Array, m: int = 20) -> jax.Array:
    """Brown and Dennis, 16."""
    x1, x2, x3, x4 = x
    t = indices(m, x) / 5
    return (x1 + t * x2 - jnp.exp(t)) ** 2 + (x3 + x4 * jnp.sin(t) - jnp.cos(t)) ** 2


def osborne_1(x: jax.Array) -> jax.Array:
    """Osborne 1, 17."""
    x1, x2, x3, x4, x5 = x
    t = 10 * (indices(33, x) - 1)
    y = jnp.array(
        [.844, .908, .932, .936, .925, .908, .881, .850, .818, .784, .751, .718, .685, .658, .628,
         .603, .580, .558, .538, .522, .506, .490, .478, .467, .457, .448, .438, .431, .424, .420,
         .414, .411, .406], x.dtype
    )  # fmt: skip
    return y - (x1 + x2 * jnp.exp(-t * x4) + x3 * jnp.exp(-t * x5))


def biggs_exp6(x: jax.Array, m: int = 13) -> jax.Array:
    """Biggs EXP6, 18; 5.65565e-3 is a local minimum."""
    x1, x2, x3, x4, x5, x6 = x
    t = indices(m, x) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    return x3 * jnp.exp(-t * x1) - x4 * jnp.exp(-t * x2) + x6 * jnp.exp(-t * x5) - y


def osborne_2(x: jax.Array) -> jax.Array:
    """Osborne 2, 19."""
    t = ((indices(65, x) - 1) / 10)[:, None]
    y = jnp.array(
        [1.366, 1.191, 1.112, 1.013, .991, .885, .831, .847, .786, .725, .746, .679, .608, .655,
         .616, .606, .602, .626, .651, .724, .649, .649, .694, .644, .624, .661, .612, .558, .533,
         .495, .500, .423, .395, .375, .372, .391, .396, .405, .428, .429, .523, .562, .607, .653,
         .672, .708, .633, .668, .645, .632, .591, .559, .597, .625, .739, .710, .729, .720, .636,
         .581, .428, .292, .162, .098, .054], x.dtype
    )  # fmt: skip
    decay = x[0] * jnp.exp(-t[:, 0] * x[4])
    return y - (decay + jnp.sum(x[1:4] * jnp.exp(-((t - x[8:]) ** 2) * x[5:8]), axis=1))


def watson(x: jax.Array) -> jax.Array:
    """Watson, 20."""
    n = len(x)
    powers = (indices(29, x) / 29)[:, None] ** jnp.arange(n)
    derivative = jnp.sum(indices(n - 1, x) * x[1:] * powers[:, :-1], axis=1)
    inner = derivative - jnp.sum(x * powers, axis=1) ** 2 - 1
    return jnp.hstack([inner, x[0], x[1] - x[0] ** 2 - 1])


def extended_rosenbrock(x: jax.Array) -> jax.Array:
    """Extended Rosenbrock, 21."""
    return jax.vmap(rosenbrock)(x.reshape(-1, 2)).ravel()


def extended_powell_singular(x: jax.Array) -> jax.Array:
    """Extended Powell singular, 22."""
    return jax.vmap(powell_singular)(x.reshape(-1, 4)).ravel()


def penalty_1(x: jax.Array) -> jax.Array:
    """Penalty I, 23."""
    return jnp.hstack([math.sqrt(1e-5) * (x - 1), jnp.sum(x**2) - 0.25])


def penalty_2(x: jax.Array) -> jax.Array:
    """Penalty II, 24."""
    n = len(x)
    i = indices(n, x)
    e, y = jnp.exp(x / 10), jnp.exp(i / 10)
    pairs = e[1:] + e[:-1] - (y[1:] + y[:-1])
    singles = e[1:] - math.exp(-0.1)
    last = jnp.sum((n - i + 1) * x**2) - 1
    return jnp.hstack([x[0] - 0.2, math.sqrt(1e-5) * pairs, math.sqrt(1e-5) * singles, last])


def variably_dimensioned(x: jax.Array) -> jax.Array:
    """Variably dimensioned, 25."""
    s = jnp.sum(indices(len(x), x) * (x - 1))
    return jnp.hstack([x - 1, s, s**2])


def trigonometric(x: jax.Array) -> jax.Array:
    """Trigonometric, 26; 2.79506e-5 is a well-known local minimum that the paper does not list."""
    n = len(x)
    return n - jnp.sum(jnp.cos(x)) + indices(n, x) * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear(x: jax.Array) -> jax.Array:
    """Brown almost-linear, 27; 1 is a local minimum."""
    return jnp.hstack([x[:-1] + jnp.sum(x) - (len(x) + 1), jnp.prod(x) - 1])


def discrete_boundary_value(x: jax.Array) -> jax.Array:
    """Discrete boundary value, 28."""
    n = len(x)
    h = 1 / (n + 1)
    before, after = neighbours(x)
    return 2 * x - before - after + h**2 * (x + h * indices(n, x) + 1) ** 3 / 2


def discrete_integral_equation(x: jax.Array) -> jax.Array:
    """Discrete integral equation, 29, its two sums as one with Green's function."""
    n = len(x)
    h = 1 / (n + 1)
    t = h * indices(n, x)
    green = jnp.minimum(t[:, None], t) * (1 - jnp.maximum(t[:, None], t))
    return x + h * jnp.sum(green * (x + t + 1) ** 3, axis=1) / 2


def broyden_tridiagonal(x: jax.Array) -> jax.Array:
    """Broyden tridiagonal, 30."""
    before, after = neighbours(x)
    return (3 - 2 * x) * x - before - 2 * after + 1


def broyden_banded(x: jax.Array) -> jax.Array:
    """Broyden banded, 31."""
    i = jnp.arange(len(x))
    below = i[:, None] - i
    band = (-1 <= below) & (below <= 5) & (below != 0)
    return x * (2 + 5 * x**2) + 1 - jnp.sum(jnp.where(band, x * (1 + x), 0), axis=1)


def linear_full_rank(x: jax.Array, m: int = 20) -> jax.Array:
    """Linear, full rank, 32."""
    return jnp.pad(x, (0, m - len(x))) - 2 / m * jnp.sum(x) - 1


def linear_rank_1(x: jax.Array, m: int = 20) -> jax.Array:
    """Linear, rank 1, 33."""
    return indices(m, x) * jnp.sum(indices(len(x), x) * x) - 1


def linear_rank_1_zeros(x: jax.Array, m: int = 20) -> jax.Array:
    """Linear, rank 1 with zero columns and rows, 34."""
    s = jnp.sum((indices(len(x), x) * x)[1:-1])
    return jnp.pad(indices(m - 2, x), 1) * s - 1


def chebyquad(x: jax.Array) -> jax.Array:
    """Chebyquad, 35, with the shifted Chebyshev polynomials from their recurrence."""
    n = len(x)
    integrals = [0.0 if i % 2 else -1 / (i**2 - 1) for i in range(1, n + 1)]
    z = 2 * x - 1

    def step(carry, _):
        before, T = carry
        return (T, 2 * z * T - before), T

    _, T = jax.lax.scan(step, (jnp.ones_like(x), z), length=n)
    return jnp.mean(T, axis=1) - jnp.array(integrals, x.dtype)


GRID = tuple(i / 11 for i in range(1, 11))
PARABOLA = tuple(t * (t - 1) for t in GRID)

PROBLEMS = (
    Problem("Rosenbrock", 1, rosenbrock, (-1.2, 1.0), (0.0,)),
    Problem("Freudenstein and Roth", 2, freudenstein_roth, (0.5, -2.0), (0.0, 48.9842)),
    Problem("Powell badly scaled", 3, powell_badly_scaled, (0.0, 1.0), (0.0,)),
    Problem("Brown badly scaled", 4, brown_badly_scaled, (1.0, 1.0), (0.0,)),
    Problem("Beale", 5, beale, (1.0, 1.0), (0.0,)),
    Problem("Jennrich and Sampson", 6, jennrich_sampson, (0.3, 0.4), (124.362,)),
    Problem("Helical valley", 7, helical_valley, (-1.0, 0.0, 0.0), (0.0,)),
    Problem("Bard", 8, bard, (1.0, 1.0, 1.0), (8.21487e-3, 17.4286)),
    Problem("Gaussian", 9, gaussian, (0.4, 1.0, 0.0), (1.12793e-8,)),
    Problem("Meyer", 10, meyer, (0.02, 4000.0, 250.0), (87.9458,)),
    Problem("Gulf research and development", 11, gulf, (5.0, 2.5, 0.15), (0.0,)),
    Problem("Box three-dimensional", 12, box, (0.0, 10.0, 20.0), (0.0,)),
    Problem("Powell singular", 13, powell_singular, (3.0, -1.0, 0.0, 1.0), (0.0,)),
    Problem("Wood", 14, wood, (-3.0, -1.0, -3.0, -1.0), (0.0,)),
    Problem(
        "Kowalik and Osborne",
        15,
        kowalik_osborne,
        (0.25, 0.39, 0.415, 0.39),
        (3.07505e-4, 1.02734e-3),
    ),
    Problem("Brown and Dennis", 16, brown_dennis, (25.0, 5.0, -5.0, -1.0), (85822.2,)),
    Problem("Osborne 1", 17, osborne_1, (0.5, 1.5, -1.0, 0.01, 0.02), (5.46489e-5,)),
    Problem("Biggs EXP6", 18, biggs_exp6, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), (0.0, 5.65565e-3)),
    Problem(
        "Osborne 2",
        19,
        osborne_2,
        (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5),
        (4.01377e-2,),
    ),
    Problem("Watson, n=6", 20, watson, (0.0,) * 6, (2.28767e-3,)),
    Problem("Watson, n=9", 20, watson, (0.0,) * 9, (1.39976e-6,)),
    Problem("Watson, n=12", 20, watson, (0.0,) * 12, (4.72238e-10,)),
    Problem("Extended Rosenbrock, n=100", 21, extended_rosenbrock, (-1.2, 1.0) * 50, (0.0,)),
    Problem(
        "Extended Powell singular, n=100",
        22,
        extended_powell_singular,
        (3.0, -1.0, 0.0, 1.0) * 25,
        (0.0,),
    ),
    Problem("Penalty I, n=4", 23, penalty_1, (1.0, 2.0, 3.0, 4.0), (2.24997e-5,)),
    Problem("Penalty I, n=10", 23, penalty_1, tuple(map(float, range(1, 11))), (7.08765e-5,)),
    Problem("Penalty II, n=4", 24, penalty_2, (0.5,) * 4, (9.37629e-6,)),
    Problem("Penalty II, n=10", 24, penalty_2, (0.5,) * 10, (2.93660e-4,)),
    Problem(
        "Variably dimensioned, n=10",
        25,
        variably_dimensioned,
        tuple(1 - i / 10 for i in range(1, 11)),
        (0.0,),
    ),
    Problem("Trigonometric, n=10", 26, trigonometric, (0.1,) * 10, (0.0, 2.79506e-5)),
    Problem("Brown almost-linear, n=10", 27, brown_almost_linear, (0.5,) * 10, (0.0, 1.0)),
    Problem("Discrete boundary value, n=10", 28, discrete_boundary_value, PARABOLA, (0.0,)),
    Problem("Discrete integral equation, n=10", 29, discrete_integral_equation, PARABOLA, (0.0,)),
    Problem("Broyden tridiagonal, n=10", 30, broyden_tridiagonal, (-1.0,) * 10, (0.0,)),
    Problem("Broyden banded, n=10", 31, broyden_banded, (-1.0,) * 10, (0.0,)),
    Problem("Linear, full rank, n=10", 32, linear_full_rank, (1.0,) * 10, (10.0,)),
    Problem("Linear, rank 1, n=10", 33, linear_rank_1, (1.0,) * 10, (190 / 41,)),
    Problem("Linear, rank 1 with zeros, n=10", 34, linear_rank_1_zeros, (1.0,) * 10, (227 / 37,)),
    Problem("Chebyquad, n=8", 35, chebyquad, tuple(i / 9 for i in range(1, 9)), (3.51687e-3,)),
    Problem("Chebyquad, n=10", 35, chebyquad, GRID, (6.50395e-3,)),
)
