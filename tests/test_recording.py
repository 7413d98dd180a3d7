"""How work is recorded: with a stand-in for torch.cuda, the sequence of what is asked of it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from pycnf.odeint.recording import NotCaptured, Recorded

CUDA = torch.device("cuda", 0)


class FakeCuda:
    """Writes down what is asked of torch.cuda; a graph's replay does the work it was recorded from.

    Args:
        refuses: captures fail, and leave their stream behind, as PyTorch's do.
        draws: numbers that a replay takes from the generator.
        keeps: whether graphs can be kept, as from PyTorch 2.8 on.
    """

    def __init__(self, monkeypatch, refuses=False, draws=0, keeps=True):
        self.log, self.stream_now, self.offset = [], "main", 0
        cuda = self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def __init__(self, **options):
                if options and not keeps:
                    raise TypeError("keep_graph")
                self.kept = options.get("keep_graph", False)

            def replay(self):
                cuda.log.append("replay")
                cuda.offset += draws

        if keeps:
            Graph.instantiate = lambda graph: cuda.log.append("instantiate")

        @contextlib.contextmanager
        def stream(which):
            before, cuda.stream_now = cuda.stream_now, which.name
            try:
                yield
            finally:
                cuda.stream_now = before

        @contextlib.contextmanager
        def capture(graph, capture_error_mode):
            assert capture_error_mode == "thread_local"
            cuda.log.append("capture")
            cuda.stream_now = "capture's"
            yield
            if refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            cuda.stream_now = "main"

        def set_stream(which):
            cuda.stream_now = which.name

        for name, value in {
            "Stream": lambda device: Stream(),
            "current_stream": lambda device=None: Stream(cuda.stream_now),
            "stream": stream,
            "CUDAGraph": Graph,
            "graph": capture,
            "set_stream": set_stream,
            "current_device": lambda: 0,
            "default_generators": [SimpleNamespace(get_offset=lambda: cuda.offset)],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def recorded(self):
        return Recorded(lambda: self.log.append(f"work on {self.stream_now}"), CUDA)

    def since(self):
        log, self.log = self.log, []
        return log


def test_as_written_then_recorded_then_replayed(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorded = cuda.recorded()
    recorded()
    assert cuda.since() == ["side waits for main", "work on side", "main waits for side"]
    recorded()
    assert cuda.since() == ["capture", "work on capture's", "instantiate", "replay"]
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
    assert cuda.since() == ["side waits for main", "main waits for side"]


def test_before_graphs_could_be_kept(monkeypatch):
    cuda = FakeCuda(monkeypatch, keeps=False)
    recorded = cuda.recorded()
    recorded()
    cuda.since()
    recorded()
    assert cuda.since() == ["capture", "work on capture's", "replay"]


def test_random_numbers_are_noticed(monkeypatch):
    cuda = FakeCuda(monkeypatch, draws=4)
    recorded = cuda.recorded()
    recorded()
    assert recorded.random is None
    recorded()
    assert recorded.random is True


def test_a_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    cuda = FakeCuda(monkeypatch, refuses=True)
    recorded = cuda.recorded()
    recorded()
    with pytest.raises(NotCaptured, match=r"^operation not permitted when stream is capturing$"):
        recorded()
    assert cuda.stream_now == "main"
    assert "replay" not in cuda.log


def test_on_a_cpu_it_is_always_done_as_written():
    log = []
    recorded = Recorded(lambda: log.append("work"), torch.device("cpu"))
    for _ in range(3):
        recorded()
    assert log == ["work"] * 3
