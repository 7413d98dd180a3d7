"""Steps per sample: every sample has its own t and h, and leaves when it is done.

The state is a matrix with a row per sample, in plain PyTorch operations. A sample's result depends
on the others no further than the rounding of the products they share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from pycnf.odeint.tableau import Tableau

from .control import CLOSE, AdaptiveControl
from .dynamics import Dynamics
from .errors import SolveError
from .shared import TINY


@dataclass(frozen=True)
class Steps:
    """Accepted steps of some samples, all tensors [A] in f64 but `rows` and `last`.

    Attributes:
        rows: Which samples.
        t, h, t_next: Start, signed size and end.
        last: Whether the step ends the solve, so that its size moves with the end.
    """

    rows: Tensor
    t: Tensor
    h: Tensor
    t_next: Tensor
    last: Tensor

    def __getitem__(self, mask: Tensor) -> "Steps":
        return Steps(
            self.rows[mask], self.t[mask], self.h[mask], self.t_next[mask], self.last[mask]
        )

    def stage_time(self, c: float) -> Tensor:
        return self.t_next if c == 1 else self.t + c * self.h


class RowSystem(Protocol):
    """A system of differential equations with a row of state per sample.

    Attributes:
        columns: (begin, end) of the parts of a row: a sample's error is the largest RMS of any.
    """

    columns: list[tuple[int, int]]

    def evaluate(self, t: Tensor, y: Tensor, rows: Tensor, stage: int) -> Tensor:
        """The right-hand side [A, W] at t [A] for the states [A, W] of the samples `rows`."""

    def accept(self, steps: Steps, states: Sequence[Tensor]) -> None:
        """Hears of accepted steps and the states [A, W] of all their stages."""


@dataclass
class RowsOutcome:
    """Where a solve ended: the states [B, W] and counts per sample [B]."""

    y: Tensor
    accepted: Tensor
    rejected: Tensor


def integrate_per_sample(
    system: RowSystem,
    y: Tensor,
    start: float,
    end: float,
    tableau: Tableau,
    control: AdaptiveControl,
    first: Tensor | None = None,
) -> RowsOutcome:
    """Solves a system from start to end for every sample by itself, without a graph.

    Args:
        system: Right-hand side; hears of every accepted step.
        y: States at the start [B, W].
        start, end: Times; every sample's last step ends on `end` exactly.
        tableau, control: The method (an embedded pair) and its steps.
        first: The right-hand side at the start [B, W], if it is known.

    Returns:
        States at the end, and counts.

    Raises:
        SolveError: As for `shared.integrate`.
    """
    return _Samples(system, y, start, end, tableau, control).run(first)


class _Samples:
    def __init__(
        self,
        system: RowSystem,
        y: Tensor,
        start: float,
        end: float,
        tableau: Tableau,
        control: AdaptiveControl,
    ) -> None:
        self.system = system
        self.tableau = tableau
        self.control = control
        self.end = end
        self.length = abs(end - start)
        self.direction = math.copysign(1.0, end - start)
        self.y = y
        self.rows = torch.arange(y.shape[0], device=y.device)
        self.t = torch.full((y.shape[0],), start, dtype=torch.float64, device=y.device)
        self.a = [y.new_tensor(row) for row in tableau.a]
        self.b, self.e = y.new_tensor(tableau.b), y.new_tensor(tableau.e)

    def run(self, first: Tensor | None) -> RowsOutcome:
        f0 = self._evaluate(self.t, self.y, self.rows, 0) if first is None else first
        self._check_start(f0)
        size = self._first_sizes(f0)
        result = torch.empty_like(self.y)
        accepted, rejected = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        attempts = 0
        while self.rows.numel():
            size = size.clamp(max=self.control.max_step)
            left = (self.end - self.t).abs()
            last = size >= left * (1 - CLOSE)
            taken = torch.where(last, left, size)
            t_next = torch.where(last, self.end, self.t + self.direction * taken)
            steps = Steps(self.rows, self.t, self.direction * taken, t_next, last)
            y1, k, states, error = self._attempt(steps, f0)
            attempts += 1
            good = error <= 1
            if good.any():
                self.system.accept(steps[good], [state[good] for state in states])
            accepted[self.rows] += good
            rejected[self.rows] += ~good
            size = taken * self._factors(error)
            done = good & last
            result[self.rows[done]] = y1[done]
            self.y = torch.where(good[:, None], y1, self.y)
            self.t = torch.where(good, t_next, self.t)
            stay = ~done
            if attempts >= self.control.max_num_steps and stay.any():
                self._fail(
                    f"max_num_steps ({self.control.max_num_steps}) exceeded",
                    "Loosen rtol and atol, or raise max_num_steps",
                    stay, size, error,
                )  # fmt: skip
            if (stay & (size < TINY * self.length)).any():
                self._fail(
                    "underflow of the step size",
                    "The field may be stiff or discontinuous there, or the tolerances too tight",
                    stay & (size < TINY * self.length), size, error,
                )  # fmt: skip
            if self.tableau.solution_is_last_stage:
                f0 = torch.where(good[:, None], k[-1], f0)
            elif (good & stay).any():
                fresh = good & stay
                f0 = f0.clone()
                f0[fresh] = self._evaluate(self.t[fresh], self.y[fresh], self.rows[fresh], 0)
            if not stay.all():
                self.rows, self.t, self.y = self.rows[stay], self.t[stay], self.y[stay]
                f0, size = f0[stay], size[stay]
        return RowsOutcome(result, accepted, rejected)

    def _evaluate(self, t: Tensor, y: Tensor, rows: Tensor, stage: int) -> Tensor:
        return self.system.evaluate(t.to(y.dtype), y, rows, stage)

    def _attempt(self, steps: Steps, f0: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Solution, stage derivatives, stage states, and error per sample (inf: not finite)."""
        y, h = self.y, steps.h.to(self.y.dtype).unsqueeze(1)
        k = f0.new_empty(self.tableau.stages, *f0.shape)
        k[0] = f0
        states = [y]
        for i in range(1, self.tableau.stages):
            yi = y + h * torch.tensordot(self.a[i], k[:i], 1)
            states.append(yi)
            k[i] = self._evaluate(steps.stage_time(self.tableau.c[i]), yi, self.rows, i)
        if self.tableau.solution_is_last_stage:
            y1 = states[-1]
        else:
            y1 = y + h * torch.tensordot(self.b, k, 1)
        error = self._norms(h * torch.tensordot(self.e, k, 1), torch.maximum(y.abs(), y1.abs()))
        finite = torch.isfinite(y1).all(1) & torch.isfinite(error)
        return y1, k, states, torch.where(finite, error, math.inf)

    def _norms(self, values: Tensor, size: Tensor) -> Tensor:
        """Every sample's norm [A], in f64."""
        ratio = values / (self.control.atol + self.control.rtol * size)
        parts = [
            ratio[:, begin:end].double().square().mean(1) for begin, end in self.system.columns
        ]
        return torch.stack(parts).amax(0).sqrt()

    def _factors(self, error: Tensor) -> Tensor:
        """`AdaptiveControl.factor` of every sample."""
        control = self.control
        least = torch.where(error < 1, torch.ones_like(error), control.dfactor)
        grown = torch.maximum(control.safety * error ** (-1 / self.tableau.order), least)
        return grown.clamp(max=control.ifactor)

    def _first_sizes(self, f0: Tensor) -> Tensor:
        """Hairer's first step of every sample (see `control`)."""
        if self.control.first_step is not None:
            return torch.full_like(self.t, self.control.first_step)
        order, y = self.tableau.order, self.y
        d0, d1 = self._norms(y, y.abs()), self._norms(f0, y.abs())
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=self.length)
        trial = y + (self.direction * h0).to(y.dtype).unsqueeze(1) * f0
        f1 = self._evaluate(self.t + self.direction * h0, trial, self.rows, 0)
        d2 = self._norms(f1 - f0, y.abs()) / h0
        h1 = torch.where(
            (d1 <= 1e-15) & (d2 <= 1e-15),
            (h0 * 1e-3).clamp(min=1e-6),
            (0.01 / torch.maximum(d1, d2)) ** (1 / order),
        )
        first = torch.minimum(100 * h0, h1).clamp(max=self.length)
        return torch.where(torch.isfinite(d2), first, h0 * self.control.dfactor)

    def _check_start(self, f0: Tensor) -> None:
        for what, values in (("the state is", self.y), ("the field is", f0)):
            bad = ~torch.isfinite(values).all(1)
            if bad.any():
                raise SolveError(
                    f"{what} not finite at the start of the solve, t = {self.t[0].item():.6g}: "
                    f"sample {int(bad.int().argmax())}"
                )

    def _fail(
        self, problem: str, remedy: str, who: Tensor, size: Tensor, error: Tensor
    ) -> NoReturn:
        worst = int(torch.where(who, error, -math.inf).argmax())
        if error[worst] == math.inf:
            problem += " (values are not finite)"
        raise SolveError(
            f"{problem} at t = {self.t[worst].item():.6g} with step size "
            f"{size[worst].item():.3g}; the largest error is that of sample "
            f"{int(self.rows[worst])}. {remedy}"
        )


@dataclass(frozen=True)
class TapedRows:
    """Accepted steps and the states z [A, D] they began with."""

    step: Steps
    z: Tensor


class ForwardRows:
    """The flow for `integrate_per_sample`: a sample's row is [z | ℓ | regularizers].

    Args:
        dynamics: Right-hand side.
        x: States at the start [B, D].
        context: Given to the field.
        tape: Receives accepted steps, or None.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        x: Tensor,
        context: Tensor | None,
        tape: list[TapedRows] | None,
    ) -> None:
        self.dynamics = dynamics
        self.x = x
        self.context = context
        self.tape = tape
        self.extras = dynamics.problem.extras
        features = x.shape[1]
        self.columns = [(0, features)] + ([(features, features + 1)] if self.extras else [])

    def initial(self) -> Tensor:
        return torch.cat((self.x, self.x.new_zeros(self.x.shape[0], self.extras)), 1)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        features = self.x.shape[1]
        return y[:, :features], *y[:, features:].unbind(1)

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Rows of the right-hand side from its parts; extras that were not evaluated are zero."""
        if len(parts) == 1 and self.extras:
            return torch.cat((parts[0], parts[0].new_zeros(parts[0].shape[0], self.extras)), 1)
        return torch.cat((parts[0], *(extra.unsqueeze(1) for extra in parts[1:])), 1)

    def evaluate(self, t: Tensor, y: Tensor, rows: Tensor, stage: int) -> Tensor:
        context, probe = rows_of(self.dynamics, self.context, rows)
        z = self.split(y)[0].contiguous()
        return self.join(self.dynamics.evaluate(t, z, context, probe, self.dynamics.full[stage]))

    def accept(self, steps: Steps, states: Sequence[Tensor]) -> None:
        if self.tape is not None:
            self.tape.append(TapedRows(steps, self.split(states[0])[0].clone()))


def rows_of(
    dynamics: Dynamics, context: Tensor | None, rows: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The context and the probe of some samples."""
    probe = dynamics.problem.probe
    if context is not None and context.dim() > 1:
        context = context[rows]
    return context, None if probe is None else probe[:, rows]


def steps_with_graph(
    dynamics: Dynamics,
    taped: Steps,
    z: Tensor,
    extras: Sequence[Tensor],
    context: Tensor | None,
    shifts: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """`forward.step_with_graph` for accepted steps of some samples; z and extras are theirs."""
    tableau = dynamics.problem.tableau
    used = tableau.stages_in_use
    context, probe = rows_of(dynamics, context, taped.rows)
    if shifts is not None:
        start, end = shifts
        t, h = taped.t + start, taped.h + taped.last * (end - start)
        taped = Steps(taped.rows, t, h, t + h, taped.last)
    h = taped.h.to(z.dtype)

    def total(state: Tensor, part: int, weights: Sequence[float]) -> Tensor:
        terms = [stage[part] * w for stage, w in zip(stages, weights) if w != 0]
        step = h.unsqueeze(1) if state.dim() == 2 else h
        return state + step * torch.stack(terms).sum(0)

    stages: list[tuple[Tensor, ...]] = []
    for i in range(used):
        zi = z if i == 0 else total(z, 0, tableau.a[i])
        t = taped.stage_time(tableau.c[i]).to(z.dtype)
        full = bool(extras) and tableau.b[i] != 0
        stages.append(dynamics.evaluate(t, zi, context, probe, full))
    return [total(state, part, tableau.b) for part, state in enumerate((z, *extras))]
