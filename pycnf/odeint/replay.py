"""Adaptive solves on a GPU without the host in their loop: an attempt is recorded once, as a CUDA
graph, and replayed; the device accepts, chooses sizes and knows when to end.

The numbers are those of `adaptive`, by the same formulas (csrc/core/attempt.h). The host launches
replays ahead of the device and looks at a report in its own memory now and then, so that nothing
waits for anything; a replay that comes after the end changes nothing.

On a CPU, where the tests run it, the same work is done as written, attempt by attempt.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycnf._build import _C
from pycnf._ops import has_kernels, kernels, time_tensors
from pycnf.odeint.problem import Problem
from pycnf.odeint.rounding import real_dtype
from pycnf.odeint.stats import SolveStats
from pycnf.warn import warn

if TYPE_CHECKING:
    from pycnf.odeint.adaptive import AdaptiveSolver

_FIELD = {name: i for i, name in enumerate(_C.attempt_fields)}
# In torch/attempt_plan.h: Failure.
_TOO_MANY_STEPS, _UNDERFLOW, _NON_FINITE = 1, 2, 3
# Accepted steps whose sizes are reported.
_SIZES = 2**14
# Replays under way: one runs while the next waits, so the device never does.
_AHEAD = 2
# Recorded solves of one field that are kept.
_KEPT = 8
_DEVICES = ("cuda",)

_kept: weakref.WeakKeyDictionary[Any, OrderedDict[tuple, Replay | None]] = (
    weakref.WeakKeyDictionary()
)


def replayed(solver: AdaptiveSolver) -> Tensor | None:
    """The solution of a solve by replays, [T, *y0.shape]; None, with a warning that says why, where
    it has to be solved with the host in the loop.
    """
    if len(solver.problem.s) == 1:
        return None  # nothing to repeat
    reason = _obstacle(solver)
    if reason is not None:
        warn(f"cuda_graph: {reason}; solved without")
        return None
    owner = _owner(solver.problem)
    replays = _kept.setdefault(owner, OrderedDict())
    key = _key(solver, owner)
    if key not in replays:
        replays[key] = Replay(solver)
        while len(replays) > _KEPT:
            replays.popitem(last=False)
    replays.move_to_end(key)
    replay = replays[key]
    if replay is None or not replay.lock.acquire(blocking=False):
        return None  # not to be captured, as was said, or at work for another thread
    try:
        return replay.solve(solver)
    except _NotCaptured as error:
        replays[key] = None
        warn(f"cuda_graph: {type(owner).__name__} cannot be captured ({error}); solved without")
        return None
    finally:
        replay.lock.release()


def _owner(problem: Problem) -> Any:
    """The user's field, which an adjoint problem's field has behind it."""
    return getattr(problem.func, "owner", problem.func)


def _obstacle(solver: AdaptiveSolver) -> str | None:
    """Why a solve cannot be replayed, None if it can."""
    problem = solver.problem
    y0, owner = problem.y0, _owner(problem)
    if y0.device.type not in _DEVICES:
        return f"the state is on {y0.device}, not on a GPU"
    if not has_kernels(y0.dtype, y0.device):
        return f"there are no kernels for {y0.dtype}"
    if not isinstance(owner, nn.Module):
        return (
            f"func is a {type(owner).__name__}, no nn.Module, so a change of its parameters' "
            "storage would go unseen"
        )
    if y0.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a capture is under way"
    if type(solver).__name__ != "AdaptiveSolver":
        return 'gradient="joined" stops where a cotangent comes in'
    if solver.tape is not None:
        return 'gradient="discrete" keeps every step'
    if torch.is_grad_enabled() and any(
        x.requires_grad for x in (y0, problem.s, *owner.parameters())
    ):
        return "gradients flow through the solver's operations; odeint_adjoint's do not"
    if not solver.own_norm:
        return "a norm of your own is computed on the host"
    if problem.callbacks:
        return f"there are callbacks: {', '.join(problem.callbacks)}"
    if solver.given_stops["jump_t"] is not None:
        return "jump_t evaluates the field a second time at a jump"
    if any(each.requires_grad for each in problem.options.values() if isinstance(each, Tensor)):
        return "gradients flow to an option"
    return None


def _key(solver: AdaptiveSolver, owner: nn.Module) -> tuple:
    """What a recorded solve depends on, but for the numbers that it reads from memory."""
    problem, y0 = solver.problem, solver.problem.y0
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
        solver.dtype,
        solver.limits,
        tuple(problem.segments()),
        tuple(
            x.item() if x.dim() == 0 and x.device.type == "cpu" else x.data_ptr()
            for x in (solver.rows.rtol, solver.rows.atol)
        ),
        solver.first_step is None,
        len(_stops(solver)),
    )


def _stops(solver: AdaptiveSolver) -> list[float]:
    """Prescribed ends of steps after the start."""
    if not solver.stops:
        solver.s = solver.round(solver.problem.times[0])
        solver.sort_stops()
    return solver.stops["step_t"][solver.next_stop["step_t"] :]


class _NotCaptured(Exception):
    """A field that does what no CUDA graph can hold."""


class _Recorded:
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
        # The graph itself is kept for `_loop`.
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            # Other threads may go on allocating.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.work()
            graph.instantiate()
        except RuntimeError as error:
            raise _NotCaptured(str(error).partition("\n")[0]) from error
        return graph


class Replay:
    """One solve in memory of its own, to be repeated from other states and at other times.

    Args:
        solver: of the first such solve; nothing of it is kept but its settings.
    """

    def __init__(self, solver: AdaptiveSolver) -> None:
        problem, tableau, rows = solver.problem, solver.tableau, solver.rows
        self.lock = threading.Lock()
        stats = SolveStats(problem.method)
        y0 = problem.y0
        self.y = torch.empty_like(y0)
        # The field is the caller's to keep: a recorded solve goes when it goes.
        func = problem.func
        func = func.recorded() if hasattr(func, "recorded") else Borrowed(func)
        self.problem = replace(problem, func=func, y0=self.y, s=problem.s[:0], stats=stats)
        if hasattr(func, "solve"):
            func.solve = self.problem
        self.tableau, self.transient = tableau, solver.transient
        self.time_dtype, self.rtol, self.atol = solver.dtype, rows.rtol, rows.atol
        self.segments, self.solution_weights = rows.segments, rows.solution
        self.ops = kernels(y0)
        device = y0.device
        numbers: Callable[[int], Tensor] = functools.partial(
            torch.zeros, dtype=torch.float64, device=device
        )
        self.k = torch.empty(tableau.stages, y0.numel(), dtype=y0.dtype, device=device)
        self.attempt, self.outputs = numbers(len(_FIELD)), numbers(len(problem.s))
        self.stops = numbers(len(_stops(solver)))
        self.times = torch.zeros(tableau.stages, dtype=real_dtype(y0.dtype), device=device)
        self.h = torch.zeros(2, dtype=real_dtype(y0.dtype), device=device)
        self.report = torch.zeros(
            _C.report_numbers + _SIZES, dtype=torch.float64, pin_memory=device.type == "cuda"
        )
        self.plan = [self.attempt, self.times, self.h, self.outputs, self.stops, self.report]
        limits = solver.limits
        self.limits = limits
        self.rule = [
            *(limits.safety, limits.ifactor, limits.dfactor, limits.min_step, limits.max_step),
            *(float(limits.max_num_steps), float(tableau.order), float(problem.sign)),
            float(rows.rtol.dim() == 0 and rows.atol.dim() == 0),
        ]
        self.first_step = None if solver.first_step is None else numbers(1)
        self.solution = torch.empty(len(problem.s), *y0.shape, dtype=y0.dtype, device=device)
        self.stage_times = self.times.unbind()
        self.begin = _Recorded(self._begin, device)
        self.step = _Recorded(self._attempt, device)
        # All attempts as one launch; False where that cannot be.
        self.loop: Any = None

    # ---- what is recorded ------------------------------------------------------------------------

    def _control(self, op: Callable, norms: Tensor | None) -> None:
        op(self.plan, norms, self.rule, self.tableau.c, self.time_dtype)

    def _field(self, t: Tensor) -> Tensor:
        """The field at the state, in the first row."""
        fresh = self.problem.call(t, self.y)
        f = self.problem.as_state(fresh, self.y)
        self.k[0].copy_(f.reshape(-1))
        return self.k[0].view_as(self.y)

    def _begin(self) -> None:
        """Evaluates the field at the start and chooses the first step."""
        ops, problem, y = self.ops, self.problem, self.y
        start = self.outputs[:1]
        self.attempt.zero_()
        self.attempt[_FIELD["start"]].copy_(start[0])
        self.attempt[_FIELD["output"]] += 1
        self.attempt[_FIELD["finite"]].copy_(torch.isfinite(y).all())
        self.solution[0].copy_(y)
        problem.transient = False
        f0 = self._field((problem.sign * start[0]).to(self.times.dtype))
        if self.first_step is not None:
            self.attempt[_FIELD["size"]].copy_(self.first_step[0])
            self._control(ops.attempt_first_step, None)
            return
        norms = ops.rk_initial_norms(y, f0, None, self.rtol, self.atol, self.segments)
        self._control(ops.attempt_begin, norms)
        trial = ops.attempt_stage(y, self.k, [], [1.0], self.h)
        f1 = problem.as_state(problem.call(self.stage_times[0], trial), y).contiguous()
        norms = ops.rk_initial_norms(y, f0, f1, self.rtol, self.atol, self.segments)
        self._control(ops.attempt_first_step, norms)

    def _attempt(self) -> None:
        ops, problem, tableau, y, h = self.ops, self.problem, self.tableau, self.y, self.h
        state, fresh = y, []
        for stage in range(1, tableau.stages):
            state = ops.attempt_stage(y, self.k, fresh, tableau.a[stage], h)
            problem.transient = stage in self.transient
            fresh = problem.call(self.stage_times[stage], state)
        y1 = torch.empty_like(y) if self.solution_weights else state
        norms = ops.attempt_finish(
            y, self.k, fresh, y1, self.solution_weights, tableau.e, h, self.rtol, self.atol,
            self.segments,
        )  # fmt: skip
        self._control(ops.attempt_decide, norms)
        ops.attempt_advance(self.plan, y, y1, self.k, tableau.m, self.solution, self.time_dtype)

    # ---- a solve ---------------------------------------------------------------------------------

    @torch.no_grad()
    def solve(self, solver: AdaptiveSolver) -> Tensor:
        """The states of another solve with the same settings."""
        problem = solver.problem
        self.y.copy_(problem.y0)
        self.outputs.copy_(problem.s.to(solver.dtype))
        if len(self.stops):
            stops = time_tensors(_stops(solver), torch.float64, self.stops.device)
            self.stops.copy_(torch.stack(stops))
        if self.first_step is not None:
            first = torch.as_tensor(solver.first_step, dtype=solver.dtype).reshape(1)
            self.first_step.copy_(first, non_blocking=True)
        self.report[: _C.report_numbers] = 0
        self.begin()
        attempts, failure, accepted = self._run()
        self._count(problem, int(attempts), int(accepted))
        if failure:
            self._raise(int(failure))
        return self.solution.clone()

    def _run(self) -> tuple[float, float, float]:
        """Makes attempts until the end: how many, why it came early (0: it did not), and how many
        were accepted.
        """
        loop = self._whole()
        if loop:
            loop.launch()
        launched = 0
        while True:
            attempts, done, failure, accepted = self.report[: _C.report_numbers].tolist()
            if done or failure:
                return attempts, failure, accepted
            if not loop and launched - attempts < _AHEAD:
                self.step()
                launched += 1
            else:
                time.sleep(0)

    def _whole(self) -> Any:
        """All attempts as one launch, once an attempt is recorded and known to draw no random
        numbers: only replays draw new ones.
        """
        if self.loop is None and self.step.random is not None:
            self.loop = False
            if not self.step.random:
                try:
                    graph = self.step.graph.raw_cuda_graph()
                    self.loop = _C.WhileGraph(graph, self.attempt)
                except RuntimeError:
                    pass  # a driver before CUDA 12.4, or work that such a graph cannot hold
        return self.loop

    def _count(self, problem: Problem, attempts: int, accepted: int) -> None:
        stats = problem.stats
        before = 1 if self.first_step is not None else 2
        evaluations = before + attempts * (self.tableau.stages - 1)
        stats.evaluations += evaluations
        if hasattr(problem.func, "stats"):
            problem.func.stats.evaluations += evaluations
        stats.accepted += accepted
        stats.rejected += attempts - accepted
        begin = _C.report_numbers
        stats.step_sizes += self.report[begin : begin + min(accepted, _SIZES)].tolist()

    def _raise(self, failure: int) -> None:
        numbers = dict(zip(_FIELD, self.attempt.tolist()))
        if failure == _TOO_MANY_STEPS:
            limit = self.limits.max_num_steps
            raise AssertionError(f"max_num_steps exceeded ({int(numbers['taken'])}>={limit})")
        if failure == _UNDERFLOW:
            raise AssertionError(f"underflow in dt {numbers['size']}")
        raise AssertionError(f"non-finite values in state `y`: {self.y}")


class Borrowed:
    """A field that is somebody else's."""

    def __init__(self, func: Callable) -> None:
        self.func = weakref.ref(func)

    def __call__(self, t: Tensor, y: Any) -> Any:
        return self.func()(t, y)
