"""`odeint_adjoint`: gradients of a solve without a graph of the solve.

`continuous` integrates the adjoint equation backwards, as torchdiffeq does: constant memory, as
accurate as the tolerance. `discrete` is the exact gradient of the numbers that were computed: the
forward solve keeps the accepted steps, and the backward pass recomputes one step at a time with a
graph and walks through it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycnf.odeint.adaptive import Accepted, AdaptiveSolver
from pycnf.odeint.fixed_grid import FixedGridSolver
from pycnf.odeint.norms import AdjointNorm, flat_to_shapes
from pycnf.odeint.problem import CALLBACKS, Problem, least_event, make_problem
from pycnf.odeint.solve import SOLVERS, make_solver, solve_without_graph
from pycnf.odeint.until_event import solve_until_event
from pycnf.once import raise_if_differentiated

_TWICE = (
    "the gradient of odeint_adjoint cannot be differentiated again (twice, by create_graph=True); "
    "pycnf.odeint can"
)


def odeint_adjoint(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    gradient: str = "continuous",
) -> Tensor | tuple[Tensor, ...] | tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """Like `odeint`, with gradients to y0, t and parameters at constant memory (or a tape of
    accepted steps).

    A drop-in for `torchdiffeq.odeint_adjoint`, and one addition, `gradient`.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as for `odeint`; func is an nn.Module
            unless adjoint_params are given. Gradients go back from the event's time as if that were
            given; of t only the start has one.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the backward solve; by
            default those of the forward solve, but for options["norm"]. adjoint_options["norm"] may
            be "seminorm" or a callable of the tuple (t, *y, *adj_y, *params).
        adjoint_params: what to differentiate beside y0 and t; by default func's parameters.
        gradient: "continuous", the adjoint equation; or "discrete", the exact gradient of the
            computed solution with every step size held constant. The latter uses no adjoint_*
            argument but adjoint_params.

    Returns:
        As `odeint`. For "continuous" the node behind the result has `adjoint_options`, which may be
        edited before backward.

    Raises:
        ValueError: func is no nn.Module and adjoint_params are missing; adjoint_options cannot be
            inferred; unknown gradient. RuntimeError: the gradient is differentiated again.
            Otherwise as `odeint`.

    Source: Chen, Rubanova, Bettencourt & Duvenaud, "Neural Ordinary Differential Equations",
    NeurIPS 2018, appendix B;
    seminorm: Kidger, Chen & Lyons, ICML 2021; discrete: Gholami, Keutzer & Biros, "ANODE", IJCAI
    2019.

    Example:
        >>> import torch, pycnf
        >>> field = torch.nn.Linear(2, 2)
        >>> t = torch.tensor([0.0, 1.0])
        >>> y = pycnf.odeint_adjoint(lambda t, y: field(y), torch.ones(3, 2), t,
        ...                          adjoint_params=field.parameters(), gradient="discrete")
        >>> y[-1].sum().backward()
        >>> field.weight.grad.shape
        torch.Size([2, 2])
    """
    if gradient not in ("continuous", "discrete"):
        raise ValueError(f'gradient must be "continuous" or "discrete", got {gradient!r}')
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            "func must be an instance of nn.Module to specify the adjoint parameters; "
            "alternatively they can be specified explicitly via the `adjoint_params` argument. If "
            "there are no parameters then it is allowable to set `adjoint_params=()`."
        )
    if gradient == "discrete":
        solves = {
            "adjoint_rtol": adjoint_rtol,
            "adjoint_atol": adjoint_atol,
            "adjoint_method": adjoint_method,
            "adjoint_options": adjoint_options,
        }
        unused = [name for name, value in solves.items() if value is not None]
        if unused:
            warnings.warn(
                f'gradient="discrete" solves no adjoint equation: {", ".join(unused)} not used.',
                stacklevel=2,
            )
    adjoint_rtol = rtol if adjoint_rtol is None else adjoint_rtol
    adjoint_atol = atol if adjoint_atol is None else adjoint_atol
    adjoint_method = method if adjoint_method is None else adjoint_method
    if adjoint_method != method and options is not None and adjoint_options is None:
        raise ValueError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. "
            "So as `options` has been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in (options or {}).items() if k != "norm"}
    else:
        adjoint_options = dict(adjoint_options)
    params = find_parameters(func) if adjoint_params is None else tuple(adjoint_params)
    trainable = tuple(p for p in params if p.requires_grad)
    if len(trainable) != len(params) and callable(adjoint_options.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will "
            "be excluded from the adjoint pass, and will not appear as a tensor in the adjoint "
            "norm.",
            stacklevel=2,
        )
    problem = make_problem(func, y0, t, rtol, atol, method, options, SOLVERS, event_fn)
    if event_fn is not None:
        # torchdiffeq takes initial signs again of what it has combined, and calls event_fn for it.
        state = problem.y0.detach()
        state = state if problem.shapes is None else flat_to_shapes(state, problem.shapes)
        start = problem.event_time(problem.s[0].detach())
        problem.event_fn = least_event(problem.event_fn, start, state)
    if gradient == "discrete":
        solution = _Discrete.apply(problem, problem.y0, problem.s, *trainable)
    else:
        adjoint_options["norm"] = _adjoint_norm(adjoint_options.get("norm"), problem)
        backward = dict(
            rtol=adjoint_rtol, atol=adjoint_atol, method=adjoint_method, options=adjoint_options
        )
        solution = _Continuous.apply(problem, backward, problem.y0, problem.s, *trainable)
    if event_fn is None:
        return problem.shaped(solution)
    event, solution = solution
    return problem.event_time(event), problem.shaped(solution)


def find_parameters(module: nn.Module) -> tuple[Tensor, ...]:
    """A module's parameters; a DataParallel replica keeps them as plain attributes."""
    if getattr(module, "_is_replica", False):

        def tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
            return [
                (k, v) for k, v in vars(part).items() if isinstance(v, Tensor) and v.requires_grad
            ]

        return tuple(p for _, p in module._named_members(get_members_fn=tensors))
    return tuple(module.parameters())


def _adjoint_norm(norm: Any, problem: Problem) -> Callable:
    """The norm of the adjoint state (t, y, adj_y, *params) with y and adj_y as the solver holds
    them, flat for tuples.
    """
    if norm is None or norm == "seminorm":
        return AdjointNorm(problem.norm, problem.shapes, parameters=norm is None)
    if problem.shapes is None:
        return norm

    def unpacked(parts: tuple[Tensor, ...]) -> Tensor:
        t, y, adj_y, *params = parts
        y, adj_y = (flat_to_shapes(part, problem.shapes) for part in (y, adj_y))
        return norm((t, *y, *adj_y, *params))

    return unpacked


# ---- continuous ----------------------------------------------------------------------------------


class _Continuous(torch.autograd.Function):
    """A solve whose gradient is another solve, one per output interval, in ascending time s."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backward: dict, y0: Tensor, s: Tensor, *params: Tensor):
        ctx.problem, ctx.backward_arguments = problem, backward
        # Users read and replace the norm between forward and backward.
        ctx.adjoint_options = backward["options"]
        ctx.time_gradient = s.requires_grad
        event = None
        if problem.event_fn is None:
            solution = solve_without_graph(problem)
        else:
            event, solution = solve_until_event(make_solver(problem))
            event = event.to(s)
        ctx.event = None if event is None else event.clone()
        # Not saved: the caller may edit y0 before backward, which only asks where it leads.
        ctx.y0 = y0
        ctx.save_for_backward(solution, s, *params)
        return solution if event is None else (event, solution)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor):
        # That of an event's time goes nowhere.
        grad = grads_out[-1]
        with torch.no_grad():
            grads = _Continuous.solve_backwards(ctx, grad)
        given = (grad, ctx.y0, *ctx.saved_tensors[1:])
        return None, None, *raise_if_differentiated(grads, given, _TWICE)

    @staticmethod
    def solve_backwards(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """Gradients to y0, s and the parameters."""
        problem: Problem = ctx.problem
        y, s, *params = ctx.saved_tensors
        if ctx.event is not None and ctx.event != s[0]:
            s = torch.stack([s[0], ctx.event])
        elif ctx.event is not None:
            y, s, grad = y[:1], s[:1], grad.sum(0, keepdim=True)
        arguments = {**ctx.backward_arguments, "options": ctx.adjoint_options}
        field = _AdjointField(problem, params)
        state = [torch.zeros((), dtype=y.dtype, device=y.device), y[-1], grad[-1].clone()]
        state += [torch.zeros_like(p) for p in params]
        time_grads = torch.empty_like(s) if ctx.time_gradient else None
        for i in range(len(s) - 1, 0, -1):
            if time_grads is not None:
                # Moving an output time moves along the field.
                along = field.value(s[i], y[i]).reshape(-1).dot(grad[i].reshape(-1))
                state[0] = state[0] - along
                time_grads[i] = along
            interval = make_problem(
                field, tuple(state), s[i - 1 : i + 1].flip(0), arguments["rtol"], arguments["atol"],
                arguments["method"], arguments["options"], SOLVERS,
            )  # fmt: skip
            ends = interval.shaped(solve_without_graph(interval))
            state = [part[1] for part in ends]
            state[1] = y[i - 1]
            state[2] = state[2] + grad[i - 1]
        if time_grads is not None:
            time_grads[0] = state[0]
            if ctx.event is not None:
                time_grads = torch.stack([time_grads[0], torch.zeros_like(time_grads[0])])
        return [state[2], time_grads, *state[3:]]


class _AdjointField:
    """d/ds of (t-gradient, y, adj_y, *parameter gradients), for a forward field in ascending time.

    The state's parts are vjp_t, y, adj_y and one part per parameter; what is returned has y's slope
    in as many parts as the field gave it.
    """

    def __init__(self, problem: Problem, params: Sequence[Tensor]) -> None:
        self.problem, self.params = problem, tuple(params)
        for name in CALLBACKS:
            callback = getattr(problem.func, f"{name}_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def _time(self, s: Tensor) -> Tensor:
        y0 = self.problem.y0
        dtype = y0.dtype.to_real() if y0.is_complex() else y0.dtype
        return (self.problem.sign * s).to(dtype)

    def value(self, s: Tensor, y: Tensor) -> Tensor:
        """dy/ds as one tensor like y."""
        fresh = self.problem.call(self._time(s), y)
        return self.problem.sign * self.problem.as_state(fresh, y)

    def __call__(self, s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        problem = self.problem
        _, y, adjoint, *_ = state
        with torch.enable_grad():
            t = self._time(s).detach().requires_grad_(True)
            y = y.detach().requires_grad_(True)
            fresh = problem.call(t, y)
            if problem.shapes is None:
                cotangents = [adjoint.view(fresh[0].shape)]
            else:
                cotangents = flat_to_shapes(adjoint, [part.shape for part in fresh])
            pairs = [(f, a) for f, a in zip(fresh, cotangents) if f.requires_grad]
            outputs, weights = zip(*pairs) if pairs else (fresh, cotangents)
            weights = [(-problem.sign * a).to(f.dtype) for f, a in zip(outputs, weights)]
            grads = torch.autograd.grad(
                outputs, (t, y, *self.params), weights, allow_unused=True, retain_graph=True
            )
        wanted = (t, y, *self.params)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads)]
        slopes = fresh if problem.sign > 0 else [-f for f in fresh]
        return (problem.sign * grads[0], *slopes, *grads[1:])


# ---- discrete ------------------------------------------------------------------------------------


class _Discrete(torch.autograd.Function):
    """A solve whose gradient walks back through its accepted steps, one graph of one step at a
    time.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, y0: Tensor, s: Tensor, *params: Tensor):
        solver = make_solver(problem, [])
        ctx.solver, ctx.with_times = solver, s.requires_grad
        event, ctx.outputs = None, None
        if problem.event_fn is not None:
            event, solution = solve_until_event(solver)
            ctx.outputs = torch.stack([s[0].to(event), event])
            event = event.to(s)
            if isinstance(solver, FixedGridSolver):
                ctx.grid = _grid_to_event(solver, ctx.outputs, s.requires_grad)
        elif isinstance(solver, FixedGridSolver):
            # The grid's dependence on the output times is a graph of times only, and kept.
            leaf = _leaf(s)
            with torch.enable_grad():
                ctx.grid = (leaf, solver.grid(leaf if s.requires_grad else s.detach()))
            solution = solver.integrate(ctx.grid[1].detach())
        else:
            solution = solver.integrate()
        # The caller may edit y0, or what it is given as the first solution, before backward.
        solver.keep_start()
        ctx.y0 = y0
        ctx.save_for_backward(s, *params)
        return solution if event is None else (event, solution)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor):
        grad = grads_out[-1]
        s, *params = ctx.saved_tensors
        s = s if ctx.outputs is None else ctx.outputs
        grads = _Gradients(params)
        with torch.no_grad():
            if isinstance(ctx.solver, FixedGridSolver):
                found = _walk_fixed(ctx.solver, s, grad, grads, ctx.grid, ctx.with_times)
            else:
                found = _walk_adaptive(ctx.solver, s, grad, grads, ctx.with_times)
            if ctx.outputs is not None and ctx.with_times:
                found[1][1] = 0.0
        given = (grad, ctx.y0, *ctx.saved_tensors)
        return None, *raise_if_differentiated([*found, *grads.params], given, _TWICE)


def _grid_to_event(
    solver: FixedGridSolver, outputs: Tensor, with_times: bool
) -> tuple[Tensor, Tensor]:
    """A copy of the times, and the grid that led to an event, which moves with the first."""
    leaf = _leaf(outputs)
    ends = [ends for _, ends in solver.tape]
    points = outputs.new_tensor([ends[0].start, *(each.end for each in ends)])
    if with_times:
        with torch.enable_grad():
            points = points + (leaf[0] - outputs[0])
    return leaf, points


class _Gradients:
    """Sums of gradients, of the parameters and of whatever a step adds."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.wanted = tuple(params)
        self.params = [torch.zeros_like(p) for p in params]

    def pull_back(
        self, pairs: Sequence[tuple[Tensor | None, Tensor | None]], inputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients to the inputs of (output, cotangent) pairs; those to the parameters are added
        up.
        """
        pairs = [(o, g) for o, g in pairs if o is not None and g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        outputs, cotangents = zip(*pairs)
        grads = torch.autograd.grad(outputs, (*inputs, *self.wanted), cotangents, allow_unused=True)
        for total, grad in zip(self.params, grads[len(inputs) :]):
            if grad is not None:
                total += grad
        return list(grads[: len(inputs)])


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(True)


def _pull_back_step(
    solver: AdaptiveSolver,
    accepted: Accepted,
    shown: Tensor,
    shown_grads: Tensor,
    end_grads: Sequence[Tensor | None],
    grads: _Gradients,
) -> list[Tensor | None]:
    """Gradients to a step's start (state, kept derivative, time) and output times from those of its
    end.

    A function of its own, so that the graph of one step is gone before the next is made.
    """
    y0 = _leaf(accepted.y)
    f0 = None if accepted.f is None else _leaf(accepted.f.view_as(y0))
    s0 = _leaf(shown.new_tensor(accepted.s0)) if shown.requires_grad else None
    with torch.enable_grad():
        step = solver.replay(accepted, y0, f0, s0)
        pairs = list(zip((step.y1, step.k[-1], step.times.end_graph), end_grads))
        if len(shown):
            pairs.append((solver.interpolate_with_graph(step, shown), shown_grads))
    inputs = [y0, f0, s0, shown if shown.requires_grad else None]
    found = iter(grads.pull_back(pairs, [x for x in inputs if x is not None]))
    return [None if x is None else next(found) for x in inputs]


def _walk_adaptive(
    solver: AdaptiveSolver, s: Tensor, grad: Tensor, grads: _Gradients, with_times: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients to y0 and, if wanted, to the times [T]."""
    times = s.detach().to(solver.dtype)
    y_grad, f_grad, s_grad = None, None, None
    time_grads = torch.zeros_like(times) if with_times else None
    covered = set()
    for accepted in reversed(solver.tape):
        covered.update(accepted.outputs)
        outputs = slice(accepted.outputs.start, accepted.outputs.stop)
        shown = times[outputs]
        if with_times:
            shown.requires_grad_(True)
        y_grad, f_grad, s_grad, shown_grad = _pull_back_step(
            solver, accepted, shown, grad[outputs], (y_grad, f_grad, s_grad), grads
        )
        if shown_grad is not None:
            time_grads[outputs] += shown_grad
    # Output times that no step covers show y0 itself; the first one always does.
    for i in sorted(set(range(len(s))) - covered):
        y_grad = _add(y_grad, grad[i])
    if with_times and s_grad is not None:
        time_grads[0] += s_grad
    return y_grad, None if time_grads is None else time_grads.to(s.dtype)


def _pull_back_fixed_step(
    solver: FixedGridSolver,
    index: int,
    points: Tensor,
    shown: Tensor,
    shown_grads: Tensor,
    end_grad: Tensor | None,
    grads: _Gradients,
) -> list[Tensor | None]:
    """Gradients to the state at the start of a step and, if wanted, to its ends and its output
    times.
    """
    start, ends = solver.tape[index]
    y0 = _leaf(start)
    inputs = [y0]
    if shown.requires_grad:
        ends = ends._replace(graph=(_leaf(points[index]), _leaf(points[index + 1])))
        inputs += [*ends.graph, shown]
    with torch.enable_grad():
        y1, states = solver.replay(y0, ends, shown)
    return grads.pull_back([(y1, end_grad), *zip(states, shown_grads)], inputs)


def _walk_fixed(
    solver: FixedGridSolver,
    s: Tensor,
    grad: Tensor,
    grads: _Gradients,
    grid: tuple[Tensor, Tensor],
    with_times: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients to y0 and, if wanted, to the times [T]; grid: a copy of the times, and the grid as
    a function of it.
    """
    leaf, points = grid
    values, outputs = points.tolist(), s.tolist()
    y_grad = None
    time_grads = torch.zeros_like(s)
    grid_grads = torch.zeros_like(points)
    last = len(outputs)
    for i in range(len(values) - 2, -1, -1):
        first = last
        # As forward: a step shows the output times up to its end that no step before it has shown.
        while first > 1 and (i == 0 or outputs[first - 1] > values[i]):
            first -= 1
        shown = s[first:last]
        if with_times:
            shown.requires_grad_(True)
        y_grad, *rest = _pull_back_fixed_step(
            solver, i, points, shown, grad[first:last], y_grad, grads
        )
        for total, part, found in zip(
            (grid_grads, grid_grads, time_grads), (i, i + 1, slice(first, last)), rest
        ):
            if found is not None:
                total[part] += found
        last = first
    y_grad = _add(y_grad, grad[0])
    if not with_times:
        return y_grad, None
    if points.requires_grad:
        (through_grid,) = torch.autograd.grad(points, leaf, grid_grads)
        time_grads = time_grads + through_grid
    return y_grad, time_grads
