"""Time-conditioned linear layers: the seven of FFJORD (Grathwohl et al. 2019).

Every layer is, at a given time, an affine map `h = s∘(W a + b) + c` of its input `a`. A layer says
what s, W and the sum of everything constant are (`affine`), and the network does the arithmetic:
values, tangents and their gradients are then one code for all layer types.
"""

import difflib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HYPER_WIDTH = 8  # hidden width of the hyper layer's own network, as in FFJORD's code


@dataclass(frozen=True, slots=True)
class Affine:
    """One layer at one time (or at one time per sample): h = gate∘(W a) + shift.

    Attributes:
        weight: [out, in]; [B, out, in] where every sample has weights of its own.
        shift: [out] or [B, out].
        gate: None (all ones), [out] or [B, out].
    """

    weight: Tensor
    shift: Tensor
    gate: Tensor | None = None

    def folded(self) -> "Affine":
        """The same map with a gate shared by the batch multiplied into the weight.

        H² products instead of (1+K)·B·H, and one branch less for everyone after. A gate per sample,
        [B, out], stays as it is.
        """
        if self.gate is None or self.gate.dim() == 2:
            return self
        return Affine(self.weight * self.gate.unsqueeze(-1), self.shift)

    def unbind(self, count: int) -> list["Affine"]:
        """Splits a map made for `count` times at once, of shapes [count, 1 or B, ·]."""
        shifts = self.shift.squeeze(1) if self.shift.dim() == 3 else self.shift
        weights = self.weight.squeeze(1) if self.weight.dim() == 4 else self.weight
        return [
            Affine(weight, shift)
            for weight, shift in zip(
                weights.unbind() if weights.dim() == 3 else [weights] * count,
                shifts.unbind() if self.shift.dim() == 3 else [shifts] * count,
                strict=True,
            )
        ]

    def linear(self, rows: Tensor) -> Tensor:
        """gate∘(W rows), without the shift: what the layer does to tangents. rows [R, B, in]."""
        if self.weight.dim() == 3:
            out = torch.matmul(rows.transpose(0, 1), self.weight.mT).transpose(0, 1)
        else:
            out = F.linear(rows, self.weight)
        return out if self.gate is None else out * self.gate

    def value(self, a: Tensor) -> Tensor:
        """The layer's output [B, out] for its input a [B, in]."""
        if self.weight.dim() == 3:
            return torch.matmul(self.weight, a.unsqueeze(-1)).squeeze(-1) + self.shift
        if self.gate is not None:
            return F.linear(a, self.weight) * self.gate + self.shift
        return torch.addmm(self.shift, a, self.weight.t())

    def columns(self) -> Tensor:
        """The tangents of the unit vectors, gate∘W e_k: [in, 1 or B, out], at no product's cost."""
        if self.weight.dim() == 3:
            columns = self.weight.permute(2, 0, 1)
        else:
            columns = self.weight.t().unsqueeze(1)
        return columns if self.gate is None else columns * self.gate

    def trace(self, tangents: Tensor) -> Tensor:
        """Σ_k (gate∘W ȧ_k)_k for tangents ȧ [out, B, in]: only the diagonal is formed. [B]."""
        if self.weight.dim() == 3:
            diagonal = torch.einsum("kbj,bkj->bk", tangents, self.weight)
        else:
            diagonal = torch.einsum("kbj,kj->bk", tangents, self.weight)
        return (diagonal if self.gate is None else diagonal * self.gate).sum(-1)


def _parameter(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter drawn as nn.Linear draws its own: uniform within ±1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Parts(NamedTuple):
    """The tensors of a layer h = s∘(W a + b) + c whose gate is s = σ(g τ + q) and shift c = v τ.

    Attributes:
        weight: W [out, in].
        bias: b [out]; None for zero.
        gate_weight: g, [out] for t itself and [out, F] for Fourier features; None for s = 1.
        gate_bias: q [out]; None for zero.
        shift_weight: v, [out] or [out, F]; None for c = 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    shift_weight: Tensor | None = None


class TimeLayer(nn.Module):
    """A linear layer whose map depends on time.

    A subclass says what its parameters are and either its `parts` or, where these cannot say it,
    its `affine`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        time_features: None for t itself, F for F Fourier features of t.
        context: Width of the context vector this layer adds, 0 for none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        time_features: int | None = None,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.time_features = time_features
        self.context = context
        self.make_parameters()
        if context:
            self.context_weight = _parameter(out_features, context, fan_in=context)

    def make_parameters(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must say what its parameters are")

    @property
    def like(self) -> Tensor:
        """A tensor with the layer's dtype and device."""
        weight = self._parameters.get("weight")
        if weight is not None:
            return weight
        # In replicas (nn.DataParallel) parameters are plain tensors.
        parts = self.parts()
        return next(self.parameters()) if parts is None else parts.weight

    def parts(self) -> Parts | None:
        """The layer's tensors as they are now; None where its weights depend on time."""
        return None

    def affine(self, tau: Tensor, context: Tensor | None) -> Affine:
        """The layer at a time.

        Args:
            tau: The time: t, 0-dim, or F Fourier features [F]; a time per sample, [B, 1] or
                [B, F]; or S times, [S, 1, 1] or [S, 1, F], for `Affine.unbind`.
            context: [C], [B, C] or None.

        Returns:
            The affine map; its shapes begin with those of tau and context, where they matter.
        """
        weight, bias, gate_weight, gate_bias, shift_weight = self.parts()
        bias = self.with_context(bias, context)
        gate = shift = None
        if gate_weight is not None:
            gate = torch.sigmoid(self._of_tau(tau, gate_weight, gate_bias))
        if shift_weight is not None:
            shift = self._of_tau(tau, shift_weight)
        if bias is None:
            return Affine(
                weight, weight.new_zeros(self.out_features) if shift is None else shift, gate
            )
        if shift is None:
            return Affine(weight, bias if gate is None else bias * gate, gate)
        return Affine(
            weight, shift + bias if gate is None else torch.addcmul(shift, bias, gate), gate
        )

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}"
        if self.time_features is not None:
            text += f", time_features={self.time_features}"
        return text + (f", context={self.context}" if self.context else "")

    def _make_linear(self, in_features: int) -> None:
        self.weight = _parameter(self.out_features, in_features, fan_in=in_features)
        self.bias = _parameter(self.out_features, fan_in=in_features)

    def _make_of_time(self) -> nn.Parameter:
        """Weights of a linear map from time to the outputs: [out] for t, [out, F] for features."""
        if self.time_features is None:
            return _parameter(self.out_features, fan_in=1)
        return _parameter(self.out_features, self.time_features, fan_in=self.time_features)

    def with_context(self, bias: Tensor | None, context: Tensor | None) -> Tensor | None:
        """The bias plus the context's part: [out] or [B, out]; None for zero."""
        return F.linear(context, self.context_weight, bias) if self.context else bias

    def _of_tau(self, tau: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear map of time, weight τ + bias: [out] or [B, out] or [S, 1, out]."""
        if self.time_features is not None:
            return F.linear(tau, weight, bias)
        return tau * weight if bias is None else torch.addcmul(bias, tau, weight)


class Ignore(TimeLayer):
    """W x + b."""

    def make_parameters(self) -> None:
        self._make_linear(self.in_features)

    def parts(self) -> Parts:
        return Parts(self.weight, self.bias)


class Concat(TimeLayer):
    """W [τ; x] + b, time first."""

    def make_parameters(self) -> None:
        self._make_linear(self.in_features + (self.time_features or 1))

    def parts(self) -> Parts:
        width = self.time_features or 1
        of_time = self.weight[:, 0] if self.time_features is None else self.weight[:, :width]
        return Parts(self.weight[:, width:], self.bias, shift_weight=of_time)


class ConcatV2(TimeLayer):
    """W x + b + v τ."""

    def make_parameters(self) -> None:
        self._make_linear(self.in_features)
        self.shift_weight = self._make_of_time()

    def parts(self) -> Parts:
        return Parts(self.weight, self.bias, shift_weight=self.shift_weight)


class Squash(TimeLayer):
    """(W x + b)∘σ(g τ + q)."""

    def make_parameters(self) -> None:
        self._make_linear(self.in_features)
        self.gate_weight = self._make_of_time()
        self.gate_bias = _parameter(self.out_features, fan_in=self.time_features or 1)

    def parts(self) -> Parts:
        return Parts(self.weight, self.bias, self.gate_weight, self.gate_bias)


class ConcatSquash(Squash):
    """(W x + b)∘σ(g τ + q) + v τ."""

    def make_parameters(self) -> None:
        super().make_parameters()
        self.shift_weight = self._make_of_time()

    def parts(self) -> Parts:
        return Parts(self.weight, self.bias, self.gate_weight, self.gate_bias, self.shift_weight)


class Given(TimeLayer):
    """A layer of given tensors, which need not be parameters, so that formulas run on any tensors.

    Args:
        parts: The layer's tensors.
        time_features: As for `TimeLayer`.
        context: Width of the context vector, 0 for none.
        context_weight: [out, C]; None to add a context [out] or [B, out] to the bias as it is.
    """

    def __init__(
        self,
        parts: Parts,
        time_features: int | None = None,
        context: int = 0,
        context_weight: Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = parts.weight.shape
        self.time_features = time_features
        self.context = context
        self.given = parts
        self.context_weight = context_weight

    @property
    def like(self) -> Tensor:
        return self.given.weight

    def parts(self) -> Parts:
        return self.given

    def with_context(self, bias: Tensor | None, context: Tensor | None) -> Tensor | None:
        if self.context and self.context_weight is None:
            return context if bias is None else bias + context
        return super().with_context(bias, context)


class Blend(TimeLayer):
    """(1−t)(W₀ x + b₀) + t(W₁ x + b₁)."""

    def make_parameters(self) -> None:
        self.start = nn.Linear(self.in_features, self.out_features)
        self.end = nn.Linear(self.in_features, self.out_features)

    @property
    def like(self) -> Tensor:
        return self.start.weight

    def affine(self, tau: Tensor, context: Tensor | None) -> Affine:
        # With a t per sample this is a weight matrix per sample, [B, out, in].
        bias = torch.lerp(self.start.bias, self.end.bias, tau)
        if self.context:
            bias = bias + F.linear(context, self.context_weight)
        mix = tau.unsqueeze(-1) if tau.dim() else tau
        return Affine(torch.lerp(self.start.weight, self.end.weight, mix), bias)


class Hyper(TimeLayer):
    """[b; W] = net(t), net a small network of time alone."""

    def make_parameters(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(1, HYPER_WIDTH),
            nn.Tanh(),
            nn.Linear(HYPER_WIDTH, (self.in_features + 1) * self.out_features),
        )

    @property
    def like(self) -> Tensor:
        return self.net[0].weight

    def affine(self, tau: Tensor, context: Tensor | None) -> Affine:
        made = self.net(tau if tau.dim() else tau.unsqueeze(0))
        bias, weight = made.split([self.out_features, self.in_features * self.out_features], -1)
        if self.context:
            bias = bias + F.linear(context, self.context_weight)
        return Affine(weight.unflatten(-1, (self.out_features, self.in_features)), bias)


LAYERS: dict[str, type[TimeLayer]] = {
    "ignore": Ignore,
    "concat": Concat,
    "concat_v2": ConcatV2,
    "squash": Squash,
    "concatsquash": ConcatSquash,
    "blend": Blend,
    "hyper": Hyper,
}

# These two are functions of t itself, so Fourier features have no meaning for them.
LAYERS_OF_PLAIN_TIME = ("blend", "hyper")


def get_layer(name: str) -> type[TimeLayer]:
    """Finds a layer type by name.

    Raises:
        ValueError: The name is unknown; the message lists the names there are.
    """
    if name not in LAYERS:
        near = difflib.get_close_matches(str(name), LAYERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"layer: got {name!r}, expected one of {', '.join(LAYERS)}.{hint}")
    return LAYERS[name]
