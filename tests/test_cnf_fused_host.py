"""The fused engine's kernels for a GPU, run on a host (see host_ops.py), against the generic
engine: results, steps and gradients, to rounding.
"""

import pytest
import torch
from host_ops import DEVICE
from test_cnf_fused import FIXED, METHODS, assert_same, field_of, pair, points

from pycnf.flows import fused
from pycnf.nn import ACTIVATIONS


def moved(x, device):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return [moved(each, device) for each in x] if isinstance(x, list | tuple) else x


@pytest.fixture(autouse=True)
def gpu(cuda_host_ops, monkeypatch):
    """Solves of the fused engine are launches."""

    def launched(op):
        def call(*arguments):
            return moved(op(*moved(arguments, DEVICE)), "cpu")

        return call

    for name in ("mlp_solve", "mlp_solve_backward"):
        monkeypatch.setattr(fused, name, launched(getattr(cuda_host_ops, name)))
    broken = cuda_host_ops.broken_guards()
    yield cuda_host_ops
    assert cuda_host_ops.broken_guards() == broken


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_methods(method):
    assert_same(pair(field_of(scale=3.0), method=method, rtol=1e-4, atol=1e-4), points(37), seed=3)


@pytest.mark.parametrize("method", FIXED)
def test_fixed_methods(method):
    flows = pair(field_of(), method=method, options={"num_steps": 3})
    assert_same(flows, points(5), seed=3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    field = field_of(activation=activation)
    far = 1 if activation == "square" else 3  # a quadratic field leaves for infinity
    assert_same(pair(field, method="rk4", options={"num_steps": 2}), points(9) * far, seed=3)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("time", ["t", ("fourier", 4)])
@pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.parametrize("kind", ["hutchinson", "exact"])
def test_layers(layer, time, context, kind):
    field = field_of(layer=layer, time=time, context=context)
    flows = pair(field, method="rk4", options={"num_steps": 2}, divergence=kind)
    given = points(6, context, seed=2) if context else None
    assert_same(flows, points(6), given, **({"seed": 3} if kind == "hutchinson" else {}))


@pytest.mark.parametrize("kind", ["hutchinson", "exact"])
@pytest.mark.parametrize(
    ("hidden", "features"),
    [((), 3), ((1,), 1), ((5,), 4), ((7, 3), 2), ((33, 34), 5), ((6, 9, 8), 3), ((4, 5, 4, 3), 2)],
)
def test_shapes(hidden, features, kind):
    settings = {"method": "heun3", "options": {"num_steps": 2}, "divergence": kind}
    flows = pair(field_of(features, hidden), **settings)
    assert_same(flows, points(5, features), **({"seed": 3} if kind == "hutchinson" else {}))


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 2, 5])
def test_probes(probes, noise):
    flows = pair(field_of(), method="bosh3", rtol=1e-2, atol=1e-2, probes=probes, noise=noise)
    assert_same(flows, points(11), seed=3)


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 65, 200])
def test_batches(gpu, batch, processors):
    gpu.multiprocessors(processors)
    try:
        for inverse in (False, True):
            flows = pair(field_of(scale=2.0), rtol=1e-3, atol=1e-3)
            assert_same(flows, points(batch), inverse=inverse, seed=3)
    finally:
        gpu.multiprocessors(4)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_order_of_threads(gpu, seed):
    gpu.seed(seed)
    flows = pair(field_of(hidden=(9, 12), scale=2.0), rtol=1e-2, atol=1e-2, divergence="exact")
    assert_same(flows, points(20))


@pytest.mark.parametrize("names", [("kinetic",), ("jacobian",), ("kinetic", "jacobian")])
@pytest.mark.parametrize("kind", ["hutchinson", "exact"])
def test_regularizers(names, kind):
    weights = {name: 0.5 + i for i, name in enumerate(names)}
    flows = pair(field_of(), rtol=1e-2, atol=1e-2, divergence=kind, regularizers=weights)
    results = []
    for flow in flows:
        x = points(9).requires_grad_()
        loss = flow.log_prob(x, **({"seed": 3} if kind == "hutchinson" else {})).sum()
        loss = loss + sum((i + 1) * r.sum() for i, r in enumerate(flow.stats.regularizers.values()))
        results.append([loss, *torch.autograd.grad(loss, [x, *flow.field.parameters()])])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_a_hard_solve_with_rejections():
    counts = assert_same(
        pair(field_of(scale=6.0), rtol=1e-5, atol=1e-5, options={"first_step": 0.9}),
        points(16) * 2,
        seed=3,
        rtol=1e-9,
    )
    assert counts[2] > 0


def test_float32():
    field = field_of(hidden=(16, 16, 16)).float()
    x = points(30).float()
    seen = []
    for flow in pair(field, rtol=1e-3, atol=1e-3):
        z, logdet = flow(x, seed=3)
        seen.append([z, logdet, *torch.autograd.grad(logdet.sum(), list(field.parameters()))])
    for mine, other in zip(*seen, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
