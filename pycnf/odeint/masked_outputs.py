"""States at the output times of a batch whose elements reach them in steps of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycnf.odeint.elements import Elements

# Steps that are kept for one interpolation, at least.
_STEPS_AT_ONCE = 8


class Outputs:
    """Collects steps and interpolates many at once, so that a step costs nothing per output.

    No more steps are kept than there are outputs: without a graph, memory is a small multiple of
    the solution's.

    Args:
        elements: the problems.
        times: output times [T, *lead] in the dtype of time.
        interpolate: (times [n, *lead], *what was added, each with its n) -> states [n, ...].
    """

    def __init__(
        self, elements: Elements, times: Tensor, interpolate: Callable[..., Tensor]
    ) -> None:
        self.elements, self.times, self.interpolate = elements, times[1:], interpolate
        y0 = elements.y0
        # A copy, and now: the field may edit its input.
        self.first = y0.clone()[None]
        self.rest = y0.expand(len(self.times), *y0.shape)
        self.kept: list[tuple[Tensor, ...]] = []
        self.begin = times[0].detach()
        # To search in: stacked, since under vmap only that is sure to be contiguous.
        self.rows = torch.stack(times[1:].detach().unbind(), -1) if len(times) > 1 else None

    def add(self, reached: Tensor, *step: Tensor) -> None:
        """A step; `reached` [*lead] is where an element is after it, no matter whether it took it.

        What is added has one value an element or one state an element.
        """
        self.kept.append((reached.detach(), *step))
        if len(self.kept) >= max(len(self.times), _STEPS_AT_ONCE):
            self._fill()

    def solution(self) -> Tensor:
        """States [T, ...] at all times; those that no step has reached are the initial ones."""
        if self.kept:
            self._fill()
        return torch.cat([self.first, self.rest])

    def _fill(self) -> None:
        all_reached, *columns = zip(*self.kept)
        self.kept.clear()
        if self.rows is None:
            return
        elements, times = self.elements, self.times.detach()
        ends = torch.stack(all_reached, -1)
        # The first step that gets there. The sum is a batch where `ends` is one: searchsorted
        # would make a strided one, and warn of it.
        index = torch.searchsorted(ends, self.rows + torch.zeros_like(ends[..., :1]))
        index = index.movedim(-1, 0)
        covered = (times > self.begin) & (index < len(all_reached))
        index = index.clamp(max=len(all_reached) - 1)
        found = [self._pick(torch.stack(column), index) for column in columns]
        values = self.interpolate(self.times, covered, *found).to(self.rest.dtype)
        self.rest = torch.where(elements.spread(covered), values, self.rest)
        self.begin = all_reached[-1]

    def _pick(self, rows: Tensor, index: Tensor) -> Tensor:
        """From rows [C, ...] those at index [T, *lead]."""
        if rows.dim() > index.dim():
            index = self.elements.spread(index)
        return rows.gather(0, index.expand(index.shape[0], *rows.shape[1:]))


def fraction(times: Tensor, covered: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Where times lie in their steps, from 0 to 1; 0 for those not covered."""
    zero = torch.zeros_like(times)
    length = torch.where(covered, end - start, zero + 1)
    return torch.where(covered, times - start, zero) / length


def nearest(s: Tensor, direction: int) -> Tensor:
    """The number next to s, before (-1) or after (1) it, with the gradient of s."""
    value = s.detach()
    return s + (torch.nextafter(value, value + direction) - value)


def weighted(y: Tensor, k: Sequence[Tensor], weights: Tensor, h: Tensor) -> Tensor:
    """y + h Σ wⱼ kⱼ for h that broadcasts to y and weights [len(k)]."""
    rows = torch.stack(list(k))
    return y + (rows * (weights.reshape(-1, *[1] * h.dim()) * h)).sum(0)
