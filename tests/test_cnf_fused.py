"""The fused engine against the generic one: results, steps and gradients, to rounding."""

import math

import pytest
import torch

from pycnf.flows import CNF, SolveError
from pycnf.nn import ACTIVATIONS, MLP

METHODS = ("dopri5", "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


def pair(field, **settings):
    return [CNF(field, engine=engine, **settings) for engine in ("fused", "generic")]


def field_of(features=2, hidden=(16, 16), scale=1.0, **settings):
    torch.manual_seed(0)
    field = MLP(features, hidden, **settings).double()
    with torch.no_grad():
        for layer in field.layers:
            layer.weight.mul_(scale)
    return field


def points(batch, features=2, seed=1):
    return torch.randn(
        batch, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def outcome(flow, x, context=None, inverse=False, **keywords):
    """Results, gradients and counts of a solve with a loss that sees everything; on the CPU,
    wherever the field is.
    """
    device = flow.field.like.device
    x = x.to(device, copy=True).requires_grad_()
    inputs = [x, *flow.field.parameters()]
    if context is not None:
        context = context.to(device, copy=True).requires_grad_()
        inputs.append(context)
    z, logdet = (flow.inverse if inverse else flow)(x, context, **keywords)
    loss = (z * points(*z.shape, seed=5).to(z)).sum() + (logdet * logdet.detach().cos()).sum()
    gradients = torch.autograd.grad(loss, inputs)
    stats = flow.stats
    return [each.cpu() for each in (z, logdet, *gradients)], (
        stats.nfe_forward,
        stats.accepted,
        stats.rejected,
    )


def assert_same(flows, *args, rtol=1e-11, **keywords):
    (fused, counts), (generic, expected) = (outcome(flow, *args, **keywords) for flow in flows)
    if flows[0].steps == "per-sample":
        # One counts what a sample needed, the other how often it evaluated some of them.
        counts, expected = counts[1:], expected[1:]
    assert counts == expected
    for mine, other in zip(fused, generic, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol * scale)
    assert flows[0].stats.engine == "fused"
    return counts


@pytest.mark.parametrize("keep", [0, 20_000, 1 << 28], ids=["none", "some", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_adaptive_methods(method, keep):
    flows = pair(field_of(scale=3.0), method=method, rtol=1e-4, atol=1e-4)
    for flow in flows:
        flow.keep_bytes = keep
    assert_same(flows, points(37), seed=3)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("options", [{"num_steps": 3}, {"step_size": 0.3}])
def test_fixed_methods(method, options):
    assert_same(pair(field_of(), method=method, options=options), points(5), seed=3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    field = field_of(activation=activation)
    far = 1 if activation == "square" else 3  # a quadratic field leaves for infinity
    assert_same(pair(field, method="rk4", options={"num_steps": 4}), points(9) * far, seed=3)


def values_and_slopes(activation, h):
    """φ(h) and φ'(h) as the engine has them: one Euler step from 0 of f = φ(h), h the context."""
    field = MLP(1, (1,), layer="ignore", activation=activation, context=1).to(h.dtype)
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            parameter.fill_(0.0 if "bias" in name else 1.0)
    flow = CNF(field, "exact", method="euler", options={"num_steps": 1}, engine="fused")
    with torch.no_grad():
        value, logdet = flow.inverse(torch.zeros(len(h), 1, dtype=h.dtype), h[:, None])
    return value[:, 0], -logdet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "elu", "silu", "selu"])
def test_vector_math_is_right_to_the_last_digits(activation, dtype):
    reach = torch.logspace(-30, 2.4, 40_001, dtype=torch.float64)
    around = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    h = torch.cat((-reach, reach, around, torch.zeros(1))).to(dtype)
    value, slope = values_and_slopes(activation, h)
    exact = h.double()
    # In f64 torch's own functions are the truth, to a few of their own last digits.
    kind = ACTIVATIONS[activation]
    true_value = kind.value(exact)
    if activation == "softplus":  # and this is right for h << 0 as well
        true_value = exact.clamp(min=0) + exact.abs().neg().exp().log1p()
    info = torch.finfo(dtype)
    # exp is 0 below the smallest normal number.
    floor = torch.tensor(info.tiny, dtype=torch.float64) * (1 + exact.abs())
    error = (value.double() - true_value).abs() - floor
    assert (error / (true_value.abs() * info.eps)).max() <= (4 if dtype == torch.float32 else 8)
    slope_error = (slope.double() - kind.slope(exact, true_value)).abs()
    assert (slope_error <= 4 * info.eps * (1 + exact.abs().clamp(max=100))).all()
    assert (
        value[h == 0] == kind.value(torch.zeros(1, dtype=dtype))
    ).all() or activation == "softplus"
    if activation == "tanh":
        assert value.abs().max() == 1


@pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.parametrize("time", ["t", ("fourier", 6)])
@pytest.mark.parametrize("context", [0, 3])
def test_layers(layer, time, context):
    field = field_of(layer=layer, time=time, context=context)
    given = points(6, context, seed=2) if context else None
    assert_same(pair(field), points(6), given, seed=3)
    if context:
        assert_same(pair(field), points(6), given[0], seed=3)


@pytest.mark.parametrize("hidden", [(), (1,), (5, 70), (64, 64, 64), (33, 7, 17, 16)])
@pytest.mark.parametrize("features", [1, 2, 9, 17])
@pytest.mark.parametrize("kind", [{"divergence": "exact"}, {"probes": 1}, {"probes": 3}])
def test_shapes(hidden, features, kind):
    keywords = {} if "divergence" in kind else {"seed": 3}
    assert_same(pair(field_of(features, hidden), **kind), points(19, features), **keywords)


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("inverse", [False, True])
def test_batches_and_directions(batch, inverse):
    assert_same(pair(field_of(scale=2.0)), points(batch), inverse=inverse, seed=3)


def test_a_hard_solve_with_rejections():
    *_, accepted, rejected = assert_same(
        pair(field_of(hidden=(64, 64, 64), scale=6.0)), points(64), seed=3, rtol=1e-7
    )
    assert accepted >= 8
    assert rejected >= 1


def test_threads_change_only_the_order_of_sums():
    flow = pair(field_of(scale=2.0))[0]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outcome(flow, points(300), seed=3)[0])
            again = outcome(flow, points(300), seed=3)[0]
            assert all(torch.equal(a, b) for a, b in zip(results[-1], again))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        for mine, theirs in zip(results[0], other):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_float32_is_as_near_the_truth_as_the_generic_engine():
    x = points(200)
    truth, _ = outcome(CNF(field_of(), engine="generic"), x, seed=3)
    keys = torch.arange(200)
    errors = []
    for flow in pair(field_of().float(), method="rk4", options={"num_steps": 8}):
        exact = CNF(field_of(), engine="generic", method="rk4", options={"num_steps": 8})
        truth, _ = outcome(exact, x, seed=3, keys=keys)
        x32 = x.float().requires_grad_()
        z, logdet = flow(x32, seed=3, keys=keys)
        loss = (z * points(200, seed=5).float()).sum() + (logdet * truth[1].float().cos()).sum()
        got = [z, logdet, *torch.autograd.grad(loss, [x32, *flow.field.parameters()])]
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(got, truth, strict=True)])
    for mine, other in zip(*errors):
        assert mine < 4 * other + 4e-7


def test_without_a_gradient_or_a_divergence():
    fused, generic = pair(field_of())
    x = points(21)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, seed=1)[0], generic(x, seed=1)[0], rtol=1e-12, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(
            fused.log_prob(x, seed=1), generic.log_prob(x, seed=1), rtol=1e-12, atol=0
        )
    times = [0.2, 0.7]
    torch.testing.assert_close(
        fused.trajectory(x, times), generic.trajectory(x, times), rtol=1e-9, atol=1e-9
    )
    _, logdet = fused(x, seed=1)
    (alone,) = torch.autograd.grad(logdet.sum(), fused.field.layers[0].weight)
    (expected,) = torch.autograd.grad(generic(x, seed=1)[1].sum(), generic.field.layers[0].weight)
    torch.testing.assert_close(alone, expected, rtol=1e-11, atol=1e-11)
    assert fused(x[:0])[0].shape == (0, 2)


def test_a_weight_changed_before_the_backward_is_an_error():
    flow = pair(field_of())[0]
    loss = flow(points(4), seed=1)[1].sum()
    with torch.no_grad():
        flow.field.layers[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["x", "keys", "probe"])
@pytest.mark.parametrize("gradient", ["discrete", "seminorm"])
def test_what_probes_are_made_from_changed_before_the_backward_is_an_error(name, gradient):
    x = points(4)
    given = {"keys": torch.arange(4)} if name != "probe" else {"probe": points(4)[None]}
    given = {} if name == "x" else given
    loss = pair(field_of(), gradient=gradient)[0](x, **given)[1].sum()
    (x if name == "x" else given[name]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["probe", "keys", "context"])
def test_what_is_on_another_device_is_named(name):
    """Not by an operation somewhere inside."""
    given = {"x": points(3), "context": points(3, 2)}
    made = {"probe": points(3).unsqueeze(0), "keys": torch.arange(3)}
    if name in made:
        given[name] = made[name]
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: got a tensor on meta, expected x's cpu"):
        CNF(field_of(context=2), engine="fused")(**given)


def test_second_derivatives():
    torch.manual_seed(0)
    found = []
    field = field_of(hidden=(8, 8), layer=["concat", "concatsquash", "squash"], context=2)
    x, context = points(4), points(4, seed=2)
    for flow in pair(field, regularizers={"jacobian": 0.2, "kinetic": 0.5}, method="bosh3"):
        x = x.detach().clone().requires_grad_()
        context = context.detach().clone().requires_grad_()
        inputs = [x, context, *flow.field.parameters()]
        z, logdet = flow(x, context, seed=1)
        loss = z.square().sum() + logdet.exp().sum() + flow.stats.regularizers["kinetic"].sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(total, inputs)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [{"divergence": "exact"}, {"probes": 2}])
@pytest.mark.parametrize("hidden", [(), (9,), (16, 16), (7, 16, 5)])
@pytest.mark.parametrize("names", [("kinetic",), ("jacobian",), ("jacobian", "kinetic")])
@pytest.mark.parametrize("inverse", [False, True])
def test_regularizers(kind, hidden, names, inverse):
    found = []
    for flow in pair(field_of(3, hidden), regularizers=dict.fromkeys(names, 0.3), **kind):
        x = points(19, 3).requires_grad_()
        keywords = {} if "divergence" in kind else {"seed": 3}
        z, logdet = (flow.inverse if inverse else flow)(x, **keywords)
        values = list(flow.stats.regularizers.values())
        assert list(flow.stats.regularizers) == list(names)
        loss = z.sum() + logdet.sum() + sum((v * points(19, 1, seed=i)[:, 0]).sum()
                                            for i, v in enumerate(values))  # fmt: skip
        gradients = torch.autograd.grad(loss, [x, *flow.field.parameters()])
        found.append([z, logdet, *values, *gradients])
    for mine, other in zip(*found, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11 * scale)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
@pytest.mark.parametrize("time", ["t", ("fourier", 4)])
@pytest.mark.parametrize("kind", [{"divergence": "exact"}, {"regularizers": {"kinetic": 0.1}}])
def test_gradients_of_the_interval(method, time, kind):
    found = []
    options = None if method != "rk4" else {"num_steps": 3}
    for engine in ("fused", "generic"):
        ends = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.1, 0.9)]
        field = field_of(time=time)
        flow = CNF(
            field, t0=ends[0], t1=ends[1], engine=engine, method=method, options=options, **kind
        )
        keywords = {} if "divergence" in kind else {"seed": 3}
        z, logdet = flow(points(21), **keywords)
        loss = (
            z.square().sum()
            + logdet.sum()
            + sum(value.sum() for value in flow.stats.regularizers.values())
        )
        found.append(torch.autograd.grad(loss, [*ends, *field.parameters()]))
    for mine, other in zip(*found, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11 * scale)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda flow, x: setattr(flow, "max_num_steps", 2), "max_num_steps"),
        (lambda flow, x: x[3, 0].fill_(math.nan), "the state is not finite at the start"),
        (lambda flow, x: x[3].fill_(1e200), "the field is not finite at the start"),
    ],
)
def test_errors_are_the_generic_engine_s(change, says):
    field = field_of(activation="square", scale=2.0)
    messages = []
    for flow in pair(field, rtol=1e-9, atol=1e-9):
        x = points(20)
        change(flow, x)
        with pytest.raises(SolveError, match=says) as error:
            flow(x, seed=1)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_what_the_fused_engine_does_not_run():
    with pytest.raises(ValueError, match="engine: got 'fused', but the field has a 'hyper' layer"):
        CNF(MLP(2, layer="hyper"), engine="fused")
    with pytest.raises(ValueError, match="gradient='autograd' goes through"):
        CNF(MLP(2), engine="fused", gradient="autograd")
    with pytest.raises(ValueError, match="context in its error norm"):
        CNF(MLP(2, context=1), engine="fused", gradient="continuous")
    assert CNF(MLP(2, context=1), gradient="continuous").explain().startswith("The generic")


# ---- steps per sample, and the adjoint ----


@pytest.mark.parametrize("gradient", ["discrete", "seminorm", "continuous"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_all_kinds(gradient, steps, method):
    if (steps, gradient) == ("shared", "discrete"):
        pytest.skip("has tests of its own")
    flows = pair(
        field_of(scale=3.0), method=method, rtol=1e-4, atol=1e-4, gradient=gradient, steps=steps
    )
    assert_same(flows, points(37), seed=3, rtol=1e-9)


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "seminorm"])
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("layer", ["concat", "squash"])
def test_fixed_methods_with_exact_divergence(gradient, method, layer):
    flows = pair(
        field_of(layer=layer),
        divergence="exact",
        method=method,
        gradient=gradient,
        options={"num_steps": 3},
    )
    assert_same(flows, points(7))


@pytest.mark.parametrize("kind", [{"divergence": "exact"}, {"probes": 2}])
@pytest.mark.parametrize("hidden", [(), (9,), (16, 16), (7, 16, 5)])
@pytest.mark.parametrize("layer", ["concat", "concatsquash"])
@pytest.mark.parametrize("time", ["t", ("fourier", 4)])
@pytest.mark.parametrize(
    ("steps", "gradient"),
    [("shared", "continuous"), ("shared", "seminorm"), ("per-sample", "discrete"),
     ("per-sample", "seminorm")],
)  # fmt: skip
def test_kinds_of_fields(kind, hidden, layer, time, steps, gradient):
    field = field_of(3, hidden, layer=layer, time=time)
    names = ["kinetic"] if hidden == (9,) else ["jacobian"] if hidden == (7, 16, 5) else []
    flows = pair(
        field, steps=steps, gradient=gradient, regularizers=dict.fromkeys(names, 0.1), **kind
    )
    assert_same(flows, points(18, 3), seed=None if "divergence" in kind else 3, rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "gradient"),
    [("shared", "seminorm"), ("per-sample", "discrete"), ("per-sample", "seminorm")],
)
def test_context_of_all_kinds(steps, gradient):
    flows = pair(field_of(context=3), steps=steps, gradient=gradient)
    assert_same(flows, points(21), points(21, 3, seed=2), seed=3, rtol=1e-9)
    assert_same(flows, points(21), points(21, 3, seed=2), inverse=True, seed=3, rtol=1e-9)
    assert_same(flows, points(21), points(1, 3, seed=2)[0], seed=3, rtol=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 8, 16, 33, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_steps_per_sample_by_batch_and_threads(batch, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        flows = pair(field_of(scale=4.0), steps="per-sample")
        assert_same(flows, points(batch) * 2, seed=3, rtol=1e-9)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("hidden", [(16, 16), (21, 13, 40)])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2"])
def test_a_sample_has_the_same_bits_in_any_batch(dtype, divergence, hidden, method):
    flow = CNF(
        field_of(3, hidden, scale=3.0).to(dtype), divergence, steps="per-sample", method=method
    )
    x = (points(50, 3) * 2).to(dtype)
    keywords = {"seed": 1} if divergence == "hutchinson" else {}
    log_prob = flow.log_prob(x, **keywords)
    accepted = flow.stats.accepted
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.log_prob(x[order], **keywords), log_prob[order])
    assert torch.equal(flow.log_prob(x[:17], **keywords), log_prob[:17])
    alone = []
    for i in range(50):
        assert torch.equal(flow.log_prob(x[i : i + 1], **keywords), log_prob[i : i + 1])
        alone.append(flow.stats.accepted)
    assert len(set(alone)) > 1  # or there was nothing to show
    assert max(alone) == accepted


def test_gradients_of_the_interval_and_second_derivatives_with_steps_per_sample():
    found = []
    for engine in ("fused", "generic"):
        ends = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.1, 0.9)]
        field = field_of(hidden=(8, 8), scale=2.0, layer=["concat", "concatsquash", "squash"])
        flow = CNF(field, t0=ends[0], t1=ends[1], engine=engine, steps="per-sample")
        inputs = [*ends, *field.parameters()]
        x = points(11) * torch.linspace(0.1, 3, 11, dtype=torch.float64)[:, None]
        z, logdet = flow(x, seed=2)
        loss = z.square().sum() + logdet.exp().sum()
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append([*plain, *first, *second])
    for mine, other in zip(*found, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("says", ["max_num_steps", "not finite at the start"])
def test_errors_with_steps_per_sample(says):
    messages = []
    for flow in pair(field_of(scale=4.0), steps="per-sample", rtol=1e-9, atol=1e-9):
        x = points(40)
        if says == "max_num_steps":
            x[5] *= 100
            flow.max_num_steps = 2
        else:
            x[7, 1] = math.inf
        with pytest.raises(SolveError, match=says) as error:
            flow(x, seed=1)
        messages.append(str(error.value).split(":")[0])
    assert (
        messages[0].split(" with ")[0].split("=")[0] == messages[1].split(" with ")[0].split("=")[0]
    )


def test_threads_may_change_between_forward_and_backward():
    flow = pair(field_of(scale=2.0))[0]
    x = points(300).requires_grad_()
    before = torch.get_num_threads()
    found = []
    try:
        for first, second in ((1, 1), (1, 5), (5, 1)):
            torch.set_num_threads(first)
            log_prob = flow.log_prob(x, seed=3)
            torch.set_num_threads(second)
            found.append(torch.autograd.grad(log_prob.sum(), [x, *flow.field.parameters()]))
    finally:
        torch.set_num_threads(before)
    for gradients in found[1:]:
        for mine, other in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"divergence": "exact"}, {"probes": 1}])
def test_wide_layers(kind):
    # Products taken in blocks of inputs.
    field = field_of(3, (700, 750), scale=2.0)
    flows = pair(field, method="bosh3", rtol=1e-3, atol=1e-3, **kind)
    keywords = {} if "divergence" in kind else {"seed": 3}
    assert_same(flows, points(128 * torch.get_num_threads() + 5, 3), rtol=1e-10, **keywords)


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("gradient", ["discrete", "seminorm"])
def test_wide_layers_read_transposed(steps, gradient):
    # Gradients copy a weight's transpose from 2^17 numbers on; concat's is part of a wider weight.
    field = field_of(3, (370, 380), layer=("concatsquash", "concat", "ignore"), scale=1.5)
    flows = pair(field, method="bosh3", rtol=1e-3, atol=1e-3, steps=steps, gradient=gradient)
    assert_same(flows, points(21, 3), seed=3, rtol=1e-10)
