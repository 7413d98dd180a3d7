"""The density that a flow has to beat to have earned its keep: a full-covariance Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GaussianBaseline(nn.Module):
    """The maximum-likelihood Gaussian of the training rows, fitted in the flow's own space.

    For pixels that is the dequantized logit space; the scaling or whitening after it is linear and
    changes no Gaussian likelihood. A module, so that it is saved with the model.
    """

    def __init__(self, features: int):
        """Makes a baseline that is not defined before it is fitted."""
        super().__init__()
        nan = torch.full((features, features), torch.nan, dtype=torch.float64)
        self.register_buffer("mean", nan[0].clone())
        self.register_buffer("scale_tril", nan)

    @property
    def defined(self) -> bool:
        """Whether the training rows span all columns, so that a Gaussian could be fitted."""
        return bool(torch.isfinite(self.scale_tril).all())

    def fit(self, y: Tensor) -> GaussianBaseline:
        """Fits to preprocessed training rows y [N, D], float64; stays undefined if N is too few."""
        covariance = torch.cov(y.T, correction=0).reshape(y.shape[1], y.shape[1])
        spread = torch.linalg.eigvalsh(covariance)
        if spread[0] > 1e-10 * spread[-1]:
            self.mean = y.mean(0)
            self.scale_tril = torch.linalg.cholesky(covariance)
        return self

    def log_prob(self, y: Tensor) -> Tensor:
        """Returns log p(y) [N] in nats."""
        return torch.distributions.MultivariateNormal(
            self.mean, scale_tril=self.scale_tril
        ).log_prob(y)
