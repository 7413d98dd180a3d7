"""Arguments, norms, wrapped fields and step control, by torchdiffeq's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pycnf.compat.torchdiffeq._impl.event_handling import combine_event_functions
from pycnf.odeint.norms import MixedNorm, RmsNorm, flat_to_shapes
from pycnf.odeint.problem import CALLBACKS, make_problem
from pycnf.odeint.user_solver import (
    Perturb,
    PerturbedField,
    ReverseField,
    TupleField,
    next_to,
    null_callback,
    user_field,
    user_options,
)
from pycnf.warn import warn

__all__ = [
    "Perturb",
    "_PerturbFunc",
    "_ReverseFunc",
    "_TupleFunc",
    "_TupleInputOnlyFunc",
    "_all_adjoint_callback_names",
    "_all_callback_names",
    "_assert_floating",
    "_assert_increasing",
    "_assert_one_dimensional",
    "_check_inputs",
    "_compute_error_ratio",
    "_decreasing",
    "_flat_to_shape",
    "_handle_unused_kwargs",
    "_linf_norm",
    "_mixed_norm",
    "_nextafter",
    "_null_callback",
    "_optimal_step_size",
    "_rms_norm",
    "_select_initial_step",
    "_zero_norm",
]


_PerturbFunc = PerturbedField
_ReverseFunc = ReverseField
_TupleFunc = TupleField
_nextafter = next_to
_null_callback = null_callback
_all_callback_names = list(CALLBACKS)
_all_adjoint_callback_names = [f"{name}_adjoint" for name in CALLBACKS]


class _TupleInputOnlyFunc(nn.Module):
    """A function of tuples as a function of flat states; what it returns is left alone."""

    def __init__(self, base_func: Callable, shapes: Sequence[Size]) -> None:
        super().__init__()
        self.base_func, self.shapes = base_func, shapes

    def forward(self, t: Tensor, y: Tensor) -> Any:
        return self.base_func(t, flat_to_shapes(y, self.shapes))


# ---- norms; the kernels know the first two -------------------------------------------------------

_rms_norm = RmsNorm()
_mixed_norm = MixedNorm()


def _linf_norm(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def _zero_norm(tensor: Tensor) -> float:
    return 0.0


# ---- step control --------------------------------------------------------------------------------


def _select_initial_step(
    func: Callable,
    t0: Tensor,
    y0: Tensor,
    order: int,
    rtol: Any,
    atol: Any,
    norm: Callable,
    f0: Tensor | None = None,
) -> Tensor:
    """A first step size for a method whose error estimate has this order (Hairer, Norsett & Wanner,
    Solving Ordinary Differential Equations I, II.4).
    """
    f0 = func(t0, y0) if f0 is None else f0
    scale = atol + y0.abs() * rtol
    size, slope = (norm(x / scale).abs() for x in (y0, f0))
    tiny = torch.tensor(1e-6, dtype=y0.dtype, device=y0.device)
    trial = tiny if size < 1e-5 or slope < 1e-5 else 0.01 * size / slope
    trial = trial.abs()
    f1 = func(t0 + trial, y0 + trial * f0)
    curvature = (norm((f1 - f0) / scale) / trial).abs()
    if slope <= 1e-15 and curvature <= 1e-15:
        step = torch.max(tiny, trial * 1e-3)
    else:
        step = (0.01 / max(slope, curvature)) ** (1.0 / (order + 1))
    return torch.min(100 * trial, step.abs()).to(t0.dtype)


def _compute_error_ratio(
    error_estimate: Tensor, rtol: Any, atol: Any, y0: Tensor, y1: Tensor, norm: Callable
) -> Tensor:
    """The norm of an error estimate in units of the tolerance; a step is accepted up to 1."""
    return norm(error_estimate / (atol + rtol * torch.max(y0.abs(), y1.abs()))).abs()


@torch.no_grad()
def _optimal_step_size(
    last_step: Tensor,
    error_ratio: Tensor,
    safety: Tensor,
    ifactor: Tensor,
    dfactor: Tensor,
    order: int,
) -> Tensor:
    """The size of the next attempt: an I controller that never shrinks an accepted step."""
    if error_ratio == 0:
        return last_step * ifactor
    smallest = torch.ones_like(last_step) if error_ratio < 1 else dfactor
    power = torch.tensor(order, dtype=last_step.dtype, device=last_step.device).reciprocal()
    wished = safety / error_ratio.type_as(last_step) ** power
    return last_step * torch.min(ifactor, torch.max(wished, smallest))


# ---- arguments -----------------------------------------------------------------------------------


def _flat_to_shape(tensor: Tensor, length: Sequence[int], shapes: Sequence[Size]) -> tuple:
    """The parts of flat states [*length, N] as views [*length, *shape]."""
    return flat_to_shapes(tensor, shapes, tuple(length))


def _handle_unused_kwargs(solver: Any, unused_kwargs: dict[str, Any]) -> None:
    if unused_kwargs:
        warn(f"{type(solver).__name__}: Unexpected arguments {unused_kwargs}")


def _decreasing(t: Tensor) -> Tensor:
    return (t[1:] < t[:-1]).all()


def _assert_one_dimensional(name: str, t: Tensor) -> None:
    assert t.ndimension() == 1, f"{name} must be one dimensional"


def _assert_increasing(name: str, t: Tensor) -> None:
    assert (t[1:] > t[:-1]).all(), f"{name} must be strictly increasing or decreasing"


def _assert_floating(name: str, t: Tensor) -> None:
    if not torch.is_floating_point(t):
        raise TypeError(f"`{name}` must be a floating point Tensor but is a {t.type()}")


def _check_inputs(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable | None,
    SOLVERS: dict[str, Any],
) -> tuple:
    """Checks the arguments of a solve and brings them to the form that solver classes are given.

    Returns:
        shapes of a tuple state or None, field, flat y0, ascending t, rtol, atol, method, options,
        event_fn, and whether t was descending.
    """
    if event_fn is not None:
        if len(t) != 2:
            raise ValueError(
                f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}."
            )
        event_fn = combine_event_functions(event_fn, t[0], y0)
    problem = make_problem(func, y0, t, rtol, atol, method, options, SOLVERS)
    if event_fn is not None:
        if problem.shapes is not None:
            event_fn = _TupleInputOnlyFunc(event_fn, problem.shapes)
        if problem.sign < 0:
            event_fn = ReverseField(event_fn)
    return (
        problem.shapes, user_field(problem), problem.y0, problem.s, problem.rtol, problem.atol,
        problem.method, user_options(problem), event_fn, problem.sign < 0,
    )  # fmt: skip
