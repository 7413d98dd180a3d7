"""`odeint_per_sample`: one field for a whole batch, steps for every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pycnf.odeint.masked import solve_elements
from pycnf.odeint.solve import SOLVERS
from pycnf.odeint.untraced import untraced


@untraced
def odeint_per_sample(
    func: Callable,
    y0: Tensor | tuple[Tensor, ...],
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Like `odeint` with one call of func for all rows of a batch, but each row has its own times
    and takes its own steps.

    A row's numbers, accepted steps and gradients are those of `odeint` for that row alone; its
    error is the norm of its own state. The field is called for all rows until the last has
    finished; for a row that has, with its initial time and state. For a field written for one
    element use `torch.func.vmap` over `odeint`, which does the same.

    Args:
        func: vector field, called with times [B] in the state's real dtype and states [B, ...]; a
            field that expects one time must be changed to take a column, as in `t[:, None]`. What
            it returns for a row may depend on that row only.
        y0: states [B, ...], or a tuple of such; float, half, bfloat16 or complex.
        t: times [T], or [B, T] with its own for every row; a row's times ascend or descend,
            whatever those of the others do.
        rtol, atol: tolerances of the adaptive methods; a number, a tensor that broadcasts to y0
            ([B, 1] for one a row of a matrix), or one number for each part of a tuple.
        method, options: as for `odeint`; a custom norm is given the state of one row, under
            vmap; `first_step` may be [B], `step_t` and `jump_t` [P] or [B, P]; a
            `grid_constructor` is called with y0 and t as [B, T] and returns [G] or [B, G].

    Returns:
        [T, B, ...], or a tuple of such; the first entry is y0.

    Raises:
        AssertionError, TypeError, ValueError: as `odeint`, with the row's number; the parts of y0
            do not agree in B, or t is neither [T] nor [B, T].

    Example:
        >>> import torch, pycnf
        >>> rates = torch.tensor([[1.0], [100.0]])
        >>> t = torch.tensor([[0.0, 1.0], [0.0, 0.02]])
        >>> y = pycnf.odeint_per_sample(lambda t, y: -rates * y, torch.ones(2, 1), t)
        >>> [round(value, 4) for value in y[-1, :, 0].tolist()]
        [0.3679, 0.1353]
    """
    return solve_elements(func, y0, t, rtol, atol, method, options, SOLVERS, by_rows=True)
