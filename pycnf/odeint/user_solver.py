"""Solver classes of the user's own, written for torchdiffeq and entered in `SOLVERS`.

Such a class is constructed as cls(func=, y0=, rtol=, atol=, **options) and asked to `integrate(t)`.
It sees a flat state, ascending times, and a field that takes the side from which a time is
approached and carries the callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Size, Tensor, nn

from pycnf.odeint.adaptive import AdaptiveSolver
from pycnf.odeint.fixed_grid import FixedGridSolver
from pycnf.odeint.norms import FlatNorm, flat_to_shapes
from pycnf.odeint.problem import CALLBACKS, Problem
from pycnf.odeint.rounding import real_dtype


class Perturb(Enum):
    """Whether a field is evaluated at a time, just before it, or just after it."""

    NONE = 0
    PREV = 1
    NEXT = 2


class TupleField(nn.Module):
    """A field of tuples as a field of flat states."""

    def __init__(self, base_func: Callable, shapes: Sequence[Size]) -> None:
        super().__init__()
        self.base_func, self.shapes = base_func, shapes

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        parts = self.base_func(t, flat_to_shapes(y, self.shapes))
        return torch.cat([part.reshape(-1) for part in parts])


class ReverseField(nn.Module):
    """mul * f(-t, y); with mul = -1 the field in reversed time."""

    def __init__(self, base_func: Callable, mul: float = 1.0) -> None:
        super().__init__()
        self.base_func, self.mul = base_func, mul

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.mul * self.base_func(-t, y)


def next_to(x1: Tensor, x2: Tensor) -> Tensor:
    """The number next to x1 in the direction of x2, with x1's gradient."""
    with torch.no_grad():
        value = torch.nextafter(x1, x2)
    return x1 + (value - x1).detach() if x1.requires_grad else value


class PerturbedField(nn.Module):
    """A field that takes real times in the state's dtype, and the side to approach them from."""

    def __init__(self, base_func: Callable) -> None:
        super().__init__()
        self.base_func = base_func

    def forward(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        assert isinstance(perturb, Perturb), "perturb argument must be of type Perturb enum"
        t = (t.real if t.is_complex() else t).to(real_dtype(y.dtype))
        if perturb is not Perturb.NONE:
            t = next_to(t, t + 1 if perturb is Perturb.NEXT else t - 1)
        return self.base_func(t, y)


def null_callback(*args: Any, **kwargs: Any) -> None:
    """Stands where a field has no callback."""


def user_field(problem: Problem) -> PerturbedField:
    """The field of a problem as a user's solver is given it."""
    func, shapes, sign = problem.func, problem.shapes, problem.sign
    field = func if shapes is None else TupleField(func, shapes)
    field = PerturbedField(field if sign > 0 else ReverseField(field, -1.0))
    for name in CALLBACKS:
        callback = getattr(func, name, null_callback)
        if callback is not null_callback and (shapes is not None or sign < 0):
            callback = _user_callback(callback, shapes, sign)
        setattr(field, name, callback)
        if hasattr(func, f"{name}_adjoint"):
            setattr(field, f"{name}_adjoint", getattr(func, f"{name}_adjoint"))
    return field


def _user_callback(callback: Callable, shapes: Sequence[Size] | None, sign: int) -> Callable:
    def notify(t: Tensor, y: Tensor, dt: Tensor) -> Any:
        state = y if shapes is None else flat_to_shapes(y, shapes)
        return callback(t if sign > 0 else -t, state, dt)

    return notify


def user_options(problem: Problem) -> dict[str, Any]:
    """The options of a problem as a user's solver is given them: for flat states and ascending
    times.
    """
    options = dict(problem.options)
    options["norm"] = problem.norm
    if problem.shapes is not None:
        options["norm"] = FlatNorm(problem.norm, problem.shapes)
    if problem.sign < 0 and "grid_constructor" in options:
        construct = options["grid_constructor"]
        options["grid_constructor"] = lambda func, y0, t: -construct(func, y0, -t)
    return options


class UserSolver:
    """A solve whose steps are the user's."""

    def __init__(self, problem: Problem, solver: Any) -> None:
        self.problem, self.solver = problem, solver
        problem.stats.accepted = problem.stats.rejected = None  # nobody tells

    def integrate(self) -> Tensor:
        """States at the output times, [T, *y0.shape]."""
        return self.solver.integrate(self.problem.s)

    def integrate_until_event(self) -> tuple[Tensor, Tensor]:
        """The event's time, ascending, and the states [2, *y0.shape] at the start and then."""
        problem = self.problem

        def event_fn(s: Tensor, y: Tensor) -> Tensor:
            return problem.event(s if problem.sign > 0 else -s, y)

        return self.solver.integrate_until_event(problem.s[0], event_fn)


def make_user_solver(
    solver_class: Callable, problem: Problem, tape: list | None
) -> AdaptiveSolver | FixedGridSolver | UserSolver:
    """The solver of a problem for a class of the user's.

    A solver that leaves its steps to pycnf, as subclasses of `pycnf.compat`'s classes may, says so
    by a method `on_pycnf(problem, field, tape)` that returns pycnf's solver, or None.

    Raises:
        ValueError: a tape is asked for, and the steps are the user's.
    """
    field = user_field(problem)
    solver = solver_class(
        func=field, y0=problem.y0, rtol=problem.rtol, atol=problem.atol, **user_options(problem)
    )
    if hasattr(solver, "on_pycnf"):
        compiled = solver.on_pycnf(problem, field, tape)
        if compiled is not None:
            return compiled
    if tape is not None:
        raise ValueError(
            f'method="{problem.method}" takes steps of its own, of which pycnf has no exact '
            'gradient; use odeint, or gradient="continuous"'
        )
    return UserSolver(problem, solver)
