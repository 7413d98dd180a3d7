"""Initial value problems that are solved side by side, each with its own times and steps.

The elements are either those of torch.func.vmap, whose tensors look like those of one problem, or
the rows of the state, the first dimension of everything. `lead` is that dimension, () under vmap;
all that controls the steps has one value an element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from pycnf.odeint import rounding
from pycnf.odeint.arguments import (
    check_function,
    numbers,
    options_copy,
    state_parts,
    tuple_tolerance,
)
from pycnf.odeint.norms import MixedNorm, RmsNorm, flat_to_shapes
from pycnf.odeint.problem import CALLBACKS
from pycnf.odeint.stats import SolveStats
from pycnf.odeint.transforms import first_true
from pycnf.warn import warn


@dataclass
class Elements:
    """Problems side by side.

    Attributes:
        func: the user's vector field.
        y0: states [*lead, ...]; [*lead, N] for a tuple state.
        shapes: of one element's parts of a tuple state, None for a tensor state.
        lead: () or (B,).
        s: times [T, *lead], ascending.
        sign: [*lead], -1 where the user's times descend.
        rtol, atol: a number or a tensor that broadcasts to y0.
        norm: of one element's state, as the user sees it.
        options: those of the method.
        stats: what the solves take.
    """

    func: Callable
    y0: Tensor
    shapes: list[Size] | None
    lead: tuple[int, ...]
    s: Tensor
    sign: Tensor
    rtol: Any
    atol: Any
    norm: Callable
    options: dict[str, Any]
    stats: SolveStats

    @property
    def element_dims(self) -> int:
        """Dimensions of one element's state."""
        return self.y0.dim() - len(self.lead)

    def spread(self, control: Tensor) -> Tensor:
        """Values [..., *lead] in a shape that broadcasts to states [..., *lead, ...]."""
        return control.reshape((*control.shape, *[1] * self.element_dims))

    def all_of(self, mask: Tensor) -> Tensor:
        """Whether a mask like the state is true all over an element, [*lead]."""
        return mask.flatten(len(self.lead)).all(-1) if self.element_dims else mask

    def call(self, s: Tensor, y: Tensor, broadcasts: bool = False) -> Tensor:
        """The field at times s [*lead] as one tensor, in the dtype that it came in.

        Args:
            broadcasts: the field of vmap's elements may return what broadcasts to the state.
        """
        t = (self.sign * s).to(rounding.real_dtype(y.dtype))
        if self.shapes is None:
            f = self._evaluate(t, y)
            if not isinstance(f, Tensor):
                raise TypeError(f"func must return a tensor like its state, got {type(f).__name__}")
            if f.shape == y.shape or (broadcasts and not self.lead):
                return f
            if self.lead or not (f.numel() == y.numel() == 1):
                raise ValueError(
                    f"func must return the shape of its state, {tuple(y.shape)}, "
                    f"got {tuple(f.shape)}"
                )
            return f.reshape(y.shape)
        parts = list(self._evaluate(t, flat_to_shapes(y, self.shapes, self.lead)))
        wanted = [self.lead + tuple(shape) for shape in self.shapes]
        sizes = [part.numel() for part in parts]
        if sizes != [Size(shape).numel() for shape in wanted]:
            raise ValueError(
                f"func must return the shapes of its state, {wanted}, "
                f"got {[tuple(part.shape) for part in parts]}"
            )
        return torch.cat([part.reshape(*self.lead, -1) for part in parts], -1)

    def _evaluate(self, t: Tensor, y: Tensor | tuple[Tensor, ...]) -> Any:
        self.stats.evaluations += 1
        try:
            return self.func(t, y)
        except RuntimeError as error:
            # Times [B] beside states [B, ...]: the mistake that fields written for one time make.
            if self.lead and "size of tensor" in str(error):
                raise RuntimeError(
                    f"{error}\nHere func is called with times of shape {tuple(t.shape)}, one for "
                    "each row of its state; a field written for one time may want t[:, None]"
                ) from error
            raise

    def norms(self, state: Tensor) -> Tensor:
        """Every element's norm [*lead] of one tensor like y0."""
        if isinstance(self.norm, RmsNorm):
            return self._rms(state)
        if isinstance(self.norm, MixedNorm):
            parts = flat_to_shapes(state, self.shapes, self.lead)
            return torch.stack([self._rms(part) for part in parts]).amax(0)
        norm = torch.func.vmap(self._given_norm) if self.lead else self._given_norm
        return norm(state)

    def _rms(self, state: Tensor) -> Tensor:
        squares = state.abs().pow(2)
        if squares.dim() > len(self.lead):
            squares = squares.flatten(len(self.lead)).mean(-1)
        return squares.sqrt()

    def _given_norm(self, state: Tensor) -> Tensor:
        parts = state if self.shapes is None else flat_to_shapes(state, self.shapes)
        return torch.as_tensor(self.norm(parts), device=state.device).abs()

    def times_option(self, name: str, value: Any, dtype: torch.dtype) -> Tensor | None:
        """Times that a user gave, [P], or [B, P] for rows, as ascending-time values [P, *lead];
        None for none.

        A list is not turned round with descending times: torchdiffeq does not either.
        """
        if value is None or len(value) == 0:
            return None
        given = numbers(name, value, dtype, self.y0.device)
        points = by_time(name, given, self.lead)
        return self.sign * points if isinstance(value, Tensor) else points

    def shaped(self, solution: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Solutions [T, *lead, ...] as the user's state."""
        if self.shapes is None:
            return solution
        return flat_to_shapes(solution, self.shapes, (solution.shape[0], *self.lead))


def by_time(name: str, t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Times [T], or [B, T] for rows, as [T, *lead]."""
    if not lead:
        assert t.dim() == 1, f"{name} must be one dimensional"
        return t
    if t.dim() == 1:
        return t[:, None].expand(-1, *lead)
    assert t.dim() == 2 and t.shape[0] == lead[0], (
        f"{name} must be [T], or [B, T] with B = {lead[0]} as in y0, got {list(t.shape)}"
    )
    return t.T


def make_elements(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str,
    options: dict[str, Any] | None,
    by_rows: bool,
) -> Elements:
    """Checks the arguments, which are `odeint`'s, in the same order and with the same texts.

    Args:
        by_rows: the elements are the rows of y0, else those of vmap.
    """
    check_function("func", func)
    shapes, lead = None, ()
    norm: Callable = RmsNorm()
    parts = state_parts(y0)
    if by_rows:
        sizes = {part.shape[0] if part.dim() else None for part in parts}
        if len(sizes) != 1 or None in sizes:
            raise ValueError(
                "y0 must have one first dimension, the batch, in every part, got "
                f"{[list(part.shape) for part in parts]}"
            )
        lead = (parts[0].shape[0],)
    if isinstance(y0, tuple):
        shapes = [part.shape[len(lead) :] for part in y0]
        rtol, atol = tuple_tolerance("rtol", rtol, shapes), tuple_tolerance("atol", atol, shapes)
        y0 = torch.cat([part.reshape(*lead, -1) for part in y0], -1)
        norm = MixedNorm()
    options = options_copy("options", options)
    norm = options.pop("norm", norm)
    assert isinstance(t, Tensor), "t must be a torch.Tensor"
    if not torch.is_floating_point(t):
        raise TypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    s = by_time("t", t, lead)
    if not len(s):
        raise IndexError("t must have at least the initial time, got no time")
    sign = torch.ones_like(s[0])
    if len(s) > 1:
        sign = torch.where((s[0] > s[1]).detach(), -sign, sign)
        s = sign * s
    bad = first_true(~(s[1:] > s[:-1]).all(0))
    assert bad is None, f"t must be strictly increasing or decreasing{bad}"
    endless = first_true(~torch.isfinite(s[[0, -1]]).all(0))
    if endless is not None:
        raise ValueError(f"t must be finite{endless}")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if isinstance(tolerance, Tensor):
            assert not tolerance.requires_grad, f"{name} cannot require gradient"
    if s.device != y0.device:
        warn("t is not on the same device as y0. Coercing to y0.device.")
        s, sign = s.to(y0.device), sign.to(y0.device)
    callbacks = {name for name in CALLBACKS if hasattr(func, name)}
    if callbacks:
        warn(
            f"Solver '{method}' does not support callbacks {callbacks} where every element of a "
            "batch takes its own steps, nor under torch.func's transforms"
        )
    return Elements(func, y0, shapes, lead, s, sign, rtol, atol, norm, options, SolveStats(method))
