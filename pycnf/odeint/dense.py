"""`odeint_dense`: the solution as a function of time, the interpolants of all accepted steps."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf import reference
from pycnf.odeint import rounding
from pycnf.odeint.adaptive import AdaptiveSolver
from pycnf.odeint.arguments import numbers
from pycnf.odeint.norms import flat_to_shapes
from pycnf.odeint.problem import make_problem
from pycnf.odeint.solve import SOLVERS, adaptive_methods, make_solver
from pycnf.odeint.stats import publish
from pycnf.odeint.stepper import combine
from pycnf.odeint.transforms import transforming
from pycnf.odeint.untraced import untraced

# Values evaluated at once: temporaries beyond come from the system, page by page.
_VALUES_AT_ONCE = 2**20


@untraced
def odeint_dense(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t0: float | Tensor,
    t1: float | Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[float | Tensor], Tensor | tuple[Tensor, ...]]:
    """Solves dy/dt = func(t, y), y(t0) = y0, and returns y as a function of time.

    A drop-in for `torchdiffeq.odeint_dense`, and beyond it: every adaptive method, both directions
    of time, tuple states and many times at once.

    Args:
        func, y0, rtol, atol, options: as for `odeint`.
        t0, t1: start and end, numbers or 0-dim tensors, t1 before or after t0. Times have t0's
            dtype if that is a tensor, else float64.
        method: an adaptive one, by default "dopri5".

    Returns:
        A function of times of any shape [...], numbers or a tensor, between t0 and t1: the states
        [..., *y0.shape] on y0's device, or a tuple of such. Gradients flow to the times and, as in
        `odeint`, to y0, t0 and parameters. It raises ValueError for a time outside.

    Raises:
        ValueError: method works on a fixed grid, or t0 or t1 is not one number. Otherwise as
            `odeint`. NotImplementedError: under torch.func's transforms.

    Source: Shampine, "Some practical Runge-Kutta formulas", Math. Comp. 46 (1986): the quartic.

    Example:
        >>> import torch, pycnf
        >>> y = pycnf.odeint_dense(lambda t, y: -y, torch.ones(2, dtype=torch.float64), 0.0, 1.0)
        >>> y(torch.tensor([[0.0, 0.5, 1.0]])).shape
        torch.Size([1, 3, 2])
    """
    if transforming():
        raise NotImplementedError(
            "odeint_dense does not work under torch.func's transforms and in forward mode"
        )
    t = _endpoints(y0, t0, t1)
    adaptive = adaptive_methods()
    if method is not None and method not in adaptive:
        raise ValueError(
            f"odeint_dense needs an adaptive method, one of {adaptive}, got {method!r}"
        )
    problem = make_problem(func, y0, t, rtol, atol, method, options, SOLVERS)
    publish(problem.stats)
    solver = make_solver(problem)
    steps, quartics = _integrate(solver)
    starts, ends = (_stacked(each, solver.dtype, problem.y0.device) for each in zip(*steps))
    lengths = ends - starts
    grid = starts.tolist()
    inner = torch.tensor(grid[1:], dtype=solver.dtype)
    interval = [end.item() if isinstance(end, Tensor) else float(end) for end in (t0, t1)]
    shape, shapes, sign = problem.y0.shape, problem.shapes, problem.sign
    state_dtype = rounding.real_dtype(problem.y0.dtype)
    at_once = max(1, _VALUES_AT_ONCE // max(1, shape.numel()))

    def within(step: slice | Tensor, s: Tensor) -> Tensor:
        x = ((s - starts[step]) / lengths[step]).to(state_dtype).view(-1, *[1] * len(shape))
        return reference.evaluate_quartic(quartics[:, step].unbind(), x)

    @untraced
    def solution(times: float | Tensor) -> Tensor | tuple[Tensor, ...]:
        if not isinstance(times, Tensor):
            times = numbers("times", times, torch.float64)
        # The search runs on the host, so times that come from there cost no synchronization.
        seen = times.detach().cpu()
        s = sign * times.reshape(-1).to(starts)
        if times.numel() == 1:
            value = seen.item()
            _check_inside(value, value, seen.dtype, t.dtype, interval)
            first = max(bisect.bisect_right(grid, sign * value) - 1, 0)
            y = within(slice(first, first + 1), s)
        else:
            if times.numel():
                low, high = (extreme.item() for extreme in seen.aminmax())
                _check_inside(low, high, seen.dtype, t.dtype, interval)
            seen = sign * seen.reshape(-1).to(inner)
            step = torch.bucketize(seen, inner, right=True).to(starts.device)
            pieces = zip(step.split(at_once), s.split(at_once))
            y = torch.cat([within(some, each) for some, each in pieces])
        y = y.view(*times.shape, *shape)
        return y if shapes is None else flat_to_shapes(y, shapes, times.shape)

    return solution


def _endpoints(y0: Any, t0: float | Tensor, t1: float | Tensor) -> Tensor:
    """[t0, t1] with their graph."""
    for name, t in (("t0", t0), ("t1", t1)):
        if not isinstance(t, int | float) and not (isinstance(t, Tensor) and t.dim() == 0):
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a number or a 0-dim tensor, got {got}")
    assert t0 != t1, f"t0 and t1 must differ, both are {float(t0)}"
    if isinstance(t0, Tensor):
        return torch.stack([t0, torch.as_tensor(t1, dtype=t0.dtype, device=t0.device)])
    state = y0[0] if isinstance(y0, tuple) and y0 else y0
    device = state.device if isinstance(state, Tensor) else torch.device("cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    return torch.stack([torch.as_tensor(t, dtype=dtype, device=device) for t in (t0, t1)])


def _integrate(solver: AdaptiveSolver) -> tuple[list[tuple], Tensor]:
    """Start and end of every accepted step, and the coefficients of its quartic [5, steps, ...],
    all with their graph.
    """
    problem, tableau, rows = solver.problem, solver.tableau, solver.rows
    times = problem.s.to(solver.dtype)
    end = times[1].item()
    solver.start(times)
    steps, sizes, points = [], [], []
    while not steps or solver.s < end:
        step = solver.attempt()
        if step is None:
            continue
        k = step.k
        if k is None:
            k = [rows.row(stage).view_as(step.y0) for stage in range(tableau.stages)]
        at = step.times
        middle = combine(step.y0, k, tableau.m, at.h, step.h_graph)
        # Copied now: callbacks may edit the state that the next step starts from.
        points.append(torch.stack([step.y0, step.y1, middle, k[0], k[-1]]))
        steps.append(((at.start, at.start_graph), (at.end, at.end_graph)))
        sizes.append((at.h, step.h_graph))
        solver.advance(step)
    y0 = problem.y0
    h = _stacked(sizes, rounding.real_dtype(y0.dtype), y0.device).view(-1, *[1] * y0.dim())
    return steps, torch.stack(reference.quartic(*torch.stack(points, 1), h))


def _stacked(
    numbers: Sequence[tuple[float, Tensor | None]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Numbers [n], those with a graph by their tensor."""
    if all(graph is None for _, graph in numbers):
        return torch.tensor([value for value, _ in numbers], dtype=dtype, device=device)
    each = [torch.tensor(v, dtype=dtype) if graph is None else graph for v, graph in numbers]
    return torch.stack([number.to(device, dtype) for number in each])


def _check_inside(
    smallest: float,
    largest: float,
    dtype: torch.dtype,
    t_dtype: torch.dtype,
    interval: Sequence[float],
) -> None:
    """Compares in the coarser of the two dtypes: 0.1 in float32 lies beyond an end of 0.1."""
    dtypes = [each for each in (dtype, t_dtype) if each.is_floating_point]
    round_ = rounding.rounding(max(dtypes, key=lambda each: torch.finfo(each).eps))
    low, high = min(interval), max(interval)
    for value in (smallest, largest):
        if not round_(low) <= round_(value) <= round_(high):
            raise ValueError(
                f"times must lie in [{low}, {high}], where the solution was computed, got {value}"
            )
