"""What PyTorch and its users do around odeint_adjoint: compilers, autocast, processes, checkpoints,
odd fields.
"""

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torchdiffeq
from problems import as_tuple, outcome, raised
from test_odeint_adjoint import F64, KINDS, Field, assert_same_gradients, case, objective
from torch.utils.checkpoint import checkpoint

import pycnf

GRADIENTS = ("continuous", "joined", "discrete")
LOOSE = {"rtol": 1e-3, "atol": 1e-3}
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def solver(gradient):
    return functools.partial(pycnf.odeint_adjoint, gradient=gradient)


class Net(torch.nn.Module):
    """A small network in f32, with a buffer, a frozen and a shared parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3, 16)
        self.last = torch.nn.Linear(16, 3)
        self.frozen = torch.nn.Parameter(torch.tensor(0.8), requires_grad=False)
        self.again = self.last.bias
        self.register_buffer("scale", torch.tensor([1.0, 0.5, 2.0]))

    def forward(self, t, y):
        hidden = torch.tanh(self.first(y) * self.frozen + t)
        return self.scale * self.last(hidden) + self.again * t


def batch():
    return torch.linspace(-1, 1, 12).reshape(4, 3).sin()


TIMES = torch.tensor([0.0, 0.5, 1.0])


def net_gradients(solve, net=None, **keywords):
    """Of a loss of all outputs, to y0 and the parameters."""
    net = Net() if net is None else net
    y0 = batch().requires_grad_()
    ys = solve(net, y0, TIMES, **{**LOOSE, **keywords})
    objective(ys.float()).backward()
    return [y0.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_buffers_frozen_and_shared_parameters(gradient):
    mine = net_gradients(solver(gradient), **TIGHT)
    theirs = net_gradients(torchdiffeq.odeint, **TIGHT)
    assert [g is None for g in mine] == [g is None for g in theirs]
    assert mine[1] is None, "the frozen parameter"
    for a, b in zip(mine, theirs):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def decay(t, y):
    return -y * torch.cos(t)


# --- compilers --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_surroundings(backend, gradient, given):
    """One graph break at the solve, the same numbers, and no graph of the solver's insides."""
    net = Net()
    params = {"adjoint_params": net.parameters} if given else {}

    def loss(y0, t):
        start = torch.sin(y0) * 1.5
        named = {name: tuple(make()) for name, make in params.items()}
        ys = pycnf.odeint_adjoint(net, start, t, gradient=gradient, **named, **LOOSE)
        return (ys[-1] ** 2).sum() * 0.5

    def run(function, t):
        net.zero_grad()
        y0 = batch().requires_grad_()
        value = function(y0, t)
        value.backward()
        return [value.detach(), y0.grad, net.first.weight.grad, net.last.bias.grad]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, backend=backend)
    for t in (TIMES, TIMES + 0.1, TIMES * 2):
        for a, b in zip(run(compiled, t), run(loss, t)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("solver", ["odeint", "odeint_dense", "odeint_per_sample", "odeint_event"])
def test_compiled_surroundings_of_other_solvers(solver):
    def solve(y0):
        start = torch.sin(y0)
        if solver == "odeint_dense":
            return pycnf.odeint_dense(decay, start, 0.0, 1.0)(0.5).sum()
        if solver == "odeint_per_sample":
            return pycnf.odeint_per_sample(lambda t, y: -y, start, TIMES).sum()
        if solver == "odeint_event":
            t0 = torch.zeros((), dtype=torch.float64)
            _, y = pycnf.odeint_event(decay, start, t0, event_fn=lambda t, y: t - 0.5)
            return y[-1].sum()
        return pycnf.odeint(decay, start, TIMES).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(solve, backend="eager")
    for _ in range(2):
        y0 = batch().requires_grad_()
        found = [torch.autograd.grad(f(y0), y0)[0] for f in (compiled, solve)]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12


def test_a_compiled_field():
    """The field itself may be compiled, and is evaluated with and without a graph."""
    net = Net()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    for gradient in GRADIENTS:
        net.zero_grad()
        mine = net_gradients(solver(gradient), compiled)
        net.zero_grad()
        theirs = net_gradients(solver(gradient), net)
        for a, b in zip(mine, theirs):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- autocast ---------------------------------------------------------------------------------


class DtypeLog(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, t, y):
        slope = super().forward(t, y)
        self.seen.append(self.first(y).dtype)
        return slope


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_autocast_around_the_solve_alone(gradient):
    """The backward pass, outside of it, evaluates the field as the solve did."""
    net = DtypeLog()

    def solve(*args, **keywords):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ys = solver(gradient)(*args, **keywords)
        assert ys.dtype == torch.float32
        forward = len(net.seen)
        net.forward_calls = forward
        return ys

    mine = net_gradients(solve, net)
    assert len(net.seen) > net.forward_calls
    assert set(net.seen) == {torch.bfloat16}
    exact = net_gradients(pycnf.odeint)
    for a, b in zip(mine, exact):
        if b is not None:
            assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_under_autocast_of_a_solve_that_was_not(gradient):
    net = DtypeLog()
    y0 = batch().requires_grad_()
    loss = objective(solver(gradient)(net, y0, TIMES, **LOOSE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert set(net.seen) == {torch.float32}
    assert torch.equal(y0.grad, net_gradients(solver(gradient))[0])


def test_discrete_under_autocast_is_backpropagation():
    """Exact for the bf16 numbers that were computed, up to the order of sums in bf16."""

    def run(solve):
        def autocast(*args, **keywords):
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                return solve(*args, **keywords)

        options = {"options": {"first_step": 0.2, "max_step": 0.2}}
        return net_gradients(autocast, **options)

    for a, b in zip(run(solver("discrete")), run(pycnf.odeint)):
        if b is not None:
            assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
def test_second_derivatives_remember_autocast(gradient):
    net = DtypeLog()
    y0 = batch().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = solver(gradient)(net, y0, TIMES, **LOOSE)
    (grad,) = torch.autograd.grad(objective(ys), y0, create_graph=True)
    (mine,) = torch.autograd.grad(grad.pow(2).sum(), y0)
    assert set(net.seen) == {torch.bfloat16}
    ys = pycnf.odeint(Net(), y0, TIMES, **LOOSE)
    (grad,) = torch.autograd.grad(objective(ys), y0, create_graph=True)
    (exact,) = torch.autograd.grad(grad.pow(2).sum(), y0)
    assert (mine - exact).norm() < 0.1 * exact.norm()


# --- checkpoints, threads, processes ----------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_inside_a_checkpoint(gradient, use_reentrant):
    def solve(net, y0, t, **keywords):
        inside = functools.partial(solver(gradient), net, **keywords)
        return checkpoint(inside, y0, t, use_reentrant=use_reentrant)

    mine, plain = net_gradients(solve), net_gradients(solver(gradient))
    for a, b in zip(mine, plain):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_checkpoint_inside_the_field(gradient):
    """It recomputes under a graph of its own in every evaluation of the backward pass."""

    class Checkpointed(Net):
        def forward(self, t, y):
            return checkpoint(super().forward, t, y, use_reentrant=False)

    mine, plain = net_gradients(solver(gradient), Checkpointed()), net_gradients(solver(gradient))
    for a, b in zip(mine, plain):
        assert (a is None and b is None) or torch.equal(a, b)


_DDP = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import pycnf

class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ).double()

    def forward(self, t, y):
        return self.net(y) * (1 + t)

class Model(torch.nn.Module):
    def __init__(self, gradient):
        super().__init__()
        self.field, self.gradient = Field(), gradient

    def forward(self, y0):
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        # Forced steps: a shared step size would depend on what else is in the batch.
        forced = {"first_step": 0.1, "min_step": 0.1, "max_step": 0.1}
        return pycnf.odeint_adjoint(self.field, y0, t, options=forced, gradient=self.gradient)

def loss(ys):
    return ys.pow(2).sum((0, 2)).mean()

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
batch = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).sin()
for gradient in ("continuous", "joined", "discrete"):
    alone = Model(gradient)
    loss(alone(batch)).backward()
    together = DistributedDataParallel(Model(gradient))
    for _ in range(2):
        together.zero_grad()
        loss(together(batch[2 * rank : 2 * rank + 2])).backward()
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """Two processes with half a batch each have the gradients of one with the whole."""
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(_DDP))
    here = os.path.dirname(os.path.dirname(pycnf.__file__))
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meet")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
        assert output.strip().endswith("equal"), output


# --- odd fields -------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_partial_with_given_parameters(gradient):
    def field(rate, t, y):
        return torch.sin(rate * y) + t

    def run(solve, named=False):
        rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
        params = {"adjoint_params": (rate,)} if named else {}
        y0 = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
        t = torch.linspace(0, 1, 3, dtype=F64)
        ys = solve(functools.partial(field, rate), y0, t, **TIGHT, **params)
        return torch.autograd.grad(objective(ys), (y0, rate))

    mine = run(solver(gradient), named=True)
    assert_same_gradients(mine, run(torchdiffeq.odeint), 2e-5)
    with pytest.raises(ValueError, match=r"must be an instance of nn.Module"):
        run(solver(gradient))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_module_with_its_own_call(method, gradient):
    class CallOverride(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))

        def __call__(self, t, y):
            return torch.sin(self.rate * y) * (1 + t)

    def run(solve):
        field = CallOverride()
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
        options = {"step_size": 0.02} if method == "rk4" else {}
        ys = solve(field, y0, t, method=method, options=options, **TIGHT)
        return torch.autograd.grad(objective(ys), field.rate)

    assert_same_gradients(run(solver(gradient)), run(torchdiffeq.odeint_adjoint), 1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_field_that_asks_for_the_gradient_of_its_state(method, gradient):
    """Flow matching's likelihood: the state's view is made to require grad in place, under
    enable_grad, for a divergence within the field.
    """

    class WithDivergence(Field):
        def forward(self, t, state):
            x, _ = state
            with torch.enable_grad():
                x = x.requires_grad_()
                velocity = super().forward(t, x)
                (along,) = torch.autograd.grad(velocity.sum(), x, create_graph=True)
            return velocity, -along.sum(1)

    def run(solve):
        field = WithDivergence()
        y0 = torch.tensor([[0.5, -1.0, 0.2], [1.0, 0.3, -0.4]], dtype=F64)
        state = (y0.requires_grad_(), torch.zeros(2, dtype=F64))
        t = torch.tensor([1.0, 0.4, 0.0], dtype=F64)
        options = {"step_size": 0.02} if method == "rk4" else {}
        ys = solve(field, state, t, method=method, options=options, **TIGHT)
        return torch.autograd.grad(objective(ys), (y0, field.weight, field.shift))

    assert_same_gradients(run(solver(gradient)), run(torchdiffeq.odeint_adjoint), 1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_field_that_edits_its_state_in_place(method, gradient):
    """torchdiffeq raises in backward, where the state is a leaf; so must we, not return a gradient
    of something else.
    """

    def run(solve):
        rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
        ys = solve(lambda t, y: y.mul_(rate), y0, t, method=method, adjoint_params=(rate,))
        return outcome(lambda: torch.autograd.grad(objective(ys), rate))

    mine, theirs = run(solver(gradient)), run(torchdiffeq.odeint_adjoint)
    assert raised(theirs)
    assert mine == theirs


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_field_under_no_grad(gradient):
    """torchdiffeq says that nothing requires grad; the discrete gradient is that of odeint, along
    y0 + h Σ b k with constant k, and zero for parameters that nothing depends on.
    """

    class Blind(Field):
        @torch.no_grad()
        def forward(self, t, y):
            return super().forward(t, y)

    def run(solve):
        field, y0, t = Blind(), case("tensor")[1].requires_grad_(), case("tensor")[2]
        ys = solve(field, y0, t, **LOOSE, options={"first_step": 0.1})
        return outcome(
            lambda: torch.autograd.grad(objective(ys), (y0, field.weight), allow_unused=True)
        )

    mine = run(solver(gradient))
    if gradient == "discrete":
        theirs = run(pycnf.odeint)
        assert torch.allclose(mine[0], theirs[0], rtol=1e-9)
        assert theirs[1] is None
        assert mine[1].abs().max() == 0
    else:
        theirs = run(torchdiffeq.odeint_adjoint)
        assert theirs[0] is RuntimeError
        assert mine == theirs


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_edited_between_the_passes(kind, gradient):
    field, y0, t = case(kind)
    ys = solver(gradient)(field, y0, t, **LOOSE)
    with torch.no_grad():
        field.shift.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        objective(ys).backward()


@pytest.mark.parametrize("gradient", ["continuous", "joined"])
def test_tolerances_for_each_part_of_a_tuple(gradient):
    """They are no tolerances of the adjoint's parts: torchdiffeq asserts in backward."""

    def run(solve, **adjoint):
        field, y0, t = case("tuple")
        ys = solve(field, y0, t, rtol=[1e-6, 1e-5], atol=[1e-6, 1e-5], **adjoint)
        return outcome(lambda: torch.autograd.grad(objective(ys), [field.weight, field.shift]))

    mine, theirs = run(solver(gradient)), run(torchdiffeq.odeint_adjoint)
    assert theirs[0] is AssertionError
    assert mine == theirs
    given = {"adjoint_rtol": [1e-6] * 6, "adjoint_atol": [1e-6] * 6}
    mine, theirs = run(solver(gradient), **given), run(torchdiffeq.odeint_adjoint, **given)
    assert_same_gradients(mine, theirs, 1e-4)


@pytest.mark.parametrize("solve", [pycnf.odeint, *map(solver, GRADIENTS)])
def test_complex_states_have_gradients_to_times(solve):
    """Moving a time changes a real loss by Re(conj(gradient) slope), where torchdiffeq's adjoint
    leaves out the conjugate.
    """
    rate = torch.tensor(0.4 + 1.1j, dtype=torch.complex128, requires_grad=True)
    y0 = torch.tensor([0.5 - 0.2j, 1.0 + 0.3j], dtype=torch.complex128)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64, requires_grad=True)
    params = {} if solve is pycnf.odeint else {"adjoint_params": (rate,)}
    ys = solve(lambda t, y: rate * y, y0, t, **TIGHT, **params)
    mine = torch.autograd.grad(objective(ys), t)
    exact = y0 * torch.exp(rate * (t - t[0]))[:, None]
    assert_same_gradients(mine, torch.autograd.grad(objective(exact), t), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_discrete_in_half_precision(kind, method, dtype):
    """Against odeint's backpropagation in f64: as near as the dtype."""
    options = {"step_size": 0.25}
    if method != "rk4":
        options = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}

    def run(solve, dtype):
        field, y0, t = case(kind)
        start = tuple((0.5 * part).to(dtype).requires_grad_() for part in as_tuple(y0))
        field = field.to(dtype)
        ys = solve(field, start if kind == "tuple" else start[0], t, method=method, options=options)
        inputs = [*start, field.weight, field.shift]
        loss = sum(part[-1].double().sum() for part in as_tuple(ys))
        return [grad.double() for grad in torch.autograd.grad(loss, inputs)]

    tolerance = 0.02 if dtype == torch.float16 else 0.15
    assert_same_gradients(run(solver("discrete"), dtype), run(pycnf.odeint, F64), tolerance)


def test_a_first_step_that_half_precision_rounds_to_zero():
    """The error is torchdiffeq's, no division by zero."""

    def run(library):
        y0, t = torch.full((2,), 1e-3, dtype=torch.float16), torch.tensor([0.0, 1.0])
        return outcome(
            lambda: library.odeint(
                lambda t, y: 600 * torch.ones_like(y), y0, t, rtol=0.01, atol=0.01
            )
        )

    assert raised(run(torchdiffeq))
    assert run(pycnf) == run(torchdiffeq)


def test_an_error_in_a_functions_backward_comes_through_as_it_was():
    class Mine(Exception):
        pass

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return -y

        @staticmethod
        def backward(ctx, grad):
            raise Mine("from the backward")

    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    y = pycnf.odeint_adjoint(lambda t, y: Fails.apply(y), y0, TIMES, adjoint_params=())
    with pytest.raises(Mine, match="from the backward"):
        y.sum().backward()
