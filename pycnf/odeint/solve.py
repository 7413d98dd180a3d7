"""`odeint`: torchdiffeq's interface and step sequence on pycnf's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pycnf.odeint import rounding
from pycnf.odeint.adams import AdamsBashforth, AdamsBashforthMoulton
from pycnf.odeint.adaptive import AdaptiveSolver
from pycnf.odeint.explicit_grid import ExplicitGridSolver
from pycnf.odeint.fixed_grid import FixedGridSolver
from pycnf.odeint.implicit_grid import IMPLICIT_TABLEAUX, ImplicitGridSolver, ImplicitTableau
from pycnf.odeint.masked import solve_elements
from pycnf.odeint.problem import CALLBACKS, Problem, make_problem
from pycnf.odeint.scipy_solver import ScipySolver
from pycnf.odeint.stats import publish
from pycnf.odeint.tableau import TABLEAUX, Tableau
from pycnf.odeint.transforms import transforming
from pycnf.odeint.until_event import solve_until_event
from pycnf.odeint.untraced import untraced
from pycnf.odeint.user_solver import UserSolver, make_user_solver


@dataclass(frozen=True)
class Method:
    """What stands behind a method's name; `label` is torchdiffeq's class, named in warnings."""

    label: str
    solver: type[AdaptiveSolver] | type[FixedGridSolver] | type[ScipySolver]
    tableau: Tableau | ImplicitTableau | None
    callbacks: frozenset[str] = frozenset({"callback_step"})

    def valid_callbacks(self) -> frozenset[str]:
        """The callbacks that the method knows; classes of the user's have this too."""
        return self.callbacks


_LABELS = {
    "dopri8": "Dopri8Solver",
    "dopri5": "Dopri5Solver",
    "tsit5": "Tsit5Solver",
    "bosh3": "Bosh3Solver",
    "fehlberg2": "Fehlberg2",
    "adaptive_heun": "AdaptiveHeunSolver",
    "euler": "Euler",
    "midpoint": "Midpoint",
    "heun2": "Heun2",
    "heun3": "Heun3",
    "rk4": "RK4",
}

_IMPLICIT_LABELS = {
    "implicit_euler": "ImplicitEuler",
    "implicit_midpoint": "ImplicitMidpoint",
    "trapezoid": "Trapezoid",
    "radauIIA3": "RadauIIA3",
    "gl4": "GaussLegendre4",
    "radauIIA5": "RadauIIA5",
    "gl6": "GaussLegendre6",
    "sdirk2": "SDIRK2",
    "trbdf2": "TRBDF2",
}

# A class of the user's may be entered beside pycnf's methods, see `user_solver`.
SOLVERS: dict[str, Method | type] = {
    **{
        name: Method(label, AdaptiveSolver, TABLEAUX[name], frozenset(CALLBACKS))
        if TABLEAUX[name].adaptive
        else Method(label, ExplicitGridSolver, TABLEAUX[name])
        for name, label in _LABELS.items()
    },
    "explicit_adams": Method("AdamsBashforth", AdamsBashforth, TABLEAUX["rk4"]),
    "implicit_adams": Method("AdamsBashforthMoulton", AdamsBashforthMoulton, TABLEAUX["rk4"]),
    **{
        name: Method(label, ImplicitGridSolver, IMPLICIT_TABLEAUX[name])
        for name, label in _IMPLICIT_LABELS.items()
    },
    "fixed_adams": Method("AdamsBashforthMoulton", AdamsBashforthMoulton, TABLEAUX["rk4"]),
    "scipy_solver": Method("ScipyWrapperODESolver", ScipySolver, None, frozenset()),
}


def adaptive_methods() -> list[str]:
    """Names of the methods that pycnf's adaptive solver takes steps of."""
    return [
        name for name, each in SOLVERS.items() if getattr(each, "solver", None) is AdaptiveSolver
    ]


def make_solver(
    problem: Problem, tape: list | None = None
) -> AdaptiveSolver | FixedGridSolver | ScipySolver | UserSolver:
    """The solver of a problem's method with its options.

    Raises:
        AttributeError: the method knows no events; torchdiffeq's text.
    """
    method = SOLVERS[problem.method]
    if not isinstance(method, Method):
        return make_user_solver(method, problem, tape)
    if problem.event_fn is not None:
        if not issubclass(method.solver, AdaptiveSolver | FixedGridSolver):
            raise AttributeError(
                f"'{method.label}' object has no attribute 'integrate_until_event'"
            )
        if issubclass(method.solver, FixedGridSolver):
            # Here alone the steps on a grid are counted in the state's dtype, whatever that of t.
            s = problem.s.to(rounding.real_dtype(problem.y0.dtype))
            problem = replace(problem, s=s, times=s.tolist())
    return method.solver(problem, method.tableau, method.label, tape, **problem.options)


@untraced
def odeint(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable | None = None,
) -> Tensor | tuple[Tensor, ...] | tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """Solves dy/dt = func(t, y), y(t[0]) = y0, and returns y at every time of t.

    A drop-in for `torchdiffeq.odeint`: same arguments, defaults, accepted steps, numbers, errors
    and warnings. Gradients flow through the operations of the solver, those of the first step size
    included, and can be differentiated again. Under `torch.func.vmap` every element takes its own
    steps and may have its own times, parameters and tolerances; all torch.func transforms nest.

    Args:
        func: vector field, called with a 0-dim time in the state's real dtype and a state; returns
            the state's shape, or a tuple for a tuple state.
        y0: state, a tensor of any shape or a tuple of tensors; float, half, bfloat16 or complex.
        t: times [T], ascending or descending, floating point.
        rtol, atol: tolerances of the adaptive methods; a number, a tensor that broadcasts to y0, or
            one number for each part of a tuple.
        method: adaptive "dopri8", "dopri5" (default), "tsit5", "bosh3", "fehlberg2",
            "adaptive_heun"; on a fixed grid "euler", "midpoint", "heun2", "heun3", "rk4" (the 3/8
            rule); implicit on a fixed grid "implicit_euler", "implicit_midpoint", "trapezoid",
            "radauIIA3", "gl4", "radauIIA5", "gl6", "sdirk2", "trbdf2". "gl4" has torchdiffeq's
            times: both stages are evaluated at that of the first, so it is of first order where the
            field depends on time; "gl6" has the right ones. Multistep methods that start with rk4:
            "explicit_adams", "implicit_adams" (also "fixed_adams"). "scipy_solver":
            `scipy.integrate.solve_ivp`, whose result has no graph.
        options: adaptive: norm, first_step, safety, ifactor, dfactor, min_step, max_step, step_t,
            jump_t, max_num_steps, dtype (of time); fixed: step_size or grid_constructor, interp
            ("linear", "cubic"), perturb; implicit also max_iters (100) of Broyden's method, which
            ends at a residual of 1e-8 (1e-6 in float32) in Euclidean norm, whatever rtol and atol;
            Adams also max_order (12), and max_iters (4) of the corrector, which ends where rtol and
            atol are met; SciPy: solver ("LSODA"), min_step, max_step. cuda_graph (True, False or
            None): on a GPU, explicit methods of one step replay a recorded attempt, or a recorded
            solve on a grid. func is an nn.Module then, run twice as written and not called again
            while shapes, settings, the times of a grid and the places of its tensors are the same.
            It is recorded anew where a number, string or tensor that is an attribute of it or of a
            module in it has been replaced; all else that it reads from Python (closures, globals,
            lists, counters of its own) is read once, at the recording. README.md, "Recorded
            solves", lists what is not recorded; a warning says which it was.
        event_fn: of (t, y), a tensor of any shape: the solve ends where a component of it changes
            sign. t is then [start, anything in the direction of time]; a method on a fixed grid
            needs the option step_size.

    Returns:
        [T, *y0.shape], or a tuple of such for a tuple state; the first entry is y0. With event_fn,
        (event time, 0-dim in t's dtype; such a solution [2, *y0.shape]); the event time carries no
        gradient, see `odeint_event`.

    Raises:
        AssertionError: t is no ascending or descending 1-D tensor, a tolerance does not fit y0, the
            step size underflows, the state is not finite, max_num_steps is exceeded, or an event
            is sought on a fixed grid without step_size.
        RuntimeError: 20000 fixed steps met no event.
        TypeError: t is not floating point.
        ImportError: scipy_solver without SciPy. RuntimeError: SciPy could not reach the end.
        ValueError: unknown method, contradicting options, func returns another shape, or event_fn
            is given with other than two times.
        NotImplementedError: event_fn under torch.func's transforms.

    Source: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, II.4; the methods'
    papers are named in csrc/core/tableau.h.

    Example:
        >>> import torch, pycnf
        >>> t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> y = pycnf.odeint(lambda t, y: -y, torch.ones((), dtype=torch.float64), t)
        >>> round(y[-1].item(), 6)
        0.367879
    """
    if transforming():
        if event_fn is not None:
            raise NotImplementedError(
                "event_fn does not work under torch.func's transforms and in forward mode"
            )
        return solve_elements(func, y0, t, rtol, atol, method, options, SOLVERS, by_rows=False)
    problem = make_problem(func, y0, t, rtol, atol, method, options, SOLVERS, event_fn)
    publish(problem.stats)
    solver = make_solver(problem)
    if event_fn is None:
        return problem.shaped(solver.integrate())
    event, solution = solve_until_event(solver)
    return problem.event_time(event), problem.shaped(solution)


def solve_without_graph(problem: Problem, tape: list | None = None) -> Tensor:
    """The solution of a problem with gradients off."""
    with torch.no_grad():
        return make_solver(problem, tape).integrate()
