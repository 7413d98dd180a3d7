"""Steps shared by the batch: one t and one h, chosen by the error norm of the whole state.

The state is one flat row [N]; what its parts mean is the `System`'s business, so the same loops
solve a flow and its adjoint. The stages run in compiled ops around the field's evaluations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from pycnf.odeint.stepper import Rows
from pycnf.odeint.tableau import Tableau

from .control import (
    CLOSE,
    AdaptiveControl,
    FixedControl,
    initial_step,
    stage_times,
    trial_step,
)
from .errors import SolveError

# A step this small, relative to the interval, is no step any more.
TINY = 1e-13


@dataclass(frozen=True)
class Step:
    """An accepted step, and how it moves with the ends of the interval.

    Attributes:
        t, h, t_next: Start, signed size and end.
        t_slope: (∂t/∂start, ∂t/∂end); sizes are constants of the gradient, all but the last.
        h_slope: (∂h/∂start, ∂h/∂end).
    """

    t: float
    h: float
    t_next: float
    t_slope: tuple[float, float] = (1.0, 0.0)
    h_slope: tuple[float, float] = (0.0, 0.0)


def slopes(
    control: AdaptiveControl | FixedControl, i: int, count: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """How step i of `count` moves with the ends of the interval: its t and its h."""
    if isinstance(control, FixedControl) and control.num_steps is not None:
        ahead = i / count
        return (1 - ahead, ahead), (-1 / count, 1 / count)
    return (1.0, 0.0), ((-1.0, 1.0) if i == count - 1 else (0.0, 0.0))


class System(Protocol):
    """A system of differential equations with a flat state.

    Attributes:
        segments: Pairs (begin, end) of the state: the error norm is the largest RMS of any.
    """

    segments: list[int]

    def at(
        self, times: Sequence[float], stages: Sequence[int], h: float
    ) -> list[Callable[[Tensor], list[Tensor]]]:
        """The right-hand side at the times of some stages: functions of the flat state.

        They are called in the order of the stages, the first stage once for all attempts of a
        step (h is 0 then); h is the size of the step.
        """

    def trial(self, time: float, y: Tensor) -> list[Tensor]:
        """The right-hand side for the choice of the first step, which belongs to no step."""

    def accept(self, step: Step, y: Tensor, tableau: Tableau) -> None:
        """Hears of an accepted step and the state it began with."""

    def errors_of_samples(self, ratio: Tensor) -> Tensor:
        """The error norm of every sample [B], for messages, from the scaled error [N]."""


@dataclass
class Outcome:
    """Where a solve ended.

    Attributes:
        y: State at the end.
        step_size: What the controller would try next.
        accepted, rejected: Numbers of steps.
    """

    y: Tensor
    step_size: float
    accepted: int
    rejected: int


def integrate(
    system: System,
    y: Tensor,
    start: float,
    end: float,
    tableau: Tableau,
    control: AdaptiveControl | FixedControl,
    first: Sequence[Tensor] | None = None,
) -> Outcome:
    """Solves a system from start to end, without a graph.

    Args:
        system: Right-hand side; hears of every accepted step.
        y: Flat state at the start [N], contiguous.
        start, end: Times; the last step ends on `end` exactly.
        tableau, control: The method and its steps.
        first: The right-hand side at the start, if it is known.

    Returns:
        The state at the end, and counts.

    Raises:
        SolveError: Too many steps, a step too small, or values that are not finite.
    """
    if isinstance(control, FixedControl):
        return _Fixed(system, tableau, y).run(y, control.grid(start, end), control, first)
    return _Adaptive(system, tableau, control, y, start, end).run(first)


class _Fixed:
    """A solve on a grid."""

    def __init__(self, system: System, tableau: Tableau, y: Tensor) -> None:
        self.system = system
        self.tableau = tableau
        self.rows = Rows(tableau, y)

    def run(
        self,
        y: Tensor,
        grid: list[float],
        control: FixedControl,
        first: Sequence[Tensor] | None,
    ) -> Outcome:
        count = len(grid) - 1
        for i, (t, t_next) in enumerate(pairwise(grid)):
            step = Step(t, t_next - t, t_next, *slopes(control, i, count))
            y1 = self._step(y, step, first if i == 0 else None)
            if not torch.isfinite(y1).all():
                raise SolveError(
                    f"values are not finite at t = {t_next:.6g} after a step of size "
                    f"{abs(step.h):.3g}: sample {_worst(self.system, y1 - y1)}. Take smaller "
                    "steps, or an adaptive method"
                )
            self.system.accept(step, y, self.tableau)
            y = y1
        return Outcome(y, abs(grid[-1] - grid[-2]), count, 0)

    def _step(self, y: Tensor, step: Step, first: Sequence[Tensor] | None) -> Tensor:
        stages = range(self.tableau.stages)
        times = stage_times(self.tableau, step.t, step.h, step.t_next)
        field = self.system.at(times, stages, step.h)
        fresh = field[0](y) if first is None else first
        for i in stages[1:]:
            fresh = field[i](self.rows.stage(y, i, fresh, step.h))
        return self.rows.solve(y, fresh, step.h)


class _Adaptive:
    """A solve by an embedded pair: step, estimate the error, accept or reject, choose the next."""

    def __init__(
        self,
        system: System,
        tableau: Tableau,
        control: AdaptiveControl,
        y: Tensor,
        start: float,
        end: float,
    ) -> None:
        self.system = system
        self.tableau = tableau
        self.control = control
        self.rows = Rows(
            tableau,
            y,
            system.segments,
            torch.tensor(control.rtol, dtype=torch.float64),
            torch.tensor(control.atol, dtype=torch.float64),
        )
        self.y = y
        self.t = start
        self.end = end
        self.length = abs(end - start)
        self.direction = math.copysign(1.0, end - start)

    def run(self, first: Sequence[Tensor] | None) -> Outcome:
        self._evaluate_first(first)
        self._check_start()
        size = self._first_size()
        accepted = rejected = 0
        while True:
            left = abs(self.end - self.t)
            size = min(size, self.control.max_step)
            last = size >= left * (1 - CLOSE)
            taken = left if last else size
            step = Step(
                self.t,
                self.direction * taken,
                self.end if last else self.t + self.direction * taken,
                h_slope=(-1.0, 1.0) if last else (0.0, 0.0),
            )
            exhausted = accepted + rejected + 1 >= self.control.max_num_steps
            ratio = torch.empty_like(self.y) if exhausted else None
            y1, error = self._attempt(step, ratio)
            grown = taken * self.control.factor(error, self.tableau.order)
            if error <= 1:
                accepted += 1
                self.system.accept(step, self.y, self.tableau)
                if last:
                    return Outcome(y1, max(size, grown), accepted, rejected)
                self.y, self.t = y1, step.t_next
            else:
                rejected += 1
            if exhausted:
                self._fail(
                    f"max_num_steps ({self.control.max_num_steps}) exceeded",
                    "loosen rtol and atol, or raise max_num_steps",
                    grown, error, y1, ratio,
                )  # fmt: skip
            if grown < TINY * self.length:
                ratio = torch.empty_like(self.y)
                self.rows.error_norm(self.y, y1, step.h, ratio)
                self._fail(
                    "underflow of the step size",
                    "the field may be stiff or discontinuous there, or the tolerances too tight",
                    grown, error, y1, ratio,
                )  # fmt: skip
            if error <= 1:
                if self.tableau.solution_is_last_stage:
                    self.rows.advance()
                else:
                    self._evaluate_first(None)
            size = grown

    def _evaluate_first(self, first: Sequence[Tensor] | None) -> None:
        if first is None:
            first = self.system.at([self.t], [0], 0.0)[0](self.y)
        self.rows.store(0, first)

    def _check_start(self) -> None:
        f0 = self.rows.row(0)
        for what, values in (("the state is", self.y), ("the field is", f0)):
            if not torch.isfinite(values).all():
                raise SolveError(
                    f"{what} not finite at the start of the solve, t = {self.t:.6g}: "
                    f"sample {_worst(self.system, values - values)}"
                )

    def _first_size(self) -> float:
        """Hairer's first step; the field is evaluated once more, within the interval."""
        if self.control.first_step is not None:
            return self.control.first_step
        f0 = self.rows.row(0)
        d0, d1 = self.rows.initial_norms(self.y, f0)
        h0 = trial_step(d0, d1, self.length)
        trial = self.rows.trial(self.y, self.direction * h0)
        self.rows.store(1, self.system.trial(self.t + self.direction * h0, trial))
        d2 = self.rows.initial_norms(self.y, f0, self.rows.row(1))[0] / h0
        if not math.isfinite(d2):
            return h0 * self.control.dfactor
        return initial_step(h0, d1, d2, self.tableau.order, self.length)

    def _attempt(self, step: Step, ratio: Tensor | None) -> tuple[Tensor, float]:
        """The state after a step and its error norm, infinite where values are not finite."""
        stages = range(1, self.tableau.stages)
        times = stage_times(self.tableau, step.t, step.h, step.t_next)[1:]
        fresh: Sequence[Tensor] = []
        y = self.y
        for i, field in zip(stages, self.system.at(times, stages, step.h)):
            y = self.rows.stage(self.y, i, fresh, step.h)
            fresh = field(y)
        y1, norm = self.rows.finish(self.y, y, fresh, step.h, ratio)
        error, finite = norm.tolist()
        return y1, error if finite and math.isfinite(error) else math.inf

    def _fail(
        self, problem: str, remedy: str, size: float, error: float, y1: Tensor, ratio: Tensor
    ) -> NoReturn:
        if error == math.inf:
            problem += " (values are not finite)"
        raise SolveError(
            f"{problem} at t = {self.t:.6g} with step size {size:.3g}; the largest error is that "
            f"of sample {_worst(self.system, ratio + (y1 - y1))}. {remedy[0].upper()}{remedy[1:]}"
        )


def _worst(system: System, ratio: Tensor) -> int:
    """The sample with the largest error, NaN being larger than anything."""
    return int(system.errors_of_samples(ratio).nan_to_num(math.inf, math.inf).argmax())
