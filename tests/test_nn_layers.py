"""Each layer type against its formula written out, its parameters against the table of the API."""

import math

import pytest
import torch

from pycnf.nn import MLP
from pycnf.nn.divergence import has_forward_mode, value_and_divergence
from pycnf.nn.layers import LAYERS, LAYERS_OF_PLAIN_TIME, Given, Parts, get_layer

IN, OUT, C, FOURIER = 3, 4, 2, 6
T = 0.37


def tau_of(t, fourier):
    if not fourier:
        return [t]
    orders = range(1, FOURIER // 2 + 1)
    return [math.cos(k * math.pi * t) for k in orders] + [math.sin(k * math.pi * t) for k in orders]


def formula(layer, name, x, t, fourier, context):
    """The layer's output for one sample at one time, from the layers' formulas."""
    tau = torch.tensor(tau_of(t, fourier), dtype=x.dtype)
    p = dict(layer.named_parameters())

    def of_time(weight):
        return (weight.reshape(OUT, -1) * tau).sum(1)

    more = p["context_weight"] @ context if context is not None else 0.0
    if name == "ignore":
        return p["weight"] @ x + p["bias"] + more
    if name == "concat":
        return p["weight"] @ torch.cat((tau, x)) + p["bias"] + more
    if name == "concat_v2":
        return p["weight"] @ x + p["bias"] + more + of_time(p["shift_weight"])
    if name in ("squash", "concatsquash"):
        gate = torch.sigmoid(of_time(p["gate_weight"]) + p["gate_bias"])
        out = (p["weight"] @ x + p["bias"] + more) * gate
        return out if name == "squash" else out + of_time(p["shift_weight"])
    if name == "blend":
        start = p["start.weight"] @ x + p["start.bias"]
        end = p["end.weight"] @ x + p["end.bias"]
        return (1 - t) * start + t * end + more
    hidden = torch.tanh(p["net.0.weight"][:, 0] * t + p["net.0.bias"])
    made = p["net.2.weight"] @ hidden + p["net.2.bias"]
    return made[OUT:].view(OUT, IN) @ x + made[:OUT] + more


CASES = [
    (name, fourier, context)
    for name in LAYERS
    for fourier in (False, True)
    for context in (False, True)
    if not (fourier and name in LAYERS_OF_PLAIN_TIME)
]


@pytest.mark.parametrize(("name", "fourier", "context"), CASES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared-t", "t-per-sample"])
def test_layer_is_its_formula(name, fourier, context, per_sample):
    torch.manual_seed(1)
    layer = get_layer(name)(IN, OUT, FOURIER if fourier else None, C if context else 0).double()
    x = torch.randn(5, IN, dtype=torch.float64)
    contexts = torch.randn(5, C, dtype=torch.float64) if context else None
    times = torch.linspace(0.1, 0.9, 5).tolist() if per_sample else [T] * 5
    if per_sample:
        tau = torch.tensor([tau_of(t, fourier) for t in times], dtype=torch.float64)
    else:
        tau = torch.tensor(tau_of(T, fourier), dtype=torch.float64)
        tau = tau if fourier else tau[0]
    affine = layer.affine(tau, contexts)
    got = [affine.value(x), affine.folded().value(x), affine.linear(x[None])[0] + affine.shift]
    expected = torch.stack(
        [
            formula(layer, name, x[i], times[i], fourier, contexts[i] if context else None)
            for i in range(5)
        ]
    )
    for value in got:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    # columns() is W at work on unit vectors, trace() the diagonal of W at work on tangents.
    unit = torch.eye(IN, dtype=torch.float64).unsqueeze(1).expand(IN, 5, IN)
    torch.testing.assert_close(
        affine.columns().expand(IN, 5, OUT), affine.linear(unit), rtol=1e-12, atol=1e-13
    )
    tangents = torch.randn(OUT, 5, IN, dtype=torch.float64)
    torch.testing.assert_close(
        affine.trace(tangents),
        affine.linear(tangents).diagonal(dim1=0, dim2=2).sum(-1),
        rtol=1e-12,
        atol=1e-13,
    )


SHAPES = {
    "ignore": {"weight": (OUT, IN), "bias": (OUT,)},
    "concat": {"weight": (OUT, 1 + IN), "bias": (OUT,)},
    "concat_v2": {"weight": (OUT, IN), "bias": (OUT,), "shift_weight": (OUT,)},
    "squash": {"weight": (OUT, IN), "bias": (OUT,), "gate_weight": (OUT,), "gate_bias": (OUT,)},
    "concatsquash": {
        "weight": (OUT, IN),
        "bias": (OUT,),
        "gate_weight": (OUT,),
        "gate_bias": (OUT,),
        "shift_weight": (OUT,),
    },
    "blend": {
        "start.weight": (OUT, IN),
        "start.bias": (OUT,),
        "end.weight": (OUT, IN),
        "end.bias": (OUT,),
    },
    "hyper": {
        "net.0.weight": (8, 1),
        "net.0.bias": (8,),
        "net.2.weight": (IN * OUT + OUT, 8),
        "net.2.bias": (IN * OUT + OUT,),
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_parameter_names_and_shapes(name):
    def shapes(layer):
        return {key: tuple(value.shape) for key, value in layer.named_parameters()}

    assert shapes(get_layer(name)(IN, OUT)) == SHAPES[name]
    with_context = {**SHAPES[name], "context_weight": (OUT, C)}
    assert shapes(get_layer(name)(IN, OUT, context=C)) == with_context
    if name not in LAYERS_OF_PLAIN_TIME:
        fourier = {
            key: (OUT, FOURIER) if key in ("gate_weight", "shift_weight") else shape
            for key, shape in SHAPES[name].items()
        }
        if name == "concat":
            fourier["weight"] = (OUT, FOURIER + IN)
        assert shapes(get_layer(name)(IN, OUT, FOURIER)) == fourier


def test_initialization_is_linears():
    """Uniform within ±1/sqrt(fan-in): weights of the input, gates and shifts of the time."""
    torch.manual_seed(0)
    layer = get_layer("concatsquash")(100, 2000, 4, context=9)
    bounds = {
        "weight": 0.1,
        "bias": 0.1,
        "gate_weight": 0.5,
        "gate_bias": 0.5,
        "shift_weight": 0.5,
        "context_weight": 1 / 3,
    }
    for name, parameter in layer.named_parameters():
        bound = bounds[name]
        assert bound * 0.98 < parameter.abs().max() <= bound, name
        assert abs(parameter.var().item() / (bound**2 / 3) - 1) < 0.1, name


def test_context_is_inside_the_gate():
    layer = get_layer("squash")(IN, OUT, context=C).double()
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_bias.fill_(-40.0)  # the gate shuts, on the context too
    affine = layer.affine(torch.tensor(0.5).double(), torch.full((C,), 3.0).double())
    assert affine.value(torch.ones(1, IN).double()).abs().max() < 1e-15


def test_folding_a_gate_per_sample_leaves_it():
    layer = get_layer("squash")(IN, OUT)
    affine = layer.affine(torch.rand(5, 1), None)
    assert affine.folded() is affine
    assert affine.gate.shape == (5, OUT)


def test_unknown_layer_lists_the_names():
    with pytest.raises(ValueError, match=r"layer: got 'concatsquach'.*mean 'concatsquash'"):
        get_layer("concatsquach")


@pytest.mark.parametrize("present", range(16))
def test_absent_parts_are_zeros_and_ones(present):
    """Bias, gate, gate's bias and shift, in every combination, at every shape of time."""
    torch.manual_seed(0)

    def part(bit, *shape):
        return torch.randn(shape, dtype=torch.float64) if present >> bit & 1 else None

    bias, gate, gate_bias, shift = part(0, OUT), part(1, OUT), part(2, OUT), part(3, OUT)
    weight, x = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(5, IN, dtype=torch.float64)
    times = torch.rand(5, 1, dtype=torch.float64)
    for tau in (times[0, 0], times):
        expected = x @ weight.t()
        if bias is not None:
            expected = expected + bias
        if gate is not None:
            inner = tau * gate if gate_bias is None else tau * gate + gate_bias
            expected = expected * torch.sigmoid(inner)
        if shift is not None:
            expected = expected + tau * shift
        layer = Given(Parts(weight, bias, gate, gate_bias, shift))
        torch.testing.assert_close(layer.affine(tau, None).value(x), expected)
    (affine,) = layer.affine(times[:1].unsqueeze(-1), None).folded().unbind(1)
    torch.testing.assert_close(affine.value(x), layer.affine(times[0, 0], None).value(x))


@pytest.mark.parametrize("name", LAYERS)
def test_parts_are_the_layer_s_tensors(name):
    layer = get_layer(name)(IN, OUT)
    parts = layer.parts()
    if name in LAYERS_OF_PLAIN_TIME:
        assert parts is None
        return
    assert parts.weight.shape == (OUT, IN)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert {p.untyped_storage().data_ptr() for p in parts if p is not None} == own


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in LAYERS_OF_PLAIN_TIME])
@pytest.mark.parametrize("fourier", [False, True])
def test_a_network_of_given_tensors(name, fourier):
    torch.manual_seed(0)
    field = MLP(IN, (OUT, 5), name, context=C, time=("fourier", FOURIER) if fourier else "t")
    field = field.double()
    given = [
        Parts(*(None if p is None else p.detach().clone().requires_grad_() for p in layer.parts()))
        for layer in field.layers
    ]
    twin = field.with_parts(given, context_width=OUT)
    assert not list(twin.parameters())
    assert twin.dtype == torch.float64
    assert has_forward_mode(twin)
    z, c = torch.randn(6, IN, dtype=torch.float64), torch.randn(6, C, dtype=torch.float64)
    t = torch.tensor(T, dtype=torch.float64)
    offset = c @ field.layers[0].context_weight.t()
    torch.testing.assert_close(twin(t, z, offset), field(t, z, c), rtol=1e-12, atol=1e-12)
    leaves = [p for parts in given for p in parts if p is not None]
    both = value_and_divergence(twin, t, z, context=offset)
    grads = torch.autograd.grad(sum(x.square().sum() for x in both), leaves, retain_graph=True)
    assert all(g.abs().max() > 0 for g in grads)
    times = torch.tensor([T, 0.8], dtype=torch.float64)
    first, _ = field.affines_at(times, z, c)
    other, _ = twin.affines_at(times, z, offset)
    torch.testing.assert_close(
        twin.value_at(other, z), field.value_at(first, z), rtol=1e-12, atol=1e-12
    )
    alone = field.with_parts(given)
    torch.testing.assert_close(alone(t, z), field(t, z, c * 0), rtol=1e-12, atol=1e-12)
