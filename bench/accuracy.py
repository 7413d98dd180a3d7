"""What results are compared with: one tight float64 solve."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import pycnf


def tight_step(
    field: pycnf.nn.MLP,
    x: Tensor,
    probe: Tensor | None,
    t0: float = 0.0,
    t1: float = 1.0,
    tolerance: float = 1e-10,
) -> list[Tensor]:
    """Mean negative log-likelihood and its gradients to the field's parameters, in float64.

    By PyTorch's own operations (the generic engine) and dopri8; without a probe by the exact
    divergence.
    """
    field = copy.deepcopy(field).double()
    flow = pycnf.CNF(
        field,
        divergence="exact" if probe is None else "hutchinson",
        method="dopri8",
        rtol=tolerance,
        atol=tolerance,
        t0=t0,
        t1=t1,
        max_num_steps=100_000,
        engine="generic",
    )
    loss = -flow.log_prob(x.double(), probe=None if probe is None else probe.double()).mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(field.parameters()))]


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """Relative distance of two lists of tensors in the Euclidean norm."""
    difference = sum((a.double() - b).square().sum() for a, b in zip(found, truth)) ** 0.5
    return float(difference / sum(b.square().sum() for b in truth) ** 0.5)


def errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, str]:
    """Facts of a [loss, *gradients] beside the tight one."""
    return {
        "loss": f"{found[0].item():.7g}",
        "loss error": f"{distance(found[:1], truth[:1]):.1e}",
        "gradient error": f"{distance(found[1:], truth[1:]):.1e}",
    }
