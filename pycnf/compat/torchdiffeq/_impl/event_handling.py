"""Where an event function changes its sign, by torchdiffeq's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["combine_event_functions", "find_event"]


def find_event(
    interp_fn: Callable, sign0: Tensor, t0: Tensor, t1: Tensor, event_fn: Callable, tol: Any
) -> tuple[Tensor, Tensor]:
    """Bisects a step from t0 to t1 for the time at which event_fn loses the sign that it has at t0.

    Returns:
        The time, to within tol, and the state there; gradients flow to the state only.
    """
    with torch.no_grad():
        halvings = torch.ceil(torch.log((t1 - t0) / tol) / math.log(2.0)).long()
        for _ in range(halvings):
            middle = (t0 + t1) / 2.0
            before = torch.sign(event_fn(middle, interp_fn(middle))) == sign0
            t0, t1 = torch.where(before, middle, t0), torch.where(before, t1, middle)
        event_t = (t0 + t1) / 2.0
    return event_t, interp_fn(event_t)


def combine_event_functions(event_fn: Callable, t0: Tensor, y0: Any) -> Callable:
    """One number for all components of event_fn: positive at the start, zero at the first event."""
    with torch.no_grad():
        signs = torch.sign(event_fn(t0, y0))

    def first_event(t: Tensor, y: Any) -> Tensor:
        return torch.min(event_fn(t, y) * signs)

    return first_event
