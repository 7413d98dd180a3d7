"""Solves in which every element of a batch takes its own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pycnf.odeint.elements import make_elements
from pycnf.odeint.masked_adaptive import MaskedAdaptiveSolver
from pycnf.odeint.masked_fixed import MaskedFixedGridSolver
from pycnf.odeint.stats import publish
from pycnf.odeint.tableau import TABLEAUX


def solve_elements(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    solvers: dict[str, Any],
    by_rows: bool,
) -> Tensor | tuple[Tensor, ...]:
    """`odeint` for the rows of the state, or else for the elements of torch.func's transforms."""
    method = "dopri5" if method is None else method
    if method not in TABLEAUX:
        where = "odeint_per_sample" if by_rows else "odeint under torch.func's transforms"
        names = ", ".join(f'"{name}"' for name in TABLEAUX)
        problem = "is not supported here" if method in solvers else "is unknown"
        raise ValueError(f'method "{method}" {problem}: {where} has {names}')
    tableau = TABLEAUX[method]
    elements = make_elements(func, y0, t, rtol, atol, method, options, by_rows)
    publish(elements.stats)
    solver = MaskedAdaptiveSolver if tableau.adaptive else MaskedFixedGridSolver
    label = solvers[method].label
    solution = solver(elements, tableau, label, **elements.options).integrate()
    return elements.shaped(solution)
