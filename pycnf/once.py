"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor):
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        raise RuntimeError(ctx.message)


def raise_if_differentiated(
    grads: Sequence[Tensor | None], depend_on: Sequence[Tensor], message: str
) -> tuple[Tensor | None, ...]:
    """The gradients, which raise a RuntimeError when they are differentiated in turn.

    torch's `once_differentiable` lets them pass as constants where the incoming gradient carries no
    graph, which is a silent wrong number; here they keep an edge to everything they depend on.

    Args:
        grads: what a backward is about to return.
        depend_on: the tensors that its forward was given.
        message: of the error.
    """
    sources = [x for x in depend_on if x.requires_grad]
    present = [g for g in grads if g is not None]
    if not torch.is_grad_enabled() or not sources or not present:
        return tuple(grads)
    guarded = iter(_Barrier.apply(message, len(present), *present, *sources))
    return tuple(None if g is None else next(guarded) for g in grads)
