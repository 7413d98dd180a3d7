"""The base classes of solvers, by torchdiffeq's names."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pycnf.compat.changes import SolverType, is_unchanged, parts
from pycnf.compat.torchdiffeq._impl.event_handling import find_event
from pycnf.compat.torchdiffeq._impl.misc import _handle_unused_kwargs, _null_callback
from pycnf.odeint.explicit_grid import ExplicitGridSolver
from pycnf.odeint.fixed_grid import FixedGridSolver, cubic_hermite
from pycnf.odeint.problem import CALLBACKS, Problem
from pycnf.odeint.rounding import real_dtype
from pycnf.odeint.stats import SolveStats
from pycnf.odeint.tableau import TABLEAUX, Tableau

__all__ = ["AdaptiveStepsizeEventODESolver", "AdaptiveStepsizeODESolver", "FixedGridODESolver"]


def problem_of(solver: Any, t: Tensor) -> Problem:
    """What a solver that was constructed by hand is about to solve at times t."""
    assert (t[1:] > t[:-1]).all(), "t must be strictly increasing or decreasing"
    callbacks = {name: getattr(solver.func, name, _null_callback) for name in CALLBACKS}
    callbacks = {name: call for name, call in callbacks.items() if call is not _null_callback}
    return Problem(
        func=solver.func, y0=solver.y0.contiguous(), shapes=None, s=t, times=t.tolist(), sign=1,
        rtol=solver.rtol, atol=solver.atol, method=type(solver).__name__, options={},
        norm=solver.norm, callbacks=callbacks, event_fn=None,
        stats=SolveStats(type(solver).__name__),
    )  # fmt: skip


class AdaptiveStepsizeODESolver(metaclass=SolverType):
    """A solver that chooses its steps; subclasses define `_advance(next_t)`, the state at a later
    time.
    """

    def __init__(self, dtype: torch.dtype, y0: Tensor, norm: Callable, **unused_kwargs: Any):
        _handle_unused_kwargs(self, unused_kwargs)
        self.y0, self.dtype, self.norm = y0, dtype, norm

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """Names of the callbacks that the solver calls."""
        return set()

    def _before_integrate(self, t: Tensor) -> None:
        """Called once, with all times, before the first `_advance`."""

    @abc.abstractmethod
    def _advance(self, next_t: Tensor) -> Tensor: ...

    def integrate(self, t: Tensor) -> Tensor:
        """States at ascending times t, [len(t), *y0.shape]."""
        t = t.to(self.dtype)
        self._before_integrate(t)
        states = [self.y0, *(self._advance(time) for time in t[1:])]
        return torch.stack([state.to(self.y0.dtype) for state in states])


class AdaptiveStepsizeEventODESolver(AdaptiveStepsizeODESolver):
    """An adaptive solver that can stop at an event; subclasses define `_advance_until_event`."""

    @abc.abstractmethod
    def _advance_until_event(self, event_fn: Callable) -> tuple[Tensor, Tensor]: ...

    def integrate_until_event(self, t0: Tensor, event_fn: Callable) -> tuple[Tensor, Tensor]:
        """Time of the event, and the states [2, *y0.shape] at t0 and then."""
        self._before_integrate(t0.to(self.y0.device, self.dtype).reshape(-1))
        event_t, y1 = self._advance_until_event(event_fn)
        return event_t, torch.stack([self.y0, y1])


class FixedGridODESolver(metaclass=SolverType):
    """A solver on a given grid; subclasses define `_step_func(func, t0, dt, t1, y0)`, which returns
    the change of the state and the slope at t0.
    """

    order: int

    def __init__(
        self,
        func: Callable,
        y0: Tensor,
        step_size: Any = None,
        grid_constructor: Callable | None = None,
        interp: str = "linear",
        perturb: bool = False,
        **unused_kwargs: Any,
    ) -> None:
        self.atol = unused_kwargs.pop("atol", None)
        self.rtol = unused_kwargs.pop("rtol", None)
        self.norm = unused_kwargs.pop("norm", None)
        _handle_unused_kwargs(self, unused_kwargs)
        if step_size is not None and grid_constructor is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
        self.func, self.y0, self.dtype, self.device = func, y0, y0.dtype, y0.device
        self.step_size, self.interp, self.perturb = step_size, interp, perturb
        if step_size is not None:
            grid_constructor = self._grid_constructor_from_step_size(step_size)
        self.grid_constructor = grid_constructor or (lambda func, y0, t: t)
        self._given_grid = self.grid_constructor

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """Names of the callbacks that the solver calls."""
        return {"callback_step"}

    @staticmethod
    def _grid_constructor_from_step_size(step_size: Any) -> Callable:
        def construct(func: Callable, y0: Tensor, t: Tensor) -> Tensor:
            count = torch.ceil((t[-1] - t[0]) / step_size + 1).item()
            grid = torch.arange(0, count, dtype=t.dtype, device=t.device) * step_size + t[0]
            return torch.cat([grid[:-1], t[-1:]])

        return construct

    @abc.abstractmethod
    def _step_func(
        self, func: Callable, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    # ---- the solve -------------------------------------------------------------------------------

    def on_pycnf(
        self, problem: Problem, field: Callable, tape: list | None
    ) -> FixedGridSolver | None:
        """pycnf's solver of the same solve; None if this class has steps of its own."""
        if self._compiled_tableau() is None or self.func is not field or self.y0 is not problem.y0:
            return None
        return self._compiled(problem, tape)

    def _compiled(self, problem: Problem, tape: list | None) -> FixedGridSolver:
        return ExplicitGridSolver(
            self._counted(problem), self._compiled_tableau(), type(self).__name__, tape,
            **self._options(problem),
        )  # fmt: skip

    def _counted(self, problem: Problem) -> Problem:
        """As in torchdiffeq, steps to an event are counted in the state's dtype."""
        if problem.event_fn is None:
            return problem
        s = problem.s.to(real_dtype(problem.y0.dtype))
        return replace(problem, s=s, times=s.tolist())

    def _options(self, problem: Problem) -> dict[str, Any]:
        options = {"interp": self.interp, "perturb": self.perturb}
        if self.step_size is not None and self.grid_constructor is self._given_grid:
            return {**options, "step_size": self.step_size}
        return {**options, "grid_constructor": self._grid_of(problem)}

    def _grid_of(self, problem: Problem) -> Callable:
        """The grid constructor in the user's direction of time; ours is for ascending times."""
        if problem.sign > 0:
            return self.grid_constructor
        return lambda func, y0, t: -self.grid_constructor(func, y0, -t)

    def _compiled_tableau(self) -> Tableau | None:
        """The tableau of the step function, if pycnf has it and nothing else was replaced."""
        name = COMPILED_STEPS.get(type(self)._step_func)
        if name is None or "_step_func" in vars(self):
            return None
        return TABLEAUX[name] if is_unchanged(type(self), _STEPPING, self) else None

    def integrate(self, t: Tensor) -> Tensor:
        """States at ascending times t, [len(t), *y0.shape]."""
        if self._compiled_tableau() is not None:
            return self._compiled(problem_of(self, t), None).integrate()
        grid = self.grid_constructor(self.func, self.y0, t)
        assert grid[0] == t[0] and grid[-1] == t[-1]
        notify = getattr(self.func, "callback_step", _null_callback)
        states, y0 = [self.y0.clone()], self.y0
        for t0, t1 in pairwise(grid):
            notify(t0, y0, t1 - t0)
            dy, f0 = self._step_func(self.func, t0, t1 - t0, t1, y0)
            y1 = y0 + dy
            while len(states) < len(t) and t1 >= t[len(states)]:
                interpolate = self._interpolant(t0, y0, f0, t1, y1)
                states.append(interpolate(t[len(states)]).to(self.y0.dtype).clone())
            y0 = y1
        return torch.stack(states)

    def integrate_until_event(self, t0: Tensor, event_fn: Callable) -> tuple[Tensor, Tensor]:
        """Time of the event, and the states [2, *y0.shape] at t0 and then."""
        assert self.step_size is not None, (
            "Event handling for fixed step solvers currently requires `step_size` to be provided "
            "in options."
        )
        t0, y0 = t0.type_as(self.y0.abs()), self.y0
        sign0 = torch.sign(event_fn(t0, y0))
        for _ in range(_MOST_STEPS):
            t1 = t0 + self.step_size
            dy, f0 = self._step_func(self.func, t0, self.step_size, t1, y0)
            y1 = y0 + dy
            if torch.sign(event_fn(t1, y1)) != sign0:
                interpolate = self._interpolant(t0, y0, f0, t1, y1)
                event_t, y1 = find_event(interpolate, sign0, t0, t1, event_fn, float(self.atol))
                return event_t, torch.stack([self.y0, y1])
            t0, y0 = t1, y1
        raise RuntimeError(f"Reached maximum number of iterations {_MOST_STEPS}.")

    # ---- between grid points ---------------------------------------------------------------------

    def _interpolant(
        self, t0: Tensor, y0: Tensor, f0: Tensor, t1: Tensor, y1: Tensor
    ) -> Callable[[Tensor], Tensor]:
        if self.interp == "linear":
            return lambda t: self._linear_interp(t0, t1, y0, y1, t)
        if self.interp != "cubic":
            raise ValueError(f"Unknown interpolation method {self.interp}")
        f1 = self.func(t1, y1)
        return lambda t: self._cubic_hermite_interp(t0, y0, f0, t1, y1, f1, t)

    def _linear_interp(self, t0: Tensor, t1: Tensor, y0: Tensor, y1: Tensor, t: Tensor) -> Tensor:
        if t == t0:
            return y0
        if t == t1:
            return y1
        return y0 + (t - t0) / (t1 - t0) * (y1 - y0)

    def _cubic_hermite_interp(
        self, t0: Tensor, y0: Tensor, f0: Tensor, t1: Tensor, y1: Tensor, f1: Tensor, t: Tensor
    ) -> Tensor:
        return cubic_hermite(y0, y1, f0, f1, t1 - t0, (t - t0) / (t1 - t0))


class WholeSolveODESolver(FixedGridODESolver):
    """A method on a grid of which pycnf takes whole solves; subclasses define `_compiled`."""

    def on_pycnf(
        self, problem: Problem, field: Callable, tape: list | None
    ) -> FixedGridSolver | None:
        """pycnf's solver of the same solve; None if this class has another field or state."""
        if self.func is not field or self.y0 is not problem.y0:
            return None
        return self._compiled(problem, tape)

    def integrate(self, t: Tensor) -> Tensor:
        """States at ascending times t, [len(t), *y0.shape]."""
        return self._compiled(problem_of(self, t), None).integrate()


_MOST_STEPS = 20000
_STEPPING = parts(
    FixedGridODESolver, "integrate", "_interpolant", "_linear_interp", "_cubic_hermite_interp"
)

# The names of the tableaux by the step functions that they stand for; `fixed_grid` fills it.
COMPILED_STEPS: dict[Callable, str] = {}
