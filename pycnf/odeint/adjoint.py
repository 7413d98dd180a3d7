"""The continuous adjoint: the gradient of a solve by another solve, backwards in time.

The backward solve restarts at every output time, as torchdiffeq's does, or passes through them all
("joined"). Differentiated in turn, it is a solve like the first, of the augmented field, whose
gradient is again a solve: every order at constant memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pycnf._build import _C
from pycnf.odeint import rounding
from pycnf.odeint.autocast import autocast_of_now
from pycnf.odeint.joined import JoinedSolver
from pycnf.odeint.norms import AdjointNorm, flat_to_shapes
from pycnf.odeint.problem import CALLBACKS, Problem, make_problem
from pycnf.odeint.recording import Borrowed, DerivedField, NotCaptured, substituted
from pycnf.odeint.solve import SOLVERS, adaptive_methods, make_solver, solve_without_graph
from pycnf.odeint.stats import SolveStats
from pycnf.odeint.until_event import solve_until_event

# Parts of the adjoint state that its field looks at: of a network's parameters there may be many.
_SEEN = 3


def _adjoint_norm(norm: Any, problem: Problem) -> Callable:
    """The norm of the adjoint state (t, y, adj_y, *params) with y and adj_y as the solver holds
    them, flat for tuples.
    """
    if norm is None or norm == "seminorm":
        return AdjointNorm(problem.norm, problem.shapes, parameters=norm is None)
    if not callable(norm):
        raise TypeError(
            'adjoint_options["norm"] must be a function of the adjoint state or "seminorm", '
            f"got {norm!r}"
        )
    if problem.shapes is None:
        return norm

    def unpacked(parts: tuple[Tensor, ...]) -> Tensor:
        t, y, adj_y, *params = parts
        y, adj_y = (flat_to_shapes(part, problem.shapes) for part in (y, adj_y))
        return norm((t, *y, *adj_y, *params))

    return unpacked


class _Continuous(torch.autograd.Function):
    """A solve whose gradient is another solve, in ascending time s.

    `backward` holds rtol, atol, method and options of that solve, and whether it is joined.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, backward: dict, y0: Tensor, s: Tensor, *params: Tensor):
        ctx.problem, ctx.backward_arguments = problem, backward
        # Users read and replace the norm between forward and backward.
        ctx.adjoint_options = backward["options"]
        ctx.time_gradient = s.requires_grad
        ctx.autocast = autocast_of_now(y0.device)
        event = None
        if problem.event_fn is None:
            solution = solve_without_graph(problem)
        else:
            event, solution = solve_until_event(make_solver(problem))
            event = event.to(s)
        ctx.event = None if event is None else event.clone()
        ctx.save_for_backward(solution, s, *params)
        return solution if event is None else (event, solution)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor):
        # That of an event's time goes nowhere.
        grad = grads_out[-1]
        y, s, *params = ctx.saved_tensors
        if ctx.event is not None and ctx.event != s[0]:
            s = torch.stack([s[0], ctx.event])
        elif ctx.event is not None:
            y, s, grad = y[:1], s[:1], grad.sum(0, keepdim=True)
        arguments = {**ctx.backward_arguments, "options": ctx.adjoint_options}
        # A zero cotangent may have a derivative, so it is no reason to pass through.
        joined = arguments["joined"] and not torch.is_grad_enabled()
        joined = joined and (arguments["method"] or "dopri5") in adaptive_methods()
        solve = _solve_joined if joined else _solve_intervals
        problem = ctx.problem
        stats = problem.stats.for_backward()
        with ctx.autocast():
            field = _AdjointField(replace(problem, stats=stats), params)
            to_y0, to_s, *rest = solve(field, y, s, grad, arguments, ctx.time_gradient)
        if ctx.event is not None and to_s is not None:
            to_s = torch.stack([to_s[0], torch.zeros_like(to_s[0])])
        return None, None, to_y0, to_s, *rest


def _start(field: _AdjointField, y: Tensor, adjoint: Tensor) -> list[Tensor]:
    """The adjoint state where an output time has been reached first."""
    zeros = [torch.zeros_like(p) for p in field.params]
    return [torch.zeros((), dtype=y.dtype, device=y.device), y, adjoint, *zeros]


def _along(slope: Tensor, grad: Tensor) -> Tensor:
    """What moving an output time does: it moves the output along the field."""
    return torch.vdot(slope.reshape(-1), grad.reshape(-1)).real


def _solve_intervals(
    field: _AdjointField, y: Tensor, s: Tensor, grad: Tensor, arguments: dict, time_gradient: bool
) -> list[Tensor | None]:
    """Gradients to y0, s and the parameters, by a solve for each interval between output times;
    with their graph if gradients are on.
    """
    state = _start(field, y[-1], grad[-1].clone())
    time_grads = []
    # An event's time is known to the device only.
    known = field.problem.times if field.problem.event_fn is None else None
    for i in range(len(s) - 1, 0, -1):
        if time_gradient:
            along = _along(field.value(s[i], y[i]), grad[i])
            state[0] = state[0] - along
            time_grads.append(along)
        interval = make_problem(
            field, tuple(state), s[i - 1 : i + 1].flip(0), arguments["rtol"], arguments["atol"],
            arguments["method"], arguments["options"], SOLVERS,
            times=None if known is None else [known[i], known[i - 1]],
        )  # fmt: skip
        interval.seen, field.solve = _SEEN, interval
        if torch.is_grad_enabled():
            again = _arguments_of_the_adjoint(interval, arguments)
            ends = _Continuous.apply(interval, again, interval.y0, interval.s, *field.params)
        else:
            ends = solve_without_graph(interval)
        field.problem.stats.add_steps(interval.stats)
        state = [part[1] for part in interval.shaped(ends)]
        state[1] = y[i - 1]
        state[2] = state[2] + grad[i - 1]
    to_times = None
    if time_gradient:
        to_times = torch.stack([state[0].real, *reversed(time_grads)]).to(s)
    return [state[2], to_times, *state[3:]]


def _arguments_of_the_adjoint(interval: Problem, arguments: dict) -> dict:
    """How to solve the adjoint of an adjoint problem: as that one, in its own time."""
    parameters = not isinstance(interval.norm, AdjointNorm) or interval.norm.parameters
    norm = AdjointNorm(interval.norm, interval.shapes, parameters)
    options = {**interval.options, "norm": norm}
    constructor = options.get("grid_constructor")
    if constructor is not None:

        def negated(f: Callable, y0: Tensor, t: Tensor) -> Tensor:
            return -constructor(lambda s, y: -f(-s, y), y0, -t)

        options["grid_constructor"] = negated
    return {
        "rtol": _tolerance_of_the_adjoint(arguments["rtol"], interval.rtol),
        "atol": _tolerance_of_the_adjoint(arguments["atol"], interval.atol),
        "method": arguments["method"],
        "options": options,
        "joined": False,
    }


def _tolerance_of_the_adjoint(tolerance: Any, spread: Any) -> Any:
    """Of the parts (t, y, adj_y, *params), where y is the state that has this tolerance, `spread`
    over its values if it is one for each part.
    """
    if not isinstance(spread, Tensor) or spread.dim() == 0:
        return tolerance
    time, _, _, *params = tolerance
    return (time, spread, spread, *params)


def _solve_joined(
    field: _AdjointField, y: Tensor, s: Tensor, grad: Tensor, arguments: dict, time_gradient: bool
) -> list[Tensor | None]:
    """The same by one solve from the last output with a cotangent to the first time, which stops
    only where another cotangent comes in.
    """
    # NaN is not zero either.
    incoming = (grad != 0).reshape(len(s), y[0].numel()).any(1).tolist()
    stops = [i for i in range(1, len(s)) if incoming[i]]
    times = s.tolist()
    state = _start(field, y[0], torch.zeros_like(y[0]))
    time_grads = torch.zeros(len(s), dtype=state[0].real.dtype, device=y.device)
    if stops:
        last = stops.pop()
        state = _start(field, y[last], grad[last].clone())
        if time_gradient:
            time_grads[last] = _along(field.value(s[last], y[last]), grad[last])
            state[0] = state[0] - time_grads[last]
        problem = make_problem(
            field, tuple(state), torch.stack([s[last], s[0]]), arguments["rtol"],
            arguments["atol"], arguments["method"], arguments["options"], SOLVERS,
        )  # fmt: skip

        problem.seen, field.solve = _SEEN, problem

        def jump(index: int, flat: Tensor) -> None:
            """The output's value and cotangent enter the adjoint state."""
            _, value, adjoint, *_ = flat_to_shapes(flat, problem.shapes)
            value.copy_(y[index])
            adjoint.add_(grad[index])

        def moved(index: int, flat: Tensor, slope: Tensor) -> None:
            """The output time's share, from the slope of the adjoint state after the jump."""
            along = _along(flat_to_shapes(slope, problem.shapes)[1], grad[index])
            time_grads[index] = along
            flat[0] -= along

        method = SOLVERS[problem.method]
        solver = JoinedSolver(
            problem, method.tableau, method.label, **problem.options,
            stops=[(-times[i], i) for i in reversed(stops)],
            jump=jump,
            jumped=moved if time_gradient else None,
        )  # fmt: skip
        state = [part[1] for part in problem.shaped(solver.integrate())]
        field.problem.stats.add_steps(problem.stats)
    time_grads[0] = state[0].real
    return [state[2] + grad[0], time_grads.to(s) if time_gradient else None, *state[3:]]


class _AdjointField(DerivedField):
    """d/ds of (t-gradient, y, adj_y, *parameter gradients), for a forward field in ascending time.

    The state's parts are vjp_t, y, adj_y and one part per parameter, of which it looks at the first
    three; what is returned has y's slope in as many parts as the field gave it. With gradients on,
    it has its graph.

    `solve`, the adjoint problem that is being solved, says which evaluations only lead to others:
    those look at y and adj_y, so in place of the parameters' part stand the parameters themselves.
    """

    def __init__(self, problem: Problem, params: Sequence[Tensor]) -> None:
        self.problem, self.params = problem, tuple(params)
        self.solve: Problem | None = None
        for name in CALLBACKS:
            callback = getattr(problem.func, f"{name}_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    @property
    def owner(self) -> Callable:
        """The forward field."""
        return self.problem.func

    @property
    def settings(self) -> tuple:
        """What the values depend on beside the forward field and the parameters' values."""
        problem = self.problem
        shapes = None if problem.shapes is None else tuple(problem.shapes)
        return problem.sign, shapes, problem.y0.dtype, *map(id, self.params)

    @property
    def stats(self) -> SolveStats:
        """Where its evaluations are counted."""
        return self.problem.stats

    def recorded(self) -> _AdjointField:
        """The same for a recorded solve, which outlives this one and counts for itself."""
        field = copy.copy(self)
        stats = SolveStats(self.problem.method)
        field.problem = replace(self.problem, func=Borrowed(self.owner), stats=stats)
        return field

    def check(self, t: Tensor, y: tuple[Tensor, ...]) -> None:
        """Raises NotCaptured where gradients reach the parameters past their places."""
        _, places = self._leaves()
        with torch.enable_grad(), places:
            fresh = [f for f in self.problem.call(self._time(t), y[1]) if f.requires_grad]
            if not (fresh and self.params):
                return
            zeros = [torch.zeros_like(f) for f in fresh]
            found = _C.pull_back(fresh, self.params, zeros, False)
        if any(g is not None for g in found):
            raise NotCaptured("it holds its parameters elsewhere than in its own attributes too")

    def _leaves(self) -> tuple[Sequence[Tensor], AbstractContextManager]:
        """What is differentiated beside t and y, and a context to evaluate the forward field in.

        Recorded work has leaves of its own in the parameters' places: the nodes that gradients of
        the parameters themselves flow to belong to the stream that they were first used on, for
        which no recording can wait.
        """
        if not isinstance(self.problem.func, Borrowed):
            return self.params, nullcontext()
        leaves = [p.detach().requires_grad_() for p in self.params]
        tensors = {id(p): leaf for p, leaf in zip(self.params, leaves)}
        return leaves, substituted(self.problem.func.func(), tensors)

    def _time(self, s: Tensor) -> Tensor:
        dtype = rounding.real_dtype(self.problem.y0.dtype)
        return (s if self.problem.sign > 0 else -s).to(dtype)

    def value(self, s: Tensor, y: Tensor) -> Tensor:
        """dy/ds as one tensor like y."""
        fresh = self.problem.call(self._time(s), y)
        return self.problem.sign * self.problem.as_state(fresh, y)

    def __call__(self, s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        problem, forwards = self.problem, self.problem.sign > 0
        _, y, adjoint = state[:_SEEN]
        with_graph = torch.is_grad_enabled()
        params, places = self._leaves()
        with torch.enable_grad(), places:
            t = self._time(s)
            if not (with_graph and t.requires_grad):
                t = t.detach().requires_grad_(True)
            if not (with_graph and y.requires_grad):
                y = y.detach().requires_grad_(True)
            fresh = problem.call(t, y)
            if problem.shapes is None:
                cotangents = [adjoint.view(fresh[0].shape)]
            else:
                cotangents = flat_to_shapes(adjoint, [part.shape for part in fresh])
            pairs = [(f, a) for f, a in zip(fresh, cotangents) if f.requires_grad]
            outputs, weights = zip(*pairs) if pairs else (fresh, cotangents)
            weights = [(-a if forwards else a).to(f.dtype) for f, a in zip(outputs, weights)]
            needs_all = with_graph or self.solve is None or not self.solve.transient
            wanted = (t, y, *params) if needs_all else (t, y)
            grads = _C.pull_back(outputs, wanted, weights, with_graph)
        to_t, to_y, *to_params = grads
        to_t = torch.zeros_like(t) if to_t is None else to_t
        to_y = torch.zeros_like(y) if to_y is None else to_y
        to_params = to_params if needs_all else self.params
        to_params = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self.params, to_params)
        ]
        if forwards:
            return (to_t, *fresh, to_y, *to_params)
        return (-to_t, *(-f for f in fresh), to_y, *to_params)
