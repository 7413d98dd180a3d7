"""Work on a GPU that is recorded once and replayed: what it may be, what it depends on, and for how
long it is kept.
"""

from __future__ import annotations

import abc
import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycnf._build import _C
from pycnf._ops import has_kernels
from pycnf.odeint.autocast import autocast_of_now
from pycnf.odeint.problem import Problem
from pycnf.odeint.rounding import real_dtype
from pycnf.odeint.stats import SolveStats
from pycnf.warn import warn

# Recorded solves of one field that are kept.
_KEPT = 32
_DEVICES = ("cuda",)
# Of states whose attempts can be recorded.
RECORDED_DTYPES = (torch.float32, torch.float64)
# Replays under way: one runs while the next waits, so the device never does.
AHEAD = 2
# Seconds without news after which it is looked at whether the device is still at work.
_PATIENCE = 0.5
_MISSING: Any = object()
# Values of attributes that can be compared.
_PLAIN = frozenset((int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None)))

_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, RecordedSolve | None]] = (
    weakref.WeakKeyDictionary()
)
# Attributes that evaluations of a module count with: recordings do not depend on them.
_counters: weakref.WeakKeyDictionary[nn.Module, set] = weakref.WeakKeyDictionary()


class DerivedField(abc.ABC):
    """A field made of the user's, as the adjoint equation's is.

    Attributes:
        params: tensors that are differentiated.
        solve: the problem at hand.
    """

    params: tuple[Tensor, ...]
    solve: Problem | None

    @property
    @abc.abstractmethod
    def owner(self) -> Any:
        """The user's field."""

    @property
    @abc.abstractmethod
    def settings(self) -> tuple:
        """What the values depend on beside the user's field and `params`."""

    @property
    @abc.abstractmethod
    def stats(self) -> SolveStats:
        """Where evaluations are counted."""

    @abc.abstractmethod
    def recorded(self) -> DerivedField:
        """The same for a recorded solve, which outlives this one and counts for itself."""

    @abc.abstractmethod
    def __call__(self, t: Tensor, y: Any) -> Any: ...


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
    state = python_state(owner, problem.y0.device)
    key = (*_key(problem, owner, state), *settings)
    recorded = kept.get(key, _MISSING)
    if recorded is None or not (recorded is _MISSING or recorded.lock.acquire(blocking=False)):
        return None  # not to be captured, as was said, or at work for another thread
    try:
        if recorded is _MISSING and torch.is_grad_enabled():
            _check_gradients(problem)
        with _surroundings(problem):
            if recorded is _MISSING:
                recorded = record()
                recorded.lock.acquire()
            # The newest last, whatever other threads have thrown out.
            kept.pop(key, None)
            kept[key] = recorded
            while len(kept) > _KEPT:
                kept.popitem(last=False)
            return recorded.solve(solver)
    except NotCaptured as error:
        kept[key] = None
        warn(f"cuda_graph: {type(owner).__name__} cannot be captured ({error}); solved without")
        return None
    finally:
        if recorded is not _MISSING:
            recorded.lock.release()
        if new_counters(owner, state):
            kept.pop(key, None)  # which it will not have again


@contextlib.contextmanager
def _surroundings(problem: Problem) -> Iterator[None]:
    """Where a recording is made and used: in memory that any later solve may write, and without
    autocast's kept casts of weights, which would stay out of it.
    """
    with torch.inference_mode(False), torch.no_grad(), autocast_of_now(problem.y0.device)():
        yield


def _owner(problem: Problem) -> Any:
    """The user's field, which an adjoint problem's field has behind it."""
    func = problem.func
    return func.owner if isinstance(func, DerivedField) else func


def _obstacle(problem: Problem) -> str | None:
    """Why a problem cannot be solved by replays, None if it can."""
    y0, owner = problem.y0, _owner(problem)
    if y0.device.type not in _DEVICES:
        return f"the state is on {y0.device}, not on a GPU"
    if isinstance(owner, DerivedField):
        return "the gradient of a gradient is solved with the host"
    if (reason := field_obstacle(owner, "func", y0)) is not None:
        return reason
    if torch.is_grad_enabled() and any(
        x.requires_grad for x in (y0, problem.s, *owner.parameters())
    ):
        return "gradients flow through the solver's operations; odeint_adjoint's do not"
    if problem.callbacks:
        return f"there are callbacks: {', '.join(problem.callbacks)}"
    if any(each.requires_grad for each in problem.options.values() if isinstance(each, Tensor)):
        return "gradients flow to an option"
    return None


def field_obstacle(field: Any, name: str, y: Tensor) -> str | None:
    """Why no solve with this field and such states can be recorded, None if one can.

    Args:
        name: of the field, for the sentence.
    """
    if not isinstance(field, nn.Module):
        return (
            f"{name} is a {type(field).__name__}, no nn.Module, so a change of its parameters' "
            "storage would go unseen"
        )
    if (module := hooked(field)) is not None:
        return f"there are hooks on {type(module).__name__}, which a replay would not call"
    if y.is_cuda and y.device.index != torch.cuda.current_device():
        return f"the state is on {y.device}, which is not the current device"
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a capture is under way"
    return None


def hooked(field: nn.Module) -> nn.Module | None:
    """A module within this one that has hooks."""
    for module in field.modules():
        if (
            module._forward_hooks or module._forward_pre_hooks
            or module._backward_hooks or module._backward_pre_hooks
        ):  # fmt: skip
            return module
    return None


def adaptive_obstacle(y: Tensor) -> str | None:
    """Why no adaptive solve of such states can be recorded, None if one can."""
    if y.dtype not in RECORDED_DTYPES:
        return f"the state is {y.dtype}; recorded solves are of float32 and float64 states"
    if not has_kernels(y.dtype, y.device):
        return f"pycnf was built without kernels for {y.device.type}"
    return None


def _key(problem: Problem, owner: nn.Module, state: dict) -> tuple:
    """What a recording depends on, but for the numbers that it reads from memory."""
    y0, func = problem.y0, problem.func
    return (
        type(func),
        module_key(owner, state, y0.device, func.params if isinstance(func, DerivedField) else ()),
        func.settings if isinstance(func, DerivedField) else (),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(y0.device.type) and torch.get_autocast_dtype(y0.device.type),
        y0.shape,
        y0.dtype,
        y0.device,
        problem.method,
        problem.sign,
        tuple(problem.shapes or ()),
        len(problem.s),
    )


def module_key(
    module: nn.Module, state: dict, device: torch.device, more: Iterable[Tensor] = ()
) -> tuple:
    """What recorded evaluations of a module depend on.

    Args:
        state: its `python_state`.
        more: tensors that are differentiated beside its own.
    """
    held = (*module.parameters(), *module.buffers(), *more)
    counters = _counters.get(module, ())
    return (
        tuple(_place(x, device) for x in held),
        tuple(item for item in state.items() if item[0] not in counters),
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


def python_state(module: nn.Module, device: torch.device) -> dict[tuple[int, str], Any]:
    """What a module tree's forward may read from Python, as far as it is simple: kinds of modules,
    and attributes that are numbers, strings or tensors.
    """
    found: dict[tuple[int, str], Any] = {}
    for i, part in enumerate(module.modules()):
        found[i, ""] = type(part)
        for name, value in vars(part).items():
            kind = type(value)
            if kind is dict:
                continue  # as most are, and `isinstance` with Tensor takes its time
            if not _PLAIN.isdisjoint(kind.__mro__):
                found[i, name] = (kind, value)
            elif isinstance(value, Tensor):
                found[i, name] = _place(value, device)
    return found


def new_counters(module: nn.Module, before: dict) -> bool:
    """Whether evaluations since `before`, a `python_state`, have changed whole numbers, which from
    now on are known as counters.
    """
    changed = set()
    for i, part in enumerate(module.modules()):
        for name, value in vars(part).items():
            if type(value) is int and before.get((i, name)) != (int, value):
                changed.add((i, name))
    known = _counters.setdefault(module, set())
    new = not changed <= known
    known |= changed
    return new


def _place(x: Tensor, device: torch.device) -> tuple:
    """Where a recording reads a tensor, and as what."""
    if is_lazy(x) or x.layout != torch.strided:
        return id(x), x.requires_grad
    # A number on the host is no memory to a GPU: it is recorded itself.
    value = x.item() if x.dim() == 0 and x.device.type == "cpu" != device.type else None
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, value


def _check_gradients(problem: Problem) -> None:
    """Raises NotCaptured where gradients flow to tensors that a field alone knows."""
    y0 = problem.y0.detach().clone()
    t = (problem.sign * problem.s[0].detach()).to(real_dtype(y0.dtype))
    with torch.enable_grad():
        fresh = replace(problem, stats=SolveStats(problem.method)).call(t, y0)
    if any(part.requires_grad for part in fresh):
        raise NotCaptured("gradients flow to tensors that are none of its parameters")


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
            try:
                with torch.cuda.stream(side):
                    self.work()
            finally:
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
    return func.recorded() if isinstance(func, DerivedField) else Borrowed(func)


def count_evaluations(problem: Problem, evaluations: int) -> None:
    """Counts evaluations that were replayed, for the field as well where it counts itself."""
    problem.stats.evaluations += evaluations
    if isinstance(problem.func, DerivedField):
        problem.func.stats.evaluations += evaluations
