"""`scipy_solver`: SciPy's `solve_ivp` behind torchdiffeq's interface, on the CPU and without a
graph.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycnf.odeint import rounding
from pycnf.odeint.arguments import warn_not_recorded, warn_unused
from pycnf.odeint.fixed_grid import problem_call
from pycnf.odeint.problem import Problem
from pycnf.odeint.tableau import Tableau


class ScipySolver:
    """One solve; see the module.

    Args:
        tape: must be None; SciPy tells nothing of its steps.
        solver: a method of `scipy.integrate.solve_ivp`.
        min_step, max_step: as SciPy has them; it warns where its method has none.
        unused: options that the method does not have; torchdiffeq is silent about `grid_points` and
            `eps`.
    """

    def __init__(
        self,
        problem: Problem,
        tableau: Tableau | None,
        name: str,
        tape: list | None = None,
        *,
        solver: str = "LSODA",
        min_step: float = 0,
        max_step: float = math.inf,
        cuda_graph: bool | None = None,
        **unused: Any,
    ) -> None:
        if tape is not None:
            raise ValueError(
                'gradient="discrete" needs the steps of a solve, which method="scipy_solver" does '
                "not tell"
            )
        warn_unused(name, {k: v for k, v in unused.items() if k not in ("grid_points", "eps")})
        warn_not_recorded(cuda_graph, "SciPy solves on the CPU")
        self.problem, self.solver = problem, solver
        problem.stats.accepted = problem.stats.rejected = None  # SciPy does not tell
        self.steps = {"min_step": min_step, "max_step": max_step}

    def integrate(self) -> Tensor:
        """States at the output times, [T, *y0.shape].

        Raises:
            ImportError: there is no SciPy.
            RuntimeError: SciPy could not reach the last time.
        """
        try:
            from scipy.integrate import solve_ivp
        except ImportError as error:
            raise ImportError(
                'method="scipy_solver" needs SciPy, which is not installed: pip install scipy'
            ) from error
        problem = self.problem
        y0 = problem.y0.detach()
        if problem.s.numel() == 1:
            return y0.clone()[None]
        s = problem.s.detach().cpu().numpy()
        found = solve_ivp(
            self._field,
            t_span=[s.min(), s.max()],
            y0=y0.cpu().numpy().reshape(-1),
            t_eval=s,
            method=self.solver,
            rtol=problem.rtol,
            atol=problem.atol,
            **self.steps,
        )
        if not found.success:
            raise RuntimeError(f"scipy_solver: {self.solver} failed: {found.message}")
        states = torch.tensor(found.y).T.to(y0.device, y0.dtype)
        return states.reshape(len(s), *y0.shape)

    def _field(self, s: float, state: np.ndarray) -> np.ndarray:
        """d/ds of the state, flat, from the field at the user's time."""
        problem = self.problem
        y0 = problem.y0
        # As in torchdiffeq, a Python float, LSODA's, passes through torch's default dtype.
        t = torch.tensor(problem.sign * s).to(y0.device, rounding.real_dtype(y0.dtype))
        y = torch.tensor(state).to(y0.device, y0.dtype).reshape(y0.shape)
        with torch.no_grad():
            slope = problem.joined(problem_call(problem, t, y))
        return (problem.sign * slope.detach()).cpu().numpy().reshape(-1)
