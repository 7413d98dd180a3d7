"""The adjoint of a flow: the differential equation of its gradient, backwards in time.

With the cotangent a of z and the constant cotangents μ of the extras,

    ȧ = −∂/∂z (a·f + Σ μ·extras),    d(∂L/∂θ)/dt = −∂/∂θ (the same),

solved from the end to the start together with z, which is computed again (Chen et al. 2018). In the
seminorm the integral over θ is a quadrature: nothing depends on it, so it need not be in the state
(Kidger et al. 2021).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycnf.odeint.tableau import Tableau

from .dynamics import Dynamics
from .per_sample import Steps, rows_of
from .shared import Step


class AdjointSystem:
    """The adjoint for `shared.integrate`: the flat state is [z | a | θ…], without θ for seminorm.

    Args:
        dynamics: Right-hand side of the flow.
        z: State at the end of the flow [B, D].
        others: θ: the tensors that need gradients beside the state.
        context: Given to the field.
        extrabars: Cotangents of the extras, [B] each.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        z: Tensor,
        others: list[Tensor],
        context: Tensor | None,
        extrabars: list[Tensor],
    ) -> None:
        self.dynamics = dynamics
        self.z = z
        self.others = others
        self.context = context
        self.extrabars = extrabars
        self.quadrature = dynamics.problem.gradient == "seminorm"
        self.totals = [torch.zeros_like(other) for other in others] if self.quadrature else []
        self.stages: dict[int, list[Tensor]] = {}
        sizes = [z.numel(), z.numel()]
        if not self.quadrature:
            sizes += [other.numel() for other in others]
        self.sizes = sizes
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.segments = [point for size, end in zip(sizes, ends) for point in (end - size, end)]

    def initial(self, zbar: Tensor) -> Tensor:
        size = sum(self.sizes[2:])
        return torch.cat((self.z.reshape(-1), zbar.reshape(-1), self.z.new_zeros(size)))

    def gradients(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradients by the state at the start and by the others, from the flat state there."""
        _, xbar, *rest = y.split(self.sizes)
        if self.quadrature:
            return xbar.view(self.z.shape), self.totals
        totals = [flat.view(o.shape).to(o.dtype) for flat, o in zip(rest, self.others)]
        return xbar.view(self.z.shape), totals

    def at(
        self, times: Sequence[float], stages: Sequence[int], h: float
    ) -> list[Callable[[Tensor], list[Tensor]]]:
        return [lambda y, t=t, i=i: self._evaluate(t, y, i) for t, i in zip(times, stages)]

    def trial(self, time: float, y: Tensor) -> list[Tensor]:
        return self._evaluate(time, y, 1)  # the step's own second stage comes later

    def _evaluate(self, time: float, y: Tensor, stage: int) -> list[Tensor]:
        z, a, *_ = (part.view(self.z.shape) for part in y.split(self.sizes)[:2])
        t = torch.tensor(time, dtype=z.dtype, device=z.device)
        problem = self.dynamics.problem
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            parts = self.dynamics.evaluate(t, z, self.context, problem.probe, bool(self.extrabars))
        gradients = _pull(self.dynamics, parts, [z, *self.others], (a, *self.extrabars))
        fresh = [parts[0].detach(), -gradients[0]]
        if self.quadrature:
            self.stages[stage] = gradients[1:]
            return fresh
        return fresh + [-gradient for gradient in gradients[1:]]

    def accept(self, step: Step, y: Tensor, tableau: Tableau) -> None:
        if not self.quadrature:
            return
        for stage, weight in enumerate(tableau.b):
            if weight != 0:
                for total, gradient in zip(self.totals, self.stages[stage]):
                    total.sub_(gradient, alpha=step.h * weight)
        if tableau.solution_is_last_stage:
            self.stages[0] = self.stages[tableau.stages - 1]

    def errors_of_samples(self, ratio: Tensor) -> Tensor:
        z, a, *_ = ratio.split(self.sizes)
        errors = [part.view(self.z.shape).square().mean(1).sqrt() for part in (z, a)]
        return torch.maximum(*errors)


class AdjointRows:
    """The adjoint for `integrate_per_sample`: a sample's row is [z | a], θ is a quadrature.

    Args:
        dynamics: Right-hand side of the flow.
        features: D.
        others: θ: the tensors that need gradients beside the state.
        context: Given to the field.
        extrabars: Cotangents of the extras, [B] each.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        features: int,
        others: list[Tensor],
        context: Tensor | None,
        extrabars: list[Tensor],
    ) -> None:
        self.dynamics = dynamics
        self.others = others
        self.context = context
        self.extrabars = extrabars
        self.totals = [torch.zeros_like(other) for other in others]
        self.columns = [(0, features), (features, 2 * features)]

    def evaluate(self, t: Tensor, y: Tensor, rows: Tensor, stage: int) -> Tensor:
        z, a = y.chunk(2, 1)
        parts, z = self._parts(t, z, rows)
        bars = (a, *(bar[rows] for bar in self.extrabars))
        (gradient,) = _pull(self.dynamics, parts, [z], bars)
        return torch.cat((parts[0].detach(), -gradient), 1)

    def accept(self, steps: Steps, states: Sequence[Tensor]) -> None:
        """Adds the steps' part of the integral over θ, evaluating their stages once more.

        Which samples are accepted, and so count, is known only after the attempt.
        """
        if not self.others:
            return
        tableau = self.dynamics.problem.tableau
        for i, weight in enumerate(tableau.b):
            if weight == 0:
                continue
            z, a = states[i].chunk(2, 1)
            parts, _ = self._parts(steps.stage_time(tableau.c[i]).to(z.dtype), z, steps.rows)
            scale = -weight * steps.h.to(z.dtype)
            bars = (scale.unsqueeze(1) * a, *(scale * bar[steps.rows] for bar in self.extrabars))
            for total, gradient in zip(self.totals, _pull(self.dynamics, parts, self.others, bars)):
                total.add_(gradient)

    def _parts(self, t: Tensor, z: Tensor, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        with torch.enable_grad():
            z = z.detach().contiguous().requires_grad_()
            context, probe = rows_of(self.dynamics, self.context, rows)
            return self.dynamics.evaluate(t, z, context, probe, bool(self.extrabars)), z


def _pull(
    dynamics: Dynamics,
    parts: Sequence[Tensor],
    inputs: list[Tensor],
    bars: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of Σ bar·part by the inputs; zeros where nothing depends."""
    pairs = [(part, bar) for part, bar in zip(parts, bars) if part.requires_grad]
    if not pairs:
        return [torch.zeros_like(value) for value in inputs]
    return list(
        torch.autograd.grad(
            [part for part, _ in pairs],
            inputs,
            [bar for _, bar in pairs],
            allow_unused=True,
            materialize_grads=True,
            retain_graph=not dynamics.forward_mode,
        )
    )
