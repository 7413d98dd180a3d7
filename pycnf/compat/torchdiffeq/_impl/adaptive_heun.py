"""Heun's method with an error estimate, by torchdiffeq's names."""

from pycnf.compat.torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, butcher_tableau
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["_ADAPTIVE_HEUN_TABLEAU", "_AH_C_MID", "AdaptiveHeunSolver"]

_ADAPTIVE_HEUN_TABLEAU, _AH_C_MID = butcher_tableau("adaptive_heun")


class AdaptiveHeunSolver(RKAdaptiveStepsizeODESolver):
    """Heun's method with an error estimate."""

    order = TABLEAUX["adaptive_heun"].order
    tableau = _ADAPTIVE_HEUN_TABLEAU
    mid = _AH_C_MID
