"""Gradients: backpropagation through odeint, the continuous adjoint, and the discrete one.

The first two must equal torchdiffeq's, with equal numbers of evaluations. The discrete gradient is
pycnf's own: it must equal backpropagation through odeint with the step sizes held constant.
"""

import functools
import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
import torchdiffeq
from problems import (
    ADAPTIVE,
    FIXED,
    FIXED_STAGES,
    METHODS,
    STAGES,
    Recorder,
    as_tuple,
    assert_close,
    flat,
    outcome,
    raised,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pycnf

F32, F64 = torch.float32, torch.float64
KINDS = ("tensor", "tuple", "reversed")
REPRESENTATIVE = ("dopri5", "dopri8", "tsit5", "adaptive_heun", "rk4")


class Field(torch.nn.Module):
    """A smooth field of time and state with a parameter that it does not use."""

    def __init__(self, dtype=F64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(3, 3, generator=generator, dtype=F64)
        self.weight = torch.nn.Parameter(weight.to(dtype))
        self.shift = torch.nn.Parameter(torch.tensor([0.3, -0.1, 0.2], dtype=dtype))
        self.idle = torch.nn.Parameter(torch.ones(4, dtype=dtype))

    def forward(self, t, y):
        return 2 * torch.sin(y @ self.weight + t * self.shift) - 0.3 * t * y


class TupleField(Field):
    """The same with a running cost as second part, 0-dim."""

    def forward(self, t, state):
        y, cost = state
        velocity = super().forward(t, y)
        return velocity, torch.cos(t) * velocity.pow(2).sum() - 0.1 * cost


def case(kind, dtype=F64):
    """Field, initial value and times of a kind of problem."""
    y0 = torch.tensor([[0.5, -1.0, 0.2], [1.0, 0.3, -0.4]], dtype=dtype)
    t = torch.tensor([0.1, 0.35, 0.8, 1.2], dtype=dtype)
    if kind == "tuple":
        return TupleField(dtype), (y0, torch.tensor(0.7, dtype=dtype)), t
    return Field(dtype), y0, t.flip(0) if kind == "reversed" else t


def objective(ys):
    """A nonlinear function of every output, unequal in all of them."""
    total = 0.0
    for part in as_tuple(ys):
        weights = torch.linspace(0.5, 2.0, part.numel(), dtype=F64).reshape(part.shape)
        total = total + (weights.to(part.real.dtype) * (part + 0.3 * part * part).abs()).sum()
    return total


def gradients(solver, field, y0, t, time_grad=True, **keywords):
    """Gradients of the objective to every part of y0, to t and to every parameter."""
    recorder = Recorder(field)
    start = tuple(part.detach().clone().requires_grad_() for part in as_tuple(y0))
    t = t.detach().clone().requires_grad_(time_grad)
    ys = solver(recorder, start if isinstance(y0, tuple) else start[0], t, **keywords)
    forward = recorder.nfe
    inputs = [*start, *([t] if time_grad else []), *field.parameters()]
    grads = torch.autograd.grad(objective(ys), inputs, allow_unused=True)
    return SimpleNamespace(
        ys=ys, grads=grads, forward=forward, backward=recorder.nfe - forward, recorder=recorder
    )


def assert_same_gradients(mine, theirs, tolerance):
    """Equal to a tolerance relative to each gradient's largest entry; None where theirs is None."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            scale = float(b.abs().max()) if b.numel() else 0.0
            assert_close(a, b, rtol=0.0, atol=tolerance * max(scale, 1e-12))


def count_rejections(field, y0, t, **keywords):
    """Of a solve by torchdiffeq."""
    recorder = Recorder(field)
    rejected = []
    recorder.callback_reject_step = lambda t0, y, dt: rejected.append(t0)
    with torch.no_grad():
        torchdiffeq.odeint(recorder, y0, t, **keywords)
    return len(rejected)


def tolerances(method):
    tol = {"adaptive_heun": 1e-3, "fehlberg2": 1e-5, "bosh3": 1e-4}.get(method, 1e-5)
    return {"method": method, "rtol": tol, "atol": tol}


def noise(method):
    """Agreement without first_step, given the noise of dopri8's first steps (see problems.py)."""
    return 1e-4 if method == "dopri8" else 1e-9


# --- backpropagation through odeint -----------------------------------------------------------


@pytest.mark.parametrize("first_step", [None, 0.2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_backpropagation_adaptive(method, kind, first_step):
    """y0, t and parameters; without first_step the gradient flows through its choice as well."""
    keywords = tolerances(method)
    if first_step is not None:
        keywords["options"] = {"first_step": first_step}
    mine = gradients(pycnf.odeint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint, *case(kind), **keywords)
    assert mine.forward == theirs.forward
    assert_same_gradients(mine.grads, theirs.grads, noise(method) if first_step is None else 1e-9)


def test_gradient_through_the_first_step_is_visible():
    """The choice of the first step changes torchdiffeq's gradient: the test above can fail."""
    field, y0, t = case("tensor")
    keywords = tolerances("bosh3")
    steps = []
    field.callback_step = lambda t0, y, dt: steps.append(dt.item())
    recorder = gradients(torchdiffeq.odeint, field, y0, t, **keywords)
    steps.clear()
    torchdiffeq.odeint(field, y0, t, **keywords)
    constant = gradients(
        torchdiffeq.odeint, field, y0, t, **keywords, options={"first_step": steps[0]}
    )
    difference = (recorder.grads[0] - constant.grads[0]).abs().max()
    assert difference > 1e-7 * constant.grads[0].abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIXED)
def test_backpropagation_fixed(method, kind):
    mine = gradients(pycnf.odeint, *case(kind), method=method)
    theirs = gradients(torchdiffeq.odeint, *case(kind), method=method)
    assert mine.forward == theirs.forward
    assert_same_gradients(mine.grads, theirs.grads, 1e-11)


def grid_with_graph(f, y0, t):
    inner = torch.stack([t[:-1], 0.25 * t[1:] + 0.75 * t[:-1]], 1).reshape(-1)
    return torch.cat([inner, t[-1:]])


FIXED_OPTIONS = {
    "step_size": {"step_size": 0.13},
    "cubic": {"step_size": 0.3, "interp": "cubic"},
    "perturb": {"step_size": 0.13, "perturb": True},
    "perturb, cubic": {"perturb": True, "interp": "cubic"},
    "grid_constructor": {"grid_constructor": grid_with_graph},
}


@pytest.mark.parametrize("options", FIXED_OPTIONS.values(), ids=FIXED_OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIXED)
def test_backpropagation_fixed_options(method, kind, options):
    """Gradients to times flow through the grid, its step sizes and the interpolation."""
    mine = gradients(pycnf.odeint, *case(kind), method=method, options=options)
    theirs = gradients(torchdiffeq.odeint, *case(kind), method=method, options=options)
    assert mine.forward == theirs.forward
    assert_same_gradients(mine.grads, theirs.grads, 1e-11)


STOPS = {
    "step_t": lambda: {"step_t": torch.tensor([0.2, 0.7], dtype=F64)},
    "jump_t": lambda: {"jump_t": torch.tensor([0.2, 0.7], dtype=F64)},
    "both": lambda: {
        "step_t": torch.tensor([0.3], dtype=F64),
        "jump_t": torch.tensor([0.2, 0.7], dtype=F64),
    },
}


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("kind", ["tuple", "reversed"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_backpropagation_with_prescribed_times(method, kind, stops):
    """A step clipped to a prescribed time has a size that depends on where it starts."""
    keywords = {**tolerances(method), "options": {"first_step": 0.15, **STOPS[stops]()}}
    mine = gradients(pycnf.odeint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint, *case(kind), **keywords)
    assert mine.forward == theirs.forward
    assert_same_gradients(mine.grads, theirs.grads, 1e-9)


@pytest.mark.parametrize("name", ["first_step", "step_t", "jump_t"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_backpropagation_to_given_options(method, kind, name):
    """first_step, step_t and jump_t given as tensors that require grad get their gradients."""

    def run(library):
        field, y0, t = case(kind)
        options = {
            "first_step": torch.tensor(0.02, dtype=F64),
            "step_t": torch.tensor([0.4], dtype=F64),
            "jump_t": torch.tensor([0.9], dtype=F64),
        }
        options[name].requires_grad_()
        keywords = {**tolerances(method), "options": options}
        ys = library.odeint(field, y0, t, **keywords)
        (grad,) = torch.autograd.grad(objective(ys), options[name], allow_unused=True)
        return [torch.zeros(()) if grad is None else grad]

    theirs = run(torchdiffeq)
    assert theirs[0].abs().max() > 1e-10
    mine = run(pycnf)
    assert (mine[0] - theirs[0]).abs().max() < 1e-6 * theirs[0].abs().max() + 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_backpropagation_to_whatever_the_field_uses(method):
    """Leaves and inner nodes that the field closes over: odeint needs no list of parameters."""

    def run(library):
        base = torch.tensor([0.3, -0.5], dtype=F64, requires_grad=True)
        rates = base.exp()
        y0 = torch.tensor([1.0, 2.0], dtype=F64)
        t = torch.linspace(0, 1, 3, dtype=F64)
        ys = library.odeint(
            lambda t, y: torch.sin(rates * y) + t * rates, y0, t, **tolerances(method)
        )
        return torch.autograd.grad(objective(ys), base)

    assert_same_gradients(run(pycnf), run(torchdiffeq), noise(method))


@pytest.mark.parametrize("method", METHODS)
def test_parameter_that_matters_late(method):
    """The field's first values carry no graph, later ones do; the compiled start must hand over."""

    def run(library):
        weight = torch.tensor(0.7, dtype=F64, requires_grad=True)

        def field(t, y):
            return torch.cos(y) * (weight if t > 0.5 else 0.7)

        y0 = torch.tensor([1.0, 2.0], dtype=F64)
        options = {"step_size": 0.1} if method in FIXED else {"first_step": 0.05, "max_step": 0.1}
        t = torch.linspace(0, 1, 4, dtype=F64)
        ys = library.odeint(field, y0, t, options=options, **tolerances(method))
        return torch.autograd.grad(objective(ys), weight)

    theirs = run(torchdiffeq)
    assert theirs[0].abs() > 1e-6
    assert_same_gradients(run(pycnf), theirs, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_initial_value_has_a_graph(method):
    """A field under no_grad: y0 still carries its gradient, along y0 + h Σ b k with k constant."""

    def run(library):
        def field(t, y):
            with torch.no_grad():
                return torch.sin(y) + t

        y0 = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
        t = torch.linspace(0, 1, 3, dtype=F64)
        ys = library.odeint(field, y0, t, **tolerances(method))
        return torch.autograd.grad(objective(ys), y0)

    assert_same_gradients(run(pycnf), run(torchdiffeq), noise(method))


@pytest.mark.parametrize("method", METHODS)
def test_only_times_have_a_graph(method):
    def run(library):
        t = torch.linspace(0, 1, 3, dtype=F64).requires_grad_()
        y0 = torch.tensor([1.0, 2.0], dtype=F64)
        ys = library.odeint(lambda t, y: torch.sin(y) + t, y0, t, **tolerances(method))
        return torch.autograd.grad(objective(ys), t)

    assert_same_gradients(run(pycnf), run(torchdiffeq), noise(method))


@pytest.mark.parametrize("method", METHODS)
def test_graph_or_none(method):
    """Outputs carry a graph if and only if torchdiffeq's do."""
    for kind in KINDS:
        field, y0, t = case(kind)
        for setting in ("nothing", "parameters", "y0", "t", "no_grad"):
            field.requires_grad_(setting in ("parameters", "no_grad"))
            start = tuple(p.clone().requires_grad_(setting == "y0") for p in as_tuple(y0))
            start = start if kind == "tuple" else start[0]
            times = t.clone().requires_grad_(setting == "t")
            found = []
            for library in (pycnf, torchdiffeq):
                with torch.set_grad_enabled(setting != "no_grad"):
                    ys = library.odeint(field, start, times, method=method, rtol=0.1, atol=0.1)
                found.append([part.requires_grad for part in as_tuple(ys)])
            assert found[0] == found[1], (kind, setting)


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "euler", "rk4"])
def test_gradient_of_one_output(method, kind, which):
    """Steps after the chosen output must not contribute."""

    def run(library):
        field, y0, t = case(kind)
        start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
        t = t.clone().requires_grad_()
        ys = library.odeint(field, start if kind == "tuple" else start[0], t, **tolerances(method))
        picked = sum(part[which].pow(2).sum() for part in as_tuple(ys))
        inputs = [*start, t, *field.parameters()]
        grads = torch.autograd.grad(picked, inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads)]

    assert_same_gradients(run(pycnf), run(torchdiffeq), 1e-9)


@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_many_outputs(method):
    field, y0, _ = case("tensor")
    t = torch.linspace(0, 1, 60, dtype=F64)
    keywords = tolerances(method)
    if method in ADAPTIVE:
        keywords["options"] = {"first_step": 0.1}
    mine = gradients(pycnf.odeint, field, y0, t, **keywords)
    theirs = gradients(torchdiffeq.odeint, field, y0, t, **keywords)
    assert_same_gradients(mine.grads, theirs.grads, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_backpropagation_f32(method, kind):
    """The step size is forced, so that only the arithmetic's rounding is in play."""
    options = {"step_size": 0.1}
    if method in ADAPTIVE:
        options = {"first_step": 0.1, "min_step": 0.1, "max_step": 0.1}
    keywords = {"method": method, "options": options}
    mine = gradients(pycnf.odeint, *case(kind, F32), **keywords)
    theirs = gradients(torchdiffeq.odeint, *case(kind, F32), **keywords)
    assert_same_gradients(mine.grads, theirs.grads, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_backpropagation_in_other_dtypes(method, dtype):
    def run(library):
        y0 = torch.tensor([0.5, -1.0, 0.2]).to(dtype).requires_grad_()
        rate = torch.tensor(0.8).to(dtype).requires_grad_()
        options = {"step_size": 0.25}
        if method in ADAPTIVE:
            options = {"first_step": 0.25, "min_step": 0.25, "max_step": 0.25}
        t = torch.tensor([0.0, 0.5, 1.0])
        ys = library.odeint(
            lambda t, y: torch.sin(rate * y) * (1 + t), y0, t, method=method, options=options
        )
        return torch.autograd.grad(objective(ys), (y0, rate))

    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-10
    assert_same_gradients(run(pycnf), run(torchdiffeq), tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_double_backward(method, kind):
    """Second derivatives through the solver's operations, to y0, t and parameters."""

    def run(library):
        field, y0, t = case(kind)
        start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
        t = t[:3].clone().requires_grad_()
        keywords = {**tolerances(method), "rtol": 1e-3, "atol": 1e-3}
        if method in ADAPTIVE:
            keywords["options"] = {"first_step": 0.2}
        ys = library.odeint(field, start if kind == "tuple" else start[0], t, **keywords)
        inputs = [*start, t, field.weight, field.shift]
        grads = torch.autograd.grad(objective(ys), inputs, create_graph=True)
        penalty = sum((grad * grad.detach().cos()).sum() + grad.pow(2).sum() for grad in grads)
        return torch.autograd.grad(penalty, inputs)

    assert_same_gradients(run(pycnf), run(torchdiffeq), 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    """Against finite differences, first and second order: not only against another program."""
    options = {"step_size": 0.3}
    if method in ADAPTIVE:
        options = {"first_step": 0.3, "min_step": 0.3, "max_step": 0.3}

    def solve(y0, t, weight):
        def field(t, y):
            return torch.sin(weight * y + t)

        return pycnf.odeint(field, y0, t, method=method, options=options)

    inputs = [
        torch.tensor([0.4, -0.9], dtype=F64),
        torch.tensor([0.1, 0.5, 0.95], dtype=F64),
        torch.tensor(1.3, dtype=F64),
    ]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(solve, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(solve, inputs, atol=1e-6)


# --- the continuous adjoint -------------------------------------------------------------------


def assert_same_adjoint(mine, theirs, tolerance=1e-8):
    """Gradients, and evaluations forward and backward."""
    assert (mine.forward, mine.backward) == (theirs.forward, theirs.backward)
    assert_same_gradients(mine.grads, theirs.grads, tolerance)


@pytest.mark.parametrize(
    ("kind", "time_grad"),
    [("tensor", False), ("tensor", True), ("tuple", True), ("reversed", True)],
)
@pytest.mark.parametrize("method", METHODS)
def test_adjoint(method, kind, time_grad):
    """One fresh solve per output interval; with t.requires_grad one more evaluation per output."""
    keywords = {**tolerances(method), "time_grad": time_grad}
    mine = gradients(pycnf.odeint_adjoint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint_adjoint, *case(kind), **keywords)
    assert theirs.grads[-1].tolist() == [0.0] * 4, "an unused parameter gets zeros, not None"
    assert_same_adjoint(mine, theirs, 1e-3 if method == "dopri8" else 1e-8)
    assert_close(
        tuple(part.detach() for part in as_tuple(mine.ys)),
        tuple(part.detach() for part in as_tuple(theirs.ys)),
        1e-5,
        1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_adjoint_calls_are_the_same(method, kind):
    """The record of all evaluations, forward and backward: times and states."""
    keywords = tolerances(method)
    mine = gradients(pycnf.odeint_adjoint, *case(kind), **keywords).recorder
    theirs = gradients(torchdiffeq.odeint_adjoint, *case(kind), **keywords).recorder
    assert_close(torch.stack(mine.times), torch.stack(theirs.times), 1e-6, 1e-6)
    assert_close(torch.stack(mine.states), torch.stack(theirs.states), 1e-6, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun"])
def test_seminorm(method, kind):
    """Parameters do not drive the step: fewer evaluations, and torchdiffeq's number of them."""
    keywords = {**tolerances(method), "adjoint_options": {"norm": "seminorm"}}
    mine = gradients(pycnf.odeint_adjoint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint_adjoint, *case(kind), **keywords)
    default = gradients(torchdiffeq.odeint_adjoint, *case(kind), **tolerances(method))
    assert theirs.backward < default.backward
    assert_same_adjoint(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_custom_adjoint_norm_sees_the_structure(kind):
    """(t, *y, *adj_y, *params), with a tuple state unpacked; the idle parameter is among them."""

    def run(library):
        shapes = set()

        def norm(parts):
            shapes.add(tuple(part.shape for part in parts))
            assert isinstance(parts, tuple)
            return max(part.abs().max() for part in parts)

        keywords = {**tolerances("dopri5"), "adjoint_options": {"norm": norm}}
        return gradients(library.odeint_adjoint, *case(kind), **keywords), shapes

    (mine, my_shapes), (theirs, their_shapes) = run(pycnf), run(torchdiffeq)
    state = [(2, 3), ()] if kind == "tuple" else [(2, 3)]
    assert their_shapes == {tuple(map(torch.Size, [(), *state, *state, (3, 3), (3,), (4,)]))}
    assert my_shapes == their_shapes
    default = gradients(torchdiffeq.odeint_adjoint, *case(kind), **tolerances("dopri5"))
    assert theirs.backward != default.backward
    assert_same_adjoint(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_state_norm_is_used_in_the_default_adjoint_norm(kind):
    """options["norm"] is not inherited, but the default adjoint norm uses it for y and adj_y."""

    def norm(state):
        return 30 * flat(state).abs().max()

    keywords = {**tolerances("dopri5"), "options": {"norm": norm}}
    mine = gradients(pycnf.odeint_adjoint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint_adjoint, *case(kind), **keywords)
    default = gradients(torchdiffeq.odeint_adjoint, *case(kind), **tolerances("dopri5"))
    assert theirs.backward != default.backward
    assert_same_adjoint(mine, theirs)
    keywords["adjoint_options"] = {"norm": "seminorm"}
    mine = gradients(pycnf.odeint_adjoint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint_adjoint, *case(kind), **keywords)
    assert_same_adjoint(mine, theirs)


ADJOINT_ARGUMENTS = {
    "tolerances": {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-2},
    "rtol only": {"adjoint_rtol": 1e-8},
    "method": {"adjoint_method": "bosh3"},
    "fixed method": {"adjoint_method": "rk4"},
    "fixed method with options": {"adjoint_method": "euler", "adjoint_options": {"step_size": 0.1}},
    "fixed method and seminorm": {"adjoint_method": "rk4", "adjoint_options": {"norm": "seminorm"}},
    "options for both": {"options": {"first_step": 0.1, "safety": 0.7}},
    "options of each": {"options": {"first_step": 0.1}, "adjoint_options": {"first_step": 0.03}},
    "no options backward": {"options": {"first_step": 0.1}, "adjoint_options": {}},
    "max_step backward": {"adjoint_options": {"max_step": 0.07}},
    "step_t": {"options": {"step_t": torch.tensor([0.5], dtype=F64)}},
    "jump_t": {"options": {"jump_t": torch.tensor([0.5], dtype=F64)}},
    "step_t backward": {"adjoint_options": {"step_t": torch.tensor([0.5, -0.5], dtype=F64)}},
    "time dtype": {"options": {"dtype": torch.float32}},
    "the same method named": {"method": "dopri5", "adjoint_method": "dopri5"},
}


@pytest.mark.parametrize("kind", ["tensor", "reversed"])
@pytest.mark.parametrize("arguments", ADJOINT_ARGUMENTS.values(), ids=ADJOINT_ARGUMENTS)
def test_adjoint_arguments(arguments, kind):
    """Prescribed times are misplaced for descending t, as in torchdiffeq: only the counts tell."""
    keywords = {**tolerances("dopri5"), **arguments}
    mine = gradients(pycnf.odeint_adjoint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint_adjoint, *case(kind), **keywords)
    assert_same_adjoint(mine, theirs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tuple_state", [False, True])
def test_grid_constructor_in_the_backward_pass(tuple_state, reverse):
    """What the user's constructor is given there, including the negated times for descending t."""

    def run(library):
        seen = []

        def grid(f, y0, t):
            seen.append(t.tolist())
            middle = (t[:-1] + t[1:]) / 2
            return torch.cat([t, middle]).sort(descending=bool(t[0] > t[-1])).values

        field, y0, t = case("tuple" if tuple_state else "tensor")
        t = t.flip(0) if reverse else t
        keywords = {"method": "rk4", "options": {"grid_constructor": grid}}
        return gradients(library.odeint_adjoint, field, y0, t, **keywords), seen

    (mine, my_times), (theirs, their_times) = run(pycnf), run(torchdiffeq)
    assert len(their_times) == 4
    assert my_times == their_times
    assert_same_adjoint(mine, theirs, 1e-11)


@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_adjoint_many_outputs(method):
    field, y0, _ = case("tensor")
    t = torch.linspace(0, 1, 12, dtype=F64)
    mine = gradients(pycnf.odeint_adjoint, field, y0, t, **tolerances(method))
    theirs = gradients(torchdiffeq.odeint_adjoint, field, y0, t, **tolerances(method))
    assert_same_adjoint(mine, theirs, 1e-3 if method == "dopri8" else 1e-8)


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_one_time(method, kind, gradient):
    """Nothing to integrate: y0 gets the output's gradient, the rest zeros."""
    field, y0, t = case(kind)
    solver = functools.partial(pycnf.odeint_adjoint, gradient=gradient)
    mine = gradients(solver, field, y0, t[:1], method=method)
    theirs = gradients(torchdiffeq.odeint_adjoint, field, y0, t[:1], method=method)
    assert_same_gradients(mine.grads, theirs.grads, 1e-12)


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_frozen_and_chosen_parameters(method, gradient):
    """Frozen parameters get None, unused ones zeros, those not named None; generators are taken."""
    ours = functools.partial(pycnf.odeint_adjoint, gradient=gradient)
    choices = {
        "all": None,
        "none": lambda f: (),
        "one": lambda f: [f.shift],
        "generator": lambda f: (p for p in (f.weight, f.idle)),
    }
    for frozen in (False, True):
        for choice in choices.values():

            def run(solver, frozen=frozen, choice=choice):
                field, y0, t = case("tensor")
                field.weight.requires_grad_(not frozen)
                params = {} if choice is None else {"adjoint_params": choice(field)}
                y0 = y0.requires_grad_()
                ys = solver(field, y0, t, method=method, rtol=1e-7, atol=1e-7, **params)
                objective(ys).backward()
                return [p.grad for p in (y0, *field.parameters())]

            mine, theirs = run(ours), run(torchdiffeq.odeint_adjoint)
            tolerance = 1e-8 if gradient == "continuous" else 1e-4
            if method == "rk4" and gradient == "discrete":
                # The two are different gradients of the same coarse solve; compare which exist.
                assert [g is None for g in mine] == [g is None for g in theirs]
            else:
                assert_same_gradients(mine, theirs, tolerance)


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
def test_function_with_given_parameters(gradient):
    """A plain function with adjoint_params; a tensor it uses that is not named gets no gradient."""

    def run(solver):
        named = torch.tensor(0.8, dtype=F64, requires_grad=True)
        other = torch.tensor(0.3, dtype=F64, requires_grad=True)
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
        ys = solver(lambda t, y: torch.sin(named * y) + other * t, y0, t, adjoint_params=(named,))
        objective(ys).backward()
        return named.grad, other.grad

    mine = run(functools.partial(pycnf.odeint_adjoint, gradient=gradient))
    theirs = run(torchdiffeq.odeint_adjoint)
    assert theirs[1] is None
    assert_same_gradients(mine, theirs, 1e-6)


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_requires_a_gradient(kind, gradient):
    """Without anything to differentiate the result has no graph; y0 alone is enough for one."""
    field, y0, t = case(kind)
    field.requires_grad_(False)
    keywords = {"rtol": 1e-3, "atol": 1e-3, "gradient": gradient}
    for part in as_tuple(pycnf.odeint_adjoint(field, y0, t, **keywords)):
        assert not part.requires_grad
    start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
    start = start if kind == "tuple" else start[0]
    for part in as_tuple(pycnf.odeint_adjoint(field, start, t, **keywords)):
        assert part.requires_grad
    with torch.no_grad():
        for part in as_tuple(pycnf.odeint_adjoint(field, start, t, **keywords)):
            assert not part.requires_grad


def adjoint_node(ys):
    """The node of the solve: behind a tensor; two hops behind the parts of a tuple."""
    if torch.is_tensor(ys):
        return ys.grad_fn
    return ys[0].grad_fn.next_functions[0][0].next_functions[0][0]


@pytest.mark.parametrize("norm", ["default", "seminorm", "custom"])
@pytest.mark.parametrize("kind", KINDS)
def test_users_replace_the_norm_between_forward_and_backward(kind, norm):
    """The norm found there is callable on the adjoint state as the solver has it; the replacement
    is used: both its value and the number of evaluations show it."""
    options = {
        "default": None,
        "seminorm": {"norm": "seminorm"},
        "custom": {"norm": lambda parts: parts[1].abs().max()},
    }[norm]

    def run(library, factor):
        field, y0, t = case(kind)
        recorder = Recorder(field)
        keywords = {**tolerances("dopri5"), "adjoint_options": options}
        ys = library.odeint_adjoint(recorder, y0, t, **keywords)
        node = adjoint_node(ys)
        given = node.adjoint_options["norm"]
        values, shapes = [], set()

        def spy(parts):
            shapes.add(tuple(part.shape for part in parts))
            value = given(parts)
            assert torch.is_tensor(value)
            assert value.shape == ()
            values.append(float(value))
            return value * factor

        node.adjoint_options["norm"] = spy
        forward = recorder.nfe
        objective(ys).backward()
        return recorder.nfe - forward, values, shapes, [field.weight.grad, field.shift.grad]

    mine, theirs = run(pycnf, 1.0), run(torchdiffeq, 1.0)
    size = (7,) if kind == "tuple" else (2, 3)
    assert theirs[2] == {tuple(map(torch.Size, [(), size, size, (3, 3), (3,), (4,)]))}
    assert mine[2] == theirs[2]
    assert mine[0] == theirs[0]
    assert len(mine[1]) == len(theirs[1])
    assert mine[1] == pytest.approx(theirs[1], rel=1e-5, abs=1e-9)
    assert_same_gradients(mine[3], theirs[3], 1e-8)
    strict, reference = run(pycnf, 1e3), run(torchdiffeq, 1e3)
    assert reference[0] > theirs[0]
    assert strict[0] == reference[0]
    assert_same_gradients(strict[3], reference[3], 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_users_replace_other_adjoint_options(kind):
    """The dict is read in backward, whole."""

    def run(library):
        field, y0, t = case(kind)
        recorder = Recorder(field)
        ys = library.odeint_adjoint(recorder, y0, t, **tolerances("dopri5"))
        node = adjoint_node(ys)
        node.adjoint_options["max_step"] = 0.02
        forward = recorder.nfe
        objective(ys).backward()
        return recorder.nfe - forward, [field.weight.grad]

    mine, theirs = run(pycnf), run(torchdiffeq)
    assert theirs[0] > 300
    assert mine[0] == theirs[0]
    assert_same_gradients(mine[1], theirs[1], 1e-8)


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
def test_backward_twice(gradient):
    """retain_graph keeps what the backward pass needs, and it gives the same again."""
    field, y0, t = case("tuple")
    ys = pycnf.odeint_adjoint(field, y0, t, rtol=1e-4, atol=1e-4, gradient=gradient)
    loss = objective(ys)
    first = torch.autograd.grad(loss, [field.weight, field.shift], retain_graph=True)
    second = torch.autograd.grad(loss, [field.weight, field.shift])
    assert_same_gradients(second, first, 1e-15)
    assert raised(outcome(lambda: torch.autograd.grad(loss, [field.weight])))


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_parameters_changed_before_backward(method, gradient):
    """An optimizer step between the passes would give a gradient of neither: it raises."""
    solvers = [functools.partial(pycnf.odeint_adjoint, gradient=gradient)]
    if gradient == "continuous":
        solvers.append(torchdiffeq.odeint_adjoint)
    for solver in solvers:
        field, y0, t = case("tensor")
        ys = solver(field, y0, t, method=method, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            field.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            objective(ys).backward()


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_initial_value_reused_before_backward(method, kind, gradient):
    """A y0 without gradient may be overwritten by the next batch: the tape must not alias it."""

    def run(overwrite):
        field, y0, t = case(kind)
        ys = pycnf.odeint_adjoint(
            field, y0, t, method=method, rtol=1e-3, atol=1e-3, gradient=gradient
        )
        loss = objective(ys)
        if overwrite:
            for part in (*as_tuple(y0), t):
                part.fill_(17.0)
        return torch.autograd.grad(loss, [field.weight, field.shift])

    result = outcome(lambda: run(True))
    if raised(result):
        # torchdiffeq saves t itself, and so may we: then overwriting it raises.
        assert "modified by an inplace operation" in result[1]
    else:
        assert_same_gradients(result, run(False), 1e-14)


@pytest.mark.parametrize("dtype", [F32, torch.complex128], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "midpoint", "rk4"])
def test_adjoint_in_other_dtypes(method, dtype):
    def run(library):
        y0 = torch.tensor([0.5, -1.0, 0.2]).to(dtype).requires_grad_()
        rate = torch.tensor(0.8).to(dtype).requires_grad_()
        t = torch.tensor([0.0, 0.5, 1.0], requires_grad=dtype == F32)
        ys = library.odeint_adjoint(
            lambda t, y: torch.sin(rate * y) * (1 + t),
            y0,
            t,
            method=method,
            rtol=1e-4,
            atol=1e-4,
            adjoint_params=(rate,),
        )
        inputs = (y0, rate, t) if dtype == F32 else (y0, rate)
        return torch.autograd.grad(objective(ys), inputs)

    assert_same_gradients(run(pycnf), run(torchdiffeq), 1e-3 if dtype == F32 else 1e-7)


class Replica(torch.nn.Module):
    """What DataParallel makes: parameters as plain attributes that are inner nodes of the graph."""

    def __init__(self, weight):
        super().__init__()
        self._is_replica = True
        self.__dict__["weight"] = weight

    def forward(self, t, y):
        return torch.sin(self.weight * y) + t


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
def test_data_parallel_replica(gradient):
    def run(solver):
        weight = torch.tensor([0.5, 1.5], dtype=F64, requires_grad=True)
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
        ys = solver(Replica(weight * 1.0), y0, t)
        return torch.autograd.grad(objective(ys), weight)

    mine = run(functools.partial(pycnf.odeint_adjoint, gradient=gradient))
    assert_same_gradients(mine, run(torchdiffeq.odeint_adjoint), 1e-6)


class CallOverride(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))

    def __call__(self, t, y):
        return torch.sin(self.rate * y) * (1 + t)


class NoGradInside(CallOverride):
    def __call__(self, t, y):
        with torch.no_grad():
            return super().__call__(t, y)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_of_a_module_with_its_own_call(method):
    def run(library):
        field = CallOverride()
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
        ys = library.odeint_adjoint(field, y0, t, method=method)
        return torch.autograd.grad(objective(ys), field.rate)

    assert_same_gradients(run(pycnf), run(torchdiffeq), 1e-8)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_of_a_field_under_no_grad(method):
    """It cannot be differentiated; torchdiffeq raises in backward, and so must we."""

    def run(library):
        field = NoGradInside()
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
        ys = library.odeint_adjoint(field, y0, t, method=method)
        return outcome(lambda: torch.autograd.grad(objective(ys), field.rate))

    mine, theirs = run(pycnf), run(torchdiffeq)
    assert theirs[0] is RuntimeError
    assert mine == theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_adjoint_callbacks(method, kind):
    """callback_*_adjoint run in the backward solves, with the augmented state's parts."""
    names = ("callback_step", "callback_accept_step", "callback_reject_step")
    names = names[:1] if method == "rk4" else names

    def run(library):
        field, y0, t = case(kind)
        log = []
        for name in (*names, *(f"{name}_adjoint" for name in names)):

            def called(t0, state, dt, name=name):
                shapes = [part.shape for part in as_tuple(state)]
                log.append((name, float(t0), float(dt), shapes, t0.dtype, dt.dtype))

            setattr(field, name, called)
        keywords = {"method": method, "rtol": 1e-4, "atol": 1e-4}
        ys = library.odeint_adjoint(field, y0, t, **keywords)
        objective(ys).backward()
        return log

    mine, theirs = run(pycnf), run(torchdiffeq)
    assert {entry[0] for entry in theirs} >= {"callback_step", "callback_step_adjoint"}
    assert [entry[0] for entry in mine] == [entry[0] for entry in theirs]
    for a, b in zip(mine, theirs):
        assert a[1:3] == pytest.approx(b[1:3], rel=1e-6, abs=1e-9)
        assert a[3:] == b[3:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_callbacks_edit_in_place(method, kind):
    """Tumour models scale the adjoint in callback_step_adjoint: the parts are live."""

    def run(library, edit):
        field, y0, t = case(kind)
        calls = []

        def scale(t0, state, dt):
            calls.append(t0)
            if edit and len(calls) <= 3:
                state[2].mul_(0.5)

        field.callback_step_adjoint = scale
        ys = library.odeint_adjoint(field, y0, t, method=method, rtol=1e-4, atol=1e-4)
        objective(ys).backward()
        return len(calls), [field.weight.grad, field.shift.grad]

    mine, theirs = run(pycnf, True), run(torchdiffeq, True)
    plain = run(torchdiffeq, False)
    assert (theirs[1][0] - plain[1][0]).abs().max() > 1e-3
    assert mine[0] == theirs[0]
    assert_same_gradients(mine[1], theirs[1], 1e-8)


def test_adjoint_unknown_options_warn_in_both_passes():
    def run(library):
        field, y0, t = case("tensor")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ys = library.odeint_adjoint(field, y0, t, method="rk4", options={"foo": 1})
            forward = len(caught)
            objective(ys).backward()
        return [str(w.message) for w in caught], forward

    mine, theirs = run(pycnf), run(torchdiffeq)
    text = "RK4: Unexpected arguments {'foo': 1}"
    assert theirs == ([text] * 4, 1)
    assert mine[0][: mine[1]] == [text]
    assert set(mine[0][mine[1] :]) == {text}


# --- the discrete gradient --------------------------------------------------------------------

discrete = functools.partial(pycnf.odeint_adjoint, gradient="discrete")


def assert_is_backpropagation(kind, tolerance=1e-10, **keywords):
    """The discrete gradient against backpropagation, ours and torchdiffeq's; the same solution."""
    mine = gradients(discrete, *case(kind), **keywords)
    through = gradients(pycnf.odeint, *case(kind), **keywords)
    theirs = gradients(torchdiffeq.odeint, *case(kind), **keywords)
    zeros = [*through.grads[:-1], torch.zeros(4, dtype=F64)]
    assert through.grads[-1] is None, "odeint gives an unused parameter None, the adjoint zeros"
    assert_same_gradients(mine.grads, zeros, tolerance)
    assert_same_gradients(mine.grads[:-1], theirs.grads[:-1], 10 * tolerance)
    for a, b in zip(as_tuple(mine.ys), as_tuple(through.ys)):
        assert_close(a.detach(), b.detach(), 1e-12, 1e-12)
    assert mine.forward == theirs.forward
    return mine


@pytest.mark.parametrize("first_step", [0.05, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_discrete_equals_backpropagation(method, kind, first_step):
    """Every method, several outputs, to y0, t and parameters; the large first step is rejected."""
    keywords = {**tolerances(method), "options": {"first_step": first_step}}
    if first_step == 2.0:
        field, y0, t = case(kind)
        assert count_rejections(field, y0, t, **keywords) > 0
    assert_is_backpropagation(kind, **keywords)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIXED)
def test_discrete_equals_backpropagation_fixed(method, kind):
    """Step sizes of a fixed grid are functions of t, and so is the gradient."""
    assert_is_backpropagation(kind, method=method)


@pytest.mark.parametrize("options", FIXED_OPTIONS.values(), ids=FIXED_OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FIXED)
def test_discrete_equals_backpropagation_fixed_options(method, kind, options):
    assert_is_backpropagation(kind, method=method, options=options)


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("kind", ["tuple", "reversed"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_discrete_with_prescribed_times(method, kind, stops):
    """Across a jump the derivative is taken anew; a clipped step depends on its start time."""
    options = {"first_step": 0.15, **STOPS[stops]()}
    assert_is_backpropagation(kind, **tolerances(method), options=options)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_discrete_of_a_discontinuous_field(method):
    """With jump_t at the discontinuity, the two sides have their own parameters."""

    class Kicked(Field):
        def forward(self, t, y):
            return super().forward(t, y) + (self.idle[0] if t > 0.5 else self.idle[1]) * y.cos()

    def run(solver):
        _, y0, t = case("tensor")
        options = {"first_step": 0.1, "jump_t": torch.tensor([0.5], dtype=F64)}
        return gradients(solver, Kicked(), y0, t, options=options, **tolerances(method))

    mine, theirs = run(discrete), run(pycnf.odeint)
    assert theirs.grads[-1][:2].abs().min() > 1e-3
    assert_same_gradients(mine.grads, theirs.grads, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_discrete_holds_the_chosen_first_step_constant(method, kind):
    """Without first_step: as if the chosen one had been given."""
    steps = []
    field, y0, t = case(kind)
    field.callback_step = lambda t0, y, dt: steps.append(float(dt))
    with torch.no_grad():
        pycnf.odeint(field, y0, t, **tolerances(method))
    mine = gradients(discrete, *case(kind), **tolerances(method))
    given = gradients(
        pycnf.odeint, *case(kind), **tolerances(method), options={"first_step": steps[0]}
    )
    tolerance = 1e-5 if method == "dopri8" else 1e-10
    assert_same_gradients(mine.grads[:-1], given.grads[:-1], tolerance)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "fehlberg2", "rk4"])
def test_discrete_many_outputs(method):
    """Several outputs in one step and steps without any."""
    field, y0, _ = case("tensor")
    t = torch.cat([torch.linspace(0, 0.1, 20), torch.tensor([0.9, 1.0])]).double()
    keywords = tolerances(method)
    if method in ADAPTIVE:
        keywords["options"] = {"first_step": 0.05}
    mine = gradients(discrete, field, y0, t, **keywords)
    theirs = gradients(pycnf.odeint, field, y0, t, **keywords)
    assert_same_gradients(mine.grads[:-1], theirs.grads[:-1], 1e-10)


@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_discrete_gradient_of_one_output(method, kind, which):
    def run(solver):
        field, y0, t = case(kind)
        start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
        t = t.clone().requires_grad_()
        keywords = tolerances(method)
        if method in ADAPTIVE:
            keywords["options"] = {"first_step": 0.1}
        ys = solver(field, start if kind == "tuple" else start[0], t, **keywords)
        picked = sum(part[which].pow(2).sum() for part in as_tuple(ys))
        inputs = [*start, t, field.weight]
        grads = torch.autograd.grad(picked, inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads)]

    assert_same_gradients(run(discrete), run(pycnf.odeint), 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_discrete_solution_is_odeint_s(method):
    """Bit for bit: the tape does not change what is computed."""
    for kind in KINDS:
        field, y0, t = case(kind)
        with torch.no_grad():
            plain = pycnf.odeint(field, y0, t, **tolerances(method))
        ys = discrete(field, y0, t, **tolerances(method))
        assert all(torch.equal(a.detach(), b) for a, b in zip(as_tuple(ys), as_tuple(plain)))


@pytest.mark.parametrize("dtype", [F32, torch.complex128], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_discrete_in_other_dtypes(method, dtype):
    options = {"step_size": 0.2}
    if method in ADAPTIVE:
        options = {"first_step": 0.2, "min_step": 0.2, "max_step": 0.2}

    def run(solver, **keywords):
        y0 = torch.tensor([0.5, -1.0, 0.2]).to(dtype).requires_grad_()
        rate = torch.tensor(0.8).to(dtype).requires_grad_()
        t = torch.tensor([0.0, 0.5, 1.0])
        ys = solver(
            lambda t, y: torch.sin(rate * y) * (1 + t),
            y0,
            t,
            method=method,
            options=options,
            **keywords,
        )
        return torch.autograd.grad(objective(ys), (y0, rate))

    mine = run(
        lambda f, y0, t, **keywords: discrete(
            f, y0, t, adjoint_params=[c.cell_contents for c in f.__closure__], **keywords
        )
    )
    assert_same_gradients(mine, run(pycnf.odeint), 1e-5 if dtype == F32 else 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_discrete_gradcheck(method):
    """Against finite differences of the solve with forced steps."""
    options = {"step_size": 0.3}
    if method in ADAPTIVE:
        options = {"first_step": 0.3, "min_step": 0.3, "max_step": 0.3}

    def solve(y0, t, weight):
        return discrete(
            lambda t, y: torch.sin(weight * y + t),
            y0,
            t,
            method=method,
            options=options,
            adjoint_params=(weight,),
        )

    inputs = [
        torch.tensor([0.4, -0.9], dtype=F64),
        torch.tensor([0.1, 0.5, 0.95], dtype=F64),
        torch.tensor(1.3, dtype=F64),
    ]
    assert torch.autograd.gradcheck(solve, [x.requires_grad_() for x in inputs], atol=1e-6)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_discrete_backward_cost(method):
    """Accepted steps times stages, nothing for the rejected, one for the start."""
    keywords = {**tolerances(method), "options": {"first_step": 2.0}}
    field, y0, t = case("tensor")
    accepted = []
    recorder = Recorder(field)
    recorder.callback_accept_step = lambda t0, y, dt: accepted.append(t0)
    ys = discrete(recorder, y0, t, **keywords)
    forward = recorder.nfe
    assert forward > 1 + STAGES[method] * len(accepted), "nothing was rejected"
    objective(ys).backward()
    backward = recorder.nfe - forward
    assert len(accepted) * STAGES[method] <= backward <= len(accepted) * (STAGES[method] + 1) + 1


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_discrete_backward_calls_no_callbacks(method):
    """The replay is not a solve."""
    field, y0, t = case("tensor")
    calls = []
    for name in ("callback_step", "callback_step_adjoint"):
        setattr(field, name, lambda t0, y, dt: calls.append(t0))
    ys = discrete(field, y0, t, method=method, rtol=1e-3, atol=1e-3)
    before = len(calls)
    objective(ys).backward()
    assert len(calls) == before > 0


# --- memory -----------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes alive at once in tensors made while it is on."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata not in self.alive:
                    self.alive[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
                    self.total += self.alive[reference.cdata][1]
        if self.total > self.peak:
            # What died since is only looked for when it matters.
            self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}
            self.total = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.total)
        return result


class Wide(torch.nn.Module):
    """A field whose state dwarfs everything else, and whose graph keeps several states."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(6.0, dtype=F64))

    def forward(self, t, y):
        return torch.cos(self.rate * t) * torch.sin(y) * torch.cos(y)


SIZE = 4096


def peak_and_steps(solver, method, steps, **keywords):
    """Peak of live memory over forward and backward, in states, and accepted steps."""
    field = Wide()
    y0, t = torch.linspace(-1, 1, SIZE, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    h = 1.0 / steps
    options = {"step_size": h}
    if method in ADAPTIVE:
        options = {"first_step": h, "min_step": h, "max_step": h}
    with LiveBytes() as live:
        ys = solver(field, y0, t, method=method, options=options, **keywords)
        ys[-1].pow(2).sum().backward()
    assert field.rate.grad is not None
    return live.peak / (8 * SIZE)


@pytest.mark.parametrize("method", METHODS)
def test_discrete_memory(method):
    """The tape grows by the state of each accepted step (and its first stage where that is not f
    of the state), not by its stages; the backward pass holds one step's graph."""
    few, many = (peak_and_steps(discrete, method, steps) for steps in (4, 16))
    per_step = (many - few) / 12
    allowed = 1.1 if method in (*FIXED, "dopri5", "dopri8", "bosh3") else 2.1
    assert per_step <= allowed
    # The measure sees what backpropagation keeps: several states for each stage.
    few, many = (peak_and_steps(pycnf.odeint, method, steps) for steps in (4, 16))
    assert (many - few) / 12 > 2.1


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4"])
def test_continuous_memory(method):
    """Constant in the number of steps."""
    few, many = (peak_and_steps(pycnf.odeint_adjoint, method, steps) for steps in (4, 16))
    assert many - few < 3


class LiveGraphs:
    """Counts the evaluations of a field whose graph is alive, and the most of them at once."""

    def __init__(self):
        self.alive = self.peak = 0

    def mark(self, y):
        return Marked.apply(y, self)


class Token:
    def __init__(self, count):
        self.count = count
        count.alive += 1
        count.peak = max(count.peak, count.alive)

    def __del__(self):
        self.count.alive -= 1


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, count):
        ctx.token = Token(count)
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_discrete_holds_the_graph_of_one_step(method, kind):
    """At most one step's evaluations have a graph at any time, and none is left afterwards."""

    graphs = LiveGraphs()

    class Watched(Field):
        def forward(self, t, y):
            return super().forward(t, graphs.mark(y))

    class WatchedTuple(TupleField):
        def forward(self, t, y):
            return super().forward(t, (graphs.mark(y[0]), y[1]))

    _, y0, t = case(kind)
    field = WatchedTuple() if kind == "tuple" else Watched()
    keywords = tolerances(method)
    if method in FIXED:
        keywords["options"] = {"step_size": 0.05}
    ys = discrete(field, y0, t, **keywords)
    assert graphs.alive == 0
    graphs.peak = 0
    objective(ys).backward()
    assert 0 < graphs.peak <= {**STAGES, **FIXED_STAGES}[method] + 3
    del ys
    assert graphs.alive == 0


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks(kind, gradient):
    """Dropping the result frees the state: no cycle through the node, with gc off."""
    gc.disable()
    try:
        field, y0, t = case(kind)
        start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
        ys = pycnf.odeint_adjoint(
            field,
            start if kind == "tuple" else start[0],
            t,
            rtol=1e-3,
            atol=1e-3,
            gradient=gradient,
        )
        storage = StorageWeakRef(as_tuple(ys)[0].untyped_storage())
        del ys
        assert storage.expired()
    finally:
        gc.enable()


def test_a_discrete_gradient_says_that_it_uses_no_adjoint_arguments():
    func, t = torch.nn.Linear(2, 2), torch.tensor([0.0, 1.0])
    field = torch.nn.Sequential(func)
    field.forward = lambda t, y: func(y)
    with pytest.warns(UserWarning, match="adjoint_rtol, adjoint_method not used"):
        pycnf.odeint_adjoint(
            field, torch.ones(1, 2), t, gradient="discrete", adjoint_rtol=1e-3, adjoint_method="rk4"
        )


@pytest.mark.parametrize("gradient", ["continuous", "joined", "discrete"])
def test_times_of_complex_states(gradient):
    """Against differences of the loss; torchdiffeq's adjoint leaves out a conjugate here."""
    y0 = torch.tensor([1.0 + 0.5j, -0.3 + 1.0j], dtype=torch.complex128)

    def field(t, y):
        return (0.3 + 1.7j) * y * torch.cos(t) + 0.2 * y.flip(0)

    def loss(t):
        y = pycnf.odeint_adjoint(
            field, y0, t, rtol=1e-9, atol=1e-9, adjoint_params=(), gradient=gradient
        )
        return (y[1] * (0.4 - 1.1j)).real.sum() + y[2].abs().square().sum()

    t = torch.tensor([0.1, 0.6, 1.3], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(t), t)
    steps = 1e-5 * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([(loss(t + step) - loss(t - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
