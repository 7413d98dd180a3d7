"""Functions that keep no graph, and are evaluated again with one when they are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pycnf.odeint.autocast import autocast_of_now


class Recomputed(torch.autograd.Function):
    """fn(*tensors[:count]), a tuple of tensors, at every order of derivatives.

    fn is given these tensors cut off from whatever leads to them, so that a derivative is the
    partial one; the tensors after them are parameters that fn has from elsewhere. It must give the
    same at every evaluation, and no tensor twice.
    """

    @staticmethod
    def forward(ctx: Any, fn: Callable, count: int, *tensors: Tensor):
        ctx.fn, ctx.count = fn, count
        ctx.autocast = autocast_of_now(tensors[0].device)
        ctx.save_for_backward(*tensors)
        return tuple(fn(*tensors[:count]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor):
        tensors, params = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        arguments = (*tensors, *cotangents)
        pull_back = partial(_pull_back, ctx.fn, ctx.count, params)
        with ctx.autocast():
            if torch.is_grad_enabled():
                found = Recomputed.apply(pull_back, len(arguments), *arguments, *params)
            else:
                found = pull_back(*arguments)
        return None, None, *found


def _pull_back(
    fn: Callable, count: int, params: Sequence[Tensor], *arguments: Tensor
) -> list[Tensor]:
    """Gradients of fn to its tensors and to params, from the cotangents that follow the tensors;
    with gradients on, with their graph from the arguments.
    """
    with_graph = torch.is_grad_enabled()
    tensors, cotangents = arguments[:count], arguments[count:]
    if not with_graph:
        tensors = [x.detach().requires_grad_(True) for x in tensors]
    inputs = (*tensors, *params)
    with torch.enable_grad():
        pairs = [(y, c) for y, c in zip(fn(*tensors), cotangents) if y.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        outputs, weights = zip(*pairs)
        return list(
            torch.autograd.grad(
                outputs, inputs, weights, create_graph=with_graph, materialize_grads=True
            )
        )
