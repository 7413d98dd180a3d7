"""Bad input is one clear error; a solve that cannot go on says where, and never hangs."""

import math

import pytest
import torch
from fields import DOUBLE, mlp, points
from torch import nn

import pycnf.flows
from pycnf.flows import CNF, SolveError
from pycnf.nn import MLP


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"field": 3}, TypeError, "field: got 3, expected a callable"),
        ({"divergence": "hutchinsons"}, ValueError, "divergence: got 'hutchinsons'.*mean 'hutch"),
        ({"noise": "uniform"}, ValueError, "noise: got 'uniform', expected one of rademacher, g"),
        ({"probes": 0}, ValueError, "probes: got 0"),
        ({"method": "rk5"}, ValueError, "method: got 'rk5', expected one of .*mean 'rk4'"),
        ({"rtol": -1.0}, ValueError, "rtol: got -1.0"),
        ({"atol": float("nan")}, ValueError, "atol: got nan"),
        ({"atol": 0.0}, ValueError, "atol: got 0, expected a number above 0"),
        ({"t0": 1.0}, ValueError, "t0, t1: got 1.0 and 1.0, expected two different times"),
        ({"t1": torch.zeros(2)}, ValueError, r"t1: got shape \(2,\)"),
        ({"gradient": "adjoint"}, ValueError, "gradient: got 'adjoint'"),
        ({"steps": "own"}, ValueError, "steps: got 'own'"),
        ({"engine": "jit"}, ValueError, "engine: got 'jit'"),
        ({"engine": "fused", "gradient": "autograd"}, ValueError, "but gradient='autograd' goes"),
        ({"engine": "fused", "field": nn.Linear(2, 2)}, ValueError, "but the field is a Linear"),
        ({"max_num_steps": 0}, ValueError, "max_num_steps: got 0"),
        (
            {"options": {"step_size": 0.1}},
            ValueError,
            "options: got 'step_size', expected any of f",
        ),
        ({"options": {"first_step": 0.0}}, ValueError, "first_step=0.0, expected a number above"),
        ({"options": {"first_step": "0.1"}}, ValueError, "first_step='0.1', expected a number"),
        ({"options": {"max_step": True}}, ValueError, "max_step=True, expected a number"),
        ({"options": {"safety": 2.0}}, ValueError, "safety=2.0, expected .*at most 1"),
        ({"options": {"ifactor": 0.1}}, ValueError, "ifactor=0.1, expected .*at least 1"),
        ({"options": {"dfactor": 10.0}}, ValueError, "dfactor=10.0, expected .*at most 1"),
        ({"probes": 2**31}, ValueError, r"probes: got 2147483648, expected .*below 2\^31"),
        ({"rtol": True}, ValueError, "rtol: got True, expected a number"),
        ({"atol": 10**400}, ValueError, "atol: got 10000"),
        ({"t0": torch.tensor(0j)}, TypeError, "t0: got torch.complex64, expected a real"),
        ({"method": "rk4"}, ValueError, "expected step_size or num_steps for the fixed-step"),
        (
            {"method": "rk4", "options": {"step_size": 0.1, "num_steps": 3}},
            ValueError,
            "expected step_size or num_steps",
        ),
        ({"method": "rk4", "options": {"num_steps": 0}}, ValueError, "num_steps=0"),
        ({"method": "rk4", "options": {"num_steps": 2.5}}, ValueError, "num_steps=2.5"),
        ({"method": "rk4", "options": {"step_size": -1}}, ValueError, "step_size=-1"),
        ({"method": "rk4", "options": {"rtol": 1}}, ValueError, "options: got 'rtol'"),
        ({"regularizers": {"energy": 1.0}}, ValueError, "regularizers: got 'energy', expected any"),
        ({"regularizers": {"kinetic": float("inf")}}, ValueError, "expected a weight"),
    ],
)
def test_bad_construction(arguments, error, says):
    with pytest.raises(error, match=says):
        CNF(**{"field": mlp(), **arguments})


X = points()


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("method", "rk5", ValueError, "method: got 'rk5'"),
        ("rtol", torch.ones(2), ValueError, "rtol: got tensor"),
        ("rtol", None, ValueError, "rtol: got None"),
        ("probes", True, ValueError, "probes: got True"),
        ("max_num_steps", 2.0, ValueError, "max_num_steps: got 2.0"),
        ("options", 5, TypeError, "options: got 5, expected a dict or None"),
        ("options", {"first_step": "a"}, ValueError, "first_step='a', expected a number above 0"),
        ("options", {"first_step": torch.tensor(-1.0)}, ValueError, "expected a number above 0"),
        ("regularizers", "kinetic", TypeError, "regularizers: got 'kinetic', expected a dict"),
        ("regularizers", {"kinetic": [1.0]}, ValueError, r"regularizers: got \[1.0\]"),
        ("t0", None, TypeError, "t0: got None, expected a number"),
        ("t1", 0.0, ValueError, "t0, t1: got 0.0 and 0.0"),
        ("engine", "jit", ValueError, "engine: got 'jit'"),
    ],
)
@pytest.mark.parametrize("engine", ["fused", "generic"])
def test_bad_setting_after_construction(engine, name, value, error, says):
    flow = CNF(mlp(), engine=engine)
    flow(X)
    setattr(flow, name, value)
    with pytest.raises(error, match=says):
        flow(X)


def test_settings_count_from_the_next_call_on():
    flow = CNF(mlp(), method="rk4", options={"num_steps": 4})
    flow(X)
    assert flow.stats.accepted == 4
    flow.options["num_steps"] = 3
    flow(X)
    assert flow.stats.accepted == 3
    flow.options["num_steps"] = 3.0
    with pytest.raises(ValueError, match=r"num_steps=3\.0"):
        flow(X)
    flow.options = {"first_step": torch.tensor(0.5)}
    flow.method = "dopri5"
    flow(X)
    few = flow.stats.accepted
    flow.options["first_step"].fill_(1e-6)
    flow(X)
    assert flow.stats.accepted > few
    flow.options = None
    flow.rtol = flow.atol = 1e-9
    flow(X)
    assert flow.stats.accepted > few
    flow.engine = "generic"
    flow(X)
    assert flow.stats.engine == "generic"


@pytest.mark.parametrize(
    ("field", "arguments", "error", "says"),
    [
        (mlp(), ([1.0, 2.0],), TypeError, "x: got list, expected a tensor"),
        (mlp(), (X[0],), ValueError, r"x: got shape \(2,\), expected \[B, 2\]"),
        (mlp(), (points(7, 3),), ValueError, r"x: got shape \(7, 3\), expected \[B, 2\]"),
        (
            mlp(),
            (X.float(),),
            TypeError,
            "x: got torch.float32, expected the field's torch.float64",
        ),
        (MLP(2), (X,), TypeError, "x: got torch.float64, expected the field's torch.float32"),
        (nn.Linear(2, 2), (X,), TypeError, "expected the field's torch.float32"),
        (lambda t, z: z, (X.long(),), TypeError, "x: got torch.int64, expected a floating dtype"),
        (mlp(), (X, torch.ones(1).double()), ValueError, "context: .*expected None"),
        (mlp(context=1), (X,), ValueError, "context: got None"),
        (mlp(context=1), (X, torch.ones(6, 1).double()), ValueError, r"context: got shape \(6, 1"),
        (mlp(context=1), (X, 3.0), TypeError, "context: got float"),
        (mlp(context=1), (X, torch.ones(1)), TypeError, "context: got torch.float32"),
        (lambda t, z: z[:, :1], (X,), ValueError, r"field: returned shape \(7, 1\)"),
        (lambda t, z: z.float(), (X,), TypeError, "field: returned torch.float32, expected z's"),
    ],
)
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_bad_input(field, arguments, error, says, steps):
    with pytest.raises(error, match=says):
        CNF(field, steps=steps)(*arguments)


def test_bad_sampling():
    with pytest.raises(ValueError, match=r"give base=pycnf\.flows\.StandardNormal"):
        CNF(lambda t, z: z).sample(3)
    with pytest.raises(ValueError, match="n: got -1"):
        CNF(mlp()).sample(-1)
    normal = torch.distributions.Normal(torch.zeros(2).double(), torch.ones(2).double())
    with pytest.raises(ValueError, match=r"base: log_prob returned shape \(7, 2\).*Independent"):
        CNF(mlp(), base=normal).log_prob(X)
    with pytest.raises(ValueError, match=r"times: got 1\.5, expected times between"):
        CNF(mlp()).trajectory(X, [0.5, 1.5])


def test_names_of_the_package():
    assert set(pycnf.flows.__all__) == {"CNF", "SolveError", "SolveStats", "StandardNormal"}


class Hard(nn.Module):
    """A rotation whose speed is the sample's third number."""

    def forward(self, t, z):
        return torch.stack((z[:, 2] * z[:, 1], -z[:, 2] * z[:, 0], 0 * z[:, 2]), 1)


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_too_many_steps_name_time_size_and_sample(steps, method):
    x = torch.ones(5, 3, dtype=DOUBLE)
    x[3, 2] = 300
    flow = CNF(Hard(), max_num_steps=30, steps=steps, method=method)
    where = r"max_num_steps \(30\) exceeded at t = 0\.\d+ with step size \d"
    with pytest.raises(SolveError, match=where + r"\S*; .* sample 3\. Loosen"):
        flow(x, seed=1)
    assert CNF(Hard(), max_num_steps=10_000, steps=steps, method=method)(x, seed=1)


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_exactly_enough_steps(steps):
    field = mlp()
    flow = CNF(field, steps=steps)
    flow(X[:1], seed=1)
    needed = flow.stats.accepted + flow.stats.rejected
    flow.max_num_steps = needed
    flow(X[:1], seed=1)
    flow.max_num_steps = needed - 1
    with pytest.raises(SolveError, match="exceeded"):
        flow(X[:1], seed=1)


class Poison(nn.Module):
    """Not a number for one sample, from (going backwards) t = 0.5 on."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, t, z):
        bad = (t.reshape(-1, 1) < 0.5) & (z[:, 1:] > 100)
        return torch.where(bad, self.value, 0.1 * z)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5"])
def test_values_that_are_not_finite_name_the_sample(value, steps, method):
    x = points()
    x[4, 1] = 1000
    flow = CNF(Poison(value), steps=steps, method=method, divergence="exact")
    with pytest.raises(
        SolveError,
        match=r"underflow of the step size \(values are not finite\) at t = 0\.5.*sample 4\. The",
    ):
        flow(x)
    x[4, 1] = float("nan")
    with pytest.raises(SolveError, match=r"the state is not finite .* t = 1: sample 4"):
        flow(x)
    flow = CNF(Poison(value), steps=steps, method=method, divergence="exact", t1=0.4)
    x[4, 1] = 1000
    with pytest.raises(SolveError, match=r"the field is not finite .* t = 0\.4: sample 4"):
        flow(x)


def test_grids_notice_values_that_are_not_finite():
    x = points()
    x[4, 1] = 1000
    flow = CNF(Poison(float("nan")), method="rk4", options={"num_steps": 10}, divergence="exact")
    with pytest.raises(SolveError, match=r"not finite at t = 0\.[45].* size 0\.1: sample 4"):
        flow(x)


class Cliff(nn.Module):
    """Its last trajectory runs into z' = z² and its pole before the end."""

    def forward(self, t, z):
        return -(z**2)


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_a_pole_is_an_error_and_no_hang(steps):
    """Backwards z' = -z² grows as 1 / (1/x - s): 4 reaches infinity at t = 0.75."""
    x = torch.tensor([[0.1, 0.2], [0.3, 4.0], [0.5, 0.1]], dtype=DOUBLE)
    flow = CNF(Cliff(), steps=steps, divergence="exact", max_num_steps=100_000)
    with pytest.raises(SolveError, match=r"at t = 0\.7(5|4999).*sample 1"):
        flow(x)


def test_adjoints_report_too():
    """With an absolute tolerance alone, a larger loss has an adjoint that is harder to solve."""
    flow = CNF(mlp(), gradient="seminorm", max_num_steps=20, rtol=0.0, atol=1e-4)
    value = flow.log_prob(points(3), seed=1).sum()
    value.backward(retain_graph=True)
    with pytest.raises(SolveError, match=r"max_num_steps \(20\) exceeded .* sample \d"):
        (1e9 * value).backward()


@pytest.mark.parametrize("batch", [2, 5])
def test_a_field_that_takes_times_for_features_is_found_out(batch):
    flow = CNF(lambda t, z: t * z, divergence="exact", steps="per-sample")
    with pytest.raises(ValueError, match=r"a time per sample, t \[B\]"):
        flow.log_prob(torch.randn(batch, 2, dtype=DOUBLE))
    flow = CNF(lambda t, z: t.reshape(-1, 1) * z, divergence="exact", steps="per-sample")
    x = torch.randn(batch, 2, dtype=DOUBLE)
    torch.testing.assert_close(flow(x)[0], x * math.exp(-0.5), rtol=1e-4, atol=1e-5)
