"""The adaptive solver for elements that each take their own steps, in torch operations.

The step sequence of an element is that of `adaptive`, but step control runs on tensors with one
value an element and a branch is a `torch.where`. An element that is done waits: the field goes on
being evaluated for it, at its initial time and state, where it is known to be defined, so that
nothing that is thrown away can bring a NaN into a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycnf import reference
from pycnf.odeint import rounding
from pycnf.odeint.arguments import check_function, count, numbers, warn_not_recorded, warn_unused
from pycnf.odeint.elements import Elements
from pycnf.odeint.masked_outputs import Outputs, fraction, nearest, weighted
from pycnf.odeint.tableau import Tableau
from pycnf.odeint.transforms import beneath, first_true, read_flags

_UNLIMITED = 2**31 - 1


class MaskedAdaptiveSolver:
    """One solve of all elements; see the module. Options are those of `AdaptiveSolver`."""

    def __init__(
        self,
        elements: Elements,
        tableau: Tableau,
        name: str,
        *,
        first_step: Any = None,
        step_t: Any = None,
        jump_t: Any = None,
        dtype: torch.dtype = torch.float64,
        safety: float = 0.9,
        ifactor: float = 10.0,
        dfactor: float = 0.2,
        min_step: float = 0.0,
        max_step: float = math.inf,
        max_num_steps: int = _UNLIMITED,
        cuda_graph: bool | None = None,
        **unused: Any,
    ) -> None:
        warn_unused(name, unused)
        warn_not_recorded(cuda_graph, "every element takes its own steps")
        y0 = elements.y0
        self.elements, self.tableau = elements, tableau
        if y0.device.type == "mps" and dtype == torch.float64:
            dtype = torch.float32
        self.state_dtype = rounding.real_dtype(y0.dtype)
        self.dtype = torch.promote_types(dtype, self.state_dtype)
        check_function("norm", elements.norm)
        self.rtol = self._tolerance("rtol", elements.rtol)
        self.atol = self._tolerance("atol", elements.atol)
        # The dtype in which torch has the scaled error of one element's state.
        plain = elements.element_dims > 0 and self.rtol.dim() == 0 and self.atol.dim() == 0
        self.error_dtype = self.state_dtype if plain else self.dtype
        self.first_step = first_step
        self.safety, self.ifactor = (
            self._control("safety", safety),
            self._control("ifactor", ifactor),
        )
        self.dfactor = self._control("dfactor", dfactor)
        self.min_step, self.max_step = (
            self._control("min_step", min_step),
            self._control("max_step", max_step),
        )
        self.max_num_steps = count("max_num_steps", max_num_steps)
        self.times = elements.s.to(self.dtype)
        self.stops = [
            _Stops(points, self.times[0])
            for points in (
                elements.times_option(option, value, self.dtype)
                for option, value in (("step_t", step_t), ("jump_t", jump_t))
            )
        ]
        self.c = y0.new_tensor(tableau.c, dtype=self.state_dtype)
        self.a = [y0.new_tensor(row, dtype=self.state_dtype) for row in tableau.a]
        self.b, self.e, self.m = (
            y0.new_tensor(row, dtype=self.state_dtype) for row in (tableau.b, tableau.e, tableau.m)
        )

    def _tolerance(self, name: str, value: Any) -> Tensor:
        y0 = self.elements.y0
        tolerance = numbers(name, value, self.dtype, y0.device)
        if tolerance.numel() > 1 and not _broadcasts(tolerance.shape, y0.shape):
            raise ValueError(
                f"{name} must broadcast to the state's shape {tuple(y0.shape)}, "
                f"got {tuple(tolerance.shape)}"
            )
        return tolerance

    def _control(self, name: str, value: Any) -> Tensor:
        """A number for all elements, or [*lead] with one for each."""
        lead = self.elements.lead
        control = numbers(name, value, self.dtype, self.elements.y0.device)
        if control.numel() == 1:
            return control.reshape(())
        if control.shape != lead:
            wanted = f"one number or {lead[0]}, one for each row of y0" if lead else "one number"
            raise ValueError(f"{name} must be {wanted}, got {tuple(control.shape)}")
        return control

    # ---- the solve -------------------------------------------------------------------------------

    def integrate(self) -> Tensor:
        """States at the output times, [T, *lead, ...]."""
        elements, times = self.elements, self.times
        outputs = Outputs(elements, times, self._interpolate)
        y, s, last = elements.y0, times[0], times[-1]
        fresh = elements.call(s, y)
        ds = self._first_step(fresh).expand(s.shape)
        f = fresh.to(y.dtype)
        self.origin = (s.detach(), y.detach())
        self._check_stops()
        taken = torch.zeros_like(s)
        self.accepted = self.rejected = torch.zeros_like(s, dtype=torch.int64)
        while True:
            ds = torch.where(torch.isfinite(ds), ds, self.min_step)
            ds = ds.clamp(self.min_step, self.max_step)
            busy = s < last
            if not self._go_on(busy, taken, s, ds, y):
                stats = elements.stats
                stats.accepted = beneath(self.accepted)[0]
                stats.rejected = beneath(self.rejected)[0]
                return outputs.solution()
            s, ds, y, f, passed = self._attempt(busy, s, ds, y, f, outputs)
            if self.max_num_steps < _UNLIMITED:
                taken = torch.where(passed, torch.zeros_like(taken), taken + 1)

    def _go_on(self, busy: Tensor, taken: Tensor, s: Tensor, ds: Tensor, y: Tensor) -> bool:
        """Whether any element is unfinished; an error if one cannot go on."""
        stuck = busy & ~(s + ds > s)
        broken = busy & ~self.elements.all_of(torch.isfinite(y))
        tired = busy & (taken >= self.max_num_steps)
        anywhere, everywhere = read_flags([busy, tired, stuck, broken])
        self.all_busy = everywhere[0]
        if anywhere[1]:
            element, limit = first_true(tired), self.max_num_steps
            count = int(element.of(taken))
            raise AssertionError(f"max_num_steps exceeded ({count}>={limit}){element}")
        if anywhere[2]:
            element = first_true(stuck)
            raise AssertionError(f"underflow in dt {element.of(ds).item()}{element}")
        if anywhere[3]:
            element = first_true(broken)
            raise AssertionError(f"non-finite values in state `y`: {element.of(y)}{element}")
        return anywhere[0]

    def _first_step(self, f0: Tensor) -> Tensor:
        """Hairer, Norsett & Wanner, Solving ODEs I, II.4; f0 in the dtype that the field gave."""
        if self.first_step is not None:
            return self._control("first_step", self.first_step)
        elements, y0, s0 = self.elements, self.elements.y0, self.times[0]
        scale = self._scale(y0.abs())
        d0, d1 = self._graph_norm(y0 / scale), self._graph_norm(f0 / scale)
        tiny = torch.tensor(1e-6, dtype=self.state_dtype, device=y0.device).to(d0.dtype)
        small = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = torch.where(small, tiny, 0.01 * d0 / torch.where(small, torch.ones_like(d1), d1))
        h = elements.sign * h0
        # By torch's promotion the step's dtype counts for 0-dim states only.
        dtype = torch.promote_types(y0.dtype, f0.dtype)
        if elements.element_dims > 0:
            h = h.to(rounding.real_dtype(dtype))
        y1 = y0 + elements.spread(h) * f0
        f1 = elements.call(s0 + h0, y1)
        d2 = self._graph_norm((f1 - f0) / scale) / h0
        still = (d1 <= 1e-15) & (d2 <= 1e-15)
        larger = torch.where(still, torch.ones_like(d1), torch.where(d2 > d1, d2, d1))
        h1 = torch.where(
            still, torch.maximum(tiny, h0 * 1e-3), (0.01 / larger) ** (1.0 / self.tableau.order)
        )
        return torch.minimum(100 * h0, h1).to(self.dtype)

    def _scale(self, size: Tensor) -> Tensor:
        return self.atol.to(self.error_dtype) + size * self.rtol.to(self.error_dtype)

    def _graph_norm(self, x: Tensor) -> Tensor:
        """Norms whose gradient is 0, and not 0/0, where they are 0."""
        norms = self.elements.norms
        zero = norms(x.detach()) == 0
        value = norms(torch.where(self.elements.spread(zero), torch.ones_like(x), x))
        return torch.where(zero, torch.zeros_like(value), value)

    def _check_stops(self) -> None:
        points = [stops.points for stops in self.stops if stops.points is not None]
        if not points:
            return
        together = torch.cat(points).sort(0).values
        twice = (together[1:] == together[:-1]) & (together[1:] >= self.times[0])
        bad = first_true(twice.any(0))
        if bad is not None:
            raise ValueError(
                "`step_t` and `jump_t` must not have any repeated elements between them."
            )

    # ---- one attempt -----------------------------------------------------------------------------

    def _attempt(
        self, busy: Tensor, s: Tensor, ds: Tensor, y: Tensor, f: Tensor, outputs: Outputs
    ) -> tuple[Tensor, ...]:
        """One attempt of every unfinished element: its next s, ds, y and f, and whether an output
        time was passed.
        """
        elements = self.elements
        s1 = s + ds
        hits = []
        for stops in self.stops:
            hit, s1, ds = stops.clip(s, s1, ds)
            hits.append(hit)
        on_step, on_jump = hits
        if on_step is not None and on_jump is not None:
            on_step = on_step & ~on_jump
        y1, k, h = self._step(None if self.all_busy else busy, s, s1, ds, y, f)
        with torch.no_grad():
            estimate = self._estimate(y, y1, k, h)
            error = elements.norms(estimate)
            good = ((error <= 1) & (ds <= self.max_step)) | (ds <= self.min_step)
            good = good & busy
            next_ds = self._next_size(ds.detach(), error.to(self.dtype))
        if torch.is_grad_enabled():
            wild = busy & ~good & ~elements.all_of(torch.isfinite(estimate))
            if first_true(wild) is not None:
                # What overflowed is rejected, but 0 times its derivative would be NaN.
                y1, k, h = self._step(good, s, s1, ds, y, f)
        self.accepted = self.accepted + good
        self.rejected = self.rejected + (busy & ~good)
        f1 = k[-1]
        if on_jump is not None:
            on_jump = on_jump & good
            if first_true(on_jump) is not None:
                f1 = self._beyond_jump(on_jump, s1, y1, f1)
        for stops, hit in zip(self.stops, (on_step, on_jump)):
            stops.advance(hit, good)
        s_next = torch.where(good, s1, s)
        middle = weighted(y, k, self.m, elements.spread(h))
        outputs.add(s_next, s, s1, h, y, y1, middle, k[0], k[-1])
        good_state = elements.spread(good)
        passed = good
        if self.max_num_steps < _UNLIMITED:
            passed = ((self.times > s) & (self.times <= s_next)).any(0)
        return (
            s_next,
            next_ds,
            torch.where(good_state, y1, y),
            torch.where(good_state, f1, f),
            passed,
        )

    def _step(
        self, active: Tensor | None, s: Tensor, s1: Tensor, ds: Tensor, y: Tensor, f: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """The solution, all stages and h of a step; elements that are not active wait."""
        elements, tableau = self.elements, self.tableau
        start, size = s.to(self.state_dtype), ds.to(self.state_dtype)
        end = nearest(s1.to(self.state_dtype), -1)
        if active is not None:
            size = torch.where(active, size, torch.zeros_like(size))
        h = elements.sign.to(self.state_dtype) * size
        h_state = elements.spread(h)
        k, y1 = [f], y
        for stage in range(1, tableau.stages):
            y1 = weighted(y, k, self.a[stage], h_state)
            at = end if tableau.c[stage] == 1.0 else start + self.c[stage] * size
            k.append(self._field(active, at, y1))
        if not tableau.solution_is_last_stage:
            y1 = weighted(y, k, self.b, h_state)
        return y1, k, h

    def _field(self, active: Tensor | None, s: Tensor, y: Tensor) -> Tensor:
        """f(s, y) like y for active elements, f at the start for others."""
        elements = self.elements
        if active is not None:
            s0, y0 = self.origin
            s = torch.where(active, s, s0.to(s.dtype))
            y = torch.where(elements.spread(active), y, y0)
        return elements.call(s, y).to(y.dtype)

    def _beyond_jump(self, hit: Tensor, s1: Tensor, y1: Tensor, f1: Tensor) -> Tensor:
        """f on the far side of the discontinuity."""
        fresh = self._field(hit, nearest(s1.to(self.state_dtype), 1), y1)
        return torch.where(self.elements.spread(hit), fresh, f1)

    def _estimate(self, y: Tensor, y1: Tensor, k: list[Tensor], h: Tensor) -> Tensor:
        """The error estimate over its tolerance, a state, without a graph."""
        y, y1, h = y.detach(), y1.detach(), h.detach()
        rows = [row.detach() for row in k]
        error = weighted(torch.zeros_like(y), rows, self.e, self.elements.spread(h))
        return error / self._scale(torch.maximum(y.abs(), y1.abs()))

    def _next_size(self, ds: Tensor, error: Tensor) -> Tensor:
        """An I controller that never shrinks an accepted step."""
        least = torch.where(error < 1, torch.ones_like(self.dfactor), self.dfactor)
        power = error ** (1.0 / self.tableau.order)
        factor = torch.minimum(self.ifactor, torch.maximum(self.safety / power, least))
        size = ds * torch.where(error == 0, self.ifactor, factor)
        return size.clamp(self.min_step, self.max_step)

    def _interpolate(
        self,
        times: Tensor,
        covered: Tensor,
        start: Tensor,
        end: Tensor,
        h: Tensor,
        y0: Tensor,
        y1: Tensor,
        middle: Tensor,
        f0: Tensor,
        f1: Tensor,
    ) -> Tensor:
        spread = self.elements.spread
        coefficients = reference.quartic(y0, y1, middle, f0, f1, spread(h))
        x = fraction(times, covered, start, end).to(self.state_dtype)
        return reference.evaluate_quartic(coefficients, spread(x))


class _Stops:
    """Prescribed ends of steps, `step_t` or `jump_t`, and each element's next.

    Args:
        points: [P, *lead], None for none.
        s: the starts [*lead].
    """

    def __init__(self, points: Tensor | None, s: Tensor) -> None:
        self.points = points
        if points is not None:
            self.points = points.sort(0).values
            self.next = (self.points.detach() <= s.detach()).sum(0).clamp(max=len(points) - 1)

    def clip(self, s: Tensor, s1: Tensor, ds: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Whether a stop lies strictly inside the step, and its end and size if so."""
        if self.points is None:
            return None, s1, ds
        points = self.points.expand(-1, *self.next.shape)
        stop = points.gather(0, self.next[None])[0]
        hit = (s < stop) & (stop < s + ds)
        return hit, torch.where(hit, stop, s1), torch.where(hit, stop - s, ds)

    def advance(self, hit: Tensor | None, accepted: Tensor) -> None:
        """After an attempt that hit the stop, to the next; the last one stays."""
        if hit is not None:
            later = (self.next + 1).clamp(max=len(self.points) - 1)
            self.next = torch.where(hit & accepted, later, self.next)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(to))
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)
