"""The ops that evaluate a field against the plain formulas: values, and gradients to any order."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pycnf import _ops
from pycnf.nn import ACTIVATIONS, MLP, closed_form, divergence, value_and_divergence
from pycnf.nn import kernels as compiled
from pycnf.nn.field_ops import exact_divergence, field_arguments, gains, serves
from pycnf.nn.tangents import push_forward, value_and_tangents

F64 = torch.float64
LAYERS = ("ignore", "concat", "concat_v2", "squash", "concatsquash")
SMOOTH = [name for name in ACTIVATIONS if name != "relu"]
# The activations' own bound, and sums in another order.
TOLERANCE = 1e-12


def field_of(features=3, hidden=(5, 4), seed=0, **settings):
    torch.manual_seed(seed)
    return MLP(features, hidden, **settings).double()


def normal(*shape, seed=1, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).requires_grad_(grad)


def time(batch=None):
    return torch.tensor(0.3, dtype=F64) if batch is None else normal(batch, seed=9)


def close(got, expected, tolerance=TOLERANCE):
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


# ---- the four evaluations, and the same in plain operations --------------------------------------


def plain_value(field, t, z, context):
    return (field.value_at(field.affines(t, z, context), z),)


def plain_jvp(field, t, z, tangents, context):
    return push_forward(field.affines(t, z, context), field.activation, z, tangents)


def plain_divergence(field, t, z, probe, context):
    return value_and_tangents(field.affines(t, z, context), field.activation, z, probe)


KINDS = {
    "value": (
        lambda field, t, z, _, context: (compiled.mlp_value(field, t, z, context),),
        lambda field, t, z, _, context: plain_value(field, t, z, context),
    ),
    "jvp": (compiled.mlp_value_jvp, plain_jvp),
    "vjp": (compiled.mlp_vjp, divergence.value_and_products),
    "probes": (compiled.mlp_value_divergence, plain_divergence),
    "exact": (
        lambda field, t, z, _, context: compiled.mlp_value_divergence(field, t, z, None, context),
        lambda field, t, z, _, context: plain_divergence(field, t, z, None, context),
    ),
}


def compare(kind, field, t, z, columns, context=None, tolerance=TOLERANCE):
    """Values, and gradients of a loss that sees every result, by every input."""
    outcomes = []
    for function in KINDS[kind]:
        given = [
            x if x is None else x.detach().as_strided(x.size(), x.stride()).requires_grad_()
            for x in (t, z, columns, context)
        ]
        results = function(field, *given)
        assert serves(field, t, z, columns, context)
        inputs = [x for x in (*given, *field.parameters()) if x is not None]
        bars = [normal(*x.shape, seed=20 + i) for i, x in enumerate(results)]
        gradients = torch.autograd.grad(
            results, inputs, bars, allow_unused=True, materialize_grads=True
        )
        outcomes.append([*results, *gradients])
    for got, expected in zip(*outcomes, strict=True):
        close(got, expected, tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [(), (1,), (5,), (5, 4), (17, 33, 16)])
@pytest.mark.parametrize("features", [1, 2, 3, 16, 17])
def test_shapes(kind, hidden, features):
    for batch, count in [(1, 1), (15, 2), (16, 1), (17, 3), (33, 1), (70, 2)]:
        field = field_of(features, hidden)
        z, columns = normal(batch, features), normal(count, batch, features, seed=2)
        compare(kind, field, time(), z, columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(5,), (5, 4), (5, 4, 6)])
def test_activations(kind, activation, hidden):
    field = field_of(hidden=hidden, activation=activation)
    compare(kind, field, time(), 3 * normal(9, 3), normal(2, 9, 3, seed=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [*LAYERS, ("ignore", "concatsquash", "squash")])
@pytest.mark.parametrize("features", ["t", ("fourier", 6)], ids=["t", "fourier"])
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
def test_layers_times_and_context(kind, layer, features, own):
    for batch, context in itertools.product((1, 19), (0, 2)):
        field = field_of(layer=layer, time=features, context=context)
        given = normal(batch, context, seed=3) if context else None
        t = time(batch if own else None)
        compare(kind, field, t, normal(batch, 3), normal(2, batch, 3, seed=2), given)
        if context:
            compare(kind, field, t, normal(batch, 3), normal(1, batch, 3, seed=2), given[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [7, 65])
def test_inputs_that_are_not_contiguous(kind, batch):
    field = field_of(context=2)
    with torch.no_grad():
        for layer in field.layers:  # weights whose rows are not contiguous in memory
            layer.weight.data = layer.weight.t().contiguous().t()
            layer.gate_weight.data = layer.gate_weight.repeat_interleave(2)[::2]
    assert field.layers[1].weight.stride(1) != 1
    z = normal(3, batch).t()
    columns = normal(batch, 3, 4, seed=2).permute(2, 0, 1)[::2]
    context = normal(2 * batch, 2, seed=3)[::2]
    assert not (z.is_contiguous() or columns.is_contiguous() or context.is_contiguous())
    compare(kind, field, time(), z, columns, context)
    compare(kind, field, normal(2 * batch)[::2], z, columns, context)
    # Cotangents of sums are expanded numbers.
    z = z.detach().requires_grad_()
    total = sum(x.sum() for x in KINDS[kind][0](field, time(), z, columns, context))
    expected = sum(x.sum() for x in KINDS[kind][1](field, time(), z, columns, context))
    for a, b in zip(*(torch.autograd.grad(x, z) for x in (total, expected))):
        close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
def test_no_samples(kind, own):
    field = field_of(context=2)
    z = torch.empty(0, 3, dtype=F64)
    t = time(0 if own else None)
    compare(kind, field, t, z, torch.empty(2, 0, 3, dtype=F64), torch.empty(0, 2, dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_some_gradients_only(kind):
    """Each input alone: what is not asked for may be skipped, and nothing else."""
    field = field_of(context=2)
    all_inputs = {
        "t": time(),
        "z": normal(9, 3),
        "columns": normal(2, 9, 3),
        "context": normal(9, 2),
    }
    names = [*all_inputs, *(name for name, _ in field.named_parameters())]
    for wanted in names:
        results = []
        for function in KINDS[kind]:
            given = {
                name: x.clone().requires_grad_(name == wanted) for name, x in all_inputs.items()
            }
            for name, parameter in field.named_parameters():
                parameter.requires_grad_(name == wanted)
            source = given.get(wanted)
            source = dict(field.named_parameters())[wanted] if source is None else source
            out = function(field, *given.values())
            if any(x.requires_grad for x in out):
                loss = sum((x * normal(*x.shape, seed=5)).sum() for x in out)
                (gradient,) = torch.autograd.grad(
                    loss, source, allow_unused=True, materialize_grads=True
                )
            else:
                gradient = torch.zeros_like(source)
            results.append(gradient)
        close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_one_result_only(kind):
    """A loss of the first or of the second result alone."""
    field = field_of()
    for which in range(1 if kind == "value" else 2):
        found = []
        for function in KINDS[kind]:
            z = normal(9, 3, grad=True)
            out = function(field, time(), z, normal(2, 9, 3), None)[which]
            inputs = [z, *field.parameters()]
            found.append(
                torch.autograd.grad(
                    out, inputs, normal(*out.shape, seed=5), allow_unused=True,
                    materialize_grads=True,
                )
            )  # fmt: skip
        for got, expected in zip(*found):
            close(got, expected)


# ---- drawn probes --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("features", [2, 5, 131])
@pytest.mark.parametrize("seed", [0, -3, 1 << 63])
def test_drawn_probes_are_those_of_probe_sample(noise, features, seed):
    field = field_of(features, (6, 5, 4))
    keys = torch.arange(37) * 7919 - 5
    probe = _ops.probe_sample(keys, seed, 3, features, noise=noise, dtype=F64)
    draw = {"keys": keys, "seed": seed, "probes": 3, "noise": noise}
    results = []
    for given in ({"probe": probe}, draw):
        z = normal(37, features, grad=True)
        out = compiled.mlp_value_divergence(field, time(), z, **given)
        bars = [normal(*x.shape, seed=5) for x in out]
        gradients = torch.autograd.grad(out, [z, *field.parameters()], bars, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in gradients), z)
        results.append([*out, *gradients, *second])
    for i, (given, drawn) in enumerate(zip(*results, strict=True)):
        if noise == "rademacher" and i < 2:
            assert torch.equal(given, drawn)
        close(drawn, given)


def test_drawn_probes_do_not_depend_on_the_batch():
    field, keys, z = field_of(), torch.arange(40), normal(40, 3)
    both = compiled.mlp_value_divergence(field, time(), z, keys=keys, seed=4)[1]
    alone = compiled.mlp_value_divergence(field, time(), z[23:24], keys=keys[23:24], seed=4)[1]
    torch.testing.assert_close(alone, both[23:24], rtol=1e-14, atol=1e-14)
    other = compiled.mlp_value_divergence(field, time(), z, keys=keys, seed=5)[1]
    assert (other != both).any()


# ---- derivatives ---------------------------------------------------------------------------------


def of_everything(kind, field):
    """An evaluation as a function of all that it can be differentiated by."""
    names = [name for name, _ in field.named_parameters()]

    class Evaluation(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, t, z, columns, context):
            return KINDS[kind][0](self.field, t, z, columns, context)

    def function(t, z, columns, context, *parameters):
        twins = {f"field.{name}": value for name, value in zip(names, parameters)}
        out = torch.func.functional_call(Evaluation(), twins, (t, z, columns, context))
        # The columns enter the exact divergence's graph as well.
        return (*out, 0 * columns.sum())

    inputs = (
        time().requires_grad_(), normal(2, 2, grad=True), normal(1, 2, 2, seed=2, grad=True),
        normal(2, 1, seed=3, grad=True), *field.parameters(),
    )  # fmt: skip
    return function, inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("hidden", [(), (2,), (3, 2), (2, 3, 2)])
def test_gradcheck(kind, layer, hidden):
    function, inputs = of_everything(kind, field_of(2, hidden, layer=layer, context=1))
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_gradcheck_of_every_activation(kind, activation):
    field = field_of(2, (3, 2), seed=3, activation=activation, context=1)
    function, inputs = of_everything(kind, field)
    assert gradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu"])
@pytest.mark.parametrize("hidden", [(), (2,), (2, 2), (2, 2, 2)])
def test_gradgradcheck(kind, activation, hidden):
    field = field_of(2, hidden, layer="squash", activation=activation, context=1)
    function, inputs = of_everything(kind, field)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
def test_third_derivatives(kind, own):
    found = []
    for function in KINDS[kind]:
        field = field_of(time=("fourier", 4), context=2)
        z, t = normal(5, 3, grad=True), time(5 if own else None).requires_grad_()
        context = normal(5, 2, grad=True)
        results = function(field, t, z, normal(2, 5, 3, seed=2), context)
        inputs = [z, t, context, *field.parameters()]
        for _ in range(3):
            loss = sum((x.sin() * normal(*x.shape, seed=7)).sum() for x in results)
            results = torch.autograd.grad(
                loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True
            )
        found.append(results)
    for got, expected in zip(*found, strict=True):
        close(got, expected, 1e-10)


def test_one_input_may_be_a_function_of_another():
    """The gradient of the gradient must not take one input's way for another's."""
    found = []
    for function in KINDS["probes"]:
        field, t = field_of(context=3), time().requires_grad_()
        z = normal(5, 3) * t.sin()
        out = function(field, t, z, normal(1, 5, 3, seed=2) * t, z.cos())
        (first,) = torch.autograd.grad(out[0].sum() + out[1].sum(), t, create_graph=True)
        found.append(torch.autograd.grad(first, t)[0])
    close(*found)


# ---- precision, threads, memory ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu", "sin"])
@pytest.mark.parametrize("batch", [200, 3001])  # large ones have wider tiles
def test_float32_is_as_near_the_truth_as_plain_operations(kind, activation, batch):
    field = field_of(6, (60, 60, 60), activation=activation)
    single = MLP(6, (60, 60, 60), activation=activation)
    single.load_state_dict(field.state_dict())
    field.load_state_dict(single.state_dict())  # the truth is that of rounded parameters
    z, columns = normal(batch, 6).float(), normal(2, batch, 6, seed=2).float()
    t = torch.tensor(0.3)

    def outcome(function, field, dtype):
        given = [x.to(dtype).requires_grad_() for x in (t, z, columns)]
        out = function(field, *given, None)
        bars = [normal(*x.shape, seed=5).to(dtype) for x in out]
        inputs = [*given[:2], *field.parameters()]
        gradients = torch.autograd.grad(out, inputs, bars)
        return [x.detach().double() for x in (*out, *gradients)]

    truth = outcome(KINDS[kind][1], field, F64)
    mine = outcome(KINDS[kind][0], single, torch.float32)
    eager = outcome(KINDS[kind][1], single, torch.float32)
    for exact, ours, theirs in zip(truth, mine, eager, strict=True):
        own, other = ((x - exact).norm() for x in (ours, theirs))
        assert own <= 4 * other + 1e-6 * exact.norm()
        assert own < 1e-4 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True], ids=["shared-t", "t-per-sample"])
def test_threads_change_only_the_order_of_sums(kind, own):
    field, threads = field_of(), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            z, columns = normal(300, 3, grad=True), normal(2, 300, 3, seed=2, grad=True)
            t = time(300 if own else None).requires_grad_()
            out = KINDS[kind][0](field, t, z, columns, None)
            bars = [normal(*x.shape, seed=5) for x in out]
            gradients = torch.autograd.grad(
                out, [z, columns, t, *field.parameters()], bars, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
            results.append([*out, *gradients])
    finally:
        torch.set_num_threads(threads)
    of_samples = len(out) + (3 if own else 2)
    for i, (one, two, again) in enumerate(zip(*results)):
        assert torch.equal(two, again)
        if i < of_samples:
            assert torch.equal(one, two)
        close(two, one)


def arguments_of(kind, batch=5, keep=False):
    """An op and its arguments."""
    field = field_of(context=2, time=("fourier", 4))
    t, z, columns = time(), normal(batch, 3), normal(2, batch, 3, seed=2)
    exact = exact_divergence(field, False)
    offset, parameters, settings = field_arguments(
        field, z, normal(batch, 2), {"probes": 1, "drawn": 1, "exact": exact}.get(kind, 0)
    )
    parameters = [x if x is None else x.detach().requires_grad_() for x in parameters]
    shared = (offset.detach(), parameters, settings)
    keys = torch.arange(batch)
    return {
        "value": (_ops.mlp_value, [t, z, *shared, keep]),
        "jvp": (_ops.mlp_value_jvp, [t, z, columns, *shared, keep]),
        "vjp": (_ops.mlp_vjp, [t, z, columns, *shared]),
        "probes": (_ops.mlp_value_divergence, [t, z, columns, *shared, None, 0, 0, False, keep]),
        "drawn": (_ops.mlp_value_divergence, [t, z, None, *shared, keys, 3, 2, True, keep]),
        "exact": (_ops.mlp_value_divergence, [t, z, None, *shared, None, 0, 0, False, keep]),
    }[kind]


@pytest.mark.parametrize("kind", ["value", "jvp", "probes", "drawn", "exact"])
@pytest.mark.parametrize("batch", [5, 16, 33, 65])
def test_what_is_kept_is_what_would_be_computed_again(kind, batch):
    results = []
    for keep in (False, True):
        op, arguments = arguments_of(kind, batch, keep)
        out = op(*arguments)
        kept = out[-1]
        assert (kept.numel() > 0) == keep
        assert not kept.requires_grad
        bars = [normal(*x.shape, seed=5) for x in out[:-1]]
        inputs = [x for x in next(a for a in arguments if isinstance(a, list)) if x is not None]
        results.append(torch.autograd.grad(out[:-1], inputs, bars))
    for again, of_kept in zip(*results, strict=True):
        assert torch.equal(again, of_kept)


def test_no_record_without_need():
    field = field_of()
    with torch.no_grad():
        value, trace = compiled.mlp_value_divergence(field, time(), normal(5, 3))
    assert not value.requires_grad and not trace.requires_grad
    with torch.inference_mode():
        other, _ = compiled.mlp_value_divergence(field, time(), normal(5, 3))
    assert torch.equal(value, other)


def test_a_change_in_place_between_forward_and_backward_is_an_error():
    field = field_of()
    z = normal(5, 3, grad=True)
    value = compiled.mlp_value(field, time(), z)
    with torch.no_grad():
        field.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# ---- where they are used -------------------------------------------------------------------------


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts pycnf's ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pycnf":
            self.names.append(function._schema.name.removeprefix("pycnf::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4), (5, 4, 6)])
def test_value_and_divergence_uses_the_op(hidden):
    field, z = field_of(hidden=hidden, context=2), normal(5, 3, grad=True)
    for probe in (None, normal(2, 5, 3)):
        with Ops() as ops:
            out = value_and_divergence(field, time(), z, probe, normal(5, 2))
            sum(x.sum() for x in out).backward()
        assert ops.names == ["mlp_value_divergence", "mlp_value_divergence_backward"]
        with Ops() as ops:
            other = value_and_divergence(field, time().expand(5), z, probe, normal(5, 2))
        assert ops.names == []
        for a, b in zip(out, other):
            close(a, b)


def test_closed_form_where_there_is_one():
    assert closed_form.HIDDEN_LAYERS == (1, 2)
    kinds = [exact_divergence(field_of(hidden=(4,) * n), own) for n in range(4) for own in (0, 1)]
    assert kinds == [2, 2, 3, 2, 3, 2, 2, 2]
    assert exact_divergence(field_of(layer="concat"), True) == 3


def test_where_the_plain_formulas_serve():
    field, z, t = field_of(), normal(5, 3), time()
    assert serves(field, t, z)
    assert not serves(field_of(layer="blend"), t, z)
    assert not serves(field, t, z.to("meta"))
    assert not serves(field.half(), t, z.half())
    field.double()
    with torch.autocast("cpu"):
        assert not serves(field, t, z)
    inside = []
    torch.func.grad(lambda x: (inside.append(serves(field, t, x)), x.sum())[1])(z)
    assert inside == [False]
    with torch.autograd.forward_ad.dual_level():
        assert not serves(field, t, z)
    wide = MLP(3, (600, 600)).double()
    assert gains(field, z) and not gains(wide, z) and gains(wide, normal(64, 3))


@pytest.mark.parametrize("make", [lambda: field_of(layer="hyper"), lambda: field_of().half()])
def test_without_a_kernel_the_plain_formulas_answer(make):
    field = make()
    z, columns, t = (x.to(field.dtype) for x in (normal(5, 3), normal(2, 5, 3), time()))
    for mine, plain in KINDS.values():
        got, expected = (function(field, t, z, columns, None) for function in (mine, plain))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    keys = torch.arange(5)
    probe = _ops.probe_sample(keys, 3, 2, 3, noise="gaussian", dtype=field.dtype)
    drawn = compiled.mlp_value_divergence(
        field, t, z, keys=keys, seed=3, probes=2, noise="gaussian"
    )
    for a, b in zip(drawn, compiled.mlp_value_divergence(field, t, z, probe)):
        assert torch.equal(a, b)


def test_a_divergence_under_transformations():
    """Where the op has no rule, the formulas give the same numbers."""
    field, z, t = field_of(), normal(5, 3), time()

    def total(z):
        value, trace = value_and_divergence(field, t, z)
        return value.sum() + trace.sum()

    expected = torch.autograd.functional.jacobian(total, z)
    close(torch.func.grad(total)(z), expected)
    _, tangent = torch.func.jvp(total, (z,), (torch.ones_like(z),))
    close(tangent, expected.sum())


@pytest.mark.parametrize("kind", ["value", "jvp", "probes", "exact"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_batches_of_cotangents(kind, create_graph):
    """vmap over a backward, which has no rule for the op either."""
    field, found = field_of(context=2), []
    for function in KINDS[kind]:
        z, t, columns = normal(5, 3, grad=True), time().requires_grad_(), normal(2, 5, 3, grad=True)
        out = function(field, t, z, columns, normal(5, 2))
        bars = [normal(4, *x.shape, seed=5) for x in out]
        inputs = [z, t, *([] if kind in ("value", "exact") else [columns]), *field.parameters()]
        # The context's weight comes before the op, which hands its gradient on.
        gradients = torch.autograd.grad(
            out, inputs, bars, is_grads_batched=True, create_graph=create_graph,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        if create_graph:
            loss = sum(x.sin().sum() for x in gradients)
            gradients = (*gradients, *torch.autograd.grad(loss, [z, t]))
        found.append(gradients)
    for got, expected in zip(*found, strict=True):
        close(got, expected)


# ---- opcheck -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["value", "jvp", "vjp", "probes", "drawn", "exact"])
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(kind, keep):
    op, arguments = arguments_of(kind, 5, keep)
    arguments[0].requires_grad_()
    arguments[1].requires_grad_()
    results = torch.library.opcheck(op, tuple(arguments))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4


@pytest.mark.parametrize("kind", ["value", "jvp", "probes", "drawn", "exact"])
@pytest.mark.parametrize("need_parameters", [False, True])
def test_opcheck_of_backward(kind, need_parameters):
    op, arguments = arguments_of(kind, 5, True)
    *results, kept = op(*arguments)
    bars = [normal(*x.shape, seed=5) for x in results]
    if kind == "value":
        bars, arguments = (
            [*bars, None],
            [*arguments[:2], None, *arguments[2:5], None, 0, 0, False, 1],
        )
    backward = _ops.mlp_value_jvp_backward if kind == "jvp" else _ops.mlp_value_divergence_backward
    arguments = (*bars, *arguments[:-1], kept.detach(), need_parameters)
    found = torch.library.opcheck(backward, arguments)
    assert set(found.values()) == {"SUCCESS"}


# ---- bad arguments -------------------------------------------------------------------------------

FIELD = field_of(context=2)
T, Z, P, C = time(), normal(5, 3), normal(2, 5, 3), normal(5, 2)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: compiled.mlp_value(FIELD, T, Z[:, :2], C), ValueError, r"z: got shape \(5, 2\)"),
        (lambda: compiled.mlp_value(FIELD, T, Z.float(), C), TypeError, "z: got torch.float32"),
        (lambda: compiled.mlp_value(FIELD, Z[:3, 0], Z, C), ValueError, r"t: got shape \(3,\)"),
        (lambda: compiled.mlp_value(FIELD, T, Z), ValueError, "context: got None"),
        (
            lambda: compiled.mlp_value(FIELD, T, Z, C[:2]),
            ValueError,
            r"context: got shape \(2, 2\)",
        ),
        (lambda: compiled.mlp_value_jvp(FIELD, T, Z, Z, C), ValueError, r"tangents: got shape"),
        (lambda: compiled.mlp_value_jvp(FIELD, T, Z, P.float(), C), TypeError, "tangents: got"),
        (lambda: compiled.mlp_vjp(FIELD, T, Z, P[:0], C), ValueError, "cotangents: got shape"),
        (lambda: compiled.mlp_value_divergence(FIELD, T, Z, P[:, 1:], C), ValueError, "probe: got"),
        (
            lambda: compiled.mlp_value_divergence(FIELD, T, Z, P, C, keys=torch.arange(5)),
            ValueError,
            "keys: got keys and a probe",
        ),
        (
            lambda: compiled.mlp_value_divergence(FIELD, T, Z, None, C, keys=torch.arange(4)),
            ValueError,
            r"keys: got torch.int64 \(4,\)",
        ),
        (
            lambda: compiled.mlp_value_divergence(
                FIELD, T, Z, None, C, keys=torch.arange(5), probes=0
            ),
            ValueError,
            "probes: got 0",
        ),
        (
            lambda: compiled.mlp_value_divergence(FIELD, T, Z, None, C, noise="pink"),
            ValueError,
            "noise must be",
        ),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_must_be_called(kind):
    hooked = field_of()
    hooked.register_forward_hook(lambda *_: None)
    for field in (hooked, torch.nn.Linear(3, 3).double()):
        with pytest.raises(TypeError, match="field: got a"):
            KINDS[kind][0](field, T, Z, P, None)


def op_call(case, changes):
    """An op with some of its arguments changed."""
    op, arguments = arguments_of(case)
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, arguments)) | changes
    return lambda: op(*given.values())


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("value", {"t": T.float()}, "t must be 0-dim or"),
        ("value", {"t": normal(4)}, "t must be 0-dim or"),
        ("value", {"z": Z[0]}, "z must be"),
        ("value", {"z": Z.half()}, "z must be"),
        ("value", {"context": C}, "context must be"),
        ("value", {"kind": [0, 0, 1, 0, 0]}, "kind must have no divergence"),
        ("value", {"kind": [0, 0, 0, 1, 0]}, "kind must be 5 or 6 numbers, the fourth"),
        ("value", {"kind": [99, 4, 0, 0, 0]}, "activation must be"),
        ("value", {"parameters": [Z[0]]}, "parameters must be"),
        ("jvp", {"tangents": Z}, "tangents must be"),
        ("jvp", {"tangents": P.float()}, "tangents must be"),
        ("vjp", {"cotangents": P[:, :2]}, "cotangents must be"),
        ("probes", {"probe": None}, "probe or keys"),
        ("probes", {"probe": P[:0]}, "probe must be"),
        ("probes", {"kind": [0, 4, 0, 0, 0]}, "kind must have a divergence"),
        ("drawn", {"keys": torch.arange(5.0)}, "keys must be int64"),
        ("drawn", {"probes": 0}, "probes must be at least 1"),
        ("exact", {"probe": P}, "probe or keys"),
        ("exact", {"kind": [0, 4, 7, 0, 0]}, "got divergence 7"),
        ("exact", {"t": normal(5)}, "closed form needs a last layer without a gate"),
    ],
)
def test_bad_arguments_of_ops(kind, changes, says):
    with pytest.raises(RuntimeError, match=says):
        op_call(kind, changes)()


def test_bad_arguments_of_backward():
    op, arguments = arguments_of("probes", 5, True)
    *results, kept = op(*arguments)
    bars = [torch.ones_like(x).detach() for x in results]
    rest = arguments[:-1]
    for bad, says in [
        ((bars[0][:4], bars[1], *rest, kept, True), "value_bar must be"),
        ((bars[0], bars[1].float(), *rest, kept, True), "divergence_bar must be"),
        ((*bars, *rest, kept[1:], True), "kept must be"),
    ]:
        with pytest.raises(RuntimeError, match=says):
            _ops.mlp_value_divergence_backward(*bad)
    op, arguments = arguments_of("jvp", 5, True)
    _, images, kept = op(*arguments)
    with pytest.raises(RuntimeError, match="images_bar must be"):
        _ops.mlp_value_jvp_backward(None, images[:1].detach(), *arguments[:-1], kept, True)
