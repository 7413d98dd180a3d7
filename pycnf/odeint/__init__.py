"""Solvers for ordinary differential equations with torchdiffeq's interface."""

from pycnf.odeint.gradient import odeint_adjoint
from pycnf.odeint.per_sample import odeint_per_sample
from pycnf.odeint.solve import odeint

__all__ = ["odeint", "odeint_adjoint", "odeint_per_sample"]
