"""Continuous normalizing flows."""

from .cnf import CNF
from .distributions import StandardNormal
from .errors import SolveError
from .stats import SolveStats

__all__ = ["CNF", "SolveError", "SolveStats", "StandardNormal"]
