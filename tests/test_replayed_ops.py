"""Solves that are really replayed, operation by operation: what a recording must not be taken for.

Every case solves several times, with something changed on the way, and compares with the solver
that has the host in its loop, bit for bit.
"""

import importlib
import warnings
import weakref

import pytest
import torch
from problems import as_tuple
from replayed_ops import stand_in
from torch import nn

import pycnf
from pycnf.flows import CNF

recording = importlib.import_module("pycnf.odeint.recording")
F32, F64 = torch.float32, torch.float64
UP = torch.tensor([0.0, 1.0], dtype=F64)
GRAPH = {"cuda_graph": True}
LOOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def count(monkeypatch):
    monkeypatch.setattr(recording, "_kept", weakref.WeakKeyDictionary())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield stand_in(monkeypatch)


class Field(nn.Module):
    """A network with whatever a field may have beside parameters."""

    def __init__(self, dtype=F64, features=3):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(features, features).to(dtype)
        self.act = nn.Tanh()
        self.scale, self.calls = 1.0, 0
        self.shift = torch.zeros(features, dtype=dtype)

    def forward(self, t, y):
        self.calls += 1
        return self.scale * self.act(self.inner(y) + self.shift) * torch.cos(3 * t)


def state(seed=0, rows=4, features=3, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator, dtype=F64).to(dtype)


def assert_equal(mine, expected):
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def both(field, y0, t=UP, options=(), **keywords):
    """A solve by replays and one with the host, which must agree."""
    keywords = {**LOOSE, **keywords}
    with torch.no_grad():
        mine, expected = (
            pycnf.odeint(field, y0, t, options={**dict(options), **more}, **keywords)
            for more in (GRAPH, {})
        )
    assert_equal(as_tuple(mine), as_tuple(expected))


def gradients(field, y0, t=UP, options=(), leaves=(), **keywords):
    """Those of a solve by replays and of one with the host, which must agree."""
    found, keywords = [], {**LOOSE, **keywords}
    for more in (GRAPH, {}):
        parts = tuple(part.detach().clone().requires_grad_() for part in as_tuple(y0))
        start = parts[0] if torch.is_tensor(y0) else parts
        at = t.clone().requires_grad_()
        ys = pycnf.odeint_adjoint(field, start, at, options={**dict(options), **more}, **keywords)
        loss = sum(part.square().sum() for part in as_tuple(ys))
        wanted = (*parts, at, *field.parameters(), *leaves)
        found.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    assert_equal(*found)


METHODS = {
    "dopri5": {},
    "bosh3": {"method": "bosh3"},
    "rk4": {"method": "rk4", "options": {"step_size": 0.25, "interp": "cubic"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_solves_and_gradients(count, method):
    field = Field()
    for seed in range(4):
        both(field, state(seed), **METHODS[method])
        gradients(field, state(seed), **METHODS[method])
        with torch.no_grad():
            field.inner.weight.mul_(1.1)
    assert count["replayed"] > 2 * count["written"]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_in_another_direction_of_time(count, method):
    """Adjoint problems may agree in direction where the solves before them do not."""
    field = Field()
    for t in (UP, UP.flip(0), UP - 1, -UP) * 3:
        gradients(field, state(), t, **METHODS[method])
    assert count["replayed"]


class Coupled(nn.Module):
    """Every part is driven by its own sum: the shapes of the parts matter, not their size alone."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, t, y):
        return tuple(0.1 * self.rate * part.sum() - part for part in y)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_tuples_of_other_shapes(method):
    field, flat = Coupled(), torch.linspace(-1, 2, 6, dtype=F64)
    for sizes in ([2, 4], [3, 3], [2, 4], [3, 3], [3, 3]):
        gradients(field, flat.split(sizes), **METHODS[method])


AUTOCAST = {"dopri5": {"first_step": 0.1}, "rk4": {"step_size": 0.25, "interp": "cubic"}}


@pytest.mark.parametrize("method", AUTOCAST)
def test_autocast_keeps_no_weights(count, method):
    """A weight that was cast before the work was recorded would be read for ever."""
    keywords = {"method": method, "options": AUTOCAST[method], "rtol": 1e-2, "atol": 1e-2}
    field, t = Field(F32), UP.float()
    for seed in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            both(field, state(seed, dtype=F32), t, **keywords)
            gradients(field, state(seed, dtype=F32), t, **keywords)
        with torch.no_grad():
            field.inner.weight.mul_(0.5)
    assert count["replayed"]


def change_number(field, i):
    field.scale = 1.0 + i // 4


def change_tensor(field, i):
    field.shift = torch.full((3,), float(i // 4), dtype=F64)


def change_in_place(field, i):
    field.shift.fill_(i)


def change_kind(field, i):
    field.act = nn.Tanh() if i < 4 else nn.ReLU()


def change_setting(field, i):
    field.act = nn.LeakyReLU(0.1 * (1 + i // 4))


def change_strides(field, i):
    if i == 4:
        field.inner.weight.data = field.inner.weight.data.t()


def change_layer(field, i):
    if i == 4:
        field.inner = nn.Linear(3, 3).double()


CHANGES = [
    change_number, change_tensor, change_in_place, change_kind, change_setting, change_strides,
    change_layer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_a_field(count, change):
    field = Field()
    for i in range(8):
        change(field, i)
        both(field, state(i))
        if i > 1:
            assert count["replayed"]
    field = Field()
    for i in range(8):
        change(field, i)
        gradients(field, state(i))


def test_counters_do_not_count(count):
    """A whole number that the field itself changes is no reason to record again."""
    field = Field()
    for i in range(20):
        both(field, state(i))
    assert len(recording._kept[field]) == 1
    assert count["written"] == 4  # the start and an attempt, again once the counter is known


def test_a_context_among_the_adjoint_parameters():
    field = Field()
    for seed in range(5):
        field.shift = state(seed).requires_grad_()
        keywords = {"adjoint_params": (*field.parameters(), field.shift)}
        gradients(field, state(seed), leaves=(field.shift,), **keywords)


# ---- flows ---------------------------------------------------------------------------------------


class Flow(Field):
    def __init__(self):
        super().__init__(features=2)


def assert_same_flows(field, change, times=8):
    flows = [CNF(field, cuda_graph=graph, engine="generic", rtol=1e-4, atol=1e-4)
             for graph in (True, False)]  # fmt: skip
    for flow in flows:
        flow.keep_bytes = 0  # every step again for the gradient, as in a replay
    for i in range(times):
        change(field, i)
        found = []
        for flow in flows:
            x = state(i, 5, 2).requires_grad_()
            density = flow.log_prob(x, seed=1)
            leaves = (x, *field.parameters())
            found.append((density.detach(), *torch.autograd.grad(density.sum(), leaves)))
        assert_equal(*found)
    return flows[0]


@pytest.mark.parametrize("change", [change_number, change_kind], ids=lambda change: change.__name__)
def test_changes_of_a_flow(count, change):
    field = Flow()
    flow = assert_same_flows(field, change)
    assert len(flow._recordings.kept) == 2
    assert count["replayed"] > 4 * count["written"]


def test_a_flow_whose_field_gets_a_tensor():
    def shift(field, i):
        field.shift = torch.full((2,), float(i), dtype=F64)

    assert_same_flows(Flow(), shift)
