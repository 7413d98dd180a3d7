"""How work is recorded: with a stand-in for torch.cuda, the sequence of what is asked of it."""

import contextlib
import gc
import importlib
import threading
from types import SimpleNamespace

import pytest
import torch

from pycnf.odeint.recording import NotCaptured, Recorded

recording = importlib.import_module("pycnf.odeint.recording")
CUDA = torch.device("cuda", 1)


class FakeCuda:
    """Writes down what is asked of torch.cuda; a graph's replay does the work it was recorded from.

    Args:
        refuses: captures fail, and leave their stream behind, as PyTorch's do.
        draws: numbers that a replay takes from the generator.
        keeps: whether graphs can be kept, as from PyTorch 2.8 on.
        version: of PyTorch; up to 2.11 a failed capture leaves the allocator and the generator as
            they are, up to 2.13 the pool.
    """

    def __init__(self, monkeypatch, refuses=False, draws=0, keeps=True, version="2.11.0+cu130"):
        self.log, self.stream_now, self.offset = [], "main", 0
        self.refuses, self.device = refuses, 0
        # What a failed capture leaves.
        self.underway, self.pools, self.capturing = set(), {}, False
        cuda = self

        class Stream:
            def __init__(self, name):
                self.name, self.cuda_stream = name, hash(name)

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def __init__(self, **options):
                if options and not keeps:
                    raise TypeError("keep_graph")
                self.kept, self.ended = options.get("keep_graph", False), False

            def replay(self):
                cuda.log.append("replay")
                cuda.offset += draws

            def pool(self):
                if not self.ended:
                    raise RuntimeError("without a preceding successful capture")

        if keeps:
            Graph.instantiate = lambda graph: cuda.log.append("instantiate")

        def new_stream(device):
            assert device == CUDA
            return Stream(f"side of {cuda.stream_now}")

        @contextlib.contextmanager
        def device(which):
            before, cuda.device = cuda.device, which.index
            try:
                yield
            finally:
                cuda.device = before

        @contextlib.contextmanager
        def stream(which):
            before, cuda.stream_now = cuda.stream_now, which.name
            try:
                yield
            finally:
                cuda.stream_now = before

        @contextlib.contextmanager
        def capture(graph, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"
            assert cuda.device == CUDA.index
            cuda.log.append("capture")
            before, cuda.stream_now = cuda.stream_now, stream.name
            pool = pool or ("own", len(cuda.pools))
            cuda.pools[pool] = cuda.pools.get(pool, 0) + 1
            cuda.underway.add(pool)
            cuda.capturing = True
            try:
                yield
            finally:
                if cuda.refuses:
                    if version > "2.12":
                        cuda.underway.remove(pool)
                        cuda.capturing = False
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                cuda.underway.remove(pool)
                graph.ended, cuda.capturing = True, False
                cuda.stream_now = before

        def set_stream(which):
            cuda.stream_now = which.name

        def end_allocate(index, pool):
            assert index == CUDA.index
            if pool not in cuda.underway:
                raise RuntimeError("not currently recording to mempool_id")
            cuda.underway.remove(pool)

        def release(index, pool):
            assert index == CUDA.index
            assert cuda.pools[pool] > 0
            cuda.pools[pool] -= 1

        def zeros(*shape, device):
            cuda.refuses = False
            return SimpleNamespace(zero_=lambda: cuda.log.append("zero"))

        for name, value in {
            "Stream": new_stream,
            "current_stream": lambda device=None: Stream(cuda.stream_now),
            "device": device,
            "stream": stream,
            "CUDAGraph": Graph,
            "graph": capture,
            "graph_pool_handle": lambda: ("handle", len(cuda.pools)),
            "set_stream": set_stream,
            "default_generators": [None, SimpleNamespace(get_offset=lambda: cuda.offset)],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(recording, "_streams", {})
        monkeypatch.setattr(recording, "_failed", [])

    def recorded(self):
        return Recorded(lambda: self.log.append(f"work on {self.stream_now}"), CUDA)

    def since(self):
        log, self.log = self.log, []
        return log


def test_as_written_then_recorded_then_replayed(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorded = cuda.recorded()
    recorded()
    assert cuda.since() == [
        "side of main waits for main", "work on side of main", "main waits for side of main",
    ]  # fmt: skip
    recorded()
    assert cuda.since() == ["capture", "work on side of main", "instantiate", "replay"]
    assert recorded.graph.kept
    recorded()
    recorded()
    assert cuda.since() == ["replay", "replay"]
    assert recorded.random is False
    assert cuda.stream_now == "main"


def test_an_error_of_the_work_leaves_no_stream_behind(monkeypatch):
    """What has been asked of the side stream is waited for all the same."""
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(KeyError):
        Recorded(lambda: {}["the field's own"], CUDA)()
    assert cuda.since() == ["side of main waits for main", "main waits for side of main"]


def test_before_graphs_could_be_kept(monkeypatch):
    cuda = FakeCuda(monkeypatch, keeps=False)
    recorded = cuda.recorded()
    recorded()
    cuda.since()
    recorded()
    assert cuda.since() == ["capture", "work on side of main", "replay"]


def test_random_numbers_are_noticed(monkeypatch):
    cuda = FakeCuda(monkeypatch, draws=4)
    recorded = cuda.recorded()
    recorded()
    assert recorded.random is None
    recorded()
    assert recorded.random is True


VERSIONS = ["2.11.0+cu130", "2.13.0", "2.14.0a0+git1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_failed_capture_leaves_all_as_it_was(monkeypatch, version):
    cuda = FakeCuda(monkeypatch, refuses=True, version=version)
    recorded = cuda.recorded()
    recorded()
    with pytest.raises(NotCaptured, match=r"^operation not permitted when stream is capturing$"):
        recorded()
    assert cuda.stream_now == "main"
    assert cuda.device == 0
    assert "replay" not in cuda.log
    assert not cuda.underway
    assert not cuda.capturing
    # From 2.14 on, a graph gives back its pool itself.
    left = 1 if version == VERSIONS[-1] else 0
    assert cuda.pools["handle", 0] == left
    assert len(recording._failed) == 1 - left
    assert not recording._recording.locked()


def test_work_that_fails_in_a_capture_that_ends(monkeypatch):
    """Its graph gives back what it holds itself."""
    cuda = FakeCuda(monkeypatch)
    answers = iter([None, RuntimeError("of the field's own"), ValueError("another")])

    def work():
        answer = next(answers)
        if answer is not None:
            raise answer

    recorded = Recorded(work, CUDA)
    recorded()
    with pytest.raises(NotCaptured, match="of the field's own"):
        recorded()
    with pytest.raises(ValueError, match="another"):
        recorded()
    assert not recording._failed
    assert set(cuda.pools.values()) == {1}
    assert cuda.stream_now == "main"
    assert not recording._recording.locked()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("refuses", [True, False])
def test_no_garbage_is_collected_in_a_capture(monkeypatch, refuses, enabled):
    FakeCuda(monkeypatch, refuses=refuses)
    collects = []
    recorded = Recorded(lambda: collects.append(gc.isenabled()), CUDA)
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        recorded()
        with contextlib.suppress(NotCaptured):
            recorded()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert collects == [enabled, False]


def test_a_stream_of_captures_for_every_stream_of_the_users(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    for name in ("main", "other", "main"):
        cuda.stream_now = name
        recorded = cuda.recorded()
        recorded()
        cuda.since()
        recorded()
        assert cuda.since()[1] == f"work on side of {name}"
        assert cuda.stream_now == name
    assert len(recording._streams) == 2


def test_while_another_thread_records_work_is_done_as_written(monkeypatch):
    """And not waited for, as that thread may in turn wait for what this one is to do."""
    cuda = FakeCuda(monkeypatch)
    recorded = cuda.recorded()
    recorded()
    with recording._recording:
        thread = threading.Thread(target=recorded)
        thread.start()
        thread.join()
    assert "capture" not in cuda.since()
    recorded()
    assert cuda.since()[0] == "capture"


def test_on_a_cpu_it_is_always_done_as_written():
    log = []
    recorded = Recorded(lambda: log.append("work"), torch.device("cpu"))
    for _ in range(3):
        recorded()
    assert log == ["work"] * 3
