"""Methods on a fixed grid for elements that each have a grid of their own, in torch operations.

Grids, times of stages and interpolation are those of `fixed_grid`; an element whose grid has ended
waits at its start, as in `masked_adaptive`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pycnf.odeint import rounding
from pycnf.odeint.arguments import check_step_size, warn_not_recorded, warn_unused
from pycnf.odeint.elements import Elements, by_time
from pycnf.odeint.fixed_grid import cubic_hermite
from pycnf.odeint.masked_outputs import Outputs, fraction, nearest
from pycnf.odeint.tableau import Tableau
from pycnf.odeint.transforms import beneath, first_true, largest


class MaskedFixedGridSolver:
    """One solve of all elements; see the module. Options are those of `FixedGridSolver`."""

    def __init__(
        self,
        elements: Elements,
        tableau: Tableau,
        name: str,
        *,
        step_size: Any = None,
        grid_constructor: Callable | None = None,
        interp: str = "linear",
        perturb: bool = False,
        cuda_graph: bool | None = None,
        **unused: Any,
    ) -> None:
        warn_unused(name, unused)
        warn_not_recorded(cuda_graph, "every element takes its own steps")
        if step_size is not None and grid_constructor is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
        if interp not in ("linear", "cubic"):
            raise ValueError(f"Unknown interpolation method {interp}")
        if step_size is not None and not isinstance(step_size, Tensor):
            check_step_size(step_size)
        self.elements, self.tableau = elements, tableau
        self.step_size, self.grid_constructor = step_size, grid_constructor
        self.interp, self.perturb = interp, bool(perturb)

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """The times [G, *lead] between which steps are taken, ascending, and each element's number
        of steps, None if it is the same for all.
        """
        elements, s = self.elements, self.elements.s
        if self.step_size is not None:
            length = (s[-1] - s[0]).detach()
            points = torch.ceil(length / self.step_size + 1)
            each = torch.arange(int(largest(points)), dtype=s.dtype, device=s.device)
            each = each.reshape(-1, *[1] * len(elements.lead))
            steps = points - 1
            return torch.where(each < steps, each * self.step_size + s[0], s[-1]), steps
        if self.grid_constructor is None:
            return s, None
        y0 = elements.y0
        user_times = elements.sign * s
        if elements.lead:
            user_times = user_times.T
        given = self.grid_constructor(self._field, y0, user_times)
        return elements.sign * by_time("the constructed grid", given, elements.lead), None

    def _field(self, s: Tensor, y: Tensor) -> Tensor:
        """The field in ascending time, for grid constructors that want to look at it."""
        return self.elements.spread(self.elements.sign) * self.elements.call(s, y)

    def integrate(self) -> Tensor:
        """States at the output times, [T, *lead, ...]."""
        elements = self.elements
        grid, steps = self._grid()
        wrong = (grid[0] != elements.s[0]) | (grid[-1] != elements.s[-1])
        element = first_true(wrong)
        assert element is None, f"the grid must begin and end as t does{element}"
        outputs = Outputs(elements, elements.s, self._interpolate)
        self.origin = (elements.s[0].detach(), elements.y0.detach())
        y = elements.y0
        for i, (start, end) in enumerate(pairwise(grid.unbind())):
            active = None if steps is None else i < steps
            y1, f0 = self._step(active, start, end, y)
            if active is not None:
                y1 = torch.where(elements.spread(active), y1, y)
            slopes = (f0,) if self.interp == "cubic" else ()
            outputs.add(end, start, end, y, y1, *slopes)
            y = y1
        counts = torch.full_like(grid[0], len(grid) - 1) if steps is None else steps
        elements.stats.accepted = beneath(counts.detach().long())[0]
        elements.stats.rejected = torch.zeros_like(elements.stats.accepted)
        return outputs.solution()

    def _step(
        self, active: Tensor | None, start: Tensor, end: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The state after a step, and the slope at its start."""
        tableau = self.tableau
        size = end - start
        k: list[Tensor] = []
        for stage in range(tableau.stages):
            y = self._weighted(y0, k, tableau.a[stage], size) if stage else y0
            c = tableau.c[stage]
            # rk4's last stage is at the grid point itself, heun2's at start + size.
            s = end if c == 1.0 and tableau.name == "rk4" else start + c * size
            k.append(self._field_at(active, s, c if stage else None, y))
        return self._weighted(y0, k, tableau.b, size), k[0]

    def _field_at(self, active: Tensor | None, s: Tensor, c: float | None, y: Tensor) -> Tensor:
        """The field at a stage; `c` is None for the first."""
        elements = self.elements
        s = s.to(rounding.real_dtype(y.dtype))
        if self.perturb and (c is None or c == 1.0):
            s = nearest(s, 1 if c is None else -1)
        if active is not None:
            s0, y_origin = self.origin
            s = torch.where(active, s, s0.to(s.dtype))
            y = torch.where(elements.spread(active), y, y_origin)
        return elements.call(s, y, broadcasts=True)

    def _weighted(self, y0: Tensor, k: list[Tensor], weights: list[float], size: Tensor) -> Tensor:
        """y0 + h Σ wⱼ kⱼ; in the dtype of the times if the state is 0-dim, as torch promotes."""
        total = sum(weight * row for weight, row in zip(weights, k) if weight != 0)
        h = self.elements.sign * size
        if self.elements.element_dims > 0:
            h = h.to(rounding.real_dtype(torch.promote_types(y0.dtype, total.dtype)))
        return y0 + self.elements.spread(h) * total

    def _interpolate(
        self,
        times: Tensor,
        covered: Tensor,
        start: Tensor,
        end: Tensor,
        y0: Tensor,
        y1: Tensor,
        f0: Tensor | None = None,
    ) -> Tensor:
        elements = self.elements
        spread = elements.spread
        x = fraction(times, covered, start, end)
        if self.interp == "linear":
            if elements.element_dims > 0:
                x = x.to(rounding.real_dtype(y1.dtype))
            between = y0 + spread(x) * (y1 - y0)
            return torch.where(spread(times.detach() == end.detach()), y1, between)
        # One evaluation for every output: at the end of its step.
        f1 = torch.stack(
            [elements.call(s, y, broadcasts=True) for s, y in zip(end.unbind(), y1.unbind())]
        )
        h = elements.sign * (end - start)
        if elements.element_dims > 0:
            h, x = (v.to(rounding.real_dtype(y1.dtype)) for v in (h, x))
        return cubic_hermite(y0, y1, f0, f1, spread(h), spread(x))
