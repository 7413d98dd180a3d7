"""The continuous adjoint: the gradient of a solve by another solve, backwards in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycnf.odeint.norms import AdjointNorm, flat_to_shapes
from pycnf.odeint.problem import CALLBACKS, Problem, make_problem
from pycnf.odeint.solve import SOLVERS, solve_without_graph
from pycnf.once import raise_if_differentiated

_TWICE = (
    "the gradient of odeint_adjoint cannot be differentiated again (twice, by create_graph=True); "
    "pycnf.odeint can"
)


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


class _Continuous(torch.autograd.Function):
    """A solve whose gradient is another solve, one per output interval, in ascending time s."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backward: dict, y0: Tensor, s: Tensor, *params: Tensor):
        ctx.problem, ctx.backward_arguments = problem, backward
        # Users read and replace the norm between forward and backward.
        ctx.adjoint_options = backward["options"]
        ctx.time_gradient = s.requires_grad
        solution = solve_without_graph(problem)
        # Not saved: the caller may edit y0 before backward, which only asks where it leads.
        ctx.y0 = y0
        ctx.save_for_backward(solution, s, *params)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        with torch.no_grad():
            grads = _Continuous.solve_backwards(ctx, grad)
        given = (grad, ctx.y0, *ctx.saved_tensors[1:])
        return None, None, *raise_if_differentiated(grads, given, _TWICE)

    @staticmethod
    def solve_backwards(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """Gradients to y0, s and the parameters."""
        problem: Problem = ctx.problem
        y, s, *params = ctx.saved_tensors
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
