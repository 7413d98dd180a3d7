"""The density that a flow has to beat to have earned its keep: a full-covariance Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from .transforms import Preprocess


class GaussianBaseline:
    """The maximum-likelihood Gaussian of the training rows, fitted in the flow's own space.

    For pixels that is the dequantized logit space; scaling or whitening after it is linear and
    changes no Gaussian likelihood.
    """

    def __init__(self, preprocess: Preprocess, rows: Tensor):
        """Fits to training rows x [N, D], float64.

        Raises:
            torch.linalg.LinAlgError: fewer independent rows than columns; no Gaussian fits.
        """
        y, _ = preprocess(rows)
        covariance = torch.cov(y.T, correction=0).reshape(y.shape[1], y.shape[1])
        spread = torch.linalg.eigvalsh(covariance)
        if spread[0] <= 1e-10 * spread[-1]:
            raise torch.linalg.LinAlgError("the training rows' covariance is singular")
        self.preprocess = preprocess
        self.density = torch.distributions.MultivariateNormal(y.mean(0), covariance)

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log p(x) [N] in nats, a density in the units of x."""
        y, logdet = self.preprocess(x)
        return self.density.log_prob(y) + logdet
