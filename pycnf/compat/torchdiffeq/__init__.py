"""pycnf in the place of torchdiffeq 0.2.5: its names, on pycnf's solvers."""

import pycnf
from pycnf.compat.torchdiffeq import _impl
from pycnf.odeint import odeint, odeint_adjoint, odeint_dense, odeint_event

__all__ = ["_impl", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]

__version__ = "0.2.5"
__pycnf_version__ = pycnf.__version__
