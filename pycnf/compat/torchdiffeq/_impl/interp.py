"""The interpolant of an adaptive step, by torchdiffeq's names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pycnf import reference

__all__ = ["_interp_evaluate", "_interp_fit"]


def _interp_fit(
    y0: Tensor, y1: Tensor, y_mid: Tensor, f0: Tensor, f1: Tensor, dt: Tensor
) -> list[Tensor]:
    """Coefficients, constant first, of the quartic through both ends, both slopes and the
    middle.
    """
    return list(reference.quartic(y0, y1, y_mid, f0, f1, dt))


def _interp_evaluate(coefficients: Sequence[Tensor], t0: Tensor, t1: Tensor, t: Tensor) -> Tensor:
    """The quartic of a step from t0 to t1 at a time t within it."""
    assert (t0 <= t) & (t <= t1), f"invalid interpolation, fails `t0 <= t <= t1`: {t0}, {t}, {t1}"
    return reference.evaluate_quartic(
        coefficients, ((t - t0) / (t1 - t0)).to(coefficients[0].dtype)
    )
