"""pycnf.odeint under torch.func's transforms, and odeint_per_sample: elements solved as if alone.

The reference is a loop over the elements: of torchdiffeq, or, for derivatives, of torch.autograd
through pycnf.odeint, which other tests compare with torchdiffeq.
"""

import functools
import warnings

import pytest
import torch
import torchdiffeq
from problems import (
    ADAPTIVE,
    FIXED,
    METHODS,
    TOLERANCE,
    Recorder,
    assert_close,
    outcome,
    raised,
    value_tolerance,
)
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import pycnf
from pycnf.odeint.transforms import beneath

F32, F64 = torch.float32, torch.float64
COMMON = ("dopri5", "adaptive_heun", "rk4")
# Tens of steps below, as few as show what is to be shown.
COARSE = {
    "dopri5": 1e-6,
    "dopri8": 1e-6,
    "tsit5": 1e-5,
    "bosh3": 1e-4,
    "fehlberg2": 1e-4,
    "adaptive_heun": 1e-2,
}


def swing(rate):
    """A driven pendulum of a rate of its own, for one state [2] or for rows [B, 2]."""

    def field(t, y):
        angle, speed = y.unbind(-1)
        return torch.stack([speed, torch.cos(3 * t) - rate * torch.sin(angle)], -1)

    return field


def batch(dtype=F64):
    """Rates [5] and states [5, 2] that need from few to many steps."""
    rates = torch.tensor([0.5, 12.0, 2.0, 5.0, 0.1], dtype=dtype)
    angles = torch.tensor([0.1, -1.2, 3.0, 2.0, -0.4], dtype=dtype)
    return rates, torch.stack([angles, torch.linspace(-1, 2, 5, dtype=dtype)], 1)


def grids(dtype=F64):
    """Times [5, 6], each element's own, two of them descending."""
    ends = torch.tensor([0.8, 1.5, -0.7, 0.3, -1.2], dtype=dtype)
    return 0.2 + ends[:, None] * torch.linspace(0, 1, 6, dtype=dtype) ** 1.5


def keywords(method, dtype=F64):
    tol = (COARSE if dtype == F64 else TOLERANCE[dtype]).get(method, 1e-6)
    return {"method": method, "rtol": tol, "atol": tol}


class Times(torch.nn.Module):
    """Keeps the times of the field's calls beneath vmap, [calls, B]."""

    def __init__(self, field, elements=5):
        super().__init__()
        self.field, self.elements, self.seen = field, elements, []

    def forward(self, t, y):
        self.seen.append(beneath(t.detach())[0].expand(self.elements).clone())
        return self.field(t, y)


def loop(library, rates, y0, t, **arguments):
    """Every element alone: outputs [B, T, 2] and the times of the field's calls."""
    runs = []
    for i in range(len(rates)):
        recorder = Recorder(swing(rates[i]))
        with torch.no_grad():
            ys = library.odeint(recorder, y0[i], t if t.dim() == 1 else t[i], **arguments)
        runs.append((ys, torch.stack(recorder.times)))
    return torch.stack([ys for ys, _ in runs]), [times for _, times in runs]


def by_vmap(rates, y0, t, **arguments):
    """As `loop`, for all elements at once."""
    seen = []

    def solve(rate, y0, t):
        recorder = Times(swing(rate))
        ys = pycnf.odeint(recorder, y0, t, **arguments)
        seen.append(recorder.seen)
        return ys

    ys = vmap(solve, in_dims=(0, 0, 0 if t.dim() == 2 else None))(rates, y0, t)
    return ys, torch.stack(seen[0])


def by_rows(rates, y0, t, **arguments):
    def field(t, y):
        return swing(rates)(t, y)

    recorder = Times(field)
    ys = pycnf.odeint_per_sample(recorder, y0, t, **arguments)
    return ys.transpose(0, 1), torch.stack(recorder.seen)


def assert_alone(mine, seen, theirs, own_times, method, t, exact=True):
    """Outputs, and each element's calls: its own, then none but at its initial time."""
    strict = value_tolerance(method) if exact else (2e-3, 2e-3)
    assert_close(mine, theirs, *strict)
    if not exact:
        return
    assert len(seen) == max(len(times) for times in own_times)
    assert len({len(times) for times in own_times}) > 1 or method in FIXED
    loose = 2e-3 if method == "dopri8" else 1e-6
    for i, times in enumerate(own_times):
        assert_close(seen[: len(times), i], times, loose, loose)
        start = (t if t.dim() == 1 else t[i])[0]
        assert (seen[len(times) :, i] == start).all()


# --- the same numbers and steps -----------------------------------------------------------------


@pytest.mark.parametrize("solve", [by_vmap, by_rows])
@pytest.mark.parametrize("method", METHODS)
def test_every_element_is_solved_as_alone(method, solve):
    rates, y0 = batch()
    t = torch.linspace(0.2, 1.5, 6, dtype=F64)
    theirs, times = loop(torchdiffeq, rates, y0, t, **keywords(method))
    assert_alone(*solve(rates, y0, t, **keywords(method)), theirs, times, method, t)


@pytest.mark.parametrize("solve", [by_vmap, by_rows])
@pytest.mark.parametrize("method", METHODS)
def test_times_of_its_own_in_either_direction(method, solve):
    rates, y0 = batch()
    theirs, times = loop(torchdiffeq, rates, y0, grids(), **keywords(method))
    assert_alone(*solve(rates, y0, grids(), **keywords(method)), theirs, times, method, grids())


@pytest.mark.parametrize("solve", [by_vmap, by_rows])
@pytest.mark.parametrize("method", METHODS)
def test_float32(method, solve):
    rates, y0 = batch(F32)
    t = grids(F32)
    ys, seen = solve(rates, y0, t, **keywords(method, F32))
    theirs, times = loop(torchdiffeq, rates, y0, t, **keywords(method, F32))
    assert ys.dtype == F32 and seen.dtype == F32
    # Rounding may decide on a step here: counts may differ by some.
    assert abs(len(seen) - max(map(len, times))) <= max(26, 0.1 * len(seen))
    close = 5e-2 if method == "dopri8" else 5e-3
    assert_close(ys, theirs, close, close)


OPTIONS = {
    "first_step": {"first_step": 0.03},
    "first_step far too large": {"first_step": 50.0},
    "safety, ifactor, dfactor": {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
    "min_step": {"min_step": 0.2},
    "max_step": {"max_step": 0.04},
    "step_t": {"step_t": torch.tensor([0.5, 0.1, 1.0, 0.9], dtype=F64)},
    "jump_t": {"jump_t": torch.tensor([0.25, 1.3, 0.4], dtype=F64)},
    "jump_t as a list": {"jump_t": [0.25, 1.3, 0.4]},
    "step_t and jump_t": {
        "step_t": torch.tensor([0.4, 1.9], dtype=F64),
        "jump_t": torch.tensor([0.8, 0.3], dtype=F64),
    },
    "a norm": {"norm": lambda y: y.abs().max()},
    "a norm of some values": {"norm": lambda y: y[:1].abs().sum()},
    "dtype": {"dtype": F32},
}


@functools.cache
def default_times(method):
    return loop(torchdiffeq, *batch(), grids(), **keywords(method))[1]


@pytest.mark.parametrize("solve", [by_vmap, by_rows])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
def test_adaptive_options(method, options, solve):
    rates, y0 = batch()
    t = grids()
    arguments = {**keywords(method), "options": options}
    without = default_times(method)
    theirs, times = loop(torchdiffeq, rates, y0, t, **arguments)
    if "dtype" not in options:  # which the state's f64 overrules
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(times, without))
    ys, seen = solve(rates, y0, t, **arguments)
    assert_close(ys, theirs, 1e-8, 1e-8)
    if "jump_t" not in options:  # an element's jump evaluates the field for all
        assert_alone(ys, seen, theirs, times, method, t)


def test_a_tolerance_of_its_own():
    rates, y0 = batch()
    t = torch.linspace(0, 1, 3, dtype=F64)
    tol = torch.tensor([1e-3, 1e-9, 1e-5, 1e-7, 1e-4], dtype=F64)

    def solve(rate, y0, tol):
        return pycnf.odeint(swing(rate), y0, t, rtol=tol, atol=0.1 * tol)

    theirs = [
        torchdiffeq.odeint(swing(r), y, t, rtol=each, atol=0.1 * each)
        for r, y, each in zip(rates, y0, tol.tolist())
    ]
    assert_close(vmap(solve)(rates, y0, tol), torch.stack(theirs), 1e-10, 1e-10)
    rows = pycnf.odeint_per_sample(
        swing(rates), y0, t, rtol=tol[:, None], atol=0.1 * tol[:, None]
    )  # fmt: skip
    # A tolerance a value is scaled in the dtype of time; all is f64 here.
    assert_close(rows, torch.stack(theirs, 1), 1e-10, 1e-10)


def test_a_tolerance_a_value():
    rates, y0 = batch(F32)
    t = torch.linspace(0, 1, 3)
    arguments = dict(rtol=torch.tensor([1e-3, 1e-6]), atol=torch.tensor([1e-2, 1e-6]))
    theirs, _ = loop(torchdiffeq, rates, y0, t, **arguments)
    assert_close(by_vmap(rates, y0, t, **arguments)[0], theirs, 1e-5, 1e-5)
    assert_close(by_rows(rates, y0, t, **arguments)[0], theirs, 1e-5, 1e-5)


def orbit(mass):
    """A tuple state: position [2], velocity [2], time spent (0-dim)."""

    def field(t, state):
        position, velocity, spent = state
        pull = -mass * position / (0.1 + position.square().sum())
        return velocity, pull + 0.1 * torch.sin(t), 1 + 0 * spent

    return field


@pytest.mark.parametrize(
    "extra",
    [{}, {"rtol": [1e-4, 1e-6, 1e-3]}, {"options": {"norm": lambda y: y[0].abs().max()}}],
    ids=["mixed norm", "a tolerance a part", "a norm"],
)
def test_tuple_states_with_some_parts_batched(extra):
    masses = torch.tensor([1.0, 5.0, 0.2], dtype=F64)
    position = torch.tensor([[1.0, 0.0], [0.2, 0.3], [0.0, -2.0]], dtype=F64)
    velocity, spent = torch.tensor([0.0, 0.7], dtype=F64), torch.zeros((), dtype=F64)
    t = torch.linspace(0, 2, 4, dtype=F64)
    arguments = {"rtol": 1e-5, "atol": 1e-6, **extra}

    def solve(mass, position):
        return pycnf.odeint(orbit(mass), (position, velocity, spent), t, **arguments)

    theirs = [
        torchdiffeq.odeint(orbit(m), (p, velocity, spent), t, **arguments)
        for m, p in zip(masses, position)
    ]
    theirs = tuple(torch.stack(parts) for parts in zip(*theirs))
    assert_close(vmap(solve)(masses, position), theirs, 1e-9, 1e-9)

    def field(t, state):
        position, velocity, spent = state
        pull = -masses[:, None] * position / (0.1 + position.square().sum(1, keepdim=True))
        return velocity, pull + 0.1 * torch.sin(t)[:, None], 1 + 0 * spent

    state = (position, velocity.expand(3, 2), spent.expand(3))
    rows = pycnf.odeint_per_sample(field, state, t, **arguments)
    assert_close(tuple(part.transpose(0, 1) for part in rows), theirs, 1e-9, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_parameters_are_batched(method):
    rates, y0 = batch()
    t = torch.linspace(0, 1, 4, dtype=F64)
    ys = vmap(lambda rate: pycnf.odeint(swing(rate), y0[0], t, **keywords(method)))(rates)
    theirs, _ = loop(torchdiffeq, rates, y0[:1].expand(5, 2), t, **keywords(method))
    assert_close(ys, theirs, *value_tolerance(method))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_times_are_batched(method):
    _, y0 = batch()
    rate = torch.tensor(4.0, dtype=F64)
    ys = vmap(lambda t: pycnf.odeint(swing(rate), y0[1], t, **keywords(method)))(grids())
    theirs, _ = loop(torchdiffeq, rate.expand(5), y0[1:2].expand(5, 2), grids(), **keywords(method))
    assert_close(ys, theirs, *value_tolerance(method))


def test_nothing_is_batched():
    _, y0 = batch()
    t = torch.linspace(0, 1, 4, dtype=F64)
    plain = pycnf.odeint(swing(2.0), y0[0], t)
    ys = vmap(lambda x: x + pycnf.odeint(swing(2.0), y0[0], t).sum())(torch.zeros(3, dtype=F64))
    assert_close(ys, plain.sum().expand(3), 1e-10, 1e-10)


@pytest.mark.parametrize("method", COMMON)
def test_dimensions_and_chunks_of_vmap(method):
    rates, y0 = batch()
    t = grids()
    theirs, _ = loop(pycnf, rates, y0, t, **keywords(method))

    def solve(y0, rate, t):
        return pycnf.odeint(swing(rate), y0, t, **keywords(method))

    turned = vmap(solve, in_dims=(1, 0, -1), out_dims=1, chunk_size=2)(y0.T, rates, t.T)
    assert_close(turned.transpose(0, 1), theirs, 1e-9, 1e-9)


def test_randomness_of_vmap():
    """Noise drawn for every element outside of the field."""
    _, y0 = batch()
    t = torch.linspace(0, 1, 4, dtype=F64)

    def solve(y0):
        noise = torch.rand((), dtype=F64)
        return pycnf.odeint(swing(noise), y0, t), noise

    ys, noise = vmap(solve, randomness="different")(y0)
    assert len(set(noise.tolist())) == 5
    assert_close(ys, loop(pycnf, noise, y0, t)[0], 1e-10, 1e-10)


@pytest.mark.parametrize("method", COMMON)
def test_nested_vmap(method):
    rates, y0 = batch()
    t = grids()

    def solve(rate, y0, t):
        return pycnf.odeint(swing(rate), y0, t, **keywords(method))

    inner = vmap(solve, in_dims=(None, 0, 0))
    ys = vmap(inner, in_dims=(0, None, None))(rates, y0[:3], t[:3])
    theirs = torch.stack(
        [loop(pycnf, rate.expand(3), y0[:3], t[:3], **keywords(method))[0] for rate in rates]
    )
    assert_close(ys, theirs, 1e-9, 1e-9)


@pytest.mark.parametrize("method", COMMON)
def test_zero_dim_and_complex_states(method):
    t = torch.linspace(0, 2, 5, dtype=F64)
    for dtype in (F64, F32, torch.complex128, torch.complex64):
        y0 = torch.tensor([0.5, -1.0, 2.0], dtype=dtype)
        if dtype.is_complex:
            y0 = y0 * torch.tensor([1.0, 1j, 1 + 1j], dtype=dtype)
        turn = 1j if dtype.is_complex else 1.0
        for states in (y0, torch.stack([y0, 2 * y0], 1)):

            def field(t, y):
                return turn * torch.sin(y) * torch.cos(t)  # noqa: B023

            def field_of_rows(t, y):
                return turn * torch.sin(y) * torch.cos(t).reshape([-1] + [1] * (y.dim() - 1))  # noqa: B023

            arguments = keywords(method, F32)
            theirs = torch.stack([torchdiffeq.odeint(field, y, t, **arguments) for y in states])
            ys = vmap(lambda y: pycnf.odeint(field, y, t, **arguments))(states)  # noqa: B023
            rows = pycnf.odeint_per_sample(field_of_rows, states, t, **arguments)
            close = (1e-9, 1e-9) if dtype in (F64, torch.complex128) else (1e-4, 1e-4)
            assert_close(ys, theirs, *close)
            assert_close(rows.transpose(0, 1), theirs, *close)


@pytest.mark.parametrize("method", COMMON)
@pytest.mark.parametrize("returned", [F32, F64], ids=str)
def test_field_in_another_dtype(method, returned):
    """A 16-bit state whose field computes in more, as under autocast."""
    y0 = torch.tensor([[1.0, -0.5], [0.3, 0.7]], dtype=torch.bfloat16)
    t = torch.linspace(0, 1, 3)

    def field(t, y):
        return -y.to(returned)

    theirs = torch.stack([torchdiffeq.odeint(field, y, t, **keywords(method, F32)) for y in y0])
    ys = vmap(lambda y: pycnf.odeint(field, y, t, **keywords(method, F32)))(y0)
    assert_close(ys, theirs, 2e-2, 2e-2)


def test_one_time_and_no_element():
    _, y0 = batch()
    t = torch.zeros(1, dtype=F64)
    ys, seen = by_vmap(batch()[0], y0, t)
    assert_close(ys, y0[:, None], 0, 0)
    assert len(seen) == 2
    empty = pycnf.odeint_per_sample(lambda t, y: -y, torch.zeros(0, 3), torch.linspace(0, 1, 4))
    assert empty.shape == (4, 0, 3)


def test_many_outputs_and_many_steps():
    """More outputs than steps, more steps than outputs: interpolation goes by pieces."""
    rates, y0 = batch()
    for count, end in ((60, 0.5), (3, 15.0)):
        t = torch.linspace(0, end, count, dtype=F64)
        theirs, _ = loop(pycnf, rates, y0, t, rtol=1e-4, atol=1e-4)
        assert_close(by_vmap(rates, y0, t, rtol=1e-4, atol=1e-4)[0], theirs, 1e-8, 1e-8)


def test_the_field_is_given_its_own_time():
    shapes = set()

    def field(t, y):
        shapes.add((t.shape, y.shape, t.dtype))
        return -y

    vmap(lambda y, t: pycnf.odeint(field, y, t))(torch.ones(3, 2), grids()[:3])
    pycnf.odeint_per_sample(field, torch.ones(3, 2), grids()[:3])
    assert shapes == {((), (2,), F32), ((3,), (3, 2), F32)}


def test_no_warnings():
    rates, y0 = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_vmap(rates, y0, torch.linspace(0, 1, 5, dtype=F64))
        by_vmap(rates, y0.T.contiguous().T, grids())
        by_rows(rates, y0, grids())


# --- fixed grids --------------------------------------------------------------------------------

GRIDS = {
    "step_size": {"step_size": 0.13},
    "step_size, cubic": {"step_size": 0.13, "interp": "cubic"},
    "perturbed": {"step_size": 0.2, "perturb": True},
    "perturbed on the times": {"perturb": True},
    "constructed": {"grid_constructor": lambda f, y0, t: torch.cat([t[:1], t[2:]])},
    "finer": {
        "grid_constructor": lambda f, y0, t: (
            t[:1] + (t[-1:] - t[:1]) * torch.linspace(0, 1, 9).to(t)
        ),
        "interp": "cubic",
    },
}


@pytest.mark.parametrize("shared", [True, False], ids=["one t", "a t each"])
@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("method", FIXED)
def test_grids(method, options, shared):
    rates, y0 = batch()
    t = torch.linspace(0.2, 1.3, 6, dtype=F64) if shared else grids()
    theirs, times = loop(torchdiffeq, rates, y0, t, method=method, options=options)
    ys, seen = by_vmap(rates, y0, t, method=method, options=options)
    assert_close(ys, theirs, 1e-11, 1e-11)
    if "interp" not in options:
        assert_alone(ys, seen, theirs, times, method, t)
    if "grid_constructor" not in options:
        assert_close(by_rows(rates, y0, t, method=method, options=options)[0], theirs, 1e-11, 1e-11)


def test_a_constructed_grid_of_rows():
    rates, y0 = batch()

    def halves(f, y0, t):
        assert y0.shape == (5, 2) and t.shape == (5, 6)
        middle = (t[:, 1:] + t[:, :-1]) / 2
        return torch.cat([t, middle], 1).sort(1).values

    def halves_of_one(f, y0, t):
        return torch.cat([t, (t[1:] + t[:-1]) / 2]).sort().values

    t = torch.linspace(0.2, 1.3, 6, dtype=F64)
    theirs, _ = loop(
        torchdiffeq, rates, y0, t, method="rk4", options={"grid_constructor": halves_of_one}
    )
    rows, _ = by_rows(
        rates, y0, t.expand(5, 6), method="rk4", options={"grid_constructor": halves}
    )  # fmt: skip
    assert_close(rows, theirs, 1e-12, 1e-12)


def test_a_field_that_broadcasts_on_a_grid():
    t = torch.linspace(0, 1, 4, dtype=F64)
    rates = torch.tensor([0.5, 2.0], dtype=F64)
    y0 = torch.ones(3, dtype=F64)
    ys = vmap(lambda r: pycnf.odeint(lambda t, y: r * t.reshape(1), y0, t, method="rk4"))(rates)
    theirs = [
        torchdiffeq.odeint(lambda t, y, r=r: r * t.reshape(1), y0, t, method="rk4") for r in rates
    ]
    assert_close(ys, torch.stack(theirs), 1e-12, 1e-12)


# --- derivatives --------------------------------------------------------------------------------


def scalar(method):
    """A function of (rate, y0, t) through a solve."""

    def value(rate, y0, t):
        ys = pycnf.odeint(swing(rate), y0, t, **keywords(method))
        return (ys * torch.arange(1.0, 13.0, dtype=F64).reshape(6, 2).sin()).sum()

    return value


def plain_gradients(method, arguments, second=False):
    """Gradients of `scalar` by torch.autograd, and a sum of the second ones by element."""
    inputs = [x.clone().requires_grad_() for x in arguments]
    grads = torch.autograd.grad(scalar(method)(*inputs), inputs, create_graph=second)
    if not second:
        return grads
    return grads, torch.autograd.grad(sum(g.sum() for g in grads), inputs)


def first_arguments():
    rates, y0 = batch()
    return rates[1], y0[1], grids()[1]


@pytest.mark.parametrize("method", [*COMMON, "dopri8", "tsit5"])
def test_first_derivatives_in_every_mode(method):
    arguments = first_arguments()
    expected = plain_gradients(method, arguments)
    value = scalar(method)
    close = (1e-6, 1e-7) if method == "dopri8" else (1e-9, 1e-9)
    for i, wanted in enumerate(expected):
        for mode in (grad, jacrev, jacfwd):
            assert_close(mode(value, argnums=i)(*arguments), wanted, *close)
    tangents = tuple(torch.linspace(-1, 1, x.numel(), dtype=F64).view(x.shape) for x in arguments)
    along = sum((g * v).sum() for g, v in zip(expected, tangents))
    assert_close(jvp(value, arguments, tangents)[1], along, *close)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(arguments, tangents)]
        assert_close(forward_ad.unpack_dual(value(*duals)).tangent, along, *close)


@pytest.mark.parametrize("method", COMMON)
def test_second_derivatives(method):
    arguments = first_arguments()
    _, expected = plain_gradients(method, arguments, second=True)
    value = scalar(method)

    def total(*inputs):
        return sum(g.sum() for g in grad(value, argnums=(0, 1, 2))(*inputs))

    found = grad(total, argnums=(0, 1, 2))(*arguments)
    forwards = jacfwd(total, argnums=(0, 1, 2))(*arguments)
    for mine, other, wanted in zip(found, forwards, expected):
        assert_close(mine, wanted, 1e-8, 1e-8)
        assert_close(other, wanted, 1e-8, 1e-8)
    y_hessian = hessian(value, argnums=1)(*arguments)
    assert_close(y_hessian, y_hessian.T, 1e-8, 1e-8)
    assert y_hessian.abs().max() > 1e-3


@pytest.mark.parametrize("method", [*ADAPTIVE, "midpoint", "rk4"])
def test_gradients_of_each_element(method):
    """vmap of grad, grad of vmap, and autograd through vmap and rows: those of the own solve."""
    rates, y0 = batch()
    arguments = (rates[2:], y0[2:], grids()[2:])
    close = (1e-5, 1e-5) if method == "dopri8" else (1e-8, 1e-8)
    each = [plain_gradients(method, element) for element in zip(*arguments)]
    expected = [torch.stack(parts) for parts in zip(*each)]
    per_sample = vmap(grad(scalar(method), argnums=(0, 1, 2)))(*arguments)
    of_sum = grad(lambda *a: vmap(scalar(method))(*a).sum(), argnums=(0, 1, 2))(*arguments)
    leaves = [x.clone().requires_grad_() for x in arguments]
    through = torch.autograd.grad(vmap(scalar(method))(*leaves).sum(), leaves)
    rows = pycnf.odeint_per_sample(swing(leaves[0]), *leaves[1:], **keywords(method))
    weights = torch.arange(1.0, 13.0, dtype=F64).reshape(6, 1, 2).sin()
    by_row = torch.autograd.grad((rows * weights).sum(), leaves)
    for i, wanted in enumerate(expected):
        for found in (per_sample, of_sum, through, by_row):
            assert_close(found[i], wanted, *close)


def test_gradients_to_shared_parameters():
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    ).double()
    _, y0 = batch()
    t = grids()

    def gradient(ys):
        return torch.autograd.grad(ys.square().sum(), list(net.parameters()))

    def field(t, y):
        return 4 * net(y)

    theirs = gradient(
        torch.stack([pycnf.odeint(field, y, each) for y, each in zip(y0, t)])
    )  # fmt: skip
    mine = gradient(vmap(lambda y, t: pycnf.odeint(field, y, t))(y0, t))
    rows = gradient(pycnf.odeint_per_sample(field, y0, t))
    for a, b, wanted in zip(mine, rows, theirs):
        assert_close(a, wanted, 1e-7, 1e-7)
        assert_close(b, wanted, 1e-7, 1e-7)


def test_gradients_with_options():
    """Through a first step, stops and a step size that are tensors."""
    rates, y0 = batch()
    rate, y0, t = rates[:3], y0[:3], grids()[:3, [0, 2, 5]]
    first = torch.tensor([0.05, 0.1, 0.04], dtype=F64)
    stop = t[:, 1] + torch.tensor([0.01, 0.02, -0.01], dtype=F64)

    def value(rate, y0, t, first, stop):
        options = {"first_step": first, "jump_t": stop.reshape(1)}
        return pycnf.odeint(swing(rate), y0, t, rtol=1e-5, atol=1e-5, options=options)[-1].sum()

    arguments = (rate, y0, t, first, stop)
    mine = vmap(grad(value, argnums=tuple(range(5))))(*arguments)
    for i, element in enumerate(zip(*arguments)):
        leaves = [x.clone().requires_grad_() for x in element]
        expected = torch.autograd.grad(value(*leaves), leaves)
        for found, wanted in zip(mine, expected):
            assert_close(found[i], wanted, 1e-7, 1e-8)
    assert mine[3].abs().min() > 0


def test_a_state_at_rest_has_finite_gradients():
    """Norms that are zero have no derivative: where the initial step divides by them."""
    y0 = torch.zeros(3, 2, dtype=F64)
    rates = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    t = torch.linspace(0, 1, 3, dtype=F64)

    def value(rate, y0):
        return pycnf.odeint(lambda t, y: rate * y, y0, t)[-1].sum()

    found = vmap(grad(value, argnums=(0, 1)))(rates, y0)
    for i in range(3):
        leaves = rates[i].clone().requires_grad_(), y0[i].clone().requires_grad_()
        expected = torch.autograd.grad(value(*leaves), leaves)
        for mine, wanted in zip(found, expected):
            assert torch.isfinite(wanted).all()
            assert_close(mine[i], wanted, 1e-9, 1e-9)


def test_what_is_rejected_leaves_no_nan():
    """An attempt that overflows: 0 times its infinite derivative must not be added."""
    y0 = torch.tensor([0.3, 2.0, 0.5], dtype=F64)
    rates = torch.tensor([0.01, 0.1, 0.02], dtype=F64)
    shared = torch.tensor(1.0, dtype=F64)
    t = torch.linspace(0, 0.5, 3, dtype=F64)
    seen = []

    def solve(y0, rate, shared):
        def field(t, y):
            f = y * torch.exp(shared * rate * t**8)
            seen.append(beneath(f.detach())[0])
            return f

        options = {"first_step": 3.2}
        return pycnf.odeint(field, y0, t, rtol=1e-4, atol=1e-4, method="bosh3", options=options)[-1]

    expected = []
    for element in zip(y0, rates):
        leaves = [x.clone().requires_grad_() for x in (*element, shared)]
        expected.append(torch.autograd.grad(solve(*leaves), leaves))
    assert any(torch.isinf(f).any() for f in seen), "nothing overflows here"
    leaves = [x.clone().requires_grad_() for x in (y0, rates, shared)]
    total = vmap(solve, in_dims=(0, 0, None))(*leaves).sum()
    mine = torch.autograd.grad(total, leaves)
    each = [torch.stack(column) for column in zip(*expected)]
    assert_close(mine, (each[0], each[1], each[2].sum()), 1e-9, 1e-9)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3"])
def test_what_is_finished_leaves_no_nan(method):
    """A field without derivative at an element's end, where its steps do not evaluate it."""
    ends = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    y0 = torch.ones(3, 1, dtype=F64)

    def value(y0, end):
        t = torch.stack([torch.zeros_like(end), end.detach()])

        def field(t, y):
            return -y * torch.sqrt(end - t)

        return pycnf.odeint(field, y0, t, method=method, options={"step_size": 0.1})[-1].sum()

    mine = vmap(grad(value, argnums=(0, 1)))(y0, ends)
    for i in range(3):
        leaves = y0[i].clone().requires_grad_(), ends[i].clone().requires_grad_()
        expected = torch.autograd.grad(value(*leaves), leaves)
        for found, wanted in zip(mine, expected):
            assert_close(found[i], wanted, 1e-11, 1e-11)


# --- the adjoint method ---------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["continuous", "discrete"])
def test_the_adjoint_method_gives_way(gradient):
    rates, y0 = batch()
    t = torch.linspace(0, 1, 4, dtype=F64)

    def value(rate, y0, solve, **more):
        return solve(swing(rate), y0, t, **more)[-1].sum()

    mine = vmap(
        grad(
            lambda r, y: value(
                r, y, pycnf.odeint_adjoint, adjoint_params=(), gradient=gradient
            ),
            argnums=(0, 1),
        )
    )(rates, y0)  # fmt: skip
    wanted = vmap(grad(lambda r, y: value(r, y, pycnf.odeint), argnums=(0, 1)))(rates, y0)
    assert_close(mine, wanted, 0, 0)
    assert all((g != 0).all() for g in mine)


# --- errors ---------------------------------------------------------------------------------------


def fails(call, kind=AssertionError):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def blow_up(y0, t=None, rows=False, **options):
    t = torch.linspace(0, 1, 3, dtype=F64) if t is None else t
    if rows:
        return pycnf.odeint_per_sample(lambda t, y: y * y, y0, t, options=options)
    return vmap(lambda y: pycnf.odeint(lambda t, y: y * y, y, t, options=options))(y0)


@pytest.mark.parametrize("rows", [False, True])
def test_errors_name_the_element(rows):
    y0 = torch.tensor([0.1, 0.2, 5.0, 0.3], dtype=F64)
    where = " (element 2 of a batch of 4)"
    with pytest.raises(AssertionError) as alone:
        torchdiffeq.odeint(lambda t, y: y * y, y0[2], torch.linspace(0, 1, 3, dtype=F64))
    text = fails(lambda: blow_up(y0, rows=rows))
    assert text.startswith("underflow in dt ") and text.endswith(where)
    assert str(alone.value).startswith("underflow in dt ")
    text = fails(lambda: blow_up(y0, rows=rows, min_step=0.1))
    assert text.startswith("non-finite values in state `y`: ") and text.endswith(where)
    text = fails(lambda: blow_up(y0, rows=rows, max_num_steps=7))
    assert text == "max_num_steps exceeded (7>=7)" + where
    broken = torch.where(torch.arange(4) == 2, float("nan"), y0)
    assert fails(lambda: blow_up(broken, rows=rows, first_step=0.1)) == (
        "non-finite values in state `y`: nan" + where
    )


def test_max_num_steps_counts_by_output():
    """As many attempts as it takes between two outputs, however many there are in all."""
    rates, y0 = batch()
    t = torch.linspace(0, 2, 5, dtype=F64)

    def solve(run, limit):
        options = {"max_num_steps": limit}
        return outcome(lambda: run(rates, y0, t, rtol=1e-4, atol=1e-4, options=options))

    limit = 1
    while raised(solve(functools.partial(loop, torchdiffeq), limit)):
        limit += 1
    attempts = (len(by_vmap(rates, y0, t, rtol=1e-4, atol=1e-4)[1]) - 2) // 6
    assert 1 < limit < attempts / 2
    assert torch.isfinite(solve(by_vmap, limit)[0]).all()
    for run in (by_vmap, by_rows):
        kind, text = solve(run, limit - 1)
        assert kind is AssertionError
        assert text.startswith(f"max_num_steps exceeded ({limit - 1}>={limit - 1}) (element ")


def test_errors_of_nested_elements():
    y0 = torch.tensor([[0.1, 0.2, 0.4], [0.3, 5.0, 0.1]], dtype=F64)
    t = torch.linspace(0, 1, 3, dtype=F64)
    nested = vmap(vmap(lambda y: pycnf.odeint(lambda t, y: y * y, y, t)))
    assert fails(lambda: nested(y0)).endswith(" (element 4 of a batch of 6)")
    turned = vmap(vmap(lambda y: pycnf.odeint(lambda t, y: y * y, y, t)), in_dims=1)
    assert fails(lambda: turned(y0)).endswith(" (element 3 of a batch of 6)")
    rows = vmap(lambda y: pycnf.odeint_per_sample(lambda t, y: y * y, y, t))
    assert fails(lambda: rows(y0)).endswith(" (element 4 of a batch of 6)")


def test_errors_without_a_batch_are_torchdiffeqs():
    t = torch.linspace(0, 1, 3, dtype=F64)
    y0 = torch.tensor(float("nan"), dtype=F64)

    def end(library, y):
        return library.odeint(lambda t, y: -y, y, t, options={"first_step": 0.1})[-1]

    assert fails(lambda: grad(lambda y: end(pycnf, y))(y0)) == fails(lambda: end(torchdiffeq, y0))


def test_errors_of_times():
    y0 = torch.ones(2, 1, dtype=F64)
    t = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]], dtype=F64)
    text = "t must be strictly increasing or decreasing (element 1 of a batch of 2)"
    assert fails(lambda: vmap(lambda y, t: pycnf.odeint(swing(1.0), y, t))(y0, t)) == text
    assert fails(lambda: pycnf.odeint_per_sample(swing(1.0), y0, t)) == text
    text = fails(lambda: pycnf.odeint_per_sample(swing(1.0), y0, t[:1]))
    assert text == "t must be [T], or [B, T] with B = 2 as in y0, got [1, 3]"
    text = fails(lambda: pycnf.odeint_per_sample(swing(1.0), y0, t.long()), TypeError)
    assert text == "`t` must be a floating point Tensor but is a torch.LongTensor"


def test_errors_of_arguments():
    y0, t = torch.ones(2, 1, dtype=F64), torch.linspace(0, 1, 3, dtype=F64)

    def rows(**more):
        return pycnf.odeint_per_sample(lambda t, y: -y, **{"y0": y0, "t": t, **more})

    text = fails(lambda: rows(method="magic"), ValueError)
    assert 'method "magic" is unknown: odeint_per_sample has ' in text and '"dopri5"' in text
    text = fails(lambda: vmap(lambda y: pycnf.odeint(swing(1.0), y, t, method="x"))(y0), ValueError)
    assert 'method "x" is unknown: odeint under torch.func\'s transforms has ' in text
    text = fails(lambda: rows(y0=(y0, torch.ones(3))), ValueError)
    assert "first dimension" in text and "[[2, 1], [3]]" in text
    text = fails(lambda: rows(y0=torch.ones(())), ValueError)
    assert "first dimension" in text
    text = fails(lambda: rows(y0=[y0]))
    assert text == "y0 must be either a torch.Tensor or a tuple"
    text = fails(lambda: pycnf.odeint_per_sample(lambda t, y: y[0], y0, t), ValueError)
    assert text == "func must return the shape of its state, (2, 1), got (1,)"
    text = fails(
        lambda: pycnf.odeint_per_sample(lambda t, y: (y[0], y[1][0]), (y0, y0), t), ValueError
    )
    assert text.startswith("func must return the shapes of its state, [(2, 1), (2, 1)]")
    text = fails(lambda: rows(options={"jump_t": [0.5], "step_t": [0.5]}), ValueError)
    assert text == "`step_t` and `jump_t` must not have any repeated elements between them."
    text = fails(lambda: rows(method="rk4", options={"interp": "x"}), ValueError)
    assert text == "Unknown interpolation method x"
    text = fails(
        lambda: rows(method="rk4", options={"step_size": 1, "grid_constructor": abs}), ValueError
    )
    assert text == "step_size and grid_constructor are mutually exclusive arguments."
    text = fails(lambda: rows(method="rk4", options={"grid_constructor": lambda f, y, t: t[:, :2]}))
    assert text == "the grid must begin and end as t does (element 0 of a batch of 2)"
    text = fails(
        lambda: vmap(lambda y: pycnf.odeint(swing(1.0), y, t, method="gl4"))(y0), ValueError
    )
    assert text.startswith('method "gl4" is not supported here: odeint under torch.func')
    text = fails(lambda: rows(rtol=torch.ones(3)), ValueError)
    assert text == "rtol must broadcast to the state's shape (2, 1), got (3,)"
    text = fails(lambda: rows(options={"first_step": torch.ones(3)}), ValueError)
    assert text == "first_step must be one number or 2, one for each row of y0, got (3,)"
    text = fails(lambda: rows(options={"norm": "l2"}), TypeError)
    assert text == "norm must be a function, got 'l2'"
    text = fails(lambda: rows(t=t[:0]), IndexError)
    assert text == "t must have at least the initial time, got no time"
    text = fails(lambda: rows(t=torch.tensor([0.0, float("inf")])), ValueError)
    assert text == "t must be finite (element 0 of a batch of 2)"
    text = fails(lambda: rows(method="rk4", options={"step_size": 0.0}), ValueError)
    assert text == "step_size must be positive, got 0.0"


def test_a_field_written_for_one_time_is_told_of_its_rows():
    y0 = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"times of shape \(2,\), .* may want t\[:, None\]"):
        pycnf.odeint_per_sample(lambda t, y: -t * y, y0, torch.tensor([0.0, 1.0]))
    with pytest.raises(RuntimeError, match=r"^no$"):
        pycnf.odeint_per_sample(complains, y0, torch.tensor([0.0, 1.0]))


def complains(t, y):
    raise RuntimeError("no")


def test_unknown_options_and_callbacks_warn():
    y0, t = torch.ones(2, 1), torch.linspace(0, 1, 3)
    with pytest.warns(UserWarning, match="Dopri5Solver: Unexpected arguments {'magic': 1}"):
        vmap(lambda y: pycnf.odeint(lambda t, y: -y, y, t, options={"magic": 1}))(y0)
    field = torch.nn.Linear(1, 1)
    field.forward = lambda t, y: -y
    field.callback_step = print
    with pytest.warns(UserWarning, match="does not support callbacks {'callback_step'}"):
        pycnf.odeint_per_sample(field, y0, t)


def test_the_state_may_be_edited_by_the_field():
    """What was given out first is a copy."""
    y0 = torch.ones(3, 2)

    def field(t, y):
        f = -y.clone()
        y.zero_()
        return f

    ys = pycnf.odeint_per_sample(field, y0.clone(), torch.linspace(0, 1, 3), method="euler")
    assert_close(ys[0], y0, 0, 0)
