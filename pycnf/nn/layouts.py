"""What a module's submodules say it computes: candidates for a fused field.

Known are Sequentials of Linear layers and activations, in wrappers or not, FFJORD's ODEnet, and
zuko's field of Fourier features of time. Whether a candidate computes what the module does is for
`fusion` to find out.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Parts, TimeLayer
from .mlp import MLP, TimeFeatures

# Modules that are one of our activations if these attributes are so.
ACTIVATION_MODULES: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    nn.Tanh: ("tanh", {}),
    nn.Softplus: ("softplus", {"beta": 1, "threshold": 20}),
    nn.ELU: ("elu", {"alpha": 1}),
    nn.SiLU: ("silu", {}),
    nn.SELU: ("selu", {}),
    nn.ReLU: ("relu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
}


class NotRecognised(Exception):
    """Its message is the sentence."""


class Linked(TimeLayer):
    """A layer h = s∘(W a + b) + c made of another module's own linear layers.

    Args:
        linear: W and b; with time in its input W has columns of the time, too, and with context
            columns of that at the end.
        gate: g and q, a Linear(1, out), or None.
        shift: v, a Linear(1, out) without bias, or None.
        time: Where the input of `linear` has the time: "none", "first" or "last".
        time_features: None for t itself, F for F Fourier features of t.
        context: Width of the context vector, 0 for none.
    """

    def __init__(
        self,
        linear: nn.Module,
        gate: nn.Module | None = None,
        shift: nn.Module | None = None,
        time: str = "none",
        time_features: int | None = None,
        context: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        self.linear = linear
        self.gate = gate
        self.shift = shift
        self.time = time
        self.time_features = time_features
        self.context = context
        self.time_width = 0 if time == "none" else time_features or 1
        self.out_features = linear.weight.shape[0]
        self.in_features = linear.weight.shape[1] - self.time_width - context

    @property
    def like(self) -> Tensor:
        return self.linear.weight

    @property
    def context_weight(self) -> Tensor:
        return self.linear.weight[:, self.time_width + self.in_features :]

    def parts(self) -> Parts:
        for part in (self.linear, self.gate, self.shift):
            if part is not None and (part._forward_hooks or part._forward_pre_hooks):
                raise ValueError(
                    f"field: a {type(part).__name__} of the module under pycnf.nn.fuse has got "
                    "hooks since (weight_norm is one), which a fused field does not call; give CNF "
                    "the module itself"
                )
        weight, bias = self.linear.weight, getattr(self.linear, "bias", None)
        gate_weight = gate_bias = shift_weight = None
        if self.gate is not None:
            gate_weight, gate_bias = self.gate.weight[:, 0], getattr(self.gate, "bias", None)
        if self.shift is not None:
            shift_weight = self.shift.weight[:, 0]
        if self.time != "none":
            start = 0 if self.time == "first" else self.in_features
            shift_weight = weight[:, start : start + self.time_width]
            if self.time_features is None:
                shift_weight = shift_weight[:, 0]
        if weight.shape[1] != self.in_features:
            start = self.time_width if self.time == "first" else 0
            weight = weight[:, start : start + self.in_features]
        return Parts(weight, bias, gate_weight, gate_bias, shift_weight)


def candidates_of(module: nn.Module, time: str | None = None) -> list[MLP]:
    """The fields that a module may be, at least one.

    Args:
        module: The module.
        time: Where the input of its Linear layers has the time: "none", "first" or "last"; None if
            that is not known.

    Raises:
        NotRecognised: It is none that we know.
    """
    where = hooked(module)
    if where is not None:
        raise NotRecognised(f"{_called(where)} has hooks, which only a call would run")
    if len({(p.dtype, p.device) for p in module.parameters()}) > 1:
        raise NotRecognised("the field's parameters differ in dtype or device")
    if any(p.is_meta for p in module.parameters()):
        raise NotRecognised("the field's parameters are on the meta device and have no values")
    name, network = _network(module)
    if _is_odenet(network):
        return [_of_odenet(name, network)]
    freqs = frequencies_of(module)
    if freqs is None:
        return _of_sequence(name, network, time, 0)
    multiples = torch.arange(1, len(freqs) + 1, dtype=freqs.dtype).to(freqs) * math.pi
    if not torch.allclose(freqs, multiples, 10 * torch.finfo(freqs.dtype).eps, 0.0):
        raise NotRecognised(f"the field's frequencies are not π, 2π, … as {freqs.dtype} has them")
    return _of_sequence(name, network, time, len(freqs))


def hooked(module: nn.Module, seen: set[nn.Module] | None = None) -> str | None:
    """The name of a submodule with hooks; "" for the module itself, None for none."""
    # As named_modules, several times as fast: asked for at every solve.
    seen = set() if seen is None else seen
    seen.add(module)
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return ""
    for name, part in module._modules.items():
        found = None if part is None or part in seen else hooked(part, seen)
        if found is not None:
            return f"{name}.{found}" if found else name
    return None


def frequencies_of(module: Any) -> Tensor | None:
    """The frequencies of a zuko field."""
    freqs = module._buffers.get("freqs") if isinstance(module, nn.Module) else None
    return freqs if freqs is not None and freqs.dim() == 1 and freqs.numel() else None


def is_linear(module: Any) -> bool:
    """Whether this is a Linear, torch's or of its likeness (zuko's), and nothing else."""
    return (
        isinstance(module, nn.Module)
        and type(module).__name__ == "Linear"
        and not module._modules
        and not module._buffers
        and {"weight"} <= set(module._parameters) <= {"weight", "bias"}
        and module.weight.dim() == 2
    )


def _called(name: str) -> str:
    return f"layer {name}" if name else "the field"


def a_named(thing: object) -> str:
    name = type(thing).__name__
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


def _network(module: nn.Module) -> tuple[str, nn.Module]:
    """The network in a module that is or wraps one, and its name there."""
    names: list[str] = []
    while not (isinstance(module, nn.Sequential) or is_linear(module) or _is_odenet(module)):
        name = ".".join(names)
        if type(module).__module__.split(".")[0] == "torch":
            # Not a wrapper to look into: DistributedDataParallel, torch.compile's, ModuleList.
            raise NotRecognised(f"{_called(name)} is {a_named(module)}")
        known = () if frequencies_of(module) is None else ("freqs", "times")
        own = [*module._parameters, *(key for key in module._buffers if key not in known)]
        if own:
            raise NotRecognised(
                f"{_called(name)}, {a_named(module)}, has a tensor {own[0]!r} of its own"
            )
        children = dict(module.named_children())
        if len(children) != 1:
            found = f"{len(children)} submodules" if children else "no submodules"
            raise NotRecognised(
                f"{_called(name)}, {a_named(module)}, has {found}; expected one, a Sequential "
                "of Linear layers and activations"
            )
        ((child, module),) = children.items()
        names.append(child)
    return ".".join(names), module


def _is_odenet(module: nn.Module) -> bool:
    """FFJORD's layout: two lists, layers of their own kinds and activations."""
    return set(module._modules) == {"layers", "activation_fns"}


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested Sequentials in their order."""
    if isinstance(module, nn.Sequential):
        for child, part in module._modules.items():  # one activation may be there twice
            yield from _leaves(f"{name}.{child}" if name else child, part)
    elif not isinstance(module, nn.Identity):
        yield name, module


def _activation_of(name: str, module: nn.Module) -> str:
    if type(module) not in ACTIVATION_MODULES:
        raise NotRecognised(
            f"{_called(name)} is {a_named(module)}, which is neither Linear nor a known activation"
        )
    activation, settings = ACTIVATION_MODULES[type(module)]
    for setting, value in settings.items():
        got = getattr(module, setting)
        if got != value:
            raise NotRecognised(
                f"{_called(name)} is {a_named(module)} with {setting}={got!r}, expected {value!r}"
            )
    return activation


def _one_activation(found: list[tuple[str, str]]) -> str:
    """The activation that (where, which) pairs agree on."""
    for name, activation in found[1:]:
        if activation != found[0][1]:
            raise NotRecognised(
                f"{_called(name)} has the activation {activation}, and {_called(found[0][0])} "
                f"{found[0][1]}: the fused engine has one for all layers"
            )
    return found[0][1] if found else "identity"


def _read_sequence(name: str, module: nn.Module) -> tuple[list[nn.Module], str]:
    """The linear layers and the activation of a Sequential, its widths checked."""
    linears: list[nn.Module] = []
    activations: list[tuple[str, str]] = []
    last = None
    for where, part in _leaves(name, module):
        if is_linear(part):
            if linears and len(activations) < len(linears):
                activations.append((where, "identity"))
            if linears and part.weight.shape[1] != linears[-1].weight.shape[0]:
                raise NotRecognised(
                    f"{_called(where)} has {part.weight.shape[1]} inputs, expected the "
                    f"{linears[-1].weight.shape[0]} outputs of the one before"
                )
            linears.append(part)
            last = None
        else:
            activation = _activation_of(where, part)
            if len(activations) == len(linears):
                raise NotRecognised(f"{_called(where)} is {a_named(part)}, expected a Linear there")
            activations.append((where, activation))
            last = f"{_called(where)} is {a_named(part)} after the last Linear"
    if not linears:
        raise NotRecognised(f"{_called(name)} has no Linear layers")
    if last is not None:
        raise NotRecognised(last)
    return linears, _one_activation(activations)


def _of_sequence(name: str, module: nn.Module, time: str | None, frequencies: int) -> list[MLP]:
    """The fields that a Sequential may be, by where its input has the time."""
    linears, activation = _read_sequence(name, module)
    inputs, features = linears[0].weight.shape[1], linears[-1].weight.shape[0]
    context = 0
    features_of_time: TimeFeatures = "t"
    if frequencies:
        features_of_time = ("fourier", 2 * frequencies)
        context = inputs - 2 * frequencies - features
        times = ("first",) if context >= 0 else ()
    elif time is not None:
        times = (time,) if inputs == features + (time != "none") else ()
    else:
        times = {features: ("none",), features + 1: ("first", "last")}.get(inputs, ())
    if not times:
        wanted = {None: "as many inputs or one more for t", "none": "as many inputs"}
        raise NotRecognised(
            f"{_called(name)} has {inputs} inputs and {features} outputs, expected "
            + ("more inputs" if frequencies else wanted.get(time, "one more input for t"))
        )
    return [
        MLP.of_layers(
            [
                Linked(linears[0], None, None, place, 2 * frequencies or None, context),
                *(Linked(linear, time_features=2 * frequencies or None) for linear in linears[1:]),
            ],
            activation,
            features_of_time,
        )
        for place in times
    ]


def _read_odenet_layer(
    where: str, module: nn.Module
) -> tuple[nn.Module, nn.Module | None, nn.Module | None]:
    """The linear layer, gate and shift of one of FFJORD's layers, by its submodules' names."""
    parts = module._modules
    if (
        not {"_layer"} <= set(parts) <= {"_layer", "_hyper_gate", "_hyper", "_hyper_bias"}
        or {"_hyper_gate", "_hyper"} <= set(parts)
        or not all(is_linear(part) for part in parts.values())
    ):
        raise NotRecognised(
            f"{_called(where)} is {a_named(module)}, none of FFJORD's layers ignore, concat, "
            "concat_v2, squash and concatsquash"
        )
    linear, gate = parts["_layer"], parts.get("_hyper_gate", parts.get("_hyper"))
    shift, out = parts.get("_hyper_bias"), parts["_layer"].weight.shape[0]
    for of_time in (gate, shift):
        if of_time is not None and tuple(of_time.weight.shape) != (out, 1):
            raise NotRecognised(f"{_called(where)} has a gate or shift that is no Linear(1, {out})")
    if shift is not None and getattr(shift, "bias", None) is not None:
        raise NotRecognised(f"{_called(where)} has a shift with a bias")
    return linear, gate, shift


def _of_odenet(name: str, module: nn.Module) -> MLP:
    """The field that FFJORD's ODEnet is."""
    prefix = f"{name}." if name else ""
    read = [
        (f"{prefix}layers.{child}", _read_odenet_layer(f"{prefix}layers.{child}", part))
        for child, part in module.layers._modules.items()
    ]
    activations = [
        (f"{prefix}activation_fns.{child}", part)
        for child, part in module.activation_fns._modules.items()
    ]
    if not read or len(activations) != len(read) - 1:
        raise NotRecognised(
            f"{_called(name)} has {len(activations)} activations for {len(read)} layers"
        )
    width = read[-1][1][0].weight.shape[0]
    layers = []
    for where, (linear, gate, shift) in read:
        out, inputs = linear.weight.shape
        time = "first" if inputs == width + 1 and gate is None and shift is None else "none"
        if inputs != width + (time == "first"):
            raise NotRecognised(f"{_called(where)} has {inputs} inputs, expected {width}")
        layers.append(Linked(linear, gate, shift, time))
        width = out
    activation = _one_activation(
        [(where, _activation_of(where, part)) for where, part in activations]
    )
    return MLP.of_layers(layers, activation)
