"""From a problem to its solution, with the gradient that was asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adjoint import AdjointRows, AdjointSystem
from .dynamics import Dynamics
from .forward import ForwardSystem, KeepingSystem, Taped, step_with_graph
from .parameters import Start, begin
from .per_sample import ForwardRows, TapedRows, integrate_per_sample, steps_with_graph
from .problem import Problem
from .shared import integrate

Tape = list[Taped] | list[TapedRows]


def solve(
    problem: Problem,
    x: Tensor,
    context: Tensor | None,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Solves a problem.

    Args:
        problem: What to solve; its stats are filled in.
        x: State at the start [B, D].
        context: Given to the field.
        start, end: 0-dim tensors equal to the problem's, where they are to have gradients.

    Returns:
        z at the end [B, D], and its extras, [B] each.

    Raises:
        SolveError: The solve cannot go on.
    """
    if x.shape[0] == 0:
        return nothing(problem, x)
    if not torch.is_grad_enabled():
        return run(Dynamics(problem), x, context, None, None)
    dynamics = Dynamics(problem)
    keep = problem.gradient == "discrete" and problem.keep_bytes > 0 and not problem.per_sample
    # Kept graphs know nothing of the interval's ends.
    keep = keep and start is None and end is None
    beginning = begin(dynamics, x, context, keep)
    inputs = (x, context, start, end, *beginning.parameters)
    if not any(value is not None and value.requires_grad for value in inputs):
        return run(dynamics, x, context, None, beginning)
    if problem.gradient == "autograd":
        tape: Tape = []
        run(dynamics, x, context, tape, beginning)
        before = dynamics.evaluations
        outputs = replay(dynamics, tape, x, context, _shifts(start, end))
        problem.stats.nfe_forward += dynamics.evaluations - before
        return outputs
    function = _Discrete if problem.gradient == "discrete" else _Adjoint
    return function.apply(dynamics, beginning, keep, x, context, start, end, *beginning.parameters)


def nothing(problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
    """The solution of no samples: gradients of x and of the field's parameters are zeros."""
    field = problem.field
    parameters = field.parameters() if isinstance(field, nn.Module) else ()
    z = x + sum((p.flatten()[:0].sum().to(x) for p in parameters), x.new_zeros(()))
    return z, *(z.sum(1) for _ in range(problem.extras))


def run(
    dynamics: Dynamics,
    x: Tensor,
    context: Tensor | None,
    tape: Tape | None,
    beginning: Start | None,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """Solves forward without a graph, and writes the stats.

    Args:
        dynamics: Right-hand side.
        x, context: As for `solve`.
        tape: Receives the accepted steps, or None.
        beginning: What is known of the start.
        keep: Whether the tape may keep the steps' graphs.
    """
    problem = dynamics.problem
    stats = problem.stats
    first = None
    if beginning is not None and beginning.parts is not None:
        first = tuple(part.detach() for part in beginning.parts)
    with torch.no_grad():
        if problem.per_sample:
            rows = ForwardRows(dynamics, x, context, tape)
            start = None if first is None else rows.join(first)
            outcome = integrate_per_sample(
                rows, rows.initial(), problem.start, problem.end, problem.tableau, problem.control,
                start,
            )  # fmt: skip
            outputs = rows.split(outcome.y)
            stats.accepted += int(outcome.accepted.max())
            stats.rejected += int(outcome.rejected.max())
        else:
            if keep:
                system = KeepingSystem(dynamics, beginning, tape, problem.keep_bytes)
            else:
                system = ForwardSystem(dynamics, x, context, tape)
            start = None if first is None else system.parts(first)
            outcome = integrate(
                system, system.initial(), problem.start, problem.end, problem.tableau,
                problem.control, start,
            )  # fmt: skip
            outputs = system.split(outcome.y)
            stats.accepted += outcome.accepted
            stats.rejected += outcome.rejected
            stats.step_size = outcome.step_size
    stats.nfe_forward += dynamics.evaluations
    # Copies: views of one buffer would keep all of it, and refuse in-place use.
    return tuple(output.clone() for output in outputs)


def replay(
    dynamics: Dynamics,
    tape: Tape,
    x: Tensor,
    context: Tensor | None,
    shifts: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """The accepted steps of a solve again, from x, in differentiable operations."""
    state = [x, *x.new_zeros(dynamics.problem.extras, x.shape[0])]
    for taped in tape:
        if isinstance(taped, Taped):
            z, *extras = state
            state = step_with_graph(dynamics, taped.step, z, extras, context, shifts)
        else:
            rows = taped.step.rows
            z, *extras = (part[rows] for part in state)
            new = steps_with_graph(dynamics, taped.step, z, extras, context, shifts)
            state = [part.index_copy(0, rows, value) for part, value in zip(state, new)]
    return tuple(state)


def _shifts(start: Tensor | None, end: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Zeros that move with the ends of the interval, in f64; None where neither end does."""
    if start is None and end is None:
        return None
    moving = start if end is None else end
    zero = torch.zeros((), dtype=torch.float64, device=moving.device)
    return tuple(
        zero if time is None else time.double() - time.double().detach() for time in (start, end)
    )


class _Discrete(torch.autograd.Function):
    """Exact gradient of the numbers that were computed, from a tape of accepted steps.

    The tape holds z at the start of every accepted step, and the step's graph while that fits in
    memory; backwards, each step without one is computed again with a graph, differentiated and
    forgotten. A gradient that is to be differentiated again goes through all the steps with one
    graph instead.
    """

    @staticmethod
    def forward(ctx: Any, dynamics, beginning, keep, x, context, start, end, *tensors):
        ctx.tape = []
        outputs = run(dynamics, x, context, ctx.tape, beginning, keep)
        ctx.dynamics = dynamics
        # The field computes with its own tensors. Saved as well, so that a change in place between
        # forward and backward (an optimizer's step) is an error and no wrong gradient.
        ctx.beginning = beginning
        ctx.parameters = beginning.parameters
        ctx.save_for_backward(dynamics.problem.probe, x, context, start, end, *tensors)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):
        _, x, context, start, end, *_ = ctx.saved_tensors
        dynamics = ctx.dynamics
        before = dynamics.evaluations
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                inputs = [x, context, start, end, *ctx.parameters]
                needs = ctx.needs_input_grad[3:]
                gradients = replayed_gradient(dynamics, ctx.tape, inputs, needs, cotangents)
            else:
                needs = ctx.needs_input_grad[3:]
                gradients = taped_gradient(dynamics, ctx.tape, ctx.beginning, needs, x, cotangents)
        dynamics.problem.stats.nfe_backward += dynamics.evaluations - before
        return None, None, None, *gradients


def replayed_gradient(
    dynamics: Dynamics,
    tape: Tape,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of a solve as a differentiable function of everything.

    Args:
        dynamics: Right-hand side.
        tape: The accepted steps.
        inputs: x, context, start, end and the tensors that the field computes with.
        needs: Which of them need a gradient.
        cotangents: Of z and the extras.
    """
    x, context, start, end, *_ = inputs
    outputs = replay(dynamics, tape, x, context, _shifts(start, end))
    pairs = [(o, c) for o, c in zip(outputs, cotangents) if c is not None and o.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            [value for value, need in zip(inputs, needs) if need],
            [cotangent for _, cotangent in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needs]


def taped_gradient(
    dynamics: Dynamics,
    tape: Tape,
    beginning: Start,
    needs: Sequence[bool],
    x: Tensor,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradient of a solve step by step, last step first.

    Args:
        dynamics: Right-hand side.
        tape: The accepted steps.
        beginning: What the solve began with.
        needs: Which of x, context, start, end and the parameters need a gradient.
        x: State at the start.
        cotangents: Of z and the extras.
    """
    problem, parameters = dynamics.problem, beginning.parameters
    zbar, extrabars = filled(x, cotangents)
    need_x, need_context, need_start, need_end = needs[:4]
    shifts = None
    others: list[Tensor] = []
    if need_start or need_end:
        shifts = tuple(
            torch.zeros((), dtype=torch.float64, device=x.device, requires_grad=True) for _ in "01"
        )
        others += shifts
    context = beginning.context  # a leaf, also of kept graphs
    if need_context:
        others.append(context)
    others += parameters
    totals: list[Tensor | None] = [None] * len(others)
    redo = steps_with_graph if problem.per_sample else step_with_graph
    for taped in reversed(tape):
        rows = taped.step.rows if problem.per_sample else slice(None)
        kept = None if problem.per_sample else taped.kept
        if kept is not None:
            z, outputs = taped.z, kept
            taped.kept = None  # the memory goes; another backward computes the step again
        else:
            with torch.enable_grad():
                z = taped.z.detach().requires_grad_()
                # Not like the cotangents, which may be batches of torch.func.vmap.
                extras = [z.new_zeros(z.shape[0]) for _ in extrabars]
                outputs = redo(dynamics, taped.step, z, extras, context, shifts)
        bars = [zbar[rows], *(bar[rows] for bar in extrabars)]
        pairs = [(o, bar) for o, bar in zip(outputs, bars) if o.requires_grad]
        # A plain field may close over tensors with a history, which every step runs through; kept
        # steps share the gates of the stage that ends one and begins the next.
        zstep, *gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            [z, *others],
            [bar for _, bar in pairs],
            allow_unused=True,
            retain_graph=kept is not None or not dynamics.forward_mode,
        )
        # Not in place, for the same reason: one may be a batch, and the other not.
        zbar = zbar.index_copy(0, rows, zstep) if problem.per_sample else zstep
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                totals[i] = gradient.clone() if totals[i] is None else totals[i].add_(gradient)
    found = iter(totals)
    times: list[Tensor | None] = [None, None]
    if shifts is not None:
        times = [next(found), next(found)]
    context_total = next(found) if need_context else None
    return [
        zbar if need_x else None,
        context_total,
        times[0] if need_start else None,
        times[1] if need_end else None,
        *found,
    ]


def filled(z: Tensor, cotangents: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    """The cotangents of z and of the extras, zeros for missing ones; no extras if none is there.

    A loss that sees no extras needs no divergence in its gradient.
    """
    zbar, *extrabars = cotangents
    zbar = torch.zeros_like(z) if zbar is None else zbar
    if all(bar is None for bar in extrabars):
        return zbar, []
    return zbar, [z.new_zeros(z.shape[0]) if bar is None else bar for bar in extrabars]


class _Adjoint(torch.autograd.Function):
    """Gradient by the adjoint differential equation, solved backwards: constant memory.

    As good as the tolerances; for steps per sample the parameters are a quadrature ("seminorm").
    """

    @staticmethod
    def forward(ctx: Any, dynamics, beginning, keep, x, context, start, end, *tensors):
        z, *extras = run(dynamics, x, context, None, beginning)
        ctx.dynamics = dynamics
        ctx.parameters = beginning.parameters
        ctx.save_for_backward(dynamics.problem.probe, x, z, context, start, end, *tensors)
        ctx.set_materialize_grads(False)
        return z, *extras

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None):
        dynamics = ctx.dynamics
        problem = dynamics.problem
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"the gradient of a solve with gradient={problem.gradient!r} cannot be "
                "differentiated again (create_graph=True); use gradient='autograd' or 'discrete'"
            )
        _, x, z, context, *_ = ctx.saved_tensors
        before = dynamics.evaluations
        with torch.autocast(x.device.type, enabled=False):
            gradients = _adjoint_gradient(ctx, x, z, context, cotangents)
        problem.stats.nfe_backward += dynamics.evaluations - before
        return None, None, None, *gradients


def _adjoint_gradient(
    ctx: Any, x: Tensor, z: Tensor, context: Tensor | None, cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    dynamics = ctx.dynamics
    problem = dynamics.problem
    zbar, extrabars = filled(z, cotangents)
    needs_x, need_context, *needs_ends = ctx.needs_input_grad[3:7]
    if need_context:
        context = context.detach().requires_grad_()
    others = ([context] if need_context else []) + list(ctx.parameters)
    arguments = (problem.end, problem.start, problem.tableau, problem.control)
    if problem.per_sample:
        rows = AdjointRows(dynamics, z.shape[1], others, context, extrabars)
        outcome = integrate_per_sample(rows, torch.cat((z, zbar), 1), *arguments)
        xbar, totals = outcome.y[:, z.shape[1] :], rows.totals
    else:
        system = AdjointSystem(dynamics, z, others, context, extrabars)
        outcome = integrate(system, system.initial(zbar), *arguments)
        xbar, totals = system.gradients(outcome.y)

    ends_bar = gradients_of_ends(dynamics, (x, z), (xbar, zbar), context, extrabars, needs_ends)
    context_bar = totals.pop(0) if need_context else None
    return [xbar if needs_x else None, context_bar, *ends_bar, *totals]


def gradients_of_ends(
    dynamics: Dynamics,
    states: tuple[Tensor, Tensor],
    bars: tuple[Tensor, Tensor],
    context: Tensor | None,
    extrabars: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The adjoint's gradients of the start and the end of a solve, where they are needed.

    Args:
        dynamics: Right-hand side.
        states: z at the start and at the end, [B, D].
        bars: Their cotangents.
        context: Given to the field.
        extrabars: Cotangents of the extras, [B] each.
        needs: Which of the two are needed.
    """
    problem = dynamics.problem
    results: list[Tensor | None] = []
    times = (problem.start, problem.end)
    for time, state, bar, sign, need in zip(times, states, bars, (-1, 1), needs):
        if not need:
            results.append(None)
            continue
        t = torch.tensor(time, dtype=state.dtype, device=state.device)
        parts = dynamics.evaluate(t, state, context, problem.probe, True)
        results.append(
            sign * sum((b * part.detach()).sum() for b, part in zip((bar, *extrabars), parts))
        )
    return tuple(results)
