"""The discrete gradient: back through the accepted steps of a solve, one graph of one step at a
time.

Differentiated in turn, it is the gradient of the same steps taken again one after the other, each
of which keeps no more than its start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pycnf.odeint.adaptive import Accepted, AdaptiveSolver
from pycnf.odeint.autocast import autocast_of_now
from pycnf.odeint.fixed_grid import Ends, FixedGridSolver
from pycnf.odeint.problem import Problem
from pycnf.odeint.recomputed import Recomputed
from pycnf.odeint.solve import make_solver
from pycnf.odeint.until_event import solve_until_event


class _Discrete(torch.autograd.Function):
    """A solve whose gradient walks back through its accepted steps.

    problem.y0 is y0, and nobody else's: it is part of the tape.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, y0: Tensor, s: Tensor, *params: Tensor):
        solver = make_solver(problem, [])
        ctx.solver, ctx.with_times = solver, s.requires_grad
        ctx.stats = problem.stats
        ctx.autocast = autocast_of_now(y0.device)
        fixed = isinstance(solver, FixedGridSolver)
        event, ctx.event, times = None, None, s
        ctx.make_grid = solver.grid if fixed else None
        if problem.event_fn is not None:
            ctx.event, solution = solve_until_event(solver)
            event = ctx.event.to(s)
            times = _times_to_event(s, ctx.event)
            if fixed:
                ctx.make_grid = partial(_grid_to_event, [ends for _, ends in solver.tape])
        ctx.grid = None
        if fixed:
            # The grid's dependence on the output times is a graph of times only, and kept.
            leaf = _leaf(times)
            with torch.enable_grad():
                ctx.grid = (leaf, ctx.make_grid(leaf if s.requires_grad else times.detach()))
        if event is None:
            solution = solver.integrate(ctx.grid[1].detach()) if fixed else solver.integrate()
        ctx.save_for_backward(y0, s, *params)
        return solution if event is None else (event, solution)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor):
        # That of an event's time goes nowhere.
        grad = grads_out[-1]
        y0, s, *params = ctx.saved_tensors
        times = s if ctx.event is None else _times_to_event(s, ctx.event)
        grids = (ctx.grid, ctx.make_grid)
        problem = ctx.solver.problem
        problem.stats = ctx.stats.for_backward()
        gradient = partial(_gradient, ctx.solver, grids, params, ctx.with_times)
        with ctx.autocast():
            if torch.is_grad_enabled():
                to_y0, to_s, *rest = Recomputed.apply(gradient, 3, y0, times, grad, *params)
            else:
                to_y0, to_s, *rest = gradient(y0, times, grad)
        if ctx.event is not None:
            to_s = torch.stack([to_s[0], torch.zeros_like(to_s[0])]).to(s)
        return None, to_y0, to_s if ctx.with_times else None, *rest


def _times_to_event(s: Tensor, event: Tensor) -> Tensor:
    """The output times [2] of a solve that ended at an event, in the dtype of its steps."""
    return torch.stack([s[0].to(event), event])


def _grid_to_event(steps: Sequence[Ends], times: Tensor) -> Tensor:
    """The grid that led to an event, which moves with the start."""
    points = times.new_tensor([steps[0].start, *(ends.end for ends in steps)])
    return points + (times[0] - times[0].detach()) if times.requires_grad else points


def _gradient(
    solver: AdaptiveSolver | FixedGridSolver,
    grids: tuple[tuple[Tensor, Tensor] | None, Callable[[Tensor], Tensor] | None],
    params: Sequence[Tensor],
    with_times: bool,
    y0: Tensor,
    s: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """Gradients to y0, to the times (zeros if not wanted) and to the parameters; with gradients on,
    with their graph from y0, s and grad.

    grids: of a method on a grid, a copy of the times with the grid, and what made it of them.
    """
    fixed = isinstance(solver, FixedGridSolver)
    grid, make_grid = grids
    if torch.is_grad_enabled():
        times = s if with_times else s.detach()
        if fixed:
            solution = _replay_fixed(solver, params, y0, times, make_grid)
        else:
            solution = _replay_adaptive(solver, params, y0, times)
        return list(
            torch.autograd.grad(
                solution, (y0, s, *params), grad, create_graph=True, materialize_grads=True
            )
        )
    grads = _Gradients(params)
    if fixed:
        to_y0, to_s = _walk_fixed(solver, s, grad, grads, grid, with_times)
    else:
        to_y0, to_s = _walk_adaptive(solver, s, grad, grads, with_times)
    return [to_y0, torch.zeros_like(s) if to_s is None else to_s, *grads.params]


class _Gradients:
    """Sums of gradients, of the parameters and of whatever a step adds."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.wanted = tuple(params)
        self.params = [torch.zeros_like(p) for p in params]

    def pull_back(
        self, pairs: Sequence[tuple[Tensor | None, Tensor | None]], inputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients to the inputs of (output, cotangent) pairs; those to the parameters are added
        up.
        """
        pairs = [(o, g) for o, g in pairs if o is not None and g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        outputs, cotangents = zip(*pairs)
        grads = torch.autograd.grad(outputs, (*inputs, *self.wanted), cotangents, allow_unused=True)
        for total, grad in zip(self.params, grads[len(inputs) :]):
            if grad is not None:
                total += grad
        return list(grads[: len(inputs)])


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(True)


def _anchored(x: Tensor, value: Tensor) -> Tensor:
    """x with its graph and the value that the forward solve had, after callbacks' edits."""
    return x + (value.view_as(x) - x).detach()


# ---- adaptive methods ----------------------------------------------------------------------------


def _take_step(
    solver: AdaptiveSolver,
    accepted: Accepted,
    shown: Tensor,
    y0: Tensor,
    f0: Tensor | None,
    s0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The end of a step (state, last derivative, time if it follows s0), and the states at the
    output times `shown` within it.
    """
    step = solver.replay(accepted, y0, f0, s0)
    states = solver.interpolate_with_graph(step, shown) if len(shown) else None
    return step.y1, step.k[-1], step.times.end_graph, states


def _pull_back_step(
    solver: AdaptiveSolver,
    accepted: Accepted,
    shown: Tensor,
    shown_grads: Tensor,
    end_grads: Sequence[Tensor | None],
    grads: _Gradients,
) -> list[Tensor | None]:
    """Gradients to a step's start (state, kept derivative, time) and output times from those of its
    end.

    A function of its own, so that the graph of one step is gone before the next is made.
    """
    y0 = _leaf(accepted.y)
    f0 = None if accepted.f is None else _leaf(accepted.f.view_as(y0))
    s0 = _leaf(shown.new_tensor(accepted.s0)) if shown.requires_grad else None
    with torch.enable_grad():
        results = _take_step(solver, accepted, shown, y0, f0, s0)
        pairs = list(zip(results, (*end_grads, shown_grads)))
    inputs = [y0, f0, s0, shown if shown.requires_grad else None]
    found = iter(grads.pull_back(pairs, [x for x in inputs if x is not None]))
    return [None if x is None else next(found) for x in inputs]


def _walk_adaptive(
    solver: AdaptiveSolver, s: Tensor, grad: Tensor, grads: _Gradients, with_times: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients to y0 and, if wanted, to the times [T]."""
    times = s.detach().to(solver.dtype)
    y_grad, f_grad, s_grad = None, None, None
    time_grads = torch.zeros_like(times) if with_times else None
    covered = set()
    for accepted in reversed(solver.tape):
        covered.update(accepted.outputs)
        outputs = slice(accepted.outputs.start, accepted.outputs.stop)
        shown = times[outputs]
        if with_times:
            shown.requires_grad_(True)
        y_grad, f_grad, s_grad, shown_grad = _pull_back_step(
            solver, accepted, shown, grad[outputs], (y_grad, f_grad, s_grad), grads
        )
        if shown_grad is not None:
            time_grads[outputs] += shown_grad
    # Output times that no step covers show y0 itself; the first one always does.
    for i in sorted(set(range(len(s))) - covered):
        y_grad = _add(y_grad, grad[i])
    if with_times and s_grad is not None:
        time_grads[0] += s_grad
    return y_grad, None if time_grads is None else time_grads.to(s.dtype)


def _take_step_again(
    solver: AdaptiveSolver, accepted: Accepted, shown: Tensor, follows: bool, *inputs: Tensor
) -> list[Tensor]:
    """What there is of `_take_step`'s results, the last derivative if the next step `follows` from
    it.

    inputs: the state at the start, the derivative there if the tape has it, and if times have
    gradients the start and the output times.
    """
    y0, *rest = inputs
    f0 = rest.pop(0) if accepted.f is not None else None
    s0, shown = rest or (None, shown)
    y1, f1, end, states = _take_step(solver, accepted, shown, y0, f0, s0)
    # A field may return its input, which must not come twice.
    results = [y1, f1.clone() if follows else None, end, states]
    return [x for x in results if x is not None]


def _replay_adaptive(
    solver: AdaptiveSolver, params: Sequence[Tensor], y0: Tensor, s: Tensor
) -> Tensor:
    """The solution [T, ...] by the tape's steps, with its graph from y0, from s if that requires
    grad, and from the parameters.
    """
    times = s.to(solver.dtype)
    solution = [y0] * len(s)
    y, f, start = y0, None, times[0]
    for i, accepted in enumerate(solver.tape):
        outputs = slice(accepted.outputs.start, accepted.outputs.stop)
        inputs = [_anchored(y, accepted.y)]
        if accepted.f is not None:
            inputs.append(_anchored(f, accepted.f))
        if s.requires_grad:
            inputs += [start, times[outputs]]
        follows = i + 1 < len(solver.tape) and solver.tape[i + 1].f is not None
        step = partial(_take_step_again, solver, accepted, times[outputs].detach(), follows)
        y, *rest = Recomputed.apply(step, len(inputs), *inputs, *params)
        f = rest.pop(0) if follows else None
        # A step that was clipped ends at a constant.
        moves = s.requires_grad and not accepted.clipped
        start = rest.pop(0) if moves else times.new_tensor(accepted.s1)
        for at, state in zip(accepted.outputs, rest.pop(0) if rest else ()):
            solution[at] = state
    return torch.stack(solution)


# ---- fixed grids ---------------------------------------------------------------------------------


def _shown_by_steps(grid: list[float], outputs: list[float]) -> list[range]:
    """The output times that each step shows, those up to its end that no step before has shown;
    the first output is y0.
    """
    shown = []
    begin = 1
    for end in grid[1:]:
        first = begin
        while begin < len(outputs) and end >= outputs[begin]:
            begin += 1
        shown.append(range(first, begin))
    return shown


def _pull_back_fixed_step(
    solver: FixedGridSolver,
    index: int,
    points: Tensor,
    shown: Tensor,
    shown_grads: Tensor,
    end_grad: Tensor | None,
    grads: _Gradients,
) -> list[Tensor | None]:
    """Gradients to the state at the start of a step and, if wanted, to its ends and its output
    times.
    """
    start, ends = solver.tape[index]
    y0 = _leaf(start)
    inputs = [y0]
    if shown.requires_grad:
        ends = ends._replace(graph=(_leaf(points[index]), _leaf(points[index + 1])))
        inputs += [*ends.graph, shown]
    with torch.enable_grad():
        y1, states = solver.replay(y0, ends, shown)
    return grads.pull_back([(y1, end_grad), *zip(states, shown_grads)], inputs)


def _walk_fixed(
    solver: FixedGridSolver,
    s: Tensor,
    grad: Tensor,
    grads: _Gradients,
    grid: tuple[Tensor, Tensor],
    with_times: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients to y0 and, if wanted, to the times [T]; grid: a copy of the times, and the grid as
    a function of it.
    """
    leaf, points = grid
    shown_by_steps = _shown_by_steps(points.tolist(), s.tolist())
    y_grad = None
    time_grads = torch.zeros_like(s)
    grid_grads = torch.zeros_like(points)
    for i in range(len(shown_by_steps) - 1, -1, -1):
        outputs = slice(shown_by_steps[i].start, shown_by_steps[i].stop)
        shown = s.detach()[outputs]
        if with_times:
            shown.requires_grad_(True)
        y_grad, *rest = _pull_back_fixed_step(
            solver, i, points, shown, grad[outputs], y_grad, grads
        )
        for total, part, found in zip(
            (grid_grads, grid_grads, time_grads), (i, i + 1, outputs), rest
        ):
            if found is not None:
                total[part] += found
    y_grad = _add(y_grad, grad[0])
    if not with_times:
        return y_grad, None
    if points.requires_grad:
        (through_grid,) = torch.autograd.grad(points, leaf, grid_grads, retain_graph=True)
        time_grads = time_grads + through_grid
    return y_grad, time_grads


def _take_fixed_step_again(
    solver: FixedGridSolver, ends: Ends, shown: Tensor, y0: Tensor, *times: Tensor
) -> list[Tensor]:
    """The end of a step and the states at output times within it, if any; times: its ends and these
    output times, if they have gradients.
    """
    if times:
        ends, shown = ends._replace(graph=times[:2]), times[2]
    y1, states = solver.replay(y0, ends, shown)
    return [y1, torch.stack(states)] if states else [y1]


def _replay_fixed(
    solver: FixedGridSolver,
    params: Sequence[Tensor],
    y0: Tensor,
    s: Tensor,
    make_grid: Callable[[Tensor], Tensor],
) -> Tensor:
    """As `_replay_adaptive`, the grid with its graph from the times alone."""
    if s.requires_grad:
        (points,) = Recomputed.apply(lambda s: (make_grid(s).clone(),), 1, s)
    else:
        points = make_grid(s).detach()
    shown_by_steps = _shown_by_steps(points.tolist(), s.tolist())
    solution = [y0]
    y = y0
    for i, (start, ends) in enumerate(solver.tape):
        outputs = slice(shown_by_steps[i].start, shown_by_steps[i].stop)
        inputs = [_anchored(y, start)]
        if s.requires_grad:
            inputs += [points[i], points[i + 1], s[outputs]]
        step = partial(_take_fixed_step_again, solver, ends, s[outputs].detach())
        y, *states = Recomputed.apply(step, len(inputs), *inputs, *params)
        solution += [state for stacked in states for state in stacked]
    return torch.stack(solution)
