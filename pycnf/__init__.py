"""Fast continuous normalizing flows: compiled solvers, exact gradients, and a drop-in torchdiffeq.
"""

from pycnf._build import build_info
from pycnf.odeint import odeint, odeint_adjoint

__version__ = "0.1.0"

__all__ = ["build_info", "odeint", "odeint_adjoint"]
