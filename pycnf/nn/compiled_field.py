"""An `MLP` by the compiled ops, for many evaluations."""

from __future__ import annotations

import torch
from torch import Tensor

from pycnf import _ops

from .field_gradients import NO_DIVERGENCE, PROBES
from .field_ops import exact_divergence, field_arguments, keeps, kind_of
from .mlp import MLP
from .precision import PRECISIONS


class CompiledField:
    """The network's tensors as they are now, and the context's part, made once.

    Gradients flow to z, the context and the parameters. Time is read where it is: nothing here
    makes the host wait for a GPU.

    Args:
        field: An `MLP` that `field_ops.serves` for these arguments.
        z: A state [B, D].
        context: [B, C], [C] or None.
        precision: Of its products, in float32 on a GPU.
    """

    def __init__(
        self, field: MLP, z: Tensor, context: Tensor | None, precision: str = PRECISIONS[0]
    ) -> None:
        self.field, self.precision = field, precision
        self.offset, self.parameters, _ = field_arguments(field, z, context)

    def value(self, t: Tensor, z: Tensor) -> Tensor:
        """f [B, D] at a time in z's dtype, 0-dim or [B]."""
        return _ops.mlp_value(
            t,
            z,
            self.offset,
            self.parameters,
            self._kind(NO_DIVERGENCE),
            self._keeps(t, z),
        )[0]

    def value_and_divergence(
        self, t: Tensor, z: Tensor, probe: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """f and its divergence [B]: by probes [K, B, D], or exact."""
        divergence = exact_divergence(self.field, t.dim() == 1) if probe is None else PROBES
        value, divergence, _ = _ops.mlp_value_divergence(
            t, z, probe, self.offset, self.parameters, self._kind(divergence), None, 0, 0, False,
            self._keeps(t, z, probe),
        )  # fmt: skip
        return value, divergence

    def value_and_images(self, t: Tensor, z: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
        """f and the images (∂f/∂z) ε_k [K, B, D] of probes, or of the unit vectors."""
        if probe is None:
            unit = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            probe = unit.unsqueeze(1).expand(-1, *z.shape)
        value, images, _ = _ops.mlp_value_jvp(
            t, z, probe, self.offset, self.parameters, self._kind(NO_DIVERGENCE),
            self._keeps(t, z, probe),
        )  # fmt: skip
        return value, images

    def _kind(self, divergence: int) -> list[int]:
        return kind_of(self.field, divergence, precision=self.precision)

    def _keeps(self, *tensors: Tensor | None) -> bool:
        return keeps(*tensors, self.offset, *self.parameters)
