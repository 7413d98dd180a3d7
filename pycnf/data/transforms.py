"""Invertible maps from data to what the flow sees, and what they do to the density.

Each is a module with float64 buffers, so it is saved with the model and a run folder needs nothing
else to turn samples back into the user's units. ``forward(x)`` returns ``(y, logdet)`` with
``logdet = log|det dy/dx|`` per row, hence ``log p(x) = log p(y) + logdet``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import InputError

# Where the digits' logit transform is cut off. Smaller values stretch the empty pixels' cells into
# long tails, larger ones squeeze all pixels into a box; at 0.01 the Gaussian that the flow has to
# beat is at its best (2.264 bits/dim; 2.270 at 0.001, 2.428 at 0.05).
LOGIT_ALPHA = 0.01


class Logit(nn.Module):
    """``y = logit(alpha + (1 - 2 alpha) x)`` for x in [0, 1]."""

    def __init__(self, alpha: float = LOGIT_ALPHA):
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.alpha + (1 - 2 * self.alpha) * x
        slope = math.log(1 - 2 * self.alpha) - torch.log(s) - torch.log1p(-s)
        return torch.logit(s), slope.sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        return (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)


class Standardize(nn.Module):
    """``y = (x - mean) / std``, column by column."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("std", torch.ones(features, dtype=torch.float64))

    def fit(self, x: Tensor, columns: Sequence[str]) -> Standardize:
        """Takes mean and standard deviation from the rows of x; ``columns`` name the culprits."""
        mean, std = x.mean(0), x.std(0)
        for name, m, s in zip(columns, mean.tolist(), std.tolist(), strict=True):
            if not (math.isfinite(m) and math.isfinite(s)):
                raise InputError(
                    f"Column '{name}' holds numbers too large to standardize in double precision; "
                    "rescale it."
                )
            # A spread at the rounding error of the mean is no spread.
            if s <= 1e-13 * abs(m):
                raise InputError(
                    f"Column '{name}' is constant in the training rows, so it has no density; "
                    f"leave it out with --drop '{name}'."
                )
        self.mean, self.std = mean, std
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x - self.mean) / self.std
        return y, (-self.std.log().sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std + self.mean


class Whiten(nn.Module):
    """``y = R^(-1/2) (x - mean) / std`` with the symmetric root of the correlation matrix R.

    Of all whitenings this one leaves y most like the standardized columns, so a pixel stays
    recognisably itself; and it is blind to the columns' units.
    """

    def __init__(self, features: int):
        super().__init__()
        self.standardize = Standardize(features)
        self.register_buffer("matrix", torch.eye(features, dtype=torch.float64))

    def fit(self, x: Tensor, columns: Sequence[str]) -> Whiten:
        """Takes mean and covariance from the rows of x; ``columns`` name the culprits."""
        unit, _ = self.standardize.fit(x, columns)(x)
        values, vectors = torch.linalg.eigh(unit.T @ unit / (len(x) - 1))
        if values[0] <= 1e-10 * values[-1]:
            raise InputError(
                f"Whitening needs linearly independent columns, and in these {len(x)} training "
                "rows some column is a combination of others; use --preprocess standardize."
            )
        self.matrix = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit, logdet = self.standardize(x)
        return unit @ self.matrix, logdet + torch.linalg.slogdet(self.matrix).logabsdet

    def inverse(self, y: Tensor) -> Tensor:
        return self.standardize.inverse(torch.linalg.solve(self.matrix, y.T).T)


class Preprocess(nn.Module):
    """The maps of one source, in order: the logit for pixels, then standardizing or whitening."""

    def __init__(self, features: int, scaling: str, logit: bool):
        """Builds the untrained maps.

        Args:
            features: D.
            scaling: "standardize" or "whiten".
            logit: whether the data live in the unit cube.
        """
        super().__init__()
        self.logit = Logit() if logit else None
        self.scaling = {"standardize": Standardize, "whiten": Whiten}[scaling](features)

    def fit(self, x: Tensor, columns: Sequence[str]) -> Preprocess:
        """Learns the scaling from training rows x [N, D], float64."""
        self.scaling.fit(x if self.logit is None else self.logit(x)[0], columns)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.logit is None:
            return self.scaling(x)
        y, from_logit = self.logit(x)
        z, from_scaling = self.scaling(y)
        return z, from_logit + from_scaling

    def inverse(self, z: Tensor) -> Tensor:
        y = self.scaling.inverse(z)
        return y if self.logit is None else self.logit.inverse(y)
