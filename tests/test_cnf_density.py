"""A flow is a density: it integrates to one, inverts, and its logdet is that of its Jacobian."""

import math

import pytest
import torch
import torchdiffeq
from fields import DOUBLE, Attractor, Counted, mlp, points

from pycnf.flows import CNF

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("context", [False, True])
def test_density_integrates_to_one(steps, context):
    field = mlp(hidden=(16, 16), context=1 if context else 0)
    flow = CNF(field, divergence="exact", steps=steps, rtol=1e-7, atol=1e-7)
    axis = torch.linspace(-9, 9, 91, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    c = torch.tensor([0.7], dtype=DOUBLE) if context else None
    with torch.no_grad():
        log_prob = flow.log_prob(grid, c)
    total = log_prob.exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total.item() - 1) < 1e-4
    # Not the standard normal in disguise.
    assert (log_prob - flow.base.log_prob(grid)).abs().max() > 1


def test_a_flow_known_in_closed_form():
    """f = -a z on [0, 2]: x = e^{-2a} z, log p(x) = log N(z) + 2 a D."""
    flow = CNF(Attractor(0.6), divergence="exact", t1=2.0, **TIGHT)
    x = points(5, 3)
    z, logdet = flow(x)
    torch.testing.assert_close(z, x * math.exp(1.2), rtol=1e-8, atol=0)
    torch.testing.assert_close(logdet, torch.full_like(logdet, 3.6), rtol=1e-8, atol=0)
    back, same = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(same, logdet, rtol=1e-8, atol=0)


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, -0.5)], ids=["ascending", "descending"])
def test_inverse_inverts_with_the_same_logdet(steps, ends):
    flow = CNF(mlp(), divergence="exact", steps=steps, t0=ends[0], t1=ends[1], **TIGHT)
    x = points()
    with torch.no_grad():
        z, logdet = flow(x)
        back, same = flow.inverse(z)
        other, _ = flow.inverse(x)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(same, logdet, rtol=0, atol=1e-7)
    assert (z - x).abs().max() > 0.1
    assert (other - z).abs().max() > 0.1


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
def test_logdet_is_slogdet_of_the_flows_jacobian(inverse, method):
    tolerance = 1e-6 if method == "bosh3" else 1e-9
    flow = CNF(
        mlp(features=3), divergence="exact", method=method, rtol=tolerance, atol=tolerance,
        gradient="autograd",
    )  # fmt: skip
    x = points(4, 3)
    run = flow.inverse if inverse else flow
    _, logdet = run(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: run(x)[0].sum(0), x)  # [D, B, D]
    expected = torch.linalg.slogdet(jacobian.transpose(0, 1))[1]
    torch.testing.assert_close(logdet, -expected if inverse else expected, rtol=0, atol=1e-5)
    assert logdet.abs().max() > 0.1


def test_exact_is_the_mean_of_unit_probes():
    """On a fixed grid ℓ is linear in the divergence."""
    field = mlp(features=3, hidden=(6, 6, 6))
    options = {"method": "rk4", "options": {"num_steps": 5}}
    x = points(4, 3)
    unit = (3**0.5 * torch.eye(3, dtype=DOUBLE)).unsqueeze(1).expand(3, 4, 3)
    exact = CNF(field, divergence="exact", **options)(x)
    by_probes = CNF(field, **options)(x, probe=unit)
    for got, expected in zip(by_probes, exact):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("wrap", [lambda field: field, Counted], ids=["mlp", "module"])
def test_many_probes_are_the_mean_of_each(wrap):
    flow = CNF(wrap(mlp(features=3)), method="rk4", options={"step_size": 0.3})
    x = points(4, 3)
    probe = points(20, 3, seed=5).view(5, 4, 3)
    each = torch.stack([flow(x, probe=probe[k : k + 1])[1] for k in range(5)])
    torch.testing.assert_close(flow(x, probe=probe)[1], each.mean(0), rtol=1e-11, atol=1e-13)
    assert each.std(0).min() > 1e-3  # the probes do differ


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_over_seeds(noise):
    field = mlp(features=3)
    options = {"method": "rk4", "options": {"num_steps": 4}}
    x = points(1, 3).expand(4000, 3).contiguous()
    keys = torch.arange(4000)  # one sample under 4000 probes
    with torch.no_grad():
        exact = CNF(field, divergence="exact", **options)(x[:1])[1].item()
        estimates = CNF(field, noise=noise, **options)(x, seed=1, keys=keys)[1]
    error = estimates.std().item() / 4000**0.5
    assert abs(estimates.mean().item() - exact) < 4 * error
    assert 0 < error < 0.1 * abs(exact)


class Ffjord(torch.nn.Module):
    """The field of FFJORD's code for torchdiffeq: (z, ℓ) -> (f, -εᵀ ∂f/∂z ε)."""

    def __init__(self, field, probe):
        super().__init__()
        self.field = field
        self.probe = probe

    def forward(self, t, state):
        with torch.enable_grad():
            z = state[0].requires_grad_()
            f = self.field(t, z)
            (vjp,) = torch.autograd.grad(f, z, self.probe, create_graph=True)
        return f, -(vjp * self.probe).sum(1)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_loss_and_gradient_are_those_of_a_tight_torchdiffeq_solve(method, steps):
    field = mlp()
    x = points().requires_grad_()
    probe = points(seed=3).sign().unsqueeze(0)
    z, change = torchdiffeq.odeint(
        Ffjord(field, probe[0]),
        (x, x.new_zeros(7)),
        torch.tensor([1.0, 0.0], dtype=DOUBLE),
        rtol=1e-11,
        atol=1e-11,
    )
    log_base = -0.5 * z[-1].square().sum(1) - math.log(2 * math.pi)
    expected = log_base - change[-1]
    inputs = [x, *field.parameters()]
    gradients = torch.autograd.grad(expected.sum(), inputs)
    flow = CNF(field, method=method, steps=steps, **TIGHT)
    got = flow.log_prob(x, probe=probe)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_sample_and_log_prob_agree_with_log_prob():
    flow = CNF(mlp(context=1), divergence="exact", **TIGHT)
    context = points(50, 1)
    x, log_prob = flow.sample_and_log_prob(50, context)
    torch.testing.assert_close(flow.log_prob(x, context), log_prob, rtol=0, atol=1e-6)


def test_samples_have_the_flows_distribution():
    """x = e^{-a} z with z ~ N(0, I)."""
    torch.manual_seed(0)
    flow = CNF(Attractor(1.0), base=torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)), 1
    ))  # fmt: skip
    x = flow.sample(20000)
    assert x.shape == (20000, 2)
    assert x.dtype == DOUBLE
    assert not x.requires_grad
    assert (x.mean(0).abs() < 4 * math.exp(-1) / 20000**0.5).all()
    torch.testing.assert_close(
        x.var(0), torch.full((2,), math.exp(-2), dtype=DOUBLE), rtol=0.05, atol=0
    )


def test_context_moves_the_density():
    flow = CNF(mlp(context=2), divergence="exact")
    x = points()
    shared = torch.tensor([0.3, -2.0], dtype=DOUBLE)
    a = flow.log_prob(x, shared)
    torch.testing.assert_close(flow.log_prob(x, shared.expand(7, 2)), a, rtol=1e-10, atol=1e-12)
    assert (flow.log_prob(x, -shared) - a).abs().min() > 1e-3
