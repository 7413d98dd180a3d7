"""Bogacki and Shampine's method of order 3, by torchdiffeq's names."""

from pycnf.compat.torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, butcher_tableau
from pycnf.odeint.tableau import TABLEAUX

__all__ = ["_BOGACKI_SHAMPINE_TABLEAU", "_BS_C_MID", "Bosh3Solver"]

_BOGACKI_SHAMPINE_TABLEAU, _BS_C_MID = butcher_tableau("bosh3")


class Bosh3Solver(RKAdaptiveStepsizeODESolver):
    """Bogacki and Shampine's method of order 3."""

    order = TABLEAUX["bosh3"].order
    tableau = _BOGACKI_SHAMPINE_TABLEAU
    mid = _BS_C_MID
