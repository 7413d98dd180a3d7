"""`odeint` and the table of solver classes, by torchdiffeq's names.

What is written to this `SOLVERS` is written to pycnf's table as well, so that `odeint` finds it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from pycnf.compat.changes import is_unchanged, on_change, parts
from pycnf.compat.torchdiffeq._impl.adaptive_heun import AdaptiveHeunSolver
from pycnf.compat.torchdiffeq._impl.bosh3 import Bosh3Solver
from pycnf.compat.torchdiffeq._impl.dopri5 import Dopri5Solver
from pycnf.compat.torchdiffeq._impl.dopri8 import Dopri8Solver
from pycnf.compat.torchdiffeq._impl.fehlberg2 import Fehlberg2
from pycnf.compat.torchdiffeq._impl.fixed_adams import AdamsBashforth, AdamsBashforthMoulton
from pycnf.compat.torchdiffeq._impl.fixed_grid import RK4, Euler, Heun2, Heun3, Midpoint
from pycnf.compat.torchdiffeq._impl.fixed_grid_implicit import (
    SDIRK2,
    TRBDF2,
    GaussLegendre4,
    GaussLegendre6,
    ImplicitEuler,
    ImplicitMidpoint,
    RadauIIA3,
    RadauIIA5,
    Trapezoid,
)
from pycnf.compat.torchdiffeq._impl.scipy_wrapper import ScipyWrapperODESolver
from pycnf.compat.torchdiffeq._impl.tsit5 import Tsit5Solver
from pycnf.odeint import odeint, odeint_dense, odeint_event, solve

__all__ = ["SOLVERS", "odeint", "odeint_dense", "odeint_event"]

_CLASSES = {
    "dopri8": Dopri8Solver,
    "dopri5": Dopri5Solver,
    "tsit5": Tsit5Solver,
    "bosh3": Bosh3Solver,
    "fehlberg2": Fehlberg2,
    "adaptive_heun": AdaptiveHeunSolver,
    "euler": Euler,
    "midpoint": Midpoint,
    "heun2": Heun2,
    "heun3": Heun3,
    "rk4": RK4,
    "explicit_adams": AdamsBashforth,
    "implicit_adams": AdamsBashforthMoulton,
    "implicit_euler": ImplicitEuler,
    "implicit_midpoint": ImplicitMidpoint,
    "trapezoid": Trapezoid,
    "radauIIA3": RadauIIA3,
    "gl4": GaussLegendre4,
    "radauIIA5": RadauIIA5,
    "gl6": GaussLegendre6,
    "sdirk2": SDIRK2,
    "trbdf2": TRBDF2,
    "fixed_adams": AdamsBashforthMoulton,
    "scipy_solver": ScipyWrapperODESolver,
}
_METHODS = dict(solve.SOLVERS)
_ORIGINALS = {cls: parts(cls) for cls in _CLASSES.values()}


class _Solvers(dict):
    def __setitem__(self, name: str, solver: Any) -> None:
        super().__setitem__(name, solver)
        _enter(name, solver)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del solve.SOLVERS[name]

    def __ior__(self, others: Any) -> _Solvers:
        self.update(others)
        return self

    def pop(self, name: str, *default: Any) -> Any:
        if default and name not in self:
            return default[0]
        solver = self[name]
        del self[name]
        return solver

    def popitem(self) -> tuple[str, Any]:
        if not self:
            raise KeyError("no solver is left")
        name = next(reversed(self))
        return name, self.pop(name)

    # dict's own would pass by the methods above.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault
    clear = MutableMapping.clear


def _enter(name: str, solver: Any) -> None:
    own = _CLASSES.get(name) is solver and is_unchanged(solver, _ORIGINALS[solver])
    solve.SOLVERS[name] = _METHODS[name] if own else solver


def _enter_all() -> None:
    for name, solver in SOLVERS.items():
        _enter(name, solver)


SOLVERS = _Solvers((name, _CLASSES[name]) for name in solve.SOLVERS)
on_change(_enter_all)
