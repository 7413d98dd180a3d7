"""Base distributions."""

import math

import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """The standard normal distribution N(0, I), the default base of a flow.

    Args:
        features: D; None if only `log_prob` is asked for.

    Example:
        >>> StandardNormal(2).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    def __init__(self, features: int | None = None) -> None:
        super().__init__()
        self.features = features
        # Not saved; it only goes where .to() and .double() send the flow, and samples follow.
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of every row of z [B, D]: [B]."""
        return torch.rsub(z.square().sum(-1), -0.5 * z.shape[-1] * math.log(2 * math.pi), alpha=0.5)

    def sample(self, shape: tuple[int, ...] = ()) -> Tensor:
        """Draws from torch's generator: [*shape, D].

        Raises:
            ValueError: The distribution was made without `features`.
        """
        if self.features is None:
            raise ValueError("features: got None, expected the D to draw samples of")
        return torch.randn(*shape, self.features, dtype=self.like.dtype, device=self.like.device)

    def extra_repr(self) -> str:
        return f"features={self.features}"
