"""A flow's own system of equations: its state, its tape, and one step again with a graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycnf.odeint.stepper import combine
from pycnf.odeint.tableau import Tableau

from .control import stage_times
from .dynamics import Dynamics, Field, Parts
from .parameters import Start
from .shared import Step


@dataclass
class Taped:
    """An accepted step and the state z [B, D] it began with.

    Attributes:
        kept: z and the extras' increments at the step's end, with their graph back to z (a leaf
            then) and to everything else; None where the step is to be computed again.
    """

    step: Step
    z: Tensor
    kept: list[Tensor] | None = None


class ForwardSystem:
    """The flow for `shared.integrate`: the flat state is [z | ℓ | regularizers].

    Args:
        dynamics: Right-hand side.
        x: State at the start [B, D].
        context: Given to the field.
        tape: Receives every accepted step, or None.
    """

    def __init__(
        self, dynamics: Dynamics, x: Tensor, context: Tensor | None, tape: list[Taped] | None
    ) -> None:
        problem = dynamics.problem
        self.dynamics = dynamics
        self.x = x
        self.context = context
        self.tape = tape
        batch, size = x.shape[0], x.numel()
        self.segments = [0, size] + ([size, size + batch] if problem.divergence else [])
        self.zeros = list(x.new_zeros(problem.extras, batch))

    def initial(self) -> Tensor:
        """The flat state at the start."""
        return torch.cat((self.x.reshape(-1), *self.zeros))

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """z [B, D], ℓ [B], … of a flat state, as views."""
        z, *extras = y.split([self.x.numel()] + [self.x.shape[0]] * len(self.zeros))
        return z.view(self.x.shape), *extras

    def fields(self, times: Sequence[float], stages: Sequence[int]) -> list[Field]:
        """The right-hand side at the times of some stages, as functions of z."""
        t = torch.tensor(times, dtype=self.x.dtype, device=self.x.device)
        return self.dynamics.at(t, self.x, self.context, [self.dynamics.full[i] for i in stages])

    def at(
        self, times: Sequence[float], stages: Sequence[int], h: float
    ) -> list[Callable[[Tensor], list[Tensor]]]:
        return [
            lambda y, field=field: self.parts(field(self.split(y)[0]))
            for field in self.fields(times, stages)
        ]

    def trial(self, time: float, y: Tensor) -> list[Tensor]:
        return self.parts(self.fields([time], [0])[0](self.split(y)[0]))

    def parts(self, parts: Parts) -> list[Tensor]:
        """Parts for the stepper: extras that were not evaluated are zero."""
        return [*parts, *self.zeros] if len(parts) == 1 else list(parts)

    def accept(self, step: Step, y: Tensor, tableau: Tableau) -> None:
        if self.tape is not None:
            self.tape.append(Taped(step, self.split(y)[0]))

    def errors_of_samples(self, ratio: Tensor) -> Tensor:
        z, *extras = self.split(ratio)
        errors = z.square().mean(1).sqrt()
        return torch.maximum(errors, extras[0].abs()) if extras else errors


class KeepingSystem(ForwardSystem):
    """The same, keeping the graphs of accepted steps while they fit in memory.

    A step's gradient then costs no evaluation. Stages run once, with a graph from the state at the
    step's start, a leaf; the stepper gets their values.

    Args:
        dynamics: Right-hand side.
        start: The evaluation at the start, with its graph.
        tape: Receives every accepted step.
        budget: Bytes that graphs may take; later steps are computed again in the gradient.
    """

    def __init__(self, dynamics: Dynamics, start: Start, tape: list[Taped], budget: int) -> None:
        super().__init__(dynamics, start.z.detach(), start.context, tape)
        self.tableau = dynamics.problem.tableau
        self.left = budget
        self.bytes_of_step = start.nbytes * (self.tableau.stages - 1 or 1)
        self.keeping = self.left >= self.bytes_of_step
        # The leaf at the start of the step, and the stages evaluated since; and the same for the
        # next step, where the last stage is its first.
        self.now: tuple[Tensor, list[Parts]] = (start.z, [start.parts])
        self.next: tuple[Tensor, list[Parts]] | None = None

    def at(
        self, times: Sequence[float], stages: Sequence[int], h: float
    ) -> list[Callable[[Tensor], list[Tensor]]]:
        if not self.keeping:
            return super().at(times, stages, h)
        with torch.enable_grad():
            fields = self.fields(times, stages)
        return [
            lambda y, field=field, stage=stage: self._keep(field, stage, h, y)
            for field, stage in zip(fields, stages)
        ]

    def _keep(self, field: Field, stage: int, h: float, y: Tensor) -> list[Tensor]:
        begins_next = self.tableau.solution_is_last_stage and stage == self.tableau.stages - 1
        with torch.enable_grad():
            if stage == 0 or begins_next:
                z = self.split(y)[0].detach().requires_grad_()
                parts = field(z)
                if stage == 0:
                    self.now = (z, [parts])
                else:
                    self.next = (z, [parts])
            else:
                z, done = self.now
                done[stage:] = []
                parts = field(weighted_sum(z, done, 0, self.tableau.a[stage], h))
                done.append(parts)
        return self.parts(tuple(part.detach() for part in parts))

    def accept(self, step: Step, y: Tensor, tableau: Tableau) -> None:
        if not self.keeping:
            super().accept(step, y, tableau)
            return
        z, stages = self.now
        with torch.enable_grad():
            kept = [
                weighted_sum(state, stages, part, tableau.b, step.h)
                for part, state in enumerate((z, *self.zeros))
            ]
        self.tape.append(Taped(step, z, kept))
        if self.next is not None:
            self.now, self.next = self.next, None
        self.left -= self.bytes_of_step
        self.keeping = self.left >= self.bytes_of_step


def step_with_graph(
    dynamics: Dynamics,
    taped: Step,
    z: Tensor,
    extras: Sequence[Tensor],
    context: Tensor | None,
    shifts: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """One accepted step again, in differentiable operations.

    Args:
        dynamics: Right-hand side.
        taped: The step.
        z: State at its start [B, D].
        extras: The extras at its start, each [B]; none if they are not wanted.
        context: Given to the field.
        shifts: Zeros, 0-dim, that stand for the ends of the interval: the gradients of t0 and t1.

    Returns:
        z and the extras at the end of the step.
    """
    tableau = dynamics.problem.tableau
    weights = tableau.b
    used = tableau.stages_in_use
    times = torch.tensor(
        stage_times(tableau, taped.t, taped.h, taped.t_next)[:used],
        dtype=torch.float64 if z.device.type != "mps" else z.dtype,
        device=z.device,
    )
    h_graph = None
    if shifts is not None:
        start, end = shifts
        moved_h = taped.h_slope[0] * start + taped.h_slope[1] * end
        moved_t = taped.t_slope[0] * start + taped.t_slope[1] * end
        times = times + moved_t + times.new_tensor(tableau.c[:used]) * moved_h
        h_graph = (taped.h + moved_h).to(z.dtype)
    full = [bool(extras) and weight != 0 for weight in weights[:used]]
    fields = dynamics.at(times.to(z.dtype), z, context, full)
    stages: list[tuple[Tensor, ...]] = []
    for i, field in enumerate(fields):
        zi = z if i == 0 else weighted_sum(z, stages, 0, tableau.a[i], taped.h, h_graph)
        stages.append(field(zi))
    return [
        weighted_sum(state, stages, part, weights, taped.h, h_graph)
        for part, state in enumerate((z, *extras))
    ]


def weighted_sum(
    state: Tensor,
    stages: list[tuple[Tensor, ...]],
    part: int,
    weights: Sequence[float],
    h: float,
    h_graph: Tensor | None = None,
) -> Tensor:
    """The state plus h Σ wⱼ kⱼ over the stages that have a weight, for one part of the state."""
    terms = [(stage[part], weight) for stage, weight in zip(stages, weights) if weight != 0]
    if not terms:
        return state
    return combine(state, [k for k, _ in terms], [weight for _, weight in terms], h, h_graph)
