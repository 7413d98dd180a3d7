"""Modules of other makes as fields of the fused engine: the same numbers, or a sentence why not."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from pycnf.flows import CNF
from pycnf.nn import MLP, fuse
from pycnf.nn.fusion import recognise, why_not_fused
from pycnf.nn.layers import Parts, TimeLayer

D, H = 3, 7


# ---- stand-ins: written here, laid out as those of the field's repositories --------------------


def network(inputs, activation=nn.Tanh, bias=True, outputs=D):
    return nn.Sequential(
        nn.Linear(inputs, H, bias=bias),
        activation(),
        nn.Linear(H, 5),
        activation(),
        nn.Linear(5, outputs, bias=bias),
    )


class TimeFirst(nn.Module):
    """A field as people write it."""

    def __init__(self):
        super().__init__()
        self.net = network(D + 1)
        self.nfe = 0

    def forward(self, t, z):
        self.nfe += 1
        return self.net(torch.cat((t.expand(len(z), 1), z), 1))


class Autonomous(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network(D, nn.Softplus)

    def forward(self, t, z):
        return self.net(z)


class FlowMatchingMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network(D + 1, nn.SELU)

    def forward(self, x):
        return self.net(x)


class Wrapper(nn.Module):
    """TorchCFM's, around a model of [x; t]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, t, x, *args, **kwargs):
        return self.model(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))


class DiffeqLayer(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.make(n_in, n_out)


class IgnoreLinear(DiffeqLayer):
    def make(self, n_in, n_out):
        self._layer = nn.Linear(n_in, n_out)

    def forward(self, t, x):
        return self._layer(x)


class ConcatLinear(DiffeqLayer):
    def make(self, n_in, n_out):
        self._layer = nn.Linear(n_in + 1, n_out)

    def forward(self, t, x):
        return self._layer(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))


class ConcatLinearV2(DiffeqLayer):
    def make(self, n_in, n_out):
        self._layer = nn.Linear(n_in, n_out)
        self._hyper_bias = nn.Linear(1, n_out, bias=False)

    def forward(self, t, x):
        return self._layer(x) + self._hyper_bias(t.view(1, 1))


class SquashLinear(DiffeqLayer):
    def make(self, n_in, n_out):
        self._layer = nn.Linear(n_in, n_out)
        self._hyper = nn.Linear(1, n_out)

    def forward(self, t, x):
        return self._layer(x) * torch.sigmoid(self._hyper(t.view(1, 1)))


class ConcatSquashLinear(DiffeqLayer):
    def make(self, n_in, n_out):
        self._layer = nn.Linear(n_in, n_out)
        self._hyper_bias = nn.Linear(1, n_out, bias=False)
        self._hyper_gate = nn.Linear(1, n_out)

    def forward(self, t, x):
        gate = torch.sigmoid(self._hyper_gate(t.view(1, 1)))
        return self._layer(x) * gate + self._hyper_bias(t.view(1, 1))


class BlendLinear(DiffeqLayer):
    def make(self, n_in, n_out):
        self._layer0, self._layer1 = nn.Linear(n_in, n_out), nn.Linear(n_in, n_out)

    def forward(self, t, x):
        return torch.lerp(self._layer0(x), self._layer1(x), t)


class ODEnet(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        widths = [D, *[H] * (len(kinds) - 1), D]
        shared = nn.Softplus()
        self.layers = nn.ModuleList(
            kind(a, b) for kind, a, b in zip(kinds, widths[:-1], widths[1:])
        )
        self.activation_fns = nn.ModuleList([shared] * (len(kinds) - 1))

    def forward(self, t, y):
        for i, layer in enumerate(self.layers):
            y = layer(t, y)
            if i < len(self.activation_fns):
                y = self.activation_fns[i](y)
        return y


class ODEfunc(nn.Module):
    """FFJORD's field of the state and its log-density, around a diffeq."""

    def __init__(self, diffeq, residual=False):
        super().__init__()
        self.diffeq = diffeq
        self.residual = residual
        self.register_buffer("_num_evals", torch.tensor(0.0))

    def before_odeint(self, e=None):
        self._num_evals.fill_(0)

    def forward(self, t, states):
        raise AssertionError("not the field")


class Linear(nn.Module):
    """zuko's own linear layer has torch's name and parameters."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class ZukoMLP(nn.Sequential):
    pass


class FFJTransform(nn.Module):
    def __init__(self, context=0, freqs=3):
        super().__init__()
        width = D + context + 2 * freqs
        self.ode = ZukoMLP(Linear(width, H), nn.ELU(), Linear(H, H), nn.ELU(), Linear(H, D))
        self.register_buffer("times", torch.tensor((0.0, 1.0)))
        freqs = torch.arange(1, freqs + 1, dtype=torch.float64) * math.pi
        self.register_buffer("freqs", freqs)

    def f(self, t, x, c=None):
        angle = self.freqs * t[..., None]
        t = torch.cat((angle.cos(), angle.sin()), -1).expand(len(x), -1)
        return self.ode(torch.cat((t, x) if c is None else (t, x, c.expand(len(x), -1)), -1))

    def forward(self, c=None):
        raise AssertionError("not the field")


ODENET_KINDS = {
    "ignore": [IgnoreLinear] * 3,
    "concat": [ConcatLinear] * 3,
    "concat_v2": [ConcatLinearV2] * 3,
    "squash": [SquashLinear] * 3,
    "concatsquash": [ConcatSquashLinear] * 4,
    "mixed": [ConcatSquashLinear, ConcatLinear, IgnoreLinear, SquashLinear],
    "one layer": [ConcatLinear],
}

# Each is a module, what to call it by as f(t, z), and fuse's keywords.
LAYOUTS = {
    "Sequential": lambda: (m := network(D, bias=False), lambda t, z: m(z), {}),
    "time first": lambda: (
        m := nn.Sequential(network(D + 1, nn.SiLU), nn.Identity()),
        lambda t, z: m(torch.cat((t.expand(len(z), 1), z), 1)),
        {"time": "first"},
    ),
    "time last": lambda: (
        m := network(D + 1, nn.GELU),
        lambda t, z: m(torch.cat((z, t.expand(len(z), 1)), 1)),
        {"time": "last"},
    ),
    "a model of [x; t]": lambda: (
        m := FlowMatchingMLP(),
        lambda t, z: m(torch.cat((z, t.expand(len(z), 1)), 1)),
        {"time": "last"},
    ),
    "one Linear": lambda: (m := nn.Linear(D, D), lambda t, z: m(z), {}),
    "no activation": lambda: (
        m := nn.Sequential(nn.Linear(D, H), nn.Linear(H, D, bias=False)),
        lambda t, z: m(z),
        {},
    ),
    "f(t, z), time first": lambda: (m := TimeFirst(), m, {}),
    "f(t, z), no time": lambda: (m := Autonomous(), m, {}),
    "f(t, z), time last": lambda: (m := Wrapper(FlowMatchingMLP()), m, {}),
    "f(t, z), a wrapper of a network": lambda: (m := Wrapper(network(D + 1, nn.ReLU)), m, {}),
    "ODEfunc": lambda: (m := ODEfunc(ODEnet([ConcatSquashLinear] * 3)), m.diffeq, {}),
    "zuko": lambda: (m := FFJTransform(), m.f, {}),
    **{
        f"ODEnet, {name}": lambda kinds=kinds: (m := ODEnet(kinds), m, {})
        for name, kinds in ODENET_KINDS.items()
    },
}


def made(layout):
    torch.manual_seed(0)
    module, call, keywords = LAYOUTS[layout]()
    return module.double(), call, keywords


def points(batch=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, D, dtype=torch.float64, generator=generator)


def assert_same_field(call, field, module, t=0.37):
    """Values, and gradients by time, state and parameters."""
    t = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    z = points().requires_grad_()
    inputs = [z, *module.parameters()]
    got, expected = (
        torch.autograd.grad(
            (value * points(seed=2)).sum(), [t, *inputs], allow_unused=True, materialize_grads=True
        )
        for value in (field(t, z), call(t, z))
    )
    torch.testing.assert_close(field(t, z), call(t, z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_field_is_the_module(layout):
    module, call, keywords = made(layout)
    field = fuse(module, **keywords)
    assert isinstance(field, MLP)
    assert why_not_fused(field) is None
    own = {id(p) for p in module.parameters()}
    assert {id(p) for p in field.parameters()} == own
    assert all(p.grad is None for p in module.parameters())
    assert_same_field(call, field, module)
    for layer in field.layers:
        parts = layer.parts()
        assert parts.weight.shape == (layer.out_features, layer.in_features)
        assert all(x is None or x.shape[0] == layer.out_features for x in parts)
        assert parts.gate_weight is None or parts.gate_weight.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_changes_of_the_module_are_seen(layout):
    module, call, keywords = made(layout)
    field = fuse(module, **keywords)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = field(torch.tensor(0.2), points())
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(field(torch.tensor(0.2), points()), before)
    assert_same_field(call, field, module)
    module.load_state_dict(made(layout)[0].state_dict())
    torch.testing.assert_close(field(torch.tensor(0.2), points()), before, rtol=0, atol=0)
    module.float()
    assert field.dtype == torch.float32
    t, z = torch.tensor(0.2), points().float()
    torch.testing.assert_close(field(t, z), call(t, z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [{"divergence": "exact"}, {"probes": 2}], ids=["exact", "probes"])
def test_flow_of_a_fused_field(layout, kind):
    module, call, keywords = made(layout)
    outcomes = []
    for field, engine in ((fuse(module, **keywords), "fused"), (call, "generic")):
        flow = CNF(field, engine=engine, **kind)
        x = points().requires_grad_()
        z, logdet = flow(x, seed=None if "divergence" in kind else 3)
        loss = (z * points(seed=2)).sum() + logdet.square().sum()
        outcomes.append([z, logdet, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_and_state_dicts(layout):
    module, _, keywords = made(layout)
    field = fuse(module, **keywords)
    t, z = torch.tensor(0.4), points()
    twins = [copy.deepcopy(field), pickle.loads(pickle.dumps(field))]
    other = fuse(copy.deepcopy(module), **keywords)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(field.state_dict())
    expected = field(t, z)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    for twin in (*twins, other):
        assert torch.equal(twin(t, z), expected)
    assert not torch.equal(field(t, z), expected)


def test_zuko_with_context():
    torch.manual_seed(0)
    module = FFJTransform(context=2).double()
    field = fuse(module)
    t, z, c = torch.tensor(0.3), points(), torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(field(t, z, c), module.f(t, z, c), rtol=1e-12, atol=1e-12)
    flows = [CNF(field, engine="fused"), CNF(module.f, engine="generic")]
    for got, expected in zip(*(flow(z, c, seed=1) for flow in flows)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_zuko_itself():
    zuko = pytest.importorskip("zuko")
    transform = zuko.flows.CNF(D, freqs=2, hidden_features=(H, H)).transform
    field = fuse(transform)
    t, z = torch.tensor(0.3), points().float()
    torch.testing.assert_close(field(t, z), transform.f(t, z))
    # Frequencies rounded to f32 are other frequencies in f64.
    with pytest.raises(ValueError, match=r"frequencies are not π, 2π, … as torch.float64 has them"):
        fuse(transform.double())


@pytest.mark.parametrize("activation", [nn.Softplus, nn.ELU, nn.SELU, nn.ReLU, nn.Tanh])
def test_one_activation_module_used_twice(activation):
    shared = activation()
    module = nn.Sequential(nn.Linear(D, H), shared, nn.Linear(H, H), shared, nn.Linear(H, D))
    assert_same_field(lambda t, z: module(z), fuse(module.double()), module)


def test_shared_and_frozen_parameters():
    module = network(D).double()
    module.append(nn.Tanh()).append(module[4]).append(nn.Tanh()).append(nn.Linear(D, D).double())
    module[4] = module[6] = nn.Linear(5, 5).double()
    module[8] = nn.Linear(5, D).double()
    module[0].weight.requires_grad_(False)
    before = [p.clone() for p in module.parameters()]
    field = fuse(module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    torch.testing.assert_close(field(torch.tensor(0.0), points()), module(points()))
    assert not field.layers[0].parts().weight.requires_grad


def test_recognising_leaves_no_trace():
    module = TimeFirst().double()
    module.nfe = 5
    parameters, values = list(module.parameters()), [p.clone() for p in module.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert isinstance(recognise(module), MLP)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.nfe == 5
    assert module.training
    for p, same, value in zip(module.parameters(), parameters, values, strict=True):
        assert p is same
        assert torch.equal(p, value)
        assert p.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_wide_networks_in_every_dtype(dtype):
    module = Wrapper(nn.Sequential(nn.Linear(65, 512), nn.SiLU(), nn.Linear(512, 64))).to(dtype)
    assert isinstance(recognise(module), MLP)


def test_time_is_found_whatever_the_parameters():
    """Of a last layer of zeros every place of the time would do, today."""
    module = Wrapper(network(D + 1)).double()
    nn.init.zeros_(module.model[4].weight)
    nn.init.zeros_(module.model[4].bias)
    field = recognise(module)
    assert field.layers[0].time == "last"
    nn.init.ones_(module.model[4].weight)
    torch.testing.assert_close(
        field(torch.tensor(0.5), points()), module(torch.tensor(0.5), points())
    )


def test_recognising_under_other_defaults():
    module = TimeFirst()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
        assert isinstance(recognise(module), MLP)


def test_an_mlp_is_recognised_as_itself():
    field = MLP(2)
    assert recognise(field) is field


# ---- refusals ----------------------------------------------------------------------------------


class Scaled(Autonomous):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Buffered(Autonomous):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))


class Residual(Autonomous):
    def forward(self, t, z):
        return z + self.net(z)


class OfTimeToo(Autonomous):
    def forward(self, t, z):
        return self.net(z) * t


class Later(Autonomous):
    def forward(self, t, z):
        return self.net(z) if t < 0.9 else -self.net(z)


class LiarODEnet(ODEnet):
    def forward(self, t, y):
        return -super().forward(t, y)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = network(D), network(D)

    def forward(self, t, z):
        return self.a(z) + self.b(z)


class Gathering(Autonomous):
    def forward(self, t, z):
        return self.net(z).sum(1)


class Broken(Autonomous):
    def forward(self, t, z):
        raise KeyError("boo")


def with_hook(module, submodule):
    module.get_submodule(submodule).register_forward_hook(lambda *_: None)
    return module


def with_blend():
    return ODEnet([ConcatLinear, BlendLinear, ConcatLinear])


def with_shift_bias():
    module = ODEnet([ConcatLinearV2] * 2)
    module.layers[1]._hyper_bias = nn.Linear(1, D)
    return module


def with_lambda():
    module = ODEnet([ConcatLinear] * 2)
    module.activation_fns[0] = Autonomous()
    return module


def in_sequence(*modules):
    module = Autonomous()
    module.net = nn.Sequential(*modules)
    return module


def linear():
    return nn.Linear(D, D)


def mixed_dtypes():
    module = Autonomous()
    module.net[0].double()
    return module


REFUSALS = {
    "a lambda": (lambda: lambda t, z: z, "the field is a plain callable (function), no module"),
    "a Sequential": (lambda: network(D), "the field is a Sequential, a function of one argument"),
    "batch norm": (
        lambda: in_sequence(linear(), nn.Tanh(), linear(), nn.BatchNorm1d(D), linear()),
        "layer net.3 is a BatchNorm1d, which is neither Linear nor a known activation",
    ),
    "dropout": (
        lambda: in_sequence(linear(), nn.Dropout(0.0), linear()),
        "layer net.1 is a Dropout, which is neither",
    ),
    "two activations": (
        lambda: in_sequence(linear(), nn.Tanh(), linear(), nn.ReLU(), linear()),
        "layer net.3 has the activation relu, and layer net.1 tanh: the fused engine has one",
    ),
    "an activation and none": (
        lambda: in_sequence(linear(), nn.Tanh(), linear(), linear()),
        "layer net.3 has the activation identity, and layer net.1 tanh",
    ),
    "an activation twice": (
        lambda: in_sequence(linear(), nn.Tanh(), nn.Tanh(), linear()),
        "layer net.2 is a Tanh, expected a Linear there",
    ),
    "an activation first": (
        lambda: in_sequence(nn.Tanh(), linear()),
        "layer net.0 is a Tanh, expected a Linear there",
    ),
    "an activation last": (
        lambda: in_sequence(linear(), nn.Tanh()),
        "layer net.1 is a Tanh after the last Linear",
    ),
    "softplus": (
        lambda: in_sequence(linear(), nn.Softplus(beta=2), linear()),
        "layer net.1 is a Softplus with beta=2, expected 1",
    ),
    "gelu": (
        lambda: in_sequence(linear(), nn.GELU(approximate="tanh"), linear()),
        "layer net.1 is a GELU with approximate='tanh', expected 'none'",
    ),
    "elu": (
        lambda: in_sequence(linear(), nn.ELU(0.5), linear()),
        "layer net.1 is an ELU with alpha=0.5, expected 1",
    ),
    "widths": (
        lambda: in_sequence(nn.Linear(D, 9), nn.Linear(8, D)),
        "layer net.1 has 8 inputs, expected the 9 outputs of the one before",
    ),
    "nothing": (lambda: in_sequence(), "layer net has no Linear layers"),
    "two inputs more": (
        lambda: in_sequence(nn.Linear(D + 2, D)),
        f"layer net has {D + 2} inputs and {D} outputs, expected as many inputs or one more for t",
    ),
    "a parameter": (Scaled, "the field, a Scaled, has a tensor 'scale' of its own"),
    "a buffer": (Buffered, "the field, a Buffered, has a tensor 'mean' of its own"),
    "two networks": (Two, "the field, a Two, has 2 submodules; expected one, a Sequential"),
    "an activation alone": (lambda: nn.Tanh(), "the field is a Tanh"),
    "a hook": (lambda: with_hook(Autonomous(), "net.1"), "layer net.1 has hooks"),
    "a hook on all": (lambda: with_hook(Autonomous(), ""), "the field has hooks"),
    "weight norm": (
        lambda: in_sequence(nn.utils.parametrizations.weight_norm(linear())),
        "layer net.0 is a ParametrizedLinear, which is neither",
    ),
    "data parallel": (
        lambda: nn.DataParallel(Autonomous()),
        "the field is a DataParallel",
    ),
    "compiled": (lambda: torch.compile(Autonomous()), "the field is an OptimizedModule"),
    "dtypes": (mixed_dtypes, "the field's parameters differ in dtype or device"),
    "meta": (lambda: Autonomous().to("meta"), "on the meta device and have no values"),
    "residual": (Residual, "computes something else than its layers in a row do of z"),
    "of time too": (OfTimeToo, "computes something else than its layers in a row do of z"),
    "at some times": (Later, "computes something else than its layers in a row do of z"),
    "a liar": (
        lambda: LiarODEnet([ConcatLinear] * 2),
        "computes something else than its layers in a row do of [t; z]",
    ),
    "a time of its own": (
        lambda: Wrapper(network(D + 1, outputs=D)).double().apply(doubled_time),
        "computes something else than its layers in a row do of [t; z] or of [z; t]",
    ),
    "another shape": (Gathering, "calling the field returned shape (8,), expected z's shape"),
    "an exception": (Broken, "calling the field raised KeyError: 'boo'"),
    "blend": (with_blend, "layer layers.1 is a BlendLinear, none of FFJORD's layers ignore"),
    "a shift with a bias": (with_shift_bias, "layer layers.1 has a shift with a bias"),
    "an unknown activation": (with_lambda, "layer activation_fns.0 is an Autonomous, which is"),
}


def doubled_time(module):
    if isinstance(module, Wrapper):
        forward = module.forward
        module.forward = lambda t, z: forward(2 * t, z)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    make, says = REFUSALS[case]
    field = make()
    why = recognise(field)
    assert isinstance(why, str)
    assert says in why
    assert "\n" not in why
    if case != "a Sequential":
        with pytest.raises(ValueError, match="module: ") as error:
            fuse(field)
        assert says in str(error.value)


def test_refusals_of_fuse():
    with pytest.raises(ValueError, match="time: got 'middle', expected None or one of none, first"):
        fuse(network(D), time="middle")
    with pytest.raises(ValueError, match=r"one input more than its 3 outputs: say time='first' or"):
        fuse(network(D + 1))
    with pytest.raises(ValueError, match="has 3 inputs and 3 outputs, expected one more input"):
        fuse(network(D), time="last")
    with pytest.raises(ValueError, match="has 4 inputs and 3 outputs, expected as many inputs"):
        fuse(network(D + 1), time="none")
    with pytest.raises(ValueError, match="calling the field raised TypeError"):
        fuse(FlowMatchingMLP())  # of one argument, and no time said
    with pytest.raises(ValueError, match="residual=True subtracts z"):
        fuse(ODEfunc(ODEnet([ConcatLinear] * 2), residual=True))
    with pytest.raises(ValueError, match="expected a module"):
        fuse(torch.sin, time="none")


def test_hooks_on_what_a_fused_field_uses():
    module = Autonomous()
    field = fuse(module)
    module.net[2].register_forward_hook(lambda *_: None)
    assert "hooks" in why_not_fused(field)


def test_rows_that_are_not_contiguous():
    module = network(D).double()
    module[2].weight = nn.Parameter(torch.randn(H, 5).t().double())
    flows = [CNF(fuse(module), engine=engine) for engine in ("fused", "generic")]
    x = torch.randn(7, D, dtype=torch.float64)
    found = []
    for flow in flows:
        log_prob = flow.log_prob(x, seed=1)
        found.append([log_prob, *torch.autograd.grad(log_prob.sum(), list(module.parameters()))])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


class Named(TimeLayer):
    """A layer type of a user's, whose weight has another name."""

    def make_parameters(self):
        self.kernel = nn.Parameter(torch.randn(self.out_features, self.in_features) / 3)

    def parts(self):
        return Parts(self.kernel)


def test_layer_types_of_ones_own_are_fused():
    field = MLP.of_layers([Named(D, 5), Named(5, D)], "tanh").double()
    assert field.dtype == torch.float64
    fused = CNF(field, engine="fused")(points(), seed=3)
    generic = CNF(field, engine="generic")(points(), seed=3)
    for mine, other in zip(fused, generic, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_a_module_that_knows_its_parent_is_refused_and_not_walked_for_ever():
    module = nn.Module()
    module.child = nn.Linear(2, 2)
    module.child.parent = module
    module.forward = module.child.forward
    with pytest.raises(ValueError, match=r"\w"):
        fuse(module, time="none")
    module.child.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hook"):
        fuse(module, time="none")
