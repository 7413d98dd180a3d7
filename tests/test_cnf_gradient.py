"""Each gradient of a solve against autograd through its steps, and what else one can ask of it."""

import pytest
import torch
from fields import DOUBLE, Attractor, Counted, mlp, points
from torch import nn

from pycnf.flows import CNF
from pycnf.odeint.tableau import TABLEAUX

ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUX.items() if not tableau.adaptive]


def method_options(method):
    """Tolerances that make each method take a handful of steps."""
    if method in FIXED:
        return {"method": method, "options": {"step_size": 0.22}}
    tolerance = 1e-6 if TABLEAUX[method].order > 3 else 1e-3
    return {"method": method, "rtol": tolerance, "atol": tolerance}


def loss_and_gradients(flow, x, inputs, **arguments):
    """A loss that sees z and logdet of every sample differently; relative distances need scale."""
    z, logdet = flow(x, **arguments)
    weights = torch.linspace(0.5, 1.5, x.shape[0], dtype=x.dtype)
    loss = (weights * (logdet + torch.sin(z).sum(1))).sum()
    for value in flow.stats.regularizers.values():
        loss = loss + (weights * value).sum()
    return loss, torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_equal_gradients(got, expected, tolerance=1e-10):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * (1e-3 + b.norm())


@pytest.mark.parametrize(
    ("method", "steps"),
    [(m, "shared") for m in (*ADAPTIVE, *FIXED)] + [(m, "per-sample") for m in ADAPTIVE],
)
@pytest.mark.parametrize("wrap", [lambda field: field, Counted], ids=["mlp", "module"])
def test_discrete_is_autograd(method, steps, wrap):
    field = wrap(mlp(context=1))
    x, context = points().requires_grad_(), points(7, 1, seed=2).requires_grad_()
    inputs = [x, context, *field.parameters()]
    flow = CNF(field, steps=steps, **method_options(method))
    results = {}
    for gradient in ("autograd", "discrete"):
        flow.gradient = gradient
        results[gradient] = loss_and_gradients(flow, x, inputs, context=context, seed=3)
    assert flow.stats.accepted > 1
    torch.testing.assert_close(
        results["discrete"][0], results["autograd"][0], rtol=1e-12, atol=1e-13
    )
    assert_equal_gradients(results["discrete"][1], results["autograd"][1])
    assert all(gradient.norm() > 1e-3 for gradient in results["autograd"][1][:2])


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "rk4"])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("inverse", [False, True])
def test_steps_kept_computed_again_or_mixed_are_the_same(method, divergence, inverse):
    field = mlp(hidden=(6, 6, 6))
    x = points().requires_grad_()
    flow = CNF(field, divergence=divergence, engine="generic", **method_options(method))
    run = flow.inverse if inverse else flow
    tableau = TABLEAUX[method]
    used = max(i for i, weight in enumerate(tableau.b) if weight != 0) + 1
    results, kept = [], []
    budget = 1 << 28
    for steps_kept in (100, 2, 0):
        flow.keep_bytes = budget if steps_kept == 100 else int(budget * (steps_kept + 0.5))
        z, logdet = run(x, seed=1) if divergence == "hutchinson" else run(x)
        kept.append([taped.kept is not None for taped in z.grad_fn.tape])
        results.append(
            torch.autograd.grad((z.sin().sum() + logdet.cos().sum()), [x, *field.parameters()])
        )
        assert flow.stats.nfe_backward == kept[-1].count(False) * used
        budget = z.grad_fn.beginning.nbytes * (tableau.stages - 1)
    assert len(kept[0]) > 2
    for pattern, steps_kept in zip(kept, (len(kept[0]), 2, 0)):
        assert pattern == [True] * steps_kept + [False] * (len(pattern) - steps_kept)
    for other in results[1:]:
        assert_equal_gradients(other, results[0])


@pytest.mark.parametrize("keep", [0, 1 << 28])
def test_backward_twice(keep):
    field = mlp()
    x = points().requires_grad_()
    flow = CNF(field)
    flow.keep_bytes = keep
    loss = flow.log_prob(x, seed=1).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert (flow.stats.nfe_backward == 0) == (keep > 0)
    before = flow.stats.nfe_backward
    assert_equal_gradients(torch.autograd.grad(loss, x), first)
    assert flow.stats.nfe_backward - before == (0 if keep else 6 * flow.stats.accepted)


@pytest.mark.parametrize("gradient", ["continuous", "seminorm"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("wrap", [lambda field: field, Counted], ids=["mlp", "module"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_adjoint_is_the_truth_to_the_tolerance(gradient, steps, wrap, method):
    field = wrap(mlp(context=1))
    x, context = points().requires_grad_(), points(7, 1, seed=2).requires_grad_()
    inputs = [x, context, *field.parameters()]
    weights = {"regularizers": {"kinetic": 0.3, "jacobian": 0.2}, "steps": steps}
    _, truth = loss_and_gradients(
        CNF(field, gradient="autograd", method="dopri8", rtol=1e-11, atol=1e-11, **weights),
        x, inputs, context=context, seed=3,
    )  # fmt: skip
    errors = []
    for tolerance in (1e-4, 1e-8):
        flow = CNF(
            field, gradient=gradient, method=method, rtol=tolerance, atol=tolerance, **weights
        )
        _, got = loss_and_gradients(flow, x, inputs, context=context, seed=3)
        errors.append(max(((a - b).norm() / b.norm()).item() for a, b in zip(got, truth)))
    assert errors[0] < 2e-2
    assert errors[1] < 1e-5


def test_seminorm_takes_fewer_evaluations_than_the_full_norm():
    torch.manual_seed(0)
    field = mlp(hidden=(32, 32))
    x = points(64).requires_grad_()
    counts = {}
    for gradient in ("continuous", "seminorm"):
        flow = CNF(field, gradient=gradient, rtol=1e-7, atol=1e-7)
        loss_and_gradients(flow, x, [x, *field.parameters()], seed=1)
        counts[gradient] = flow.stats.nfe_backward
    assert counts["seminorm"] < counts["continuous"]


@pytest.mark.parametrize("gradient", ["discrete", "autograd"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("rk4", {"num_steps": 3}), ("heun3", {"step_size": 0.3}), ("midpoint", {"num_steps": 4})],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_the_ends_by_finite_differences(gradient, method, options, inverse):
    field = mlp()
    x = points()
    probe = points(seed=4).unsqueeze(0)

    def value(t0, t1):
        flow = CNF(field, method=method, options=options, gradient=gradient, t0=t0, t1=t1)
        z, logdet = (flow.inverse if inverse else flow)(x, probe=probe)
        return (z.sin().sum(1) + logdet).sum()

    t0 = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
    t1 = torch.tensor(1.2, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(value, (t0, t1), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_gradients_of_the_ends_with_adaptive_steps(method, steps):
    """Discrete is autograd; and both are f at the ends, to the tolerance."""
    field = mlp()
    x = points()
    results = {}
    for gradient in ("discrete", "autograd", "continuous"):
        ends = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (0.0, 1.0)]
        flow = CNF(
            field, gradient=gradient, t0=ends[0], t1=ends[1], method=method, steps=steps,
            rtol=1e-6, atol=1e-6,
        )  # fmt: skip
        _, results[gradient] = loss_and_gradients(flow, x, ends, seed=1)
    assert_equal_gradients(results["discrete"], results["autograd"])
    assert_equal_gradients(results["discrete"], results["continuous"], 1e-3)


def test_trainable_end():
    """A parameter as t1: more time makes e^{-a T} z tighter, as the data are."""
    flow = CNF(Attractor(1.0), divergence="exact", t1=nn.Parameter(torch.tensor(0.1, dtype=DOUBLE)))
    assert [name for name, _ in flow.named_parameters()] == ["t1", "field.rate"]
    x = points(100) * 0.5
    (gradient,) = torch.autograd.grad(-flow.log_prob(x).mean(), flow.t1)
    # d/dT of a D T - ½ e^{2aT} |x|² with a = 1
    expected = -(2 - (x.square().sum(1) * torch.exp(torch.tensor(0.2)).double()).mean())
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)


def test_base_parameters_get_gradients():
    mean = torch.tensor([0.3, -0.2], dtype=DOUBLE, requires_grad=True)
    normal = torch.distributions.Normal(mean, torch.ones(2, dtype=DOUBLE))
    base = torch.distributions.Independent(normal, 1)
    flow = CNF(mlp(), base=base, divergence="exact")
    x = points()
    (gradient,) = torch.autograd.grad(flow.log_prob(x).sum(), mean)
    torch.testing.assert_close(gradient, (flow(x)[0] - mean).sum(0).detach())
    (gradient,) = torch.autograd.grad(flow.sample_and_log_prob(5)[0].sum(), mean)
    assert gradient.abs().min() > 1e-2  # reparameterized


@pytest.mark.parametrize("gradient", ["discrete", "autograd"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_gradients_of_gradients(gradient, steps):
    field = mlp(hidden=(3,))
    flow = CNF(field, gradient=gradient, divergence="exact", rtol=1e-3, atol=1e-3, steps=steps)
    x = points(2)
    # Steps are constants of the gradient, but finite differences see them: fix them.
    flow.options = {"first_step": 0.25, "ifactor": 1.0}

    def score(x, weight):
        with torch.no_grad():
            field.layers[0].weight.copy_(weight)
        value = flow.log_prob(x).sum()
        return torch.autograd.grad(value, (x, field.layers[0].weight), create_graph=True)

    x.requires_grad_()
    dx, dw = score(x, field.layers[0].weight.detach().clone())
    assert flow.stats.accepted == 4
    second = torch.autograd.grad((dx.square().sum() + dw.sum()), (x, field.layers[0].weight))
    step = 1e-6
    for index, parameter in enumerate((x, field.layers[0].weight)):
        with torch.no_grad():
            direction = torch.cos(torch.arange(parameter.numel(), dtype=DOUBLE)).view_as(parameter)
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                with torch.enable_grad():
                    dx, dw = score(x, field.layers[0].weight.detach().clone())
                values.append((dx.square().sum() + dw.sum()).item())
                parameter -= sign * step * direction
        expected = (values[0] - values[1]) / (2 * step)
        assert abs((second[index] * direction).sum().item() - expected) < 1e-5 * (1 + abs(expected))


@pytest.mark.parametrize("gradient", ["continuous", "seminorm"])
def test_an_adjoint_gradient_refuses_to_be_differentiated(gradient):
    x = points().requires_grad_()
    value = CNF(mlp(), gradient=gradient).log_prob(x).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
def test_a_parameter_changed_before_the_backward_is_an_error(gradient):
    field = mlp()
    loss = CNF(field, gradient=gradient).log_prob(points()).sum()
    with torch.no_grad():
        field.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


GLOBAL = mlp(hidden=(4,))


def test_parameters_of_plain_callables_are_found():
    """Closed over, global, in a list, a tensor with a history: whatever the field computes with."""
    closed = mlp(hidden=(5,))
    listed = [nn.Linear(2, 2).double()]
    raw = torch.tensor([0.2, -0.1], dtype=DOUBLE, requires_grad=True)

    def parameters():
        return [raw, *closed.parameters(), *listed[0].parameters(), *GLOBAL.parameters()]

    x = points()
    results = {}
    for gradient in ("autograd", "discrete", "continuous"):
        scale = torch.nn.functional.softplus(raw)

        def field(t, z, scale=scale):
            return closed(t, z) + 0.1 * torch.sin(listed[0](z)) + scale * z + GLOBAL(t, z)

        flow = CNF(field, gradient=gradient, rtol=1e-8, atol=1e-8)
        _, results[gradient] = loss_and_gradients(flow, x, parameters(), seed=1)
    assert all(gradient.norm() > 1e-3 for gradient in results["autograd"])
    assert_equal_gradients(results["discrete"], results["autograd"])
    assert_equal_gradients(results["continuous"], results["autograd"], 1e-5)


def test_only_what_asks_for_a_gradient_gets_one():
    field = mlp()
    field.layers[0].weight.requires_grad_(False)
    flow = CNF(field)
    flow.log_prob(points()).sum().backward()
    assert field.layers[0].weight.grad is None
    assert field.layers[1].weight.grad is not None
    for parameter in field.parameters():
        parameter.requires_grad_(False)
    assert not flow.log_prob(points()).requires_grad
    x = points().requires_grad_()
    assert torch.autograd.grad(flow.log_prob(x).sum(), x)[0].norm() > 0


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(2, 2).double()
        self.unused = nn.Linear(2, 2).double()

    def forward(self, t, z):
        return torch.tanh(self.used(z))


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "autograd"])
def test_unused_parameters_do_no_harm(gradient):
    field = Unused()
    CNF(field, gradient=gradient).log_prob(points()).sum().backward()
    assert field.used.weight.grad.norm() > 0
    assert field.unused.weight.grad is None or field.unused.weight.grad.norm() == 0


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "seminorm"])
def test_a_loss_of_z_alone_or_of_logdet_alone(gradient):
    field = mlp()
    x = points().requires_grad_()
    inputs = [x, *field.parameters()]
    flow = CNF(field, gradient=gradient, rtol=1e-8, atol=1e-8)
    reference = CNF(field, gradient="autograd", rtol=1e-8, atol=1e-8)
    flow.keep_bytes = 0
    for part in (0, 1):
        results = [
            torch.autograd.grad(f(x, seed=1)[part].sin().sum(), inputs, materialize_grads=True)
            for f in (flow, reference)
        ]
        assert_equal_gradients(*results, 1e-10 if gradient == "discrete" else 1e-4)


def test_a_gradient_that_sees_no_logdet_evaluates_no_divergence():
    """The divergence of a module is a second backward pass through it, which leaves its trace."""

    class Traced(torch.autograd.Function):
        backwards = 0

        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            Traced.backwards += 1
            return grad.clone()

    field = mlp()
    flow = CNF(lambda t, z: field(t, Traced.apply(z)), method="rk4", options={"num_steps": 2})
    z, logdet = flow(points().requires_grad_(), seed=1)
    Traced.backwards = 0
    flow.keep_bytes = 0
    z, logdet = flow(points().requires_grad_(), seed=1)
    in_forward, Traced.backwards = Traced.backwards, 0
    z.sum().backward(retain_graph=True)
    without, Traced.backwards = Traced.backwards, 0
    logdet.sum().backward()
    assert in_forward == 8
    assert without == 8  # the gradient's own pass, once an evaluation
    assert Traced.backwards == 16


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("wrap", [lambda field: field, Counted], ids=["mlp", "module"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_regularizers_are_integrals_over_the_trajectory(steps, wrap, divergence):
    field = wrap(mlp())
    weights = {"kinetic": 0.5, "jacobian": 2.0}
    x = points(3)
    probe = points(3, seed=9).sign().unsqueeze(0) if divergence == "hutchinson" else None
    flow = CNF(
        field, regularizers=weights, rtol=1e-8, atol=1e-8, divergence=divergence, steps=steps
    )
    flow(x, probe=probe)
    got = flow.stats.regularizers
    assert list(got) == ["kinetic", "jacobian"]
    nodes, simpson = torch.linspace(0, 1, 81, dtype=DOUBLE), torch.ones(81, dtype=DOUBLE)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    states = CNF(field, method="rk4", options={"num_steps": 80}).trajectory(x, nodes).detach()
    kinetic, jacobian = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    for t, z, weight in zip(nodes, states, simpson / 240):
        kinetic += weight * field(t, z).square().sum(1).detach()
        j = torch.autograd.functional.jacobian(lambda v, t=t: field(t, v).sum(0), z)
        j = j.transpose(0, 1)  # [B, D, D]
        if probe is None:
            norm = j.square().sum((1, 2))
        elif isinstance(field, Counted):  # by vector-Jacobian products
            norm = torch.einsum("bi,bij->bj", probe[0], j).square().sum(1)
        else:
            norm = torch.einsum("bij,bj->bi", j, probe[0]).square().sum(1)
        jacobian += weight * norm
    torch.testing.assert_close(got["kinetic"].detach(), 0.5 * kinetic, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got["jacobian"].detach(), 2 * jacobian, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("wrap", [lambda field: field, Counted], ids=["mlp", "module"])
def test_gradients_of_regularizers(steps, wrap):
    field = wrap(mlp(hidden=(4, 4, 4)))
    x = points().requires_grad_()
    inputs = [x, *field.parameters()]
    weights = {"jacobian": 2.0, "kinetic": 0.5}
    results = []
    for gradient in ("discrete", "autograd"):
        flow = CNF(field, regularizers=weights, gradient=gradient, steps=steps)
        results.append(loss_and_gradients(flow, x, inputs, seed=1)[1])
    assert_equal_gradients(*results)


def test_regularizers_do_not_change_the_steps():
    plain, watched = CNF(mlp()), CNF(mlp(), regularizers={"kinetic": 1e6, "jacobian": 1e6})
    a, b = plain(points(), seed=1), watched(points(), seed=1)
    assert plain.stats.nfe_forward == watched.stats.nfe_forward
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
