"""Which tensors a field computes with, so that a solve can return their gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .dynamics import Dynamics, Parts


@dataclass
class Start:
    """What a solve that needs a gradient begins with.

    Attributes:
        z: State [B, D], a leaf.
        context: Given to the field; a leaf where it needs a gradient.
        parts: The right-hand side at the start with its graph; None if it was not evaluated.
        nbytes: Memory that this graph holds.
        parameters: The tensors that the field computes with and that need a gradient.
    """

    z: Tensor
    context: Tensor | None
    parts: Parts | None
    nbytes: int
    parameters: list[Tensor]


def begin(dynamics: Dynamics, x: Tensor, context: Tensor | None, keep: bool) -> Start:
    """Finds the tensors that need the gradient of a solve, and evaluates the start on the way.

    An `MLP`'s are its parameters. Any other field is evaluated with a graph (the evaluation that
    the solve begins with anyway), and every leaf of that graph which requires a gradient is one:
    parameters of modules, of closures, of globals, however they are reached. A module's
    `parameters()` are added, for those that only other times or states use. What a plain callable
    uses only later, and not at the start, is not found: make it an `nn.Module`.

    Args:
        dynamics: Right-hand side.
        x: State at the start [B, D].
        context: Given to the field.
        keep: Whether the graph of the evaluation is wanted in any case.
    """
    problem = dynamics.problem
    field = problem.field
    found: dict[int, Tensor] = {}
    if isinstance(field, nn.Module):
        found = {id(p): p for p in field.parameters() if p.requires_grad}
    z = x.detach().requires_grad_()
    if context is not None:
        context = context.detach().requires_grad_(context.requires_grad)
    if dynamics.forward_mode and not keep:
        return Start(z, context, None, 0, list(found.values()))
    shape = (x.shape[0],) if problem.per_sample else ()
    t = torch.full(shape, problem.start, dtype=x.dtype, device=x.device)
    held: dict[int, int] = {}

    def hold(saved: Tensor) -> Tensor:
        if not (saved.is_leaf and saved.requires_grad):
            storage = saved.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(hold, lambda saved: saved):
        parts = dynamics.evaluate(t, z, context, problem.probe, dynamics.full[0])
    if not dynamics.forward_mode:
        for leaf in leaves(parts[0]):
            if leaf is not z and leaf is not context:
                found[id(leaf)] = leaf
    return Start(z, context, parts, sum(held.values()), list(found.values()))


def leaves(value: Tensor) -> list[Tensor]:
    """Every leaf tensor in the graph of a value."""
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    stack, seen, found = [value.grad_fn], {value.grad_fn}, []
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found
