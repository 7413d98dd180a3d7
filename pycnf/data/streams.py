"""Random numbers that depend only on (seed, purpose, index), never on what was drawn before.

The order of epoch 7 or the probe of step 1200 can therefore be drawn again at any time, which lets
an interrupted training run resume to the very same result without stored generator states.
"""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Returns the generator of one purpose ("order", "probe", ...) at one index (epoch, step)."""
    # crc32, because Python's hash() of a string differs from process to process.
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])
