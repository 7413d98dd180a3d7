"""SciPy's solvers, by torchdiffeq's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pycnf.compat.changes import SolverType
from pycnf.compat.torchdiffeq._impl.solvers import problem_of
from pycnf.odeint.problem import Problem
from pycnf.odeint.scipy_solver import ScipySolver

__all__ = ["ScipyWrapperODESolver"]


class ScipyWrapperODESolver(metaclass=SolverType):
    """`scipy.integrate.solve_ivp`."""

    def __init__(
        self,
        func: Callable,
        y0: Tensor,
        rtol: Any,
        atol: Any,
        min_step: float = 0,
        max_step: float = float("inf"),
        solver: str = "LSODA",
        **unused_kwargs: Any,
    ) -> None:
        self.func, self.y0, self.rtol, self.atol = func, y0, rtol, atol
        self.norm = unused_kwargs.pop("norm", None)
        self.options = dict(min_step=min_step, max_step=max_step, solver=solver, **unused_kwargs)

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """Names of the callbacks that the solver calls."""
        return set()

    def on_pycnf(self, problem: Problem, field: Callable, tape: list | None) -> ScipySolver | None:
        """pycnf's solver of the same solve; None if this class has another field or state."""
        if self.func is not field or self.y0 is not problem.y0:
            return None
        return ScipySolver(problem, None, type(self).__name__, tape, **self.options)

    def integrate(self, t: Tensor) -> Tensor:
        """States at ascending times t, [len(t), *y0.shape]."""
        problem = problem_of(self, t)
        return ScipySolver(problem, None, type(self).__name__, **self.options).integrate()
