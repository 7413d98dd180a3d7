"""The fused engine: a whole solve, and the gradient of a solve, in one call into compiled code."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycnf._ops import mlp_solve, mlp_solve_backward
from pycnf.nn.activation import ACTIVATIONS
from pycnf.nn.closed_form import HIDDEN_LAYERS
from pycnf.nn.layers import Parts
from pycnf.nn.mlp import MLP

from .control import AdaptiveControl
from .dynamics import REGULARIZERS, Dynamics
from .errors import SolveError
from .forward import Taped
from .problem import Problem
from .shared import Step, slopes
from .solve import replayed_gradient

PLACES = {name: place for place, name in enumerate(ACTIVATIONS)}
# In the order of Divergence in csrc/torch/mlp_setup.h.
NO_DIVERGENCE, PROBES, UNIT_VECTORS, CLOSED_FORM = range(4)
# In the order of Status in csrc/torch/mlp_loop.h.
DONE, TOO_MANY_STEPS, UNDERFLOW, STATE_NOT_FINITE, FIELD_NOT_FINITE = range(5)


def solve_fused(
    problem: Problem,
    x: Tensor,
    context: Tensor | None,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Solves a problem whose field is an `MLP`; as `flows.solve.solve`.

    Args:
        problem: What to solve; its stats are filled in.
        x: State at the start [B, D], on the CPU.
        context: Given to the field: [B, C], [C] or None.
        start, end: 0-dim tensors equal to the problem's, where they are to have gradients.

    Returns:
        z at the end [B, D], and its extras, [B] each.

    Raises:
        SolveError: The solve cannot go on.
    """
    field = problem.field
    problem.stats.engine = "fused"
    field.check(x, context)
    if x.shape[0] == 0:
        zero = x.sum(1)
        return x.clone(), *(zero.clone() for _ in range(problem.extras))
    offset = None
    if context is not None:
        offset = F.linear(context, field.layers[0].context_weight)
        offset = offset.expand(x.shape[0], -1)
    tensors = [tensor for layer in field.layers for tensor in layer.parts()]
    inputs = (x, offset, start, end, *tensors)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    z, *extras = _Discrete.apply(problem, needed, *inputs)
    # Compiled code has the regularizers in an order of its own.
    made = dict(zip(_rows(problem), extras[1:]))
    return z, *extras[:1], *(made[name] for name in problem.regularizers if problem.divergence)


def _rows(problem: Problem) -> list[str]:
    return [name for name in REGULARIZERS if name in problem.regularizers]


def _settings(problem: Problem, field: MLP) -> tuple[str, list[int], list[float]]:
    """The ops' `method`, `kind` and `weights`."""
    divergence = NO_DIVERGENCE
    if problem.divergence and problem.probe is not None:
        divergence = PROBES
    elif problem.divergence:
        gated = field.layers[-1].parts().gate_weight is not None
        closed = len(field.hidden) in HIDDEN_LAYERS and "jacobian" not in problem.regularizers
        # With times of their own, samples would need a matrix of their own as well.
        closed = closed and not (problem.per_sample and gated)
        divergence = CLOSED_FORM if closed else UNIT_VECTORS
    kind = [
        PLACES[field.activation.name],
        0 if field.time == "t" else field.time[1],
        divergence,
        *(int(problem.divergence and name in problem.regularizers) for name in REGULARIZERS),
    ]
    weights = [problem.regularizers.get(name, 0.0) * problem.direction for name in REGULARIZERS]
    return problem.tableau.name, kind, [problem.sign, *weights]


def _control(problem: Problem) -> tuple[list[float], list[float]]:
    """The ops' `control` and `grid`."""
    control = problem.control
    if not isinstance(control, AdaptiveControl):
        return [], control.grid(problem.start, problem.end)
    numbers = [
        control.rtol, control.atol, control.first_step or 0.0, control.max_step,
        control.safety, control.ifactor, control.dfactor, float(control.max_num_steps),
    ]  # fmt: skip
    return numbers, []


def _parts(tensors: Sequence[Tensor | None]) -> list[Parts]:
    """The layers' tensors again, from a flat list."""
    size = len(Parts._fields)
    return [Parts(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _stacked(extrabars: Sequence[Tensor | None]) -> Tensor | None:
    """Cotangents of the extras [E, B]; None if there are none."""
    known = [bar for bar in extrabars if bar is not None]
    if not known:
        return None
    return torch.stack([torch.zeros_like(known[0]) if bar is None else bar for bar in extrabars])


class _Discrete(torch.autograd.Function):
    """The solve and the exact gradient of the numbers that were computed.

    Saved are the parameters, so that a change in place between forward and backward is an error and
    no wrong gradient, and the tape. A gradient that is to be differentiated again goes through the
    taped steps on the generic engine.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, needed: bool, x, offset, start, end, *tensors):
        settings = _settings(problem, problem.field)
        numbers, grid = _control(problem)
        # Kept stages know nothing of the rates that a gradient by the interval's ends needs.
        budget = problem.keep_bytes if start is None and end is None else 0
        z, extras, report, *tape = mlp_solve(
            x, problem.probe, offset, tensors, *settings, problem.start, problem.end, numbers, grid,
            budget if needed else -1,
        )  # fmt: skip
        _read_report(problem, report.tolist())
        if needed:
            ctx.problem = problem
            ctx.settings = settings
            ctx.times, ctx.states, ctx.kept = tape
            ctx.save_for_backward(x, offset, start, end, *tensors)
        ctx.set_materialize_grads(False)
        return z, *(extra.clone() for extra in extras)

    @staticmethod
    def backward(ctx: Any, z_bar: Tensor | None, *extrabars: Tensor | None):
        x, offset, start, end, *tensors = ctx.saved_tensors
        problem = ctx.problem
        if torch.is_grad_enabled():
            steps = [Taped(step, x) for step in _steps(problem, ctx.times)]
            return None, None, *_differentiable(ctx, steps, (z_bar, *extrabars))
        if z_bar is None:
            z_bar = torch.zeros_like(x)
        needs_start, needs_end = ctx.needs_input_grad[4:6]
        x_bar, offset_bar, bars, times_bar = mlp_solve_backward(
            z_bar, _stacked(extrabars), problem.probe, offset, tensors, *ctx.settings,
            ctx.times, ctx.states, ctx.kept, needs_start or needs_end,
        )  # fmt: skip
        again = sum(block.numel() == 0 for block in ctx.kept[1:])
        # The memory goes; another backward computes the stages again.
        ctx.kept = [block.new_empty(0) for block in ctx.kept]
        problem.stats.nfe_backward += again * problem.tableau.stages_in_use
        ends_bar: list[Tensor | None] = [None, None]
        if needs_start or needs_end:
            steps = _steps(problem, ctx.times)
            by_end = times_bar.new_tensor([[step.t_slope, step.h_slope] for step in steps])
            ends_bar = list((times_bar.unsqueeze(-1) * by_end).sum((0, 1)).unbind())
        return (
            None,
            None,
            x_bar,
            offset_bar if offset is not None else None,
            *(
                bar.to(end) if need else None
                for bar, end, need in zip(ends_bar, (start, end), (needs_start, needs_end))
            ),
            *(None if p is None else bar for p, bar in zip(tensors, bars)),
        )


def _steps(problem: Problem, times: Tensor) -> list[Step]:
    """The accepted steps of a tape."""
    return [
        Step(*numbers, *slopes(problem.control, i, times.shape[0]))
        for i, numbers in enumerate(times.tolist())
    ]


def _differentiable(
    ctx: Any, tape: Sequence[Any], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient by a solve's inputs as a differentiable function of everything."""
    x, offset, start, end, *tensors = ctx.saved_tensors
    problem = ctx.problem
    width = 0 if offset is None else offset.shape[1]
    twin = problem.field.with_parts(_parts(tensors), width)
    z_bar, *extrabars = cotangents
    made = dict(zip(_rows(problem), extrabars[1:]))
    extrabars = [*extrabars[:1], *(made[name] for name in problem.regularizers if made)]
    dynamics = Dynamics(problem.on(twin))
    with torch.autocast(x.device.type, enabled=False):
        return replayed_gradient(
            dynamics,
            tape,
            [x, offset, start, end, *tensors],
            ctx.needs_input_grad[2:],
            (z_bar, *extrabars),
        )


def _read_report(problem: Problem, report: list[float]) -> None:
    """Fills in the stats, or raises what stopped the solve."""
    stats = problem.stats
    accepted, rejected, evaluations, step_size, status, time, size, finite, worst = report
    stats.accepted += int(accepted)
    stats.rejected += int(rejected)
    stats.nfe_forward += int(evaluations)
    if not problem.per_sample:
        stats.step_size = step_size
    check_report(problem, status, time, size, finite, worst)


def check_report(
    problem: Problem, status: float, time: float, size: float, finite: float, worst: float
) -> None:
    """Raises what stopped a solve, if anything did."""
    if status == DONE:
        return
    sample = f"sample {int(worst)}"
    if status in (STATE_NOT_FINITE, FIELD_NOT_FINITE):
        what = "the state is" if status == STATE_NOT_FINITE else "the field is"
        raise SolveError(f"{what} not finite at the start of the solve, t = {time:.6g}: {sample}")
    if not problem.tableau.adaptive:
        raise SolveError(
            f"values are not finite at t = {time:.6g} after a step of size {abs(size):.3g}: "
            f"{sample}. Take smaller steps, or an adaptive method"
        )
    if status == TOO_MANY_STEPS:
        what = f"max_num_steps ({problem.control.max_num_steps}) exceeded"
        remedy = "Loosen rtol and atol, or raise max_num_steps"
    else:
        what = "underflow of the step size"
        remedy = "The field may be stiff or discontinuous there, or the tolerances too tight"
    if not finite:
        what += " (values are not finite)"
    raise SolveError(
        f"{what} at t = {time:.6g} with step size {size:.3g}; the largest error is that of "
        f"{sample}. {remedy}"
    )
