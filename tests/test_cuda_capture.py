"""Captures on a GPU: what they may not touch, and what they leave when they fail."""

import gc
import importlib
import threading
import warnings

import pytest
import torch
from torch import nn

import pycnf
from pycnf import _C

pytestmark = pytest.mark.cuda
if not _C.with_cuda:
    pytest.skip("pycnf was built without CUDA", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

recording = importlib.import_module("pycnf.odeint.recording")
F64 = torch.float64
GRAPH = {"cuda_graph": True}


class Field(nn.Module):
    def __init__(self, device="cuda"):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 3).to(device, F64)

    def forward(self, t, y):
        return torch.tanh(self.inner(y)) * torch.cos(3 * t)


class Reading(Field):
    def forward(self, t, y):
        return super().forward(t, y) * (1.0 if float(t) < 100 else 2.0)


def state(device="cuda"):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64).to(device)


def solve(field, **options):
    y0 = state(field.inner.weight.device)
    with torch.no_grad():
        return pycnf.odeint(field, y0, torch.linspace(0, 2, 3).to(y0), options=options)


def gradients(field, method="dopri5", **options):
    y0 = state().requires_grad_()
    if method == "rk4":
        options["step_size"] = 0.25
    t = torch.linspace(0, 2, 3, dtype=F64, device="cuda")
    ys = pycnf.odeint_adjoint(field, y0, t, method=method, options=options)
    return torch.autograd.grad(ys.square().sum(), (y0, *field.parameters()))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("stream", ["default", "another"])
def test_the_adjoint_is_captured(method, stream):
    """Though the parameters are leaves of the user's stream."""
    field = Field()
    expected = gradients(field, method)
    which = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    with warnings.catch_warnings(), torch.cuda.stream(which):
        warnings.simplefilter("error")
        for _ in range(4):
            for a, b in zip(gradients(field, method, **GRAPH), expected):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    kept = recording._kept[field]
    assert len(kept) >= 2
    assert None not in kept.values()


def failed_capture():
    with pytest.warns(UserWarning, match="^cuda_graph: Reading cannot be captured"):
        solve(Reading(), **GRAPH)


def test_random_numbers_after_a_failed_capture():
    failed_capture()
    assert torch.randn(3, device="cuda").isfinite().all()
    assert torch.rand(3, device="cuda").isfinite().all()


def test_memory_is_given_back_after_a_failed_capture():
    failed_capture()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    x = torch.zeros(2**26, device="cuda")
    del x
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    with torch.cuda.use_mem_pool(pool := torch.cuda.MemPool()):
        x = torch.zeros(2**20, device="cuda")
    del x, pool
    gc.collect()
    assert torch.zeros(3, device="cuda").sum() == 0


def test_other_solves_are_captured_after_a_failed_capture():
    failed_capture()
    field = Field()
    expected = solve(field)
    for _ in range(4):
        torch.testing.assert_close(solve(field, **GRAPH), expected)
    assert None not in recording._kept[field].values()


def test_garbage_may_be_another_recording():
    """Which goes while the next solve is captured, by a threshold that is met at once."""
    for _ in range(3):
        field = Field()
        for _ in range(4):
            solve(field, **GRAPH)
        del field
        field = Field()
        thresholds = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for _ in range(4):
                solve(field, **GRAPH)
        finally:
            gc.set_threshold(*thresholds)
        assert None not in recording._kept[field].values()


def test_the_end_of_all_attempts_as_one_amid_a_capture():
    field = Field()
    for _ in range(4):
        solve(field, **GRAPH)
    (kept,) = recording._kept.pop(field).values()
    if not kept.attempts.whole:
        pytest.skip("attempts are no one launch here")
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        x.add_(1)
        kept.attempts.whole = None
        x.add_(1)
    graph.replay()
    assert x.tolist() == [3.0] * 3


def test_threads_that_record_at_once():
    fields = [Field() for _ in range(4)]
    expected = solve(fields[0])
    found = {}

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[i] = [solve(fields[i], **GRAPH) for _ in range(6)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(fields))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(len(fields)):
        for each in found[i]:
            torch.testing.assert_close(each, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    for device in ("cuda:1", "cuda:0"):
        with torch.cuda.device(device), warnings.catch_warnings():
            warnings.simplefilter("error")
            field = Field(device)
            expected = solve(field)
            for _ in range(4):
                torch.testing.assert_close(solve(field, **GRAPH), expected)


def test_a_generator_of_the_fields_own():
    """Attempts of one launch would see the same numbers again and again."""

    class Noisy(Field):
        def __init__(self):
            super().__init__()
            self.source = torch.Generator("cuda").manual_seed(2)

        def forward(self, t, y):
            noise = torch.randn(y.shape, generator=self.source, dtype=y.dtype, device=y.device)
            return super().forward(t, y) + 1e-3 * noise

    field = Noisy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # before PyTorch 2.13 no capture knows it
        found = [solve(field, **GRAPH)[-1] for _ in range(5)]
    assert len({x.sum().item() for x in found}) == len(found)
    for kept in recording._kept[field].values():
        assert kept is None or not kept.attempts.whole
