"""Fehlberg's method of order 2, by torchdiffeq's names."""

from pycnf.compat.torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, butcher_tableau
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["_FEHLBERG2_TABLEAU", "_FE_C_MID", "Fehlberg2"]

_FEHLBERG2_TABLEAU, _FE_C_MID = butcher_tableau("fehlberg2")


class Fehlberg2(RKAdaptiveStepsizeODESolver):
    """Fehlberg's method of order 2."""

    order = TABLEAUX["fehlberg2"].order
    tableau = _FEHLBERG2_TABLEAU
    mid = _FE_C_MID
