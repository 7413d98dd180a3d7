"""Vector fields of the flow tests."""

import torch
from torch import Tensor, nn

from pycnf.nn import MLP

DOUBLE = torch.float64


def mlp(features: int = 2, hidden: tuple[int, ...] = (8, 8), scale: float = 2.0, **options) -> MLP:
    """A seeded f64 network whose weights are scaled, so that solves take several steps."""
    torch.manual_seed(0)
    field = MLP(features, hidden, **options).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter *= scale
    return field


class Counted(nn.Module):
    """Any field, its calls counted and their arguments recorded."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.calls: list[tuple[Tensor, int]] = []

    def forward(self, t: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        self.calls.append((t.detach().clone(), z.shape[0]))
        return self.field(t, z, *context)


class Attractor(nn.Module):
    """f = -rate z: x(t1) = z(t0) exp(-rate (t1 - t0)), logdet = rate D (t1 - t0)."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=DOUBLE))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -self.rate * z


def points(count: int = 7, features: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, features, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
