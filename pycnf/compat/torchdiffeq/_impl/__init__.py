"""What public code imports of torchdiffeq's inner modules, on pycnf."""

from pycnf.compat.torchdiffeq._impl.adjoint import odeint_adjoint

# As in torchdiffeq, this makes `_impl.odeint` the function; the module is in sys.modules.
from pycnf.compat.torchdiffeq._impl.odeint import odeint, odeint_dense, odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
