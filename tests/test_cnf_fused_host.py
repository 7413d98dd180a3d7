"""The fused engine's kernels for a GPU, run on a host (see host_ops.py), against the generic
engine: results, steps and gradients, to rounding.
"""

import fused_cases
import pytest
import test_cnf_fused
import torch
from host_ops import DEVICE
from test_cnf_fused import field_of, points

from pycnf.flows import fused


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
    @pytest.mark.parametrize("batch", [1, 9, 200])
    @pytest.mark.parametrize("processors", [1, 3])
    def test_processors(self, gpu, pair, batch, processors):
        gpu.multiprocessors(processors)
        self.same(pair(field_of(scale=2.0), rtol=1e-3, atol=1e-3), points(batch), seed=3)

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_the_order_of_threads(self, gpu, pair, seed):
        gpu.seed(seed)
        field = field_of(hidden=(9, 12), scale=2.0)
        self.same(pair(field, rtol=1e-2, atol=1e-2, divergence="exact"), points(20))
