"""Dense output: torchdiffeq's where that has it (dopri5, ascending times, tensor states), and
everywhere the interpolant that odeint shows at its output times.
"""

import inspect
import warnings

import pytest
import torch
import torchdiffeq
from problems import (
    ADAPTIVE,
    FIXED,
    PROBLEMS,
    TOLERANCE,
    Recorder,
    as_tuple,
    assert_close,
    outcome,
    raised,
)

import pycnf
from pycnf.odeint import dense

F32, F64 = torch.float32, torch.float64


class Field(torch.nn.Module):
    """Time-dependent, with a parameter."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.0, 1.0], [-2.0, -0.1]], dtype=dtype))

    def forward(self, t, y):
        return torch.sin(y @ self.weight.T) + 0.3 * torch.cos(2 * t)


class TupleField(Field):
    def forward(self, t, state):
        y, work = state
        velocity = super().forward(t, y)
        return velocity, velocity.pow(2).sum() - 0.1 * work


def case(kind, dtype=F64):
    """Field, initial value and times of a kind of problem, the first and last of them the ends."""
    y0 = torch.tensor([[1.0, 0.2], [-0.3, 0.5], [0.1, 0.0]], dtype=dtype)
    t = torch.tensor([0.25, 0.26, 0.9, 1.1, 1.9, 2.0], dtype=F64)
    if kind == "tuple":
        return TupleField(dtype), (y0, torch.tensor(0.3, dtype=dtype)), t
    return Field(dtype), y0, t.flip(0) if kind == "reversed" else t


def settings(method, dtype=F64):
    tol = 1e-3 if method in ("adaptive_heun", "fehlberg2", "bosh3") or dtype != F64 else 1e-6
    return {"method": method, "rtol": tol, "atol": tol}


def objective(ys):
    return sum((part**2).sum() + part.sum() for part in as_tuple(ys))


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.complex128])
def test_equals_odeint(method, kind, dtype):
    """At every time that odeint is asked for, with as many evaluations."""
    field, y0, t = case(kind, dtype)
    keywords = settings(method, dtype)
    if dtype == torch.bfloat16:
        keywords = {"method": method, "rtol": 1e-1, "atol": 1e-1}
    with torch.no_grad():
        first, second = Recorder(field), Recorder(field)
        ys = pycnf.odeint(first, y0, t, **keywords)
        solution = pycnf.odeint_dense(second, y0, t[0], t[-1], **keywords)
        assert first.nfe == second.nfe
        found = solution(t)
        assert second.nfe == first.nfe
    eps = {F64: 1e-13, F32: 2e-6, torch.bfloat16: 2e-2, torch.complex128: 1e-13}[dtype]
    assert_close(found, ys, eps, eps)
    for i, each in enumerate(t):
        one = solution(each)
        assert_close(one, solution(each.item()), 0, 0)
        assert_close(one, tuple(p[i] for p in found) if kind == "tuple" else found[i], 0, 0)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_equals_torchdiffeqs_odeint(name):
    field, y0, t = PROBLEMS[name](F64)
    t = t.double()
    tol = TOLERANCE[F64]["dopri5"]
    with torch.no_grad():
        ys = torchdiffeq.odeint(field, y0, t, rtol=tol, atol=tol)
        found = pycnf.odeint_dense(field, y0, t[0], t[-1], rtol=tol, atol=tol)(t)
    assert_close(found, ys, 1e-9, 1e-9)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("t_dtype", [F32, F64])
def test_equals_torchdiffeq(dtype, t_dtype):
    """Its odeint_dense: values, evaluations and gradients, those to the time included."""
    results = []
    for library in (pycnf, torchdiffeq):
        field, y0, t = case("tensor", dtype)
        y0.requires_grad_()
        recorder = Recorder(field)
        solution = library.odeint_dense(
            recorder, y0, t[0].to(t_dtype), 2.0, rtol=1e-4, atol=1e-4, options={"safety": 0.8}
        )
        times = [torch.tensor(v, dtype=t_dtype, requires_grad=True) for v in (0.25, 0.7, 1.99)]
        ys = torch.stack([solution(each) for each in times])
        grads = torch.autograd.grad(objective(ys), [y0, field.weight, *times])
        results.append((ys, recorder.nfe, grads))
    (mine, my_nfe, my_grads), (theirs, their_nfe, their_grads) = results
    tolerance = 1e-12 if dtype == F64 else 1e-4
    assert my_nfe == their_nfe
    assert_close(mine, theirs, tolerance, tolerance)
    assert_close(my_grads, their_grads, 10 * tolerance, 10 * tolerance)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (0,), (2, 0), (1, 1, 1)])
def test_shapes(kind, shape):
    field, y0, t = case(kind)
    solution = pycnf.odeint_dense(field, y0, t[0], t[-1], **settings("dopri5"))
    generator = torch.Generator().manual_seed(0)
    times = 0.25 + 1.75 * torch.rand(shape, generator=generator, dtype=F64)
    found = solution(times)
    assert isinstance(found, tuple) == (kind == "tuple")
    for part, start in zip(as_tuple(found), as_tuple(y0), strict=True):
        assert part.shape == (*shape, *start.shape)
        assert part.dtype == start.dtype
        flat = part.reshape(-1, *start.shape)
        for each, time in zip(flat, times.reshape(-1).tolist()):
            (expected, *_) = [p for p in as_tuple(solution(time)) if p.shape == start.shape]
            assert_close(each, expected, 0, 0)


def test_ends_are_numbers_or_tensors():
    field, y0, _ = case("tensor")
    expected = pycnf.odeint_dense(field, y0, 0.25, 2.0)(1.3)
    for t0 in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=F64)):
        for t1 in (2, 2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=F64)):
            solution = pycnf.odeint_dense(field, y0, t0, t1)
            assert_close(solution(1.3), expected, 0, 0)
            assert_close(solution(0.25), y0, 0, 0)
            solution(2)
    # As precise as they come: 0.1 is not rounded to float32.
    number = pycnf.odeint_dense(lambda t, y: 1 + 0 * y, y0, 0.1, 1.0)
    tensor = pycnf.odeint_dense(lambda t, y: 1 + 0 * y, y0, torch.tensor(0.1, dtype=F64), 1.0)
    assert_close(number(0.7), y0 + 0.6, 1e-15, 1e-15)
    assert_close(tensor(0.7), number(0.7), 0, 0)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_is_as_accurate_as_the_tolerance(method):
    y0 = torch.tensor([1.0, 2.0], dtype=F64)
    tol = 1e-4 if method in ("adaptive_heun", "fehlberg2") else 1e-8
    for t1 in (3.0, -2.0):
        solution = pycnf.odeint_dense(
            lambda t, y: -y, y0, 0.0, t1, method=method, rtol=tol, atol=tol
        )
        times = torch.linspace(0, t1, 101, dtype=F64)
        exact = torch.exp(-times)[:, None] * y0
        # What limits these two is the interpolant, not the steps.
        allowed = 1e-4 if method in ("dopri8", "bosh3") else 200 * tol
        assert_close(solution(times), exact, allowed, allowed)


def test_discontinuities_and_given_steps():
    """A jump's slope beyond does not reach into the step before it."""

    def field(t, y):
        return torch.where(t < 1.0, -y, 5 * y)

    y0 = torch.tensor([1.0, 2.0], dtype=F64)
    t = torch.tensor([0.0, 0.3, 0.99, 1.0, 1.2, 1.3], dtype=F64)
    options = {"jump_t": torch.tensor([1.0], dtype=F64), "step_t": torch.tensor([0.5, 1.25])}
    ys = torchdiffeq.odeint(field, y0, t, rtol=1e-6, atol=1e-6, options=options)
    solution = pycnf.odeint_dense(field, y0, 0.0, 1.3, rtol=1e-6, atol=1e-6, options=options)
    assert_close(solution(t), ys, 1e-11, 1e-11)


def test_is_independent_of_what_is_edited_later():
    """The caller's y0, the states that callbacks are given, and what was returned."""
    field, y0, t = case("tensor")
    expected = pycnf.odeint_dense(field, y0.clone(), 0.25, 2.0)(t)

    with torch.no_grad():
        solution = pycnf.odeint_dense(field, y0, 0.25, 2.0)
        y0.zero_()
        first = solution(t)
        assert_close(first, expected.detach(), 0, 0)
        first.zero_()
        solution(0.25).zero_()
        assert_close(solution(t), expected.detach(), 0, 0)


def test_callbacks_edit_the_state():
    """As in odeint, whose outputs of earlier steps are not edited with it."""

    def kicked():
        field, y0, t = case("tensor")

        def callback_step(t0, y, dt):
            y.mul_(0.9)

        field.callback_step = callback_step
        return field, y0, t

    with torch.no_grad():
        field, y0, t = kicked()
        ys = torchdiffeq.odeint(field, y0, t, rtol=1e-4, atol=1e-4)
        field, y0, t = kicked()
        found = pycnf.odeint_dense(field, y0, t[0], t[-1], rtol=1e-4, atol=1e-4)(t)
    assert_close(found[1:], ys[1:], 1e-10, 1e-10)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradients_are_those_of_odeint(method, kind):
    """To y0, parameters, the start and the times; and their gradients again."""
    results = []
    for library in ("pycnf", "torchdiffeq", "dense"):
        field, y0, t = case(kind)
        leaves = [part.requires_grad_() for part in as_tuple(y0)]
        t.requires_grad_()
        if library == "dense":
            ys = pycnf.odeint_dense(field, y0, t[0], t[-1], **settings(method))(t)
        else:
            ys = {"pycnf": pycnf, "torchdiffeq": torchdiffeq}[library].odeint(
                field, y0, t, **settings(method)
            )
        inputs = [*leaves, field.weight, t]
        grads = torch.autograd.grad(objective(ys), inputs, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in grads), inputs)
        results.append((*grads, *second))
    expected, theirs, found = results
    for mine, other, reference in zip(found, expected, theirs):
        scale = max(1.0, reference.abs().max().item())
        assert_close(mine, other, 1e-9, 1e-9 * scale)
        loose = 1e-4 if method in ("dopri8", "tsit5") else 1e-8
        assert_close(mine, reference, loose, loose * scale)


def test_time_derivative_is_the_field():
    field, y0, t = case("tuple")
    with torch.no_grad():
        solution = pycnf.odeint_dense(field, y0, t[0], t[-1], rtol=1e-9, atol=1e-9)
    for value in (0.3, 1.0, 1.7):
        time = torch.tensor(value, dtype=F64, requires_grad=True)
        state = solution(time)
        slope = field(time, state)
        for i in range(3):
            (rate,) = torch.autograd.grad(state[0][i, 0], time, retain_graph=True)
            assert rate.item() == pytest.approx(slope[0][i, 0].item(), abs=1e-5)
    times = torch.linspace(0.3, 1.9, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(solution, times, atol=1e-6)


def test_no_graph_without_a_reason():
    field, y0, t = case("tensor")
    solution = pycnf.odeint_dense(lambda t, y: -y, y0, 0.25, 2.0)
    assert not solution(t).requires_grad
    with torch.no_grad():
        solution = pycnf.odeint_dense(field, y0, 0.25, 2.0)
        assert not solution(t.clone().requires_grad_()).requires_grad
    assert not solution(t).requires_grad
    assert solution(t.clone().requires_grad_()).requires_grad


# ---- errors --------------------------------------------------------------------------------------

OUTSIDE = {
    "before": -0.1,
    "after": 1.1,
    "just after": 1.0 + 1e-12,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "one of many": torch.tensor([[0.0, 0.5], [1.0, 1.01]]),
    "NaN among many": torch.tensor([0.0, float("nan"), 1.0]),
    "an integer": 2,
    "integers": torch.tensor([0, 1, 2]),
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("reverse", [False, True])
def test_times_outside(name, reverse):
    """torchdiffeq raises IndexError or AssertionError, and answers a little beyond t1."""
    ends = (1.0, 0.0) if reverse else (0.0, 1.0)
    y0 = torch.ones(2, dtype=F64)
    solution = pycnf.odeint_dense(lambda t, y: -y, y0, *ends)
    with pytest.raises(ValueError, match=r"^times must lie in \[0\.0, 1\.0\].*, got "):
        solution(OUTSIDE[name])


def test_ends_are_inside_in_every_dtype():
    """0.1 and 0.3 in float32 lie beyond the numbers by rounding."""
    y0 = torch.ones(2, dtype=F64)
    exact = torch.exp(torch.tensor(-0.2, dtype=F64)) * y0
    for low, high in ((0.1, 0.3), (torch.tensor(0.1), 0.3), (0.1, torch.tensor(0.3))):
        solution = pycnf.odeint_dense(lambda t, y: -y, y0, low, high)
        for dtype in (F32, F64):
            ends = torch.tensor([0.1, 0.3], dtype=dtype)
            assert_close(solution(ends), torch.stack([y0, exact]), 1e-6, 1e-6)
            assert_close(solution(ends[1]), exact, 1e-6, 1e-6)
        solution(0.1)
        solution(0.3)


@pytest.mark.parametrize("method", [*FIXED, "dopri"])
def test_other_methods(method):
    text = "odeint_dense needs an adaptive method, one of .*dopri8.*adaptive_heun.*, got"
    with pytest.raises(ValueError, match=f"{text} '{method}'"):
        pycnf.odeint_dense(
            lambda t, y: -y, torch.ones(2), 0.0, 1.0, method=method, options={"step_size": 0.1}
        )


@pytest.mark.parametrize("name", ["t0", "t1"])
@pytest.mark.parametrize("value", [None, "x", [0.0], torch.zeros(1), torch.zeros(2, 2)], ids=repr)
def test_ends_that_are_no_number(name, value):
    ends = {"t0": 0.0, "t1": 1.0, name: value}
    with pytest.raises(ValueError, match=f"^{name} must be a number or a 0-dim tensor, got "):
        pycnf.odeint_dense(lambda t, y: -y, torch.ones(2), **ends)


@pytest.mark.parametrize(
    "bad",
    [
        {"t0": torch.tensor(0)},
        {"y0": [1.0]},
        {"rtol": torch.tensor(1e-3, requires_grad=True)},
        {"func": lambda t, y: y * float("nan")},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_errors_are_those_of_odeint(bad):
    arguments = {"func": lambda t, y: -y, "y0": torch.ones(2), "t0": torch.tensor(0.0), "t1": 1.0}
    arguments.update(bad)
    mine = outcome(lambda: pycnf.odeint_dense(**arguments))
    t = torch.tensor([arguments.pop("t0"), arguments.pop("t1")])
    t = t.long() if "t0" in bad else t
    assert raised(mine)
    assert mine == outcome(lambda: torchdiffeq.odeint(t=t, **arguments))


def test_max_num_steps():
    y0 = torch.ones(2, dtype=F64)
    options = {"max_num_steps": 3}
    with pytest.raises(AssertionError, match=r"^max_num_steps exceeded \(3>=3\)$"):
        pycnf.odeint_dense(lambda t, y: -y, y0, 0.0, 50.0, options=options)


def test_ends_that_round_to_one_time():
    """No step is needed; the solution is there all the same."""
    y0 = torch.ones(2)
    t1 = 1.0 + 1e-12
    solution = pycnf.odeint_dense(lambda t, y: -y, y0, 1.0, t1, options={"dtype": F32})
    assert_close(solution(torch.tensor([1.0, t1], dtype=F64)), torch.ones(2, 2), 1e-6, 1e-6)


def test_signature_and_warnings():
    mine, theirs = (inspect.signature(lib.odeint_dense) for lib in (pycnf, torchdiffeq))
    assert list(mine.parameters) == list(theirs.parameters)
    for a, b in zip(mine.parameters.values(), theirs.parameters.values()):
        assert (a.kind, a.default) == (b.kind, b.default)
    texts = []
    for library in (pycnf, torchdiffeq):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            library.odeint_dense(
                lambda t, y: -y, torch.ones(2), torch.tensor(0.0), 1.0, options={"unheard_of": 3}
            )(torch.tensor(0.5))
        texts.append([str(each.message) for each in caught])
    assert texts[0] == texts[1] == ["Dopri5Solver: Unexpected arguments {'unheard_of': 3}"]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
def test_many_times_are_evaluated_in_pieces(kind, monkeypatch):
    """With the same values and gradients, a state alone larger than a piece included."""
    field, y0, t = case(kind)
    times = torch.linspace(0.25, 2.0, 23, dtype=F64, requires_grad=True)
    found = []
    for size in (2**20, 20, 1):
        monkeypatch.setattr(dense, "_VALUES_AT_ONCE", size)
        ys = pycnf.odeint_dense(field, y0, t[0], t[-1])(times)
        found.append((ys, torch.autograd.grad(objective(ys), [times, field.weight])))
    for ys, grads in found[1:]:
        assert_close(ys, found[0][0], 0, 0)
        assert_close(grads, found[0][1], 1e-12, 1e-12)


def test_torch_func_is_refused():
    with pytest.raises(NotImplementedError, match=r"odeint_dense .* torch\.func"):
        torch.func.vmap(lambda y0: pycnf.odeint_dense(lambda t, y: -y, y0, 0.0, 1.0)(0.5))(
            torch.ones(2, 3)
        )
