"""Every op of pycnf again in plain PyTorch: the oracle of the tests, and the way on devices and
dtypes without a kernel.

Names, arguments and results are those of `torch.ops.pycnf` (see `pycnf/_ops.py`); any real or
complex floating dtype and any device. Differentiable where the arguments are, except for what is
written in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _stage_order(stages: int, flip: bool) -> list[int]:
    """Row of each stage: `flip` exchanges the first and the last."""
    order = list(range(stages))
    if flip:
        order[0], order[-1] = order[-1], order[0]
    return order


def _store(k: Tensor, flip: bool, stage: int, fresh: Sequence[Tensor]) -> None:
    if not fresh:
        return
    row = k[_stage_order(k.shape[0], flip)[stage]]
    row.copy_(torch.cat([part.detach().reshape(-1).to(row.dtype) for part in fresh]))


def _coefficients(weights: Sequence[float], h: float, like: Tensor) -> Tensor:
    real = like.dtype.to_real() if like.is_complex() else like.dtype
    step = torch.tensor(h, dtype=real, device=like.device)
    return torch.tensor(list(weights), dtype=like.dtype, device=like.device) * step


def _weighted_sum(k: Tensor, flip: bool, weights: Sequence[float], h: float) -> Tensor:
    rows = k[_stage_order(k.shape[0], flip)[: len(weights)]]
    return (rows * _coefficients(weights, h, k)[:, None]).sum(0)


def _rms(x: Tensor) -> Tensor:
    return x.abs().pow(2).mean().sqrt()


def _largest_rms(scaled: Tensor, segments: Sequence[int]) -> Tensor:
    flat = scaled.reshape(-1)
    norms = [_rms(flat[a:b]) for a, b in zip(segments[::2], segments[1::2])]
    return _float64(max(norms) if norms else scaled.real.new_zeros(()))


def _float64(x: Tensor) -> Tensor:
    """A number in float64, on the CPU if x's device has no such dtype."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _each(tolerance: Tensor, like: Tensor) -> Tensor:
    """A tolerance for each value of a state, in the state's shape; 0-dim ones stay as they are."""
    if tolerance.dim() == 0:
        return tolerance
    each = tolerance.reshape(like.shape)
    return each.to(like) if like.device.type == "mps" else each


def rk_stage(
    y0: Tensor, k: Tensor, flip: bool, fresh: Sequence[Tensor], weights: Sequence[float], h: float
) -> Tensor:
    """The state of the next stage, y0 + h Σ wⱼ kⱼ."""
    _store(k, flip, len(weights) - 1, fresh)
    return y0 + _weighted_sum(k, flip, weights, h).view_as(y0)


def rk_finish(
    y0: Tensor,
    k: Tensor,
    flip: bool,
    fresh: Sequence[Tensor],
    y1: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    h: float,
    rtol: Tensor,
    atol: Tensor,
    segments: Sequence[int],
    ratio: Tensor | None = None,
) -> Tensor:
    """Solution, scaled error and its norm at the end of a step."""
    _store(k, flip, k.shape[0] - 1, fresh)
    if solution:
        y1.copy_(y0 + _weighted_sum(k, flip, solution, h).view_as(y0))
    estimate = _weighted_sum(k, flip, error, h).view_as(y0)
    size = torch.max(y0.abs(), y1.abs())
    scaled = estimate / (_each(atol, y0) + _each(rtol, y0) * size)
    if ratio is not None:
        ratio.copy_(scaled)
    finite = _float64(torch.isfinite(y1).all())
    return torch.stack([_largest_rms(scaled, segments), finite])


def rk_interpolate(
    y0: Tensor,
    y1: Tensor,
    k: Tensor,
    flip: bool,
    middle: Sequence[float],
    h: float,
    x: Sequence[float],
    out: Tensor,
) -> None:
    """The step's quartic at the points x, written to out."""
    order = _stage_order(k.shape[0], flip)
    y_middle = y0 + _weighted_sum(k, flip, middle, h).view_as(y0)
    f0, f1 = k[order[0]].view_as(y0), k[order[-1]].view_as(y0)
    real = y0.dtype.to_real() if y0.is_complex() else y0.dtype
    step = torch.tensor(h, dtype=real, device=y0.device)
    coefficients = quartic(y0, y1, y_middle, f0, f1, step)
    target = out.view(len(x), *y0.shape)
    for i, point in enumerate(x):
        target[i] = evaluate_quartic(
            coefficients, torch.tensor(point, dtype=real, device=y0.device)
        )


def quartic(
    y0: Tensor, y1: Tensor, y_middle: Tensor, f0: Tensor, f1: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    """Coefficients, constant first, of the quartic through both ends, both slopes and the middle
    (Shampine 1986).
    """
    fourth = 2 * h * (f1 - f0) - 8 * (y1 + y0) + 16 * y_middle
    third = h * (5 * f0 - 3 * f1) + 18 * y0 + 14 * y1 - 32 * y_middle
    second = h * (f1 - 4 * f0) - 11 * y0 - 5 * y1 + 16 * y_middle
    return y0, h * f0, second, third, fourth


def evaluate_quartic(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    """The quartic at x in [0, 1], 0-dim or of a shape that broadcasts to the state."""
    value = coefficients[0] + x * coefficients[1]
    power = x
    for coefficient in coefficients[2:]:
        power = power * x
        value = value + power * coefficient
    return value


def rk_initial_norms(
    y0: Tensor,
    f0: Tensor,
    f1: Tensor | None,
    rtol: Tensor,
    atol: Tensor,
    segments: Sequence[int],
) -> Tensor:
    """Norms of y0 / scale and f0 / scale, or of (f1 - f0) / scale twice."""
    scale = _each(atol, y0) + y0.abs() * _each(rtol, y0)
    f0 = f0.view_as(y0)
    if f1 is None:
        return torch.stack([_largest_rms(v / scale, segments) for v in (y0, f0)])
    change = _largest_rms((f1.view_as(y0) - f0) / scale, segments)
    return torch.stack([change, change])


def rk_combine(
    y: Tensor,
    k: Sequence[Tensor],
    weights: Sequence[float],
    h: float,
    h_graph: Tensor | None = None,
    ordered: bool = False,
) -> Tensor:
    """y + h Σ wⱼ kⱼ, differentiable in y, k and h_graph (a 0-dim tensor equal to h); `ordered`: as
    ((w₀ k₀ + w₁ k₁) + w₂ k₂) + ..., each operation rounded.
    """
    if h_graph is None:
        coefficients = _coefficients(weights, h, y)
    else:
        coefficients = torch.tensor(list(weights), dtype=y.dtype, device=y.device) * h_graph
    rows = torch.stack([row.view_as(y) for row in k], -1) * coefficients
    return y + (sum(rows.unbind(-1)) if ordered else rows.sum(-1))


def broyden_step(residual: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """The solution of J step = -residual, J being the identity after Broyden's updates by `steps`.

    An update is of rank one and made of a step and the residual behind it alone; so the inverse of
    J is a product of factors 1 + sⱼ₊₁ sⱼᴴ / |sⱼ|², applied here by one triangular system.
    """
    if not steps:
        return -residual
    wide = torch.promote_types(residual.dtype, torch.float32)
    s = torch.stack(list(steps)).to(wide)
    step = -residual.to(wide)
    gram = s.conj() @ s.T
    after = torch.nn.functional.pad(gram[:, 1:], (0, 1)).tril(-1)
    lower = gram.diagonal().diag() - after
    along = torch.linalg.solve_triangular(lower, (s.conj() @ step)[:, None], upper=False)[:, 0]
    step = (step + along[:-1] @ s[1:]) / (1 - along[-1])
    return step.to(residual.dtype)


def time_tensors(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Each value as a 0-dim tensor of its own."""
    return [torch.tensor(value, dtype=dtype, device=device) for value in values]


def probe_keys(x: Tensor) -> Tensor:
    """One 64-bit key per row: SplitMix64 steps over the bits of its values, -0 counted as 0."""
    rows = x.detach()
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    rows = rows.reshape(rows.shape[0], -1) if rows.numel() else rows.new_empty(rows.shape[0], 0)
    rows = torch.where(rows == 0, torch.zeros_like(rows), rows).contiguous()
    width = rows.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    bits = rows.view(integer).to(torch.int64)
    if width < 8:
        bits = bits & ((1 << (8 * width)) - 1)
    key = torch.zeros(rows.shape[0], dtype=torch.int64, device=x.device)
    for column in bits.unbind(1):
        key = _mix_bits(key ^ column)
    return key


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 bits."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_bits(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _philox(seed: int, keys: Tensor, probe: Tensor, block: Tensor) -> list[Tensor]:
    """Philox4x32-10 over broadcast counters; 32-bit words in int64 tensors."""
    c0, c1, c2, c3 = torch.broadcast_tensors(
        block, probe, keys & _MASK, _shift_right(keys, 32) & _MASK
    )
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            _shift_right(p1, 32) ^ c1 ^ k0,
            p1 & _MASK,
            _shift_right(p0, 32) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def probe_sample(
    keys: Tensor, seed: int, probes: int, features: int, gaussian: bool, dtype: torch.dtype
) -> Tensor:
    """Probes [K, B, D]; see csrc/core/philox.h for how bits become values."""
    device = keys.device
    per_block = 4 if gaussian else 128
    feature = torch.arange(features, device=device)
    probe = torch.arange(probes, device=device)[:, None, None]
    words = torch.stack(_philox(seed, keys[None, :, None], probe, feature // per_block))
    inside = feature % per_block
    if not gaussian:
        word = words.gather(0, (inside // 32).expand(1, *words.shape[1:]))[0]
        return (1 - 2 * ((word >> (inside % 32)) & 1)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pair = (inside // 2 * 2).expand(1, *words.shape[1:])
    first, second = words.gather(0, pair)[0].to(wide), words.gather(0, pair + 1)[0].to(wide)
    radius = torch.sqrt(-2 * torch.log((first + 0.5) * 2.0**-32))
    angle = 6.283185307179586 * ((second + 0.5) * 2.0**-32)
    return (radius * torch.where(inside % 2 == 0, torch.cos(angle), torch.sin(angle))).to(dtype)
