"""Runge-Kutta steps, by torchdiffeq's names.

What stands here in plain torch is for solvers that take, replace or watch single steps. A solver
that only integrates runs on pycnf's stepper.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycnf.compat.changes import is_unchanged, parts
from pycnf.compat.torchdiffeq._impl.event_handling import find_event
from pycnf.compat.torchdiffeq._impl.interp import _interp_evaluate, _interp_fit
from pycnf.compat.torchdiffeq._impl.misc import (
    Perturb,
    _compute_error_ratio,
    _null_callback,
    _optimal_step_size,
    _select_initial_step,
)
from pycnf.compat.torchdiffeq._impl.solvers import AdaptiveStepsizeEventODESolver, problem_of
from pycnf.odeint.adaptive import AdaptiveSolver
from pycnf.odeint.problem import Problem
from pycnf.odeint.tableau import TABLEAUX, Tableau

__all__ = [
    "RKAdaptiveStepsizeODESolver",
    "_ButcherTableau",
    "_RungeKuttaState",
    "_runge_kutta_step",
    "rk2_step_func",
    "rk3_step_func",
    "rk4_alt_step_func",
    "rk4_step_func",
]


class _ButcherTableau(NamedTuple):
    """Nodes and weights without the first stage's: alpha [stages - 1], beta a row for each of
    these, c_sol and c_error [stages].
    """

    alpha: Tensor
    beta: list[Tensor]
    c_sol: Tensor
    c_error: Tensor


class _RungeKuttaState(NamedTuple):
    """After a step from t0 to t1: the state and the slope at t1, the size of the next attempt, and
    the coefficients of the step's interpolant.
    """

    y1: Tensor
    f1: Tensor
    t0: Tensor
    t1: Tensor
    dt: Tensor
    interp_coeff: list[Tensor]


def butcher_tableau(name: str) -> tuple[_ButcherTableau, Tensor]:
    """One of pycnf's tableaux in torchdiffeq's form, and its mid-point weights."""
    tableau = TABLEAUX[name]

    def numbers(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    rows = [numbers(row) for row in tableau.a[1:]]
    weights = (numbers(values) for values in (tableau.b, tableau.e))
    return _ButcherTableau(numbers(tableau.c[1:]), rows, *weights), numbers(tableau.m)


# ---- single steps --------------------------------------------------------------------------------


def _combined(y0: Tensor, k: Sequence[Tensor], weights: Tensor) -> Tensor:
    return y0 + (torch.stack(list(k), -1) * weights).sum(-1)


def _runge_kutta_step(
    func: Callable,
    y0: Tensor,
    f0: Tensor,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    tableau: _ButcherTableau,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step of an adaptive method.

    Returns:
        The state at t1, the slope of the last stage, the error estimate, and all slopes
        [*y0.shape, stages].
    """
    real = y0.dtype.to_real() if y0.is_complex() else y0.dtype
    t0, dt, t1 = (t.to(real) for t in (t0, dt, t1))
    k = [f0.to(y0.dtype)]
    y = y0
    for node, row in zip(tableau.alpha, tableau.beta):
        y = _combined(y0, k, row * dt)
        if node == 1.0:
            # The field may be discontinuous at the end of the step.
            slope = func(t1, y, perturb=Perturb.PREV)
        else:
            slope = func(t0 + node * dt, y, perturb=Perturb.NONE)
        k.append(slope.to(y0.dtype).view_as(y0))
    if tableau.c_sol[-1] != 0 or not torch.equal(tableau.c_sol[:-1], tableau.beta[-1]):
        y = _combined(y0, k, dt * tableau.c_sol)
    slopes = torch.stack(k, -1)
    return y, k[-1], (slopes * (dt * tableau.c_error)).sum(-1), slopes


def first_slope(func: Callable, t0: Tensor, y0: Tensor, perturb: bool) -> Tensor:
    """The field at the start of a step, just after it if times are perturbed."""
    return func(t0, y0, perturb=Perturb.NEXT if perturb else Perturb.NONE)


def rk4_step_func(
    func: Callable,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor | None = None,
    perturb: bool = False,
) -> Tensor:
    """The change of y0 over a step of the classical Runge-Kutta method."""
    k1 = first_slope(func, t0, y0, perturb) if f0 is None else f0
    half = dt * 0.5
    k2 = func(t0 + half, y0 + half * k1)
    k3 = func(t0 + half, y0 + half * k2)
    k4 = func(t1, y0 + dt * k3, perturb=Perturb.PREV if perturb else Perturb.NONE)
    return (k1 + 2 * (k2 + k3) + k4) * dt * (1 / 6)


def rk4_alt_step_func(
    func: Callable,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor | None = None,
    perturb: bool = False,
) -> Tensor:
    """The change of y0 over a step of Kutta's 3/8 rule."""
    k1 = first_slope(func, t0, y0, perturb) if f0 is None else f0
    k2 = func(t0 + dt * (1 / 3), y0 + dt * k1 * (1 / 3))
    k3 = func(t0 + dt * (2 / 3), y0 + dt * (k2 - k1 * (1 / 3)))
    k4 = func(t1, y0 + dt * (k1 - k2 + k3), perturb=Perturb.PREV if perturb else Perturb.NONE)
    return (k1 + 3 * (k2 + k3) + k4) * dt * 0.125


def rk3_step_func(
    func: Callable,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    butcher_tableu: Sequence[Sequence[float]],
    f0: Tensor | None = None,
    perturb: bool = False,
) -> Tensor:
    """The change of y0 over a step of three stages; rows (c, *a) of the tableau, then (0, *b)."""
    _, (c2, a21, *_), (c3, a31, a32, *_), (_, b1, b2, b3) = butcher_tableu
    k1 = first_slope(func, t0, y0, perturb) if f0 is None else f0
    k2 = func(t0 + dt * c2, y0 + dt * k1 * a21)
    k3 = func(t0 + dt * c3, y0 + dt * (k1 * a31 + k2 * a32))
    return dt * (k1 * b1 + k2 * b2 + k3 * b3)


def rk2_step_func(
    func: Callable,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    butcher_tableu: Sequence[Sequence[float]],
    f0: Tensor | None = None,
    perturb: bool = False,
) -> Tensor:
    """The change of y0 over a step of two stages; rows (c, *a) of the tableau, then (0, *b)."""
    _, (c2, a21, *_), (_, b1, b2) = butcher_tableu
    k1 = first_slope(func, t0, y0, perturb) if f0 is None else f0
    side = Perturb.PREV if perturb else Perturb.NONE
    k2 = func(t0 + dt * c2, y0 + dt * k1 * a21, perturb=side)
    return dt * (k1 * b1 + k2 * b2)


# ---- adaptive solvers ----------------------------------------------------------------------------


class RKAdaptiveStepsizeODESolver(AdaptiveStepsizeEventODESolver):
    """An adaptive Runge-Kutta method; subclasses set `order`, `tableau` and the mid-point weights
    `mid`.
    """

    order: int
    tableau: _ButcherTableau
    mid: Tensor

    def __init__(
        self,
        func: Callable,
        y0: Tensor,
        rtol: Any,
        atol: Any,
        min_step: Any = 0,
        max_step: Any = float("inf"),
        first_step: Any = None,
        step_t: Any = None,
        jump_t: Any = None,
        safety: Any = 0.9,
        ifactor: Any = 10.0,
        dfactor: Any = 0.2,
        max_num_steps: Any = 2**31 - 1,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype=dtype, y0=y0, **kwargs)
        self.func = func
        self.dtype = torch.promote_types(dtype, y0.dtype.to_real() if y0.is_complex() else y0.dtype)
        numbers = dict(
            rtol=rtol, atol=atol, min_step=min_step, max_step=max_step, first_step=first_step,
            step_t=step_t, jump_t=jump_t, safety=safety, ifactor=ifactor, dfactor=dfactor,
        )  # fmt: skip
        for name, value in numbers.items():
            if value is not None:
                value = torch.as_tensor(value, dtype=self.dtype, device=y0.device)
            setattr(self, name, value)
        self.max_num_steps = torch.as_tensor(max_num_steps, dtype=torch.int32, device=y0.device)
        here = dict(dtype=y0.dtype, device=y0.device)
        alpha, beta, c_sol, c_error = self.tableau
        self.tableau = _ButcherTableau(
            alpha.to(**here), [row.to(**here) for row in beta], c_sol.to(**here), c_error.to(**here)
        )
        self.mid = self.mid.to(**here)

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """Names of the callbacks that the solver calls."""
        own = {"callback_step", "callback_accept_step", "callback_reject_step"}
        return super().valid_callbacks() | own

    # ---- on pycnf's stepper ----------------------------------------------------------------------

    def on_pycnf(
        self, problem: Problem, field: Callable, tape: list | None
    ) -> AdaptiveSolver | None:
        """pycnf's solver of the same solve; None if this class has steps of its own."""
        norm = self.norm if problem.shapes is None else getattr(self.norm, "norm", None)
        same = self.func is field and self.y0 is problem.y0 and norm is problem.norm
        if not same or not is_unchanged(type(self), _STEPPING, self):
            return None
        return self._compiled(problem, tape)

    def _compiled(self, problem: Problem, tape: list | None) -> AdaptiveSolver:
        return AdaptiveSolver(
            replace(problem, rtol=self.rtol, atol=self.atol), self._compiled_tableau(),
            type(self).__name__, tape, first_step=self.first_step, step_t=self.step_t,
            jump_t=self.jump_t, dtype=self.dtype, safety=self.safety, ifactor=self.ifactor,
            dfactor=self.dfactor, min_step=self.min_step, max_step=self.max_step,
            max_num_steps=self.max_num_steps,
        )  # fmt: skip

    def _compiled_tableau(self) -> Tableau:
        alpha, beta, b, e = self.tableau
        reused = bool(b[-1] == 0) and torch.equal(b[:-1], beta[-1])
        rows = [[], *(row.tolist() for row in beta)]
        return Tableau(
            type(self).__name__, self.order, len(b), True, reused,
            [0.0, *alpha.tolist()], rows, b.tolist(), e.tolist(), self.mid.tolist(),
        )  # fmt: skip

    def integrate(self, t: Tensor) -> Tensor:
        """States at ascending times t, [len(t), *y0.shape]."""
        if is_unchanged(type(self), _STEPPING, self):
            return self._compiled(problem_of(self, t), None).integrate()
        return super().integrate(t)

    # ---- step by step ----------------------------------------------------------------------------

    def _before_integrate(self, t: Tensor) -> None:
        t0 = t[0]
        f0 = self.func(t0, self.y0)
        step = self.first_step
        if step is None:
            step = _select_initial_step(
                self.func, t0, self.y0, self.order - 1, self.rtol, self.atol, self.norm, f0=f0
            )
        self.rk_state = _RungeKuttaState(self.y0, f0, t0, t0, step, [self.y0] * 5)
        for name, index in (("step_t", "next_step_index"), ("jump_t", "next_jump_index")):
            points = getattr(self, name)
            if points is None:
                points = torch.tensor([], dtype=self.dtype, device=self.y0.device)
            points = points[points >= t0].sort().values
            setattr(self, name, points)
            setattr(self, index, min(bisect.bisect(points.tolist(), t0), len(points) - 1))
        both = torch.cat([self.step_t, self.jump_t])
        if len(both.unique()) < len(both):
            raise ValueError(
                "`step_t` and `jump_t` must not have any repeated elements between them."
            )

    def _advance(self, next_t: Tensor) -> Tensor:
        taken = 0
        while next_t > self.rk_state.t1:
            taken = self._count(taken)
            self.rk_state = self._adaptive_step(self.rk_state)
        return self._evaluate(next_t)

    def _advance_until_event(self, event_fn: Callable) -> tuple[Tensor, Tensor]:
        def sign() -> Tensor:
            return torch.sign(event_fn(self.rk_state.t1, self.rk_state.y1))

        sign0, taken = sign(), 0
        if sign0 == 0:
            return self.rk_state.t1, self.rk_state.y1
        while sign() == sign0:
            taken = self._count(taken)
            self.rk_state = self._adaptive_step(self.rk_state)
        state = self.rk_state
        return find_event(self._evaluate, sign0, state.t0, state.t1, event_fn, self.atol)

    def _count(self, taken: int) -> int:
        limit = self.max_num_steps
        assert taken < limit, f"max_num_steps exceeded ({taken}>={limit})"
        return taken + 1

    def _evaluate(self, t: Tensor) -> Tensor:
        state = self.rk_state
        return _interp_evaluate(state.interp_coeff, state.t0, state.t1, t)

    def _adaptive_step(self, rk_state: _RungeKuttaState) -> _RungeKuttaState:
        """Attempts a step; the state after it, or that before it with a smaller next attempt."""
        y0, f0, _, t0, dt, interp_coeff = rk_state
        dt = (dt if torch.isfinite(dt) else self.min_step).clamp(self.min_step, self.max_step)
        self._notify("callback_step", t0, y0, dt)
        assert t0 + dt > t0, f"underflow in dt {dt.item()}"
        assert torch.isfinite(y0).all(), f"non-finite values in state `y`: {y0}"
        t1, wished, stop = t0 + dt, dt, None
        for name, index in (("step_t", "next_step_index"), ("jump_t", "next_jump_index")):
            points = getattr(self, name)
            if len(points) and t0 < points[getattr(self, index)] < t0 + wished:
                # A jump within what step_t has left of the step wins.
                stop, t1 = index, points[getattr(self, index)]
                wished = t1 - t0
        dt = wished
        y1, f1, error, k = _runge_kutta_step(self.func, y0, f0, t0, dt, t1, tableau=self.tableau)
        ratio = _compute_error_ratio(error, self.rtol, self.atol, y0, y1, self.norm)
        if (ratio <= 1 and dt <= self.max_step) or dt <= self.min_step:
            self._notify("callback_accept_step", t0, y0, dt)
            interp_coeff = self._interp_fit(y0, y1, k, dt)
            if stop is not None:
                points = self.step_t if stop == "next_step_index" else self.jump_t
                setattr(self, stop, min(getattr(self, stop) + 1, len(points) - 1))
            if stop == "next_jump_index":
                f1 = self.func(t1, y1, perturb=Perturb.NEXT)
        else:
            self._notify("callback_reject_step", t0, y0, dt)
            t1, y1, f1 = t0, y0, f0
        size = _optimal_step_size(
            dt, ratio, self.safety, self.ifactor, self.dfactor, self.order
        ).clamp(self.min_step, self.max_step)
        return _RungeKuttaState(y1, f1, t0, t1, size, interp_coeff)

    def _notify(self, name: str, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        getattr(self.func, name, _null_callback)(t0, y0, dt)

    def _interp_fit(self, y0: Tensor, y1: Tensor, k: Tensor, dt: Tensor) -> list[Tensor]:
        dt = dt.type_as(y0)
        middle = y0 + (k * (dt * self.mid)).sum(-1).view_as(y0)
        return _interp_fit(y0, y1, middle, k[..., 0], k[..., -1], dt)


_STEPPING = parts(
    RKAdaptiveStepsizeODESolver,
    *("integrate", "_before_integrate", "_advance", "_adaptive_step", "_interp_fit", "_count"),
    *("_evaluate", "_notify"),
)
