"""The UCI optical digits that scikit-learn ships: 1797 images of 8 x 8 pixels with 17 grey levels.

A density model of the 17 levels is a density of dequantized pixels ``x = (v + u) / 17``,
``u ~ U(0, 1)``: by Jensen's inequality the mean log-density, corrected by the cell's volume
``17^-D``, is a lower bound of the log-probability of the discrete image (Theis et al., 2016).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .errors import InputError

LEVELS = 17
SHAPE = (8, 8)

BITS_PER_DIM = "bits/dim = -(log p(y) + log|dy/dx|) / (D ln 2) + log2(17)"
BITS_PER_DIM_WHERE = (
    "x = (v + u)/17 with pixel levels v = 0..16 and u ~ U(0,1), y = logit(a + (1 - 2a) x), "
    "a = 0.01, D = 64; an upper bound of the bits that the 17-level pixels cost"
)


def load_levels() -> np.ndarray:
    """Returns the pixel levels, float64 whole numbers 0..16 of shape [1797, 64].

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn."
        ) from error
    return load_digits().data


def dequantize(levels: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Spreads whole levels over their cells: (v + u) / 17, float64 in [0, 1)."""
    return torch.from_numpy((levels + rng.random(levels.shape)) / LEVELS)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """The inverse of ``dequantize``: the level 0..16 whose cell holds x."""
    return torch.floor(x * LEVELS).clamp(0, LEVELS - 1)


def bits_per_dim(log_prob: torch.Tensor, features: int) -> torch.Tensor:
    """Bits per dimension of the discrete data from log p(x), x in the unit cube (nats)."""
    return -log_prob / (features * math.log(2.0)) + math.log2(LEVELS)
