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


def test_settings_of_torch():
    """What choose other kernels, or dtypes, for the same field."""
    field = Field(F32)
    precision = torch.get_float32_matmul_precision()
    try:
        both(field, state(dtype=F32), UP.float())
        before = len(recording._kept[field])
        torch.set_float32_matmul_precision("high")
        both(field, state(dtype=F32), UP.float())
        torch.use_deterministic_algorithms(True)
        both(field, state(dtype=F32), UP.float())
        torch.set_default_dtype(F64)
        both(field, state(dtype=F32), UP.float())
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(F32)
    assert len(recording._kept[field]) == before + 3


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since PyTorch 2.9"
)
def test_both_settings_of_precision():
    """The older one cannot be read once the newer has been set."""
    field = Field(F32)
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    try:
        for each in ("ieee", "ieee", "tf32", "tf32"):
            matmul.fp32_precision = each
            both(field, state(dtype=F32), UP.float())
    finally:
        matmul.fp32_precision = precision
    assert len(recording._kept[field]) == 2


@pytest.mark.parametrize("method", METHODS)
def test_recorded_work_leaves_the_parameters_own_nodes_alone(method):
    """They belong to the user's stream, for which no capture can wait. Hooks tell of them: here of
    the one gradient that comes out in the end.
    """
    field, seen = Field(), []
    handles = [p.register_hook(seen.append) for p in field.parameters()]
    handles += [p.register_post_accumulate_grad_hook(seen.append) for p in field.parameters()]
    keywords = {**LOOSE, **METHODS[method]}
    for seed in range(4):
        y0 = state(seed).requires_grad_()
        options = {**keywords.get("options", {}), **GRAPH}
        ys = pycnf.odeint_adjoint(field, y0, UP, **{**keywords, "options": options})
        seen.clear()
        ys.square().sum().backward()
        assert len(seen) == len(handles)
        for p in field.parameters():
            p.grad = None
    assert None not in recording._kept[field].values()
    for handle in handles:
        handle.remove()


def test_another_parameter_in_the_same_memory():
    field = Field()
    for seed in range(9):
        if seed % 3:
            field.inner.weight = nn.Parameter(field.inner.weight.data)
        gradients(field, state(seed))


def test_adjoint_parameters_outside_the_module(count):
    field, far = Field(), state(1, 1).requires_grad_()
    field.hidden = [far]
    with refused("a tensor of adjoint_params is no attribute of func or of a module within it"):
        gradients(field, state(), leaves=(far,), adjoint_params=(*field.parameters(), far))
    assert count["written"] == 2  # the forward solve


class Twice(Field):
    """A layer's weight a second time, where a recording could not put its own."""

    def __init__(self):
        super().__init__()
        self.again = [self.inner.weight]

    def forward(self, t, y):
        return super().forward(t, y) @ self.again[0]


def test_parameters_in_two_places():
    with refused("Twice cannot be captured .it holds its parameters elsewhere than in its own"):
        gradients(Twice(), state())


class Shared(Field):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Linear(3, 3, bias=False).double()
        self.outer.weight = self.inner.weight

    def forward(self, t, y):
        return self.outer(super().forward(t, y))


def test_a_shared_parameter(count):
    field = Shared()
    for seed in range(4):
        gradients(field, state(seed))
    assert count["replayed"] > 2 * count["written"]


def test_a_context_among_the_adjoint_parameters():
    field = Field()
    for seed in range(5):
        field.shift = state(seed).requires_grad_()
        keywords = {"adjoint_params": (*field.parameters(), field.shift)}
        gradients(field, state(seed), leaves=(field.shift,), **keywords)


@pytest.mark.parametrize(
    "tolerance", [(1e-4, 1e-5), torch.tensor(1e-4), (torch.tensor(1e-4), 1e-6)]
)
def test_tolerances_of_parts_are_copied(count, tolerance):
    """They are made anew for every solve, at other places in memory."""
    field = Coupled()
    for scale in (1.0, 1.0, 1.0, 0.1):
        tolerances = tuple(scale * each for each in as_tuple(tolerance))
        both(
            field, (state(), state()[0]), rtol=tolerances if len(tolerances) > 1 else tolerances[0]
        )
    assert len(recording._kept[field]) == (1 if isinstance(tolerance, tuple) else 2)
    assert count["replayed"]


def test_inference_mode_leaves_usable_recordings(count):
    field = Field()
    for method in METHODS.values():
        for seed in range(3):
            with torch.inference_mode():
                both(field, state(seed), UP.clone(), **method)
            both(field, state(seed), **method)
            gradients(field, state(seed), **method)
    assert count["replayed"]


class Named(Field):
    """Attributes that adjoint fields have too."""

    def __init__(self):
        super().__init__()
        self.owner, self.stats, self.settings, self.solve = "me", {}, [], None
        self.params = nn.ParameterDict({"extra": torch.ones(3, dtype=F64)})

    def recorded(self):
        raise AssertionError


def test_names_of_the_users_own(count):
    field = Named()
    for seed in range(3):
        both(field, state(seed))
        gradients(field, state(seed))
    assert count["replayed"]


# ---- what is not recorded ------------------------------------------------------------------------


class Shifted(nn.Module):
    """No parameters, but a tensor that has to be trained."""

    def __init__(self, closure=False):
        super().__init__()
        shift = torch.ones(3, dtype=F64, requires_grad=True)
        self.read = (lambda: shift) if closure else None
        self.shift = None if closure else shift

    def forward(self, t, y):
        return torch.tanh(y + (self.shift if self.read is None else self.read()))


def refused(text):
    return pytest.warns(UserWarning, match=f"^cuda_graph: {text}.*; solved without$")


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_to_tensors_that_are_no_parameters(method, closure):
    field = Shifted(closure)
    leaf = field.read() if closure else field.shift
    both(field, state(), **METHODS[method])  # recorded, for here no gradient is wanted
    options = {**METHODS[method].get("options", {}), **GRAPH}
    keywords = {**METHODS[method], "options": options}
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ys = pycnf.odeint(field, state(), UP, **keywords)
        assert len(caught) <= 1
        (gradient,) = torch.autograd.grad(ys.sum(), leaf)
        assert gradient.abs().sum() > 0
    field = Shifted(closure)
    with refused("Shifted cannot be captured .gradients flow to tensors that are none of"):
        pycnf.odeint(field, state(), UP, **keywords)


@pytest.mark.parametrize("closure", [False, True])
def test_a_flow_without_parameters_keeps_its_gradient(closure):
    field = Shifted(closure)
    leaf = field.read() if closure else field.shift
    flow = CNF(field, cuda_graph=True, engine="generic")
    with torch.no_grad():
        flow.log_prob(state(), seed=1)
    with refused("Shifted cannot be captured .it computes with tensors that are none of"):
        density = flow.log_prob(state(), seed=1)
    (gradient,) = torch.autograd.grad(density.sum(), leaf)
    assert gradient.abs().sum() > 0


def test_hooks():
    field, calls = Field(), []
    both(field, state())
    field.act.register_forward_hook(lambda *_: calls.append(1))
    with refused("there are hooks on Tanh, which a replay would not call"):
        both(field, state())
    assert len(calls) == 2 * pycnf.last_stats().evaluations
    with refused("there are hooks on Tanh"):
        gradients(field, state())


class Other(Field):
    def __init__(self, dtype):
        super().__init__(F32)
        self.dtype = dtype

    def forward(self, t, y):
        return super().forward(t, y).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_field_that_returns_another_dtype(count, dtype):
    """The first step's size would be rounded otherwise."""
    field = Other(dtype)
    with refused(f"Other cannot be captured .it returns {dtype} for a state of torch.float32"):
        both(field, state(dtype=F32), UP.float())
    for seed in range(3):
        both(field, state(seed, dtype=F32), UP.float(), options={"first_step": 0.1})
        both(field, state(seed, dtype=F32), UP.float(), **METHODS["rk4"])
    assert count["replayed"]


def test_states_without_dimensions(count):
    """Here too, but for float64."""
    for dtype, t in ((F64, UP), (F32, UP.float())):
        field, y0 = Field(dtype, features=1), torch.ones((), dtype=dtype)
        field.forward = lambda t, y, field=field: (field.inner.weight * y).sum() * torch.cos(3 * t)
        if dtype == F32:
            with refused("the first step of a 0-dim torch.float32 is chosen with the host"):
                both(field, y0, t)
        options = {} if dtype == F64 else {"first_step": 0.1}
        for scale in range(1, 4):
            both(field, scale * y0, t, options=options)
    assert count["replayed"]


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_checked_before_anything_is_recorded(graph):
    options = {"cuda_graph": graph}
    for end in (float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="t must be finite"):
            pycnf.odeint(Field(), state(), torch.tensor([0.0, end]), options=options)
    for first, error in ((torch.ones(2), ValueError), ("a", TypeError)):
        with torch.no_grad(), pytest.raises(error, match="first_step must be"):
            pycnf.odeint(Field(), state(), UP, options={"first_step": first, **options})


def test_the_gradient_of_a_gradient():
    field, y0 = Field(), state().requires_grad_()
    found = []
    for options in ({}, GRAPH):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ys = pycnf.odeint_adjoint(field, y0, UP, options=options, **LOOSE)
            (first,) = torch.autograd.grad(ys.square().sum(), y0, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), (y0, *field.parameters())))
        messages = {str(warning.message) for warning in caught}
        text = "cuda_graph: the gradient of a gradient is solved with the host; solved without"
        assert messages == ({text} if options else set())
    assert_equal(*found)


def test_numbers_on_the_host_are_read_by_value():
    """What a GPU's recording reads of the host is part of it."""
    field = Field()
    field.register_buffer("factor", torch.tensor(2.0))
    for device, same in (("cuda", False), ("cpu", True)):
        keys = []
        for value in (2.0, 3.0):
            field.factor.fill_(value)
            keys.append(recording._place(field.factor, torch.device(device)))
        assert (keys[0] == keys[1]) is same


# ---- flows ---------------------------------------------------------------------------------------


class Flow(Field):
    def __init__(self):
        super().__init__(features=2)


def assert_same_flows(field, change, times=8, end=1.0):
    flows = [CNF(field, cuda_graph=graph, engine="generic", rtol=1e-4, atol=1e-4, t1=end)
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


def test_a_flow_whose_parameter_is_another_in_the_same_memory():
    def change(field, i):
        if i % 3:
            field.inner.weight = nn.Parameter(field.inner.weight.data)

    assert_same_flows(Flow(), change, end=0.01)  # one step, so that the next solve is recorded


def test_a_flow_whose_field_gets_a_tensor():
    def shift(field, i):
        field.shift = torch.full((2,), float(i), dtype=F64)

    assert_same_flows(Flow(), shift)
