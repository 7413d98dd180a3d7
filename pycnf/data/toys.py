"""Eight two-dimensional toy densities, drawn with NumPy alone.

Shapes and scales are those that the FFJORD paper (Grathwohl et al., 2019) made customary, so that
pictures and log-likelihoods can be compared with published ones. Each function takes the number of
points and a generator, and returns a float64 array [n, 2].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Generator = np.random.Generator


def eight_gaussians(n: int, rng: Generator) -> np.ndarray:
    """Eight Gaussians, standard deviation 0.35, on a circle of radius 2.83."""
    angle = rng.integers(8, size=n) * (np.pi / 4)
    centre = 4.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (centre + 0.5 * rng.standard_normal((n, 2))) / np.sqrt(2.0)


def pinwheel(n: int, rng: Generator) -> np.ndarray:
    """Five bent arms: Gaussians stretched along the radius, turned further the farther out."""
    arm = rng.integers(5, size=n) * (2 * np.pi / 5)
    radial = 1.0 + 0.3 * rng.standard_normal(n)
    tangential = 0.1 * rng.standard_normal(n)
    angle = arm + 0.25 * np.exp(radial)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2.0 * np.stack(
        [radial * cos - tangential * sin, radial * sin + tangential * cos], axis=1
    )


def two_spirals(n: int, rng: Generator) -> np.ndarray:
    """Two interleaved spirals of one and a half turns."""
    turn = np.sqrt(rng.random(n)) * 3 * np.pi
    arm = np.stack([-np.cos(turn) * turn, np.sin(turn) * turn], axis=1) + 0.5 * rng.random((n, 2))
    sign = rng.choice([-1.0, 1.0], size=(n, 1))
    return sign * arm / 3.0 + 0.1 * rng.standard_normal((n, 2))


def checkerboard(n: int, rng: Generator) -> np.ndarray:
    """The eight dark squares of a 4 x 4 board on [-4, 4]^2."""
    x = rng.random(n) * 4 - 2
    y = rng.random(n) - 2 * rng.integers(2, size=n) + np.floor(x) % 2
    return 2.0 * np.stack([x, y], axis=1)


def rings(n: int, rng: Generator) -> np.ndarray:
    """Four concentric circles of radius 0.75, 1.5, 2.25 and 3."""
    radius = 3.0 * rng.choice([0.25, 0.5, 0.75, 1.0], size=n)
    return _circle(radius, rng) + 0.08 * rng.standard_normal((n, 2))


def circles(n: int, rng: Generator) -> np.ndarray:
    """Two concentric circles of radius 1.5 and 3."""
    radius = 3.0 * rng.choice([0.5, 1.0], size=n)
    return _circle(radius, rng) + 0.24 * rng.standard_normal((n, 2))


def moons(n: int, rng: Generator) -> np.ndarray:
    """Two interlocking half circles."""
    angle = np.pi * rng.random(n)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.stack([1.0 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
    points = np.where(rng.random((n, 1)) < 0.5, upper, lower) + 0.1 * rng.standard_normal((n, 2))
    return 2.0 * points + np.array([-1.0, -0.2])


def swissroll(n: int, rng: Generator) -> np.ndarray:
    """One spiral of one and a half turns, equally many points for each angle."""
    angle = 1.5 * np.pi * (1.0 + 2.0 * rng.random(n))
    roll = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (roll + rng.standard_normal((n, 2))) / 5.0


def _circle(radius: np.ndarray, rng: Generator) -> np.ndarray:
    angle = 2 * np.pi * rng.random(len(radius))
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


TOYS: dict[str, Callable[[int, Generator], np.ndarray]] = {
    "8gaussians": eight_gaussians,
    "pinwheel": pinwheel,
    "2spirals": two_spirals,
    "checkerboard": checkerboard,
    "rings": rings,
    "moons": moons,
    "circles": circles,
    "swissroll": swissroll,
}
