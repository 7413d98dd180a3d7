"""Adams methods, by torchdiffeq's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from pycnf.compat.torchdiffeq._impl.solvers import WholeSolveODESolver
from pycnf.odeint import adams
from pycnf.odeint.problem import Problem
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["AdamsBashforth", "AdamsBashforthMoulton"]


class AdamsBashforthMoulton(WholeSolveODESolver):
    """Adams methods; pycnf takes whole solves of them, and no single steps."""

    order = 4

    def __init__(
        self,
        func: Callable,
        y0: Tensor,
        rtol: Any = 1e-3,
        atol: Any = 1e-4,
        implicit: bool = True,
        max_iters: int = 4,
        max_order: int = 12,
        **kwargs: Any,
    ) -> None:
        super().__init__(func, y0, rtol=rtol, atol=atol, **kwargs)
        self.implicit, self.max_iters, self.max_order = implicit, max_iters, max_order

    def _compiled(self, problem: Problem, tape: list | None) -> adams.AdamsBashforth:
        solver = adams.AdamsBashforthMoulton if self.implicit else adams.AdamsBashforth
        return solver(
            replace(self._counted(problem), rtol=self.rtol, atol=self.atol), TABLEAUX["rk4"],
            type(self).__name__, tape, max_order=self.max_order, max_iters=self.max_iters,
            **self._options(problem),
        )  # fmt: skip

    def _step_func(
        self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            f"pycnf's {type(self).__name__} takes no single steps; call integrate(t)"
        )


class AdamsBashforth(AdamsBashforthMoulton):
    """Adams' explicit methods."""

    def __init__(self, func: Callable, y0: Tensor, **kwargs: Any) -> None:
        super().__init__(func, y0, implicit=False, **kwargs)
