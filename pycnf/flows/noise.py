"""The random probes of a solve."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pycnf._ops import probe_keys, probe_sample, signed_seed


@dataclass(frozen=True, eq=False)
class Noise:
    """Probes that are a function of a seed and of each sample's key.

    Compiled solves draw them where they need them; who wants them as a tensor asks for `probe`.

    Attributes:
        keys: int64 [B]; or rows [B, D], whose hashes the keys are.
        seed: Any 64-bit integer.
        count: K, how many probes a sample has.
        kind: "rademacher" or "gaussian".
        features: D.
        dtype: Of the probes.
    """

    keys: Tensor
    seed: int
    count: int
    kind: str
    features: int
    dtype: torch.dtype

    @cached_property
    def probe(self) -> Tensor:
        """[K, B, D]."""
        keys = probe_keys(self.keys) if self.keys.is_floating_point() else self.keys
        return probe_sample(
            keys, self.seed, self.count, self.features, noise=self.kind, dtype=self.dtype
        )

    def arguments(self) -> tuple[Tensor, list[int]]:
        """The ops' `keys` and `noise`."""
        return self.keys, [signed_seed(self.seed), self.count, int(self.kind == "gaussian")]
