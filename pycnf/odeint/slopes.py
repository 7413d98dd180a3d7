"""The newest slopes of an Adams method, laid out so that `rk_stage` adds them newest first.

`rk_stage` adds the rows of a window in groups (csrc/core/rk.h): of L + r rows, r < L, L the lanes
of 32 bytes, the last r come first, then the others, all in their order. So ages 3, 4, ... stand
before ages 0, 1, 2. The window moves down by a row for each new slope, which makes every row one
age older; only from age 2 to 3 a slope changes ends, so it is written at both at once. In float64
such a window takes seven slopes, and a second one the sum of those and four older slopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf._ops import kernels

_FIRST = 3  # ages at the end of the window
_AGES = 11
_ROOM = 32  # positions of the window before it goes back up
_LOW = _AGES


class SlopeWindow:
    """Copies of the newest eleven slopes; see the module.

    Args:
        y0: any state, contiguous, of a dtype that has kernels.
    """

    def __init__(self, y0: Tensor) -> None:
        self.ops: Any = kernels(y0)
        self.shape, self.zero = y0.shape, torch.zeros_like(y0)
        self.lanes = 32 // y0.element_size()
        self.split = _FIRST + self.lanes  # ages from here on are in the second window
        rows = _LOW + _ROOM + 2 * _AGES
        count = 1 if self.split >= _AGES else 2
        # Zeros: a weight of zero may meet a row that has never been written.
        self.rows = torch.zeros(count, rows, y0.numel(), dtype=y0.dtype, device=y0.device)
        self.top = _LOW + _ROOM
        self.base = self.top
        self.views: dict[int, tuple[Tensor, ...]] = {}

    def push(self, slope: Tensor) -> None:
        """Makes every slope one age older, and this one the newest."""
        if self.base == _LOW:
            self.base = self.top
            self.rows[:, self.top - _LOW :] = self.rows[:, : -self.top + _LOW].clone()
        self.base -= 1
        if self.base not in self.views:
            self.views[self.base] = self._views()
        _, _, *targets = self.views[self.base]
        for target in targets:
            target.copy_(slope)

    def _views(self) -> tuple[Tensor, ...]:
        """Both windows, and where a new slope goes, at the present base."""
        base, split = self.base, self.split
        ends = self.rows[0, base - _FIRST : base + self.lanes + 1 : split]
        targets = [ends.view(2, *self.shape)]
        if len(self.rows) > 1:
            targets.append(self.rows[1, base - split].view(self.shape))
        older = self.rows[-1, base : base + self.lanes + 1]
        return self.rows[0, base : base + split], older, *targets

    def sum(self, start: Tensor, weights: Sequence[float]) -> Tensor:
        """start + (((w₀ f₀ + w₁ f₁) + w₂ f₂) + ...), newest first, without a graph."""
        window, older, *_ = self.views[self.base]
        split = self.split
        padded = [*weights, *[0.0] * (_AGES - len(weights))]
        ordered = padded[_FIRST:split] + padded[:_FIRST]
        if len(weights) <= split:
            return self.ops.rk_stage(start, window, False, [], ordered, 1.0)
        newer = self.ops.rk_stage(self.zero, window, False, [], ordered, 1.0)
        weights = [*padded[split:], 1.0]
        return self.ops.rk_stage(start, older, False, [newer], weights, 1.0)
