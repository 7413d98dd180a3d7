"""The divergence tr(∂f/∂z) of a vector field, exact or by Hutchinson's probes."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import closed_form
from .activation import Activation
from .field_ops import gains, serves, value_and_divergence_by_op
from .layers import Affine
from .mlp import MLP
from .tangents import push_forward, value_and_divergence_by_hand, value_and_tangents

VectorField = Callable[..., Tensor]


def value_and_divergence(
    field: VectorField,
    t: Tensor,
    z: Tensor,
    probe: Tensor | None = None,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The vector field and its divergence, in one pass over the batch.

    With probes the divergence is Hutchinson's estimate (1/K) Σ_k ε_kᵀ (∂f/∂z) ε_k (Hutchinson 1989;
    in flows: Grathwohl et al. 2019); without, it is exact. An `MLP` is evaluated in forward mode,
    value and tangents together; any other callable by vector-Jacobian products, all probes (or all
    D unit vectors) batched into one backward pass where its operations allow that.

    Works under `torch.no_grad`. Under grad mode the result can be differentiated, also twice,
    with respect to z, t, context, probe and the field's parameters.

    Args:
        field: f(t, z), or f(t, z, context) where a context is given; row i of the result depends
            on row i of z only (no batch normalization over the batch).
        t: Time, 0-dim or [B].
        z: State [B, D].
        probe: [K, B, D], E[ε] = 0 and Cov ε = I; None for the exact divergence.
        context: [B, C], [C] or None.

    Returns:
        f(t, z) [B, D] and the divergence [B].

    Raises:
        ValueError: z, probe or the field's result has another shape than described.
        TypeError: The probe's dtype is not z's.

    Example:
        >>> field = MLP(2)
        >>> value, div = value_and_divergence(field, torch.tensor(0.0), torch.randn(8, 2))
    """
    if z.dim() != 2:
        raise ValueError(f"z: got shape {tuple(z.shape)}, expected [B, D]")
    if probe is not None:
        if probe.dim() != 3 or probe.shape[1:] != z.shape or probe.shape[0] == 0:
            raise ValueError(
                f"probe: got shape {tuple(probe.shape)}, expected [K, {z.shape[0]}, {z.shape[1]}] "
                "with K of at least 1"
            )
        if probe.dtype != z.dtype:
            raise TypeError(f"probe: got {probe.dtype}, expected z's {z.dtype}")
    if has_forward_mode(field):
        shared = not isinstance(t, Tensor) or t.dim() == 0
        if shared and serves(field, t, z, probe, context) and gains(field, z):
            return value_and_divergence_by_op(field, t, z, probe, context)
        return mlp_value_and_divergence(field.affines(t, z, context), field.activation, z, probe)
    return _by_vjp(field, t, z, probe, context)


def mlp_value_and_divergence(
    affines: list[Affine], activation: Activation, z: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Value and divergence of an `MLP` given its layers at a time, by the quickest way there is."""
    hidden = len(affines) - 1
    shared = all(affine.gate is None and affine.weight.dim() == 2 for affine in affines)
    if not shared or hidden == 0:
        return value_and_tangents(affines, activation, z, probe)
    if probe is None and hidden in closed_form.HIDDEN_LAYERS:
        return closed_form.value_and_trace(affines, activation, z)
    return value_and_divergence_by_hand(affines, activation, z, probe)


def has_forward_mode(field: VectorField) -> bool:
    """Whether the field's layers may be evaluated without calling the field.

    True for an `MLP` as it came: a subclass with a forward of its own, and hooks on the network or
    its layers, must be called to be heard.
    """
    return (
        isinstance(field, MLP)
        and type(field).forward is MLP.forward
        and not any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            for module in (field, *field.layers)
        )
    )


def value_divergence_and_norm(
    field: VectorField,
    t: Tensor,
    z: Tensor,
    probe: Tensor | None = None,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`value_and_divergence`, and the Jacobian's squared Frobenius norm from the same pass.

    With probes the norm is the estimate (1/K) Σ_k ‖(∂f/∂z) ε_k‖² for an `MLP` (forward mode) and
    (1/K) Σ_k ‖ε_kᵀ ∂f/∂z‖² for any other callable; both have ‖∂f/∂z‖_F² as their mean (RNODE,
    Finlay et al. 2020). Without probes it is exact.

    Returns:
        f(t, z) [B, D], the divergence [B] and the squared norm [B].
    """
    if has_forward_mode(field):
        affines = field.affines(t, z, context)
        return mlp_value_divergence_and_norm(affines, field.activation, z, probe)
    return contract(*value_and_products(field, t, z, probe, context), probe)


def mlp_value_divergence_and_norm(
    affines: list[Affine], activation: Activation, z: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`value_divergence_and_norm` of an `MLP` given its layers at a time."""
    return contract(*push_forward(affines, activation, z, probe), probe)


def contract(
    value: Tensor, products: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, divergence and squared norm from the products [K, B, D] of ∂f/∂z with the probes."""
    squares = products.square().sum(-1)
    if probe is None:
        return value, torch.diagonal(products, dim1=0, dim2=2).sum(-1), squares.sum(0)
    return value, torch.linalg.vecdot(probe, products).mean(0), squares.mean(0)


def _by_vjp(
    field: VectorField, t: Tensor, z: Tensor, probe: Tensor | None, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    value, products = value_and_products(field, t, z, probe, context)
    if probe is None:
        return value, torch.diagonal(products, dim1=0, dim2=2).sum(-1)
    return value, torch.linalg.vecdot(probe, products).mean(0)


def value_and_products(
    field: VectorField, t: Tensor, z: Tensor, probe: Tensor | None, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Value [B, D] and products ε_kᵀ ∂f/∂z [K, B, D], with the unit vectors for no probes."""
    differentiable = torch.is_grad_enabled()
    # Inference mode records no graph even under enable_grad, and its tensors may not enter one.
    with torch.inference_mode(False), torch.enable_grad():
        t, z, probe, context = (
            x.clone() if isinstance(x, Tensor) and x.is_inference() else x
            for x in (t, z, probe, context)
        )
        if not (differentiable and z.requires_grad):
            z = z.detach().requires_grad_()
        value = field(t, z) if context is None else field(t, z, context)
        if not isinstance(value, Tensor):
            raise TypeError(f"field: returned {type(value).__name__}, expected a tensor like z")
        if value.shape != z.shape:
            raise ValueError(
                f"field: returned shape {tuple(value.shape)}, expected z's {tuple(z.shape)}"
            )
        batch, features = z.shape
        if probe is None:
            unit = torch.eye(features, dtype=z.dtype, device=z.device)
            cotangents = unit.unsqueeze(1).expand(features, batch, features)
        else:
            cotangents = probe
        if value.requires_grad:
            products = _vjp(value, z, cotangents, differentiable)
        else:  # constant, or computed under no_grad inside
            products = torch.zeros_like(cotangents)
    if not differentiable:
        return value.detach(), products.detach()
    return value, products


def _vjp(value: Tensor, z: Tensor, cotangents: Tensor, differentiable: bool) -> Tensor:
    """ε_kᵀ ∂f/∂z for K cotangents [K, B, D], in one backward pass where vmap can. [K, B, D]."""

    def pull(cotangent: Tensor, batched: bool) -> Tensor:
        (product,) = torch.autograd.grad(
            value,
            z,
            cotangent,
            create_graph=differentiable,
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )
        return torch.zeros_like(cotangent) if product is None else product

    if cotangents.shape[0] > 1:
        try:
            return pull(cotangents, True)
        except RuntimeError:
            # An operation that vmap cannot batch (a custom autograd.Function, say), or no memory
            # for all at once. An error of another kind shows again below.
            pass
    return torch.stack([pull(cotangent, False) for cotangent in cotangents])
