"""Work on a GPU that is recorded once and replayed: what it may be, what it depends on, and for how
long it is kept.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pycnf._build import _C
from pycnf._ops import has_kernels
from pycnf.odeint.autocast import autocast_of_now
from pycnf.odeint.norms import flat_to_shapes
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
# The last PyTorch that leaves failed captures to be cleaned up.
_LAST_TO_CLEAN_UP = (2, 13)
# Held while work is recorded.
_recording = threading.Lock()
# Where work is recorded, by device and user's stream.
_streams: dict[tuple[int, int], Any] = {}
# Graphs whose capture has failed.
_failed: list[Any] = []
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
    def check(self, t: Tensor, y: Any) -> None:
        """Raises NotCaptured where a recording of it would miss gradients."""

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
    checked = torch.is_grad_enabled() or isinstance(problem.func, DerivedField)
    recorded = kept.get(key, _MISSING)
    if recorded is None or not (recorded is _MISSING or recorded.lock.acquire(blocking=False)):
        return None  # not to be captured, as was said, or at work for another thread
    try:
        with _surroundings(problem):
            if recorded is _MISSING:
                if checked:
                    _check_gradients(problem)
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
    y0, func, owner = problem.y0, problem.func, _owner(problem)
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
    if isinstance(func, DerivedField):
        placed = {id(x) for _, _, x in _places(owner, {id(p) for p in func.params})}
        if any(id(p) not in placed for p in func.params):
            return "a tensor of adjoint_params is no attribute of func or of a module within it"
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
        matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


def matmul_precision() -> str:
    """How a GPU multiplies float32 matrices. PyTorch has two settings for it since 2.9, and raises
    where the older one is asked for after the newer one was set.
    """
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() if newer is None else newer


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
    if isinstance(problem.func, DerivedField):
        problem.func.recorded().check(t, flat_to_shapes(y0, problem.shapes[: problem.seen]))
        return
    with torch.enable_grad():
        fresh = replace(problem, stats=SolveStats(problem.method)).call(t, y0)
    if any(part.requires_grad for part in fresh):
        raise NotCaptured("gradients flow to tensors that are none of its parameters")


def _places(module: nn.Module, ids: Container[int]) -> list[tuple[dict, str, Tensor]]:
    """Where a module tree holds these tensors: in which dictionary, by which name."""
    return [
        (held, name, x)
        for part in module.modules()
        for held in (part._parameters, part._buffers, vars(part))
        for name, x in held.items()
        if id(x) in ids
    ]


@contextlib.contextmanager
def substituted(module: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Puts other tensors in the places of a module's own, by their ids."""
    places = _places(module, tensors)
    try:
        for held, name, x in places:
            held[name] = tensors[id(x)]
        yield
    finally:
        for held, name, x in places:
            held[name] = x


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
        elif self.graph is not None:
            self._replay()
        else:
            with torch.cuda.device(self.device):
                self._prepare()

    def _prepare(self) -> None:
        # Where another thread records, it is done as written once more: that thread's work may be
        # for autograd's thread, which may be this one.
        if self.warm and _recording.acquire(blocking=False):
            try:
                self.graph = _record(self.work, self.device)
            finally:
                _recording.release()
            self._replay()
            return
        side, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                self.work()
        finally:
            current.wait_stream(side)
        self.warm = True

    def _replay(self) -> None:
        generator = torch.cuda.default_generators[self.device.index]
        offset = generator.get_offset() if self.random is None else 0
        self.graph.replay()
        if self.random is None:
            self.random = generator.get_offset() != offset


def _record(work: Callable[[], None], device: torch.device) -> Any:
    """The work as a CUDA graph; the device is the current one.

    Raises:
        NotCaptured: the work does what no graph can hold.
    """
    graph, pool = _new_graph(), torch.cuda.graph_pool_handle()
    try:
        with _no_collection():
            _capture(graph, pool, work, device)
        if hasattr(graph, "instantiate"):
            graph.instantiate()
    except RuntimeError as error:
        _clean_up(graph, pool, device)
        raise NotCaptured(str(error).partition("\n")[0]) from error
    return graph


def _new_graph() -> Any:
    try:
        return torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:  # before PyTorch 2.8
        return torch.cuda.CUDAGraph()


def _capture(graph: Any, pool: Any, work: Callable[[], Any], device: torch.device) -> None:
    current = torch.cuda.current_stream(device)
    # A stream for each of the user's: cuBLAS shares memory among all that is recorded on one.
    key = device.index, current.cuda_stream
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device)
    try:
        # Other threads may go on allocating.
        with torch.cuda.graph(
            graph, pool=pool, stream=_streams[key], capture_error_mode="thread_local"
        ):
            work()
    except BaseException:
        # A capture that fails to end leaves its own stream behind.
        torch.cuda.set_stream(current)
        raise


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may be another graph, and to destroy one spoils a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _clean_up(graph: Any, pool: Any, device: torch.device) -> None:
    """Ends what a failed capture has begun, of which PyTorch up to 2.13 leaves a part as it is."""
    if tuple(map(int, torch.__version__.split(".")[:2])) > _LAST_TO_CLEAN_UP:
        return
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return  # the capture has ended as it should; only the work, or what came later, has failed
    # The allocator of pinned memory goes on asking the graph what belongs to it.
    _failed.append(graph)
    for end in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with contextlib.suppress(RuntimeError, AttributeError):  # done already, or before 2.7
            getattr(torch._C, end)(device.index, pool)
    # The generator goes on waiting for the end of a capture, be it another one's.
    number = torch.zeros(1, device=device)
    with contextlib.suppress(RuntimeError):
        _capture(_new_graph(), None, number.zero_, device)


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
