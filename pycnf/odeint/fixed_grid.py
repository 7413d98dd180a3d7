"""Methods on a given grid, with torchdiffeq's grids and interpolation: what they have in common.

A method is a subclass with a step. What torchdiffeq leaves to type promotion (a 0-dim state that
drifts to the dtype of t, slopes in another dtype, slopes that broadcast) is left to it here too.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycnf._ops import time_tensors
from pycnf.odeint import rounding
from pycnf.odeint.arguments import check_step_size, choice, warn_unused
from pycnf.odeint.grid_replay import replayed_grid
from pycnf.odeint.problem import Problem
from pycnf.odeint.tableau import Tableau


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


class Begun(NamedTuple):
    """How far a solve has come: steps taken, state there, output times shown, and the slopes that
    the step in hand has so far.
    """

    steps: int
    y: Tensor
    shown: int
    slopes: list[list[Tensor]]


class FixedGridSolver(abc.ABC):
    """One solve; see the module.

    Attributes:
        one_loop: whether nothing that a step does depends on the state's values.

    Args:
        tape: receives the state at the start of every step, with the step.
        cuda_graph: replays the recorded solve, see `grid_replay`, where that can be done.
        unused: options that the method does not have.
    """

    one_loop = False

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
        cuda_graph: bool | None = None,
        **unused: Any,
    ) -> None:
        warn_unused(name, unused)
        if step_size is not None and grid_constructor is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
        self.problem, self.tableau, self.tape = problem, tableau, tape
        self.atol = problem.atol  # of an event's time
        self.step_size, self.grid_constructor = step_size, grid_constructor
        self.interp, self.perturb = interp, bool(perturb)
        self.cuda_graph = choice("cuda_graph", cuda_graph)
        self.round = rounding.rounding(problem.s.dtype)

    def grid(self, s: Tensor) -> Tensor:
        """The times between which steps are taken, ascending, with their graph."""
        problem = self.problem
        if self.step_size is not None:
            if len(s) > 1:
                check_step_size(self.step_size)
            first, last = s[0], s[-1]
            count = torch.ceil((last - first) / self.step_size + 1).item()
            grid = torch.arange(0, count, dtype=s.dtype, device=s.device) * self.step_size + first
            return torch.cat([grid[:-1], s[-1:]])
        if self.grid_constructor is None:
            return s
        grid = self.grid_constructor(self._field, problem.y0, problem.sign * s)
        if len(s) == 1 and isinstance(grid, list | tuple):
            grid = torch.as_tensor(grid)  # as torchdiffeq, which takes no step from it
        if not isinstance(grid, Tensor) or grid.dim() != 1:
            got = tuple(grid.shape) if isinstance(grid, Tensor) else type(grid).__name__
            raise TypeError(f"grid_constructor must return a tensor of times [T], got {got}")
        return problem.sign * grid

    def _field(self, s: Tensor, y: Tensor) -> Tensor:
        """The field in ascending time, for grid constructors that want to look at it."""
        problem = self.problem
        t = (problem.sign * s).to(rounding.real_dtype(y.dtype))
        return problem.sign * problem.joined(problem_call(problem, t, y))

    def integrate(self, grid: Tensor | None = None) -> Tensor:
        """States at the output times, [T, *y0.shape]."""
        problem = self.problem
        s, y0 = problem.s, problem.y0
        if grid is None:
            # Reading a GPU would wait for it.
            known = not s.requires_grad and self.grid_constructor is None
            on_host = s.device.type == "cpu" or not known
            grid = self.grid(s if on_host else torch.tensor(problem.times, dtype=s.dtype))
        values, outputs = grid.tolist(), problem.times
        assert values[0] == outputs[0] and values[-1] == outputs[-1], (
            "the grid must begin and end as t does"
        )
        if self.cuda_graph:
            self.cuda_graph = False
            if (solution := replayed_grid(self, values)) is not None:
                return solution
        grad = torch.is_grad_enabled()
        times_graph = grad and (grid.requires_grad or s.requires_grad)
        graph = times_graph or (grad and y0.requires_grad)
        solution = torch.empty((len(outputs), *y0.shape), dtype=y0.dtype, device=y0.device)
        solution[0] = y0.detach()
        begun = Begun(0, y0, 1, [])
        if not (graph or problem.callbacks):
            begun = self._plain_steps(grid, values, outputs, solution)
        y, shown = begun.y, begun.shown
        # With a graph, what is shown is copied at once: callbacks and the field may edit it later.
        pieces = [y0.clone()] if graph else []
        for i in range(begun.steps, len(values) - 1):
            size = self.round(values[i + 1] - values[i])
            ends = Ends(
                values[i], values[i + 1], size, (grid[i], grid[i + 1]) if times_graph else None
            )
            if problem.callbacks:
                start, wished = problem.notify("callback_step", ends.start, y, size, s.dtype)
                if (start, wished) != (ends.start, size):
                    ends = Ends(start, ends.end, wished, None)
            if self.tape is not None:
                self.tape.append((y, ends))
            y1, f0 = self._step(y, ends, begun.slopes if i == begun.steps else [])
            problem.stats.accept(ends.size)
            while shown < len(outputs) and ends.end >= outputs[shown]:
                piece = self._interpolate(y, y1, f0, ends, s[shown])
                if not graph and grad and piece.requires_grad:
                    graph, pieces = True, list(solution[:shown])
                if graph:
                    pieces.append(piece.to(y0.dtype).clone())
                else:
                    solution[shown] = piece
                shown += 1
            y = y1
        return torch.stack(pieces) if graph else solution

    def replay(
        self,
        y0: Tensor,
        ends: Ends,
        outputs: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """A step again with its graph: its end, and the states at output times [n] within it."""
        y1, f0 = self._step(y0, ends, [])
        shown = [self._interpolate(y0, y1, f0, ends, at) for at in outputs.unbind()]
        return y1, [state.to(self.problem.y0.dtype) for state in shown]

    # ---- one step --------------------------------------------------------------------------------

    def _plain_steps(
        self, grid: Tensor, values: list[float], outputs: list[float], solution: Tensor
    ) -> Begun:
        """Takes as many steps as compiled code can, and writes what they show to `solution`.

        Args:
            values, outputs: grid and output times as numbers.
        """
        return Begun(0, self.problem.y0, 1, [])

    @abc.abstractmethod
    def _step(self, y0: Tensor, ends: Ends, slopes: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """The state after a step and the slope at its start, with whatever graph and dtypes come
        up.

        Args:
            slopes: what the field has returned in this step so far, if `_plain_steps` left it.
        """

    def _time(self, y: Tensor, s: float, c: float, ends: Ends) -> Tensor:
        """The time s as the field is given it, 0-dim in y's real dtype, with the graph of start + c
        size; s is a number of that dtype.
        """
        sign, dtype = self.problem.sign, rounding.real_dtype(y.dtype)
        (value,) = time_tensors([sign * s], dtype, y.device)
        if ends.graph is None:
            return value
        graph = sign * (ends.graph[0] + c * ends.size_graph).to(dtype)
        return graph + (value - graph).detach()

    # ---- between grid points ---------------------------------------------------------------------

    def _interpolate(
        self,
        y0: Tensor,
        y1: Tensor,
        f0: Tensor,
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
        return [problem.evaluate(t, y)]
    return problem.call(t, y)
