"""options={"cuda_graph": True}: solves whose steps the device chooses, attempt by recorded attempt.

Here the device is the CPU, which does the same work by the same formulas, so the numbers must be
those of the solver with the host in its loop, bit for bit. A stand-in for the GPU's queue shows
that nothing depends on when the work is done.
"""

import collections
import gc
import importlib
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from problems import ADAPTIVE, FIXED, as_tuple, outcome, raised
from torch.testing import assert_close

import pycnf

recording = importlib.import_module("pycnf.odeint.recording")
replay = importlib.import_module("pycnf.odeint.replay")
F32, F64 = torch.float32, torch.float64


class Swing(torch.nn.Module):
    """A small network in a field that depends on time."""

    def __init__(self, dtype=F64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.inner = torch.nn.Parameter(torch.randn(3, 8, generator=generator).to(dtype))
        self.outer = torch.nn.Parameter(torch.randn(8, 3, generator=generator).to(dtype) / 3)

    def forward(self, t, y):
        return torch.tanh(y @ self.inner) @ self.outer * torch.cos(3 * t) - 0.3 * y


class Pair(Swing):
    """The same for a tuple: a state, and how far it has come."""

    def forward(self, t, y):
        slope = super().forward(t, y[0])
        return slope, slope.square().sum(1)


class Tape(torch.nn.Module):
    """dy/dt = -y, keeping what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, t, y):
        self.seen.append((float(t), y.clone()))
        return -y


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(recording, "_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(recording, "_kept", weakref.WeakKeyDictionary())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def state(dtype=F64):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).to(dtype)


def solve(field, y0, t, graph, options=(), **keywords):
    options = {**dict(options), **({"cuda_graph": True} if graph else {})}
    with torch.no_grad():
        ys = pycnf.odeint(field, y0, t, options=options, **keywords)
    stats = pycnf.last_stats()
    return ys, (stats.evaluations, stats.accepted, stats.rejected, stats.step_sizes)


def assert_same(field, y0, t, times=3, **keywords):
    expected, counts = solve(field, y0, t, False, **keywords)
    for _ in range(times):
        ys, mine = solve(field, y0, t, True, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(as_tuple(ys), as_tuple(expected)))
        assert mine == counts


def assert_same_gradients(field, y0, start, t, options=(), **keywords):
    """To the state, times and parameters, with as many evaluations and steps on both ways."""

    def gradients(**more):
        ys = pycnf.odeint_adjoint(field, start, t, options={**dict(options), **more}, **keywords)
        loss = sum(part.square().sum() for part in as_tuple(ys))
        grads = torch.autograd.grad(loss, (y0, t, *field.parameters()), retain_graph=True)
        stats = pycnf.last_stats()
        return grads, [(s.evaluations, s.accepted, s.rejected) for s in (stats, stats.backward)]

    expected, counts = gradients()
    for _ in range(3):
        mine, own = gradients(cuda_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(mine, expected))
        assert own == counts


TIMES = {
    "two": (0.0, 1.0),
    "many in a step": (0.0, 0.01, 0.02, 0.03, 1.0, 2.5, 2.51),
    "descending": (2.0, 1.7, 0.2, -1.0),
    "one": (0.5,),
}
OPTIONS = {
    "none": {},
    "first_step": {"first_step": 0.05},
    "too large a first step": {"first_step": 100.0},
    "step_t": {"step_t": [0.3, 0.70001, 5.0]},
    "limits": {"min_step": 0.01, "max_step": 0.11, "ifactor": 3.0, "dfactor": 0.5, "safety": 0.8},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_bit_for_bit(method, dtype, times, options):
    t = torch.tensor(TIMES[times], dtype=dtype)
    options = dict(OPTIONS[options])
    if "step_t" in options:
        options["step_t"] = torch.tensor(options["step_t"], dtype=dtype) * (-1) ** (t[0] > t[-1])
    tolerances = {"rtol": 1e-4, "atol": 1e-5}
    assert_same(Swing(dtype), state(dtype), t, method=method, options=options, **tolerances)


def test_time_in_float32():
    t = torch.linspace(0, 2, 4)
    for tolerance in (1e-4, torch.full((5, 3), 1e-4)):
        assert_same(
            Swing(F32), state(F32), t, options={"dtype": F32}, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(
    "tolerance",
    [(1e-4, 1e-6), (torch.tensor(1e-4), 1e-3), torch.tensor(1e-5)],
    ids=["tuple", "mixed", "tensor"],
)
def test_tuples(tolerance):
    y0, t = (state(), torch.zeros(5, dtype=F64)), torch.linspace(0, 2, 4, dtype=F64)
    assert_same(Pair(), y0, t, rtol=tolerance, atol=1e-6)


def test_tolerances_in_memory_are_read_anew():
    field, y0, t = Swing(), state(), torch.tensor([0.0, 1.0], dtype=F64)
    rtol = torch.full((5, 3), 1e-3, dtype=F64)
    loose = solve(field, y0, t, True, rtol=rtol, atol=1e-9)[1]
    rtol.fill_(1e-9)
    tight = solve(field, y0, t, True, rtol=rtol, atol=1e-9)[1]
    assert tight == solve(field, y0, t, False, rtol=rtol, atol=1e-9)[1] != loose


def test_the_field_is_asked_at_the_same_times_and_states():
    mine, host = Tape(), Tape()
    y0, t = torch.ones(2, dtype=F64), torch.tensor([1.0, 0.0, -2.0], dtype=F64)
    solve(mine, y0, t, True)
    solve(host, y0, t, False)
    # What is asked after the end is thrown away.
    asked = mine.seen[: len(host.seen)]
    assert [t for t, _ in asked] == [t for t, _ in host.seen]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(asked, host.seen))


@pytest.mark.parametrize("times", ["two", "many in a step", "descending"])
@pytest.mark.parametrize("kind", [Swing, Pair])
def test_adjoint(kind, times):
    """Gradients to the state, times and parameters, and evaluations on both ways."""
    field, t = kind(), torch.tensor(TIMES[times], dtype=F64, requires_grad=True)
    y0 = state().requires_grad_()
    start = y0 if kind is Swing else (y0, y0[:, 0])

    assert_same_gradients(field, y0, start, t, rtol=1e-6, atol=1e-8)


def test_seminorm():
    field, t = Swing(), torch.tensor([0.0, 2.0], dtype=F64)

    def gradients(**options):
        ys = pycnf.odeint_adjoint(
            field, state(), t, adjoint_options={"norm": "seminorm", **options}, rtol=1e-6, atol=1e-8
        )
        return torch.autograd.grad(ys.square().sum(), tuple(field.parameters()))

    expected = gradients()
    assert all(torch.equal(a, b) for a, b in zip(gradients(cuda_graph=True), expected))


# ---- on a grid -----------------------------------------------------------------------------------

EXPLICIT = [method for method in FIXED if "adams" not in method]
GRIDS = {
    "of t": {},
    "step_size": {"step_size": 0.13},
    "cubic": {"step_size": 0.3, "interp": "cubic"},
    "perturb": {"perturb": True},
    "grid_constructor": {
        "grid_constructor": lambda f, y, t: torch.linspace(
            float(t[0]), float(t[-1]), 6, dtype=t.dtype
        )
    },
}


@pytest.mark.parametrize("options", GRIDS)
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("method", EXPLICIT)
def test_grids_bit_for_bit(method, dtype, times, options):
    t = torch.tensor(TIMES[times], dtype=dtype)
    assert_same(Swing(dtype), state(dtype), t, method=method, options=GRIDS[options])


@pytest.mark.parametrize("times", ["two", "many in a step", "descending"])
def test_adjoint_on_a_grid(times):
    field, t = Pair(), torch.tensor(TIMES[times], dtype=F64, requires_grad=True)
    y0 = state().requires_grad_()
    assert_same_gradients(field, y0, (y0, y0[:, 0]), t, method="rk4", options={"step_size": 0.2})


def test_a_recording_for_each_grid():
    field = Swing()
    for end in (1.0, 2.0, 1.0):
        t = torch.tensor([0.0, end], dtype=F64)
        for options in ({}, {"step_size": 0.25}, {"step_size": 0.25, "perturb": True}):
            assert_same(field, state(), t, method="midpoint", options=options)
    assert len(kept(field)) == 6


@pytest.mark.parametrize("method", ["implicit_adams", "explicit_adams", "gl4"])
def test_methods_that_read_what_they_compute(method):
    t = torch.linspace(0, 1, 5, dtype=F64)
    with pytest.warns(UserWarning, match=f"^cuda_graph: {method} steps by what the host reads"):
        solve(Swing(), state(), t, True, method=method, rtol=0.1, atol=0.1)


# ---- what ends a solve early ---------------------------------------------------------------------


class Blows(torch.nn.Module):
    def forward(self, t, y):
        return y * y


class Sinks(torch.nn.Module):
    def forward(self, t, y):
        return y * float("nan")


FAILURES = {
    "max_num_steps": (Swing, state(), {"options": {"max_num_steps": 3}}),
    "underflow": (Sinks, state(), {}),
    "underflow on the way": (Blows, torch.full((2,), 1.0, dtype=F64), {}),
    "a state without values": (Swing, state() * float("inf"), {}),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(case):
    """The same error, the next solve unharmed."""
    kind, y0, keywords = FAILURES[case]
    field, t = kind(), torch.tensor([0.0, 5.0], dtype=F64)
    messages = []
    for graph in (False, True, True):
        with pytest.raises(AssertionError) as error:
            solve(field, y0, t, graph, rtol=1e-8, atol=1e-10, **keywords)
        messages.append(str(error.value))
    assert messages[0].split()[:3] == messages[1].split()[:3]
    assert messages[1] == messages[2]
    assert_same(Swing(), state(), t)


# ---- where it does not apply ---------------------------------------------------------------------


def kicked(t, y):
    return -y


class Watched(Swing):
    def callback_step(self, t, y, dt):
        pass


OBSTACLES = {
    "no nn.Module": (lambda: kicked, {}, "func is a function, no nn.Module"),
    "a norm": (Swing, {"norm": lambda y: y.abs().max()}, "a norm of your own"),
    "jumps": (Swing, {"jump_t": torch.tensor([0.5], dtype=F64)}, "jump_t evaluates"),
    "callbacks": (Watched, {}, "there are callbacks: callback_step"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacles_are_named(case):
    kind, options, text = OBSTACLES[case]
    field, t = kind(), torch.tensor([0.0, 1.0], dtype=F64)
    expected = solve(field, state(), t, False, options)
    with pytest.warns(UserWarning, match=f"^cuda_graph: {text}.*; solved without$") as caught:
        mine = solve(field, state(), t, True, options)
    assert torch.equal(mine[0], expected[0])
    assert mine[1] == expected[1]
    assert [w.filename for w in caught] == [__file__]


def test_obstacles_of_the_state(monkeypatch):
    t, options = torch.tensor([0.0, 1.0], dtype=F64), {"cuda_graph": True}
    with pytest.warns(UserWarning, match="the state is torch.complex128; recorded solves are of"):
        solve(Tape(), torch.ones(2, dtype=torch.complex128), t, True)
    with pytest.warns(UserWarning, match="gradients flow through the solver's operations"):
        pycnf.odeint(Swing(), state(), t, options=options)
    with pytest.warns(UserWarning, match='gradient="discrete" keeps every step'):
        pycnf.odeint_adjoint(Swing(), state(), t, options=options, gradient="discrete")
    ys = pycnf.odeint_adjoint(
        Swing(), state(), t, adjoint_options=options, gradient="joined", options={}
    )
    with pytest.warns(UserWarning, match='gradient="joined" stops where'):
        ys.sum().backward()
    with pytest.warns(UserWarning, match="an event is looked for after every step"):
        pycnf.odeint(
            Tape(), torch.ones(1, dtype=F64), t, method="rk4",
            event_fn=lambda t, y: y - 0.5, options={"step_size": 0.1, **options},
        )  # fmt: skip
    with pytest.warns(UserWarning, match="events and dense output look at every step"):
        pycnf.odeint_dense(Swing(), state(), 0.0, 1.0, options=options)
    monkeypatch.setattr(recording, "_DEVICES", ("cuda",))
    with pytest.warns(UserWarning, match="the state is on cpu, not on a GPU"):
        solve(Swing(), state(), t, True)


WRONG = ["yes", "no", 1, 0, 2, 3.5, [], {}, torch.tensor(True), torch.tensor([1, 0])]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_the_option(value):
    t, options = torch.tensor([0.0, 1.0], dtype=F64), {"cuda_graph": value}
    solves = [
        lambda: pycnf.odeint(Swing(), state(), t, options=options),
        lambda: pycnf.odeint(Swing(), state(), t, options=options, method="rk4"),
        lambda: pycnf.odeint_adjoint(Swing(), state(), t, options=options),
        lambda: pycnf.odeint_per_sample(Tape(), state(), t, options=options),
        lambda: pycnf.odeint(Swing(), state(), t, options=options, method="scipy_solver"),
    ]
    for solve_it in solves:
        with pytest.raises(ValueError, match=r"cuda_graph: got .*, expected True, False or None$"):
            solve_it()


@pytest.mark.parametrize("value", [False, None])
def test_the_option_not_set(value):
    field, t = Swing(), torch.tensor([0.0, 1.0], dtype=F64)
    for method in ("dopri5", "rk4", "scipy_solver"):
        pycnf.odeint(field, state(), t, options={"cuda_graph": value}, method=method)
    pycnf.odeint_per_sample(lambda t, y: -y, state(), t, options={"cuda_graph": value})
    assert kept(field) == []


def test_where_it_is_known_but_not_served():
    field, y0, t = Swing(), state(), torch.tensor([0.0, 1.0], dtype=F64)
    keywords = {"options": {"cuda_graph": True}}
    own_steps = "cuda_graph: every element takes its own steps; solved without"
    for method in ("dopri5", "rk4"):
        with pytest.warns(UserWarning, match=own_steps):
            pycnf.odeint_per_sample(lambda t, y: -y, y0, t, method=method, **keywords)
        for solver in (pycnf.odeint, pycnf.odeint_adjoint):
            with pytest.warns(UserWarning, match=own_steps):
                torch.func.vmap(partial(solver, field, t=t, method=method, **keywords))(y0)
    with pytest.warns(UserWarning, match="cuda_graph: SciPy solves on the CPU; solved without"):
        pycnf.odeint(field, y0, t, method="scipy_solver", **keywords)


# ---- what is kept --------------------------------------------------------------------------------


def kept(field):
    return list(recording._kept.get(field, {}).values())


def test_one_recording_for_equal_solves():
    field, t = Swing(), torch.tensor([0.0, 1.0], dtype=F64)
    for shift in (0.0, 0.5, 3.0):
        solve(field, state() + shift, t + shift, True)
    assert len(kept(field)) == 1
    for change in ({"t": torch.linspace(0, 1, 3, dtype=F64)}, {"method": "bosh3"}, {"rtol": 1e-3}):
        solve(field, state(), change.pop("t", t), True, **change)
    assert len(kept(field)) == 4


def test_recorded_anew_where_parameters_have_moved():
    """A step of an optimizer changes values, which are read; `to` changes where they are."""
    field, t = Swing(), torch.tensor([0.0, 1.0], dtype=F64)
    first = solve(field, state(), t, True)[0]
    with torch.no_grad():
        field.outer.mul_(2)
    assert_same(field, state(), t)
    assert len(kept(field)) == 1
    assert not torch.equal(solve(field, state(), t, True)[0], first)
    field.outer = torch.nn.Parameter(field.outer.detach() / 3)
    assert_same(field, state(), t)
    field.eval()
    assert_same(field, state(), t)
    assert len(kept(field)) == 3


def test_only_the_newest_are_kept(monkeypatch):
    monkeypatch.setattr(recording, "_KEPT", 2)
    field = Swing()
    for outputs in range(2, 6):
        solve(field, state(), torch.linspace(0, 1, outputs, dtype=F64), True)
    assert [len(each.outputs) for each in kept(field)] == [4, 5]


def test_nothing_outlives_its_field():
    field, t = Swing(), torch.tensor([0.0, 1.0], dtype=F64)
    ys = pycnf.odeint_adjoint(field, state(), t, options={"cuda_graph": True})
    ys.sum().backward()
    recorded = [weakref.ref(each) for each in kept(field)]
    assert len(recorded) == 2
    del field, ys
    for _ in range(2):  # first the field, then what was kept for it
        gc.collect()
    assert [each() for each in recorded] == [None, None]


def test_a_solve_within_the_field():
    """At work already: the inner solve has the host in its loop."""

    class Nested(Swing):
        depth = 0

        def forward(self, t, y):
            if self.depth == 0 and t > 0.5:
                self.depth += 1
                pycnf.odeint(self, state(), torch.tensor([0.0, 1.0], dtype=F64), rtol=1e-6,
                             options={"cuda_graph": True})  # fmt: skip
                self.depth -= 1
            return super().forward(t, y)

    t = torch.tensor([0.0, 1.0], dtype=F64)
    expected = solve(Swing(), state(), t, False, rtol=1e-6)[0]
    assert torch.equal(solve(Nested(), state(), t, True, rtol=1e-6)[0], expected)


# ---- a device that works when it pleases ---------------------------------------------------------


class Queue:
    """A stand-in for a GPU's stream: what is launched is done later."""

    def __init__(self, monkeypatch, refuses=False):
        self.waiting, self.longest = collections.deque(), 0
        queue = self

        class Recorded:
            def __init__(self, work, device):
                self.work, self.runs = work, 0
                self.random = self.graph = None

            def __call__(self):
                self.runs += 1
                if refuses and self.runs > 1:
                    raise recording.NotCaptured("operation not permitted")
                queue.waiting.append(self.work)
                queue.longest = max(queue.longest, len(queue.waiting))

        monkeypatch.setattr(replay, "Recorded", Recorded)
        monkeypatch.setattr(recording.time, "sleep", lambda seconds: queue.work())

    def work(self):
        with torch.no_grad():
            self.waiting.popleft()()


def test_replays_beyond_the_end_change_nothing(monkeypatch):
    field, t = Swing(), torch.linspace(0, 2, 5, dtype=F64)
    expected, counts = solve(field, state(), t, False)
    queue = Queue(monkeypatch)
    late = []
    for _ in range(3):
        ys, mine = solve(field, state(), t, True)
        assert torch.equal(ys, expected)
        assert mine == counts
        late.append(len(queue.waiting))
        # Done before the next solve, as in a stream.
        while queue.waiting:
            queue.work()
    assert min(late) >= 1
    # The start, and what runs ahead.
    assert queue.longest <= 1 + recording.AHEAD


class Loop:
    """A stand-in for a WHILE graph: attempts until the device says stop."""

    def __init__(self, queue, step, done, failure):
        self.queue, self.step, self.ends = queue, step, (done, failure)
        self.launches = 0

    def launch(self):
        self.launches += 1
        self.queue.waiting.append(self.run)

    def run(self):
        while not any(self.ends):
            self.step.work()


@pytest.mark.parametrize("case", ["solves", *FAILURES])
def test_all_attempts_as_one_launch(monkeypatch, case):
    """Once an attempt has been replayed, unless it draws random numbers."""
    kind, y0, keywords = FAILURES.get(case, (Swing, state(), {}))
    field, t = kind(), torch.linspace(0, 5, 4, dtype=F64)
    queue = Queue(monkeypatch)
    made = []

    def make(graph, done, failure):
        (recorded,) = kept(field)
        made.append(Loop(queue, recorded.step, done, failure))
        return made[-1]

    monkeypatch.setattr(recording._C, "WhileGraph", make, raising=False)
    results = []
    for i in range(4):
        results.append(outcome(lambda: solve(field, y0, t, True, **keywords)))
        while queue.waiting:
            queue.work()
        if i == 1:
            (recorded,) = kept(field)
            recorded.step.graph = SimpleNamespace(raw_cuda_graph=lambda: 1)
            recorded.step.random = False
    assert [loop.launches for loop in made] == [2]
    host = outcome(lambda: solve(field, y0, t, False, **keywords))
    if raised(host):
        assert len(set(results)) == 1
    else:
        assert all(torch.equal(ys, host[0]) and counts == host[1] for ys, counts in results)


def test_random_fields_are_replayed_attempt_by_attempt(monkeypatch):
    field, t = Swing(), torch.linspace(0, 2, 4, dtype=F64)
    monkeypatch.setattr(recording._C, "WhileGraph", None, raising=False)
    solve(field, state(), t, True)
    (recorded,) = kept(field)
    recorded.step.random = True
    assert_same(field, state(), t)


def test_what_cannot_be_captured_is_said_once_and_solved(monkeypatch):
    field, t = Swing(), torch.linspace(0, 2, 5, dtype=F64)
    expected, counts = solve(field, state(), t, False)
    Queue(monkeypatch, refuses=True)
    with pytest.warns(UserWarning, match=r"^cuda_graph: Swing cannot be captured \(operation not"):
        ys, mine = solve(field, state(), t, True)
    assert torch.equal(ys, expected)
    assert mine == counts
    again, _ = solve(field, state(), t, True)
    assert_close(again, expected, rtol=0, atol=0)
