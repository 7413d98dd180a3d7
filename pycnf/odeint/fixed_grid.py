"""Explicit methods on a given grid, with torchdiffeq's grids, perturbed times and interpolation.

Steps run compiled for as long as state, slopes and times agree in dtype and shape and carry no
graph; what torchdiffeq leaves to type promotion (a 0-dim state that drifts to the dtype of t,
slopes in another dtype, slopes that broadcast) is left to it here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycnf._ops import has_kernels, time_tensors
from pycnf.odeint import rounding
from pycnf.odeint.norms import flat_to_shapes
from pycnf.odeint.problem import Problem, warn_unused
from pycnf.odeint.stepper import Rows, combine
from pycnf.odeint.tableau import Tableau

# Steps whose times are made by one op.
_STEPS_AT_ONCE = 64


class Ends(NamedTuple):
    """Start, end and size of a step in ascending time; `graph`: both ends as 0-dim tensors if they
    carry a graph.
    """

    start: float
    end: float
    size: float
    graph: tuple[Tensor, Tensor] | None

    @property
    def size_graph(self) -> Tensor | None:
        return None if self.graph is None else self.graph[1] - self.graph[0]


class FixedGridSolver:
    """One solve; see the module.

    Args:
        tape: receives the state at the start of every step, with the step.
        unused: options that the method does not have.
    """

    one_step = True  # a step needs its start only, so it can be taken again on its own

    def __init__(
        self,
        problem: Problem,
        tableau: Tableau,
        name: str,
        tape: list[tuple[Tensor, Ends]] | None = None,
        *,
        step_size: Any = None,
        grid_constructor: Callable | None = None,
        interp: str = "linear",
        perturb: bool = False,
        **unused: Any,
    ) -> None:
        warn_unused(name, unused)
        if step_size is not None and grid_constructor is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
        self.problem, self.tableau, self.tape = problem, tableau, tape
        self.step_size, self.grid_constructor = step_size, grid_constructor
        self.interp, self.perturb = interp, perturb
        self.round = rounding.rounding(problem.s.dtype)
        self.rows: Rows | None = None

    def grid(self, s: Tensor) -> Tensor:
        """The times between which steps are taken, ascending, with their graph."""
        problem = self.problem
        if self.step_size is not None:
            count = torch.ceil((s[-1] - s[0]) / self.step_size + 1).item()
            grid = torch.arange(0, count, dtype=s.dtype, device=s.device) * self.step_size + s[0]
            return torch.cat([grid[:-1], s[-1:]])
        if self.grid_constructor is None:
            return s
        if problem.sign < 0:
            return -self.grid_constructor(self._field, problem.y0, -s)
        return self.grid_constructor(self._field, problem.y0, s)

    def _field(self, s: Tensor, y: Tensor) -> Tensor:
        """The field in ascending time, for grid constructors that want to look at it."""
        problem = self.problem
        if problem.shapes is None:
            return problem.sign * problem.func(problem.sign * s, y)
        parts = problem.func(problem.sign * s, flat_to_shapes(y, problem.shapes))
        return problem.sign * torch.cat([part.reshape(-1) for part in parts])

    def integrate(self, grid: Tensor | None = None) -> Tensor:
        """States at the output times, [T, *y0.shape]."""
        problem = self.problem
        s, y0 = problem.s, problem.y0
        grid = self.grid(s) if grid is None else grid
        assert grid[0] == s[0] and grid[-1] == s[-1]
        values, outputs = grid.tolist(), s.tolist()
        times_graph = graph = torch.is_grad_enabled() and (grid.requires_grad or s.requires_grad)
        graph = graph or (y0.requires_grad and torch.is_grad_enabled())
        solution = torch.empty((len(outputs), *y0.shape), dtype=y0.dtype, device=y0.device)
        solution[0] = y0.detach()
        # What was given out is copied at once: callbacks and the field may edit a state later.
        pieces: list[Tensor] = [y0.clone() if graph else solution[0]]
        y = y0
        for i, times in enumerate(self._all_times(grid.detach())):
            ends = Ends(
                values[i],
                values[i + 1],
                self.round(values[i + 1] - values[i]),
                (grid[i], grid[i + 1]) if times_graph else None,
            )
            if problem.callbacks:
                wished = ends.size
                start, size = problem.notify("callback_step", ends.start, y, wished, s.dtype)
                if (start, size) != (ends.start, wished):
                    ends, times = Ends(start, ends.end, size, None), None
            if self.tape is not None:
                self.tape.append((y, ends))
            y1, f0 = self._step(y, ends, times)
            while len(pieces) < len(outputs) and ends.end >= outputs[len(pieces)]:
                at = len(pieces)
                piece = self._interpolate(y, y1, f0, ends, s[at])
                if piece.requires_grad and torch.is_grad_enabled():
                    graph = True
                    pieces.append(piece.to(y0.dtype).clone())
                else:
                    solution[at] = piece
                    pieces.append(solution[at])
            y = y1
        return torch.stack(pieces) if graph else solution

    def _all_times(self, grid: Tensor) -> Iterator[list[Tensor]]:
        """What `_stage_time` gives, for every stage of one step after the other, made for many
        steps at once.
        """
        dtype = rounding.real_dtype(self.problem.y0.dtype)
        start, end = grid[:-1], grid[1:]
        columns = []
        for stage, c in enumerate(self.tableau.c):
            s = (end if self._ends_on_grid(c) else start + c * (end - start)).to(dtype)
            if self.perturb and stage == 0:
                s = torch.nextafter(s, s + 1)
            elif self.perturb and c == 1.0:
                s = torch.nextafter(s, s - 1)
            columns.append(s)
        rows = (self.problem.sign * torch.stack(columns, 1)).tolist()
        stages = self.tableau.stages
        for begin in range(0, len(rows), _STEPS_AT_ONCE):
            some = rows[begin : begin + _STEPS_AT_ONCE]
            flat = time_tensors([t for row in some for t in row], dtype, self.problem.y0.device)
            for i in range(len(some)):
                yield flat[i * stages : (i + 1) * stages]

    def _ends_on_grid(self, c: float) -> bool:
        """Whether a stage is taken at the grid point itself: rk4's last one is, heun2's is at start
        + size.
        """
        return c == 1.0 and self.tableau.name == "rk4"

    def replay(
        self,
        y0: Tensor,
        ends: Ends,
        outputs: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """A step again with its graph: its end, and the states at output times [n] within it."""
        y1, f0 = self._step(y0, ends, None)
        shown = [self._interpolate(y0, y1, f0, ends, at) for at in outputs.unbind()]
        return y1, [state.to(self.problem.y0.dtype) for state in shown]

    # ---- one step --------------------------------------------------------------------------------

    def _step(
        self,
        y0: Tensor,
        ends: Ends,
        times: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The state after a step, and the slope at its start if it is needed for interpolation.

        Args:
            times: of the stages, as `_stage_time` gives them; None for a step that has a graph or
                a size of its own.
        """
        problem, tableau = self.problem, self.tableau
        compiled = times is not None and ends.graph is None and self._suits_kernels(y0)
        first = times[0] if compiled else self._stage_time(y0, 0, ends)
        fresh = problem_call(problem, first, y0)
        if not (compiled and self._agrees(fresh, y0)):
            return self._differentiable_step(y0, fresh, ends)
        if self.rows is None:
            self.rows = Rows(tableau, y0)
        rows = self.rows
        h = problem.sign * ends.size
        f0 = problem.as_state(fresh, y0).clone() if self.interp == "cubic" else None
        for stage in range(1, tableau.stages):
            y = rows.stage(y0, stage, fresh, h)
            fresh = problem_call(problem, times[stage], y)
            if not self._agrees(fresh, y0):
                done = [[rows.row(j).clone().view_as(y0)] for j in range(stage)]
                return self._differentiable_step(y0, fresh, ends, done)
        return rows.solve(y0, fresh, h), f0

    def _suits_kernels(self, y0: Tensor) -> bool:
        if y0.dtype != self.problem.y0.dtype or not has_kernels(y0.dtype, y0.device):
            return False
        if y0.requires_grad and torch.is_grad_enabled():
            return False
        return y0.dim() > 0 or self.problem.s.dtype == y0.dtype

    def _agrees(self, fresh: list[Tensor], y0: Tensor) -> bool:
        """Whether what the field returned goes into the compiled step without promotion, broadcast
        or graph.
        """
        if self.problem.shapes is None and fresh[0].shape != y0.shape:
            return False
        grad = torch.is_grad_enabled()
        for part in fresh:
            if part.dtype != y0.dtype or (grad and part.requires_grad):
                return False
        return True

    def _differentiable_step(
        self,
        y0: Tensor,
        fresh: list[Tensor],
        ends: Ends,
        done: list[list[Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The rest of a step from its newest slope on, with whatever graph and dtypes come up."""
        problem, tableau = self.problem, self.tableau
        slopes = [*(done or []), fresh]
        k = [problem.joined(slope) for slope in slopes]
        for stage in range(len(k), tableau.stages):
            y = self._weighted(y0, k, tableau.a[stage], ends)
            at = self._stage_time(y, stage, ends)
            k.append(problem.joined(problem_call(problem, at, y)))
        return self._weighted(y0, k, tableau.b, ends), k[0]

    def _weighted(
        self,
        y0: Tensor,
        k: list[Tensor],
        weights: list[float],
        ends: Ends,
    ) -> Tensor:
        """y0 + h Σ wⱼ kⱼ, by the op where dtypes and shapes agree, by promotion where not."""
        sign, dtype = self.problem.sign, self.problem.s.dtype
        h = sign * ends.size
        h_graph = None if ends.graph is None else sign * ends.size_graph
        plain = y0.dim() == 0 and dtype != y0.dtype
        if not plain and all(row.dtype == y0.dtype and row.shape == y0.shape for row in k):
            real = rounding.real_dtype(y0.dtype)
            return combine(y0, k, weights, h, None if h_graph is None else h_graph.to(real))
        step = torch.tensor(h, dtype=dtype, device=y0.device) if h_graph is None else h_graph
        total = sum(weight * row for weight, row in zip(weights, k) if weight != 0)
        return y0 + step * total

    def _stage_time(
        self,
        y: Tensor,
        stage: int,
        ends: Ends,
    ) -> Tensor:
        """The time that the field is given at a stage: 0-dim, in y's real dtype."""
        problem, c = self.problem, self.tableau.c[stage]
        dtype = rounding.real_dtype(y.dtype)
        round_ = self.round
        on_grid = self._ends_on_grid(c)
        s = ends.end if on_grid else round_(ends.start + round_(c * ends.size))
        s = rounding.rounding(dtype)(s)
        if self.perturb and stage == 0:
            s = rounding.after(s, dtype)
        elif self.perturb and c == 1.0:
            s = rounding.before(s, dtype)
        value = torch.full((), problem.sign * s, dtype=dtype, device=y.device)
        if ends.graph is None:
            return value
        graph = problem.sign * (ends.graph[0] + c * ends.size_graph).to(dtype)
        return graph + (value - graph).detach()

    # ---- between grid points ---------------------------------------------------------------------

    def _interpolate(
        self,
        y0: Tensor,
        y1: Tensor,
        f0: Tensor | None,
        ends: Ends,
        at: Tensor,
    ) -> Tensor:
        """The state at an output time within the step from y0 to y1."""
        start, end = ends.graph or (torch.full_like(at, value) for value in ends[:2])
        if self.interp == "linear":
            if at.item() == ends.start:
                return y0
            if at.item() == ends.end:
                return y1
            return y0 + (at - start) / (end - start) * (y1 - y0)
        if self.interp != "cubic":
            raise ValueError(f"Unknown interpolation method {self.interp}")
        problem = self.problem
        dtype = rounding.real_dtype(y1.dtype)
        f1 = problem.joined(problem_call(problem, (problem.sign * end).to(dtype), y1))
        return cubic_hermite(
            y0, y1, f0, f1, problem.sign * (end - start), (at - start) / (end - start)
        )


def cubic_hermite(y0: Tensor, y1: Tensor, f0: Tensor, f1: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """The cubic through both ends and both slopes of a step of size h, at x in [0, 1]."""
    start, start_slope = (1 + 2 * x) * (1 - x) * (1 - x), x * (1 - x) * (1 - x)
    end, end_slope = x * x * (3 - 2 * x), x * x * (x - 1)
    return start * y0 + start_slope * h * f0 + end * y1 + end_slope * h * f1


def problem_call(problem: Problem, t: Tensor, y: Tensor) -> list[Tensor]:
    """The field as it came; unlike in adaptive methods it may broadcast against the state."""
    if problem.shapes is None:
        return [problem.func(t, y)]
    return problem.call(t, y)
