"""Which tensors a field computes with, so that a solve can return their gradients."""

import torch
from torch import Tensor, nn

from .dynamics import Dynamics, Parts


def first_evaluation(
    dynamics: Dynamics, x: Tensor, context: Tensor | None
) -> tuple[Parts | None, list[Tensor]]:
    """Finds the tensors that need the gradient of a solve, and evaluates the start on the way.

    An `MLP`'s are its parameters. Any other field is evaluated once with a graph (the evaluation
    that the solve begins with anyway), and every leaf of that graph which requires a gradient is
    one: parameters of modules, of closures, of globals, however they are reached. A module's
    `parameters()` are added, for those that only other times or states use. What a plain callable
    uses only later, and not at the start, is not found: make it an `nn.Module`.

    Args:
        dynamics: Right-hand side.
        x: State at the start [B, D].
        context: Given to the field.

    Returns:
        The right-hand side at the start (None if it was not evaluated), and the tensors.
    """
    problem = dynamics.problem
    field = problem.field
    found: dict[int, Tensor] = {}
    if isinstance(field, nn.Module):
        found = {id(p): p for p in field.parameters() if p.requires_grad}
    if dynamics.forward_mode:
        return None, list(found.values())
    z = x.detach().requires_grad_()
    shape = (x.shape[0],) if problem.per_sample else ()
    t = torch.full(shape, problem.start, dtype=x.dtype, device=x.device)
    context = None if context is None else context.detach()
    with torch.enable_grad():
        parts = dynamics.evaluate(t, z, context, problem.probe, dynamics.full[0])
    for leaf in leaves(parts[0]):
        if leaf is not z:
            found[id(leaf)] = leaf
    return tuple(part.detach() for part in parts), list(found.values())


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
