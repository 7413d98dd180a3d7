"""Activations: values against torch's modules, derivatives against autograd."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pycnf.nn.activation import ACTIVATIONS, get_activation

MODULES = {
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
    "selu": nn.SELU(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "sin": torch.sin,
    "square": torch.square,
    "identity": nn.Identity(),
}
# Both sides of zero and no kink; the tails are where formulas cancel or overflow.
POINTS = torch.tensor([-30.0, -6.0, -1.3, -0.2, 0.1, 0.9, 2.5, 7.0, 15.0], dtype=torch.float64)


def test_every_activation_is_compared():
    assert set(MODULES) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_is_torchs(name):
    torch.testing.assert_close(get_activation(name).value(POINTS), MODULES[name](POINTS))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_and_curvature_are_autograds(name):
    activation = get_activation(name)
    h = POINTS.clone().requires_grad_()
    a = MODULES[name](h)
    (slope,) = torch.autograd.grad(a.sum(), h, create_graph=True)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), h)
    else:
        curvature = torch.zeros_like(h)
    mine = activation.slope(POINTS, activation.value(POINTS))
    torch.testing.assert_close(mine, slope.detach(), rtol=1e-12, atol=1e-13)
    if activation.curvature is None:
        assert torch.count_nonzero(curvature) == 0
    else:
        bent = activation.curvature(POINTS, activation.value(POINTS), mine)
        torch.testing.assert_close(bent, curvature, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_differentiates_to_curvature(name):
    """Gradients of gradients go through `slope` as autograd sees it."""
    activation = get_activation(name)
    h = POINTS.clone().requires_grad_()
    slope = activation.slope(h, activation.value(h))
    if activation.curvature is None:
        assert not slope.requires_grad
        return
    (bent,) = torch.autograd.grad(slope.sum(), h)
    expected = activation.curvature(h, activation.value(h), slope).detach()
    torch.testing.assert_close(bent, expected, rtol=1e-11, atol=1e-13)


def test_swish_is_silu_and_copies_are_the_same_object():
    silu = get_activation("silu")
    assert get_activation("swish") is silu
    assert copy.deepcopy(silu) is silu
    assert pickle.loads(pickle.dumps(silu)) is silu


@pytest.mark.parametrize(("name", "says"), [("tahn", "mean 'tanh'"), (3, "expected one of")])
def test_unknown_name_lists_the_names(name, says):
    with pytest.raises(ValueError, match=says):
        get_activation(name)
