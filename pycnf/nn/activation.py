"""The activations of pycnf's networks, each with its first and second derivative.

The divergence of a network needs the activation's slope, and the gradient of the divergence its
curvature. Every formula is written in differentiable torch operations, so autograd can go further
(gradients of gradients) through the same code.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation function φ, element by element.

    `slope` and `curvature` are handed what is already known (h, a = φ(h), and φ'(h)), because tanh,
    softplus and others get their derivatives from those for a fraction of a transcendental's cost.

    Attributes:
        name: The name users give, e.g. "tanh".
        value: φ as a function of h.
        slope: φ' as a function of (h, a).
        curvature: φ'' as a function of (h, a, slope); None where φ'' is zero (almost) everywhere.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor, Tensor], Tensor] | None

    def __reduce__(self) -> tuple:
        # Pickled and copied by name: the functions are lambdas, which pickle refuses.
        return get_activation, (self.name,)


def _silu_slope(h: Tensor, a: Tensor) -> Tensor:
    s = torch.sigmoid(h)
    return s + a * (1 - s)


def _silu_curvature(h: Tensor, a: Tensor, slope: Tensor) -> Tensor:
    s = torch.sigmoid(h)
    return (1 - s) * (s + slope - a * s)


def _normal_density(h: Tensor) -> Tensor:
    return torch.exp(-0.5 * h * h) * (1 / math.sqrt(2 * math.pi))


def _gelu_slope(h: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(h * math.sqrt(0.5))) + h * _normal_density(h)


# selu(h) = scale * elu(h, alpha); Klambauer et al. 2017, the constants as torch has them.
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def _selu_slope(h: Tensor, a: Tensor) -> Tensor:
    return torch.where(h > 0, _SELU_SCALE, a + _SELU_SCALE * _SELU_ALPHA)


def _selu_curvature(h: Tensor, a: Tensor, slope: Tensor) -> Tensor:
    return torch.where(h > 0, 0.0, slope)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(
            "tanh",
            torch.tanh,
            lambda h, a: torch.addcmul(a.new_ones(()), a, a, value=-1),  # 1 - a², in one pass
            lambda h, a, s: (a * s).mul_(-2),
        ),
        Activation(
            "softplus",
            # torch turns linear at h > 20, which in f64 is an error of 2e-9; at 40 there is none.
            lambda h: F.softplus(h, threshold=40.0),
            lambda h, a: torch.sigmoid(h),
            lambda h, a, s: s * (1 - s),
        ),
        Activation(
            "elu",
            F.elu,
            # a = e^h - 1 below zero and a = h > 0 above, so this is e^h and 1.
            lambda h, a: a.clamp(max=0) + 1,
            lambda h, a, s: torch.where(h > 0, 0.0, s),
        ),
        Activation("silu", F.silu, _silu_slope, _silu_curvature),
        Activation("selu", F.selu, _selu_slope, _selu_curvature),
        Activation("relu", torch.relu, lambda h, a: (h > 0).to(h.dtype), None),
        Activation(
            "gelu",
            F.gelu,
            _gelu_slope,
            lambda h, a, s: (2 - h * h) * _normal_density(h),
        ),
        Activation("sin", torch.sin, lambda h, a: torch.cos(h), lambda h, a, s: -a),
        Activation(
            "square",
            torch.square,
            lambda h, a: 2 * h,
            lambda h, a, s: torch.full_like(h, 2.0),
        ),
        Activation("identity", lambda h: h, lambda h, a: torch.ones_like(h), None),
    )
}


def get_activation(name: str) -> Activation:
    """Finds an activation by name.

    Args:
        name: A key of `ACTIVATIONS`, or "swish", another name of "silu".

    Returns:
        The activation.

    Raises:
        ValueError: The name is unknown; the message lists the names there are.
    """
    found = ACTIVATIONS.get("silu" if name == "swish" else name) if isinstance(name, str) else None
    if found is None:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"activation: got {name!r}, expected one of {', '.join(ACTIVATIONS)}.{hint}"
        )
    return found
