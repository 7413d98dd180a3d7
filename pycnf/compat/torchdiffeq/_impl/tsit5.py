"""Tsitouras' method of order 5, by torchdiffeq's names."""

from pycnf.compat.torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, butcher_tableau
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["_TSITOURAS_TABLEAU", "_TSIT_C_MID", "Tsit5Solver"]

_TSITOURAS_TABLEAU, _TSIT_C_MID = butcher_tableau("tsit5")


class Tsit5Solver(RKAdaptiveStepsizeODESolver):
    """Tsitouras' method of order 5."""

    order = TABLEAUX["tsit5"].order
    tableau = _TSITOURAS_TABLEAU
    mid = _TSIT_C_MID
