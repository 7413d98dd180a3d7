"""Explicit methods on a fixed grid, by torchdiffeq's names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pycnf.compat.torchdiffeq._impl.rk_common import (
    first_slope,
    rk2_step_func,
    rk3_step_func,
    rk4_alt_step_func,
)
from pycnf.compat.torchdiffeq._impl.solvers import COMPILED_STEPS, FixedGridODESolver
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["RK4", "Euler", "Heun2", "Heun3", "Midpoint"]

Step = tuple[Tensor, Tensor]


def _rows(name: str) -> list[list[float]]:
    """A tableau as `rk2_step_func` and `rk3_step_func` take it."""
    tableau = TABLEAUX[name]
    return [[c, *row] for c, row in zip([*tableau.c, 0.0], [*tableau.a, tableau.b])]


class Euler(FixedGridODESolver):
    """Euler's method."""

    order = 1

    def _step_func(self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> Step:
        f0 = first_slope(func, t0, y0, self.perturb)
        return dt * f0, f0


class Midpoint(FixedGridODESolver):
    """The explicit midpoint method."""

    order = 2

    def _step_func(self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> Step:
        f0 = first_slope(func, t0, y0, self.perturb)
        return dt * func(t0 + 0.5 * dt, y0 + f0 * (0.5 * dt)), f0


class RK4(FixedGridODESolver):
    """Kutta's 3/8 rule."""

    order = 4

    def _step_func(self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> Step:
        f0 = first_slope(func, t0, y0, self.perturb)
        return rk4_alt_step_func(func, t0, dt, t1, y0, f0=f0, perturb=self.perturb), f0


class Heun3(FixedGridODESolver):
    """Heun's method of order 3."""

    order = 3

    def _step_func(self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> Step:
        f0 = first_slope(func, t0, y0, self.perturb)
        change = rk3_step_func(
            func, t0, dt, t1, y0, butcher_tableu=_rows("heun3"), f0=f0, perturb=self.perturb
        )
        return change, f0


class Heun2(FixedGridODESolver):
    """Heun's method of order 2."""

    order = 2

    def _step_func(self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> Step:
        f0 = first_slope(func, t0, y0, self.perturb)
        change = rk2_step_func(
            func, t0, dt, t1, y0, butcher_tableu=_rows("heun2"), f0=f0, perturb=self.perturb
        )
        return change, f0


COMPILED_STEPS.update(
    {
        Euler._step_func: "euler",
        Midpoint._step_func: "midpoint",
        Heun2._step_func: "heun2",
        Heun3._step_func: "heun3",
        RK4._step_func: "rk4",
    }
)
