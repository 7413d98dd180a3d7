"""The fused engine: a whole solve, and the gradient of a solve, in one call into compiled code."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pycnf._ops import (
    mlp_adjoint,
    mlp_samples,
    mlp_samples_adjoint,
    mlp_samples_backward,
    mlp_solve,
    mlp_solve_backward,
    mlp_solve_fits,
)
from pycnf.nn.field_gradients import NO_DIVERGENCE, PROBES, UNIT_VECTORS, is_batched
from pycnf.nn.field_ops import exact_divergence, field_arguments, kind_of
from pycnf.nn.layers import Parts
from pycnf.nn.mlp import MLP

from .control import AdaptiveControl
from .dynamics import REGULARIZERS, Dynamics
from .errors import SolveError
from .forward import Taped
from .noise import Noise
from .per_sample import Steps, TapedRows
from .problem import Problem
from .shared import Step, slopes
from .solve import filled, gradients_of_ends, nothing, replayed_gradient, solve

# In the order of Status in csrc/torch/mlp_report.h.
DONE, TOO_MANY_STEPS, UNDERFLOW, STATE_NOT_FINITE, FIELD_NOT_FINITE = range(5)

# Devices whose solves are one launch.
GPUS = ("cuda",)


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
        x: State at the start [B, D].
        context: Given to the field: [B, C], [C] or None.
        start, end: 0-dim tensors equal to the problem's, where they are to have gradients.

    Returns:
        z at the end [B, D], and its extras, [B] each.

    Raises:
        SolveError: The solve cannot go on.
    """
    problem.stats.engine = "fused"
    offset, tensors, _ = field_arguments(problem.field, x, context)
    if x.shape[0] == 0:
        return nothing(problem, x)
    inputs = (x, offset, start, end, *tensors)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    function = _Discrete if problem.gradient == "discrete" else _Adjoint
    try:
        z, *extras = function.apply(problem, _Tape() if needed else None, *inputs)
    except _Unsaid:
        # Says what stopped it, or, where that was a matter of rounding, solves.
        problem.stats.__init__()
        return solve(problem, x, context, start, end)
    if len(extras) <= 1:
        return z, *extras
    # Compiled code has the regularizers in an order of its own.
    made = dict(zip(_rows(problem), extras[1:]))
    return z, extras[0], *(made[name] for name in problem.regularizers)


def fits_gpu(field: MLP, probes: int, regularizers: Sequence[str], own_times: bool) -> bool:
    """Whether a GPU solves with a field in one launch.

    Args:
        field: On the GPU.
        probes: How many there are; 0 for the exact divergence.
        regularizers: Their names.
        own_times: Whether samples take steps of their own.
    """
    x = field.like.detach().new_zeros(1, field.features)
    norm = "jacobian" in regularizers
    kind = PROBES if probes else UNIT_VECTORS if norm else exact_divergence(field, own_times)
    noise = [0, probes, 0] if probes else []
    rows = (name in regularizers for name in REGULARIZERS)
    tensors = [tensor for layer in field.layers for tensor in layer.parts()]
    return mlp_solve_fits(x, noise, tensors, kind_of(field, kind, *rows), own_times)


class _Unsaid(Exception):
    """A solve has failed where nobody could say in words how."""


def _rows(problem: Problem) -> list[str]:
    return [name for name in REGULARIZERS if name in problem.regularizers]


def _settings(problem: Problem, extras: bool = True) -> tuple[str, list[int], list[float]]:
    """The ops' `method`, `kind` and `weights`; without extras if they are not wanted."""
    field, extras = problem.field, extras and problem.divergence
    divergence = NO_DIVERGENCE
    if extras and problem.probes is not None:
        divergence = PROBES
    elif extras:
        # The closed form has the trace of the Jacobian alone, and so no norm of it.
        norm = "jacobian" in problem.regularizers
        divergence = UNIT_VECTORS if norm else exact_divergence(field, problem.per_sample)
    rows = (extras and name in problem.regularizers for name in REGULARIZERS)
    kind = kind_of(field, divergence, *rows, precision=problem.precision)
    weights = [problem.regularizers.get(name, 0.0) * problem.direction for name in REGULARIZERS]
    return problem.tableau.name, kind, [problem.sign, *weights]


def _probes(
    problem: Problem, extras: bool = True
) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """The ops' `probe`, `keys` and `noise`; without extras if they are not wanted."""
    probes = problem.probes if extras else None
    if isinstance(probes, Noise):
        return None, *probes.arguments()
    return probes, None, []


def _stacked(extrabars: Sequence[Tensor]) -> Tensor | None:
    """[E, B], without a copy if E is 1; None without extras."""
    if len(extrabars) == 1:
        return extrabars[0].unsqueeze(0)
    return torch.stack(list(extrabars)) if extrabars else None


def _control(problem: Problem, backwards: bool = False) -> tuple[list[float], list[float]]:
    """The ops' `control` and `grid`."""
    control = problem.control
    if not isinstance(control, AdaptiveControl):
        ends = (problem.end, problem.start) if backwards else (problem.start, problem.end)
        return [], control.grid(*ends)
    numbers = [
        control.rtol, control.atol, control.first_step or 0.0, control.max_step,
        control.safety, control.ifactor, control.dfactor, float(control.max_num_steps),
    ]  # fmt: skip
    return numbers, []


def _parts(tensors: Sequence[Tensor | None]) -> list[Parts]:
    """The layers' tensors again, from a flat list."""
    size = len(Parts._fields)
    return [Parts(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


class _Tape:
    """What a solve leaves for its gradient: the ops' tape, once there is one."""

    parts: list[Tensor | list[Tensor]]
    settings: tuple[str, list[int], list[float]]


def _save(ctx: Any, problem: Problem, *tensors: Tensor | None) -> None:
    """Leaves a solve to its backward. All tensors are where autograd frees them after it, and sees
    whether they were changed before.
    """
    probe, keys, _ = _probes(problem)
    ctx.save_for_backward(probe, keys, *tensors)
    ctx.noise = replace(problem.probes, keys=None) if keys is not None else None
    ctx.problem = copy(problem)
    ctx.problem.probes = None
    ctx.set_materialize_grads(False)


def _load(ctx: Any) -> tuple[Problem, list[Tensor | None]]:
    """The problem and the tensors that were saved."""
    # A function that torch.func.vjp returns runs when the inputs of its transform are no more: what
    # is left of them has their numbers, and no gradient.
    alive = torch._C._functorch.unwrap_if_dead
    probe, keys, *tensors = (x if x is None else alive(x) for x in ctx.saved_tensors)
    probes = probe if ctx.noise is None else replace(ctx.noise, keys=keys)
    problem = copy(ctx.problem)
    problem.probes = probes
    return problem, tensors


def _flat(parts: Sequence[Tensor | list[Tensor]]) -> list[Tensor]:
    """The tensors of a tape."""
    return [x for part in parts for x in (part if isinstance(part, list) else [part])]


def _nested(tensors: Sequence[Tensor], sizes: Sequence[int | None]) -> list[Tensor | list[Tensor]]:
    """A tape of its tensors: a list for every size, a tensor for None."""
    rest = iter(tensors)
    return [next(rest) if size is None else list(islice(rest, size)) for size in sizes]


class _Function(torch.autograd.Function):
    """A function that is applied without torch's binding of arguments by name, which takes as long
    as the rest of a call. Transforms of `torch.func` need it.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)


class _Discrete(_Function):
    """The solve and the exact gradient of the numbers that were computed.

    Saved are the parameters and what probes are drawn from, so that a change in place between
    forward and backward is an error and no wrong gradient, and the tape. A gradient that is to be
    differentiated again, or is of many cotangents at a time (torch.func.vmap), goes through the
    taped steps on the generic engine.
    """

    @staticmethod
    def forward(problem: Problem, tape: _Tape | None, x, offset, start, end, *tensors):
        # Kept stages know nothing of the rates that a gradient by the interval's ends needs.
        budget = problem.keep_bytes if start is None and end is None else 0
        budget = budget if tape is not None else -1
        settings = _settings(problem)
        z, extras, made = _run(problem, settings, budget, x, offset, tensors)
        if tape is not None:
            tape.parts, tape.settings = made, settings
        return z, *torch.unbind_copy(extras)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        problem, tape, *inputs = inputs
        if tape is None:
            return
        ctx.settings, ctx.inputs = tape.settings, len(inputs)
        ctx.sizes = [len(part) if isinstance(part, list) else None for part in tape.parts]
        _save(ctx, problem, *inputs, *_flat(tape.parts))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):
        problem, saved = _load(ctx)
        inputs, tape = saved[: ctx.inputs], _nested(saved[ctx.inputs :], ctx.sizes)
        if torch.is_grad_enabled() or is_batched(*cotangents):
            with torch.enable_grad():
                return None, None, *_differentiable(ctx, problem, inputs, tape, cotangents)
        x, offset, start, end, *tensors = inputs
        zbar, extrabars = filled(x, cotangents)
        needs_ends = ctx.needs_input_grad[4:6]
        arguments = (
            zbar, _stacked(extrabars), *_probes(problem), offset, tensors,
            *ctx.settings, *tape, any(needs_ends),
        )  # fmt: skip
        if problem.per_sample:
            x_bar, offset_bar, bars, ends_bar = mlp_samples_backward(*arguments)
            again = problem.stats.accepted
        else:
            x_bar, offset_bar, bars, times_bar = mlp_solve_backward(*arguments)
            times, _, kept = tape
            # A GPU keeps no stages.
            again = sum(block.numel() == 0 for block in kept[1:]) if kept else len(times)
            if any(needs_ends):
                moves = [(step.t_slope, step.h_slope) for step in _steps(problem, times)]
                ends_bar = (times_bar.unsqueeze(-1) * times_bar.new_tensor(moves)).sum((0, 1))
        problem.stats.nfe_backward += again * problem.tableau.stages_in_use
        return (
            None,
            None,
            x_bar,
            offset_bar if offset is not None else None,
            ends_bar[0].to(start) if needs_ends[0] else None,
            ends_bar[1].to(end) if needs_ends[1] else None,
            *(None if p is None else bar for p, bar in zip(tensors, bars)),
        )


class _Adjoint(_Function):
    """The solve, and its gradient by the adjoint differential equation; see `flows.adjoint`."""

    @staticmethod
    def forward(problem: Problem, tape: _Tape | None, x, offset, start, end, *tensors):
        z, extras, _ = _run(problem, _settings(problem), -1, x, offset, tensors)
        return z, *torch.unbind_copy(extras)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        problem, tape, *inputs = inputs
        if tape is not None:
            _save(ctx, problem, output[0], *inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):
        problem, (z, x, offset, _, _, *tensors) = _load(ctx)
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"the gradient of a solve with gradient={problem.gradient!r} cannot be "
                "differentiated again (create_graph=True); use gradient='autograd' or 'discrete'"
            )
        zbar, extrabars = filled(z, cotangents)
        control, grid = _control(problem, backwards=True)
        arguments = (
            z, zbar, _stacked(extrabars),
            *_probes(problem, bool(extrabars)), offset, tensors,
            *_settings(problem, bool(extrabars)), problem.end, problem.start, control,
        )  # fmt: skip
        if problem.per_sample:
            x_bar, offset_bar, bars, report = mlp_samples_adjoint(*arguments)
        else:
            segments = []
            if problem.gradient == "continuous":
                segments = _segments(problem.field, tensors, ctx.needs_input_grad[6:])
            x_bar, offset_bar, bars, report = mlp_adjoint(*arguments, grid, segments)
        _, _, evaluations, _, *failure = report.tolist()
        problem.stats.nfe_backward += int(evaluations)
        _check(problem, *failure)
        ends_bar = gradients_of_ends(
            Dynamics(problem.on(_twin(problem, offset, tensors))), (x, z), (x_bar, zbar),
            offset, extrabars, ctx.needs_input_grad[4:6],
        )  # fmt: skip
        return (
            None,
            None,
            x_bar,
            offset_bar if offset is not None else None,
            *ends_bar,
            *(None if p is None else bar for p, bar in zip(tensors, bars)),
        )


def _run(
    problem: Problem,
    settings: tuple[str, list[int], list[float]],
    keep_bytes: int,
    x: Tensor,
    offset: Tensor | None,
    tensors: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, list]:
    """Solves forward and writes the stats: z, extras [E, B], and a tape unless keep_bytes < 0."""
    control, grid = _control(problem)
    arguments = (
        x, *_probes(problem), offset, tensors, *settings, problem.start, problem.end, control,
    )  # fmt: skip
    if problem.per_sample:
        z, extras, report, *tape = mlp_samples(*arguments, keep_bytes >= 0)
    else:
        z, extras, report, *tape = mlp_solve(*arguments, grid, keep_bytes)
    stats = problem.stats
    accepted, rejected, evaluations, step_size, *failure = report.tolist()
    stats.accepted += int(accepted)
    stats.rejected += int(rejected)
    stats.nfe_forward += int(evaluations)
    if not problem.per_sample:
        stats.step_size = step_size
    if x.device.type in GPUS and failure[0] != DONE:
        raise _Unsaid
    _check(problem, *failure)
    return z, extras, tape


def _segments(field: MLP, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[int]:
    """For every tensor of every layer the parameter that it is a part of, and its size.

    In the continuous adjoint's norm every parameter is a part; a concat layer's weight is one for
    its part that meets time as well.
    """
    found: dict[int, int] = {}
    segments = []
    for tensor, need in zip(tensors, needs):
        if tensor is None or not need:
            segments += [-1, 0]
            continue
        whole = tensor if tensor._base is None else tensor._base
        segments += [found.setdefault(id(whole), len(found)), tensor.numel()]
    return segments


def _steps(problem: Problem, times: Tensor) -> list[Step]:
    """The accepted steps of a tape."""
    return [
        Step(*numbers, *slopes(problem.control, i, times.shape[0]))
        for i, numbers in enumerate(times.tolist())
    ]


def _with_gradient(x: Tensor) -> Tensor:
    """The same numbers; not by `requires_grad_`, which torch.func.vmap refuses."""
    return x + torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)


def _differentiable(
    ctx: Any,
    problem: Problem,
    inputs: Sequence[Tensor | None],
    parts: Sequence[Tensor | list[Tensor]],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient by a solve's inputs as a differentiable function of everything."""
    needs = ctx.needs_input_grad[2:]
    inputs = [
        _with_gradient(x) if need and not x.requires_grad else x for x, need in zip(inputs, needs)
    ]
    x, offset, _, _, *tensors = inputs
    if problem.per_sample:
        tape = _rows_of_steps(*parts)
    else:
        tape = [Taped(step, x) for step in _steps(problem, parts[0])]
    zbar, *extrabars = cotangents
    made = dict(zip(_rows(problem), extrabars[1:]))
    extrabars = [*extrabars[:1], *(made[name] for name in problem.regularizers if made)]
    dynamics = Dynamics(problem.on(_twin(problem, offset, tensors)))
    with torch.autocast(x.device.type, enabled=False):
        return replayed_gradient(dynamics, tape, inputs, needs, (zbar, *extrabars))


def _twin(problem: Problem, offset: Tensor | None, tensors: Sequence[Tensor | None]) -> MLP:
    """The field on the tensors that a solve was given, for the generic engine."""
    return problem.field.with_parts(_parts(tensors), 0 if offset is None else offset.shape[1])


def _rows_of_steps(
    times: Tensor, states: Tensor, previous: Tensor, newest: Tensor
) -> list[TapedRows]:
    """The tape of steps per sample for the generic engine: every sample's last, and so on back."""
    tape = []
    rows, places = torch.arange(newest.shape[0], device=newest.device), newest
    while rows.numel():
        t, h, t_next, last = times[places].unbind(1)
        tape.append(TapedRows(Steps(rows, t, h, t_next, last != 0), states[places]))
        places = previous[places]
        rows, places = rows[places >= 0], places[places >= 0]
    return tape[::-1]


def _check(
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
