"""The times of one adaptive step: their values, as the field and the interpolant see them, and
their graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf._ops import time_tensors
from pycnf.odeint import rounding
from pycnf.odeint.problem import Problem


class _StageTime(torch.autograd.Function):
    """A time with a value of its own (rounded, perturbed) and the gradient of sign * (start + c
    size).
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, start: Tensor | None, size: Tensor | None, c: float, sign: int
    ):
        ctx.c, ctx.sign = c, sign
        ctx.targets = [None if x is None else (x.device, x.dtype) for x in (start, size)]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        grad = grad * ctx.sign
        start, size = ctx.targets
        to_start = None if start is None else grad.to(*start)
        to_size = None if size is None else (grad * ctx.c).to(*size)
        return None, to_start, to_size, None, None


class StepTimes:
    """Times of a step in ascending time s.

    Args:
        problem: gives the sign of time, and the dtype and device of the state.
        nodes: the tableau's c.
        start, end, size: in the dtype of time.
        start_graph, size_graph: start and size as 0-dim tensors where gradients flow to them.
        fixed_end: the end was prescribed, so the size carries the start's gradient, and the end
            carries none.
    """

    def __init__(
        self,
        problem: Problem,
        nodes: Sequence[float],
        start: float,
        end: float,
        size: float,
        start_graph: Tensor | None = None,
        size_graph: Tensor | None = None,
        fixed_end: bool = False,
    ) -> None:
        self.sign, self.device, self.nodes = problem.sign, problem.y0.device, nodes
        self.dtype = rounding.real_dtype(problem.y0.dtype)
        self.start, self.end, self.size = start, end, size
        self.start_graph, self.fixed_end = start_graph, fixed_end
        self.given_end: Tensor | None = None
        if fixed_end and start_graph is not None:
            size_graph = end - start_graph
        self.size_graph = size_graph
        self.round = rounding.rounding(self.dtype)
        self.h = self.sign * self.round(size)

    def prescribe_end(self, end: Tensor) -> None:
        """Lets gradients flow to a prescribed end, a 0-dim tensor."""
        self.given_end = end
        self.size_graph = end - (self.start if self.start_graph is None else self.start_graph)

    @property
    def has_graph(self) -> bool:
        """Whether gradients flow to any time of the step."""
        return self.start_graph is not None or self.size_graph is not None

    @property
    def h_graph(self) -> Tensor | None:
        """h as a 0-dim tensor in the state's real dtype, if gradients flow to it."""
        if self.size_graph is None:
            return None
        return self.sign * self.size_graph.to(self.device, self.dtype)

    @property
    def end_graph(self) -> Tensor | None:
        """The end as a 0-dim tensor, if gradients flow to it."""
        if self.fixed_end or not self.has_graph:
            return self.given_end
        if self.size_graph is None:
            return self.start_graph + self.size
        return self.size_graph + (self.start if self.start_graph is None else self.start_graph)

    def stages(self) -> list[Tensor]:
        """The times that the field is given at the stages after the first: 0-dim, in the state's
        real dtype.

        The end of a step is approached from within, in case the field is discontinuous there.
        """
        round_, sign = self.round, self.sign
        start, size = round_(self.start), round_(self.size)
        values = []
        for c in self.nodes[1:]:
            if c == 1.0:
                s = rounding.before(round_(self.end), self.dtype)
            else:
                s = round_(start + round_(round_(c) * size))
            values.append(sign * s)
        times = time_tensors(values, self.dtype, self.device)
        if not self.has_graph:
            return times
        return [self._with_graph(t, c) for t, c in zip(times, self.nodes[1:])]

    def at(self, s: float, c: float = 0.0) -> Tensor:
        """The user's time of s, with the gradient of start + c size."""
        (value,) = time_tensors([self.sign * s], self.dtype, self.device)
        return self._with_graph(value, c) if self.has_graph else value

    def _with_graph(self, value: Tensor, c: float) -> Tensor:
        return _StageTime.apply(value, self.start_graph, self.size_graph, c, self.sign)

    def resize(self, size: float) -> float:
        """Takes another size (an accept callback's) for what is still to come, the interpolant."""
        self.size, self.h = size, self.sign * self.round(size)
        return size

    def point(self, output: float) -> float:
        """Where an output time lies in the step, from 0 to 1."""
        start, end = self.start, self.end
        assert start <= output <= end, (
            f"invalid interpolation, fails `t0 <= t <= t1`: {start}, {output}, {end}"
        )
        return (output - start) / (end - start)

    def points(self, outputs: Tensor) -> Tensor:
        """`point` of output times [n] with their graph, in the dtype of time."""
        start = self.start if self.start_graph is None else self.start_graph
        end = self.end if self.end_graph is None else self.end_graph
        return (outputs - start) / (end - start)
