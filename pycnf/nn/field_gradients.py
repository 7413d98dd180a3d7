"""Gradients of the ops that evaluate a field: by other ops, and theirs by the formulas of this
package.

    mlp_value, mlp_value_divergence   by mlp_value_divergence_backward
    mlp_value_jvp                     by mlp_value_jvp_backward
    mlp_vjp                           by mlp_value_jvp and its backward, as p̄·(Jᵀv) = v·(J p̄)

What a backward op does is differentiated through the plain PyTorch formulas of the same numbers, to
any order: the gradient of a divergence's gradient needs the activation's third derivative, which no
kernel has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycnf import _ops

from .activation import ACTIVATIONS
from .layers import Given, Parts
from .mlp import MLP
from .precision import precision_of, products_of_torch
from .tangents import push_forward, value_and_tangents

# In the order of Divergence in csrc/torch/mlp_setup.h.
NO_DIVERGENCE, PROBES, UNIT_VECTORS, CLOSED_FORM = range(4)
_NAMES = tuple(ACTIVATIONS)
_KINDS: dict[Any, int] = {}  # where `kind` is among an op's arguments


# ---- any op's record -----------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where an argument's tensors are in a flat list: one, or a list of `count`."""

    first: int
    count: int | None


def _take_apart(arguments: Sequence[Any]) -> tuple[list[Any], list[Tensor | None]]:
    """The arguments with a `_Place` for each that is or lists tensors, and all tensors, flat.

    `torch.library.register_autograd` does not look into lists in which some tensors are missing.
    """
    rest, tensors = [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            rest.append(_Place(len(tensors), None))
            tensors.append(argument)
        elif isinstance(argument, list) and any(isinstance(x, Tensor) for x in argument):
            rest.append(_Place(len(tensors), len(argument)))
            tensors += argument
        else:
            rest.append(argument)
    return rest, tensors


def _put_together(rest: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    """The arguments again, or what `tensors` has in their places."""
    return [
        x
        if not isinstance(x, _Place)
        else tensors[x.first]
        if x.count is None
        else list(tensors[x.first : x.first + x.count])
        for x in rest
    ]


def _below(op: Any, keyset: Any, arguments: Sequence[Any]) -> Any:
    """The op itself, without a record."""
    precision = precision_of(arguments[_KINDS[op]])
    with torch._C._AutoDispatchBelowAutograd(), products_of_torch(precision):
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


class _Recorded(torch.autograd.Function):
    """An op's call; `rule` turns the cotangents of its results into those of named arguments."""

    @staticmethod
    def forward(ctx: Any, op: Any, keyset: Any, rule: Callable, rest: list, *tensors: Any):
        results = _below(op, keyset, _put_together(rest, tensors))
        ctx.names = [argument.name for argument in op._schema.arguments]
        ctx.rule, ctx.rest = rule, rest
        ctx.set_materialize_grads(False)
        kept = None
        if "keep" in ctx.names:
            kept = results[-1]
            ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(kept, *tensors)
        return tuple(_flat(results))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None):
        kept, *tensors = ctx.saved_tensors
        nothing = (None,) * (4 + len(tensors))
        if all(bar is None for bar in bars):
            return nothing
        needs = ctx.needs_input_grad[4:]
        arguments = dict(zip(ctx.names, _put_together(ctx.rest, tensors)))
        needed = dict(zip(ctx.names, _put_together(ctx.rest, needs)))
        found = ctx.rule(SimpleNamespace(**arguments), SimpleNamespace(**needed), kept, *bars)
        gradients = list(nothing[4:])
        for name, place in zip(ctx.names, ctx.rest):
            if not isinstance(place, _Place) or name not in found:
                continue
            of_place = [found[name]] if place.count is None else found[name]
            for i, gradient in enumerate(of_place, place.first):
                gradients[i] = gradient if needs[i] else None
        return *nothing[:4], *gradients


def _flat(results: Sequence[Any]) -> list[Tensor]:
    """An op's results, a list at the end taken apart."""
    if isinstance(results[-1], list):
        return [*results[:-1], *results[-1]]
    return list(results)


_library = torch.library.Library("pycnf", "IMPL")


def _differentiable(name: str, rule: Callable) -> None:
    op = getattr(_ops, name)
    listed = op._schema.returns[-1].type.kind() == "ListType"
    single = len(op._schema.returns) - 1
    _KINDS[op] = [argument.name for argument in op._schema.arguments].index("kind")

    def run(keyset: Any, *arguments: Any) -> Any:
        rest, tensors = _take_apart(arguments)
        if not (
            torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        ):
            return _below(op, keyset, arguments)
        results = _Recorded.apply(op, keyset, rule, rest, *tensors)
        return (*results[:single], list(results[single:])) if listed else results

    _library.impl(name, run, "Autograd", with_keyset=True)


# ---- the rules -----------------------------------------------------------------------------------


def is_batched(*bars: Tensor | None) -> bool:
    """Whether cotangents are those of vmap, which autograd has a kind of its own of."""
    functorch = torch._C._functorch
    return any(
        x is not None and (functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x))
        for x in bars
    )


def _needs_parameters(needed: SimpleNamespace) -> bool:
    return needed.t or any(needed.parameters)


def _named(
    needed: SimpleNamespace, tangents: str | None, gradients: Sequence[Any]
) -> dict[str, Any]:
    """A backward op's results by the names of the forward op's arguments."""
    z_bar, t_bar, context_bar, tangents_bar, bars = gradients
    found = {"z": z_bar, "context": context_bar}
    if tangents is not None:
        found[tangents] = tangents_bar
    if _needs_parameters(needed):
        found |= {"t": t_bar, "parameters": bars}
    return found


def _of_value(a: SimpleNamespace, needed: SimpleNamespace, kept: Tensor, value_bar, _) -> dict:
    if is_batched(value_bar):
        return _plain_gradient(a, needed, (value_bar,), None, _value)
    gradients = _ops.mlp_value_divergence_backward(
        value_bar, None, a.t, a.z, None, a.context, a.parameters, a.kind, None, 0, 0, False, kept,
        _needs_parameters(needed),
    )  # fmt: skip
    return _named(needed, None, gradients)


def _of_value_divergence(
    a: SimpleNamespace, needed: SimpleNamespace, kept: Tensor, value_bar, divergence_bar, _
) -> dict:
    if is_batched(value_bar, divergence_bar):
        _draw(a, needed)
        bars = value_bar, divergence_bar
        return _plain_gradient(a, needed, bars, "probe", _value_and_divergence)
    gradients = _ops.mlp_value_divergence_backward(
        value_bar, divergence_bar, a.t, a.z, a.probe, a.context, a.parameters, a.kind, a.keys,
        a.seed, a.probes, a.gaussian, kept, _needs_parameters(needed),
    )  # fmt: skip
    return _named(needed, "probe", gradients)


def _of_value_jvp(
    a: SimpleNamespace, needed: SimpleNamespace, kept: Tensor, value_bar, images_bar, _
) -> dict:
    if is_batched(value_bar, images_bar):
        bars = value_bar, images_bar
        return _plain_gradient(a, needed, bars, "tangents", _value_and_images)
    gradients = _ops.mlp_value_jvp_backward(
        value_bar, images_bar, a.t, a.z, a.tangents, a.context, a.parameters, a.kind, kept,
        _needs_parameters(needed),
    )  # fmt: skip
    return _named(needed, "tangents", gradients)


def _of_vjp(
    a: SimpleNamespace, needed: SimpleNamespace, _: None, value_bar, products_bar
) -> dict[str, Any]:
    if products_bar is None:
        return _of_value(a, needed, a.z.new_empty(0), value_bar, None)
    field = a.context, a.parameters, a.kind
    _, images, kept = _ops.mlp_value_jvp(a.t, a.z, products_bar, *field, True)
    gradients = _ops.mlp_value_jvp_backward(
        value_bar, a.cotangents, a.t, a.z, products_bar, *field, kept, _needs_parameters(needed)
    )
    return {**_named(needed, None, gradients), "cotangents": images}


def _of_value_divergence_backward(
    a: SimpleNamespace, needed: SimpleNamespace, _: None, *cotangents: Tensor | None
) -> dict:
    _draw(a, needed)
    function = _value if a.kind[2] == NO_DIVERGENCE else _value_and_divergence
    return _again(a, needed, cotangents, ("value_bar", "divergence_bar"), "probe", function)


def _of_value_jvp_backward(
    a: SimpleNamespace, needed: SimpleNamespace, _: None, *cotangents: Tensor | None
) -> dict:
    bars = "value_bar", "images_bar"
    return _again(a, needed, cotangents, bars, "tangents", _value_and_images)


# ---- the same by the plain formulas --------------------------------------------------------------


def _value(field: MLP, t: Tensor, z: Tensor, _: None, context: Tensor | None) -> tuple[Tensor, ...]:
    return (field.value_at(field.affines(t, z, context), z),)


def _value_and_divergence(
    field: MLP, t: Tensor, z: Tensor, probe: Tensor | None, context: Tensor | None
) -> tuple[Tensor, ...]:
    return value_and_tangents(field.affines(t, z, context), field.activation, z, probe)


def _value_and_images(
    field: MLP, t: Tensor, z: Tensor, tangents: Tensor, context: Tensor | None
) -> tuple[Tensor, ...]:
    return push_forward(field.affines(t, z, context), field.activation, z, tangents)


def _draw(a: SimpleNamespace, needed: SimpleNamespace) -> None:
    """Puts drawn probes where given ones would be."""
    if a.keys is None:
        return
    noise = "gaussian" if a.gaussian else "rademacher"
    a.probe = _ops.probe_sample(
        a.keys, a.seed, a.probes, a.z.shape[1], noise=noise, dtype=a.z.dtype
    )
    needed.probe = False


def _nodes(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each input by a node of its own: one may be a function of another."""
    return [
        x if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        for x in tensors
    ]


def _plain_gradient(
    a: SimpleNamespace,
    needed: SimpleNamespace,
    bars: Sequence[Tensor | None],
    tangents: str | None,
    function: Callable,
) -> dict:
    """A forward op's gradient in plain operations: batches of cotangents (vmap) need these."""
    deeper = torch.is_grad_enabled()
    with torch.enable_grad():
        given = _nodes(
            a.z, a.t, a.context, None if tangents is None else getattr(a, tangents), *a.parameters
        )
        z, t, context, probe, *parameters = given
        outputs = function(_field(parameters, a.kind, context), t, z, probe, context)
    wants = [
        needed.z, needed.t, needed.context, tangents is not None and getattr(needed, tangents),
        *needed.parameters,
    ]  # fmt: skip
    found = _gradient(zip(outputs, bars), given, wants, deeper)
    return _by_name(found, tangents)


def _again(
    a: SimpleNamespace,
    needed: SimpleNamespace,
    cotangents: Sequence[Tensor | None],
    bars: tuple[str, str],
    tangents: str,
    function: Callable,
) -> dict:
    """The gradient of a backward op, whose results are the gradient of a function of the field."""
    deeper = torch.is_grad_enabled()
    with torch.enable_grad():
        given = _nodes(a.z, a.t, a.context, getattr(a, tangents), *a.parameters)
        upper = _nodes(*(getattr(a, name) for name in bars))
        z, t, context, probe, *parameters = given
        outputs = function(_field(parameters, a.kind, context), t, z, probe, context)
        first = _gradient(zip(outputs, upper), given, [True] * len(given), True)
    # What the op was not asked for is empty, and has no cotangent to speak of.
    pairs = [
        (gradient, bar)
        for gradient, bar in zip(first, cotangents)
        if gradient is not None and bar is not None and gradient.shape == bar.shape
    ]
    wants = [needed.z, needed.t, needed.context, getattr(needed, tangents), *needed.parameters]
    wants += [getattr(needed, name) for name in bars]
    found = _gradient(pairs, [*given, *upper], wants, deeper)
    return _by_name(found[:-2], tangents) | dict(zip(bars, found[-2:]))


def _gradient(
    pairs: Iterable[tuple[Tensor, Tensor | None]],
    inputs: Sequence[Tensor | None],
    wants: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of outputs, paired with their cotangents, by the inputs that are wanted."""
    seeded = [(x, bar) for x, bar in pairs if bar is not None and x.requires_grad]
    wanted = [x for x, want in zip(inputs, wants) if x is not None and want]
    if not seeded or not wanted:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [x for x, _ in seeded], wanted, [bar for _, bar in seeded],
            create_graph=create_graph, allow_unused=True,
        )
    )  # fmt: skip
    return [next(found) if x is not None and want else None for x, want in zip(inputs, wants)]


def _by_name(found: Sequence[Tensor | None], tangents: str | None) -> dict[str, Any]:
    z_bar, t_bar, context_bar, tangents_bar, *others = found
    names = {"z": z_bar, "t": t_bar, "context": context_bar, "parameters": others}
    return names if tangents is None else {**names, tangents: tangents_bar}


def _field(parameters: Sequence[Tensor | None], kind: Sequence[int], context: Tensor | None) -> MLP:
    """The network that an op's arguments are."""
    size, time_features = len(Parts._fields), kind[1] or None
    width = 0 if context is None else context.shape[1]
    layers = [
        Given(Parts(*parameters[i : i + size]), time_features, width if i == 0 else 0)
        for i in range(0, len(parameters), size)
    ]
    return MLP.of_layers(layers, _NAMES[kind[0]], ("fourier", kind[1]) if time_features else "t")


_differentiable("mlp_value", _of_value)
_differentiable("mlp_value_divergence", _of_value_divergence)
_differentiable("mlp_value_jvp", _of_value_jvp)
_differentiable("mlp_vjp", _of_vjp)
_differentiable("mlp_value_divergence_backward", _of_value_divergence_backward)
_differentiable("mlp_value_jvp_backward", _of_value_jvp_backward)
