"""The discrete gradient: back through the accepted steps of a solve, one graph of one step at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf.odeint.adaptive import Accepted, AdaptiveSolver
from pycnf.odeint.adjoint import _TWICE
from pycnf.odeint.fixed_grid import FixedGridSolver
from pycnf.odeint.problem import Problem
from pycnf.odeint.solve import make_solver
from pycnf.once import raise_if_differentiated


class _Discrete(torch.autograd.Function):
    """A solve whose gradient walks back through its accepted steps, one graph of one step at a
    time.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, y0: Tensor, s: Tensor, *params: Tensor):
        solver = make_solver(problem, [])
        ctx.solver, ctx.with_times = solver, s.requires_grad
        if isinstance(solver, FixedGridSolver):
            # The grid's dependence on the output times is a graph of times only, and kept.
            leaf = _leaf(s)
            with torch.enable_grad():
                ctx.grid = (leaf, solver.grid(leaf if s.requires_grad else s.detach()))
            solution = solver.integrate(ctx.grid[1].detach())
        else:
            solution = solver.integrate()
        # The caller may edit y0, or what it is given as the first solution, before backward.
        solver.keep_start()
        ctx.y0 = y0
        ctx.save_for_backward(s, *params)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        s, *params = ctx.saved_tensors
        grads = _Gradients(params)
        with torch.no_grad():
            if isinstance(ctx.solver, FixedGridSolver):
                found = _walk_fixed(ctx.solver, s, grad, grads, ctx.grid, ctx.with_times)
            else:
                found = _walk_adaptive(ctx.solver, s, grad, grads, ctx.with_times)
        given = (grad, ctx.y0, *ctx.saved_tensors)
        return None, *raise_if_differentiated([*found, *grads.params], given, _TWICE)


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
        step = solver.replay(accepted, y0, f0, s0)
        pairs = list(zip((step.y1, step.k[-1], step.times.end_graph), end_grads))
        if len(shown):
            pairs.append((solver.interpolate_with_graph(step, shown), shown_grads))
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
    values, outputs = points.tolist(), s.tolist()
    y_grad = None
    time_grads = torch.zeros_like(s)
    grid_grads = torch.zeros_like(points)
    last = len(outputs)
    for i in range(len(values) - 2, -1, -1):
        first = last
        # As forward: a step shows the output times up to its end that no step before it has shown.
        while first > 1 and (i == 0 or outputs[first - 1] > values[i]):
            first -= 1
        shown = s[first:last]
        if with_times:
            shown.requires_grad_(True)
        y_grad, *rest = _pull_back_fixed_step(
            solver, i, points, shown, grad[first:last], y_grad, grads
        )
        for total, part, found in zip(
            (grid_grads, grid_grads, time_grads), (i, i + 1, slice(first, last)), rest
        ):
            if found is not None:
                total[part] += found
        last = first
    y_grad = _add(y_grad, grad[0])
    if not with_times:
        return y_grad, None
    if points.requires_grad:
        (through_grid,) = torch.autograd.grad(points, leaf, grid_grads)
        time_grads = time_grads + through_grid
    return y_grad, time_grads
