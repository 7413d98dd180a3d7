"""`odeint_event`: a solve up to an event, with the gradient of the event's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import vjp

from pycnf.odeint import rounding
from pycnf.odeint.norms import flat_to_shapes
from pycnf.odeint.problem import Problem, make_problem
from pycnf.odeint.solve import SOLVERS, odeint
from pycnf.once import raise_if_differentiated

_TWICE = "the gradient of odeint_event cannot be differentiated again (twice, by create_graph=True)"


def odeint_event(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t0: Tensor,
    *,
    event_fn: Callable,
    reverse_time: bool = False,
    odeint_interface: Callable = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """Solves dy/dt = func(t, y), y(t0) = y0, until event_fn changes sign, with gradients of the
    time and the state at that event.

    A drop-in for `torchdiffeq.odeint_event`. Parameters of event_fn get gradients only as parts of
    the state (with derivative zero).

    Args:
        func, y0: as for `odeint`.
        t0: start, a tensor of one floating point number.
        event_fn: of (t, y), a tensor of any shape; the first component to change sign ends the
            solve.
        reverse_time: whether to solve towards earlier times.
        odeint_interface: `odeint`, `odeint_adjoint`, or a function with their interface.
        **kwargs: for odeint_interface.

    Returns:
        (event time, 0-dim in t0's dtype; the states at the start and at the event, [2, *y0.shape]
        or a tuple of such).

    Raises:
        TypeError: t0 is no tensor. RuntimeError: the gradient is differentiated again. Otherwise as
            odeint_interface.

    Source: Chen, Amos & Nickel, "Learning Neural Event Functions for Ordinary Differential
    Equations", ICLR 2021: the implicit function theorem.

    Example:
        >>> import torch, pycnf
        >>> y0 = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
        >>> t0 = torch.tensor(0.0, dtype=torch.float64)
        >>> t, y = pycnf.odeint_event(lambda t, y: -y, y0, t0, event_fn=lambda t, y: y - 1.0)
        >>> t.backward()
        >>> round(t.item(), 6), round(y0.grad.item(), 6)
        (0.693147, 0.5)
    """
    if not isinstance(t0, Tensor):
        raise TypeError(f"t0 must be a torch.Tensor, got {type(t0).__name__}")
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    event, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    problem = make_problem(func, y0, t, 0.0, 0.0, None, None, SOLVERS, event_fn)
    tensor_state = problem.shapes is None
    parts = (solution,) if tensor_state else solution
    state = solution[-1] if tensor_state else torch.cat([part[-1].reshape(-1) for part in parts])
    event, state = _Rerouted.apply(problem, event, state)
    ends = (state,) if tensor_state else flat_to_shapes(state, problem.shapes)
    parts = tuple(torch.cat([part[:-1], end[None]]) for part, end in zip(parts, ends))
    return event, parts[0] if tensor_state else parts


class _Rerouted(torch.autograd.Function):
    """An event's time t and state y, where c(t, y) = 0; gradients to both go to the state as it is
    at fixed t.

    With f = dy/dt along the solve, a change dy of that state moves the event by
    dt = -(dc/dy dy) / (dc/dt + dc/dy f).
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, t: Tensor, y: Tensor):
        ctx.problem = problem
        ctx.save_for_backward(t, y)
        return t.detach(), y.detach()

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor, grad_y: Tensor):
        problem: Problem = ctx.problem
        t, y = ctx.saved_tensors
        with torch.no_grad():
            time = t.to(rounding.real_dtype(y.dtype))
            f = problem.as_state(problem.call(time, y), y)
        _, (partial, normal) = vjp(problem.event, (t.detach(), y.detach()))
        with torch.no_grad():
            rate = problem.sign * (partial + torch.sum(normal * f))
            along = problem.sign * (grad_t + torch.sum(grad_y * f))
            # The small term is torchdiffeq's, in ascending time.
            grad = grad_y - normal * (along / (rate + 1e-12))
        given = (grad_t, grad_y, t, y)
        return None, None, *raise_if_differentiated([grad], given, _TWICE)
