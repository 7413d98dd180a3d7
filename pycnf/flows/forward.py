"""A flow's own system of equations: its state, its tape, and one step again with a graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycnf.odeint.stepper import combine
from pycnf.odeint.tableau import Tableau

from .control import stage_times
from .dynamics import Dynamics, Parts
from .shared import Step


@dataclass(frozen=True)
class Taped:
    """An accepted step and the state z [B, D] it began with."""

    step: Step
    z: Tensor


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

    def at(
        self, times: Sequence[float], stages: Sequence[int]
    ) -> list[Callable[[Tensor], list[Tensor]]]:
        t = torch.tensor(times, dtype=self.x.dtype, device=self.x.device)
        fields = self.dynamics.at(t, self.x, self.context, [self.dynamics.full[i] for i in stages])
        return [lambda y, field=field: self.parts(field(self.split(y)[0])) for field in fields]

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
    # The last stage of a first-same-as-last method does not enter the solution.
    used = 1 + max(i for i, weight in enumerate(weights) if weight != 0)
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
        zi = z if i == 0 else _sum(z, stages, 0, tableau.a[i], taped.h, h_graph)
        stages.append(field(zi))
    return [
        _sum(state, stages, part, weights, taped.h, h_graph)
        for part, state in enumerate((z, *extras))
    ]


def _sum(
    state: Tensor,
    stages: list[tuple[Tensor, ...]],
    part: int,
    weights: Sequence[float],
    h: float,
    h_graph: Tensor | None,
) -> Tensor:
    """The state plus h Σ wⱼ kⱼ over the stages that have a weight, for one part of the state."""
    terms = [(stage[part], weight) for stage, weight in zip(stages, weights) if weight != 0]
    if not terms:
        return state
    return combine(state, [k for k, _ in terms], [weight for _, weight in terms], h, h_graph)
