"""Which fields the fused engine runs: pycnf's networks, and modules that compute the same thing.

A module written elsewhere is recognised by its submodules and then by its numbers: it is called
with random parameters, and has to return what its layers do in a row. So neither the names of its
classes nor the parameters it has today (zeros in the last layer, say) decide.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .divergence import VectorField
from .layers import LAYERS, TimeLayer
from .layouts import NotRecognised, a_named, candidates_of, frequencies_of, hooked, is_linear
from .mlp import MLP

MOST_LAYERS = 16  # kMaxLayers in csrc/core/mlp.h
TIMES = ("none", "first", "last")


def why_not_fused(field: VectorField) -> str | None:
    """One sentence saying what keeps the fused engine from running this field; None if it can.

    `recognise` finds an `MLP` in a field that is none.

    Example:
        >>> why_not_fused(MLP(2, layer="blend"))
        "the field has a 'blend' layer, whose weights depend on time"
    """
    if not isinstance(field, nn.Module):
        return f"the field is a plain callable ({type(field).__name__}), not a pycnf.nn.MLP"
    if not isinstance(field, MLP):
        return (
            f"the field is a {type(field).__name__}, not a pycnf.nn.MLP (pycnf.nn.fuse makes one "
            "of a module that computes the same)"
        )
    if type(field).forward is not MLP.forward or hooked(field) is not None:
        return "the field is an MLP with hooks or with a forward of its own"
    for layer in field.layers:
        if type(layer).parts is TimeLayer.parts:
            names = {kind: name for name, kind in LAYERS.items()}
            name = names.get(type(layer), type(layer).__name__)
            return f"the field has a {name!r} layer, whose weights depend on time"
    if len(field.layers) > MOST_LAYERS:
        return (
            f"the field has {len(field.layers)} layers and the fused engine at most {MOST_LAYERS}"
        )
    return None


def fuse(module: Callable[..., Any], time: str | None = None) -> MLP:
    """The `MLP` that computes what a module of another make does, with the module's own parameters.

    Recognised are, with biases or without, and with one of Tanh, Softplus, ELU, SiLU, SELU, ReLU
    and GELU (or none) between all Linear layers:

    * an `nn.Sequential`, and any module of one argument with one Sequential in it: its input is z,
      or t and z side by side, as `time` says;
    * any module f(t, z) with one Sequential in it that gets z, or t and z side by side: which, is
      found out (TorchCFM's `torch_wrapper(MLP(...))`, for one);
    * FFJORD's `ODEnet`, and the `ODEfunc` around one, with its layers ignore, concat, concat_v2,
      squash and concatsquash;
    * `zuko.flows.CNF(...).transform`, whose field is its method `f`, with context or without.

    The parameters are not copied: a step of an optimizer, `load_state_dict` and `.to` on the module
    are seen by the field, and the field's gradients arrive at the module's parameters. A copy of
    the module is called here, a few times, to compare values; the module itself never is, so what
    its forward does besides (other values in training mode or at other times, counts, dropout) and
    what it is made to do later is not known to the field. Hooks that come later are an error.

    Args:
        module: The module.
        time: For a module of one argument, where its input has t: "none", "first" or "last". None
            for a module f(t, z), and for a Sequential with as many inputs as outputs.

    Returns:
        A field f(t, z), f(t, z, context) for one with context.

    Raises:
        ValueError: The module is not recognised, and why; or `time` is not as described.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2))
        >>> flow = CNF(fuse(net, time="last"))
    """
    if time is not None and time not in TIMES:
        raise ValueError(f"time: got {time!r}, expected None or one of {', '.join(TIMES)}")
    if isinstance(module, MLP):
        return module
    if isinstance(getattr(module, "diffeq", None), nn.Module) and hasattr(module, "before_odeint"):
        # FFJORD's ODEfunc, which adds the divergence to a field of this name.
        if getattr(module, "residual", False):
            raise ValueError("module: an ODEfunc with residual=True subtracts z from its field")
        module = module.diffeq
    elif frequencies_of(module) is not None and callable(getattr(module, "f", None)):
        module = module.f
    try:
        if time is None and not _is_plain(module):
            return _recognise(module)
        return _recognise_plain(module, time)
    except NotRecognised as why:
        raise ValueError(f"module: {why}") from None


def recognise(field: VectorField) -> MLP | str:
    """The `MLP` that computes what a field f(t, z) does, or one sentence saying why there is none.

    An `MLP` is returned as it is, and any other module as by `fuse`, except that it must be called
    as f(t, z); so must a method of a module. Leaves the module and the random generators alone.
    """
    if isinstance(field, MLP):
        return field
    try:
        if _is_plain(field):
            raise NotRecognised(
                f"the field is a {type(field).__name__}, a function of one argument: "
                "pycnf.nn.fuse(field) makes it one of t and z"
            )
        return _recognise(field)
    except NotRecognised as why:
        return str(why)


def _owner(field: VectorField) -> nn.Module | None:
    """The module itself, or the one that a method belongs to."""
    module = field if isinstance(field, nn.Module) else getattr(field, "__self__", None)
    return module if isinstance(module, nn.Module) else None


def _is_plain(field: VectorField) -> bool:
    """Whether this is a network of one argument by its type."""
    return is_linear(field) or (
        isinstance(field, nn.Sequential) and type(field).forward is nn.Sequential.forward
    )


def _recognise(field: VectorField) -> MLP:
    """The field that a callable f(t, z) is."""
    module = _owner(field)
    if module is None:
        raise NotRecognised(f"the field is a plain callable ({type(field).__name__}), no module")
    if isinstance(module, torch.jit.ScriptModule):
        raise NotRecognised("the field is a TorchScript module")
    return _choose(field, module, candidates_of(module))


def _recognise_plain(field: VectorField, time: str | None) -> MLP:
    """The field that a module of one argument is."""
    module = _owner(field)
    if module is None:
        raise NotRecognised(f"got a plain callable ({type(field).__name__}), expected a module")
    candidates = candidates_of(module, time)
    if len(candidates) > 1:
        raise NotRecognised(
            f"the field has one input more than its {candidates[0].features} outputs: say "
            "time='first' or time='last'"
        )
    return _choose(field, module, candidates, plain=True)


class _Together(nn.Module):
    """A module's field and its candidates as one function of the module's parameters."""

    def __init__(self, module: nn.Module, functions: list[VectorField]) -> None:
        super().__init__()
        self.module = module
        self.functions = functions  # in a list, so no submodules: each parameter has one name

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [function(*(x.clone() for x in inputs)) for function in self.functions]


def _choose(
    field: VectorField, module: nn.Module, candidates: list[MLP], plain: bool = False
) -> MLP:
    """The candidate whose values are the field's, at random parameters, states and times.

    Random parameters, because under the real ones candidates may agree that do not later: a last
    layer of zeros is how many fields begin. All this happens to a copy: the module itself may be in
    use elsewhere. A `plain` field has one argument, with the time in it as the candidate says.
    """
    try:
        called, module, twins = copy.deepcopy((field, module, candidates))
    except Exception as error:
        raise NotRecognised(
            f"the field cannot be copied, which comparing its values takes: {error}"
        ) from None
    place = candidates[0].layers[0].time

    def call(t: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        if not plain:
            return called(t, z, *context)
        column = t.expand(z.shape[0], 1)
        inputs = {"none": [z], "first": [column, z], "last": [z, column]}[place]
        return called(torch.cat(inputs, 1))

    like = next(module.parameters())
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(like)

    parameters = {
        f"module.{name}": draw(*p.shape) / max(1, math.prod(p.shape[1:])) ** 0.5
        for name, p in module.named_parameters()
    }
    rows, features, context = 8, candidates[0].features, candidates[0].context
    sizes = torch.logspace(-2, 1, rows, device="cpu").unsqueeze(1).to(like)
    together = _Together(module, [call, *twins])
    agree = [True] * len(candidates)
    # A few digits short of the dtype's, as the order of sums may differ: 7e-5 in f32.
    tolerance = torch.finfo(like.dtype).eps ** 0.6
    devices = [like.device] if like.device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.autocast(like.device.type, enabled=False),
        torch.random.fork_rng(devices),
    ):
        for time in (0.0, 1.0, 0.37, -1.6):
            inputs = [torch.tensor(time, device="cpu").to(like), draw(rows, features) * sizes]
            if context:
                inputs.append(draw(rows, context))
            try:
                # Parameters have one name each here and are swapped where they are; tying them
                # would swap those of a module found twice, and restore one of the two.
                value, *others = functional_call(
                    together, parameters, tuple(inputs), tie_weights=False
                )
            except Exception as error:
                first, *_ = str(error).splitlines() or [""]
                raise NotRecognised(
                    f"calling the field raised {type(error).__name__}: {first}"
                ) from None
            if not isinstance(value, Tensor) or value.shape != inputs[1].shape:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else a_named(value)
                raise NotRecognised(f"calling the field returned {got}, expected z's shape")
            scale = value.abs().amax(1, keepdim=True) * tolerance
            agree = [
                good and bool(((other - value).abs() <= scale).all())
                for good, other in zip(agree, others)
            ]
    if not any(agree):
        where = {"none": "of z", "first": "of [t; z]", "last": "of [z; t]"}
        tried = " or ".join(where[c.layers[0].time] for c in candidates)
        raise NotRecognised(
            f"the field's forward computes something else than its layers in a row do {tried}"
        )
    return candidates[agree.index(True)]
