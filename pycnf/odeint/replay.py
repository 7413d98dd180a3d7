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
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycnf._build import _C
from pycnf._ops import kernels, time_tensors
from pycnf.odeint.problem import Problem
from pycnf.odeint.recording import (
    Attempts,
    DerivedField,
    NotCaptured,
    Recorded,
    adaptive_obstacle,
    borrowed,
    count_evaluations,
    field_of,
    from_recording,
    generators_of,
)
from pycnf.odeint.rounding import real_dtype
from pycnf.odeint.stats import SolveStats

if TYPE_CHECKING:
    from pycnf.odeint.adaptive import AdaptiveSolver

_FIELD = {name: i for i, name in enumerate(_C.attempt_fields)}
# In core/attempt.h: Failure.
_TOO_MANY_STEPS, _UNDERFLOW = 1, 2
# Accepted steps whose sizes are reported.
_SIZES = 2**14


def replayed(solver: AdaptiveSolver) -> Tensor | None:
    """The solution of an adaptive solve by replays; see `from_recording`."""
    if len(solver.problem.s) == 1:
        return None  # nothing to repeat
    if solver.first_step is not None:
        solver.given_first_step()  # or an error that says what it should be
    reason = _obstacle(solver)
    settings = () if reason is not None else _settings(solver)
    return from_recording(solver, reason, settings, lambda: Replay(solver))


def _obstacle(solver: AdaptiveSolver) -> str | None:
    """What of a solver's cannot be done without the host."""
    y0 = solver.problem.y0
    if (reason := adaptive_obstacle(y0)) is not None:
        return reason
    if y0.dim() == 0 and y0.dtype != torch.float64 and solver.first_step is None:
        return (
            f"the first step of a 0-dim {y0.dtype} is chosen with the host; the option first_step "
            "gives one"
        )
    if not solver.one_loop:
        return 'gradient="joined" stops where a cotangent comes in'
    if solver.tape is not None:
        return 'gradient="discrete" keeps every step'
    if not solver.own_norm:
        return "a norm of your own is computed on the host"
    if solver.given_stops["jump_t"] is not None:
        return "jump_t evaluates the field a second time at a jump"
    return None


def _settings(solver: AdaptiveSolver) -> tuple:
    return (
        solver.dtype,
        solver.limits,
        tuple(solver.problem.segments()),
        tuple(
            x.item() if x.dim() == 0 and x.device.type == "cpu" else (x.shape, x.device)
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
        func = borrowed(problem)
        self.problem = replace(problem, func=func, y0=self.y, s=problem.s[:0], stats=stats)
        if isinstance(func, DerivedField):
            func.solve = self.problem
        self.tableau, self.transient = tableau, solver.transient
        self.time_dtype = solver.dtype
        self.rtol, self.atol = rows.rtol.clone(), rows.atol.clone()
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
        self.begin = Recorded(self._begin, device)
        self.step = Recorded(self._attempt, device)
        self.step.generators = generators_of(field_of(solver.problem), device)
        done, failure = (self.attempt[_FIELD[name]] for name in ("done", "failure"))
        told = self.report[: _C.report_numbers]
        self.attempts = Attempts(self.step, told, done, failure)

    # ---- what is recorded ------------------------------------------------------------------------

    def _control(self, moment: str, norms: Tensor | None) -> None:
        self.ops.attempt_control(
            self.plan, norms, moment, self.rule, self.tableau.c, self.time_dtype
        )

    def _field(self, t: Tensor) -> Tensor:
        """The field at the state, in the first row."""
        fresh = self.problem.call(t, self.y)
        other = [part.dtype for part in fresh if part.dtype != self.y.dtype]
        if other and self.first_step is None:
            raise NotCaptured(
                f"it returns {other[0]} for a state of {self.y.dtype}, of which the first step is "
                "chosen with the host; the option first_step gives one"
            )
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
            self._control("first_step", None)
            return
        norms = ops.rk_initial_norms(y, f0, None, self.rtol, self.atol, self.segments)
        self._control("begin", norms)
        trial = ops.attempt_stage(y, self.k, [], [1.0], self.h)
        f1 = problem.as_state(problem.call(self.stage_times[0], trial), y).contiguous()
        norms = ops.rk_initial_norms(y, f0, f1, self.rtol, self.atol, self.segments)
        self._control("first_step", norms)

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
        self._control("decide", norms)
        ops.attempt_advance(self.plan, y, y1, self.k, tableau.m, self.solution, self.time_dtype)

    # ---- a solve ---------------------------------------------------------------------------------

    @torch.no_grad()
    def solve(self, solver: AdaptiveSolver) -> Tensor:
        """The states of another solve with the same settings."""
        problem = solver.problem
        self.y.copy_(problem.y0)
        self.outputs.copy_(problem.s.to(solver.dtype))
        for mine, given in ((self.rtol, solver.rows.rtol), (self.atol, solver.rows.atol)):
            if mine.dim() > 0 or mine.is_cuda:  # others are read at the recording, and settings
                mine.copy_(given)
        if len(self.stops):
            stops = time_tensors(_stops(solver), torch.float64, self.stops.device)
            self.stops.copy_(torch.stack(stops))
        if self.first_step is not None:
            first = solver.given_first_step()
            if not first.is_cuda:
                (first,) = time_tensors([first.item()], torch.float64, self.y.device)
            self.first_step.copy_(first.reshape(1))
        self.report[: _C.report_numbers] = 0
        self.begin()
        attempts, _, failure, accepted = self.attempts.run()
        self._count(problem, int(attempts), int(accepted))
        if failure:
            self._raise(int(failure))
        return self.solution.clone()

    def _count(self, problem: Problem, attempts: int, accepted: int) -> None:
        stats = problem.stats
        before = 1 if self.first_step is not None else 2
        count_evaluations(problem, before + attempts * (self.tableau.stages - 1))
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
