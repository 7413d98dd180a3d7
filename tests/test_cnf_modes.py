"""A flow under PyTorch's modes, dtypes and sizes, copied, saved and asked to explain itself."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from fields import DOUBLE, Attractor, Counted, mlp, points
from torch import nn

from pycnf.flows import CNF, SolveStats, StandardNormal
from pycnf.nn import MLP

GRADIENTS = ["discrete", "continuous", "seminorm", "autograd"]


@pytest.mark.parametrize("wrap", [lambda field: field, Counted], ids=["mlp", "module"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_no_grad_and_inference_mode(wrap, divergence, steps):
    flow = CNF(wrap(mlp(context=1)), divergence=divergence, steps=steps)
    x, context = points(), points(7, 1)
    seed = {"seed": 1}
    expected = flow.log_prob(x, context, **seed)
    assert expected.requires_grad
    with torch.no_grad():
        quiet = flow.log_prob(x, context, **seed)
    with torch.inference_mode():
        inference = flow.log_prob(x.clone(), context.clone(), **seed)
        states = flow.trajectory(x.clone(), [0.5], context.clone())
    for got in (quiet, inference):
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert states.shape == (1, 7, 2)
    # And training goes on as before.
    flow.log_prob(x, context, **seed).sum().backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_empty_and_single_batches(gradient, steps):
    flow = CNF(mlp(), gradient=gradient, steps=steps, regularizers={"kinetic": 1.0})
    x = torch.zeros(0, 2, dtype=DOUBLE, requires_grad=True)
    z, logdet = flow(x)
    assert (z.shape, logdet.shape) == ((0, 2), (0,))
    assert flow.stats.nfe_forward == 0
    assert flow.stats.regularizers["kinetic"].shape == (0,)
    (z.sum() + logdet.sum()).backward()
    assert flow.sample(0).shape == (0, 2)
    many = CNF(mlp(), gradient=gradient, method="rk4", options={"num_steps": 3})
    one = many.log_prob(points(1), seed=1)
    torch.testing.assert_close(one, many.log_prob(points(), seed=1)[:1])
    one.sum().backward()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_float32_is_float64_to_its_precision(gradient):
    torch.manual_seed(0)
    field = MLP(3, (16, 16))
    wide = copy.deepcopy(field).double()
    x = torch.randn(20, 3)
    results = []
    for f, value in ((field, x), (wide, x.double())):
        flow = CNF(f, gradient=gradient, divergence="exact", method="rk4", options={"num_steps": 4})
        log_prob = flow.log_prob(value)
        assert log_prob.dtype == value.dtype
        (-log_prob.mean()).backward()
        results.append([log_prob, *(p.grad for p in f.parameters())])
    for a, b in zip(*results):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_bfloat16_runs_without_kernels():
    torch.manual_seed(0)
    field = MLP(2, (8,))
    x = torch.randn(5, 2)
    options = {"divergence": "exact", "method": "rk4", "options": {"num_steps": 2}}
    expected = CNF(copy.deepcopy(field), **options).log_prob(x)
    flow = CNF(field.bfloat16(), **options)
    log_prob = flow.log_prob(x.bfloat16())
    assert log_prob.dtype == torch.bfloat16
    torch.testing.assert_close(log_prob.float(), expected, rtol=0.05, atol=0.05)
    log_prob.sum().backward()


@pytest.mark.parametrize("wrap", [lambda field: field, Counted], ids=["mlp", "module"])
def test_autocast_leaves_a_solve_alone(wrap):
    torch.manual_seed(0)
    flow = CNF(wrap(MLP(2, (8,))))
    x = torch.randn(5, 2)
    expected = flow.log_prob(x, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flow.log_prob(x, seed=1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    flow.keep_bytes = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flow.log_prob(x, seed=1).sum().backward()
    assert next(flow.parameters()).grad.dtype == torch.float32


def test_copies_and_pickles_after_a_solve():
    flow = CNF(mlp(), regularizers={"kinetic": 1.0})
    x = points()
    expected = flow.log_prob(x, seed=1)
    assert flow.stats.regularizers["kinetic"].requires_grad
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert twin.stats is None
        assert torch.equal(twin.log_prob(x, seed=1), expected)
        with torch.no_grad():
            twin.field.layers[0].weight.zero_()
        assert torch.equal(flow.log_prob(x, seed=1), expected)


def test_state_dict():
    flow = CNF(mlp(), t1=torch.tensor(1.0, dtype=DOUBLE))
    assert all(key.startswith("field.layers.") for key in flow.state_dict())
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    other = CNF(mlp(scale=1.0))
    x = points()
    assert not torch.equal(other.log_prob(x, seed=1), flow.log_prob(x, seed=1))
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other.log_prob(x, seed=1), flow.log_prob(x, seed=1))


def test_default_base_follows_the_field():
    flow = CNF(MLP(3, (4,)))
    assert flow.sample(2).dtype == torch.float32
    assert flow.double().sample(2).dtype == DOUBLE
    assert CNF(mlp()).sample(2).dtype == DOUBLE
    assert isinstance(flow.base, StandardNormal)
    x = points(4, 3)
    normal = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    torch.testing.assert_close(flow.base.log_prob(x), normal.log_prob(x))
    torch.manual_seed(0)
    samples = StandardNormal(3).sample((50_000,))
    assert samples.mean(0).abs().max() < 0.02
    assert (torch.cov(samples.T) - torch.eye(3)).abs().max() < 0.03


def test_an_estimate_says_so_once_in_eval_mode():
    flow, exact = CNF(mlp(), probes=3), CNF(mlp(), divergence="exact")
    x = points()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(x)
        exact.eval().log_prob(x)
        flow.eval().sample(2)
    with pytest.warns(UserWarning, match=r"random estimate .*3 probes.*divergence='exact'"):
        flow.log_prob(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(x)


def test_explain():
    assert CNF(mlp()).explain().startswith("The fused engine")
    assert CNF(mlp(), engine="fused").explain().startswith("The fused engine")
    assert "Counted" in CNF(Counted(mlp())).explain()
    assert "plain callable" in CNF(lambda t, z: z).explain()
    assert "engine='generic' was asked for" in CNF(mlp(), engine="generic").explain()
    sentence = CNF(Counted(mlp())).explain()
    assert sentence.endswith(".")
    assert ". " not in sentence


def test_attributes_may_change_between_solves():
    flow = CNF(mlp())
    x = points()
    flow.divergence, flow.method, flow.rtol, flow.atol = "exact", "dopri8", 1e-10, 1e-10
    fresh = CNF(mlp(), divergence="exact", method="dopri8", rtol=1e-10, atol=1e-10)
    assert torch.equal(flow.log_prob(x), fresh.log_prob(x))
    flow.method = "dopri6"
    with pytest.raises(ValueError, match=r"method: got 'dopri6'.*mean 'dopri"):
        flow.log_prob(x)


def test_stats_before_the_first_solve():
    assert CNF(mlp()).stats is None
    assert SolveStats().nfe_backward == 0


class Features(nn.Module):
    """`features` is a layer here, as in many a user's network."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(2, 2).double()

    def forward(self, t, z):
        return self.features(z)


def test_a_field_with_features_of_another_kind():
    flow = CNF(Features(), divergence="exact", base=StandardNormal(2).double())
    x, log_prob = flow.sample_and_log_prob(4)
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=1e-4, atol=1e-4)


class NotDifferentiable(nn.Module):
    """A field computed where autograd sees nothing."""

    def forward(self, t, z):
        with torch.no_grad():
            return torch.ones_like(z)


def test_a_field_without_a_graph():
    flow = CNF(NotDifferentiable())
    x = points().requires_grad_()
    z, logdet = flow(x)
    torch.testing.assert_close(z, x - 1)
    assert torch.count_nonzero(logdet) == 0
    (gradient,) = torch.autograd.grad(z.sum() + logdet.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_training_learns_a_gaussian():
    """Maximum likelihood pulls the attractor to the data's scale: rate = -log 0.5."""
    torch.manual_seed(0)
    flow = CNF(Attractor(0.0), divergence="exact")
    x = 0.5 * torch.randn(2000, 1, dtype=DOUBLE)
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=20)

    def loss():
        optimizer.zero_grad()
        value = -flow.log_prob(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    expected = -x.square().mean().sqrt().log()
    torch.testing.assert_close(flow.field.rate.detach(), expected, rtol=1e-4, atol=0)
