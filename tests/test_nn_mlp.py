"""The MLP field: its evaluation, its times, and what it says to bad input."""

import copy
import pickle

import pytest
import torch

from pycnf.nn import LAYERS, MLP
from pycnf.nn.layers import LAYERS_OF_PLAIN_TIME as OF_PLAIN_TIME


def written_out(field, t, z, context=None):
    """The network, layer by layer, activation after all but the last."""
    tau = field._features_of(t.expand(z.shape[0]))
    for i, layer in enumerate(field.layers):
        z = layer.affine(tau, context if i == 0 else None).value(z)
        if i < len(field.layers) - 1:
            z = field.activation.value(z)
    return z


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("hidden", [(), (5,), (4, 5, 6)])
def test_forward(layer, hidden):
    torch.manual_seed(0)
    field = MLP(3, hidden, layer=layer, context=2).double()
    assert len(field.layers) == len(hidden) + 1
    z = torch.randn(7, 3, dtype=torch.float64)
    context = torch.randn(7, 2, dtype=torch.float64)
    t = torch.tensor(0.4, dtype=torch.float64)
    expected = written_out(field, t, z, context)
    torch.testing.assert_close(field(t, z, context), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(field(0.4, z, context), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(field(t.expand(7), z, context), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("layer", "fourier"),
    [(name, f) for name in LAYERS for f in (False, True) if not (f and name in OF_PLAIN_TIME)],
)
@pytest.mark.parametrize("context", [None, "shared", "per-sample"])
def test_layers_at_many_times_are_the_layers_at_each(layer, context, fourier):
    time = ("fourier", 4) if fourier else "t"
    field = MLP(3, (4, 5), layer=layer, context=2 if context else 0, time=time).double()
    shape = {None: None, "shared": (2,), "per-sample": (5, 2)}[context]
    c = torch.randn(shape, dtype=torch.float64) if shape else None
    z = torch.randn(5, 3, dtype=torch.float64)
    times = torch.tensor([0.1, 0.5, 0.5, 0.9], dtype=torch.float64)
    many = field.affines_at(times, z, c)
    assert len(many) == 4
    for t, affines in zip(times, many):
        for got, expected in zip(affines, field.affines(t, z, c)):
            torch.testing.assert_close(got.weight, expected.weight, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(got.shift, expected.shift, rtol=1e-12, atol=1e-15)
            assert got.gate is None


def test_fourier_features_are_zukos():
    """zuko: freqs = π·(1..n); features cat(cos(freqs·t), sin(freqs·t))."""
    field = MLP(2, (3,), time=("fourier", 6))
    t = torch.tensor([0.0, 0.25, 1.0])
    freqs = torch.arange(1, 4) * torch.pi
    expected = torch.cat(((freqs * t[:, None]).cos(), (freqs * t[:, None]).sin()), -1)
    torch.testing.assert_close(field._features_of(t), expected)


def test_fourier_features_gain_precision_with_double():
    """The frequencies are whole numbers until use: nothing of f32's π remains after .double()."""
    field = MLP(2, (3,), time=("fourier", 8)).double()
    got = field._features_of(torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(got[4:], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_one_layer_type_for_each_layer():
    """zuko's network sees the time at its input only."""
    field = MLP(2, (8, 8), layer=("concat", "ignore", "ignore"))
    assert [tuple(layer.weight.shape) for layer in field.layers] == [(8, 3), (8, 8), (2, 8)]


def test_state_dict_has_the_parameters_of_the_table_and_no_more():
    field = MLP(2, (3,), layer="concatsquash", context=4, time=("fourier", 2))
    one = {"weight", "bias", "gate_weight", "gate_bias", "shift_weight"}
    expected = {f"layers.{i}.{name}" for i in (0, 1) for name in one}
    assert set(field.state_dict()) == expected | {"layers.0.context_weight"}


def test_copies_are_independent_and_equal():
    field = MLP(2, (4,), activation="silu", time=("fourier", 2))
    t, z = torch.tensor(0.3), torch.randn(5, 2)
    for twin in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
        assert torch.equal(twin(t, z), field(t, z))
        before = field(t, z)
        with torch.no_grad():
            twin.layers[0].weight.zero_()
        assert torch.equal(field(t, z), before)
        assert not torch.equal(twin(t, z), before)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    field = MLP(2, (4,))
    assert field(torch.tensor(0.1), torch.randn(batch, 2)).shape == (batch, 2)
    assert field(torch.rand(batch), torch.randn(batch, 2)).shape == (batch, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"features": 0}, ValueError, "features: got 0, expected a whole number of at least 1"),
        ({"features": 2.0}, TypeError, "features: got 2.0"),
        ({"hidden": (4, 0)}, ValueError, "hidden: got 0"),
        ({"hidden": 4}, TypeError, "hidden: got 4, expected a sequence"),
        ({"layer": "concatt"}, ValueError, "layer: got 'concatt'"),
        ({"layer": ("concat",)}, ValueError, "layer: got 1 layer types, expected 2"),
        ({"activation": "tan"}, ValueError, "activation: got 'tan'"),
        ({"context": -1}, ValueError, "context: got -1"),
        ({"time": "x"}, ValueError, "time: got 'x', expected 't' or"),
        ({"time": ("fourier", 3)}, ValueError, "time: got 3 Fourier features, expected an even"),
        ({"time": ("fourier", 2), "layer": "blend"}, ValueError, "layer 'blend'"),
    ],
)
def test_bad_construction(arguments, error, says):
    with pytest.raises(error, match=says):
        MLP(**{"features": 2, "hidden": (4,), **arguments})


T0 = torch.tensor(0.0)


@pytest.mark.parametrize(
    ("context", "arguments", "error", "says"),
    [
        (0, (T0, torch.zeros(3)), ValueError, r"z: got shape \(3,\), expected \[B, 2\]"),
        (0, (T0, torch.zeros(4, 3)), ValueError, r"z: got shape \(4, 3\)"),
        (0, (T0, torch.zeros(4, 2).double()), TypeError, "z: got torch.float64, expected the"),
        (0, (torch.zeros(3), torch.zeros(4, 2)), ValueError, r"t: got shape \(3,\)"),
        (0, (T0, torch.zeros(4, 2), torch.zeros(1)), ValueError, "expected None: the field was"),
        (3, (T0, torch.zeros(4, 2)), ValueError, r"context: got None, expected \[B, 3\]"),
        (3, (T0, torch.zeros(4, 2), torch.zeros(2, 3)), ValueError, r"context: got shape \(2, 3"),
        (3, (T0, torch.zeros(4, 2), torch.zeros(3).double()), TypeError, "context: got torch.fl"),
    ],
)
def test_bad_call(context, arguments, error, says):
    with pytest.raises(error, match=says):
        MLP(2, (4,), context=context)(*arguments)
