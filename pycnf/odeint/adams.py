"""Adams methods on a given grid: `explicit_adams` (Adams-Bashforth) and `implicit_adams`
(Adams-Bashforth-Moulton by functional iteration), with torchdiffeq's start, orders and rounding.

A step uses the slopes at the starts of the last steps, one in a new solve, two after the first
step, up to max_order - 1; fewer than three are served by rk4 (the 3/8 rule). The slope that the
corrector finds at the end of a step is not kept: the next step evaluates its own.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pycnf import reference
from pycnf._ops import kernels
from pycnf.odeint.fixed_grid import Ends, FixedGridSolver, problem_call
from pycnf.odeint.problem import Problem
from pycnf.odeint.tableau import TABLEAUX, Tableau

_MIN_ORDER = 4
_MAX_ORDER = 12


@functools.cache
def adams_weights(terms: int, implicit: bool) -> tuple[float, ...]:
    """Weights wⱼ of y(t + h) = y(t) + h Σ wⱼ fⱼ, for f at t, t - h, t - 2h, ... (explicit) or at
    t + h, t, t - h, ... (implicit), rounded from exact fractions.

    Source: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, III.1: the γⱼ of
    the backward differences by their recurrences (1.7) and (1.12).

    Example:
        >>> adams_weights(2, implicit=False), adams_weights(2, implicit=True)
        ((1.5, -0.5), (0.5, 0.5))
    """
    gammas: list[Fraction] = []
    for m in range(terms):
        whole = Fraction(0 if implicit and m > 0 else 1)
        gammas.append(whole - sum(g / (m + 1 - i) for i, g in enumerate(gammas)))
    return tuple(
        float((-1) ** j * sum(math.comb(m, j) * gammas[m] for m in range(j, terms)))
        for j in range(terms)
    )


def sum_in_order(start: Tensor, weights: Sequence[float], rows: Sequence[Tensor]) -> Tensor:
    """start + (((w₀ r₀ + w₁ r₁) + w₂ r₂) + ...) with gradients, each operation rounded; all tensors
    alike.

    `rk_combine` adds in groups (csrc/core/rk.h). With as many terms as `lanes`, or fewer than twice
    as many, only the first group has more than one: rows are handed over so that groups follow
    their order.
    """
    weights, rows, combine = list(weights), list(rows), kernels(start).rk_combine
    lanes = 32 // start.element_size()
    in_one = 2 * lanes - 1
    while len(rows) > in_one:
        head = combine(torch.zeros_like(start), *_grouped(rows[:in_one], weights[:in_one], lanes))
        rows, weights = [head, *rows[in_one:]], [1.0, *weights[in_one:]]
    return combine(start, *_grouped(rows, weights, lanes))


def _grouped(
    rows: list[Tensor], weights: list[float], lanes: int
) -> tuple[list[Tensor], list[float], float]:
    """Arguments of `rk_combine` that make it add rows in their order."""
    count = len(rows)
    if count >= lanes:
        rest = count - lanes  # the first group is what comes after the lanes
        rows, weights = rows[rest:] + rows[:rest], weights[rest:] + weights[:rest]
    elif count > 4:
        # The first group is the first term and those after the fourth.
        rows = rows[:1] + rows[-3:] + rows[1:-3]
        weights = weights[:1] + weights[-3:] + weights[1:-3]
    return rows, weights, 1.0


def _like(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape


class AdamsBashforth(FixedGridSolver):
    """One solve; see the module.

    Args:
        tape: must be None; a step depends on those before it, which a tape of states lacks.
        max_order: the most slopes that a step uses, and one.
        max_iters: of the corrector, if there is one.
        options: of every method on a grid.
    """

    def __init__(
        self,
        problem: Problem,
        tableau: Tableau | None,
        name: str,
        tape: list | None = None,
        *,
        max_order: Any = _MAX_ORDER,
        max_iters: int = 4,
        **options: Any,
    ) -> None:
        if tape is not None:
            raise ValueError(
                f'gradient="discrete" needs a one-step method, got method="{problem.method}"; '
                "pycnf.odeint gives the same gradient"
            )
        super().__init__(problem, TABLEAUX["rk4"], name, **options)
        assert max_order <= _MAX_ORDER, f"max_order must be at most {_MAX_ORDER}"
        if max_order < _MIN_ORDER:
            warnings.warn(
                f"max_order is below {_MIN_ORDER}, so the solver reduces to `rk4`.", stacklevel=4
            )
        y0 = problem.y0
        self.rtol = torch.as_tensor(problem.rtol, dtype=y0.dtype, device=y0.device)
        self.atol = torch.as_tensor(problem.atol, dtype=y0.dtype, device=y0.device)
        self.max_iters = max_iters
        self.slopes: deque[Tensor] = deque(maxlen=int(max_order) - 1)  # newest first
        self.newest: float | None = None
        # Whether kernels can add the slopes: no dtype or shape has asked for promotion so far.
        self.alike = kernels(y0) is not reference and y0.dim() > 0

    def _step(
        self, y0: Tensor, ends: Ends, times: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        if ends.graph is not None:
            times = None
        f0 = self._slope(0, y0, ends, times)
        self.alike = self.alike and _like(f0, y0) and _like(y0, self.problem.y0)
        if self.newest != ends.start:
            self.slopes.appendleft(f0)
            self.newest = ends.start
        if len(self.slopes) < _MIN_ORDER - 1:
            return y0 + self._rk4(y0, ends, times), f0
        return self._advance(y0, ends, times), f0

    def _advance(self, y0: Tensor, ends: Ends, times: list[Tensor] | None) -> Tensor:
        """The state after a step, from the slopes."""
        weights = adams_weights(len(self.slopes), False)
        if self.alike and ends.graph is None:
            h = self.problem.sign * ends.size
            return sum_in_order(y0, [h * weight for weight in weights], self.slopes)
        return y0 + self._sum_by_promotion(y0, self._h(ends) * self._float64(weights))

    def _slope(self, stage: int, y: Tensor, ends: Ends, times: list[Tensor] | None) -> Tensor:
        """The field at a stage of rk4, in a tensor that the field does not use again."""
        problem = self.problem
        slope = problem.joined(problem_call(problem, self._time(stage, y, ends, times), y))
        return slope if slope.requires_grad or problem.shapes is not None else slope.clone()

    def _time(self, stage: int, y: Tensor, ends: Ends, times: list[Tensor] | None) -> Tensor:
        if times is None or y.dtype != self.problem.y0.dtype:
            return self._stage_time(y, stage, ends)
        return times[stage]

    def _rk4(self, y0: Tensor, ends: Ends, times: list[Tensor] | None) -> Tensor:
        """The increment of an rk4 step, rounded as torchdiffeq does it: the slopes that follow
        inherit every bit.
        """
        h, third = self._h(ends), 1 / 3
        k1 = self.slopes[0]
        k2 = self._slope(1, y0 + h * k1 * third, ends, times)
        k3 = self._slope(2, y0 + h * (k2 - k1 * third), ends, times)
        k4 = self._slope(3, y0 + h * (k1 - k2 + k3), ends, times)
        return (k1 + 3 * (k2 + k3) + k4) * h * 0.125

    def _h(self, ends: Ends) -> Tensor:
        """The step as a 0-dim tensor of time's dtype, with its graph."""
        sign, s = self.problem.sign, self.problem.s
        if ends.graph is not None:
            return sign * ends.size_graph
        return torch.tensor(sign * ends.size, dtype=s.dtype, device=s.device)

    def _float64(self, weights: Sequence[float]) -> Tensor:
        return torch.tensor(weights, dtype=torch.float64, device=self.problem.s.device)

    def _sum_by_promotion(self, y0: Tensor, weights: Tensor) -> Tensor:
        """Σ wⱼ fⱼ, float64 weights times slopes of whatever dtype and shape, in y0's dtype."""
        return sum(w * slope for w, slope in zip(weights.unbind(), self.slopes)).to(y0.dtype)


class AdamsBashforthMoulton(AdamsBashforth):
    """The same with a corrector, iterated until two increments agree to the tolerances."""

    def __init__(self, problem: Problem, *args: Any, **options: Any) -> None:
        super().__init__(problem, *args, **options)
        if self.max_iters < 1:
            raise ValueError(f"max_iters must be at least 1, got {self.max_iters}")
        y0 = problem.y0
        self.ops: Any = kernels(y0)
        self.row = torch.empty(1, y0.numel(), dtype=y0.dtype, device=y0.device)
        self.ratio = torch.empty_like(y0)
        plain = self.rtol.dim() == 0 and self.atol.dim() == 0 and y0.numel() > 0
        self.tolerances = (
            [x.to("cpu", torch.float64) for x in (self.rtol, self.atol)]
            if plain and self.alike
            else None
        )

    def _advance(self, y0: Tensor, ends: Ends, times: list[Tensor] | None) -> Tensor:
        problem = self.problem
        predictor = adams_weights(len(self.slopes), False)
        newest, *others = adams_weights(len(self.slopes) + 1, True)
        alike = self.alike and ends.graph is None
        if alike:
            h, zero = problem.sign * ends.size, torch.zeros_like(y0)
            change = sum_in_order(zero, [h * weight for weight in predictor], self.slopes)
            known = h * sum_in_order(zero, others, self.slopes)
        else:
            h = self._h(ends)
            change = self._sum_by_promotion(y0, h * self._float64(predictor))
            known = h * self._sum_by_promotion(y0, self._float64(others))
            newest = self._float64(newest)
        weight = h * newest
        for _ in range(self.max_iters):
            before, y = change, y0 + change
            f = problem.joined(problem_call(problem, self._time(3, y, ends, times), y))
            alike = alike and _like(f, y0)
            if not alike:
                weight = torch.as_tensor(weight, dtype=torch.float64)
                change = (weight * f).to(y0.dtype) + known
            elif torch.is_grad_enabled() and (f.requires_grad or known.requires_grad):
                change = sum_in_order(known, [weight], [f])
            else:
                change = self.ops.rk_stage(known, self.row, False, [f], [weight], 1.0)
            if self._converged(before.detach(), change.detach(), alike):
                break
        else:
            warnings.warn(
                "Functional iteration did not converge. Solution may be incorrect.", stacklevel=5
            )
            self.slopes.pop()
        return y0 + change

    def _converged(self, before: Tensor, change: Tensor, alike: bool) -> bool:
        """Whether two increments differ by less than atol + rtol |the larger| in every value."""
        error = before - change
        if not (alike and self.tolerances):
            size = torch.maximum(before.abs(), change.abs())
            ratio = error.abs() / (self.atol + self.rtol * size)
            return bool((ratio.abs() < 1).all())
        n = error.numel()
        rms = self.ops.rk_finish(
            before, self.row, False, [error], change, [], [1.0], 1.0, *self.tolerances, [0, n],
            self.ratio,
        )[0].item()  # fmt: skip
        # The largest ratio lies between rms and rms √n: most often that decides.
        if rms * math.sqrt(n) < 0.999:
            return True
        return rms < 1.001 and bool((self.ratio.abs() < 1).all())
