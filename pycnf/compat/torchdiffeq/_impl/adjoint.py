"""`odeint_adjoint` and its parts, by torchdiffeq's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Size, Tensor, nn

from pycnf.compat.torchdiffeq._impl.misc import (
    _mixed_norm,
)
from pycnf.compat.torchdiffeq._impl.odeint import odeint
from pycnf.odeint.gradient import _TWICE, _Continuous, odeint_adjoint, unpacked_adjoint_norm
from pycnf.odeint.gradient import find_parameters as _parameters
from pycnf.odeint.norms import AdjointNorm
from pycnf.odeint.problem import Problem
from pycnf.once import raise_if_differentiated

__all__ = ["OdeintAdjointMethod", "find_parameters", "handle_adjoint_norm_", "odeint_adjoint"]


def find_parameters(module: nn.Module) -> list[Tensor]:
    """A module's parameters, those of a DataParallel replica too."""
    assert isinstance(module, nn.Module)
    return list(_parameters(module))


def handle_adjoint_norm_(
    adjoint_options: dict[str, Any], shapes: Sequence[Size] | None, state_norm: Callable
) -> None:
    """Sets adjoint_options["norm"] to a norm of (t, y, adj_y, *params) with flat y and adj_y; its
    own default is made of state_norm, a norm of flat states.
    """
    norm = adjoint_options.get("norm")
    if norm is None or norm == "seminorm":
        adjoint_options["norm"] = AdjointNorm(state_norm, None, parameters=norm is None)
    elif shapes is not None:
        adjoint_options["norm"] = unpacked_adjoint_norm(norm, shapes)


class OdeintAdjointMethod(torch.autograd.Function):
    """A solve of a flat state in ascending time, with the gradient of the adjoint equation."""

    @staticmethod
    def forward(
        ctx: Any,
        shapes: Sequence[Size] | None,
        func: Callable,
        y0: Tensor,
        t: Tensor,
        rtol: Any,
        atol: Any,
        method: str,
        options: dict[str, Any],
        event_fn: Callable | None,
        adjoint_rtol: Any,
        adjoint_atol: Any,
        adjoint_method: str,
        adjoint_options: dict[str, Any],
        t_requires_grad: bool,
        *adjoint_params: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.shapes, ctx.func = shapes, func
        ctx.adjoint_rtol, ctx.adjoint_atol = adjoint_rtol, adjoint_atol
        ctx.adjoint_method, ctx.adjoint_options = adjoint_method, adjoint_options
        ctx.t_requires_grad, ctx.event_mode = t_requires_grad, event_fn is not None
        event = {} if event_fn is None else {"event_fn": event_fn}
        with torch.no_grad():
            solved = odeint(
                func, y0, t, rtol=rtol, atol=atol, method=method, options=options, **event
            )
        event_t, y = solved if event else (None, solved)
        ctx.save_for_backward(t, y, *([event_t] if event else []), *adjoint_params)
        return solved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        t, y, *params = ctx.saved_tensors
        times = t
        if ctx.event_mode:
            event_t, *params = params
            times = torch.stack([t[0], event_t.to(t)])
        solve = SimpleNamespace(
            problem=Problem(
                func=ctx.func,
                y0=y[0],
                shapes=None,
                s=times,
                sign=1,
                rtol=None,
                atol=None,
                method="",
                options={},
                norm=_mixed_norm,
                callbacks={},
            ),
            backward_arguments=dict(
                rtol=ctx.adjoint_rtol, atol=ctx.adjoint_atol, method=ctx.adjoint_method
            ),
            adjoint_options=ctx.adjoint_options,
            time_gradient=ctx.t_requires_grad,
            saved_tensors=(y, times, *params),
        )
        with torch.no_grad():
            y_grad, t_grad, *param_grads = _Continuous.solve_backwards(solve, grads[-1])
            if ctx.event_mode and t_grad is not None:
                # The event's own time is no argument.
                t_grad = torch.cat([t_grad[:1], torch.zeros_like(t[1:])])
        found = raise_if_differentiated(
            [y_grad, t_grad, *param_grads], [*grads, *ctx.saved_tensors], _TWICE
        )
        return (None, None, *found[:2], *[None] * 10, *found[2:])
