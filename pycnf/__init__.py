"""Fast continuous normalizing flows: compiled solvers, exact gradients, a drop-in torchdiffeq."""

from pycnf import compat, nn
from pycnf._build import build_info
from pycnf.flows import CNF
from pycnf.odeint import (
    last_stats,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    odeint_per_sample,
)

__version__ = "0.1.0"

__all__ = [
    "CNF",
    "build_info",
    "compat",
    "last_stats",
    "nn",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "odeint_per_sample",
]
