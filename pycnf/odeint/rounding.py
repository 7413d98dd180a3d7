"""Arithmetic on Python floats as if they were numbers of a torch dtype.

Step control runs on the host; what PyTorch would compute on 0-dim tensors of a dtype is reproduced
by rounding after every operation, which for +, -, *, / of float32 numbers in double precision gives
the correctly rounded float32 result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float

import numpy as np
import torch


def _round_float32(x: float) -> float:
    return c_float(x).value


def rounding(dtype: torch.dtype) -> Callable[[float], float]:
    """The function that rounds a Python float to the nearest number of a real floating dtype."""
    if dtype == torch.float64:
        return float
    if dtype == torch.float32:
        return _round_float32
    return lambda x: torch.tensor(x, dtype=dtype).item()


def next_after(x: float, toward: float, dtype: torch.dtype) -> float:
    """The next number of dtype after x in the direction of `toward`; both are numbers of dtype."""
    if dtype == torch.float64:
        return math.nextafter(x, toward)
    if dtype == torch.float32:
        return float(np.nextafter(np.float32(x), np.float32(toward)))
    pair = torch.tensor([x, toward], dtype=dtype)
    return torch.nextafter(pair[0], pair[1]).item()


def before(t: float, dtype: torch.dtype) -> float:
    """The last number of dtype before t (t itself where t - 1 rounds to t)."""
    return next_after(t, rounding(dtype)(t - 1), dtype)


def after(t: float, dtype: torch.dtype) -> float:
    """The first number of dtype after t (t itself where t + 1 rounds to t)."""
    return next_after(t, rounding(dtype)(t + 1), dtype)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of |y|."""
    return dtype.to_real() if dtype.is_complex else dtype
