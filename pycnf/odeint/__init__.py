"""Solvers for ordinary differential equations with torchdiffeq's interface."""

from pycnf.odeint.events import odeint_event
from pycnf.odeint.gradient import odeint_adjoint
from pycnf.odeint.solve import odeint

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]
