"""The right-hand side of a flow by the compiled ops of its network: a wide one on a GPU.

Here on the CPU, which has the same ops: the numbers are those of the layers in PyTorch.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from fields import DOUBLE, points
from torch.utils._python_dispatch import TorchDispatchMode

from pycnf.flows import CNF
from pycnf.flows.control import AdaptiveControl
from pycnf.flows.dynamics import Dynamics
from pycnf.flows.problem import Problem
from pycnf.nn import MLP
from pycnf.nn.precision import PRECISIONS
from pycnf.odeint.tableau import TABLEAUX

captured = importlib.import_module("pycnf.flows.captured")
LAYERS = ("ignore", "concat", "concat_v2", "squash", "concatsquash")
BOTH = {"kinetic": 0.3, "jacobian": 0.1}


class Watch(TorchDispatchMode):
    """Counts pycnf's ops, and the numbers that the host reads."""

    def __init__(self):
        super().__init__()
        self.names, self.read = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pycnf":
            self.names.append(function._schema.name.removeprefix("pycnf::"))
        self.read += function in (
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )  # fmt: skip
        return function(*args, **(kwargs or {}))


def field_of(hidden=(5, 4), **settings):
    torch.manual_seed(0)
    return MLP(2, hidden, **settings).to(DOUBLE)


def problem_of(field, probe, regularizers=None, compiled=False):
    control = AdaptiveControl(1e-5, 1e-5)
    return Problem(
        field, TABLEAUX["dopri5"], control, 0.0, 1.0, True, probe, -1.0, regularizers or {},
        compiled=compiled,
    )  # fmt: skip


def close(mine, expected, tolerance=1e-12):
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def outcome(dynamics, evaluate, context, probe):
    """What an evaluation gives at two states, with its gradients."""
    leaves = [points(7, seed=1).requires_grad_(), *dynamics.problem.field.parameters()]
    if context is not None:
        context = context.detach().requires_grad_()
        leaves.append(context)
    parts = [part for parts in evaluate(dynamics, leaves[0], context, probe) for part in parts]
    loss = sum(((i + 2) * part.sin()).sum() for i, part in enumerate(parts))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return parts, gradients


def stages(dynamics, z, context, probe):
    times = torch.tensor([0.1, 0.7, 0.4], dtype=DOUBLE)
    fields = dynamics.at(times, z, context, [True, False, True])
    return [field(z + i) for i, field in enumerate(fields)]


def moment(dynamics, z, context, probe):
    return [dynamics.evaluate(torch.tensor(0.3, dtype=DOUBLE), z, context, probe, True)]


def own_times(dynamics, z, context, probe):
    times = torch.linspace(0.0, 1.0, z.shape[0], dtype=DOUBLE)
    return [dynamics.evaluate(times, z, context, probe, True)]


@pytest.mark.parametrize("evaluate", [stages, moment, own_times])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("hidden", [(), (5,), (5, 4), (5, 4, 6)])
@pytest.mark.parametrize("regularizers", [{}, {"kinetic": 0.3}, BOTH], ids=len)
def test_right_hand_side(evaluate, layer, exact, hidden, regularizers):
    field = field_of(hidden, layer=layer, context=3)
    probe = None if exact else torch.randn(2, 7, 2, dtype=DOUBLE)
    context = torch.randn(7, 3, dtype=DOUBLE)
    problem = problem_of(field, probe, regularizers)
    plain, compiled = Dynamics(problem), Dynamics(replace(problem, compiled=True))
    with Watch() as watch:
        mine = outcome(compiled, evaluate, context, probe)
    op = "mlp_value_jvp" if "jacobian" in regularizers else "mlp_value_divergence"
    if evaluate is stages:
        expected = [op, "mlp_value", op]
        backward = [f"{op}_backward", "mlp_value_divergence_backward", f"{op}_backward"]
    else:
        expected, backward = [op], [f"{op}_backward"]
    assert watch.names == expected + backward[::-1]
    assert watch.read == 0
    for a, b in zip(mine, outcome(plain, evaluate, context, probe)):
        close(a, b)
    assert compiled.evaluations == plain.evaluations


@pytest.mark.parametrize("context", [None, torch.randn(3, dtype=DOUBLE)], ids=["none", "one"])
def test_fourier_time_and_a_context_for_all(context):
    field = field_of(time=("fourier", 4), context=0 if context is None else 3)
    problem = problem_of(field, None)
    plain, compiled = Dynamics(problem), Dynamics(replace(problem, compiled=True))
    for a, b in zip(*(outcome(each, stages, context, None) for each in (compiled, plain))):
        close(a, b)


def test_where_the_ops_do_not_serve():
    for layer in ("blend", "hyper"):
        dynamics = Dynamics(problem_of(field_of(layer=layer), None, compiled=True))
        with Watch() as watch:
            outcome(dynamics, stages, None, None)
        assert watch.names == []
    hooked = field_of()
    hooked.register_forward_hook(lambda *_: None)
    assert not Dynamics(problem_of(hooked, None, compiled=True)).compiled


def test_without_a_record():
    dynamics = Dynamics(problem_of(field_of(), None, compiled=True))
    with torch.no_grad():
        parts = moment(dynamics, points(7), None, None)[0]
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("regularizers", [{}, BOTH], ids=len)
@pytest.mark.parametrize("layer", ["concatsquash", "concat"])
def test_recorded_flows(monkeypatch, method, divergence, regularizers, layer):
    """Solves and gradients of recorded steps, as many as by layers in PyTorch."""
    monkeypatch.setattr(captured, "_DEVICES", ("cpu",))
    problem = CNF._problem
    field = field_of((8, 8), layer=layer, context=1)
    x, context = points(9), torch.randn(9, 1, dtype=DOUBLE)

    def train(wide):
        def compiled(*args):
            return replace(problem(*args), compiled=wide)

        monkeypatch.setattr(CNF, "_problem", compiled)
        flow = CNF(
            field, method=method, engine="generic", cuda_graph=True, rtol=1e-4, atol=1e-4,
            divergence=divergence, regularizers=regularizers,
        )  # fmt: skip
        leaves = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        with Watch() as watch:
            density = flow.log_prob(*leaves, seed=1)
            loss = sum(part.mean() for part in flow.stats.regularizers.values()) - density.mean()
            gradients = torch.autograd.grad(loss, [*leaves, *field.parameters()])
        assert any(name.startswith("mlp_value") for name in watch.names) == wide
        stats = flow.stats
        return [density.detach(), *gradients], (stats.nfe_forward, stats.nfe_backward)

    expected, counts = train(False)
    mine, own = train(True)
    assert own == counts
    close(mine, expected, 1e-9)


@pytest.mark.parametrize(
    ("settings", "fits", "why"),
    [
        ({}, True, None),
        ({"steps": "per-sample"}, True, None),
        ({}, False, "does not fit"),
        ({"steps": "per-sample"}, False, "does not fit"),
        ({"method": "rk4", "options": {"num_steps": 3}}, False, "does not fit"),
        ({"gradient": "continuous"}, True, "gradient='continuous'"),
        ({"gradient": "seminorm"}, True, "gradient='seminorm'"),
        ({"t1": torch.nn.Parameter(torch.tensor(0.8, dtype=DOUBLE))}, True, "t0 and t1"),
    ],
)
def test_what_a_gpu_does_not_solve_in_one_launch_goes_by_layers(monkeypatch, settings, fits, why):
    module = importlib.import_module("pycnf.flows.cnf")
    monkeypatch.setattr(module, "GPUS", ("cpu",))
    monkeypatch.setattr(module, "fits_gpu", lambda *_: fits)
    flow, plain = (CNF(field_of(), engine=e, **settings) for e in ("fused", "generic"))
    assert ("a whole solve in one launch" in flow.explain()) == (why is None)
    assert why is None or ("layer by layer" in flow.explain() and why in flow.explain())
    found = []
    for each in (flow, plain):
        with Watch() as watch:
            density = each.log_prob(points(5), seed=1)
            gradients = torch.autograd.grad(density.sum(), list(each.field.parameters()))
        found.append([density.detach(), *gradients])
        ops = any(name.startswith("mlp_") for name in watch.names)
        assert ops == (each is flow)
    assert flow.stats.engine == "fused"
    close(*found, 1e-9)


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_products_by_layers_have_the_flow_s_precision(monkeypatch, precision, gradient):
    module = importlib.import_module("pycnf.flows.cnf")
    monkeypatch.setattr(module, "GPUS", ("cpu",))
    monkeypatch.setattr(module, "fits_gpu", lambda *_: False)
    flow = CNF(field_of().float(), engine="fused", gradient=gradient, precision=precision)
    assert f"products in {precision}" in flow.explain()
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision

    class WatchTorch(TorchDispatchMode):
        during = None

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mlp_value" in str(function):
                self.during = settings.fp32_precision
            return function(*args, **(kwargs or {}))

    # A CPU has no such products, and says so when it is asked for them.
    match = rf"precision {PRECISIONS.index(precision)}, expected 0"
    with WatchTorch() as watch, pytest.raises(RuntimeError, match=match):
        flow.log_prob(points(5).float())
    assert watch.during == ("tf32" if "tf32" in precision else before)
    assert settings.fp32_precision == before
