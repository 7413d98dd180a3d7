"""The exact divergence of a network with one or two hidden layers, without any tangents.

With h1 = W1 z + c1, h2 = W2 φ(h1) + c2, f = W3 φ(h2) + c3 and the slopes d = φ'(h),

    tr(∂f/∂z) = d2ᵀ M d1,   M = W2∘(W1 W3)ᵀ,

and M is shared by the batch: the exact trace costs one H×H product per sample, as one Hutchinson
probe does, whatever D is. With one hidden layer tr = Σ_j d1_j (W1 W2)_jj.
"""

import torch
from torch import Tensor

from .activation import Activation
from .layers import Affine

HIDDEN_LAYERS = (1, 2)


def value_and_trace(
    affines: list[Affine], activation: Activation, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and exact divergence; differentiable to any order.

    Args:
        affines: Two or three layers, their weights and gates shared by the batch.
        activation: Applied between the layers.
        z: State [B, D].

    Returns:
        f [B, D] and tr(∂f/∂z) [B].
    """
    first, *middle, last = affines
    h1 = first.value(z)
    a1 = activation.value(h1)
    d1 = activation.slope(h1, a1)
    if not middle:
        return last.value(a1), torch.mv(d1, (first.weight * last.weight.t()).sum(1))
    h2 = middle[0].value(a1)
    a2 = activation.value(h2)
    d2 = activation.slope(h2, a2)
    mixed = middle[0].weight * torch.mm(first.weight, last.weight).t()
    return last.value(a2), torch.linalg.vecdot(d2, torch.mm(d1, mixed.t()))
