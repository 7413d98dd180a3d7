"""The fused engine: a whole solve, and the gradient of a solve, in one call into compiled code."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycnf._ops import mlp_solve, mlp_solve_backward
from pycnf.nn.activation import ACTIVATIONS
from pycnf.nn.mlp import MLP

from .control import AdaptiveControl
from .errors import SolveError
from .problem import Problem

PLACES = {name: place for place, name in enumerate(ACTIVATIONS)}
# In the order of Status in csrc/torch/mlp_solve_cpu.cpp.
DONE, TOO_MANY_STEPS, UNDERFLOW, STATE_NOT_FINITE, FIELD_NOT_FINITE = range(5)


def solve_fused(problem: Problem, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """Solves a problem whose field is an `MLP`; as `flows.solve.solve`.

    Args:
        problem: What to solve; its stats are filled in.
        x: State at the start [B, D], on the CPU.
        context: Given to the field: [B, C], [C] or None.

    Returns:
        z at the end [B, D], and logdet [B] where the problem has a divergence.

    Raises:
        SolveError: The solve cannot go on.
    """
    field = problem.field
    problem.stats.engine = "fused"
    if x.shape[0] == 0:
        zero = x.sum(1)
        return x.clone(), *(zero.clone() for _ in range(problem.extras))
    offset = None
    if context is not None:
        offset = F.linear(context, field.layers[0].context_weight)
        offset = offset.expand(x.shape[0], -1)
    z, logdet = _Fused.apply(problem, x, offset, *layer_parameters(field))
    return (z, logdet) if problem.divergence else (z,)


def layer_parameters(field: MLP) -> list[Tensor | None]:
    """Weight, bias, gate_weight, gate_bias and shift_weight of every layer, None where it has none.

    A concat layer's weight is seen as two: of the input, and of time, which is a shift.
    """
    found: list[Tensor | None] = []
    for name, layer in zip(field.layer, field.layers):
        weight, shift = layer.weight, getattr(layer, "shift_weight", None)
        if name == "concat":
            width = layer.time_features or 1
            weight, shift = weight[:, width:], weight[:, :width]
        gate = getattr(layer, "gate_weight", None), getattr(layer, "gate_bias", None)
        found += [weight, layer.bias, *gate, shift]
    return found


class _Fused(torch.autograd.Function):
    """The solve and its discrete gradient.

    Saved are the parameters, so that a change in place between forward and backward is an error and
    no wrong gradient, and the tape.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, x, offset, *parameters):
        field, control, tableau = problem.field, problem.control, problem.tableau
        numbers, grid = [], []
        if isinstance(control, AdaptiveControl):
            numbers = [
                control.rtol, control.atol, control.first_step or 0.0, control.max_step,
                control.safety, control.ifactor, control.dfactor, float(control.max_num_steps),
            ]  # fmt: skip
        else:
            grid = control.grid(problem.start, problem.end)
        unit = problem.divergence and problem.probe is None
        ctx.settings = (
            PLACES[field.activation.name],
            0 if field.time == "t" else field.time[1],
            tableau.name,
            unit,
            problem.sign,
        )
        taped = any(ctx.needs_input_grad)
        z, logdet, report, *tape = mlp_solve(
            x, problem.probe, offset, parameters, *ctx.settings, problem.start, problem.end,
            numbers, grid, problem.keep_bytes if taped else -1,
        )  # fmt: skip
        _read_report(problem, report.tolist())
        if taped:
            ctx.problem = problem
            ctx.times, ctx.states, ctx.kept = tape
            ctx.save_for_backward(offset, *parameters)
        ctx.set_materialize_grads(False)
        return z, logdet

    @staticmethod
    def backward(ctx: Any, z_bar: Tensor | None, logdet_bar: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of a fused solve cannot be differentiated again (create_graph=True); "
                "use engine='generic'"
            )
        offset, *parameters = ctx.saved_tensors
        problem = ctx.problem
        if z_bar is None:
            z_bar = logdet_bar.new_zeros(logdet_bar.shape[0], problem.field.features)
        x_bar, offset_bar, bars = mlp_solve_backward(
            z_bar, logdet_bar, problem.probe, offset, parameters, *ctx.settings,
            ctx.times, ctx.states, ctx.kept,
        )  # fmt: skip
        again = sum(block.numel() == 0 for block in ctx.kept[1:])
        problem.stats.nfe_backward += again * problem.tableau.stages_in_use
        return (
            None,
            x_bar,
            offset_bar if offset is not None else None,
            *(None if p is None else bar for p, bar in zip(parameters, bars)),
        )


def _read_report(problem: Problem, report: list[float]) -> None:
    """Fills in the stats, or raises what stopped the solve."""
    stats = problem.stats
    accepted, rejected, evaluations, stats.step_size, status, time, size, finite, worst = report
    stats.accepted += int(accepted)
    stats.rejected += int(rejected)
    stats.nfe_forward += int(evaluations)
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
