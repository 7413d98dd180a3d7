"""The compiled evaluations of an `MLP`, with gradients and gradients of gradients.

Time is 0-dim or a time per sample [B]. What has no kernel (another device or dtype, a layer whose
weights depend on time) is evaluated by the plain formulas of this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycnf import _ops

from .divergence import has_forward_mode, value_and_divergence, value_and_products
from .field_ops import field_arguments, keeps, serves, time_of, value_and_divergence_by_op
from .mlp import MLP
from .tangents import push_forward


def mlp_value(field: MLP, t: Tensor | float, z: Tensor, context: Tensor | None = None) -> Tensor:
    """The vector field f(t, z) [B, D].

    Args:
        field: An `MLP`.
        t: Time, 0-dim or [B].
        z: State [B, D], in the field's dtype.
        context: [B, C] or [C], exactly when the field was made with one.

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.

    Example:
        >>> mlp_value(MLP(2), 0.5, torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """
    _check_field(field)
    if not serves(field, t, z, context):
        return field(t, z, context)
    t, offset, parameters, kind = _arguments(field, t, z, context)
    keep = keeps(t, z, offset, *parameters)
    return _ops.mlp_value(t, z, offset, parameters, kind, keep)[0]


def mlp_value_jvp(
    field: MLP, t: Tensor | float, z: Tensor, tangents: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The vector field and its Jacobian's products with K tangents, in one pass.

    Args:
        field, t, z, context: As for `mlp_value`.
        tangents: ε [K, B, D], K at least 1.

    Returns:
        f [B, D] and the images (∂f/∂z) ε_k [K, B, D].

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.

    Example:
        >>> mlp_value_jvp(MLP(2), 0.5, torch.zeros(3, 2), torch.ones(4, 3, 2))[1].shape
        torch.Size([4, 3, 2])
    """
    _check_field(field)
    _check_columns("tangents", tangents, z)
    if not serves(field, t, z, tangents, context):
        return push_forward(field.affines(t, z, context), field.activation, z, tangents)
    t, offset, parameters, kind = _arguments(field, t, z, context)
    keep = keeps(t, z, tangents, offset, *parameters)
    value, images, _ = _ops.mlp_value_jvp(t, z, tangents, offset, parameters, kind, keep)
    return value, images


def mlp_vjp(
    field: MLP, t: Tensor | float, z: Tensor, cotangents: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The vector field and its Jacobian's products with K cotangents, in one pass.

    Args:
        field, t, z, context: As for `mlp_value`.
        cotangents: v [K, B, D], K at least 1.

    Returns:
        f [B, D] and the products v_kᵀ ∂f/∂z [K, B, D].

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.

    Example:
        >>> mlp_vjp(MLP(2), 0.5, torch.zeros(3, 2), torch.ones(4, 3, 2))[1].shape
        torch.Size([4, 3, 2])
    """
    _check_field(field)
    _check_columns("cotangents", cotangents, z)
    if not serves(field, t, z, cotangents, context):
        return value_and_products(field, t, z, cotangents, context)
    t, offset, parameters, kind = _arguments(field, t, z, context)
    return _ops.mlp_vjp(t, z, cotangents, offset, parameters, kind)


def mlp_value_divergence(
    field: MLP,
    t: Tensor | float,
    z: Tensor,
    probe: Tensor | None = None,
    context: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    seed: int = 0,
    probes: int = 1,
    noise: str = "rademacher",
) -> tuple[Tensor, Tensor]:
    """The vector field and its divergence tr(∂f/∂z), in one pass.

    With probes, given or drawn, Hutchinson's estimate (1/K) Σ_k ε_kᵀ (∂f/∂z) ε_k (Hutchinson 1989);
    without, exact: for one or two hidden layers in closed form at the cost of one probe.

    Args:
        field, t, z, context: As for `mlp_value`.
        probe: ε [K, B, D].
        keys: int64 [B], for the probes that `pycnf._ops.probe_sample` gives for `keys`, `seed`,
            `probes` (K) and `noise`; they are drawn tile by tile and are never in memory at once.

    Returns:
        f [B, D] and the divergence [B].

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.

    Example:
        >>> mlp_value_divergence(MLP(2), 0.5, torch.zeros(3, 2))[1].shape
        torch.Size([3])
    """
    _check_field(field)
    if noise not in ("rademacher", "gaussian"):
        raise ValueError(f'noise must be "rademacher" or "gaussian", got {noise!r}')
    if probe is not None:
        _check_columns("probe", probe, z)
    if keys is not None:
        if probe is not None:
            raise ValueError("keys: got keys and a probe, expected one of them")
        if keys.dtype != torch.int64 or keys.shape != z.shape[:1]:
            raise ValueError(
                f"keys: got {keys.dtype} {tuple(keys.shape)}, expected int64 [{z.shape[0]}]"
            )
        if probes < 1:
            raise ValueError(f"probes: got {probes}, expected at least 1")
    if not serves(field, t, z, probe, context):
        if keys is not None:
            probe = _ops.probe_sample(keys, seed, probes, z.shape[1], noise=noise, dtype=z.dtype)
        return value_and_divergence(field, t, z, probe, context)
    _check_time(time_of(t, z), z)
    draw = (None, 0, 0, False)
    if keys is not None:
        draw = (keys, _ops.signed_seed(seed), probes, noise == "gaussian")
    return value_and_divergence_by_op(field, t, z, probe, context, draw)


def _check_field(field: MLP) -> None:
    if not has_forward_mode(field):
        raise TypeError(
            f"field: got a {type(field).__name__}, expected an MLP without hooks and without a "
            "forward of its own"
        )


def _arguments(
    field: MLP, t: Tensor | float, z: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor | None, list[Tensor | None], list[int]]:
    """The ops' `t`, `context`, `parameters` and `kind`."""
    t = time_of(t, z)
    arguments = field_arguments(field, z, context)
    _check_time(t, z)
    return t, *arguments


def _check_time(t: Tensor, z: Tensor) -> None:
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != z.shape[0]):
        raise ValueError(
            f"t: got shape {tuple(t.shape)}, expected a 0-dim time or one per sample [{z.shape[0]}]"
        )


def _check_columns(name: str, x: Tensor, z: Tensor) -> None:
    if x.dim() != 3 or x.shape[1:] != z.shape or x.shape[0] == 0:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected [K, {', '.join(map(str, z.shape))}] "
            "with K of at least 1"
        )
    if x.dtype != z.dtype:
        raise TypeError(f"{name}: got {x.dtype}, expected z's {z.dtype}")
