"""The toy densities have the shapes that their names promise."""

import numpy as np
import pytest

from pycnf.data import TOYS, stream

N = 20_000


def draw(name, index=0):
    return TOYS[name](N, stream(0, name, index))


@pytest.mark.parametrize("name", TOYS)
def test_a_stream_gives_the_same_points_again_and_other_points_at_another_index(name):
    first, again, other = draw(name), draw(name), draw(name, 1)
    assert first.shape == (N, 2)
    assert first.dtype == np.float64
    np.testing.assert_array_equal(first, again)
    assert not np.isin(first, other).any()


def test_streams_differ_by_seed_purpose_and_index():
    draws = [
        stream(seed, purpose, index).integers(2**62)
        for seed in (0, 1)
        for purpose in ("order", "probe")
        for index in (0, 1)
    ]
    assert len(set(draws)) == 8


def test_eight_gaussians_have_eight_equal_round_modes():
    points = draw("8gaussians")
    angle = np.arange(8) * np.pi / 4
    centres = 4 / np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    offset = points[:, None] - centres
    mode = (offset**2).sum(-1).argmin(1)
    np.testing.assert_allclose(np.bincount(mode) / N, 1 / 8, atol=0.01)
    inside = offset[np.arange(N), mode]
    # A few points cross into a neighbour's half, which takes a little off the spread.
    np.testing.assert_allclose(inside.std(0), 0.5 / np.sqrt(2), rtol=0.02)


def test_checkerboard_fills_the_dark_squares_evenly():
    points = draw("checkerboard")
    square = np.floor(points / 2).astype(int)
    assert set(map(tuple, square)) == {
        (i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0
    }
    counts = np.unique(square, axis=0, return_counts=True)[1]
    np.testing.assert_allclose(counts / N, 1 / 8, atol=0.01)


@pytest.mark.parametrize(
    ("name", "radii", "noise"),
    [("rings", (0.75, 1.5, 2.25, 3.0), 0.08), ("circles", (1.5, 3.0), 0.24)],
)
def test_rings_and_circles_are_concentric(name, radii, noise):
    radius = np.linalg.norm(draw(name), axis=1)
    nearest = np.abs(radius[:, None] - np.array(radii))
    ring = nearest.argmin(1)
    np.testing.assert_allclose(np.bincount(ring) / N, 1 / len(radii), atol=0.015)
    assert np.sqrt((nearest.min(1) ** 2).mean()) == pytest.approx(noise, rel=0.06)


def test_pinwheel_has_five_arms():
    points = draw("pinwheel")
    # Turned by a fifth of a circle, the density is the same: its first four angular moments vanish.
    phase = np.exp(1j * np.arctan2(points[:, 1], points[:, 0]))
    moments = [abs((phase**k).mean()) for k in range(1, 6)]
    assert max(moments[:4]) < 0.03
    assert moments[4] > 0.05


def test_spirals_are_two_and_point_symmetric():
    points = draw("2spirals")
    np.testing.assert_allclose(points.mean(0), 0, atol=0.05)
    # Along an arm, radius grows by pi (in units of 1/3 a radian) from one arm to the other.
    radius, angle = np.linalg.norm(points, axis=1) * 3, np.arctan2(points[:, 1], -points[:, 0])
    turn = np.mod(radius - angle, np.pi)  # 0 on both arms, up to the noise
    far = radius > 3
    assert np.abs(np.exp(2j * turn[far]).mean()) > 0.6


def test_swissroll_is_one_spiral():
    x, y = draw("swissroll").T * 5
    angle = np.arctan2(y, x)
    off = np.mod(np.hypot(x, y) - angle + np.pi, 2 * np.pi) - np.pi  # radius = angle on the roll
    assert np.abs(np.exp(1j * off).mean()) > 0.5
    assert np.hypot(x, y).min() < 5.5
    assert np.hypot(x, y).max() > 13


def test_moons_lie_on_two_half_circles():
    points = (draw("moons") - np.array([-1.0, -0.2])) / 2
    upper = np.abs(np.linalg.norm(points, axis=1) - 1)
    lower = np.abs(np.linalg.norm(points - np.array([1.0, 0.5]), axis=1) - 1)
    assert np.sqrt((np.minimum(upper, lower) ** 2).mean()) == pytest.approx(0.1, rel=0.1)
    assert points[upper < 0.1][:, 1].mean() > points[lower < 0.1][:, 1].mean() + 0.5
