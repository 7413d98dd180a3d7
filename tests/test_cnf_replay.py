"""CNF(cuda_graph=...): solves and discrete gradients whose steps the device chooses, step by
recorded step.

Here the device is the CPU, which does the same work by the same formulas, so the numbers must be
those of the solver with the host in its loop, bit for bit. A stand-in for the GPU's queue shows
that nothing depends on when the work is done.
"""

import collections
import copy
import gc
import importlib
import pickle
import warnings
import weakref

import pytest
import torch
from fields import DOUBLE, Attractor, mlp, points
from problems import ADAPTIVE
from torch import nn

from pycnf.flows import CNF
from pycnf.flows.errors import SolveError
from pycnf.nn import MLP

captured = importlib.import_module("pycnf.flows.captured")
recording = importlib.import_module("pycnf.odeint.recording")
SINGLE = torch.float32


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(captured, "_DEVICES", ("cpu", "cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Network(nn.Module):
    """A user's field, with or without a context."""

    def __init__(self, context: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(2 + context, 8).double()
        self.outer = nn.Linear(8, 2).double()
        self.idle = nn.Parameter(torch.ones(2, dtype=DOUBLE))

    def forward(self, t, z, *context):
        width = (z.shape[0], self.inner.in_features - 2)
        rows = torch.cat((z, *(each.expand(width) for each in context)), 1)
        return 2 * self.outer(torch.tanh(2 * self.inner(rows) + t)) * torch.cos(5 * t)


def flows(field, **options):
    """The same flow with the host in its loop, and without."""
    options = {"engine": "generic", **options}
    return CNF(field, cuda_graph=False, **options), CNF(field, cuda_graph=True, **options)


def counts(flow):
    stats = flow.stats
    return (stats.nfe_forward, stats.accepted, stats.rejected, stats.step_size)


def train(flow, x, context=None, inverse=False, **keywords):
    """Everything that a training step comes to: results, gradients, counts."""
    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in flow.field.parameters() if p.requires_grad)]
    if context is not None:
        context = context.detach().requires_grad_()
        leaves.append(context)
    z, logdet = (flow.inverse if inverse else flow)(x, context, seed=1, **keywords)
    parts = (z, logdet, *flow.stats.regularizers.values())
    loss = sum((i + 1) * part.square().sum() for i, part in enumerate(parts))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return parts, gradients, (*counts(flow), flow.stats.nfe_backward)


def assert_equal(mine, expected):
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def assert_same(host, device, *arguments, times=2, **keywords):
    host.keep_bytes = 0  # every step again for the gradient, as in a replay
    expected, gradients, numbers = train(host, *arguments, **keywords)
    for _ in range(times):
        mine, own, counted = train(device, *arguments, **keywords)
        assert_equal(mine, expected)
        assert_equal(own, gradients)
        assert counted == numbers
    return expected, gradients


def recorded(flow):
    return [] if flow._recordings is None else list(flow._recordings.kept.values())


BOTH = {"kinetic": 0.3, "jacobian": 0.1}


@pytest.mark.parametrize("regularizers", [{}, BOTH], ids=["plain", "regularized"])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_bit_for_bit(method, dtype, divergence, context, regularizers):
    field = mlp(context=context).to(dtype)
    host, device = flows(
        field, method=method, divergence=divergence, regularizers=regularizers, rtol=1e-4, atol=1e-4
    )
    given = points(7, context).to(dtype) if context else None
    assert_same(host, device, points().to(dtype), given)
    assert host.stats.accepted > 1
    assert len(recorded(device)) == 1
    assert recorded(device)[0] is not None
