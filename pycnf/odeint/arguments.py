"""What users pass, looked at piece by piece: each function gives a value the form that solvers use,
or an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pycnf.warn import warn


def options_copy(name: str, options: Any) -> dict[str, Any]:
    """Options as a dict that may be edited; None is none."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(options).__name__}")
    return dict(options)


def number(name: str, value: Any) -> float:
    """A value as one Python number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {_shown(value)}") from None


def count(name: str, value: Any) -> int:
    """A value as a whole number."""
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be a whole number, got {_shown(value)}") from None


def choice(name: str, value: Any) -> bool | None:
    """A value that must be True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected True, False or None")
    return value


def warn_not_recorded(cuda_graph: Any, reason: str) -> None:
    """Says why an option cuda_graph is not served, where it is set."""
    if choice("cuda_graph", cuda_graph):
        warn(f"cuda_graph: {reason}; solved without")


def check_step_size(value: Any) -> None:
    """Refuses a step size that makes no grid."""
    size = number("step_size", value)
    if not size > 0:
        raise ValueError(f"step_size must be positive, got {size}")


def numbers(name: str, value: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """A value as a tensor of numbers, with its graph."""
    try:
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a tensor, got {_shown(value)}") from None


def _shown(value: Any) -> str:
    """A value in an error, by its shape if it is a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def check_function(name: str, value: Any) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}")


def state_parts(y0: Any) -> tuple[Tensor, ...]:
    """The tensors of a state, one or a tuple of them."""
    assert isinstance(y0, Tensor | tuple), "y0 must be either a torch.Tensor or a tuple"
    parts = (y0,) if isinstance(y0, Tensor) else y0
    if not parts:
        raise ValueError("y0 must have at least one part, got an empty tuple")
    for i, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise TypeError(f"y0 must be a tuple of tensors, got {part!r} in place {i}")
    return parts


def parameters(name: str, given: Any) -> tuple[Tensor, ...]:
    """Parameters, given by any iterable, as a tuple."""
    if not isinstance(given, Iterable):
        raise TypeError(f"{name} must be an iterable of tensors, got {given!r}")
    given = tuple(given)
    for i, each in enumerate(given):
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} must be tensors, got {each!r} in place {i}")
    return given


def tuple_tolerance(name: str, tolerance: Any, shapes: list[Size]) -> Any:
    """A tolerance per part, spread over the values of the state; anything not iterable is left
    alone.
    """
    try:
        iter(tolerance)
    except TypeError:
        return tolerance
    tolerance = tuple(tolerance)
    assert len(tolerance) == len(shapes), (
        f"If using tupled {name} it must have the same length as the tuple y0"
    )
    each = [numbers(name, value) for value in tolerance]
    return torch.cat([value.expand(shape.numel()) for value, shape in zip(each, shapes)])


_times_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _numbers_of(t: Tensor, remember: bool) -> list[float]:
    """A tensor's numbers. Reading a GPU waits for all that was asked of it, and cannot be captured;
    a tensor that comes again unchanged can be remembered.
    """
    if not t.is_cuda or t.is_inference():
        return t.tolist()
    version, numbers = _times_read.get(t, (None, []))
    capturing = torch.cuda.is_current_stream_capturing()
    if capturing and version != t._version:
        raise RuntimeError(
            "t is on a GPU and cannot be read during a capture: solve once with this very tensor "
            "before torch.cuda.graph"
        )
    if version != t._version or not (remember or capturing):
        numbers = t.tolist()
        _times_read[t] = (t._version, numbers)
    return list(numbers)


def output_times(t: Any, remember: bool = False) -> list[float]:
    """Times [T] as numbers, in the order given; `remember`: where the numbers only guide checks."""
    assert isinstance(t, Tensor), "t must be a torch.Tensor"
    if not torch.is_floating_point(t):
        raise TypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    assert t.ndimension() == 1, "t must be one dimensional"
    times = _numbers_of(t, remember)
    if not times:
        raise IndexError("t must have at least the initial time, got no time")
    if not all(a < b for a, b in pairwise(times)):
        descending = all(a > b for a, b in pairwise(times))
        assert descending, "t must be strictly increasing or decreasing"
    return times


def check_finite_times(first: float, last: float) -> None:
    """Refuses an interval that no number of steps would cross."""
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(f"t must be finite, got times from {first} to {last}")


def warn_unused(solver: str, unused: dict[str, Any]) -> None:
    """torchdiffeq's warning about options that a method does not have."""
    for name in ("func", "y0", "rtol", "atol"):
        if name in unused:
            raise TypeError(f"{solver}() got multiple values for keyword argument '{name}'")
    if unused:
        warn(f"{solver}: Unexpected arguments {unused}")
