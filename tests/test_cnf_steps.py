"""The step policy of the flows: what is evaluated, when, how often, and with which order."""

import math
from itertools import pairwise

import pytest
import torch
from fields import DOUBLE, Attractor, Counted, mlp, points
from torch import nn

from pycnf.flows import CNF
from pycnf.flows.control import AdaptiveControl, FixedControl, initial_step, trial_step
from pycnf.odeint.tableau import TABLEAUX

ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUX.items() if not tableau.adaptive]
FSAL = ("dopri5", "dopri8", "bosh3")


class Switch(nn.Module):
    """Calm but for a fast rotation around t = 0.5: steps are rejected there."""

    def forward(self, t, z):
        speed = 60 * torch.exp(-((9 * (t.reshape(-1, 1) - 0.5)) ** 2))
        return speed * torch.stack((z[:, 1], -z[:, 0]), 1)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("inverse", [False, True])
def test_counts_and_times(method, inverse):
    """Two evaluations choose the first step; the first stage is reused where that is true."""
    field = Counted(Switch())
    flow = CNF(
        field, method=method, rtol=1e-4, atol=1e-4, max_num_steps=20_000,
        options={"max_step": 0.2},
    )  # fmt: skip
    (flow.inverse if inverse else flow)(points(), seed=1)
    stats = flow.stats
    attempts = stats.accepted + stats.rejected
    expected = 2 + (TABLEAUX[method].stages - 1) * attempts
    if method not in FSAL:
        expected += stats.accepted - 1
    assert stats.nfe_forward == len(field.calls) == expected
    assert stats.rejected > 0
    assert stats.engine == "generic"
    times = torch.stack([t for t, _ in field.calls])
    assert ((times >= 0) & (times <= 1)).all()
    start, end = (0.0, 1.0) if inverse else (1.0, 0.0)
    assert times[0] == start
    assert end in times[-TABLEAUX[method].stages :]
    assert all(t.dim() == 0 and t.dtype == DOUBLE for t, _ in field.calls)


@pytest.mark.parametrize("method", FIXED)
def test_counts_and_times_of_grids(method):
    stages = TABLEAUX[method].stages
    for options, steps in (
        ({"num_steps": 4}, 4),
        ({"step_size": 0.3}, 4),
        ({"step_size": 0.25}, 4),
    ):
        field = Counted(mlp())
        flow = CNF(field, method=method, options=options)
        flow(points(), seed=1)
        assert flow.stats.nfe_forward == len(field.calls) == stages * steps
        assert (flow.stats.accepted, flow.stats.rejected) == (steps, 0)
    starts = [t.item() for t, _ in field.calls[::stages]]
    assert starts == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "seminorm", "autograd"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("keep", [0, 1 << 28])
def test_stats_count_the_calls_of_the_backward(gradient, steps, keep):
    field = Counted(mlp())
    flow = CNF(field, gradient=gradient, steps=steps, regularizers={"jacobian": 1.0})
    flow.keep_bytes = keep
    x = points().requires_grad_()
    with torch.no_grad():
        flow(x)  # the first solve with steps per sample tries the field's times as well
    field.calls.clear()
    loss = flow.log_prob(x).sum()
    stats = flow.stats
    assert stats.nfe_forward == len(field.calls) > 0
    assert stats.nfe_backward == 0
    flow.log_prob(x)  # a newer forward has its own stats
    assert flow.stats is not stats
    before = len(field.calls)
    loss.backward()
    assert stats.nfe_backward == len(field.calls) - before
    none = gradient == "autograd" or (gradient == "discrete" and keep and steps == "shared")
    assert (stats.nfe_backward == 0) == bool(none)


ORDERS = {"tsit5": 4}  # as torchdiffeq has it; see csrc/core/tableau.h


@pytest.mark.parametrize("method", FIXED)
def test_order_of_grids(method):
    """By regression over the finest grids, of z and of logdet."""
    field = mlp(hidden=(6,), scale=3.0)
    x = points(3)
    truth = torch.cat([part.flatten() for part in _solve(field, x, "dopri8", 1e-12)])
    errors, sizes = [], (16, 24, 36, 54)
    for size in sizes:
        flow = CNF(field, divergence="exact", method=method, options={"num_steps": size})
        with torch.no_grad():
            got = torch.cat([part.flatten() for part in flow(x)])
        errors.append((got - truth).norm().item())
    assert _slope(sizes, errors) == pytest.approx(TABLEAUX[method].order, abs=0.25)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_order_of_pairs(method):
    """With a constant step: max_step, and tolerances that accept anything."""
    field = mlp(hidden=(6,), scale=1.5)
    x = points(3)
    truth = torch.cat([part.flatten() for part in _solve(field, x, "dopri8", 1e-13)])
    sizes = (5, 7, 10) if method == "dopri8" else (16, 24, 36)
    errors = []
    for size in sizes:
        flow = CNF(
            field, divergence="exact", method=method, rtol=1e9, atol=1e9,
            options={"max_step": 1 / size, "first_step": 1.0},
        )  # fmt: skip
        with torch.no_grad():
            got = torch.cat([part.flatten() for part in flow(x)])
        assert flow.stats.accepted == size
        errors.append((got - truth).norm().item())
    expected = ORDERS.get(method, TABLEAUX[method].order)
    assert _slope(sizes, errors) == pytest.approx(
        expected, abs=0.35 if method == "dopri8" else 0.25
    )


def _solve(field, x, method, tolerance):
    with torch.no_grad():
        return CNF(field, divergence="exact", method=method, rtol=tolerance, atol=tolerance)(x)


def _slope(sizes, errors):
    """The negative slope of log error over log size."""
    a = [math.log(size) for size in sizes]
    b = [math.log(error) for error in errors]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    rise = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b))
    return -rise / sum((p - mean_a) ** 2 for p in a)


@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_stages_without_weight_evaluate_no_divergence(method):
    """A divergence of a module is a backward pass through it."""

    class Traced(torch.autograd.Function):
        backwards = 0

        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            Traced.backwards += 1
            return grad.clone()

    inner = mlp()
    field = Counted(lambda_module(lambda t, z: inner(t, Traced.apply(z))))
    flow = CNF(field, method=method)
    with torch.no_grad():
        flow(points(), seed=1)
    spared = 1 if method == "dopri5" else 4
    assert flow.stats.nfe_forward - Traced.backwards == spared * flow.stats.accepted
    Traced.backwards = 0
    flow.trajectory(points(), [0.0])
    assert Traced.backwards == 0  # no logdet, no divergence


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_error_norm_is_the_larger_of_z_and_logdet():
    """The same right-hand side with and without a divergence, which is harder to integrate."""
    calm = CNF(lambda t, z: torch.stack((torch.sin(60 * z[:, 1]) / 60, 0 * z[:, 0]), 1),
               divergence="exact")  # fmt: skip
    rough = CNF(lambda t, z: torch.stack((torch.sin(60 * z[:, 0]) / 60, 0 * z[:, 1]), 1),
                divergence="exact")  # fmt: skip
    x = points(20)
    calm(x), rough(x)
    with_logdet = rough.stats.accepted
    rough.trajectory(x, [0.0])
    assert with_logdet > calm.stats.accepted
    assert with_logdet > rough.stats.accepted


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_error_follows_the_tolerance(tolerance, steps):
    field = mlp()
    with torch.no_grad():
        truth = CNF(field, divergence="exact", method="dopri8", rtol=1e-12, atol=1e-12)(points())
        got = CNF(field, divergence="exact", steps=steps, rtol=tolerance, atol=tolerance)(points())
    for a, b in zip(got, truth):
        assert (a - b).abs().max() < 20 * tolerance


class Mixed(nn.Module):
    """Rotation whose speed is the sample's own third number: easy and hard samples."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=DOUBLE))

    def forward(self, t, z):
        speed = self.scale * z[:, 2] * (1 + t)
        return torch.stack((speed * z[:, 1], -speed * z[:, 0], 0 * speed), 1)


def mixed_points():
    x = points(6, 3)
    x[:, 2] = torch.tensor([0.1, 40.0, 1.0, 0.1, 10.0, 3.0])
    return x


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_a_sample_by_itself_and_in_a_batch(method):
    flow = CNF(Mixed(), steps="per-sample", method=method)
    x = mixed_points()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        together = flow(x, seed=1)
        assert flow.stats.accepted > 20
        shuffled = flow(x[order], seed=1)
        for i in range(6):
            alone = flow(x[i : i + 1], seed=1)
            for a, b in zip(alone, together):
                torch.testing.assert_close(a[0], b[i], rtol=1e-12, atol=1e-14)
            assert flow.stats.accepted < 7 or i in (1, 2, 4, 5)
    for a, b in zip(shuffled, together):
        torch.testing.assert_close(a, b[order], rtol=1e-12, atol=1e-14)
    shared = CNF(Mixed(), method=method)
    difference = shared(x, seed=1)[0][0] - shared(x[:1], seed=1)[0][0]
    assert difference.abs().max() > 1e-10


def test_samples_leave_when_they_are_done_and_have_their_own_times():
    field = Counted(Mixed())
    flow = CNF(field, steps="per-sample")
    flow(mixed_points(), seed=1)
    field.calls.clear()  # of the first solve, which tries the field's times as well
    flow(mixed_points(), seed=1)
    sizes = [size for _, size in field.calls]
    assert sizes[0] == 6
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) < 0.6 * len(sizes) * 6
    assert all(t.shape == (size,) for t, size in field.calls)
    middle = next(t for t, size in field.calls[8:] if size == 6)
    assert len(set(middle.tolist())) > 3


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_trajectory(steps):
    flow = CNF(Attractor(0.7), steps=steps, rtol=1e-9, atol=1e-9)
    x = points()
    times = [0.0, 1.0, 0.3, 0.9, 0.3]
    states = flow.trajectory(x, torch.tensor(times))
    assert states.shape == (5, 7, 2)
    for t, state in zip(times, states):
        torch.testing.assert_close(state, x * math.exp(0.7 * (1 - t)), rtol=1e-6, atol=1e-8)
    assert torch.equal(states[2], states[4])
    assert flow.stats.nfe_forward > 0
    (gradient,) = torch.autograd.grad(states[0].sum(), flow.field.rate)
    torch.testing.assert_close(gradient, x.sum() * math.exp(0.7), rtol=1e-6, atol=1e-8)
    assert flow.trajectory(x, []).shape == (0, 7, 2)
    grid = CNF(Attractor(0.7), method="rk4", options={"num_steps": 20})
    torch.testing.assert_close(grid.trajectory(x, times), states, rtol=1e-5, atol=1e-7)


# ---- the controller's own numbers ----------------------------------------------------------------


def test_controller():
    control = AdaptiveControl(1e-5, 1e-5)
    assert control.factor(0.0, 5) == 10
    assert control.factor(1e-12, 5) == 10
    assert control.factor(0.5, 5) == pytest.approx(0.9 * 0.5**-0.2)
    assert control.factor(0.99, 5) == 1  # an accepted step does not shrink the next
    assert control.factor(2.0, 5) == pytest.approx(0.9 * 2**-0.2)
    assert control.factor(1e9, 5) == 0.2
    assert control.factor(math.inf, 5) == control.factor(math.nan, 5) == 0.2


def test_first_step_of_hairer():
    assert trial_step(1e-7, 1.0, 1.0) == 1e-6
    assert trial_step(2.0, 4.0, 1.0) == pytest.approx(0.005)
    assert trial_step(2.0, 4.0, 1e-3) == 1e-3
    assert initial_step(1e-3, 0.0, 0.0, 5, 1.0) == pytest.approx(1e-6)
    assert initial_step(1e-3, 10.0, 3.0, 5, 1.0) == pytest.approx(0.1)  # 100 h0
    assert initial_step(0.1, 10.0, 300.0, 2, 1.0) == pytest.approx((0.01 / 300) ** 0.5)
    assert initial_step(0.1, 1e-3, 1e-3, 5, 0.7) == 0.7


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (2.0, -1.0)])
def test_grid(start, end):
    for control, count in ((FixedControl(num_steps=7), 7), (FixedControl(step_size=0.3), None)):
        grid = control.grid(start, end)
        assert grid[0] == start
        assert grid[-1] == end
        steps = [b - a for a, b in pairwise(grid)]
        assert all(step * (end - start) > 0 for step in steps)
        if count is None:
            assert len(steps) == math.ceil(abs(end - start) / 0.3 - 1e-9)
            assert [abs(step) for step in steps[:-1]] == pytest.approx([0.3] * (len(steps) - 1))
        else:
            assert len(steps) == count
            assert steps == pytest.approx([(end - start) / 7] * 7)
    # 0.1 is no binary number: ten steps, not eleven.
    assert len(FixedControl(step_size=0.1).grid(0.0, 1.0)) == 11
