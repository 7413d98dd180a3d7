"""value_and_divergence against the field's Jacobian, by every route, and its derivatives."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from pycnf.nn import ACTIVATIONS, LAYERS, MLP, value_and_divergence
from pycnf.nn.divergence import _by_vjp
from pycnf.nn.fusion import why_not_fused
from pycnf.nn.tangents import value_and_tangents

DEPTHS = [(), (5,), (5, 4), (4, 5, 3)]
SMOOTH = [name for name in ACTIVATIONS if name != "relu"]


def double(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def jacobians(field, t, z, context=None):
    """∂f/∂z of every sample, [B, D, D], by autograd, row by row."""
    rows = []
    for i in range(z.shape[0]):
        ti = t[i : i + 1] if t.dim() else t
        ci = context[i : i + 1] if context is not None and context.dim() == 2 else context
        more = () if context is None else (ci,)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, ti=ti, more=more: field(ti, x[None], *more)[0], z[i]
        )
        rows.append(jacobian)
    return torch.stack(rows)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("hidden", DEPTHS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared-t", "t-per-sample"])
def test_divergence_is_that_of_the_jacobian(layer, hidden, per_sample):
    torch.manual_seed(0)
    field = MLP(3, hidden, layer=layer, context=2).double()
    z, context = double(4, 3), double(4, 2)
    t = torch.rand(4 if per_sample else (), dtype=torch.float64)
    jacobian = jacobians(field, t, z, context)
    value, exact = value_and_divergence(field, t, z, None, context)
    torch.testing.assert_close(value, field(t, z, context), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(exact, torch.einsum("bii->b", jacobian), rtol=1e-11, atol=1e-13)
    for count in (1, 3):
        probe = double(count, 4, 3)
        value, estimate = value_and_divergence(field, t, z, probe, context)
        expected = torch.einsum("kbi,bij,kbj->kb", probe, jacobian, probe).mean(0)
        torch.testing.assert_close(value, field(t, z, context), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(estimate, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", DEPTHS[1:])
def test_every_activation(activation, hidden):
    torch.manual_seed(0)
    field = MLP(3, hidden, activation=activation).double()
    z, t, probe = double(4, 3), torch.tensor(0.4, dtype=torch.float64), double(2, 4, 3)
    jacobian = jacobians(field, t, z)
    _, exact = value_and_divergence(field, t, z)
    torch.testing.assert_close(exact, torch.einsum("bii->b", jacobian), rtol=1e-11, atol=1e-13)
    _, estimate = value_and_divergence(field, t, z, probe)
    expected = torch.einsum("kbi,bij,kbj->kb", probe, jacobian, probe).mean(0)
    torch.testing.assert_close(estimate, expected, rtol=1e-11, atol=1e-13)


def differentiated(field, t, z, probe, context):
    """value_and_divergence as a function of everything it can be differentiated by."""
    names = [name for name, _ in field.named_parameters()]

    def function(t, z, probe, context, *parameters):
        twins = {f"field.{name}": parameter for name, parameter in zip(names, parameters)}
        return torch.func.functional_call(Divergence(field), twins, (t, z, probe, context))

    return function, (t, z, probe, context, *field.parameters())


class Divergence(nn.Module):
    """value_and_divergence as a module, so that functional_call can set the parameters."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, z, probe, context):
        return value_and_divergence(self.field, t, z, probe, context)


PROBES = {"exact": 0, "one-probe": 1, "two-probes": 2}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared-t", "t-per-sample"])
def test_gradcheck_of_every_layer(layer, probes, per_sample):
    torch.manual_seed(0)
    # Three hidden layers: the route without a closed form.
    field = MLP(2, (3, 2, 3), layer=layer, context=1).double()
    t = torch.rand(2 if per_sample else (), dtype=torch.float64).requires_grad_()
    probe = double(PROBES[probes], 2, 2, grad=True) if PROBES[probes] else None
    function, inputs = differentiated(field, t, double(2, 2, grad=True), probe, double(2, 1))
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("hidden", DEPTHS[1:])
def test_gradcheck_of_every_activation(activation, probes, hidden):
    torch.manual_seed(3)
    field = MLP(2, hidden, activation=activation).double()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    probe = double(PROBES[probes], 2, 2, grad=True) if PROBES[probes] else None
    function, inputs = differentiated(field, t, double(2, 2, grad=True), probe, None)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu"])
@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("hidden", [(2,), (2, 2), (2, 2, 2)])
def test_gradients_of_gradients(activation, probes, hidden):
    torch.manual_seed(0)
    field = MLP(2, hidden, activation=activation).double()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    probe = double(PROBES[probes], 1, 2, grad=True) if PROBES[probes] else None
    function, inputs = differentiated(field, t, double(1, 2, grad=True), probe, None)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("hidden", DEPTHS)
@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_routes_agree_and_so_do_their_gradients(hidden, probes, activation):
    """By hand or in closed form, by plain forward mode, by vector-Jacobian products."""
    torch.manual_seed(0)
    field = MLP(3, hidden, activation=activation).double()
    z, t = double(5, 3, grad=True), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    probe = double(PROBES[probes], 5, 3) if PROBES[probes] else None
    cotangents = double(5, 3), double(5)
    results = []
    for value, divergence in (
        value_and_divergence(field, t, z, probe),
        value_and_tangents(field.affines(t, z, None), field.activation, z, probe),
        _by_vjp(field, t, z, probe, None),
    ):
        inputs = (z, t, *field.parameters())
        gradients = torch.autograd.grad(
            (value, divergence), inputs, cotangents, allow_unused=True, materialize_grads=True
        )
        results.append((value, divergence, *gradients))
    for result in results[1:]:
        for got, expected in zip(result, results[0]):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


class Swirl(nn.Module):
    """A field that is not an MLP."""

    def __init__(self, features=3):
        super().__init__()
        self.inner = nn.Linear(features, 8)
        self.outer = nn.Linear(8, features)

    def forward(self, t, z):
        return self.outer(torch.sin(self.inner(z) + t.reshape(-1, 1)))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_gradients_of_a_module_by_vjp(count):
    torch.manual_seed(0)
    field = Swirl(2).double()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    probe = double(count, 2, 2, grad=True) if count else None
    function, inputs = differentiated(field, t, double(2, 2, grad=True), probe, None)

    def without_context(t, z, probe, *parameters):
        return function(t, z, probe, None, *parameters)

    assert gradcheck(without_context, (*inputs[:3], *inputs[4:]))
    if count < 2:
        assert gradgradcheck(without_context, (*inputs[:3], *inputs[4:]))


@pytest.mark.parametrize("make", [lambda: MLP(3, (8, 8, 8)), Swirl], ids=["mlp", "module"])
def test_exact_is_the_mean_of_unit_probes_and_k_probes_are_the_loop(make):
    torch.manual_seed(0)
    field = make().double()
    z, t = double(6, 3), torch.tensor(0.2, dtype=torch.float64)
    # sqrt(D) e_k for k = 1..D: the probes' covariance is the unit matrix.
    unit = (3**0.5 * torch.eye(3, dtype=torch.float64)).unsqueeze(1).expand(3, 6, 3)
    exact = value_and_divergence(field, t, z)[1]
    torch.testing.assert_close(value_and_divergence(field, t, z, unit)[1], exact)
    probe = double(4, 6, 3)
    loop = torch.stack([value_and_divergence(field, t, z, probe[k : k + 1])[1] for k in range(4)])
    batched = value_and_divergence(field, t, z, probe)[1]
    torch.testing.assert_close(batched, loop.mean(0), rtol=1e-12, atol=1e-14)


def test_hutchinson_is_unbiased():
    torch.manual_seed(0)
    field = MLP(4, (16, 16, 16)).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter *= 3
    z, t = double(3, 4), torch.tensor(0.2, dtype=torch.float64)
    exact = value_and_divergence(field, t, z)[1]
    for draw in (double, lambda *shape: double(*shape).sign()):
        probes = draw(6000, 3, 4)
        estimates = torch.stack(
            [value_and_divergence(field, t, z, p)[1] for p in probes.split(100)]
        ).detach()
        standard_error = estimates.std(0) / estimates.shape[0] ** 0.5
        assert ((estimates.mean(0) - exact).abs() < 4 * standard_error).all()
        assert (standard_error < 0.05 * (1 + exact.abs())).all()  # narrow enough to mean something


@pytest.mark.parametrize("make", [lambda: MLP(3, (8, 8, 8)), Swirl], ids=["mlp", "module"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_grad_gives_the_same_numbers_and_no_graph(make, count):
    torch.manual_seed(0)
    field = make().double()
    z, t = double(6, 3), torch.tensor(0.2, dtype=torch.float64)
    probe = double(count, 6, 3) if count else None
    expected = value_and_divergence(field, t, z, probe)
    assert all(x.requires_grad for x in expected)
    with torch.no_grad():
        got = value_and_divergence(field, t, z, probe)
    for a, b in zip(got, expected):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Cube(torch.autograd.Function):
    """z³ by a Function that vmap refuses (no setup_context, no vmap rule)."""

    calls = itertools.count()

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        next(Cube.calls)
        float(grad.sum())  # a host read: vmap cannot
        return 3 * z**2 * grad


def test_fields_vmap_cannot_batch_take_a_loop():
    def field(t, z):
        return Cube.apply(z) * (1 + t)

    z, t = double(5, 3), torch.tensor(1.0, dtype=torch.float64)
    before = next(Cube.calls)
    _, exact = value_and_divergence(field, t, z)
    assert next(Cube.calls) - before - 1 >= 3  # one pass per unit vector
    torch.testing.assert_close(exact, (6 * z**2).sum(-1))


def test_fields_that_do_not_depend_on_z():
    scale = double(3, grad=True)
    z, t = double(5, 3), torch.tensor(1.0, dtype=torch.float64)
    for field in (lambda t, z: scale.expand_as(z), lambda t, z: torch.ones_like(z)):
        for probe in (None, double(1, 5, 3), double(2, 5, 3)):
            value, divergence = value_and_divergence(field, t, z, probe)
            torch.testing.assert_close(value, field(t, z))
            assert torch.equal(divergence, torch.zeros(5, dtype=torch.float64))


def test_an_mlp_with_hooks_or_its_own_forward_is_called():
    z, t = double(5, 2), torch.tensor(0.3, dtype=torch.float64)
    calls = []
    field = MLP(2, (4,)).double()
    quiet = value_and_divergence(field, t, z)
    assert calls == []
    field.register_forward_hook(lambda module, inputs, output: calls.append("field"))
    heard = value_and_divergence(field, t, z)
    assert calls == ["field"]
    torch.testing.assert_close(heard, quiet)

    class Doubled(MLP):
        def forward(self, t, z, context=None):
            return 2 * super().forward(t, z, context)

    twice = Doubled(2, (4,)).double()
    twice.load_state_dict(field.state_dict())
    for a, b in zip(value_and_divergence(twice, t, z), quiet):
        torch.testing.assert_close(a, 2 * b)
    assert "forward of its own" in why_not_fused(twice)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        (lambda t, z: z, "plain callable"),
        (nn.Linear(2, 2), "the field is a Linear"),
        (MLP(2, layer="blend"), "a 'blend' layer"),
    ],
)
def test_the_reason_for_the_generic_engine(field, says):
    assert says in why_not_fused(field)
    assert why_not_fused(MLP(2)) is None


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("make", [lambda: MLP(3, (8, 8, 8)), Swirl], ids=["mlp", "module"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_batches(batch, make, count):
    field = make().double()
    probe = double(count, batch, 3) if count else None
    value, divergence = value_and_divergence(
        field, torch.zeros(()).double(), double(batch, 3), probe
    )
    assert (value.shape, divergence.shape) == ((batch, 3), (batch,))
    (value.sum() + divergence.sum()).backward()
    assert all(parameter.grad is not None for parameter in field.parameters())


T0 = torch.tensor(0.0)
Z = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((T0, torch.zeros(2)), ValueError, r"z: got shape \(2,\), expected \[B, D\]"),
        ((T0, Z, Z), ValueError, r"probe: got shape \(4, 2\), expected \[K, 4, 2\]"),
        ((T0, Z, Z[None, :3]), ValueError, r"probe: got shape \(1, 3, 2\)"),
        ((T0, Z, Z[None].double()), TypeError, "probe: got torch.float64, expected z's"),
    ],
)
@pytest.mark.parametrize("field", [MLP(2, (4,)), lambda t, z: z], ids=["mlp", "callable"])
def test_bad_input(field, arguments, error, says):
    with pytest.raises(error, match=says):
        value_and_divergence(field, *arguments)


def test_a_field_of_another_shape():
    with pytest.raises(ValueError, match=r"field: returned shape \(4, 1\), expected z's \(4, 2\)"):
        value_and_divergence(lambda t, z: z[:, :1], T0, Z)
