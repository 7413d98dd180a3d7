"""What PyTorch does around a flow on the fused engine: copies, modes, compilers, replicas."""

import copy
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pycnf.flows import CNF
from pycnf.nn import MLP, fuse


def make(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    flow = CNF(MLP(2, (8, 8)).to(dtype), **settings)
    assert flow.explain().startswith("The fused engine")
    return flow


X = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(flow, x=X):
    flow.zero_grad()
    flow.log_prob(x, seed=1).sum().backward()
    return [p.grad.clone() for p in flow.parameters()]


def assert_all_equal(mine, theirs):
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
@pytest.mark.parametrize("used", [False, True])
def test_copies(copied, used):
    flow = make()
    if used:
        gradients(flow)
    other = copied(flow)
    assert_all_equal(gradients(other), gradients(flow))
    with torch.no_grad():
        other.field.layers[0].weight.add_(1)
    assert not torch.equal(other.log_prob(X, seed=1), flow.log_prob(X, seed=1))


def test_state_dict():
    flow, other = make(), CNF(MLP(2, (8, 8)).double())
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(X, seed=1), flow.log_prob(X, seed=1))
    assert all(key.startswith("field.layers.") for key in flow.state_dict() if "base" not in key)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_a_gradient(mode):
    flow = make()
    expected = flow.log_prob(X, seed=1).detach()
    with mode():
        result = flow.log_prob(X, seed=1)
        inside = flow.log_prob(X.clone(), seed=1)
    assert torch.equal(result, expected)
    assert torch.equal(inside, expected)
    assert not result.requires_grad
    assert flow.stats.engine == "fused"


def test_no_tape_is_made_where_no_gradient_is_wanted():
    flow = make()
    with torch.no_grad():
        z, _ = flow(X, seed=1)
    assert z.grad_fn is None
    flow.requires_grad_(False)
    assert flow(X, seed=1)[0].grad_fn is None


def test_autocast_does_not_reach_into_a_solve():
    flow = make(torch.float32)
    x = X.float()
    expected = gradients(flow, x)
    with torch.autocast("cpu", torch.bfloat16):
        flow.zero_grad()
        loss = flow.log_prob(x, seed=1).sum()
        assert loss.dtype == torch.float32
        loss.backward()
    assert_all_equal([p.grad for p in flow.parameters()], expected)


def test_compile():
    flow = make()
    expected = flow.log_prob(X, seed=1)
    compiled = torch.compile(
        lambda x: 2 * flow.log_prob(x, seed=1).sin().sum(), backend="aot_eager"
    )
    result = compiled(X)
    torch.testing.assert_close(result, 2 * expected.sin().sum(), rtol=1e-12, atol=0)
    (2 * flow.log_prob(X, seed=1).sin().sum()).backward()
    expected = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    result.backward()
    for mine, other in zip([p.grad for p in flow.parameters()], expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_functional_call_and_func_grad(steps):
    flow = make(steps=steps)
    parameters = {name: p.detach() * 1 for name, p in flow.named_parameters()}

    def loss(parameters):
        return functional_call(flow, parameters, (X,), {"seed": 1})[1].sum()

    found = torch.func.grad(loss)(parameters)
    _, logdet = flow(X, seed=1)
    flow.zero_grad()
    logdet.sum().backward()
    for mine, p in zip(found.values(), flow.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-11, atol=1e-11)


def test_distributed_data_parallel():
    import torch.distributed as dist

    flow = make()
    expected = gradients(flow)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow.log_prob(x, seed=1).sum()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        flow.zero_grad()
        nn.parallel.DistributedDataParallel(Loss())(X).backward()
    finally:
        dist.destroy_process_group()
    assert_all_equal([p.grad for p in flow.parameters()], expected)


def test_replicas_whose_parameters_are_plain_tensors():
    flow = make()
    expected = gradients(flow)
    # As nn.DataParallel makes them: the same modules without parameters, with tensors instead.
    replica = flow._replicate_for_data_parallel()
    replica.field = flow.field._replicate_for_data_parallel()
    replica.field.layers = flow.field.layers._replicate_for_data_parallel()
    for i, layer in enumerate(flow.field.layers):
        twin = layer._replicate_for_data_parallel()
        for name, parameter in layer.named_parameters():
            setattr(twin, name, parameter * 1)
        replica.field.layers._modules[str(i)] = twin
    flow.zero_grad()
    replica.log_prob(X, seed=1).sum().backward()
    assert replica.stats.engine == "fused"
    assert_all_equal([p.grad for p in flow.parameters()], expected)


def test_an_optimizer_s_step_on_a_module_is_seen():
    torch.manual_seed(0)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.SELU(), nn.Linear(8, 2))

        def forward(self, t, z):
            return self.net(torch.cat((z, t.expand(z.shape[0], 1)), 1))

    field = Field().double()
    assert "pycnf.nn.fuse" in CNF(field).explain()
    flow = CNF(fuse(field))
    assert flow.explain().startswith("The fused engine")
    optimizer = torch.optim.Adam(flow.parameters(), 0.1)
    before = flow.log_prob(X, seed=1)
    (-before.sum()).backward()
    optimizer.step()
    after = flow.log_prob(X, seed=1)
    assert flow.stats.engine == "fused"
    torch.testing.assert_close(
        after, CNF(field, engine="generic").log_prob(X, seed=1), rtol=1e-9, atol=1e-9
    )
    assert after.sum() > before.sum()
    assert torch.equal(copy.deepcopy(flow).log_prob(X, seed=1), after)
    handle = field.net[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has got hooks since"):
        flow.log_prob(X, seed=1)
    handle.remove()
    assert torch.equal(flow.log_prob(X, seed=1), after)


def test_recognising_a_module_in_many_threads_leaves_it_alone():
    module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    before = {name: p.clone() for name, p in module.named_parameters()}
    parameters = [id(p) for p in module.parameters()]
    values = []

    def work():
        for _ in range(10):
            values.append(CNF(fuse(module), "exact").log_prob(X).detach())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(values) == 40
    assert all(torch.equal(value, values[0]) for value in values)
    assert [id(p) for p in module.parameters()] == parameters
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def flow_of(**settings):
    torch.manual_seed(0)
    return CNF(MLP(2, (8, 8)).double(), **settings)


def keys_of(flow):
    return {} if flow.divergence == "exact" else {"seed": 3, "keys": torch.arange(3)}


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("steps", ["shared", "per-sample"])
def test_transforms_whose_function_runs_after_them(steps, divergence):
    """torch.func.vjp and jacrev, of x and of the parameters, and twice."""
    flow, x = flow_of(divergence=divergence, steps=steps), X[:3]
    settings = keys_of(flow)

    def density(x):
        return flow.log_prob(x, **settings)

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(density, x)
    assert expected.abs().max() > 1e-2
    _, pull = torch.func.vjp(density, x)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(pull(torch.ones_like(x[:, 0]))[0], expected.sum(0), **close)
    torch.testing.assert_close(torch.func.jacrev(density)(x), expected, **close)
    torch.testing.assert_close(jacobian(density, x, vectorize=True), expected, **close)
    hessian = torch.autograd.functional.hessian(lambda x: density(x).sum(), x)
    found = torch.func.jacrev(torch.func.jacrev(lambda x: density(x).sum()))(x)
    torch.testing.assert_close(found, hessian, **close)
    parameters, name = dict(flow.named_parameters()), "field.layers.0.weight"

    def of_weight(weight):
        return functional_call(flow, {**parameters, name: weight}, (x,), settings)[1]

    torch.testing.assert_close(
        torch.func.jacrev(of_weight)(parameters[name]),
        jacobian(of_weight, parameters[name]),
        **close,
    )


@pytest.mark.parametrize("steps", ["shared", "per-sample"])
@pytest.mark.parametrize("which", [0, 1])
def test_many_cotangents_at_a_time_on_the_generic_engine(steps, which):
    """Of z alone, and of the logdet alone."""
    flow, x = flow_of(divergence="exact", steps=steps, engine="generic"), X[:3]
    one, many = (
        torch.autograd.functional.jacobian(lambda x: flow(x)[which], x, vectorize=vectorize)
        for vectorize in (False, True)
    )
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("engine", "transform"),
    [*itertools.product(("fused", "generic"), ("vmap", "jvp")), ("generic", "grad")],
)
def test_transforms_that_there_are_none_of_are_named(engine, transform):
    flow, x = flow_of(divergence="exact", engine=engine), X[:3]
    calls = {
        "vmap": lambda: torch.func.vmap(lambda row: flow.log_prob(row[None])[0])(x),
        "jvp": lambda: torch.func.jvp(flow.log_prob, (x,), (x,)),
        "grad": lambda: torch.func.grad(lambda x: flow.log_prob(x).sum())(x),
    }
    match = rf"CNF: got a transform of torch.func \({transform}\) around a solve on the {engine}"
    with pytest.raises(RuntimeError, match=match):
        calls[transform]()


@pytest.mark.parametrize(
    "settings", [{}, {"steps": "per-sample"}, {"gradient": "seminorm"}], ids=str
)
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_loss_that_is_kept_keeps_nothing_of_its_solve(settings, divergence):
    """But for its graph's nodes, after a backward."""
    array = X[:4].clone().numpy()
    memory = weakref.ref(array)
    flow, x = flow_of(divergence=divergence, **settings), torch.from_numpy(array)
    del array
    loss = flow.log_prob(x).sum()
    del x
    assert memory() is not None
    loss.backward()
    assert loss.grad_fn is not None
    assert memory() is None


@pytest.mark.parametrize("engine", ["fused", "generic"])
def test_gradients_of_no_samples_are_zeros(engine):
    flow, x = flow_of(engine=engine), X[:0].clone().requires_grad_()
    flow.log_prob(x).sum().backward()
    assert x.grad.shape == (0, 2)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in flow.parameters())


@pytest.mark.parametrize(
    "settings", [{"gradient": "seminorm"}, {"steps": "per-sample"}, {}], ids=str
)
def test_a_probe_changed_before_the_backward_is_an_error(settings):
    flow, probe = flow_of(engine="generic", **settings), X[None, :3].clone()
    flow.keep_bytes = 0
    loss = flow.log_prob(X[:3], probe=probe).sum()
    probe.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
