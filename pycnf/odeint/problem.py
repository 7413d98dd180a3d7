"""The arguments of `odeint`, checked and brought to one form: a contiguous state, ascending times,
one call for the field.

Time runs forward in s = sign * t. A descending problem is not wrapped: the solvers step with h =
sign * ds, which gives the same numbers as negating the field's values. Texts of errors and warnings
are torchdiffeq's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from pycnf.odeint.arguments import (
    check_function,
    options_copy,
    output_times,
    state_parts,
    tuple_tolerance,
)
from pycnf.odeint.norms import MixedNorm, RmsNorm, flat_to_shapes, segments_of
from pycnf.odeint.stats import SolveStats
from pycnf.warn import warn

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass
class Problem:
    """An initial value problem.

    Attributes:
        func: the user's vector field.
        y0: state, contiguous; flat [N] for a tuple state.
        shapes: of the parts of a tuple state, None for a tensor state.
        s: times [T], ascending, on y0's device.
        times: the same as numbers.
        sign: 1, or -1 for descending t.
        rtol, atol: a number or a tensor.
        norm: as the user sees it: of a tensor, or of a tuple of tensors.
        callbacks: by name, those that func has.
        stats: what the solve takes.
        seen: how many parts of a tuple state func is given, None for all.
        transient: whether the evaluation at hand matters to later stages of its step only.
        event_fn: of (t, y) as the user has them, 0-dim; the solve ends where it changes sign.
    """

    func: Callable
    y0: Tensor
    shapes: list[Size] | None
    s: Tensor
    times: list[float]
    sign: int
    rtol: Any
    atol: Any
    method: str
    options: dict[str, Any]
    norm: Callable
    callbacks: dict[str, Callable]
    event_fn: Callable | None
    stats: SolveStats
    seen: int | None = None
    transient: bool = False

    def evaluate(self, t: Tensor, y: Tensor | tuple[Tensor, ...]) -> Any:
        """Whatever func returns for the user's time and state."""
        self.stats.evaluations += 1
        return self.func(t, y)

    def call(self, t: Tensor, y: Tensor) -> list[Tensor]:
        """The field at (t, y), as it came: one tensor, or the parts of a tuple."""
        if self.shapes is None:
            f = _checked_slope(self.evaluate(t, y))
            if f.shape != y.shape and not (f.numel() == y.numel() == 1):
                raise ValueError(
                    f"func must return the shape of its state, {tuple(y.shape)}, "
                    f"got {tuple(f.shape)}"
                )
            return [f]
        return list(self.evaluate(t, flat_to_shapes(y, self.shapes[: self.seen])))

    def joined(self, fresh: list[Tensor]) -> Tensor:
        """What `call` returned as one tensor, in the dtype that it came in."""
        if self.shapes is None:
            return _checked_slope(fresh[0])
        return torch.cat([part.reshape(-1) for part in fresh])

    def as_state(self, fresh: list[Tensor], y: Tensor) -> Tensor:
        """What `call` returned as one tensor like y, with its graph."""
        f = self.joined(fresh)
        if f.shape == y.shape and f.dtype == y.dtype:
            return f
        return f.reshape(y.shape).to(y.dtype)

    def event(self, t: Tensor, y: Tensor) -> Tensor:
        """The event function at (t, y), t as the user counts it."""
        return self.event_fn(t, y if self.shapes is None else flat_to_shapes(y, self.shapes))

    def event_time(self, s: Tensor) -> Tensor:
        """A time as the user counts it, in the dtype of t."""
        s = s.to(self.s)
        return s if self.sign > 0 else -s

    def norm_of(self, state: Tensor) -> Tensor:
        """The norm of one tensor like y0."""
        return self.norm(state if self.shapes is None else flat_to_shapes(state, self.shapes))

    def segments(self) -> list[int] | None:
        """The norm as segments for the kernels, None if only `norm_of` will do."""
        return segments_of(self.norm, self.shapes if self.shapes is not None else [self.y0.shape])

    def notify(
        self, name: str, s: float, y: Tensor, ds: float, dtype: torch.dtype
    ) -> tuple[float, float]:
        """Calls a callback, if func has it, with (t, y, dt), and returns s and ds after it.

        t is as the user counts it and dt is positive. All three are live: the solve goes on with
        what the callback has made of them (but for a negated t, which is a copy).
        """
        callback = self.callbacks.get(name)
        if callback is None:
            return s, ds
        state = y if self.shapes is None else flat_to_shapes(y, self.shapes)
        t, dt = (torch.tensor(v, dtype=dtype, device=y.device) for v in (self.sign * s, ds))
        callback(t, state, dt)
        return (t.item() if self.sign > 0 else s), dt.item()

    def shaped(self, solution: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Solutions [T, ...] as the user's state: a tensor, or a tuple of views."""
        if self.shapes is None:
            return solution
        return flat_to_shapes(solution, self.shapes, (solution.shape[0],))


def make_problem(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    solvers: dict[str, Any],
    event_fn: Callable | None = None,
    times: list[float] | None = None,
) -> Problem:
    """Checks the arguments in torchdiffeq's order.

    Args:
        times: the numbers of t where they are known, which saves reading them from a GPU.

    Raises:
        AssertionError, TypeError, ValueError: with torchdiffeq's texts.
    """
    check_function("func", func)
    if event_fn is not None:
        if len(t) != 2:
            raise ValueError(
                f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}."
            )
        event_fn = least_event(event_fn, t[0], y0)
    shapes = None
    norm: Callable = RmsNorm()
    parts = state_parts(y0)
    if not isinstance(y0, Tensor):
        shapes = [part.shape for part in parts]
        rtol, atol = tuple_tolerance("rtol", rtol, shapes), tuple_tolerance("atol", atol, shapes)
        y0 = torch.cat([part.reshape(-1) for part in parts])
        norm = MixedNorm()
    if not (torch.is_floating_point(y0) or torch.is_complex(y0)):
        raise TypeError(f"`y0` must be a floating point or complex Tensor but is a {y0.type()}")
    options = options_copy("options", options)
    method = "dopri5" if method is None else method
    if not isinstance(method, str) or method not in solvers:
        names = '{"' + '", "'.join(solvers) + '"}'
        raise ValueError(f'Invalid method "{method}". Must be one of {names}.')
    norm = options.pop("norm", norm)
    if times is None:
        times = output_times(t, remember=options.get("cuda_graph") is True)
    sign = -1 if len(times) > 1 and times[0] > times[1] else 1
    s = t
    if sign < 0:
        s = -t
        times = [-value for value in times]
        for name in ("step_t", "jump_t"):
            if isinstance(options.get(name), Tensor):
                options[name] = -options[name]
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if isinstance(tolerance, Tensor):
            assert not tolerance.requires_grad, f"{name} cannot require gradient"
    if s.device != y0.device:
        warn("t is not on the same device as y0. Coercing to y0.device.")
        s = s.to(y0.device)
    callbacks = {name: getattr(func, name) for name in CALLBACKS if hasattr(func, name)}
    unsupported = set(callbacks) - solvers[method].valid_callbacks()
    if unsupported:
        warn(f"Solver '{method}' does not support callbacks {unsupported}")
    callbacks = {name: callbacks[name] for name in callbacks if name not in unsupported}
    return Problem(
        func, y0.contiguous(), shapes, s, times, sign, rtol, atol, method, options, norm,
        callbacks, event_fn, SolveStats(method),
    )  # fmt: skip


def least_event(event_fn: Callable, t0: Tensor, y0: Tensor | tuple[Tensor, ...]) -> Callable:
    """One event of many: the least component, each with the sign that makes it positive at the
    start.
    """
    with torch.no_grad():
        values = event_fn(t0, y0)
        signs = torch.sign(values)
    if values.numel() > 0 and values.isnan().all():
        raise ValueError(f"event_fn has no number at t[0] = {t0}, and so no sign to change")
    return lambda t, y: torch.min(event_fn(t, y) * signs)


def _checked_slope(f: Any) -> Tensor:
    if not isinstance(f, Tensor):
        raise TypeError(f"func must return a tensor like its state, got {type(f).__name__}")
    return f
