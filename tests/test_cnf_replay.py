"""CNF(cuda_graph=...): solves and discrete gradients whose steps the device chooses, step by
recorded step.

Here the device is the CPU, which does the same work by the same formulas, so the numbers must be
those of the solver with the host in its loop, bit for bit. A stand-in for the GPU's queue shows
that nothing depends on when the work is done.
"""

import collections
import copy
import gc
import importlib
import pickle
import warnings
import weakref

import pytest
import torch
from fields import DOUBLE, Attractor, mlp, points
from problems import ADAPTIVE
from torch import nn

from pycnf.flows import CNF
from pycnf.flows.errors import SolveError
from pycnf.nn import MLP

captured = importlib.import_module("pycnf.flows.captured")
recording = importlib.import_module("pycnf.odeint.recording")
SINGLE = torch.float32


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(captured, "_DEVICES", ("cpu", "cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Network(nn.Module):
    """A user's field, with or without a context."""

    def __init__(self, context: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(2 + context, 8).double()
        self.outer = nn.Linear(8, 2).double()
        self.idle = nn.Parameter(torch.ones(2, dtype=DOUBLE))

    def forward(self, t, z, *context):
        width = (z.shape[0], self.inner.in_features - 2)
        rows = torch.cat((z, *(each.expand(width) for each in context)), 1)
        return 2 * self.outer(torch.tanh(2 * self.inner(rows) + t)) * torch.cos(5 * t)


def flows(field, **options):
    """The same flow with the host in its loop, and without."""
    options = {"engine": "generic", **options}
    return CNF(field, cuda_graph=False, **options), CNF(field, cuda_graph=True, **options)


def counts(flow):
    stats = flow.stats
    return (stats.nfe_forward, stats.accepted, stats.rejected, stats.step_size)


def train(flow, x, context=None, inverse=False, **keywords):
    """Everything that a training step comes to: results, gradients, counts."""
    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in flow.field.parameters() if p.requires_grad)]
    if context is not None:
        context = context.detach().requires_grad_()
        leaves.append(context)
    z, logdet = (flow.inverse if inverse else flow)(x, context, seed=1, **keywords)
    parts = (z, logdet, *flow.stats.regularizers.values())
    loss = sum((i + 1) * part.square().sum() for i, part in enumerate(parts))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return parts, gradients, (*counts(flow), flow.stats.nfe_backward)


def assert_equal(mine, expected):
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def assert_same(host, device, *arguments, times=2, **keywords):
    host.keep_bytes = 0  # every step again for the gradient, as in a replay
    expected, gradients, numbers = train(host, *arguments, **keywords)
    for _ in range(times):
        mine, own, counted = train(device, *arguments, **keywords)
        assert_equal(mine, expected)
        assert_equal(own, gradients)
        assert counted == numbers
    return expected, gradients


def recorded(flow):
    return [] if flow._recordings is None else list(flow._recordings.kept.values())


BOTH = {"kinetic": 0.3, "jacobian": 0.1}


@pytest.mark.parametrize("regularizers", [{}, BOTH], ids=["plain", "regularized"])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_bit_for_bit(method, dtype, divergence, context, regularizers):
    field = mlp(context=context).to(dtype)
    host, device = flows(
        field, method=method, divergence=divergence, regularizers=regularizers, rtol=1e-4, atol=1e-4
    )
    given = points(7, context).to(dtype) if context else None
    assert_same(host, device, points().to(dtype), given)
    assert host.stats.accepted > 1
    assert len(recorded(device)) == 1
    assert recorded(device)[0] is not None


OPTIONS = {
    "first_step": {"options": {"first_step": 0.05}},
    "too large a first step": {"options": {"first_step": 100.0}},
    "limits": {
        "options": {"max_step": 0.06, "safety": 0.8, "ifactor": 3.0, "dfactor": 0.5},
    },
    "another interval": {"t0": 2.0, "t1": -0.5},
    "tight": {"rtol": 1e-9, "atol": 1e-9},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_options(method, inverse, options):
    host, device = flows(mlp(), method=method, **OPTIONS[options])
    assert_same(host, device, points(), inverse=inverse)


@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
def test_a_module_that_opts_in(method, context, divergence):
    host, device = flows(Network(context), method=method, divergence=divergence, regularizers=BOTH)
    given = points(1, context)[0] if context else None
    _, gradients = assert_same(host, device, points(), given)
    assert gradients[1] is None  # the idle parameter's
    assert len(recorded(device)) == 1


def test_probes_of_your_own_and_many():
    host, device = flows(mlp(), probes=3)
    assert_same(host, device, points())
    host.keep_bytes = 0
    probe = torch.randn(2, 7, 2, dtype=DOUBLE)
    expected = torch.autograd.grad(host(points(), probe=probe)[1].sum(), host.parameters())
    mine = torch.autograd.grad(device(points(), probe=probe)[1].sum(), host.parameters())
    assert_equal(mine, expected)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_loss_of_one_part(part):
    """One that sees no extras needs no divergence in its gradient."""
    host, device = flows(mlp(), regularizers={"kinetic": 1.0})
    host.keep_bytes = 0
    gradients = []
    for flow in (host, device, device):
        z, logdet = flow(points(), seed=1)
        loss = (z, logdet, flow.stats.regularizers["kinetic"])[part].sum()
        gradients.append(torch.autograd.grad(loss, flow.parameters()))
    assert_equal(gradients[1], gradients[0])
    assert_equal(gradients[2], gradients[0])


def test_gradients_of_kept_stages_are_the_same_to_rounding():
    host, device = flows(mlp(context=1), regularizers=BOTH)
    for mine, expected in zip(*(train(f, points(), points(7, 1))[1] for f in (device, host))):
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-14)


def test_without_a_gradient():
    """Densities, samples and trajectories; in inference mode too."""
    host, device = flows(mlp())
    results = []
    for flow in (host, device):
        flow.eval()
        flow.divergence = "exact"
        torch.manual_seed(1)
        with torch.no_grad():
            mine = [flow.log_prob(points()), flow.sample(5)]
            mine.append(flow.trajectory(points(), [0.9, 0.3, 0.0, 1.0]))
            numbers = counts(flow)
        with torch.inference_mode():
            mine += [flow.log_prob(points()), flow.sample(5)]
        results.append((mine, numbers))
    assert_equal(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]
    # From the data, to the data, and without a divergence: the first segment and those that begin
    # with the step that the one before ended with.
    assert len(recorded(device)) == 4
    assert all(each.capacity == 0 for each in recorded(device))


def test_larger_tapes(monkeypatch):
    monkeypatch.setattr(captured, "_STEPS", 2)
    host, device = flows(mlp(), rtol=1e-7, atol=1e-7)
    assert_same(host, device, points())
    (kept,) = recorded(device)
    assert kept.capacity >= host.stats.accepted > kept.capacity / 2
    assert host.stats.accepted > 4


# ---- what ends a solve early ---------------------------------------------------------------------


class Blows(nn.Module):
    def forward(self, t, z):
        return z**3


class Sinks(nn.Module):
    """Has no values after a while."""

    def forward(self, t, z):
        return z * torch.where(t > 0.7, 1.0, float("nan"))


FAILURES = {
    "max_num_steps": (mlp, {"max_num_steps": 3, "rtol": 1e-9, "atol": 1e-9}, points()),
    "underflow": (Sinks, {}, points()),
    "underflow on the way": (Blows, {"t0": 50.0, "t1": 0.0}, 1 + points().abs()),
    "a state without values": (mlp, {}, points() * float("inf")),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case):
    """The same error, the next solve unharmed."""
    kind, options, x = FAILURES[case]
    host, device = flows(kind(), **options)
    messages = []
    for flow in (host, device, device):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(SolveError) as error:
                flow(x, seed=1)
            messages.append(str(error.value))
    assert set(messages) == {messages[0]}
    if kind is mlp and case != "max_num_steps":
        assert_same(host, device, points())


# ---- where it does not apply ---------------------------------------------------------------------


def hooked():
    field = mlp()
    field.layers[0].register_forward_hook(lambda *_: None)
    return field


SHIFT = torch.ones(2, dtype=DOUBLE, requires_grad=True)


class Closed(Attractor):
    def forward(self, t, z):
        return super().forward(t, z) + SHIFT


OBSTACLES = {
    "no nn.Module": (lambda: lambda t, z: -z, {}, "the field is a function, no nn.Module"),
    "per sample": (mlp, {"steps": "per-sample"}, "steps='per-sample' regroups"),
    "fixed": (mlp, {"method": "rk4", "options": {"num_steps": 3}}, "method 'rk4' has fixed steps"),
    "continuous": (mlp, {"gradient": "continuous"}, "gradient='continuous' needs the host"),
    "autograd": (mlp, {"gradient": "autograd"}, "gradient='autograd' needs the host"),
    "hooks": (hooked, {}, "there are hooks on ConcatSquash"),
    "ends": (mlp, {"t1": torch.tensor(1.0, requires_grad=True)}, "gradients flow to t0 or t1"),
    "closures": (Closed, {}, "Closed cannot be captured .it computes with tensors that are none"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacles_are_named_once(case):
    kind, options, text = OBSTACLES[case]
    host, device = flows(kind(), **options)
    leaves = [x for x in (*host.parameters(), SHIFT) if x.requires_grad]

    def gradients(flow):
        loss = flow.log_prob(points(), seed=1).sum()
        if not loss.requires_grad:
            return [loss]
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    expected = gradients(host)
    with pytest.warns(UserWarning, match=f"^cuda_graph: {text}.*; solved without$") as caught:
        mine = gradients(device)
    assert [w.filename for w in caught] == [__file__]
    assert_equal(mine, expected)
    assert_equal(gradients(device), expected)  # without another warning
    device.cuda_graph = None
    device._recordings = None
    assert_equal(gradients(device), expected)


def test_obstacles_of_the_state(monkeypatch):
    device = flows(mlp(scale=1.0).to(torch.bfloat16), rtol=0.1, atol=0.1)[1]
    with pytest.warns(UserWarning, match="the state is torch.bfloat16; recorded solves are of"):
        device(points().bfloat16(), seed=1)
    monkeypatch.setattr(captured, "_DEVICES", ("cuda",))
    with pytest.warns(UserWarning, match="the state is on cpu, not on a GPU"):
        flows(mlp())[1](points(), seed=1)


def test_automatic_for_own_fields_only():
    own, users = (CNF(field, engine="generic") for field in (mlp(), Network()))
    for flow in (own, users):
        train(flow, points())
    assert len(recorded(own)) == 1
    assert recorded(users) == []
    never = CNF(mlp(), engine="generic", cuda_graph=False)
    train(never, points())
    assert recorded(never) == []


def test_the_argument():
    with pytest.raises(ValueError, match="cuda_graph: got 'yes', expected True, False or None"):
        CNF(mlp(), cuda_graph="yes")
    for value in ("no", 1, 0, 3.5, torch.tensor(True), []):
        with pytest.raises(ValueError, match=r"cuda_graph: got .*, expected True, False or None$"):
            CNF(mlp(), cuda_graph=value)
    flow = CNF(mlp())
    flow.cuda_graph = 2
    with pytest.raises(ValueError, match="cuda_graph: got 2"):
        flow(points())
    assert "cuda_graph" not in repr(CNF(mlp()))
    assert "cuda_graph=True" in repr(CNF(mlp(), cuda_graph=True))
    sentence = "replayed as CUDA graphs."
    assert CNF(mlp(), engine="generic").explain().endswith(sentence)
    assert CNF(Network(), cuda_graph=True).explain().endswith(sentence)
    continuous = CNF(Network(), cuda_graph=True, gradient="continuous")
    without = (
        continuous,
        CNF(Network()),
        CNF(mlp(), engine="generic", cuda_graph=False),
        CNF(mlp()),
        CNF(mlp(), engine="generic", steps="per-sample"),
        CNF(mlp(), engine="generic", method="rk4", options={"num_steps": 3}),
        CNF(lambda t, z: -z, cuda_graph=True),
        CNF(hooked(), cuda_graph=True),
        CNF(mlp().bfloat16(), cuda_graph=True),
        CNF(Network().half(), cuda_graph=True),
    )
    for flow in without:
        assert "recorded" not in flow.explain()
    with torch.no_grad():
        assert continuous.explain().endswith(sentence)


def test_halves_on_a_gpu(monkeypatch):
    """A GPU has kernels for halves, but not those of recorded attempts."""
    monkeypatch.setattr(recording, "has_kernels", lambda dtype, device: True)
    for dtype in (torch.bfloat16, torch.float16):
        device = flows(mlp(scale=1.0).to(dtype), rtol=0.1, atol=0.1)[1]
        with pytest.warns(UserWarning, match=f"{dtype}; recorded solves are of"):
            device(points().to(dtype), seed=1)


# ---- what is kept --------------------------------------------------------------------------------


def test_one_recording_for_equal_solves():
    host, device = flows(mlp(context=1))
    for seed in range(3):
        assert_same(host, device, points(seed=seed), points(7, 1, seed=seed + 9), times=1)
    assert len(recorded(device)) == 1
    assert_same(host, device, points(5), points(5, 1), times=1)
    assert_same(host, device, points(), points(7, 1)[0], times=1)
    assert len(recorded(device)) == 3
    for flow in (host, device):
        flow.rtol = 1e-3
    assert_same(host, device, points(), points(7, 1), times=1)
    assert len(recorded(device)) == 4


def test_recorded_anew_where_parameters_have_moved():
    """A step of an optimizer changes values, which are read; replacing one changes where it is."""
    field = mlp()
    host, device = flows(field)
    assert_same(host, device, points())
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(0.9)
    assert_same(host, device, points())
    assert len(recorded(device)) == 1
    field.layers[1].weight = nn.Parameter(field.layers[1].weight.detach() / 2)
    assert_same(host, device, points())
    field.layers[1].weight.requires_grad_(False)
    assert_same(host, device, points())
    field.eval()
    assert_same(host, device, points())
    assert len(recorded(device)) == 4


def test_a_network_in_training():
    trained = []
    for graph in (False, True):
        flow = CNF(copy.deepcopy(mlp()), engine="generic", cuda_graph=graph)
        flow.keep_bytes = 0
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        for seed in range(5):
            optimizer.zero_grad()
            (-flow.log_prob(points(seed=seed), seed=seed).mean()).backward()
            optimizer.step()
        trained.append(list(flow.parameters()))
    assert_equal(trained[1], trained[0])


def test_solves_under_way_at_the_same_time():
    """Gradients in any order, and twice."""
    host, device = flows(mlp())
    host.keep_bytes = 0
    gradients = []
    for flow in (host, device):
        xs = [points(seed=seed).requires_grad_() for seed in range(3)]
        losses = [flow.log_prob(x, seed=1).sum() for x in xs]
        mine = []
        for i in (1, 0, 2, 0):
            mine += torch.autograd.grad(losses[i], [xs[i], *flow.parameters()], retain_graph=True)
        gradients.append(mine)
    assert_equal(gradients[1], gradients[0])
    assert len(recorded(device)) == 1


def test_a_change_between_a_solve_and_its_gradient():
    host, device = flows(mlp())
    host.keep_bytes = 0
    loss, expected = (flow.log_prob(points(), seed=1).sum() for flow in (device, host))
    device.field.eval()  # recorded in training
    leaves = list(device.parameters())
    assert_equal(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    loss = device.log_prob(points(), seed=1).sum()
    with torch.no_grad():
        leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", [0, 1])
def test_a_gradient_to_be_differentiated_again(context):
    field = mlp(context=context)
    results = []
    for flow in flows(field):
        x = points().requires_grad_()
        given = points(7, 1).requires_grad_() if context else None
        density = flow.log_prob(x, given, seed=1)
        (score,) = torch.autograd.grad(density.sum(), x, create_graph=True)
        results.append([score, *torch.autograd.grad(score.square().sum(), field.parameters())])
    for mine, expected in zip(*results):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def test_only_the_newest_are_kept(monkeypatch):
    monkeypatch.setattr(captured, "_KEPT", 2)
    device = flows(mlp())[1]
    for count in range(2, 6):
        train(device, points(count))
    assert [len(each.z) for each in recorded(device)] == [4, 5]


def test_nothing_outlives_its_flow():
    device = flows(mlp())[1]
    z, logdet = device(points(), seed=1)
    logdet.sum().backward()
    del z, logdet
    recorded_once = [weakref.ref(each) for each in recorded(device)]
    assert len(recorded_once) == 1
    field = device.field
    del device
    gc.collect()
    assert [each() for each in recorded_once] == [None]
    assert isinstance(field, MLP)


def test_copies_record_for_themselves():
    host, device = flows(mlp())
    assert_same(host, device, points())
    for twin in (copy.deepcopy(device), pickle.loads(pickle.dumps(device))):
        assert recorded(twin) == []
        _, gradients, _ = train(twin, points())
        assert_equal(gradients, train(host, points())[1])
        assert len(recorded(twin)) == 1


# ---- a device that works when it pleases ---------------------------------------------------------


class Queue:
    """A stand-in for a GPU's stream: what is launched is done later, but in order."""

    def __init__(self, monkeypatch, refuses=()):
        self.waiting, self.longest = collections.deque(), 0
        queue = self

        class Recorded:
            random = None

            def __init__(self, work, device):
                self.work, self.runs = work, 0
                self.name = getattr(work, "func", work).__name__

            def __call__(self):
                self.runs += 1
                if self.name in refuses and self.runs > 1:
                    raise recording.NotCaptured("operation not permitted")
                queue.waiting.append(self.work)
                queue.longest = max(queue.longest, len(queue.waiting))
                if self.name == "_reverse":  # whose results are read at once, in order
                    queue.finish()

        monkeypatch.setattr(captured, "Recorded", Recorded)
        monkeypatch.setattr(recording.time, "sleep", lambda seconds: queue.work())

    def work(self):
        with torch.no_grad():
            self.waiting.popleft()()

    def finish(self):
        while self.waiting:
            self.work()


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_replays_beyond_the_end_change_nothing(monkeypatch, method):
    host, device = flows(mlp(), method=method, regularizers=BOTH)
    host.keep_bytes = 0
    expected, gradients, numbers = train(host, points())
    queue = Queue(monkeypatch)
    for _ in range(3):
        mine, own, counted = train(device, points())
        assert_equal(mine, expected)
        assert_equal(own, gradients)
        assert counted == numbers
    with torch.no_grad():
        z, _ = device(points(), seed=1)
    assert torch.equal(z, expected[0])
    assert len(queue.waiting) >= 1
    # The start, and what runs ahead; with them the first step of a gradient.
    assert queue.longest <= 2 + recording.AHEAD


@pytest.mark.parametrize("part", ["_begin", "_attempt", "_reverse"])
def test_what_cannot_be_captured_is_said_once_and_solved(monkeypatch, part):
    field = Network()
    host, device = flows(field)
    host.keep_bytes = 0
    expected, gradients, numbers = train(host, points())
    queue = Queue(monkeypatch, refuses=[part])
    text = r"^cuda_graph: Network cannot be captured \(operation not permitted\); solved without$"
    device.keep_bytes = 0

    def again():
        # The gradient's first step is recorded where the solve before had another.
        results = [train(device, points()) for _ in range(2)]
        queue.waiting.clear()
        return results

    with pytest.warns(UserWarning, match=text) as caught:
        results = again()
    assert len(caught) == 1
    for mine, own, counted in (*results, *again()):
        assert_equal(mine, expected)
        assert_equal(own, gradients)
        assert counted == numbers
    assert recorded(device) == [None]
