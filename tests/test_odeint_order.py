"""Every method converges at its order, seen at accepted step ends in f64.

The problem is Kepler's with a clock that runs unevenly: nonlinear, coupled, dependent on time, its
solution known from Kepler's equation. Scalar or linear problems would miss order conditions.
"""

import math

import pytest
import torch
import torchdiffeq
from problems import ADAPTIVE, METHODS, STAGES, Recorder

import pycnf

F64 = torch.float64
ECCENTRICITY = 0.3
END = 2.0

# tsit5 as torchdiffeq has it propagates the embedded fourth-order weights.
ORDER = {
    "dopri5": 5,
    "dopri8": 8,
    "tsit5": 4,
    "bosh3": 3,
    "fehlberg2": 2,
    "adaptive_heun": 2,
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "heun3": 3,
    "rk4": 4,
}
# Numbers of steps, each twice the one before; the finest have errors well above f64's rounding.
STEPS = {
    "dopri5": (64, 128, 256, 512),
    "dopri8": (6, 12, 24, 48),
    "tsit5": (32, 64, 128, 256),
    "rk4": (64, 128, 256, 512),
}
DEFAULT_STEPS = (128, 256, 512, 1024)


def kepler(t, y):
    """Two-body motion in the plane, at a speed of 1 + cos(2t) / 2."""
    position, velocity = y[:2], y[2:]
    return (1 + 0.5 * torch.cos(2 * t)) * torch.cat([velocity, -position / position.norm() ** 3])


def kepler_solution(t):
    """State at time t from Kepler's equation E - e sin E = s, with s the clock's time."""
    e, s = ECCENTRICITY, t + 0.25 * math.sin(2 * t)
    anomaly = s
    for _ in range(50):
        anomaly -= (anomaly - e * math.sin(anomaly) - s) / (1 - e * math.cos(anomaly))
    b, rate = math.sqrt(1 - e * e), 1 / (1 - e * math.cos(anomaly))
    cos, sin = math.cos(anomaly), math.sin(anomaly)
    return torch.tensor([cos - e, b * sin, -sin * rate, b * cos * rate], dtype=F64)


def error(library, method, steps):
    """Error at END after equal steps: at the end of the last one but for the time's rounding."""
    h = END / steps
    if method in ADAPTIVE:
        options = {"first_step": h, "min_step": h, "max_step": h}
    else:
        options = {"step_size": h}
    field = Recorder(kepler)
    t = torch.tensor([0.0, END], dtype=F64)
    with torch.no_grad():
        ys = library.odeint(field, kepler_solution(0.0), t, method=method, options=options)
    if method in ADAPTIVE:
        attempts = (field.nfe - 1) / STAGES[method]
        assert attempts - steps in (0, 1), "the steps are not the ones asked for"
    return float((ys[-1] - kepler_solution(END)).norm())


def observed_order(errors):
    """Slope of log2(error) over halvings, by least squares on the finest three."""
    y = [math.log2(e) for e in errors[-3:]]
    return (y[0] - y[2]) / 2


@pytest.mark.parametrize("method", METHODS)
def test_order(method):
    errors = [error(pycnf, method, steps) for steps in STEPS.get(method, DEFAULT_STEPS)]
    assert errors[-1] > 5e-14, "the finest error is rounding"
    assert abs(observed_order(errors) - ORDER[method]) < 0.25, (errors, observed_order(errors))


@pytest.mark.parametrize("method", METHODS)
def test_same_error_as_torchdiffeq(method):
    """The order alone would let another method of the same order pass."""
    steps = STEPS.get(method, DEFAULT_STEPS)[0]
    assert math.isclose(
        error(pycnf, method, steps), error(torchdiffeq, method, steps), rel_tol=1e-3
    )


@pytest.mark.parametrize("method", ADAPTIVE)
def test_interpolant_converges(method):
    """Between step ends the quartic is of order min(order, that of its middle value) + 1 at most.

    The middle value's weights differ by method, so the error there is compared with torchdiffeq's.
    """

    def inner_errors(library):
        found = []
        for steps in STEPS.get(method, DEFAULT_STEPS)[:2]:
            h = END / steps
            options = {"first_step": h, "min_step": h, "max_step": h}
            t = torch.tensor([0.0, 0.3 * h, 0.5 * h, 0.75 * h], dtype=F64)
            with torch.no_grad():
                ys = library.odeint(kepler, kepler_solution(0.0), t, method=method, options=options)
            exact = torch.stack([kepler_solution(float(x)) for x in t])
            found.append((ys - exact)[1:].norm(dim=-1))
        return torch.stack(found)

    mine, theirs = inner_errors(pycnf), inner_errors(torchdiffeq)
    assert (theirs[1] < 0.3 * theirs[0]).all(), "the interpolant does not converge here"
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-15)
