"""Solvers for ordinary differential equations with torchdiffeq's interface."""

from pycnf.odeint.dense import odeint_dense
from pycnf.odeint.events import odeint_event
from pycnf.odeint.gradient import odeint_adjoint
from pycnf.odeint.per_sample import odeint_per_sample
from pycnf.odeint.solve import odeint
from pycnf.odeint.stats import SolveStats, last_stats

__all__ = [
    "SolveStats",
    "last_stats",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "odeint_per_sample",
]
