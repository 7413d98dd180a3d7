"""Which fields the compiled ops evaluate, and their arguments for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pycnf import _ops

from .activation import ACTIVATIONS
from .closed_form import HIDDEN_LAYERS
from .field_gradients import CLOSED_FORM, NO_DIVERGENCE, PROBES, UNIT_VECTORS
from .mlp import MLP
from .precision import PRECISIONS

PLACES = {name: place for place, name in enumerate(ACTIVATIONS)}
MOST_LAYERS = 16  # kMaxLayers in csrc/core/mlp.h
MANY_WEIGHTS, MANY_SAMPLES = 1 << 18, 64


def serves(field: MLP, t: Tensor | float, z: Tensor, *others: Tensor | None) -> bool:
    """Whether the ops evaluate an `MLP` (one with forward mode) at these arguments.

    In float32 and float64, and where nothing but autograd's records is asked of an operation:
    functions of `torch.func`, dual numbers and autocast meet the plain formulas, and
    `torch.compile` makes kernels of its own from them.
    """
    tensors = [z, *(x for x in (t, *others) if isinstance(x, Tensor))]
    return (
        z.dtype in (torch.float32, torch.float64)
        and _ops.has_kernels(z.dtype, z.device)
        and all(type(x) in (Tensor, nn.Parameter) and x.device == z.device for x in tensors)
        and len(field.layers) <= MOST_LAYERS
        and all(_has_parts(layer, z) for layer in field.layers)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.is_autocast_enabled(z.device.type)
    )


def gains(field: MLP, z: Tensor) -> bool:
    """Whether the ops are faster than the plain formulas, measured forward and backward on a CPU.

    They work there on 16 samples at a time and add up gradients in memory of their own, which a few
    samples do not pay for where the weights outgrow a core's cache.
    """
    weights = sum(layer.in_features * layer.out_features for layer in field.layers)
    return z.device.type == "cpu" and (weights <= MANY_WEIGHTS or z.shape[0] >= MANY_SAMPLES)


def _has_parts(layer: nn.Module, z: Tensor) -> bool:
    parts = layer.parts()
    return parts is not None and all(
        x is None
        or (type(x) in (Tensor, nn.Parameter) and x.dtype == z.dtype and x.device == z.device)
        for x in parts
    )


def time_of(t: Tensor | float, z: Tensor) -> Tensor:
    """The time in z's dtype."""
    return t.to(z) if isinstance(t, Tensor) else torch.tensor(t, dtype=z.dtype, device=z.device)


def field_arguments(
    field: MLP, z: Tensor, context: Tensor | None, divergence: int = NO_DIVERGENCE
) -> tuple[Tensor | None, list[Tensor | None], list[int]]:
    """The ops' `context` [B, H], `parameters` and `kind`."""
    field.check(z, context)
    offset = None
    if context is not None:
        offset = field.layers[0].with_context(None, context).expand(z.shape[0], -1)
    tensors = [tensor for layer in field.layers for tensor in layer.parts()]
    return offset, tensors, kind_of(field, divergence)


def kind_of(
    field: MLP,
    divergence: int,
    kinetic: bool = False,
    jacobian: bool = False,
    precision: str = PRECISIONS[0],
) -> list[int]:
    """The ops' `kind`."""
    time_features = 0 if field.time == "t" else field.time[1]
    kind = [PLACES[field.activation.name], time_features, divergence, int(kinetic), int(jacobian)]
    return kind if precision == PRECISIONS[0] else [*kind, PRECISIONS.index(precision)]


def exact_divergence(field: MLP, own_times: bool) -> int:
    """How the ops make an exact divergence: in closed form where there is one."""
    gated = field.layers[-1].parts().gate_weight is not None
    # With times of their own, samples would need a matrix of their own as well.
    closed = len(field.hidden) in HIDDEN_LAYERS and not (own_times and gated)
    return CLOSED_FORM if closed else UNIT_VECTORS


def value_and_divergence_by_op(
    field: MLP,
    t: Tensor | float,
    z: Tensor,
    probe: Tensor | None,
    context: Tensor | None,
    draw: tuple[Tensor | None, int, int, bool] = (None, 0, 0, False),
) -> tuple[Tensor, Tensor]:
    """Value and divergence: probes as given, drawn (keys, seed, probes, gaussian), or exact."""
    t = time_of(t, z)
    drawn = draw[0] is not None
    divergence = PROBES if probe is not None or drawn else exact_divergence(field, t.dim() == 1)
    offset, parameters, kind = field_arguments(field, z, context, divergence)
    keep = keeps(t, z, probe, offset, *parameters)
    value, divergence, _ = _ops.mlp_value_divergence(
        t, z, probe, offset, parameters, kind, *draw, keep
    )
    return value, divergence


def keeps(*tensors: Tensor | None) -> bool:
    """Whether an evaluation keeps what a backward needs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
