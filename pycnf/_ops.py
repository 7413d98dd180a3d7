"""Typed face of `torch.ops.pycnf`: which ops exist, where they run compiled, and their fakes.

Schemas and the meaning of every argument stand in csrc/torch/schema.cpp. A dtype or device without
a kernel is served by `pycnf.reference`, so a caller asks `kernels(y)` once and uses what it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import get_ctx, register_fake

from pycnf import reference
from pycnf._build import _C

OPS = (
    "rk_stage",
    "rk_finish",
    "rk_interpolate",
    "rk_initial_norms",
    "rk_combine",
    "attempt_control",
    "attempt_advance",
    "attempt_stage",
    "attempt_finish",
    "attempt_combine",
    "flow_control",
    "flow_advance",
    "broyden_step",
    "time_tensors",
    "probe_keys",
    "probe_sample",
    "mlp_solve",
    "mlp_solve_backward",
    "mlp_solve_fits",
    "mlp_adjoint",
    "mlp_samples",
    "mlp_samples_backward",
    "mlp_samples_adjoint",
    "mlp_value",
    "mlp_value_jvp",
    "mlp_vjp",
    "mlp_value_divergence",
    "mlp_value_divergence_backward",
    "mlp_value_jvp_backward",
)
# Elsewhere a flow runs on the generic engine and a field on `pycnf.nn`, which are their reference;
# that of attempts are the adaptive solvers themselves.
WITHOUT_REFERENCE = tuple(name for name in OPS if name.startswith(("mlp_", "attempt_", "flow_")))

_compiled = SimpleNamespace(**{name: getattr(torch.ops.pycnf, name).default for name in OPS})
# The ops of the inner loop have bindings of their own, past the dispatcher's boxing of arguments.
_compiled.rk_stage, _compiled.rk_finish = _C.rk_stage, _C.rk_finish
_compiled.rk_combine = _C.rk_combine
time_tensors = _C.time_tensors
mlp_solve, mlp_solve_backward = _compiled.mlp_solve, _compiled.mlp_solve_backward
mlp_solve_fits = _compiled.mlp_solve_fits
mlp_samples, mlp_samples_backward = _compiled.mlp_samples, _compiled.mlp_samples_backward
mlp_adjoint, mlp_samples_adjoint = _compiled.mlp_adjoint, _compiled.mlp_samples_adjoint
# Differentiable by `pycnf.nn.field_gradients`.
mlp_value, mlp_value_jvp, mlp_vjp = _compiled.mlp_value, _compiled.mlp_value_jvp, _compiled.mlp_vjp
mlp_value_divergence = _compiled.mlp_value_divergence
mlp_value_divergence_backward = _compiled.mlp_value_divergence_backward
mlp_value_jvp_backward = _compiled.mlp_value_jvp_backward
_DTYPES = (torch.float32, torch.float64)
# Steps on a GPU take these too, computed in float32; probes, and steps that it chooses, do not.
_HALVES = (torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda") if _C.with_cuda else ("cpu",)


def has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled ops serve states of this dtype on this device."""
    served = dtype in _DTYPES or (dtype in _HALVES and device.type == "cuda")
    return served and device.type in _DEVICES


def kernels(y: Tensor) -> Any:
    """The ops for states like y: compiled ones, or `pycnf.reference` with the same names.

    The latter also under torch.func's transforms, which know plain operations only.
    """
    served = has_kernels(y.dtype, y.device) and not torch._C._are_functorch_transforms_active()
    return _compiled if served else reference


def broyden_step(residual: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """The solution of J step = -residual, J being the identity after Broyden's updates by `steps`.

    Source: Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, 7.3.
    """
    graph = torch.is_grad_enabled() and (
        residual.requires_grad or any(step.requires_grad for step in steps)
    )
    served = kernels(residual) if residual.device.type == "cpu" and not graph else reference
    return served.broyden_step(residual, steps)


def probe_keys(x: Tensor) -> Tensor:
    """One int64 key per row of x [B, ...], a hash of the row's own values in x's dtype.

    Equal rows have equal keys, whatever the batch around them; -0 counts as 0.

    Example:
        >>> probe_keys(torch.zeros(2, 3)).shape
        torch.Size([2])
    """
    served = reference if x.dtype in _HALVES else kernels(x)
    return served.probe_keys(x)


def probe_sample(
    keys: Tensor, seed: int, probes: int, features: int, *, noise: str, dtype: torch.dtype
) -> Tensor:
    """Random probes [probes, B, features], a function of (seed, key, probe, feature) alone.

    Args:
        keys: int64 [B].
        seed: any 64-bit integer.
        probes: K, the number of probes.
        features: D, the values of a probe.
        noise: "rademacher" (-1 or 1, equal on every device) or "gaussian" (equal to rounding).
        dtype: of the result.

    Raises:
        ValueError: noise is neither.

    Source: Philox4x32-10, Salmon et al. (SC 2011); Box and Muller (1958).

    Example:
        >>> probe_sample(torch.tensor([7]), 0, 1, 4, noise="rademacher", dtype=torch.float32).abs()
        tensor([[[1., 1., 1., 1.]]])
    """
    if noise not in ("rademacher", "gaussian"):
        raise ValueError(f'noise must be "rademacher" or "gaussian", got {noise!r}')
    compiled = dtype not in _HALVES and has_kernels(dtype, keys.device)
    served = _compiled if compiled else reference
    return served.probe_sample(
        keys, signed_seed(seed), probes, features, noise == "gaussian", dtype
    )


def signed_seed(seed: int) -> int:
    """The int64 with the last 64 bits of any integer."""
    seed = int(seed) & (1 << 64) - 1
    return seed - (1 << 64) if seed >= 1 << 63 else seed


# ---- fakes: shapes and dtypes without data, for torch.compile and opcheck ------------------------


@register_fake("pycnf::rk_stage")
def _(y0: Tensor, k: Tensor, flip: bool, fresh: Sequence[Tensor], weights: Any, h: float) -> Tensor:
    return torch.empty_like(y0)


@register_fake("pycnf::rk_finish")
def _(y0: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return y0.new_empty(2, dtype=torch.float64)


@register_fake("pycnf::attempt_stage")
def _(y0: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(y0)


@register_fake("pycnf::attempt_finish")
def _(y0: Tensor, *args: Any) -> Tensor:
    return y0.new_empty(2, dtype=torch.float64)


@register_fake("pycnf::attempt_combine")
def _(y: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@register_fake("pycnf::flow_control")
@register_fake("pycnf::flow_advance")
@register_fake("pycnf::attempt_control")
@register_fake("pycnf::attempt_advance")
@register_fake("pycnf::rk_interpolate")
def _(*args: Any) -> None:
    return None


@register_fake("pycnf::rk_initial_norms")
def _(y0: Tensor, *args: Any) -> Tensor:
    return y0.new_empty(2, dtype=torch.float64)


@register_fake("pycnf::rk_combine")
def _(
    y: Tensor,
    k: Sequence[Tensor],
    weights: Any,
    h: float,
    h_graph: Tensor | None = None,
    ordered: bool = False,
) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@register_fake("pycnf::broyden_step")
def _(residual: Tensor, steps: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(residual)


@register_fake("pycnf::time_tensors")
def _(values: Any, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.empty((), dtype=dtype, device=device) for _ in values]


@register_fake("pycnf::probe_keys")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


@register_fake("pycnf::probe_sample")
def _(
    keys: Tensor, seed: int, probes: int, features: int, gaussian: bool, dtype: torch.dtype
) -> Tensor:
    return keys.new_empty(probes, keys.shape[0], features, dtype=dtype)


@register_fake("pycnf::mlp_solve")
def _(
    x: Tensor, probe: Any, keys: Any, noise: Any, context: Any, parameters: Any, method: str,
    kind: Sequence[int], *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    if args[-1] >= 0:
        # A tape is lists with an entry a step, and fakes have symbolic sizes but no such lengths.
        raise NotImplementedError("mlp_solve: a fake has no tape, whose length only a solve knows")
    report, times = (x.new_empty(size, dtype=torch.float64) for size in ((9,), (0, 3)))
    return torch.empty_like(x), x.new_empty(_extras(kind), x.shape[0]), report, times, [], []


@register_fake("pycnf::mlp_solve_fits")
def _(x, noise, parameters, kind, own_times):
    return True


@register_fake("pycnf::mlp_solve_backward")
def _(
    z_bar: Tensor, extras_bar: Any, probe: Any, keys: Any, noise: Any, context: Tensor | None,
    parameters: Sequence[Tensor | None], method: str, kind: Any, weights: Any, times: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    gradients = _gradients(z_bar, context, parameters)
    return *gradients, times.new_empty(times.shape[0] if args[-1] else 0, 2)


@register_fake("pycnf::mlp_adjoint")
@register_fake("pycnf::mlp_samples_adjoint")
def _(
    z: Tensor, z_bar: Tensor, extras_bar: Any, probe: Any, keys: Any, noise: Any,
    context: Tensor | None, parameters: Sequence[Tensor | None], *args: Any,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    return *_gradients(z, context, parameters), z.new_empty(9, dtype=torch.float64)


@register_fake("pycnf::mlp_samples")
def _(
    x: Tensor, probe: Any, keys: Any, noise: Any, context: Any, parameters: Any, method: str,
    kind: Sequence[int], *args: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    # The length of a tape is known by solving only.
    steps = get_ctx().new_dynamic_size() if args[-1] else 0
    whole = {"dtype": torch.int64}
    return (
        torch.empty_like(x),
        x.new_empty(_extras(kind), x.shape[0]),
        x.new_empty(9, dtype=torch.float64),
        x.new_empty(steps, 4, dtype=torch.float64),
        x.new_empty(steps, x.shape[1]),
        x.new_empty(steps, **whole),
        x.new_empty(x.shape[0] if args[-1] else 0, **whole),
    )


@register_fake("pycnf::mlp_samples_backward")
def _(
    z_bar: Tensor, extras_bar: Any, probe: Any, keys: Any, noise: Any, context: Tensor | None,
    parameters: Sequence[Tensor | None], method: str, kind: Any, weights: Any, times: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    return *_gradients(z_bar, context, parameters), times.new_empty(2)


@register_fake("pycnf::mlp_value")
def _(
    t: Tensor, z: Tensor, context: Any, parameters: Sequence[Tensor | None], kind: Any, keep: bool
) -> tuple[Tensor, Tensor]:
    return _contiguous(z), _kept(z, parameters, 0, keep)


@register_fake("pycnf::mlp_value_jvp")
def _(
    t: Tensor, z: Tensor, tangents: Tensor, context: Any, parameters: Sequence[Tensor | None],
    kind: Any, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = _kept(z, parameters, tangents.shape[0], keep)
    return _contiguous(z), _contiguous(tangents), kept


@register_fake("pycnf::mlp_vjp")
def _(t: Tensor, z: Tensor, cotangents: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _contiguous(z), _contiguous(cotangents)


@register_fake("pycnf::mlp_value_divergence")
def _(
    t: Tensor, z: Tensor, probe: Tensor | None, context: Any, parameters: Sequence[Tensor | None],
    kind: Sequence[int], keys: Tensor | None, seed: int, probes: int, gaussian: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if kind[2] == 1:
        tangents = probes if probe is None else probe.shape[0]
    else:
        tangents = z.shape[1] if kind[2] == 2 else 1
    kept = _kept(z, parameters, tangents, keep, closed_form=kind[2] == 3)
    return _contiguous(z), z.new_empty(z.shape[0]), kept


@register_fake("pycnf::mlp_value_divergence_backward")
def _(
    value_bar: Any, divergence_bar: Any, t: Tensor, z: Tensor, probe: Tensor | None,
    context: Tensor | None, parameters: Sequence[Tensor | None], *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _field_gradients(t, z, probe, context, parameters, args[-1])


@register_fake("pycnf::mlp_value_jvp_backward")
def _(
    value_bar: Any, images_bar: Any, t: Tensor, z: Tensor, tangents: Tensor,
    context: Tensor | None, parameters: Sequence[Tensor | None], *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return _field_gradients(t, z, tangents, context, parameters, args[-1])


def _contiguous(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# kKeptSamples in csrc/torch/mlp_setup.h, PYCNF_TANGENT_NUMBERS in csrc/torch/mlp_field_cuda.cpp.
_KEPT_SAMPLES, _TANGENT_NUMBERS = 64, 1 << 28


def _kept(
    z: Tensor,
    parameters: Sequence[Tensor | None],
    tangents: int,
    keep: bool,
    closed_form: bool = False,
) -> Tensor:
    """What an evaluation keeps: the products of all layers, on the CPU by tiles with the state."""
    batch, features = z.shape
    first, *others = (weight.shape[0] for weight in parameters[::5])
    if not keep:
        return z.new_empty(0)
    rows = first + (1 + tangents) * sum(others)
    if z.device.type == "cpu":
        samples = (batch + _KEPT_SAMPLES - 1) // _KEPT_SAMPLES * _KEPT_SAMPLES
        return z.new_empty((features + rows) * samples)
    if tangents > 1 and tangents * batch * (first + sum(others)) > _TANGENT_NUMBERS:
        return z.new_empty(0)
    return z.new_empty((rows - (features if closed_form else 0)) * batch)


def _field_gradients(
    t: Tensor,
    z: Tensor,
    tangents: Tensor | None,
    context: Tensor | None,
    parameters: Sequence[Tensor | None],
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    def like(x: Tensor | None, wanted: bool = True) -> Tensor:
        return z.new_empty(0 if x is None or not wanted else x.shape)

    bars = [like(parameter, need_parameters) for parameter in parameters]
    return like(z), like(t, need_parameters), like(context), like(tangents), bars


def _extras(kind: Sequence[int]) -> int:
    """How many extras a solve has."""
    return 1 + kind[3] + kind[4] if kind[2] else 0


def _gradients(
    z_bar: Tensor, context: Tensor | None, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        torch.empty_like(z_bar),
        z_bar.new_empty(0 if context is None else context.shape),
        [z_bar.new_empty(0 if p is None else p.shape) for p in parameters],
    )
