"""Implicit Runge-Kutta methods on a given grid; stages are found by Broyden's method.

The numbers are torchdiffeq's: first guess f(t0, y0) for every stage, an approximate Jacobian of the
residual that starts as the identity, and one absolute bound on the residual's Euclidean norm over
the whole state. There the Jacobian is a dense matrix, factorized anew in every iteration; here it
is never formed (see `reference.broyden_step`): an iteration costs vectors, not matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycnf._ops import broyden_step
from pycnf.odeint import rounding
from pycnf.odeint.fixed_grid import Ends, FixedGridSolver
from pycnf.odeint.problem import Problem
from pycnf.odeint.stepper import combine
from pycnf.warn import warn


@dataclass(frozen=True)
class ImplicitTableau:
    """One method: kᵢ = f(t0 + cᵢ h, y0 + h Σ aᵢⱼ kⱼ), y1 = y0 + h Σ bⱼ kⱼ."""

    name: str
    order: int
    c: list[float]
    a: list[list[float]]
    b: list[float]

    @property
    def blocks(self) -> list[range]:
        """Stages that are solved for together, in order: each its own where no stage needs a later
        one. A stage that needs none is f(t0, y0) and not among them.
        """
        stages = range(len(self.b))
        if any(self.a[i][j] != 0 for i in stages for j in stages[i + 1 :]):
            return [stages]
        return [range(i, i + 1) for i in stages if any(self.a[i])]


_ROOT2, _ROOT3, _ROOT6, _ROOT15 = (math.sqrt(x) for x in (2, 3, 6, 15))
_GAMMA = 1 - _ROOT2 / 2

# Hairer & Wanner, Solving Ordinary Differential Equations II, IV.5 and IV.6; TR-BDF2: Hosea &
# Shampine, Applied Numerical Mathematics 20, 1996.
IMPLICIT_TABLEAUX = {
    tableau.name: tableau
    for tableau in (
        ImplicitTableau("implicit_euler", 1, [1.0], [[1.0]], [1.0]),
        ImplicitTableau("implicit_midpoint", 2, [0.5], [[0.5]], [1.0]),
        ImplicitTableau("trapezoid", 2, [0.0, 1.0], [[0.0, 0.0], [0.5, 0.5]], [0.5, 0.5]),
        ImplicitTableau(
            "radauIIA3", 3, [1 / 3, 1.0], [[5 / 12, -1 / 12], [3 / 4, 1 / 4]], [3 / 4, 1 / 4]
        ),
        # The second node is that of the first, as in torchdiffeq; Gauss's is 1/2 + sqrt(3)/6.
        ImplicitTableau(
            "gl4",
            4,
            [1 / 2 - _ROOT3 / 6] * 2,
            [[1 / 4, 1 / 4 - _ROOT3 / 6], [1 / 4 + _ROOT3 / 6, 1 / 4]],
            [1 / 2, 1 / 2],
        ),
        ImplicitTableau(
            "radauIIA5",
            5,
            [2 / 5 - _ROOT6 / 10, 2 / 5 + _ROOT6 / 10, 1.0],
            [
                [
                    11 / 45 - 7 * _ROOT6 / 360,
                    37 / 225 - 169 * _ROOT6 / 1800,
                    -2 / 225 + _ROOT6 / 75,
                ],
                [
                    37 / 225 + 169 * _ROOT6 / 1800,
                    11 / 45 + 7 * _ROOT6 / 360,
                    -2 / 225 - _ROOT6 / 75,
                ],
                [4 / 9 - _ROOT6 / 36, 4 / 9 + _ROOT6 / 36, 1 / 9],
            ],
            [4 / 9 - _ROOT6 / 36, 4 / 9 + _ROOT6 / 36, 1 / 9],
        ),
        ImplicitTableau(
            "gl6",
            6,
            [1 / 2 - _ROOT15 / 10, 1 / 2, 1 / 2 + _ROOT15 / 10],
            [
                [5 / 36, 2 / 9 - _ROOT15 / 15, 5 / 36 - _ROOT15 / 30],
                [5 / 36 + _ROOT15 / 24, 2 / 9, 5 / 36 - _ROOT15 / 24],
                [5 / 36 + _ROOT15 / 30, 2 / 9 + _ROOT15 / 15, 5 / 36],
            ],
            [5 / 18, 4 / 9, 5 / 18],
        ),
        ImplicitTableau(
            "sdirk2", 2, [_GAMMA, 1.0], [[_GAMMA, 0.0], [1 - _GAMMA, _GAMMA]], [1 - _GAMMA, _GAMMA]
        ),
        ImplicitTableau(
            "trbdf2",
            2,
            [0.0, 2 * _GAMMA, 1.0],
            [[0.0, 0.0, 0.0], [_GAMMA, _GAMMA, 0.0], [_ROOT2 / 4, _ROOT2 / 4, _GAMMA]],
            [_ROOT2 / 4, _ROOT2 / 4, _GAMMA],
        ),
    )
}


class ImplicitGridSolver(FixedGridSolver):
    """One solve; see the module.

    Args:
        max_iters: Broyden iterations at most, of every system of stages.
    """

    tableau: ImplicitTableau

    def __init__(
        self,
        problem: Problem,
        tableau: ImplicitTableau,
        *arguments: Any,
        max_iters: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(problem, tableau, *arguments, **options)
        self.max_iters = max_iters
        self.dtype = rounding.real_dtype(problem.y0.dtype)
        self.bound = 1e-6 if self.dtype == torch.float32 else 1e-8

    def _step(self, y0: Tensor, ends: Ends, slopes: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        problem, tableau = self.problem, self.tableau
        round_ = rounding.rounding(self.dtype)
        start, end, size = round_(ends.start), round_(ends.end), round_(ends.size)
        h = problem.sign * size
        h_graph = None if ends.graph is None else problem.sign * ends.size_graph.to(self.dtype)
        first = rounding.after(start, self.dtype) if self.perturb else start
        at = self._time(y0, first, 0.0, ends)
        f0 = problem.as_state(problem.call(at, y0), y0)
        k = [f0] * len(tableau.b)
        for stages in tableau.blocks:
            times = []
            for i in stages:
                c = tableau.c[i]
                s = round_(start + round_(round_(c) * size))
                s = rounding.before(end, self.dtype) if c == 1.0 else s
                times.append(self._time(y0, s, c, ends))
            self._settle(k, stages, times, y0, h, h_graph)
        return combine(y0, k, tableau.b, h, h_graph), f0

    def _settle(
        self,
        k: list[Tensor],
        stages: Sequence[int],
        times: Sequence[Tensor],
        y0: Tensor,
        h: float,
        h_graph: Tensor | None,
    ) -> None:
        """Changes k of some stages until it is the field at their states."""
        problem, a = self.problem, self.tableau.a

        def residual() -> Tensor:
            rows = []
            for i, t in zip(stages, times):
                y = combine(y0, k, a[i], h, h_graph)
                rows.append((k[i] - problem.as_state(problem.call(t, y), y0)).reshape(-1))
            return rows[0] if len(rows) == 1 else torch.cat(rows)

        steps: list[Tensor] = []
        last = list(k)
        r = residual()
        for _ in range(self.max_iters):
            norm = torch.linalg.vector_norm(r.detach()).item()
            if norm < self.bound:
                return
            if not math.isfinite(norm):
                # The step before was too long, or of a singular Jacobian.
                k[:] = last
                break
            last = list(k)
            steps.append(broyden_step(r, steps))
            for i, part in zip(stages, steps[-1].view(len(stages), -1)):
                k[i] = k[i] + part.view_as(k[i])
            r = residual()
        warn("Functional iteration did not converge. Solution may be incorrect.")
