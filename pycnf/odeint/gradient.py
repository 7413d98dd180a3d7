"""`odeint_adjoint`: gradients of a solve without a graph of the solve.

`continuous` integrates the adjoint equation backwards, as torchdiffeq does: constant memory, as
accurate as the tolerance; `joined` is the same in one solve. `discrete` is the exact gradient of
the numbers that were computed: the forward solve keeps the accepted steps, and the backward pass
recomputes one step at a time with a graph and walks through it. All can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pycnf.odeint.adjoint import _adjoint_norm, _Continuous
from pycnf.odeint.arguments import options_copy, parameters
from pycnf.odeint.discrete import _Discrete
from pycnf.odeint.norms import flat_to_shapes
from pycnf.odeint.problem import least_event, make_problem
from pycnf.odeint.solve import SOLVERS, odeint
from pycnf.odeint.stats import publish
from pycnf.odeint.transforms import transforming
from pycnf.odeint.untraced import untraced
from pycnf.warn import warn


@untraced
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

    A drop-in for `torchdiffeq.odeint_adjoint`, and two additions: `gradient`, and derivatives of
    every order (`create_graph=True`) to y0, t and parameters. Under torch.func's transforms and in
    forward mode it is `odeint`, whose gradient they know.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as for `odeint`; func is an nn.Module
            unless adjoint_params are given. Gradients go back from the event's time as if that were
            given; of t only the start has one.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the backward solve; by
            default those of the forward solve, but for options["norm"]. adjoint_options["norm"] may
            be "seminorm" or a callable of the tuple (t, *y, *adj_y, *params).
        adjoint_params: what to differentiate beside y0 and t; by default func's parameters.
        gradient: "continuous", the adjoint equation, solved for each interval between output times
            anew; "joined", the same by one adaptive solve that goes on with its step size where a
            cotangent comes in, and passes through the other output times: fewer evaluations with
            several outputs (methods on a fixed grid, and gradients that are differentiated again,
            are solved as by "continuous"); or "discrete", the exact gradient of the computed
            solution with every step size held constant, at a memory of one state for each accepted
            step. The latter uses no adjoint_* argument but adjoint_params.

    Returns:
        As `odeint`. For "continuous" and "joined" the node behind the result has `adjoint_options`,
        which may be edited before backward.

    Raises:
        ValueError: func is no nn.Module and adjoint_params are missing; adjoint_options cannot be
            inferred; unknown gradient, or "discrete" with a method of several steps. Otherwise as
            `odeint`.

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
    if gradient not in ("continuous", "joined", "discrete"):
        raise ValueError(f'gradient must be "continuous", "joined" or "discrete", got {gradient!r}')
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
            warn(f'gradient="discrete" solves no adjoint equation: {", ".join(unused)} not used.')
    adjoint_rtol = rtol if adjoint_rtol is None else adjoint_rtol
    adjoint_atol = atol if adjoint_atol is None else adjoint_atol
    adjoint_method = method if adjoint_method is None else adjoint_method
    if adjoint_method != method and options is not None and adjoint_options is None:
        raise ValueError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. "
            "So as `options` has been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        inferred = options_copy("options", options)
        adjoint_options = {k: v for k, v in inferred.items() if k != "norm"}
    else:
        adjoint_options = options_copy("adjoint_options", adjoint_options)
    params = (
        find_parameters(func)
        if adjoint_params is None
        else parameters("adjoint_params", adjoint_params)
    )
    trainable = tuple(p for p in params if p.requires_grad)
    if len(trainable) != len(params) and callable(adjoint_options.get("norm")):
        warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will "
            "be excluded from the adjoint pass, and will not appear as a tensor in the adjoint "
            "norm."
        )
    if transforming():
        return odeint(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
        )
    problem = make_problem(func, y0, t, rtol, atol, method, options, SOLVERS, event_fn)
    if event_fn is not None:
        # torchdiffeq takes initial signs again of what it has combined, and calls event_fn for it.
        state = problem.y0.detach()
        state = state if problem.shapes is None else flat_to_shapes(state, problem.shapes)
        start = problem.event_time(problem.s[0].detach())
        problem.event_fn = least_event(problem.event_fn, start, state)
    publish(problem.stats)
    if gradient == "discrete":
        # The caller may edit y0 before backward, which takes the steps again from there.
        problem.y0 = problem.y0.clone()
        solution = _Discrete.apply(problem, problem.y0, problem.s, *trainable)
    else:
        adjoint_options["norm"] = _adjoint_norm(adjoint_options.get("norm"), problem)
        backward = dict(
            rtol=adjoint_rtol,
            atol=adjoint_atol,
            method=adjoint_method,
            options=adjoint_options,
            joined=gradient == "joined",
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
