"""Explicit Runge-Kutta methods on a given grid.

Steps run in one compiled loop for as long as state, slopes and times agree in dtype and shape and
carry no graph.
"""

from __future__ import annotations

import math
from operator import sub

import torch
from torch import Tensor

from pycnf._build import _C
from pycnf._ops import has_kernels
from pycnf.odeint import rounding
from pycnf.odeint.fixed_grid import Begun, Ends, FixedGridSolver, problem_call
from pycnf.odeint.stepper import combine


class ExplicitGridSolver(FixedGridSolver):
    """One solve; see the module."""

    one_loop = True

    def _plain_steps(
        self, grid: Tensor, values: list[float], outputs: list[float], solution: Tensor
    ) -> Begun:
        problem, tableau = self.problem, self.tableau
        y0, time_dtype = problem.y0, grid.dtype
        promotes = y0.dim() == 0 and time_dtype != y0.dtype
        served = has_kernels(y0.dtype, y0.device) and time_dtype in (torch.float32, torch.float64)
        # The loop's first stage is at start + 0 * size.
        endless = math.isinf(values[0]) or math.isinf(values[-1])
        if promotes or not served or endless or self.interp != "linear":
            return super()._plain_steps(grid, values, outputs, solution)
        states = None if self.tape is None else []
        steps, y, shown, rows, result = _C.grid_steps(
            problem.func, problem.shapes, y0, tableau.a, tableau.b, tableau.c, values, outputs,
            time_dtype, problem.sign, self._ends_on_grid(1.0), self.perturb, solution, states,
        )  # fmt: skip
        stats = problem.stats
        stats.evaluations += steps * tableau.stages + (0 if result is None else len(rows) + 1)
        stats.accepted += steps
        stats.step_sizes += map(sub, values[1 : steps + 1], values)
        for i, state in enumerate(states or []):
            size = self.round(values[i + 1] - values[i])
            self.tape.append((state, Ends(values[i], values[i + 1], size, None)))
        slopes = [[row.view_as(y0)] for row in rows]
        if result is not None:
            slopes.append([result] if problem.shapes is None else list(result))
        return Begun(steps, y, shown, slopes)

    def _ends_on_grid(self, c: float) -> bool:
        """Whether a stage is taken at the grid point itself: rk4's last one is, heun2's is at start
        + size.
        """
        return c == 1.0 and self.tableau.name == "rk4"

    def _step(self, y0: Tensor, ends: Ends, slopes: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        problem, tableau = self.problem, self.tableau
        k = [problem.joined(slope) for slope in slopes]
        for stage in range(len(k), tableau.stages):
            y = self._weighted(y0, k, tableau.a[stage], ends) if stage > 0 else y0
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

    def _stage_time(self, y: Tensor, stage: int, ends: Ends) -> Tensor:
        """The time that the field is given at a stage."""
        c, round_ = self.tableau.c[stage], self.round
        dtype = rounding.real_dtype(y.dtype)
        s = ends.end if self._ends_on_grid(c) else ends.start
        if c > 0 and not self._ends_on_grid(c):
            # PyTorch multiplies half-precision numbers in float32.
            wide = rounding.rounding(torch.promote_types(self.problem.s.dtype, torch.float32))
            s = round_(ends.start + round_(wide(wide(c) * ends.size)))
        s = rounding.rounding(dtype)(s)
        if self.perturb and stage == 0:
            s = rounding.after(s, dtype)
        elif self.perturb and c == 1.0:
            s = rounding.before(s, dtype)
        return self._time(y, s, c, ends)
