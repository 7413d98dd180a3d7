"""Norms that decide on accepting a step, as callables and, where the kernels can compute them, as
segments of the state.

A norm that is not one of these classes is called with the scaled error, as the user wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Size, Tensor


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of |x|."""
    return x.abs().pow(2).mean().sqrt()


def flat_to_shapes(flat: Tensor, shapes: Sequence[Size], lead: tuple[int, ...] = ()) -> tuple:
    """The parts of flat states [*lead, N] as views [*lead, *shape]."""
    parts = []
    begin = 0
    for shape in shapes:
        end = begin + shape.numel()
        parts.append(flat.narrow(-1, begin, end - begin).view((*lead, *shape)))
        begin = end
    return tuple(parts)


def _pairs(shapes: Sequence[Size], begin: int = 0) -> list[int]:
    pairs = []
    for shape in shapes:
        pairs += [begin, begin + shape.numel()]
        begin += shape.numel()
    return pairs


class RmsNorm:
    """RMS of a tensor state; the default for tensors."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return rms(tensor)

    def segments(self, shapes: Sequence[Size]) -> list[int]:
        """One segment, the whole state."""
        return [0, sum(shape.numel() for shape in shapes)]


class MixedNorm:
    """Largest RMS of the parts of a tuple state; the default for tuples."""

    def __call__(self, tensor_tuple: Sequence[Tensor]) -> Tensor | float:
        return max([rms(part) for part in tensor_tuple]) if len(tensor_tuple) else 0.0

    def segments(self, shapes: Sequence[Size]) -> list[int]:
        """One segment a part."""
        return _pairs(shapes)


class AdjointNorm:
    """Norm of the adjoint state (t, y, adj_y, *params): the largest of |t|, the state's norm of y
    and adj_y, and each RMS of params.

    With `parameters=False` it is the seminorm, blind to the parameter part (Kidger, Chen & Lyons,
    "Hey, that's not an ODE", ICML 2021).
    """

    def __init__(
        self, state_norm: Callable, shapes: Sequence[Size] | None, parameters: bool
    ) -> None:
        self.state_norm = state_norm
        self.shapes = shapes
        self.parameters = parameters

    def _state(self, y: Tensor) -> Tensor | float:
        return self.state_norm(y if self.shapes is None else flat_to_shapes(y, self.shapes))

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        t, y, adj_y, *params = parts
        norms = [t.abs(), self._state(y), self._state(adj_y)]
        if self.parameters:
            norms.append(MixedNorm()(params))
        return max(norms)

    def segments(self, shapes: Sequence[Size]) -> list[int] | None:
        """Segments of t, y, adj_y and, but for the seminorm, each parameter; None for a user's
        state norm.
        """
        state = segments_of(self.state_norm, self.shapes or [shapes[1]])
        if state is None:
            return None
        size = shapes[1].numel()
        pairs = [0, 1, *(1 + at for at in state), *(1 + size + at for at in state)]
        return pairs + _pairs(shapes[3:], 1 + 2 * size) if self.parameters else pairs


class FlatNorm:
    """A norm of tuples as a norm of flat states."""

    def __init__(self, norm: Callable, shapes: Sequence[Size]) -> None:
        self.norm, self.shapes = norm, shapes

    def __call__(self, flat: Tensor) -> Tensor | float:
        return self.norm(flat_to_shapes(flat, self.shapes))

    def segments(self, shapes: Sequence[Size]) -> list[int] | None:
        """Those of the norm of tuples."""
        return segments_of(self.norm, self.shapes)


def segments_of(norm: Callable, shapes: Sequence[Size]) -> list[int] | None:
    """Pairs (begin, end) of a norm that the kernels compute, None for any other."""
    if isinstance(norm, RmsNorm | MixedNorm | AdjointNorm | FlatNorm):
        return norm.segments(shapes)
    return None
