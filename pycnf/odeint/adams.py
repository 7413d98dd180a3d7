"""Adams methods on a given grid: `explicit_adams` (Adams-Bashforth) and `implicit_adams`
(Adams-Bashforth-Moulton by functional iteration), with torchdiffeq's start, orders and rounding.

A step uses the slopes at the starts of the last steps, one in a new solve, two after the first
step, up to max_order - 1; fewer than three are served by rk4 (the 3/8 rule). The slope that the
corrector finds at the end of a step is not kept: the next step evaluates its own.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pycnf._ops import has_kernels, kernels
from pycnf.odeint.arguments import numbers
from pycnf.odeint.explicit_grid import ExplicitGridSolver
from pycnf.odeint.fixed_grid import Ends, FixedGridSolver, problem_call
from pycnf.odeint.problem import Problem
from pycnf.odeint.tableau import Tableau
from pycnf.warn import warn

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


class AdamsBashforth(ExplicitGridSolver):
    """One solve; see the module.

    Args:
        tape: must be None; a step depends on those before it, which a tape of states lacks.
        max_order: the most slopes that a step uses, and one.
        max_iters: of the corrector, if there is one.
        options: of every method on a grid.
    """

    one_loop = False
    # No step stands for itself.
    _plain_steps = FixedGridSolver._plain_steps

    def __init__(
        self,
        problem: Problem,
        tableau: Tableau,
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
        super().__init__(problem, tableau, name, **options)
        assert max_order <= _MAX_ORDER, f"max_order must be at most {_MAX_ORDER}"
        if max_order < _MIN_ORDER:
            warn(f"max_order is below {_MIN_ORDER}, so the solver reduces to `rk4`.")
        y0 = problem.y0
        self.rtol = numbers("rtol", problem.rtol, y0.dtype, y0.device)
        self.atol = numbers("atol", problem.atol, y0.dtype, y0.device)
        self.max_iters = max_iters
        self.slopes: deque[Tensor] = deque(maxlen=int(max_order) - 1)  # newest first
        self.newest: float | None = None
        # Whether kernels can add the slopes: no dtype or shape has asked for promotion so far.
        self.alike = has_kernels(y0.dtype, y0.device) and y0.dim() > 0

    def _step(self, y0: Tensor, ends: Ends, slopes: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        f0 = self._slope(0, y0, ends)
        self.alike = self.alike and _like(f0, y0) and _like(y0, self.problem.y0)
        if self.newest != ends.start:
            self.slopes.appendleft(f0)
            self.newest = ends.start
        if len(self.slopes) < _MIN_ORDER - 1:
            return y0 + self._rk4(y0, ends), f0
        return self._advance(y0, ends), f0

    def _advance(self, y0: Tensor, ends: Ends) -> Tensor:
        """The state after a step, from the slopes."""
        weights = adams_weights(len(self.slopes), False)
        if self.alike and ends.graph is None:
            h = self.problem.sign * ends.size
            return _sum(y0, [h * weight for weight in weights], self.slopes)
        return y0 + self._sum_by_promotion(y0, self._h(ends) * self._float64(weights))

    def _slope(self, stage: int, y: Tensor, ends: Ends) -> Tensor:
        """The field at a stage of rk4, in a tensor that the field does not use again."""
        problem = self.problem
        slope = problem.joined(problem_call(problem, self._stage_time(y, stage, ends), y))
        return slope if slope.requires_grad or problem.shapes is not None else slope.clone()

    def _rk4(self, y0: Tensor, ends: Ends) -> Tensor:
        """The increment of an rk4 step, rounded as torchdiffeq does it: the slopes that follow
        inherit every bit.
        """
        h, third = self._h(ends), 1 / 3
        k1 = self.slopes[0]
        k2 = self._slope(1, y0 + h * k1 * third, ends)
        k3 = self._slope(2, y0 + h * (k2 - k1 * third), ends)
        k4 = self._slope(3, y0 + h * (k1 - k2 + k3), ends)
        return (k1 + 3 * (k2 + k3) + k4) * h * 0.125

    def _h(self, ends: Ends) -> Tensor:
        """The step as a 0-dim tensor of time's dtype, with its graph."""
        sign, s = self.problem.sign, self.problem.s
        if ends.graph is not None:
            return sign * ends.size_graph
        return torch.tensor(sign * ends.size, dtype=s.dtype, device=s.device)

    def _float64(self, weights: Sequence[float] | float) -> Tensor:
        return torch.tensor(weights, dtype=torch.float64, device=self.problem.s.device)

    def _sum_by_promotion(self, y0: Tensor, weights: Tensor) -> Tensor:
        """Σ wⱼ fⱼ, float64 weights times slopes of whatever dtype and shape, in y0's dtype."""
        return sum(w * slope for w, slope in zip(weights.unbind(), self.slopes)).to(y0.dtype)


class AdamsBashforthMoulton(AdamsBashforth):
    """The same with a corrector, iterated until two increments agree to the tolerances."""

    def __init__(self, problem: Problem, *arguments: Any, **options: Any) -> None:
        super().__init__(problem, *arguments, **options)
        if self.max_iters < 1:
            raise ValueError(f"max_iters must be at least 1, got {self.max_iters}")
        self.zero = torch.zeros_like(problem.y0)

    def _advance(self, y0: Tensor, ends: Ends) -> Tensor:
        problem = self.problem
        predictor = adams_weights(len(self.slopes), False)
        newest, *others = adams_weights(len(self.slopes) + 1, True)
        alike = self.alike and ends.graph is None
        if alike:
            h = problem.sign * ends.size
            change = _sum(self.zero, [h * weight for weight in predictor], self.slopes)
            known = _sum(self.zero, others, self.slopes)
        else:
            h = self._h(ends)
            change = self._sum_by_promotion(y0, h * self._float64(predictor))
            known = self._sum_by_promotion(y0, self._float64(others))
            newest = self._float64(newest)
        weight = h * newest
        for _ in range(self.max_iters):
            before, y = change, y0 + change
            f = problem.joined(problem_call(problem, self._stage_time(y, 3, ends), y))
            alike = alike and _like(f, y0)
            if alike:
                change = _sum(self.zero, [h, weight], [known, f])
            else:
                weight = torch.as_tensor(weight, dtype=torch.float64)
                change = (weight * f).to(y0.dtype) + h * known
            if self._converged(before.detach(), change.detach()):
                break
        else:
            warn("Functional iteration did not converge. Solution may be incorrect.")
            self.slopes.pop()
        return y0 + change

    def _converged(self, before: Tensor, change: Tensor) -> bool:
        """Whether two increments differ by less than atol + rtol |the larger| in every value."""
        size = torch.maximum(before.abs(), change.abs())
        ratio = (before - change).abs() / (self.atol + self.rtol * size)
        return bool((ratio.abs() < 1).all())


def _sum(start: Tensor, weights: Sequence[float], rows: Sequence[Tensor]) -> Tensor:
    """start + (((w₀ r₀ + w₁ r₁) + w₂ r₂) + ...) with gradients; all tensors alike."""
    return kernels(start).rk_combine(start, list(rows), weights, 1.0, None, True)


def _like(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape
