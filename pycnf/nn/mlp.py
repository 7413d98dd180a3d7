"""A multilayer perceptron as a vector field f(t, z)."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .activation import get_activation
from .layers import LAYERS_OF_PLAIN_TIME, Affine, Given, Parts, TimeLayer, get_layer

TimeFeatures = str | tuple[str, int]


class MLP(nn.Module):
    """A time-conditioned multilayer perceptron: the vector field of FFJORD's flows.

    `len(field.layers) == len(hidden) + 1`, with the activation after all layers but the last.

    Fourier time features, `time=("fourier", F)`: F numbers, F even, which are
    `[cos πt, …, cos(F/2)πt, sin πt, …, sin(F/2)πt]`, in zuko's order; `zuko.flows.CNF(freqs=n)` has
    what is `("fourier", 2 * n)` here.

    Args:
        features: D, the dimension of the state.
        hidden: Widths of the hidden layers; may be empty (a field linear in z).
        layer: A layer type (see `pycnf.nn.layers.LAYERS`), or a sequence with one for each layer.
        activation: Name of an activation (see `pycnf.nn.activation.ACTIVATIONS`).
        context: C, the width of the context vector; 0 for a field without.
        time: "t", or ("fourier", F).

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.

    Example:
        >>> field = MLP(2, (64, 64), activation="softplus")
        >>> field(torch.tensor(0.5), torch.randn(8, 2)).shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64, 64),
        layer: str | Sequence[str] = "concatsquash",
        activation: str = "tanh",
        context: int = 0,
        time: TimeFeatures = "t",
    ) -> None:
        features = _check_size("features", features, 1)
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise TypeError(f"hidden: got {hidden!r}, expected a sequence of widths like (64, 64)")
        hidden = tuple(_check_size("hidden", width, 1) for width in hidden)
        context = _check_size("context", context, 0)
        time = _check_time(time)
        get_activation(activation)
        widths = (features, *hidden, features)
        names = (layer,) * (len(widths) - 1) if isinstance(layer, str) else tuple(layer)
        if len(names) != len(widths) - 1:
            raise ValueError(
                f"layer: got {len(names)} layer types, expected {len(widths) - 1} "
                f"(one for each of {len(hidden)} hidden layers and the last)"
            )
        for name in names:
            if time != "t" and name in LAYERS_OF_PLAIN_TIME:
                raise ValueError(
                    f"time: got {time!r} with layer {name!r}, which is a function of t "
                    "itself; expected time='t'"
                )
        time_features = None if time == "t" else time[1]
        layers = [
            get_layer(name)(n_in, n_out, time_features, context if i == 0 else 0)
            for i, (name, n_in, n_out) in enumerate(
                zip(names, widths[:-1], widths[1:], strict=True)
            )
        ]
        self._assemble(layers, activation, time)
        self.layer = names

    @classmethod
    def of_layers(
        cls, layers: Sequence[TimeLayer], activation: str, time: TimeFeatures = "t"
    ) -> "MLP":
        """An MLP made of given layers; the first says what its context is.

        Args:
            layers: As wide as their neighbours, the last as the first's input.
            activation: Name of an activation.
            time: "t", or ("fourier", F) where the layers have F time features.
        """
        field = cls.__new__(cls)
        field._assemble(layers, activation, time)
        return field

    def with_parts(self, parts: Sequence[Parts], context_width: int = 0) -> "MLP":
        """This network's formulas on other tensors, which need not be parameters.

        Args:
            parts: The tensors of every layer.
            context_width: Width of the first hidden layer for a network whose context, [B, H] or
                [H], is added to the first bias as it is; 0 for one without context.

        Example:
            >>> field = MLP(2)
            >>> twin = field.with_parts([layer.parts() for layer in field.layers])
            >>> twin.features, len(list(twin.parameters()))
            (2, 0)
        """
        time_features = None if self.time == "t" else self.time[1]
        layers = [
            Given(given, time_features, context_width if i == 0 else 0)
            for i, given in enumerate(parts)
        ]
        twin = MLP.of_layers(layers, self.activation.name, self.time)
        if time_features:
            twin.frequency_orders = self.frequency_orders
        return twin

    def _assemble(self, layers: Sequence[TimeLayer], activation: str, time: TimeFeatures) -> None:
        nn.Module.__init__(self)
        self.features = layers[0].in_features
        self.hidden = tuple(layer.out_features for layer in layers[:-1])
        self.context = layers[0].context
        self.time = time
        self.activation = get_activation(activation)
        if time != "t":
            # Whole numbers, so that a later .double() loses nothing; π is multiplied in at use.
            orders = torch.arange(1, time[1] // 2 + 1, dtype=torch.get_default_dtype())
            self.register_buffer("frequency_orders", orders, persistent=False)
        self.layers = nn.ModuleList(layers)

    @property
    def like(self) -> Tensor:
        """A tensor with the field's dtype and device."""
        return next(iter(self.layers)).like

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def forward(self, t: Tensor | float, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The vector field at a time.

        Args:
            t: Time, 0-dim or a time per sample [B].
            z: State [B, D], in the field's dtype.
            context: [B, C] or [C], exactly when the field was made with one.

        Returns:
            dz/dt [B, D].

        Raises:
            TypeError: z or context has another dtype than the field.
            ValueError: A shape is not as described.
        """
        return self.value_at(self.affines(t, z, context), z)

    def value_at(self, affines: list[Affine], z: Tensor) -> Tensor:
        """The vector field [B, D], given the layers as they are at a time."""
        *inner, last = affines
        for affine in inner:
            z = self.activation.value(affine.value(z))
        return last.value(z)

    def affines(self, t: Tensor | float, z: Tensor, context: Tensor | None) -> list[Affine]:
        """Checks the arguments of `forward` and returns every layer as it is at time t.

        Gates and shifts are computed here, once per evaluation, whatever is then done with them.
        """
        self.check(z, context)
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=z.dtype, device=z.device)
        elif t.dtype != z.dtype or t.device != z.device:
            t = t.to(z)
        if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != z.shape[0]):
            raise ValueError(
                f"t: got shape {tuple(t.shape)}, expected a 0-dim time or one per sample "
                f"[{z.shape[0]}]"
            )
        tau = t if t.dim() == 0 and self.time == "t" else self._features_of(t)
        return self._affines(tau, context)

    def affines_at(self, times: Tensor, z: Tensor, context: Tensor | None) -> list[list[Affine]]:
        """`affines` at S times shared by the batch, all stages of a step, say: a list of S.

        The gates of all times are computed together: a sixth of the small operations (and of their
        gradients') for a step of dopri5.

        Args:
            times: [S], in the field's dtype.
            z: A state [B, D], for the checks.
            context: As for `forward`.
        """
        self.check(z, context)
        # Layers see [S, 1, ·], which broadcasts against a context's [B, ·].
        per_layer = [
            affine.unbind(times.shape[0])
            for affine in self._affines(self._features_of(times).unsqueeze(1), context)
        ]
        return [list(affines) for affines in zip(*per_layer, strict=True)]

    def _features_of(self, t: Tensor) -> Tensor:
        """τ: [..., 1] for t itself, [..., F] for Fourier features."""
        if self.time == "t":
            return t.unsqueeze(-1)
        # A network of given layers may have changed its dtype through them, not through .to().
        angle = t.unsqueeze(-1) * (self.frequency_orders.to(t) * math.pi)
        return torch.cat((angle.cos(), angle.sin()), -1)

    def _affines(self, tau: Tensor, context: Tensor | None) -> list[Affine]:
        first, *rest = self.layers
        return [
            first.affine(tau, context).folded(),
            *(layer.affine(tau, None).folded() for layer in rest),
        ]

    def check(self, z: Tensor, context: Tensor | None) -> None:
        """Raises TypeError or ValueError where z and context are not what `forward` takes."""
        if z.dim() != 2 or z.shape[1] != self.features:
            raise ValueError(
                f"z: got shape {tuple(z.shape)}, expected [B, {self.features}] for a field with "
                f"features={self.features}"
            )
        if z.dtype != self.dtype:
            raise TypeError(f"z: got {z.dtype}, expected the field's {self.dtype}")
        if context is None:
            if self.context:
                raise ValueError(f"context: got None, expected [B, {self.context}]")
            return
        if not self.context:
            raise ValueError(
                f"context: got shape {tuple(context.shape)}, expected None: the field was made "
                "with context=0"
            )
        if tuple(context.shape) not in ((self.context,), (z.shape[0], self.context)):
            raise ValueError(
                f"context: got shape {tuple(context.shape)}, expected [{self.context}] or "
                f"[{z.shape[0]}, {self.context}]"
            )
        if context.dtype != self.dtype:
            raise TypeError(f"context: got {context.dtype}, expected the field's {self.dtype}")

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, hidden={self.hidden}, activation={self.activation.name!r}, "
            f"context={self.context}, time={self.time!r}"
        )


def _check_size(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {value!r}, expected a whole number of at least {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected a whole number of at least {least}")
    return int(value)


def _check_time(time: TimeFeatures) -> TimeFeatures:
    if time == "t":
        return time
    if isinstance(time, Sequence) and len(time) == 2 and time[0] == "fourier":
        count = _check_size("time", time[1], 2)
        if count % 2 == 0:
            return ("fourier", count)
        raise ValueError(
            f"time: got {count} Fourier features, expected an even number (a cosine and a sine "
            "of each frequency)"
        )
    raise ValueError(f"time: got {time!r}, expected 't' or ('fourier', F)")
