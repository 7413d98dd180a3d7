"""Autocast around a solve whose backward pass evaluates the field again, at another time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch


def autocast_of_now(device: torch.device) -> Callable[[], AbstractContextManager]:
    """What makes contexts with the autocast state that holds now for a device's operations.

    They cache no casts of weights: a cast that several evaluations share sums up the weight's
    gradient in the low precision, and torch before 2.13 may hand one made without a graph to an
    evaluation with one.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    return partial(
        torch.autocast,
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
