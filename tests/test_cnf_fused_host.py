"""The fused engine's kernels for a GPU, run on a host (see host_ops.py), against the generic
engine: results, steps and gradients, to rounding.
"""

import math

import fused_cases
import pytest
import test_cnf_fused
import torch
from host_ops import DEVICE
from test_cnf_fused import field_of, points

from pycnf.flows import SolveError, fused


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

    names = ("mlp_solve", "mlp_solve_backward", "mlp_samples", "mlp_samples_backward")
    for name in names:
        monkeypatch.setattr(fused, name, launched(getattr(cuda_host_ops, name)))
    # A failed solve is left to the other engine to put into words.
    monkeypatch.setattr(fused, "GPUS", ("cpu", "cuda"))
    broken = cuda_host_ops.broken_guards()
    yield cuda_host_ops
    assert cuda_host_ops.broken_guards() == broken


@pytest.fixture
def pair():
    return test_cnf_fused.pair


class TestFused(fused_cases.FusedCases):
    @pytest.mark.parametrize("steps", ["shared", "per-sample"])
    @pytest.mark.parametrize("batch", [1, 9, 200])
    @pytest.mark.parametrize("processors", [1, 3])
    def test_processors(self, gpu, pair, batch, processors, steps):
        """Blocks have tile after tile, lanes sample after sample, with more steps and fewer."""
        gpu.multiprocessors(processors)
        x = points(batch) * torch.logspace(-2, 1, batch, dtype=torch.float64)[:, None]
        self.same(pair(field_of(scale=2.0), rtol=1e-3, atol=1e-3, steps=steps), x, seed=3)

    @pytest.mark.parametrize("method", ["bosh3", "fehlberg2"])
    @pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
    def test_lanes_that_begin_again(self, gpu, pair, method, divergence):
        """With a context, and the first step given or chosen."""
        gpu.multiprocessors(1)
        x, context = points(150) * torch.linspace(0.1, 4, 150)[:, None], points(150, 2, seed=5)
        for options in (None, {"first_step": 0.2}):
            flows = pair(
                field_of(layer="concat", context=2), method=method, rtol=1e-2, atol=1e-2,
                steps="per-sample", divergence=divergence, options=options,
            )  # fmt: skip
            self.same(flows, x, context, **({"seed": 3} if divergence == "hutchinson" else {}))

    @pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
    def test_a_sample_has_the_same_bits_in_any_batch(self, gpu, pair, divergence):
        settings = {"rtol": 1e-3, "atol": 1e-3, "steps": "per-sample", "divergence": divergence}
        flow, _ = pair(field_of(hidden=(9, 7), scale=2.0), **settings)
        x = points(90) * torch.logspace(-2, 1, 90, dtype=torch.float64)[:, None]
        given = {"seed": 3} if divergence == "hutchinson" else {}
        results = []
        for processors, rows in [(1, x), (3, x), (1, x[70:]), (1, x[80:81])]:
            gpu.multiprocessors(processors)
            results.append(flow(rows, **given))
        for whole, other, few, one in zip(*results):
            assert torch.equal(whole, other)
            assert torch.equal(whole[70:], few)
            assert torch.equal(whole[80:81], one)

    @pytest.mark.parametrize("steps", ["shared", "per-sample"])
    def test_gradients_have_the_same_bits_whatever_the_order_of_threads(self, gpu, pair, steps):
        gpu.multiprocessors(2)
        x = points(60) * torch.logspace(-2, 1, 60, dtype=torch.float64)[:, None]
        flow, _ = pair(field_of(scale=2.0), rtol=1e-2, atol=1e-2, steps=steps)
        results = []
        for seed in range(3):
            gpu.seed(seed)
            density = flow.log_prob(x, seed=3)
            results.append(torch.autograd.grad(density.sum(), list(flow.field.parameters())))
        for first, *others in zip(*results):
            assert all(torch.equal(first, other) for other in others)

    def test_samples_that_fail_at_once_leave_their_lanes(self, gpu, pair):
        gpu.multiprocessors(1)
        x = points(100)
        x[::2] = math.nan
        flow, _ = pair(field_of(), rtol=1e-2, atol=1e-2, steps="per-sample")
        with pytest.raises(SolveError, match=r"not finite at the start of the solve.*sample 0"):
            flow(x, seed=3)

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_the_order_of_threads(self, gpu, pair, seed):
        gpu.seed(seed)
        field = field_of(hidden=(9, 12), scale=2.0)
        self.same(pair(field, rtol=1e-2, atol=1e-2, divergence="exact"), points(20))
