"""Dormand and Prince's method of order 5, by torchdiffeq's names."""

from pycnf.compat.torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, butcher_tableau
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["DPS_C_MID", "_DORMAND_PRINCE_SHAMPINE_TABLEAU", "Dopri5Solver"]

_DORMAND_PRINCE_SHAMPINE_TABLEAU, DPS_C_MID = butcher_tableau("dopri5")


class Dopri5Solver(RKAdaptiveStepsizeODESolver):
    """Dormand and Prince's method of order 5."""

    order = TABLEAUX["dopri5"].order
    tableau = _DORMAND_PRINCE_SHAMPINE_TABLEAU
    mid = DPS_C_MID
