"""Solves on a fixed grid as one CUDA graph: the grid is known before the first step, so the whole
solve is recorded, and a replay has no host in it at all.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycnf.odeint.recording import (
    DerivedField,
    Recorded,
    borrowed,
    count_evaluations,
    from_recording,
)
from pycnf.odeint.stats import SolveStats

if TYPE_CHECKING:
    from pycnf.odeint.fixed_grid import FixedGridSolver


def replayed_grid(solver: FixedGridSolver, values: list[float]) -> Tensor | None:
    """The solution on a grid with these times by a replay; see `from_recording`."""
    reason = None
    if not solver.one_loop:
        reason = f"{solver.problem.method} steps by what the host reads"
    elif solver.tape is not None:
        reason = 'gradient="discrete" keeps every step'
    settings = (
        tuple(values), tuple(solver.problem.times), solver.problem.s.dtype, solver.interp,
        solver.perturb,
    )  # fmt: skip
    return from_recording(solver, reason, settings, lambda: GridReplay(solver, values))


class GridReplay:
    """One solve in memory of its own, to be repeated from other states."""

    def __init__(self, solver: FixedGridSolver, values: list[float]) -> None:
        self.lock = threading.Lock()
        problem = solver.problem
        self.y = torch.empty_like(problem.y0)
        self.grid = torch.tensor(values, dtype=problem.s.dtype)
        func = borrowed(problem)
        s = problem.s.detach().clone()
        self.solver = copy.copy(solver)
        self.solver.problem = replace(
            problem, func=func, y0=self.y, s=s, stats=SolveStats(problem.method)
        )
        if isinstance(func, DerivedField):
            func.solve = self.solver.problem
        self.solution = self.y.new_empty(len(problem.times), *self.y.shape)
        self.run = Recorded(self._run, self.y.device)

    def _run(self) -> None:
        self.solver.problem.stats = SolveStats(self.solver.problem.method)
        self.solution.copy_(self.solver.integrate(self.grid))

    @torch.no_grad()
    def solve(self, solver: FixedGridSolver) -> Tensor:
        """The states of another solve on the same grid."""
        problem = solver.problem
        self.y.copy_(problem.y0)
        self.run()
        # As many as when it was last done as written.
        stats = self.solver.problem.stats
        count_evaluations(problem, stats.evaluations)
        problem.stats.accepted += stats.accepted
        problem.stats.step_sizes += stats.step_sizes
        return self.solution.clone()
