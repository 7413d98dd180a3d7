"""Solves that end where an event function changes sign, with torchdiffeq's search: steps until the
sign differs at the end of one, then bisection on that step's interpolant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pycnf._ops import has_kernels, time_tensors
from pycnf.odeint import rounding
from pycnf.odeint.adaptive import AdaptiveSolver
from pycnf.odeint.arguments import warn_not_recorded
from pycnf.odeint.explicit_grid import ExplicitGridSolver
from pycnf.odeint.fixed_grid import Ends, FixedGridSolver, cubic_hermite, problem_call
from pycnf.odeint.problem import Problem
from pycnf.odeint.stepper import Rows
from pycnf.odeint.user_solver import UserSolver

_MAX_FIXED_STEPS = 20000


def solve_until_event(
    solver: AdaptiveSolver | FixedGridSolver | UserSolver,
) -> tuple[Tensor, Tensor]:
    """The event's time, 0-dim and ascending in the dtype in which the solver steps, and the states
    [2, *y0.shape] at the start and then.

    Raises:
        AssertionError: as the solve; a method on a fixed grid has no step_size.
        RuntimeError: 20000 steps on a fixed grid met no event.
    """
    if isinstance(solver, UserSolver):
        return solver.integrate_until_event()
    search = _on_fixed_grid if isinstance(solver, FixedGridSolver) else _adaptively
    return search(solver)


def _sign(problem: Problem, s: float, y: Tensor, dtype: torch.dtype) -> int:
    """The sign of the event function at s, in ascending time; that of NaN is 0, as torch has it."""
    (t,) = time_tensors([problem.sign * s], dtype, y.device)
    value = problem.event(t, y).item()
    return (value > 0) - (value < 0)


def _adaptively(solver: AdaptiveSolver) -> tuple[Tensor, Tensor]:
    problem, y0, dtype = solver.problem, solver.problem.y0, solver.dtype
    times = problem.s[:1].to(dtype)
    solver.start(times)

    def sign() -> int:
        return _sign(problem, solver.s, solver.y, dtype)

    (t0,) = time_tensors([problem.sign * solver.s], dtype, y0.device)
    if problem.event(t0, y0).item() == 0:
        return times[0], torch.stack([y0, y0])
    before = sign()
    step, slopes = None, solver.rows.k
    while sign() == before:
        step = solver.attempt()
        if step is not None:
            # The slope beyond a jump takes the place of this step's last one.
            slopes = solver.rows.k.clone() if step.stop == "jump_t" else solver.rows.k
            solver.advance(step)
    if step is None:
        # The event function is not the same twice: there is no step to look into.
        return times[0].new_tensor(solver.s), torch.stack([y0, y0 * math.nan])
    solver.rows.k = slopes
    solver.rows.retreat()
    start, end = step.times.start, step.times.end
    step_ends = step.y0.detach(), step.y1.detach()

    def sign_within(s: float) -> int:
        y = torch.empty((1, *y0.shape), dtype=y0.dtype, device=y0.device)
        solver.rows.interpolate(*step_ends, step.times.h, [step.times.point(s)], y)
        return _sign(problem, s, y[0], dtype)

    found = _bisect(sign_within, before, start, end, problem.atol, dtype)
    event = times.detach().new_tensor([found])
    y1 = torch.empty((1, *y0.shape), dtype=y0.dtype, device=y0.device)
    y1, _ = solver.outputs(step, event, 0, 1, y1)
    if solver.tape is not None:
        solver.tape[-1].outputs = range(1, 2)
    return event[0], torch.stack([y0, y1[0]])


def _on_fixed_grid(solver: FixedGridSolver) -> tuple[Tensor, Tensor]:
    warn_not_recorded(solver.cuda_graph, "an event is looked for after every step")
    problem, step_size = solver.problem, solver.step_size
    assert step_size is not None, (
        "Event handling for fixed step solvers currently requires `step_size` to be provided in "
        "options."
    )
    s, dtype = problem.s[0], problem.s.dtype
    round_ = rounding.rounding(dtype)
    grad = torch.is_grad_enabled()
    graph = grad and (s + step_size).requires_grad
    size = step_size.item() if isinstance(step_size, Tensor) else float(step_size)
    start, y = s.item(), problem.y0
    # Of Adams methods, subclasses, the tableau only makes the first steps.
    compiled = type(solver) is ExplicitGridSolver and has_kernels(y.dtype, y.device)
    rows = Rows(solver.tableau, y) if compiled else None
    before = _sign(problem, start, y, dtype)
    for _ in range(_MAX_FIXED_STEPS):
        end = round_(start + round_(size))
        ends = Ends(start, end, size, (s, s + step_size) if graph else None)
        if solver.tape is not None:
            solver.tape.append((y, ends))
        if rows is None or ends.graph is not None or not _plain(y, problem.y0, grad):
            y1, f0 = solver._step(y, ends, [])
        else:
            y1, f0 = _compiled_step(solver, rows, y, ends)
        problem.stats.accept(size)
        if _sign(problem, end, y1, dtype) != before:
            break
        start, y = end, y1
        if graph:
            s = ends.graph[1]
    else:
        raise RuntimeError(f"Reached maximum number of iterations {_MAX_FIXED_STEPS}.")
    interpolate = _within_fixed_step(solver, y, y1, f0, ends)

    def time(found: float) -> Tensor:
        return torch.full((), found, dtype=dtype, device=y.device)

    def sign_within(found: float) -> int:
        return _sign(problem, found, interpolate(time(found)), dtype)

    event = time(_bisect(sign_within, before, start, end, float(solver.atol), dtype))
    return event, torch.stack([problem.y0, interpolate(event)])


def _plain(x: Tensor, y0: Tensor, grad: bool) -> bool:
    """Whether the kernels take x for a state like y0, without promotion or a graph."""
    return x.dtype == y0.dtype and x.device == y0.device and not (grad and x.requires_grad)


def _compiled_step(
    solver: ExplicitGridSolver, rows: Rows, y0: Tensor, ends: Ends
) -> tuple[Tensor, Tensor]:
    """A step as `solver._step` takes it, which gets what the field has returned so far as soon as
    the kernels cannot read that.
    """
    problem, grad = solver.problem, torch.is_grad_enabled()
    h = problem.sign * ends.size
    y, fresh = y0, []
    for stage in range(solver.tableau.stages):
        if stage > 0:
            y = rows.stage(y0, stage, fresh, h)
        fresh = problem_call(problem, solver._stage_time(y, stage, ends), y)
        alike = problem.shapes is not None or fresh[0].shape == y0.shape
        if not (alike and all(_plain(part, y0, grad) for part in fresh)):
            done = [[rows.row(each).clone().view_as(y0)] for each in range(stage)]
            return solver._step(y0, ends, [*done, fresh])
    return rows.solve(y0, fresh, h), rows.row(0).view_as(y0)


def _within_fixed_step(
    solver: FixedGridSolver, y0: Tensor, y1: Tensor, f0: Tensor, ends: Ends
) -> Callable[[Tensor], Tensor]:
    """The state at a time within a step; a cubic's slope at the end is evaluated once."""
    if solver.interp != "cubic":
        return lambda at: solver._interpolate(y0, y1, f0, ends, at)
    problem = solver.problem
    start, end = ends.graph or (problem.s.detach().new_tensor(value) for value in ends[:2])
    t1 = (problem.sign * end).to(rounding.real_dtype(y1.dtype))
    f1 = problem.joined(problem_call(problem, t1, y1))
    h = problem.sign * (end - start)
    return lambda at: cubic_hermite(y0, y1, f0, f1, h, (at - start) / (end - start))


@torch.no_grad()
def _bisect(
    sign: Callable[[float], int],
    before: int,
    start: float,
    end: float,
    tolerance: Any,
    dtype: torch.dtype,
) -> float:
    """Where the sign stops to be that of `before`: the middle of the last of log2(length /
    tolerance) halves of [start, end].
    """
    round_ = rounding.rounding(dtype)
    length = torch.tensor(round_(end - start), dtype=dtype)
    if not isinstance(tolerance, float):
        tolerance = torch.as_tensor(tolerance, dtype=dtype).cpu()
    count = torch.ceil(torch.log(length / tolerance) / math.log(2.0))
    halvings: Iterable[int] = range(count.long())
    exact = count.item() == math.inf
    if exact:
        # atol = 0, for which torchdiffeq does not bisect at all: to the last bit.
        halvings = itertools.count()
    for _ in halvings:
        middle = round_(round_(end + start) / 2)
        if exact and not start < middle < end:
            break
        if sign(middle) == before:
            start = middle
        else:
            end = middle
    return round_(round_(start + end) / 2)
