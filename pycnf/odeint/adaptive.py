"""Adaptive methods with torchdiffeq's step sequence: it overshoots the output times and
interpolates, reuses the last derivative of a step as the first of the next whatever the method, and
evaluates stages at the end of a step just before it.

Step control runs on Python floats rounded to the dtype that torchdiffeq's tensors would have; the
state is touched by compiled ops only. As soon as something carries a graph (the state, a time, what
the field returns), steps are taken by `differentiable_step` instead, with the same numbers.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycnf import reference
from pycnf.odeint import rounding
from pycnf.odeint.arguments import (
    check_finite_times,
    check_function,
    choice,
    count,
    number,
    numbers,
    warn_not_recorded,
    warn_unused,
)
from pycnf.odeint.problem import Problem
from pycnf.odeint.replay import replayed
from pycnf.odeint.step_times import StepTimes
from pycnf.odeint.stepper import Rows, differentiable_quartic, differentiable_step
from pycnf.odeint.tableau import Tableau


@dataclass(frozen=True)
class Limits:
    """Options of step control."""

    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 2**31 - 1

    def clamp(self, size: float) -> float:
        """A size between min_step and max_step; NaN if one of the three is, as in torch."""
        if any(math.isnan(x) for x in (size, self.min_step, self.max_step)):
            return math.nan
        return min(max(size, self.min_step), self.max_step)


@dataclass
class Accepted:
    """What the exact gradient needs to know of an accepted step.

    Attributes:
        s0, s1, ds: start, end and size of the step, in ascending time.
        y: state at the start.
        f: derivative at the start, if it is no value of the field at (f_time, y).
        f_time: where the derivative at the start was evaluated, if it was at y.
        clipped: the end was given by `step_t` or `jump_t`, so the size depends on the start.
        outputs: range of output times that this step interpolates.
    """

    s0: float
    s1: float
    ds: float
    y: Tensor
    f: Tensor | None
    f_time: float | None
    clipped: bool
    outputs: range = range(0)


def _home(tolerance: Any, y0: Tensor) -> torch.device:
    """Where a tolerance is kept: a number on the host stays there, for a GPU to be told."""
    if isinstance(tolerance, Tensor) and tolerance.dim() == 0:
        return tolerance.device
    return y0.device if isinstance(tolerance, Tensor) else torch.device("cpu")


def _tolerance(name: str, tolerance: Tensor, y0: Tensor) -> Tensor:
    """float64: 0-dim for one number, else one value per value of the state.

    By torch's promotion, tolerances that are no plain numbers, and 0-dim states, are scaled in the
    dtype of time; one value per value makes the kernels do so.
    """
    if tolerance.dim() == 0 and y0.dim() > 0:
        return tolerance.double()
    shape = y0.shape if y0.dim() > 0 else torch.Size([1])
    if tolerance.numel() == 1:
        tolerance = tolerance.reshape(1)
    try:
        tolerance = tolerance.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the state's shape {tuple(y0.shape)}, "
            f"got {tuple(tolerance.shape)}"
        ) from None
    home = "cpu" if y0.device.type == "mps" else y0.device  # MPS has no float64
    return tolerance.to(home, torch.float64).contiguous()


class AdaptiveSolver:
    """One solve; see the module.

    Attributes:
        one_loop: whether nothing happens between steps but what the solver itself does.

    Args:
        tape: receives every accepted step.
        cuda_graph: replays a recorded attempt, see `replay`, where that can be done.
        unused: options that the method does not have.
    """

    one_loop = True

    def __init__(
        self,
        problem: Problem,
        tableau: Tableau,
        name: str,
        tape: list[Accepted] | None = None,
        *,
        first_step: Any = None,
        step_t: Any = None,
        jump_t: Any = None,
        dtype: torch.dtype = torch.float64,
        safety: float = 0.9,
        ifactor: float = 10.0,
        dfactor: float = 0.2,
        min_step: float = 0.0,
        max_step: float = math.inf,
        max_num_steps: int = 2**31 - 1,
        cuda_graph: bool | None = None,
        **unused: Any,
    ) -> None:
        warn_unused(name, unused)
        y0 = problem.y0
        self.problem, self.tableau, self.tape = problem, tableau, tape
        self.transient = tableau.transient_stages
        if y0.device.type == "mps" and dtype == torch.float64:
            dtype = torch.float32
        self.dtype = torch.promote_types(dtype, rounding.real_dtype(y0.dtype))
        self.round = rounding.rounding(self.dtype)
        self.round_state = rounding.rounding(rounding.real_dtype(y0.dtype))
        limits = {
            "safety": safety,
            "ifactor": ifactor,
            "dfactor": dfactor,
            "min_step": min_step,
            "max_step": max_step,
        }
        self.limits = Limits(
            *(self.round(number(*limit)) for limit in limits.items()),
            count("max_num_steps", max_num_steps),
        )
        self.first_step, self.cuda_graph = first_step, choice("cuda_graph", cuda_graph)
        self.given_stops = {"step_t": step_t, "jump_t": jump_t}
        self.stops: dict[str, list[float]] = {}
        self.stop_graphs: dict[str, Sequence[Tensor]] = {}
        check_function("norm", problem.norm)
        segments = problem.segments()
        self.own_norm = segments is not None
        # As torch's promotion would have them: for norms that only their own code can compute.
        self.tolerances = {
            name: numbers(name, value, self.dtype, _home(value, y0))
            for name, value in (("rtol", problem.rtol), ("atol", problem.atol))
        }
        self.rows = Rows(
            tableau,
            y0,
            segments or [],
            *(_tolerance(name, value, y0) for name, value in self.tolerances.items()),
        )
        # The dtype in which torch would have the scaled error.
        plain = self.rows.rtol.dim() == 0 and self.rows.atol.dim() == 0
        self.round_error = self.round_state if plain else self.round
        self.y, self.f_graph = y0, None
        self.s, self.s_graph = 0.0, None
        self.ds, self.ds_graph = 0.0, None
        self.f_time: float | None = None
        self.finite = True
        self.taken = 0  # attempts since the last output

    # ---- the solve -------------------------------------------------------------------------------

    def integrate(self) -> Tensor:
        """States at the output times, [T, *y0.shape]."""
        times = self.problem.s.to(self.dtype)
        values = [self.round(time) for time in self.problem.times]
        check_finite_times(values[0], values[-1])
        if self.cuda_graph:
            self.cuda_graph = False
            if (solution := replayed(self)) is not None:
                return solution
        y0 = self.problem.y0
        solution = torch.empty((len(values), *y0.shape), dtype=y0.dtype, device=y0.device)
        graph = y0.requires_grad and torch.is_grad_enabled()
        # A copy, and now: the field may edit its input.
        solution[0] = y0.detach()
        pieces = [y0.clone()[None] if graph else solution[:1]]
        self.start(times)
        done = 1
        while done < len(values):
            if values[done] <= self.s:
                # Only where distinct times round to one: no step has been taken yet.
                solution[done] = y0
                pieces.append(solution[done : done + 1])
                done += 1
                continue
            step = self.attempt()
            if step is None:
                continue
            end = bisect.bisect_right(values, step.times.end, lo=done)
            if end > done:
                outputs, has_graph = self.outputs(step, times, done, end, solution)
                graph = graph or has_graph
                pieces.append(outputs)
                self.taken = 0
                if self.tape is not None:
                    self.tape[-1].outputs = range(done, end)
                done = end
            self.advance(step)
        return torch.cat(pieces) if graph else solution

    def start(self, times: Tensor) -> None:
        """Evaluates the field at times[0] and chooses the first step size."""
        if self.problem.y0.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an adaptive solve chooses its steps by what the host reads, which cannot be "
                'captured by torch.cuda.graph; options={"cuda_graph": True} records its attempts, '
                "and methods on a fixed grid can be captured whole"
            )
        warn_not_recorded(self.cuda_graph, "events and dense output look at every step")
        problem = self.problem
        y0 = problem.y0
        self.s = self.round(problem.times[0])
        if times.requires_grad and torch.is_grad_enabled():
            self.s_graph = times[0]
        fresh = self._evaluate_start(self.round_state(self.s))
        grad = torch.is_grad_enabled()
        plain = y0.dim() > 0 and all(part.dtype == y0.dtype for part in fresh)
        if self.first_step is not None:
            first = self.given_first_step()
        elif grad or not plain or not self.own_norm:
            first = self._initial_step_by_tensors(problem.joined(fresh))
        else:
            first = torch.tensor(self._initial_step(), dtype=self.dtype)
        first = first.reshape(())
        self.ds = first.item()
        self.ds_graph = first if grad and first.requires_grad else None
        self.finite = bool(torch.isfinite(y0).all())
        self.sort_stops()

    def given_first_step(self) -> Tensor:
        """The option first_step as a tensor of one number, with its graph."""
        first = numbers("first_step", self.first_step, self.dtype)
        if first.numel() != 1:
            raise ValueError(f"first_step must be one number, got {tuple(first.shape)}")
        return first

    def sort_stops(self) -> None:
        """Grid points and discontinuities after the start, ascending, and the next of each."""
        stops, tensors = {}, {}
        for name, given in self.given_stops.items():
            points = numbers(name, [] if given is None else given, self.dtype)
            points = points[points >= self.s].sort().values
            stops[name] = points.tolist()
            if points.requires_grad and torch.is_grad_enabled():
                tensors[name] = points.unbind()
        together = stops["step_t"] + stops["jump_t"]
        if len(set(together)) < len(together):
            raise ValueError(
                "`step_t` and `jump_t` must not have any repeated elements between them."
            )
        self.stops, self.stop_graphs = stops, tensors
        self.next_stop = {
            name: min(bisect.bisect(values, self.s), len(values) - 1)
            for name, values in stops.items()
        }

    def _initial_step(self) -> float:
        """Hairer, Norsett & Wanner, Solving ODEs I, II.4, rounded as torchdiffeq's tensors are."""
        problem, rows = self.problem, self.rows
        y0, f0 = problem.y0, rows.row(0)
        r = self.round_error
        d0, d1 = (r(norm) for norm in rows.initial_norms(y0, f0))
        h0 = r(1e-6) if d0 < 1e-5 or d1 < 1e-5 else r(r(r(0.01) * d0) / d1)
        y1 = rows.ops.rk_combine(y0, [f0], [1.0], problem.sign * h0)
        at = self.round_state(self.round(self.s + h0))
        fresh = problem.call(self._times(self.s, 0.0, None).at(at), y1)
        f1 = problem.as_state(fresh, y0).contiguous()
        # Half precision may round the size to zero, and 1 / 0 is infinite there.
        d2 = r(r(rows.initial_norms(y0, f0, f1)[0]) / h0) if h0 else math.inf
        if d1 <= 1e-15 and d2 <= 1e-15:
            h1 = max(r(1e-6), r(h0 * r(1e-3)))
        else:
            h1 = r(_power(r(r(0.01) / max(d1, d2)), r(1.0 / self.tableau.order)))
        return min(r(100 * h0), h1) if h1 == h1 else h1

    def _initial_step_by_tensors(self, f0: Tensor) -> Tensor:
        """The same with its graph, and for norms that only their own code can compute."""
        problem = self.problem
        y0 = problem.y0
        norm = problem.norm_of
        rtol, atol = self.tolerances.values()
        scale = atol + y0.abs() * rtol
        d0, d1 = abs(norm(y0 / scale)), abs(norm(f0 / scale))
        tiny = torch.tensor(1e-6, dtype=rounding.real_dtype(y0.dtype), device=y0.device)
        h0 = tiny if d0 < 1e-5 or d1 < 1e-5 else abs(0.01 * d0 / d1)
        y1 = y0 + problem.sign * h0 * f0
        s = self.s if self.s_graph is None else self.s_graph
        t1 = problem.sign * (torch.as_tensor(s, dtype=self.dtype, device=y0.device) + h0)
        f1 = problem.joined(problem.call(t1.to(rounding.real_dtype(y1.dtype)), y1))
        d2 = abs(norm((f1 - f0) / scale) / h0)
        if d1 <= 1e-15 and d2 <= 1e-15:
            h1 = torch.max(tiny, h0 * 1e-3)
        else:
            h1 = (0.01 / max(d1, d2)) ** (1.0 / float(self.tableau.order))
        return torch.min(100 * h0, abs(h1)).to(self.dtype)

    # ---- one attempt -----------------------------------------------------------------------------

    def attempt(self) -> Step | None:
        """Tries a step of size ds from s; the step if it is accepted. Sets the size of the next
        attempt.
        """
        limits, round_ = self.limits, self.round
        limit = limits.max_num_steps
        assert self.taken < limit, f"max_num_steps exceeded ({self.taken}>={limit})"
        self.taken += 1
        if not math.isfinite(self.ds):
            self.ds, self.ds_graph = limits.min_step, None
        ds, ds_graph = self.ds, self.ds_graph
        if not limits.min_step <= ds <= limits.max_step:
            ds, ds_graph = limits.clamp(ds), None
        problem = self.problem
        s0, y0 = self.s, self.y
        if problem.callbacks:
            s0, edited = problem.notify("callback_step", s0, y0, ds, self.dtype)
            if edited != ds:
                ds, ds_graph = edited, None
            self.finite = bool(torch.isfinite(y0).all())
        s1 = round_(s0 + ds)
        assert s1 > s0, f"underflow in dt {ds}"
        assert self.finite, f"non-finite values in state `y`: {y0}"
        stop = None
        for name, values in self.stops.items():
            # A jump within what step_t has left of the step wins.
            if values and s0 < values[self.next_stop[name]] < round_(s0 + ds):
                stop = name
                s1 = values[self.next_stop[name]]
                ds = round_(s1 - s0)
                ds_graph = None
        times = self._times(s1, ds, ds_graph, stop is not None)
        if stop in self.stop_graphs:
            times.prescribe_end(self.stop_graphs[stop][self.next_stop[stop]])
        step = self._take(y0, times, stop)
        error = self._error(step)
        accepted = (error <= 1 and ds <= limits.max_step) or ds <= limits.min_step
        if accepted:
            _, edited = problem.notify("callback_accept_step", s0, y0, ds, self.dtype)
            if edited != ds:
                ds = step.times.resize(edited)
            problem.stats.accept(ds)
            if self.tape is not None:
                reusable = self.f_time is not None
                f0 = None if reusable else self.rows.row(0).clone()
                self.tape.append(Accepted(s0, s1, ds, y0, f0, self.f_time, stop is not None))
        else:
            _, ds = problem.notify("callback_reject_step", s0, y0, ds, self.dtype)
            problem.stats.rejected += 1
        self.ds, self.ds_graph = self._next_size(ds, error), None
        return step if accepted else None

    def _times(
        self, s1: float, ds: float, ds_graph: Tensor | None, fixed_end: bool = False
    ) -> StepTimes:
        return StepTimes(
            self.problem, self.tableau.c, self.s, s1, ds, self.s_graph, ds_graph, fixed_end
        )

    def _take(self, y0: Tensor, times: StepTimes, stop: str | None) -> Step:
        """Evaluates the stages, compiled for as long as nothing carries a graph."""
        problem, rows, h = self.problem, self.rows, times.h
        step = Step(y0, times, stop)
        graph = torch.is_grad_enabled() and (
            y0.requires_grad or self.f_graph is not None or times.has_graph
        )
        if graph:
            f0 = self.f_graph
            f0 = rows.row(0).clone().view_as(y0) if f0 is None else f0
            return self._differentiate(step, [f0])
        watch = torch.is_grad_enabled()
        fresh: Sequence[Tensor] = []
        y = y0
        for stage, t in enumerate(times.stages(), 1):
            y = rows.stage(y0, stage, fresh, h)
            problem.transient = stage in self.transient
            fresh = problem.call(t, y)
            if watch and any(part.requires_grad for part in fresh):
                done = [rows.row(i).clone().view_as(y0) for i in range(stage)]
                return self._differentiate(step, [*done, problem.as_state(fresh, y0)], y)
        ratio = None if self.own_norm else torch.empty_like(y0)
        step.y1, step.stats = rows.finish(y0, y, fresh, h, ratio)
        step.ratio = ratio
        return step

    def _differentiate(self, step: Step, k: list[Tensor], y: Tensor | None = None) -> Step:
        """The rest of a step, from the stages in `k` on, with a graph; y is the state of the
        newest.
        """
        if len(k) == self.tableau.stages and self.tableau.solution_is_last_stage:
            step.k, step.y1, step.h_graph = k, y, None
        else:
            self._evaluate(step, k)
        for stage in range(1, self.tableau.stages):
            self.rows.store(stage, [step.k[stage]])
        step.ratio = None if self.own_norm else torch.empty_like(step.y0)
        step.stats = self.rows.error_norm(
            step.y0.detach(), step.y1.detach(), step.times.h, step.ratio
        )
        return step

    def _evaluate(self, step: Step, k: list[Tensor]) -> None:
        """The stages that `k` lacks and the solution, with their graph."""
        times = step.times.stages()

        def field(stage: int, state: Tensor) -> Tensor:
            return self.problem.as_state(self.problem.call(times[stage - 1], state), step.y0)

        step.k, step.h_graph = k, step.times.h_graph
        step.y1 = differentiable_step(self.tableau, field, step.y0, k, step.times.h, step.h_graph)

    def _error(self, step: Step) -> float:
        norm, finite = step.stats.tolist()
        step.finite = finite != 0
        if step.ratio is None:
            return self.round_error(norm)
        ratio = step.ratio
        for tolerance in self.tolerances.values():
            shape = torch.broadcast_shapes(ratio.shape, tolerance.shape)
            ratio = ratio.expand(shape).to(torch.result_type(ratio, tolerance))
        return float(abs(self.problem.norm_of(ratio)))

    def _next_size(self, ds: float, error: float) -> float:
        """An I controller that never shrinks an accepted step."""
        limits, round_ = self.limits, self.round
        if error == 0:
            size = round_(ds * limits.ifactor)
        elif error != error:
            return math.nan
        else:
            dfactor = 1.0 if error < 1 else limits.dfactor
            power = round_(_power(round_(error), round_(1.0 / self.tableau.order)))
            factor = round_(limits.safety / power)
            if any(math.isnan(x) for x in (factor, dfactor, limits.ifactor)):
                return math.nan
            size = round_(ds * min(limits.ifactor, max(factor, dfactor)))
        return limits.clamp(size)

    # ---- after an accepted step ------------------------------------------------------------------

    def outputs(
        self, step: Step, times: Tensor, begin: int, end: int, solution: Tensor
    ) -> tuple[Tensor, bool]:
        """States at output times within the step, and whether they carry a graph."""
        graph_times = torch.is_grad_enabled() and (times.requires_grad or step.times.has_graph)
        if step.k is None and not graph_times:
            out = solution[begin:end]
            x = step.times.points(times[begin:end].detach())
            self.rows.interpolate(step.y0, step.y1, step.times.h, x.tolist(), out)
            return out, False
        if step.k is None:
            stages = range(self.tableau.stages)
            step.k = [self.rows.row(i).clone().view_as(step.y0) for i in stages]
        return self.interpolate_with_graph(step, times[begin:end]), True

    def interpolate_with_graph(self, step: Step, outputs: Tensor) -> Tensor:
        """States [len(outputs), ...] within a step that has `k`, with their graph."""
        coefficients = differentiable_quartic(
            self.tableau, step.y0, step.y1, step.k, step.times.h, step.h_graph
        )
        x = step.times.points(outputs).to(step.y0.device, step.times.dtype)
        return reference.evaluate_quartic(coefficients, x.view(-1, *[1] * step.y0.dim()))

    def replay(self, accepted: Accepted, y0: Tensor, f0: Tensor | None, s0: Tensor | None) -> Step:
        """An accepted step again, with a graph from y0, from f0 if that was kept, and from its
        start s0 if given.
        """
        times = StepTimes(
            self.problem, self.tableau.c, accepted.s0, accepted.s1, accepted.ds, s0, None,
            accepted.clipped,
        )  # fmt: skip
        if f0 is None:
            f0 = self.problem.as_state(self.problem.call(times.at(accepted.f_time), y0), y0)
        step = Step(y0, times)
        self._evaluate(step, [f0])
        return step

    def advance(self, step: Step) -> None:
        """Makes the end of the step the start of the next."""
        self.rows.advance()
        self.f_graph = step.k[-1] if step.k is not None and step.k[-1].requires_grad else None
        times = step.times
        self.s, self.s_graph = times.end, times.end_graph
        self.y, self.finite = step.y1, step.finite
        self.f_time = None
        if self.tableau.solution_is_last_stage:
            self.f_time = rounding.before(self.round_state(self.s), times.dtype)
        if step.stop is not None:
            values = self.stops[step.stop]
            if self.next_stop[step.stop] != len(values) - 1:
                self.next_stop[step.stop] += 1
        if step.stop == "jump_t":
            # f on the far side of the discontinuity.
            self._evaluate_start(rounding.after(self.round_state(self.s), times.dtype))

    def _evaluate_start(self, f_time: float) -> Sequence[Tensor]:
        """The derivative at the start of the next step, evaluated at f_time, as it came."""
        self.f_time = f_time
        fresh = self.problem.call(self._times(self.s, 0.0, None).at(f_time), self.y)
        self.rows.store(0, fresh)
        graph = torch.is_grad_enabled() and any(part.requires_grad for part in fresh)
        self.f_graph = self.problem.as_state(fresh, self.y) if graph else None
        return fresh


@dataclass
class Step:
    """A step that has been evaluated; `k` and `h_graph` only if it was with a graph."""

    y0: Tensor
    times: StepTimes
    stop: str | None = None
    y1: Tensor | None = None
    stats: Tensor | None = None
    ratio: Tensor | None = None
    finite: bool = True
    k: list[Tensor] | None = None
    h_graph: Tensor | None = None


def _power(base: float, exponent: float) -> float:
    """base ** exponent with infinities in place of errors."""
    if base == 0:
        return 0.0
    return math.inf if math.isinf(base) else base**exponent
