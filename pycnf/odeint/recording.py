"""Work on a GPU that is recorded once and replayed: what it may be, what it depends on, and for how
long it is kept.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pycnf._build import _C
from pycnf.odeint.problem import Problem
from pycnf.warn import warn

# Recorded solves of one field that are kept.
_KEPT = 32
_DEVICES = ("cuda",)
# Replays under way: one runs while the next waits, so the device never does.
AHEAD = 2
# Seconds without news after which it is looked at whether the device is still at work.
_PATIENCE = 0.5

_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, RecordedSolve | None]] = (
    weakref.WeakKeyDictionary()
)


class RecordedSolve(Protocol):
    """A solve in memory of its own, which can be repeated.

    Attributes:
        lock: held while it is at work.
    """

    lock: threading.Lock

    def solve(self, solver: Any) -> Tensor:
        """The solution of a solve that has the same key."""


def from_recording(
    solver: Any, reason: str | None, settings: tuple, record: Callable[[], RecordedSolve]
) -> Tensor | None:
    """The solution of a solve by replays, [T, *y0.shape]; None, with a warning that says why, where
    it has to be solved with the host in the loop.

    Args:
        solver: has the problem.
        reason: why it cannot be replayed.
        settings: what a recording depends on beside the problem.
        record: makes one for such solves.
    """
    problem = solver.problem
    reason = _obstacle(problem) or reason
    if reason is not None:
        warn(f"cuda_graph: {reason}; solved without")
        return None
    owner = _owner(problem)
    kept = _kept.setdefault(owner, OrderedDict())
    key = (*_key(problem, owner), *settings)
    if key not in kept:
        kept[key] = record()
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    recorded = kept[key]
    if recorded is None or not recorded.lock.acquire(blocking=False):
        return None  # not to be captured, as was said, or at work for another thread
    try:
        return recorded.solve(solver)
    except NotCaptured as error:
        kept[key] = None
        warn(f"cuda_graph: {type(owner).__name__} cannot be captured ({error}); solved without")
        return None
    finally:
        recorded.lock.release()


def _owner(problem: Problem) -> Any:
    """The user's field, which an adjoint problem's field has behind it."""
    return getattr(problem.func, "owner", problem.func)


def _obstacle(problem: Problem) -> str | None:
    """Why a problem cannot be solved by replays, None if it can."""
    y0, owner = problem.y0, _owner(problem)
    if y0.device.type not in _DEVICES:
        return f"the state is on {y0.device}, not on a GPU"
    if not isinstance(owner, nn.Module):
        return (
            f"func is a {type(owner).__name__}, no nn.Module, so a change of its parameters' "
            "storage would go unseen"
        )
    if y0.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a capture is under way"
    if torch.is_grad_enabled() and any(
        x.requires_grad for x in (y0, problem.s, *owner.parameters())
    ):
        return "gradients flow through the solver's operations; odeint_adjoint's do not"
    if problem.callbacks:
        return f"there are callbacks: {', '.join(problem.callbacks)}"
    if any(each.requires_grad for each in problem.options.values() if isinstance(each, Tensor)):
        return "gradients flow to an option"
    return None


def _key(problem: Problem, owner: nn.Module) -> tuple:
    """What a recording depends on, but for the numbers that it reads from memory."""
    y0 = problem.y0
    held = (*owner.parameters(), *owner.buffers(), *getattr(problem.func, "params", ()))
    return (
        type(problem.func),
        tuple((x.data_ptr(), x.shape, x.requires_grad) for x in held),
        tuple(module.training for module in owner.modules()),
        torch.cuda.current_stream(y0.device).cuda_stream if y0.is_cuda else 0,
        torch.is_autocast_enabled(y0.device.type) and torch.get_autocast_dtype(y0.device.type),
        y0.shape,
        y0.dtype,
        y0.device,
        problem.method,
        problem.sign,
        tuple(problem.shapes or ()),
        len(problem.s),
    )


class NotCaptured(Exception):
    """A field that does what no CUDA graph can hold."""


class Recorded:
    """Work on tensors that stay where they are: done as written the first time, recorded the
    second, replayed from then on.

    The first time brings libraries and caches to where a recording can do without setting them up.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self.work, self.device = work, device
        self.warm = False
        self.graph: Any = None
        # Whether replays draw random numbers; None before the first.
        self.random: bool | None = None

    def __call__(self) -> None:
        if self.device.type != "cuda":
            self.work()
        elif not self.warm:
            side, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                self.work()
            current.wait_stream(side)
            self.warm = True
        else:
            if self.graph is None:
                self.graph = self._record()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            offset = generator.get_offset() if self.random is None else 0
            self.graph.replay()
            if self.random is None:
                self.random = generator.get_offset() != offset

    def _record(self) -> Any:
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:  # before PyTorch 2.8
            graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            # Other threads may go on allocating.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.work()
            if hasattr(graph, "instantiate"):
                graph.instantiate()
        except RuntimeError as error:
            # A capture that fails to end leaves its own stream behind.
            torch.cuda.set_stream(current)
            raise NotCaptured(str(error).partition("\n")[0]) from error
        return graph


class Attempts:
    """The attempts of a recorded solve, which the device ends.

    Args:
        step: one attempt.
        report: (attempts, ended, ...) in pinned memory, which the device keeps up to date.
        done, failure: f64 in memory of the device, 0 for as long as there is more to do.
    """

    def __init__(self, step: Recorded, report: Tensor, done: Tensor, failure: Tensor) -> None:
        self.step, self.report = step, report
        self.done, self.failure = done, failure
        # All attempts as one launch; False where that cannot be.
        self.whole: Any = None

    def run(self) -> list[float]:
        """Launches attempts ahead of the device until it tells the end; what the report says then.

        Raises:
            RuntimeError: the device has nothing left to do and has told no end.
        """
        device = self.done.device
        whole = self._as_one()
        if whole:
            whole.launch()
        launched, heard, news, idle = 0, -1.0, time.monotonic(), False
        try:
            while True:
                attempts, ended = self.report[:2].tolist()
                if ended:
                    # Told last: what is read from here on is final.
                    return self.report.tolist()
                if attempts != heard:
                    heard, news, idle = attempts, time.monotonic(), False
                if not whole and launched - attempts < AHEAD:
                    self.step()
                    launched += 1
                elif idle:
                    raise RuntimeError("the GPU has stopped amid a recorded solve")
                elif time.monotonic() - news > _PATIENCE and device.type == "cuda":
                    # It may have gone on since the report was read, which is read again. An error
                    # of its kernels shows here too.
                    idle = torch.cuda.current_stream(device).query()
                else:
                    time.sleep(0)
        except BaseException:
            # What is under way still writes the report, which the next solve begins with.
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            raise

    def _as_one(self) -> Any:
        """All attempts as one launch, once an attempt is recorded and known to draw no random
        numbers: only replays draw new ones.
        """
        if self.whole is None and self.step.random is not None:
            self.whole = False
            if not self.step.random:
                try:
                    graph = self.step.graph.raw_cuda_graph()
                    self.whole = _C.WhileGraph(graph, self.done, self.failure)
                except (RuntimeError, AttributeError):
                    pass  # before CUDA 12.4 or PyTorch 2.8, or work that no such graph can hold
        return self.whole


class Borrowed:
    """A field that is the caller's to keep: what is recorded of it goes when it goes."""

    def __init__(self, func: Callable) -> None:
        self.func = weakref.ref(func)

    def __call__(self, t: Tensor, y: Any) -> Any:
        return self.func()(t, y)


def borrowed(problem: Problem) -> Callable:
    """A problem's field for a recording: without a hold on the user's, and with counts of its
    own.
    """
    func = problem.func
    return func.recorded() if hasattr(func, "recorded") else Borrowed(func)


def count_evaluations(problem: Problem, evaluations: int) -> None:
    """Counts evaluations that were replayed, for the field as well where it counts itself."""
    problem.stats.evaluations += evaluations
    if hasattr(problem.func, "stats"):
        problem.func.stats.evaluations += evaluations
