"""Dormand and Prince's method of order 8, by torchdiffeq's names."""

from pycnf.compat.torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, butcher_tableau
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["_DOPRI8_TABLEAU", "Dopri8Solver", "_C_mid"]

_DOPRI8_TABLEAU, _C_mid = butcher_tableau("dopri8")


class Dopri8Solver(RKAdaptiveStepsizeODESolver):
    """Dormand and Prince's method of order 8."""

    order = TABLEAUX["dopri8"].order
    tableau = _DOPRI8_TABLEAU
    mid = _C_mid
