"""`odeint_adjoint` and its parts, by torchdiffeq's names.

`OdeintAdjointMethod` is for code that makes an `odeint_adjoint` of its own; pycnf's does not use
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pycnf.compat.torchdiffeq._impl.misc import _all_callback_names
from pycnf.compat.torchdiffeq._impl.odeint import odeint
from pycnf.odeint.gradient import find_parameters as _parameters
from pycnf.odeint.gradient import odeint_adjoint
from pycnf.odeint.norms import AdjointNorm, flat_to_shapes
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
    given = adjoint_options.get("norm")

    def unpacked(parts: tuple[Tensor, ...]) -> Tensor:
        t, y, adj_y, *params = parts
        return given((t, *flat_to_shapes(y, shapes), *flat_to_shapes(adj_y, shapes), *params))

    if given is None or given == "seminorm":
        adjoint_options["norm"] = AdjointNorm(state_norm, None, parameters=given is None)
    elif shapes is not None:
        adjoint_options["norm"] = unpacked


class OdeintAdjointMethod(torch.autograd.Function):
    """A solve of a flat state in ascending time, with the gradient of the adjoint equation; that
    gradient raises a RuntimeError when it is differentiated in turn.
    """

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
        with torch.no_grad():
            found = OdeintAdjointMethod._solve_backwards(ctx, grads[-1])
        to_y, to_t, *to_params = raise_if_differentiated(
            found,
            (*grads, *ctx.saved_tensors),
            "the gradient of OdeintAdjointMethod cannot be differentiated again; odeint's can",
        )
        return (None, None, to_y, to_t, *[None] * 10, *to_params)

    @staticmethod
    def _solve_backwards(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """Gradients to y0, t and the parameters."""
        t, y, *params = ctx.saved_tensors
        times = t
        if ctx.event_mode:
            event_t, *params = params
            times = torch.stack([t[0], event_t.to(t)])
        with_times = ctx.t_requires_grad
        slopes = _adjoint_slopes(ctx.func, params)
        to_time = torch.zeros((), dtype=y.dtype, device=y.device)
        to_y, to_params = grad[-1], [torch.zeros_like(p) for p in params]
        to_times = []
        for i in range(len(times) - 1, 0, -1):
            if with_times:
                # Moving an output time moves along the field.
                along = ctx.func(times[i], y[i]).reshape(-1).dot(grad[i].reshape(-1))
                to_time = to_time - along
                to_times.append(along)
            parts = odeint(
                slopes, (to_time, y[i], to_y, *to_params), times[i - 1 : i + 1].flip(0),
                rtol=ctx.adjoint_rtol, atol=ctx.adjoint_atol, method=ctx.adjoint_method,
                options=ctx.adjoint_options,
            )  # fmt: skip
            to_time, _, to_y, *to_params = (part[1] for part in parts)
            to_y = to_y + grad[i - 1]
        to_t = torch.stack([to_time, *reversed(to_times)]).to(t) if with_times else None
        if ctx.event_mode and with_times:
            # The event's time is none of the arguments.
            to_t = torch.stack([to_t[0], torch.zeros_like(to_t[0])])
        return [to_y, to_t, *to_params]


def _adjoint_slopes(func: Callable, params: Sequence[Tensor]) -> Callable:
    """d/dt of (gradient of t, y, gradient of y, *gradients of the parameters); that of t counts in
    the norm, whether it is asked for or not.
    """

    def slopes(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, y, adjoint, *_ = state
        with torch.enable_grad():
            t, y = t.detach().requires_grad_(), y.detach().requires_grad_()
            f = func(t, y)
            wanted = (t, y, *params)
            found = torch.autograd.grad(f, wanted, -adjoint, allow_unused=True, retain_graph=True)
        to_t, *others = (torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found))
        return (to_t, f.detach(), *others)

    for name in _all_callback_names:
        if hasattr(func, f"{name}_adjoint"):
            setattr(slopes, name, getattr(func, f"{name}_adjoint"))
    return slopes
