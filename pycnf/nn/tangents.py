"""Value and divergence of a network by forward-mode tangents, any number of derivatives deep.

The K tangents travel with the value: rows [a; ȧ_1 … ȧ_K] go through one product per layer,

    h = W a + c,   ḣ_k = W ȧ_k,   a' = φ(h),   ȧ'_k = φ'(h)∘ḣ_k,

and the divergence is (1/K) Σ_k ε_k·ḣ_k of the last layer for probes ε_k, or, exactly, the trace
over the D unit tangents. `_ValueAndDivergence` is the same with its reverse pass written by hand:
no graph of small operations is built, buffers are written in place, and
backwards, too, a weight meets value and tangents in one product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation import Activation
from .layers import Affine


def value_and_tangents(
    affines: list[Affine], activation: Activation, z: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Value and divergence in plain differentiable operations.

    Args:
        affines: The network's layers at a time (or at a time per sample).
        activation: Applied between the layers.
        z: State [B, D].
        probe: [K, B, D], or None for the exact divergence.

    Returns:
        f [B, D] and the divergence [B].
    """
    if probe is not None:
        value, images = push_forward(affines, activation, z, probe)
        return value, torch.linalg.vecdot(probe, images).mean(0)
    a, tangents = _up_to_last(affines, activation, z, None)
    return affines[-1].value(a), affines[-1].trace(tangents).expand(z.shape[0])


def push_forward(
    affines: list[Affine], activation: Activation, z: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Value and the tangents' images (∂f/∂z) ε_k, differentiable.

    Args:
        affines: The network's layers at a time (or at a time per sample).
        activation: Applied between the layers.
        z: State [B, D].
        probe: ε [K, B, D], or None for the unit vectors, K = D.

    Returns:
        f [B, D] and the images [K, B, D].
    """
    a, tangents = _up_to_last(affines, activation, z, probe)
    tangents = tangents.expand(-1, *a.shape)
    out = affines[-1].linear(torch.cat((a.unsqueeze(0), tangents)))
    return out[0] + affines[-1].shift, out[1:]


def _up_to_last(
    affines: list[Affine], activation: Activation, z: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What enters the last layer: a [B, H] and its tangents, [K, B, H] (or [D, 1, D], the unit)."""
    if len(affines) == 1:
        if probe is None:
            probe = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).unsqueeze(1)
        return z, probe
    a, tangents = z, probe
    for affine in affines[:-1]:
        if tangents is None:  # the first layer, unit vectors
            h, dots = affine.value(a), affine.columns()
        else:
            out = affine.linear(torch.cat((a.unsqueeze(0), tangents)))
            h, dots = out[0] + affine.shift, out[1:]
        a = activation.value(h)
        tangents = activation.slope(h, a) * dots
    return a, tangents


def value_and_divergence_by_hand(
    affines: list[Affine], activation: Activation, z: Tensor, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same numbers as `value_and_tangents`, without a graph of small operations.

    Only for networks with at least one hidden layer and with neither gates nor weights per sample.
    """
    if torch._C._are_functorch_transforms_active():  # which transform plain operations only
        return value_and_tangents(affines, activation, z, probe)
    weights = [affine.weight for affine in affines]
    shifts = [affine.shift for affine in affines]
    if torch.is_grad_enabled():
        return _ValueAndDivergence.apply(activation, z, probe, *weights, *shifts)
    value, divergence, _ = _evaluate(activation, z, probe, weights, shifts, keep=False)
    return value, divergence


def _evaluate(
    activation: Activation,
    z: Tensor,
    probe: Tensor | None,
    weights: Sequence[Tensor],
    shifts: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Value, divergence and what the reverse pass needs (if kept).

    Kept are, for every hidden layer, `rows` [1+K, B, in] = [a; ȧ_k] (what entered), `outs`
    [1+K, B, out] = [h; ḣ_k] and the slope φ'(h) [B, out], and then the last layer's rows.
    """
    exact = probe is None
    count = 1 + (z.shape[1] if exact else probe.shape[0])
    sizes = [count * z.shape[0] * weight.shape[0] for weight in weights[:-1]]
    # One allocation: malloc hands back to the system, page by page, what many large buffers freed
    # together leave, and the next evaluation would fault every page in again (half of its time).
    if keep:
        areas = z.new_empty(2 * sum(sizes)).split([size for size in sizes for _ in range(2)])
    else:
        areas = z.new_empty(2, max(sizes)).unbind()
    kept = []
    rows = z.unsqueeze(0) if exact else torch.cat((z.unsqueeze(0), probe))
    for i, (weight, shift) in enumerate(zip(weights[:-1], shifts[:-1], strict=True)):
        area = areas[2 * i if keep else i % 2]
        outs = area[: sizes[i]].view(count, z.shape[0], weight.shape[0])
        if exact and i == 0:
            # The unit vectors' tangents are the columns of the first weight: no product.
            torch.mm(z, weight.t(), out=outs[0])
            outs[1:] = weight.t().unsqueeze(1)
        else:
            torch.mm(rows.flatten(0, 1), weight.t(), out=outs.flatten(0, 1))
        h = outs[0].add_(shift)
        a = activation.value(h)
        slope = activation.slope(h, a)
        if keep:
            kept += [rows, outs, slope]
            rows = areas[2 * i + 1].view_as(outs)
        else:
            rows = outs
        rows[0] = a
        torch.mul(outs[1:], slope, out=rows[1:])
    kept.append(rows)
    if exact:
        value = torch.addmm(shifts[-1], rows[0], weights[-1].t())
        divergence = torch.einsum("kbj,kj->b", rows[1:], weights[-1])
    else:
        outs = torch.matmul(rows, weights[-1].t())
        value = outs[0] + shifts[-1]
        divergence = torch.linalg.vecdot(probe, outs[1:]).mean(0)
    return value, divergence, kept


class _ValueAndDivergence(torch.autograd.Function):
    """Value and divergence with a reverse pass written by hand.

    A backward that is itself differentiated recomputes through `value_and_tangents` instead.
    """

    @staticmethod
    def forward(ctx, activation, z, probe, *tensors):
        count = len(tensors) // 2
        value, divergence, kept = _evaluate(
            activation, z, probe, tensors[:count], tensors[count:], keep=True
        )
        ctx.activation = activation
        ctx.exact = probe is None
        ctx.save_for_backward(z, probe, *tensors, *kept)
        return value, divergence

    @staticmethod
    def backward(ctx, grad_value, grad_divergence):
        z, probe, *saved = ctx.saved_tensors
        count = (len(saved) + 2) // 5  # 2 per layer, and 3 kept per hidden layer and the last rows
        tensors, kept = saved[: 2 * count], saved[2 * count :]
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, z, probe, tensors, grad_value, grad_divergence)
        weights, shifts = tensors[:count], tensors[count:]
        needs_z, needs_probe, *needs = ctx.needs_input_grad[1:]
        grads: list[Tensor | None] = [None] * len(tensors)
        probe_grad = None

        # The last layer: seeds u = f̄ and ū_k = μ ε_k / K (exact: μ e_k, kept implicit).
        rows, weight = kept[-1], weights[-1]
        if ctx.exact:
            back = torch.empty_like(rows)
            torch.mm(grad_value, weight, out=back[0])
            torch.mul(grad_divergence.unsqueeze(-1), weight.unsqueeze(1), out=back[1:])
            if needs[count - 1]:
                grads[count - 1] = torch.matmul(grad_divergence, rows[1:])
                grads[count - 1].addmm_(grad_value.t(), rows[0])
        else:
            mu = (grad_divergence / probe.shape[0]).unsqueeze(-1)
            seeds = torch.cat((grad_value.unsqueeze(0), mu * probe))
            if needs_probe:
                probe_grad = mu * torch.matmul(rows[1:], weight.t())
            if needs[count - 1]:
                grads[count - 1] = _outer(seeds, rows)
            back = _times(seeds, weight)
        if needs[-1]:
            grads[-1] = grad_value.sum_to_size(shifts[-1].shape)

        for i in range(count - 2, -1, -1):
            rows, outs, slope = kept[3 * i : 3 * i + 3]
            curvature = ctx.activation.curvature
            if curvature is not None:
                h, a = outs[0], kept[3 * i + 3][0]
                bent = torch.mul(outs[1:], back[1:])
                bent = bent[0] if bent.shape[0] == 1 else bent.sum(0)
                bent *= curvature(h, a, slope)
            back.mul_(slope)
            if curvature is not None:
                back[0] += bent
            if needs[count + i]:
                grads[count + i] = back[0].sum_to_size(shifts[i].shape)
            if ctx.exact and i == 0:
                if needs[0]:
                    grads[0] = back[1:].sum(1).t().addmm(back[0].t(), z)
                back = _times(back[:1], weights[0]) if needs_z else None
                break
            if needs[i]:
                grads[i] = _outer(back, rows)
            if i or needs_z or needs_probe:
                back = _times(back, weights[i])
        if needs_probe:
            probe_grad += back[1:]
        return None, back[0] if needs_z else None, probe_grad, *grads


def _differentiable_backward(ctx, z, probe, tensors, grad_value, grad_divergence):
    """The backward as differentiable operations, for gradients of gradients."""
    count = len(tensors) // 2
    affines = [Affine(w, c) for w, c in zip(tensors[:count], tensors[count:], strict=True)]
    with torch.enable_grad():
        outputs = value_and_tangents(affines, ctx.activation, z, probe)
    inputs = [z, probe, *tensors]
    wanted = [x for x, need in zip(inputs, ctx.needs_input_grad[1:], strict=True) if need]
    found = iter(
        torch.autograd.grad(
            outputs, wanted, (grad_value, grad_divergence), create_graph=True, allow_unused=True
        )
    )
    return None, *(next(found) if need else None for need in ctx.needs_input_grad[1:])


# BLAS (MKL 2024 under torch 2.13) is up to five times slower when the narrow side of a product is
# the second, row-major operand; features are few, so the first and last layers are all narrow.


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    """The product rows W: [R, B, out] with [out, in] gives [R, B, in]."""
    if weight.shape[1] < weight.shape[0]:
        weight = weight.t().contiguous().t()
    return torch.matmul(rows, weight)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right, summed over rows and batch: [R, B, out], [R, B, in] give [out, in]."""
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if right.shape[1] < left.shape[1]:
        return torch.mm(right.t(), left).t()
    return torch.mm(left.t(), right)
