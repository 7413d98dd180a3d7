"""Implicit Runge-Kutta methods on a fixed grid, by torchdiffeq's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycnf.compat.torchdiffeq._impl.solvers import WholeSolveODESolver, problem_of
from pycnf.odeint.fixed_grid import Ends
from pycnf.odeint.implicit_grid import IMPLICIT_TABLEAUX, ImplicitGridSolver
from pycnf.odeint.problem import Problem

__all__ = [
    "SDIRK2", "TRBDF2", "FixedGridFIRKODESolver", "GaussLegendre4", "GaussLegendre6",
    "ImplicitEuler", "ImplicitMidpoint", "RadauIIA3", "RadauIIA5", "Trapezoid",
]  # fmt: skip


class FixedGridFIRKODESolver(WholeSolveODESolver):
    """An implicit method of pycnf, named by `method`."""

    method: str

    def __init__(self, func: Callable, y0: Tensor, max_iters: int = 100, **kwargs: Any) -> None:
        super().__init__(func, y0, **kwargs)
        self.max_iters = max_iters

    def _compiled(self, problem: Problem, tape: list | None) -> ImplicitGridSolver:
        return ImplicitGridSolver(
            self._counted(problem), IMPLICIT_TABLEAUX[self.method], type(self).__name__, tape,
            max_iters=self.max_iters, **self._options(problem),
        )  # fmt: skip

    def _step_func(
        self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        solver = self._compiled(problem_of(self, torch.stack([t0, t1])), None)
        y1, f0 = solver._step(y0, Ends(t0.item(), t1.item(), float(dt), None), [])
        return y1 - y0, f0


class ImplicitEuler(FixedGridFIRKODESolver):
    """The implicit Euler method."""

    order, method = 1, "implicit_euler"


class ImplicitMidpoint(FixedGridFIRKODESolver):
    """The implicit midpoint method."""

    order, method = 2, "implicit_midpoint"


class Trapezoid(FixedGridFIRKODESolver):
    """The trapezoidal rule."""

    order, method = 2, "trapezoid"


class RadauIIA3(FixedGridFIRKODESolver):
    """Radau IIA of order 3."""

    order, method = 3, "radauIIA3"


class GaussLegendre4(FixedGridFIRKODESolver):
    """Gauss's method of order 4, with the times of its first stage."""

    order, method = 4, "gl4"


class RadauIIA5(FixedGridFIRKODESolver):
    """Radau IIA of order 5."""

    order, method = 5, "radauIIA5"


class GaussLegendre6(FixedGridFIRKODESolver):
    """Gauss's method of order 6."""

    order, method = 6, "gl6"


class SDIRK2(FixedGridFIRKODESolver):
    """A diagonally implicit method of order 2."""

    order, method = 2, "sdirk2"


class TRBDF2(FixedGridFIRKODESolver):
    """TR-BDF2."""

    order, method = 2, "trbdf2"
