"""One Runge-Kutta step: the compiled one without a graph, and the differentiable one.

Both leave the choice of steps to their callers: `adaptive` and `fixed_grid` step as torchdiffeq
does, the flows by a policy of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf import reference
from pycnf._ops import kernels
from pycnf.odeint.tableau import Tableau


class Rows:
    """The derivatives of one step, [stages, N], and the compiled ops on them.

    The first row holds f at the start of the step. `advance` makes the last row of an accepted step
    the first of the next.

    Args:
        tableau: the method.
        y0: any state of the solve, contiguous; fixes size, dtype and device.
        segments: pairs (begin, end) of the error norm, see `pycnf.odeint.norms`; none for a method
            without error estimate.
        rtol, atol: float64, 0-dim or one value per value of the state.
    """

    def __init__(
        self,
        tableau: Tableau,
        y0: Tensor,
        segments: Sequence[int] = (),
        rtol: Tensor | None = None,
        atol: Tensor | None = None,
    ) -> None:
        self.tableau = tableau
        self.ops: Any = kernels(y0)
        self.k = torch.empty(tableau.stages, y0.numel(), dtype=y0.dtype, device=y0.device)
        self.flip = False
        self.segments = list(segments)
        self.rtol, self.atol = rtol, atol
        self.solution = [] if tableau.solution_is_last_stage else tableau.b

    def row(self, stage: int) -> Tensor:
        """The derivative of a stage, a flat view."""
        if self.flip and stage in (0, self.tableau.stages - 1):
            stage = self.tableau.stages - 1 - stage
        return self.k[stage]

    def store(self, stage: int, fresh: Sequence[Tensor]) -> None:
        """Writes what the field returned, one tensor or parts, as the derivative of a stage."""
        row = self.row(stage)
        begin = 0
        for part in fresh:
            end = begin + part.numel()
            row[begin:end].view(part.shape).copy_(part.detach())
            begin = end

    def stage(self, y0: Tensor, stage: int, fresh: Sequence[Tensor], h: float) -> Tensor:
        """The state of a stage, 1 <= stage, in a new tensor; `fresh` is the derivative of the stage
        before, [] if stored.
        """
        return self.ops.rk_stage(y0, self.k, self.flip, fresh, self.tableau.a[stage], h)

    def trial(self, y0: Tensor, h: float) -> Tensor:
        """y0 + h k₀ in a new tensor."""
        return self.ops.rk_stage(y0, self.k, self.flip, [], [1.0], h)

    def solve(self, y0: Tensor, fresh: Sequence[Tensor], h: float) -> Tensor:
        """y0 + h Σ bⱼ kⱼ in a new tensor, for methods without error estimate."""
        return self.ops.rk_stage(y0, self.k, self.flip, fresh, self.tableau.b, h)

    def finish(
        self,
        y0: Tensor,
        last: Tensor,
        fresh: Sequence[Tensor],
        h: float,
        ratio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ends a step: the solution and float64 (error norm, 1 if the solution is finite).

        Args:
            last: the state of the last stage, which is the solution in some methods.
            fresh: the derivative of the last stage, [] if stored.
            ratio: receives the scaled error, for norms that are no segments.
        """
        y1 = torch.empty_like(y0) if self.solution else last
        return y1, self._norm(y0, y1, fresh, self.solution, h, ratio)

    def error_norm(self, y0: Tensor, y1: Tensor, h: float, ratio: Tensor | None = None) -> Tensor:
        """As `finish` for a solution that is there already, with every row stored."""
        return self._norm(y0, y1, [], [], h, ratio)

    def _norm(
        self,
        y0: Tensor,
        y1: Tensor,
        fresh: Sequence[Tensor],
        solution: list[float],
        h: float,
        ratio: Tensor | None,
    ) -> Tensor:
        return self.ops.rk_finish(
            y0, self.k, self.flip, fresh, y1, solution, self.tableau.e, h,
            self.rtol, self.atol, self.segments, ratio,
        )  # fmt: skip

    def initial_norms(self, y0: Tensor, f0: Tensor, f1: Tensor | None = None) -> list[float]:
        """Norms of y0 / scale and f0 / scale, or of (f1 - f0) / scale; states like y0."""
        return self.ops.rk_initial_norms(y0, f0, f1, self.rtol, self.atol, self.segments).tolist()

    def interpolate(
        self, y0: Tensor, y1: Tensor, h: float, x: Sequence[float], out: Tensor
    ) -> None:
        """Writes the step's quartic at the points x in [0, 1] to out, contiguous [len(x), ...]."""
        self.ops.rk_interpolate(y0, y1, self.k, self.flip, self.tableau.m, h, x, out)

    def advance(self) -> None:
        """After an accepted step: its last derivative is the first of the next."""
        self.flip = not self.flip

    def retreat(self) -> None:
        """Undoes `advance`: the rows are those of the accepted step again."""
        self.flip = not self.flip


def combine(
    y: Tensor, k: Sequence[Tensor], weights: Sequence[float], h: float, h_graph: Tensor | None
) -> Tensor:
    """y + h Σ wⱼ kⱼ with gradients to y, every kⱼ and h_graph, a 0-dim h or None."""
    return kernels(y).rk_combine(y, k, weights, h, h_graph)


def differentiable_step(
    tableau: Tableau,
    field: Callable[[int, Tensor], Tensor],
    y0: Tensor,
    k: list[Tensor],
    h: float,
    h_graph: Tensor | None = None,
) -> Tensor:
    """Evaluates the stages that `k` lacks, appends them to it, and returns the solution, all with
    their graph.

    Args:
        field: (stage, state) -> derivative like the state.
        k: derivatives of the first stages, like y0; at least the first.
        h: step size; h_graph: the same as a 0-dim tensor if gradients flow to it.
    """
    y = y0
    for stage in range(len(k), tableau.stages):
        y = combine(y0, k, tableau.a[stage], h, h_graph)
        k.append(field(stage, y))
    return y if tableau.solution_is_last_stage else combine(y0, k, tableau.b, h, h_graph)


def differentiable_quartic(
    tableau: Tableau,
    y0: Tensor,
    y1: Tensor,
    k: Sequence[Tensor],
    h: float,
    h_graph: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Coefficients of the step's quartic with their graph; evaluate with
    `reference.evaluate_quartic`.
    """
    middle = combine(y0, k, tableau.m, h, h_graph)
    if h_graph is None:
        h_graph = torch.tensor(h, dtype=y0.real.dtype if y0.is_complex() else y0.dtype)
        h_graph = h_graph.to(y0.device)
    return reference.quartic(y0, y1, middle, k[0], k[-1], h_graph)
