"""Event handling: every call of the field and of the event function, times, states and gradients
are torchdiffeq's.

Beyond it: a discrete gradient up to an event, and an error where it differentiates wrongly twice.
"""

import functools
import inspect
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torchdiffeq
from problems import (
    ADAPTIVE,
    FIXED,
    METHODS,
    as_tuple,
    assert_close,
    flat,
    outcome,
    raised,
)

import pycnf
from pycnf.odeint import solve

F32, F64 = torch.float32, torch.float64
LIBRARIES = (pycnf, torchdiffeq)
ADAMS = ("explicit_adams", "implicit_adams")
GRID = (*FIXED, *ADAMS)
GRADIENT_METHODS = ("dopri5", "dopri8", "bosh3", "tsit5", "adaptive_heun", "rk4", "midpoint")


class Field(torch.nn.Module):
    """A driven, damped oscillator with parameters."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.0, 1.0], [-2.0, -0.1]], dtype=dtype))
        self.force = torch.nn.Parameter(torch.tensor([0.1, 0.3], dtype=dtype))

    def forward(self, t, y):
        return y @ self.weight.T + self.force * torch.sin(2 * t)


class TupleField(Field):
    """The same, and a 0-dim work beside it."""

    def forward(self, t, state):
        y, work = state
        velocity = super().forward(t, y)
        return velocity, velocity.pow(2).sum() - 0.1 * work


def tensor_event(t, y):
    """Several components: the second, not the first, changes sign first."""
    return torch.stack([y[0] + 4 + 0 * t, 0.5 - y[1] - 0.1 * t, t + 40])


def tuple_event(t, state):
    y, work = state
    return work - 2.5 - 0.01 * t + 0 * y[0]


def case(kind, dtype=F64):
    """Field, initial value, [t0, direction] and event function of a kind of problem."""
    y0 = torch.tensor([1.0, 0.2], dtype=dtype)
    if kind == "tuple":
        y0 = (y0, torch.tensor(0.3, dtype=dtype))
        return TupleField(dtype), y0, torch.tensor([0.2, 0.3]), tuple_event
    t = torch.tensor([0.2, 7.0], dtype=F64)
    if kind == "reversed":
        return Field(dtype), y0, torch.tensor([0.2, 0.1], dtype=F64), tensor_event
    return Field(dtype), y0, t, tensor_event


def settings(method, dtype=F64):
    """Tolerances, or a step, and the cubic interpolant for some."""
    if method in GRID:
        options = {"step_size": 0.03, "interp": "cubic" if method == "midpoint" else "linear"}
        return {"method": method, "options": options, "atol": 1e-6}
    tol = 1e-3 if method in ("adaptive_heun", "fehlberg2", "bosh3") or dtype == F32 else 1e-6
    return {"method": method, "rtol": tol, "atol": tol}


class Log:
    """Keeps every call of a field and of an event function, in order."""

    def __init__(self, field, event_fn):
        self.field, self.event_fn = field, event_fn
        self.calls = []

    def _keep(self, name, t, y):
        assert len(self.calls) < 30_000, "the solve does not come to an end"
        shapes = [part.shape for part in as_tuple(y)]
        self.calls.append((name, type(y), shapes, t.dtype, t.shape, t.item(), flat(y).detach() + 0))

    def func(self, t, y):
        self._keep("field", t.detach(), y)
        return self.field(t, y)

    def event(self, t, y):
        self._keep("event", t.detach(), y)
        return self.event_fn(t, y)

    @property
    def counts(self):
        return [sum(call[0] == name for call in self.calls) for name in ("field", "event")]


def run(library, problem, solver="odeint", **keywords):
    """One solve up to an event: its time, states, and every call."""
    field, y0, t, event_fn = problem
    log = Log(field, event_fn)
    if solver == "odeint_adjoint":
        keywords["adjoint_params"] = tuple(field.parameters())
    event_t, ys = getattr(library, solver)(log.func, y0, t, event_fn=log.event, **keywords)
    return SimpleNamespace(event_t=event_t, ys=ys, log=log)


def both(*arguments, **keywords):
    return [run(library, *arguments, **keywords) for library in LIBRARIES]


def assert_same_event(mine, theirs, tolerance=1e-11):
    """The same calls in the same order, the same event."""
    assert [call[:5] for call in mine.log.calls] == [call[:5] for call in theirs.log.calls]
    for a, b in zip(mine.log.calls, theirs.log.calls):
        assert a[5] == pytest.approx(b[5], rel=tolerance, abs=tolerance)
        assert_close(a[6], b[6], tolerance, tolerance)
    assert mine.event_t.shape == ()
    assert_close(mine.event_t, theirs.event_t, tolerance, tolerance)
    assert_close(mine.ys, theirs.ys, tolerance, tolerance)


# ---- the search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", [*METHODS, *ADAMS])
def test_same_calls_and_event(method, kind):
    with torch.no_grad():
        mine, theirs = both(case(kind), **settings(method))
    assert_same_event(mine, theirs, 1e-8 if method in ("dopri8", "tsit5") else 1e-11)
    # It is an event: a sign changed, and nothing before.
    _, y0, t, event_fn = case(kind)
    end = tuple(part[1] for part in as_tuple(mine.ys))
    value = event_fn(mine.event_t, end if isinstance(y0, tuple) else end[0])
    start = event_fn(t[0], y0)
    least = (value * start.sign()).min().item()
    assert abs(least) < (1e-2 if method in FIXED or "e" in method else 1e-3)
    assert abs(mine.event_t - t[0]) > 0.1


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", *GRID])
def test_float32(method, kind):
    with torch.no_grad():
        mine, theirs = both(case(kind, F32), **settings(method, F32))
    assert mine.log.counts == theirs.log.counts
    # Adaptive steps follow error estimates that are rounding in part.
    assert_same_event(mine, theirs, 2e-6 if method in GRID else 2e-2)
    assert_close(mine.event_t, theirs.event_t, 1e-3, 1e-3)
    assert_close(mine.ys, theirs.ys, 1e-3, 1e-3)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("t_dtype", [F32, F64, torch.bfloat16])
@pytest.mark.parametrize("y_dtype", [F32, F64, torch.complex128])
def test_dtypes_of_time(method, t_dtype, y_dtype):
    """The event's time has t's dtype; the event function sees the solver's."""
    field, y0, _, _ = case("tensor", y_dtype)
    t = torch.tensor([0.25, 1.0], dtype=t_dtype)
    problem = (field, y0, t, lambda t, y: y[0].real - 0.3 - 0 * t)
    with torch.no_grad():
        mine, theirs = both(problem, **settings(method, F32))
    assert mine.event_t.dtype == t_dtype
    assert_same_event(mine, theirs, 1e-9 if y_dtype != F32 else 3e-3)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "euler", "rk4"])
def test_half_precision(method):
    y0 = torch.tensor([1.0, 0.5], dtype=torch.bfloat16)
    problem = (lambda t, y: -y, y0, torch.tensor([0.0, 1.0]), lambda t, y: y[0] - 0.6)
    options = {"step_size": 0.125} if method in FIXED else None
    with torch.no_grad():
        mine, theirs = both(problem, method=method, rtol=1e-1, atol=1e-2, options=options)
    assert mine.log.counts == theirs.log.counts
    assert_close(mine.event_t, theirs.event_t, 1e-2, 1e-2)
    assert_close(mine.ys, theirs.ys, 1e-2, 1e-2)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_second_time_gives_the_direction_only(method):
    field, y0, _, event_fn = case("tensor")
    ends = []
    for end in (0.2001, 0.5, 300.0):
        t = torch.tensor([0.2, end], dtype=F64)
        ends.append(run(pycnf, (field, y0, t, event_fn), **settings(method)).event_t.item())
    assert ends[0] == ends[1] == ends[2]
    back = torch.tensor([0.2, 0.1999], dtype=F64)
    assert run(pycnf, (field, y0, back, event_fn), **settings(method)).event_t < 0.2 < ends[0]


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_rejected_attempts_call_the_event_function_too(method):
    """A bump that the grown step must shrink for."""

    def field(t, y):
        return 20 * torch.exp(-(((t - 1.3) / 0.1) ** 2)) - y

    y0, t = torch.tensor([1.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    rejected = []
    mine, theirs = [], []
    for library, found in zip(LIBRARIES, (mine, theirs)):
        log = Log(field, lambda t, y: y[0] - 3)
        module = torch.nn.Identity()
        module.forward = log.func
        module.callback_reject_step = lambda t, y, dt: rejected.append(t.item())
        event_t, ys = library.odeint(
            module, y0, t, event_fn=log.event, method=method, rtol=1e-4, atol=1e-4
        )
        found.append(SimpleNamespace(event_t=event_t, ys=ys, log=log))
    assert len(rejected) >= 2
    assert_same_event(mine[0], theirs[0])


STOPS = {
    "jump_t before": {"jump_t": torch.tensor([0.45])},
    "jump_t at the step of the event": {"jump_t": torch.tensor([0.35, 1.0]), "first_step": 0.01},
    "step_t": {"step_t": torch.tensor([0.3, 0.5])},
    "max_step": {"max_step": 0.05},
    "first_step": {"first_step": 0.02},
    "dtype": {"dtype": F32},
    "large steps": {"first_step": 3.0},
}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("grad", [False, True])
def test_options_of_adaptive_methods(name, grad):
    problem = case("tensor", F32 if name == "dtype" else F64)
    keywords = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5, "options": STOPS[name]}
    with torch.set_grad_enabled(grad):
        mine, theirs = both(problem, **keywords)
    assert_same_event(mine, theirs, 2e-4 if name == "dtype" else 1e-11)
    assert mine.ys.requires_grad == theirs.ys.requires_grad == grad


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_event_in_a_step_that_ends_at_a_jump(method, grad):
    """The field beyond the jump is evaluated before the event function is asked, and the
    interpolant is still that of the step before the jump.
    """
    problem = (
        lambda t, y: torch.where(t < 1.0, -y, 5 * y),
        torch.tensor([1.0, 2.0], dtype=F64, requires_grad=grad),
        torch.tensor([0.0, 1.0], dtype=F64),
        lambda t, y: y[0] - 0.4,
    )
    options = {"jump_t": torch.tensor([1.0], dtype=F64), "first_step": 0.5}
    mine, theirs = both(problem, method=method, rtol=1e-2, atol=1e-3, options=options)
    assert_same_event(mine, theirs)
    jump = torch.nextafter(torch.tensor(1.0, dtype=F64), torch.tensor(2.0, dtype=F64)).item()
    assert jump in [call[5] for call in mine.log.calls if call[0] == "field"]
    assert mine.event_t < 1.0
    assert mine.event_t.item() == pytest.approx(-math.log(0.4), abs=1e-2)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_event_at_the_start(method, reverse):
    """Adaptive methods return at once; fixed ones go on from sign zero."""
    field, y0, t, _ = case("reversed" if reverse else "tensor")
    problem = (field, y0, t, lambda t, y: torch.stack([y[0] - 1.0, y[1] + 5]))
    keywords = settings(method)
    if method == "rk4":
        # A component that is zero at the start stays out; the other ends the solve.
        problem = (*problem[:3], lambda t, y: torch.stack([y[0] - 1.0, y[1] - 0.1]))
    mine, theirs = both(problem, **keywords)
    assert_same_event(mine, theirs)
    if method == "dopri5":
        assert mine.event_t == t[0]
        assert mine.log.counts == [2, 2]
        assert_close(mine.ys[1], y0, 0, 0)


def test_event_function_without_numbers():
    """NaN has sign 0: an event where there was a sign before."""
    field, y0, t, _ = case("tensor")
    problem = (field, y0, t, lambda t, y: (y[0] - 0.5).sqrt())
    for method in ("dopri5", "rk4"):
        mine, theirs = both(problem, **settings(method))
        assert_same_event(mine, theirs)
        assert mine.ys[1, 0].item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_event_function_without_numbers_at_the_start(method):
    """One component of NaN keeps the sign 0 until another one turns negative; without any other
    torchdiffeq steps for ever."""
    field, y0, t, _ = case("tensor")

    def event_fn(t, y):
        return torch.stack([(t - 0.4).sqrt(), y[0] - 0.5])

    mine, theirs = both((field, y0, t, event_fn), **settings(method))
    assert_same_event(mine, theirs)
    assert mine.ys[1, 0].item() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match=r"^event_fn has no number at t\[0\] = 0\.2"):
        run(pycnf, (field, y0, t, lambda t, y: torch.nan * y), **settings(method))


@pytest.mark.parametrize("call", [3, 5])
def test_event_function_that_changes_its_mind(call):
    """Its sign differs without a step: torchdiffeq divides by the length of none."""
    found = []
    for library in LIBRARIES:
        field, y0, t, _ = case("tensor")
        calls = []

        def event_fn(t, y, calls=calls):
            calls.append(t)
            return torch.tensor(-1.0 if len(calls) > call else 1.0)

        options = {"first_step": 50.0}
        found.append(library.odeint(field, y0, t, event_fn=event_fn, options=options))
        found[-1] = (*found[-1], torch.tensor(len(calls)))
    assert_close(*found, 0, 0)
    assert found[0][1][1].isnan().all()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("atol", [1e-2, 1e-12, 0.3, [1e-5], torch.tensor(1e-5), (1e-5, 1e-4)])
@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_tolerances_that_are_no_number(method, atol, kind):
    """The number of halvings, or torchdiffeq's error where it cannot tell."""
    keywords = {**settings(method), "atol": atol}
    mine, theirs = (
        outcome(functools.partial(run, library, case(kind), **keywords)) for library in LIBRARIES
    )
    if raised(theirs):
        assert mine == theirs
    else:
        assert_same_event(mine, theirs)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_without_absolute_tolerance(method):
    """torchdiffeq does not bisect at all then; here the event is found to the last bit."""
    problem = (
        lambda t, y: torch.ones_like(y),
        torch.tensor([1.0], dtype=F64),
        torch.tensor([0.0, 1.0], dtype=F64),
        lambda t, y: y - 1.7,
    )
    options = {"step_size": 0.25} if method == "rk4" else {}
    found = run(pycnf, problem, method=method, rtol=1e-6, atol=0.0, options=options)
    assert found.event_t.item() == pytest.approx(0.7, abs=1e-15)
    assert sum(found.log.counts) < 200


def test_max_num_steps_counts_all_attempts():
    for limit in (0, 3, 1000):
        keywords = {**settings("dopri5"), "options": {"max_num_steps": limit}}
        mine, theirs = (
            outcome(functools.partial(run, library, case("tensor"), **keywords))
            for library in LIBRARIES
        )
        assert raised(theirs) == raised(mine) == (limit < 1000)
        if raised(theirs):
            assert mine == theirs


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("step_size", [0.07, torch.tensor(0.07), torch.tensor(0.07, dtype=F64)])
@pytest.mark.parametrize("method", FIXED)
def test_options_of_fixed_methods(method, step_size, perturb):
    options = {"step_size": step_size, "perturb": perturb, "interp": "cubic"}
    for kind in ("tensor", "tuple", "reversed"):
        assert_same_event(*both(case(kind), method=method, options=options))


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_fixed_methods_make_no_callbacks(method):
    class Watched(Field):
        def callback_step(self, t, y, dt):
            raise AssertionError("torchdiffeq calls nothing here")

    _, y0, t, event_fn = case("tensor")
    for library in LIBRARIES:
        library.odeint(Watched(), y0, t, event_fn=event_fn, **settings(method))


def test_adaptive_methods_make_callbacks():
    seen = {library: [] for library in LIBRARIES}
    for library in LIBRARIES:
        field, y0, t, event_fn = case("reversed")
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):

            def note(t0, y, dt, name=name, calls=seen[library]):
                calls.append((name, t0.item(), dt.item()))

            setattr(field, name, note)
        library.odeint(field, y0, t, event_fn=event_fn, rtol=1e-9, atol=1e-9)
    assert len(seen[pycnf]) >= 8
    assert seen[pycnf] == seen[torchdiffeq]


# ---- errors --------------------------------------------------------------------------------------

Y0 = torch.ones(2, dtype=F64)
T = torch.tensor([0.0, 1.0], dtype=F64)
STEP = {"step_size": 0.1}
BAD = {
    "three times": {"t": torch.tensor([0.0, 1.0, 2.0])},
    "one time": {"t": torch.tensor([0.0])},
    "0-dim": {"t": torch.tensor(0.0)},
    "times are a list": {"t": [0.0, 1.0]},
    "times are a number": {"t": 1.0},
    "equal times": {"t": torch.tensor([1.0, 1.0])},
    "integer times": {"t": torch.tensor([0, 1])},
    "three times, and no such method": {"t": torch.tensor([0.0, 1.0, 2.0]), "method": "x"},
    "no step_size": {"method": "rk4"},
    "grid_constructor": {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t}},
    "both": {"method": "rk4", "options": {**STEP, "grid_constructor": lambda f, y, t: t}},
    "interp": {"method": "rk4", "options": {**STEP, "interp": "x"}},
    "state is a list": {"y0": [1.0], "event_fn": lambda t, y: torch.ones(())},
    "state is a number": {"y0": 1.0, "event_fn": lambda t, y: torch.ones(())},
    "no tensor": {"event_fn": lambda t, y: 1.0},
    "empty": {"event_fn": lambda t, y: y[:0]},
    "rtol requires grad": {"rtol": torch.tensor(1e-3, requires_grad=True)},
    "underflow": {"func": lambda t, y: y * math.nan},
}


@pytest.mark.parametrize("solver", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("name", BAD)
def test_errors(name, solver):
    def call(library):
        arguments = {"func": lambda t, y: -y, "y0": Y0, "t": T, "event_fn": lambda t, y: y - 0.5}
        arguments.update(BAD[name])
        if solver == "odeint_adjoint":
            arguments["adjoint_params"] = ()
        return getattr(library, solver)(**arguments)

    mine, theirs = (outcome(functools.partial(call, library)) for library in LIBRARIES)
    assert raised(theirs)
    if "no such method" not in name:
        assert mine == theirs
    assert mine[1] == theirs[1]


@pytest.mark.parametrize("options", [{}, {"interp": "cubic"}])
def test_no_event_on_a_fixed_grid(options):
    keywords = {"method": "euler", "options": {**STEP, **options}}
    calls = []

    def event_fn(t, y):
        calls.append(t)
        return torch.ones(1)

    text = r"^Reached maximum number of iterations 20000\.$"
    with pytest.raises(RuntimeError, match=text), torch.no_grad():
        pycnf.odeint(lambda t, y: 0 * y, Y0, T, event_fn=event_fn, **keywords)
    assert len(calls) == 2 + 20000


def test_methods_without_events(monkeypatch):
    """As torchdiffeq's scipy_solver."""
    text = "'ScipyWrapperODESolver' object has no attribute 'integrate_until_event'"

    class Other:
        def __init__(self, *arguments, **options):
            pass

    other = solve.Method("ScipyWrapperODESolver", Other, frozenset())
    monkeypatch.setitem(solve.SOLVERS, "scipy_solver", other)
    for library in LIBRARIES:
        with pytest.raises(AttributeError, match=f"^{text}$"):
            library.odeint(
                lambda t, y: -y, Y0, T, method="scipy_solver", event_fn=lambda t, y: y - 0.5
            )


def test_signatures():
    for name in ("odeint", "odeint_adjoint", "odeint_event"):
        mine, theirs = (inspect.signature(getattr(library, name)) for library in LIBRARIES)
        shared = [each for each in mine.parameters if each in theirs.parameters]
        assert shared == list(theirs.parameters)
        for each in shared:
            a, b = mine.parameters[each], theirs.parameters[each]
            assert a.kind == b.kind
            assert a.default == b.default or each == "odeint_interface"
    assert inspect.signature(pycnf.odeint_event).parameters["odeint_interface"].default is (
        pycnf.odeint
    )


# ---- gradients of the state at the event ---------------------------------------------------------


def differentiate(library, solver, kind, method, twice=False, **keywords):
    """Gradients of a function of both states to y0, t and parameters, and of a function of those
    gradients; and the number of calls.
    """
    field, y0, t, event_fn = case(kind)
    leaves = [part.clone().requires_grad_() for part in as_tuple(y0)]
    y0 = tuple(leaves) if isinstance(y0, tuple) else leaves[0]
    t = t.clone().requires_grad_()
    found = run(library, (field, y0, t, event_fn), solver, **settings(method), **keywords)
    forward = list(found.log.counts)
    inputs = [*leaves, t, *field.parameters()]
    total = sum((part**2).sum() + part.sum() for part in as_tuple(found.ys))
    grads = torch.autograd.grad(total, inputs, create_graph=twice, allow_unused=True)
    backward = [b - a for a, b in zip(forward, found.log.counts)]
    second = ()
    if twice:
        total = sum((g**2).sum() for g in grads)
        second = torch.autograd.grad(total, inputs, allow_unused=True)
    return SimpleNamespace(found=found, grads=grads, second=second, nfe=(forward, backward))


def assert_same_gradients(mine, theirs, tolerance):
    for a, b in zip(mine, theirs):
        assert (a is None) == (b is None)
        if b is not None:
            assert_close(a, b, tolerance, tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_gradients_through_odeint(method, kind):
    mine, theirs = (
        differentiate(library, "odeint", kind, method, twice=True) for library in LIBRARIES
    )
    tolerance = 1e-6 if method in ("dopri8", "tsit5") else 1e-10
    assert mine.nfe == theirs.nfe
    assert mine.found.event_t.requires_grad == theirs.found.event_t.requires_grad == False  # noqa: E712
    assert any(g.abs().max() > 0.1 for g in mine.second)
    assert_same_gradients(mine.grads, theirs.grads, tolerance)
    assert_same_gradients(mine.second, theirs.second, 10 * tolerance)


def test_gradient_of_an_event_at_the_start():
    """Its time is t[0] itself, with its graph."""
    found = []
    for library in LIBRARIES:
        field, y0, t, _ = case("reversed")
        t.requires_grad_()
        y0.requires_grad_()
        event_t, ys = library.odeint(field, y0, t, event_fn=lambda t, y: y - 1.0)
        found.append(torch.autograd.grad(3 * event_t + (ys**2).sum(), [t, y0]))
    assert_same_gradients(*found, 0.0)
    assert found[0][0].tolist() == [3.0, 0.0]


def test_gradient_to_the_step_size():
    found = []
    for library in LIBRARIES:
        field, y0, t, event_fn = case("tensor")
        step = torch.tensor(0.05, dtype=F64, requires_grad=True)
        _, ys = library.odeint(
            field, y0, t, event_fn=event_fn, method="rk4", options={"step_size": step}
        )
        found.append(torch.autograd.grad(ys.sum(), step))
    assert found[1][0].abs() > 1e-8
    assert_same_gradients(*found, 1e-8)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_continuous_adjoint(method, kind):
    mine, theirs = (differentiate(library, "odeint_adjoint", kind, method) for library in LIBRARIES)
    assert mine.nfe == theirs.nfe
    tolerance = 1e-3 if method in ("dopri8", "tsit5") else 1e-8
    assert_same_event(mine.found, theirs.found, tolerance)
    assert_same_gradients(mine.grads, theirs.grads, tolerance)
    t_grad = mine.grads[2 if kind == "tuple" else 1]
    assert t_grad[0] != 0
    assert t_grad[1] == 0


def test_continuous_adjoint_of_an_event_at_the_start():
    """torchdiffeq's backward fails on an interval of no length."""
    field, y0, t, _ = case("tensor")
    y0.requires_grad_()
    t.requires_grad_()
    for gradient in ("continuous", "discrete"):
        event_t, ys = pycnf.odeint_adjoint(
            field, y0, t, event_fn=lambda t, y: y - 1.0, gradient=gradient
        )
        assert event_t == t[0]
        total = (ys * torch.tensor([[1.0], [3.0]])).sum()
        grads = torch.autograd.grad(total, [y0, t, *field.parameters()])
        assert grads[0].tolist() == [4.0, 4.0]
        assert all((g == 0).all() for g in grads[1:])


def test_continuous_adjoint_keeps_its_options():
    field, y0, t, event_fn = case("tensor")
    y0.requires_grad_()
    seen = []

    def norm(parts):
        seen.append(len(parts))
        return torch.stack([part.abs().max() for part in parts]).max()

    _, ys = pycnf.odeint_adjoint(field, y0, t, event_fn=event_fn)
    ys.grad_fn.adjoint_options["norm"] = norm
    torch.autograd.grad(ys.sum(), y0)
    assert set(seen) == {5}


@pytest.mark.parametrize("gradient", ["continuous", "joined", "discrete"])
@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "midpoint"])
def test_second_derivatives_hold_the_event_fixed(method, kind, gradient):
    """As those of odeint do, whose event's time has no graph either."""

    def second(solver):
        field, y0, t, event_fn = case(kind)
        start = tuple(part.clone().requires_grad_() for part in as_tuple(y0))
        t = t.clone().requires_grad_()
        options = {"step_size": 0.01, "interp": "cubic"} if method == "midpoint" else {}
        if method != "midpoint":
            options = {"first_step": 0.05}
        keywords = {"method": method, "rtol": 1e-9, "atol": 1e-9, "options": options}
        _, ys = solver(
            field, start if kind == "tuple" else start[0], t, event_fn=event_fn, **keywords
        )
        inputs = [*start, t, *(p for p in field.parameters())]
        total = sum((part[-1] * part[-1].detach().cos()).sum() for part in as_tuple(ys))
        total = total + sum(part[-1].pow(2).sum() for part in as_tuple(ys))
        grads = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        penalty = sum(grad.pow(2).sum() + grad.sum() for grad in grads)
        again = torch.autograd.grad(penalty, inputs, materialize_grads=True)
        return [grad.detach() for grad in grads], again

    mine = second(functools.partial(pycnf.odeint_adjoint, gradient=gradient))
    exact = second(pycnf.odeint)
    if gradient == "discrete":
        tolerance = 1e-9
    else:
        tolerance = 1e-3 if method == "midpoint" else 1e-5
    assert_same_gradients(mine[0], exact[0], tolerance)
    assert_same_gradients(mine[1], exact[1], tolerance)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_discrete_gradient_of_adaptive_methods(method, kind):
    """That of odeint where the first step is given, as every later one is."""
    options = {"options": {"first_step": 0.05}}
    mine = differentiate(pycnf, "odeint_adjoint", kind, method, gradient="discrete", **options)
    exact = differentiate(pycnf, "odeint", kind, method, **options)
    assert_same_gradients(mine.grads, exact.grads, 1e-10)
    assert mine.nfe[1][0] < 2 * mine.nfe[0][0]
    assert mine.nfe[1][1] == 0


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", FIXED)
def test_discrete_gradient_of_fixed_methods(method, kind):
    mine = differentiate(pycnf, "odeint_adjoint", kind, method, gradient="discrete")
    exact = differentiate(pycnf, "odeint", kind, method)
    theirs = run(torchdiffeq, case(kind), "odeint_adjoint", **settings(method))
    assert_close(mine.found.ys, theirs.ys, 1e-11, 1e-11)
    assert mine.nfe[0] == theirs.log.counts
    assert_same_gradients(mine.grads, exact.grads, 1e-10)


def test_discrete_gradient_in_float32_times():
    """The event's time is rounded for the caller, not for the gradient."""
    field, y0, t, event_fn = case("tensor", F32)
    t = t.float().requires_grad_()
    y0.requires_grad_()
    grads = []
    for solver, keywords in ((pycnf.odeint_adjoint, {"gradient": "discrete"}), (pycnf.odeint, {})):
        event_t, ys = solver(
            field, y0, t, event_fn=event_fn, rtol=1e-4, atol=1e-4,
            options={"first_step": 0.05}, **keywords,
        )  # fmt: skip
        assert event_t.dtype == F32
        grads.append(torch.autograd.grad(ys.sum(), [y0, t, *field.parameters()]))
    assert_same_gradients(*grads, 1e-5)


# ---- odeint_event --------------------------------------------------------------------------------

INTERFACES = {
    "odeint": lambda library: library.odeint,
    "adjoint": lambda library: library.odeint_adjoint,
    "own": lambda library: lambda *a, **k: library.odeint(*a, rtol=1e-8, atol=1e-8, **k),
}


def falls(t, state):
    """Free fall; gravity and the floor's height ride along."""
    _, velocity, gravity, _ = state
    still = torch.zeros_like(gravity)
    return velocity, -gravity * torch.ones_like(velocity), still, still


def hits(t, state):
    return state[0] - state[3]


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("reverse", [False, True])
def test_event_gradients_are_torchdiffeqs(interface, reverse):
    """Times and both states, with a start that has a gradient, and every call."""
    results = []
    for library in LIBRARIES:
        field, y0, _, event_fn = case("reversed" if reverse else "tensor")
        log = Log(field, event_fn)
        y0.requires_grad_()
        t0 = torch.tensor(0.2, dtype=F64, requires_grad=True)
        keywords = {"adjoint_params": tuple(field.parameters())} if interface == "adjoint" else {}
        event_t, ys = library.odeint_event(
            log.func, y0, t0, event_fn=log.event, reverse_time=reverse,
            odeint_interface=INTERFACES[interface](library), **keywords,
        )  # fmt: skip
        forward = list(log.counts)
        total = 2 * event_t**2 + (ys**2).sum()
        grads = torch.autograd.grad(total, [y0, t0, *field.parameters()])
        results.append((SimpleNamespace(event_t=event_t, ys=ys, log=log), grads, forward))
    (mine, my_grads, mine_forward), (theirs, their_grads, theirs_forward) = results
    assert mine_forward == theirs_forward
    assert_same_event(mine, theirs, 1e-7)
    assert_close(mine.event_t, theirs.event_t, 1e-9, 1e-9)
    assert mine.ys.shape == (2, 2)
    assert_same_gradients(my_grads, their_grads, 1e-9)


@pytest.mark.parametrize("interface", ["odeint", "discrete", "adjoint"])
@pytest.mark.parametrize("reverse", [False, True])
def test_event_time_against_free_fall(interface, reverse):
    """gradcheck of the time and the state at the floor, to the start's time, height and velocity,
    gravity and floor; and the closed form.
    """

    def land(t0, height, velocity, gravity, floor):
        solver = pycnf.odeint if interface == "odeint" else pycnf.odeint_adjoint
        keywords = {} if interface == "odeint" else {"adjoint_params": ()}
        if interface == "discrete":
            keywords["gradient"] = "discrete"
        event_t, ys = pycnf.odeint_event(
            falls, (height, velocity, gravity, floor), t0, event_fn=hits, reverse_time=reverse,
            odeint_interface=solver, rtol=1e-10, atol=1e-12, **keywords,
        )  # fmt: skip
        return event_t, ys[0][1], ys[1][1]

    values = (0.5, 3.0, 0.7, 9.8, 0.25)
    inputs = [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]
    t0, height, velocity, gravity, floor = inputs
    root = (velocity**2 + 2 * gravity * (height - floor)).sqrt()
    root = -root if reverse else root
    exact = (t0 + (velocity + root) / gravity, floor + 0 * root, -root)
    found = land(*inputs)
    for mine, theirs in zip(found, exact):
        assert_close(mine, theirs, 1e-9, 1e-9)
        assert_same_gradients(
            torch.autograd.grad(mine, inputs, retain_graph=True, allow_unused=True),
            [
                torch.zeros_like(x) if g is None and mine is not theirs else g
                for x, g in zip(
                    inputs,
                    torch.autograd.grad(theirs, inputs, retain_graph=True, allow_unused=True),
                )
            ],
            1e-7,
        )
    assert torch.autograd.gradcheck(land, inputs, eps=1e-5, atol=1e-6)


def test_bouncing_ball():
    """Event after event, the state changed in between; parameters in the state and in the field."""

    class Ball(torch.nn.Module):
        def __init__(self, library):
            super().__init__()
            self.library = library
            self.gravity = torch.nn.Parameter(torch.tensor([9.8], dtype=F64))
            self.log_radius = torch.nn.Parameter(torch.log(torch.tensor([0.1], dtype=F64)))
            self.height = torch.nn.Parameter(torch.tensor([10.0], dtype=F64))
            self.absorption = torch.nn.Parameter(torch.tensor([0.2], dtype=F64))
            self.t0 = torch.nn.Parameter(torch.tensor(0.1, dtype=F64))

        def forward(self, t, state):
            _, velocity, _ = state
            return velocity, -self.gravity, torch.zeros_like(self.log_radius)

        def hit(self, t, state):
            position, _, log_radius = state
            return position - torch.exp(log_radius)

        def bounces(self, count, **keywords):
            t0, state = self.t0, (self.height, torch.zeros_like(self.height), self.log_radius)
            times = []
            for _ in range(count):
                t0, solution = self.library.odeint_event(
                    self, state, t0, event_fn=self.hit, **keywords
                )
                position, velocity, log_radius = (part[-1] for part in solution)
                # Up from the floor, slower.
                state = (position + 1e-7, -velocity * (1 - self.absorption), log_radius)
                times.append(t0)
            return torch.stack(times)

    for solver in ("odeint", "odeint_adjoint"):
        found = []
        for library in LIBRARIES:
            ball = Ball(library)
            keywords = {"odeint_interface": getattr(library, solver), "atol": 1e-8, "rtol": 1e-8}
            times = ball.bounces(4, **keywords)
            (times * torch.arange(1.0, 5.0)).sum().backward()
            found.append((times, [p.grad for p in ball.parameters()]))
        assert_close(found[0][0], found[1][0], 1e-10, 1e-10)
        assert_same_gradients(found[0][1], found[1][1], 1e-8)
        ball = Ball(pycnf)
        fall = math.sqrt(2 * 9.9 / 9.8)
        first = 0.1 + fall
        exact = [first, *(first + 2 * fall * sum(0.8**k for k in range(1, n)) for n in (2, 3, 4))]
        assert_close(found[0][0], torch.tensor(exact, dtype=F64), 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_interruptions_of_a_causal_simulation(dtype):
    """A 0-dim start, a tuple state of expanded tensors, a vector of event functions, a partial
    field; the next interruption starts where the one before ended.
    """

    def field(rate, t, state):
        susceptible, infected = state
        flow = rate * susceptible * infected
        return -flow, flow - 0.3 * infected

    def events(t, state):
        susceptible, infected = state
        return torch.cat([(infected - 0.3).reshape(-1), (susceptible - 0.2).reshape(-1)])

    found = []
    for library in LIBRARIES:
        rate = torch.tensor(1.5, dtype=dtype, requires_grad=True)
        low = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        state = (torch.tensor(0.9, dtype=dtype).expand(3), low.expand(3))
        t0 = torch.tensor(0.0, dtype=dtype)
        times = []
        for _ in range(2):
            t0, solution = library.odeint_event(
                functools.partial(field, rate), state, t0, event_fn=events,
                odeint_interface=functools.partial(library.odeint, rtol=1e-5, atol=1e-6),
            )  # fmt: skip
            state = tuple(part[-1] * factor for part, factor in zip(solution, (1.0, 1.1)))
            times.append(t0)
        times = torch.stack(times)
        found.append((times, solution, torch.autograd.grad(times.sum(), [rate, low])))
    (times, solution, grads), (their_times, their_solution, their_grads) = found
    tolerance = 1e-9 if dtype == F64 else 1e-3
    assert times[1] > times[0] > 0
    assert_close(times, their_times, tolerance, tolerance)
    assert_close(solution, their_solution, tolerance, tolerance)
    assert_same_gradients(grads, their_grads, tolerance * 10)


def test_event_gradient_is_differentiated_once():
    """torchdiffeq takes it for a constant, a wrong number."""
    y0 = torch.tensor([2.0], dtype=F64, requires_grad=True)
    t0 = torch.tensor(0.0, dtype=F64)
    event_t, _ = pycnf.odeint_event(lambda t, y: -y, y0, t0, event_fn=lambda t, y: y - 1.0)
    (grad,) = torch.autograd.grad(event_t, y0, create_graph=True)
    assert grad.item() == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(RuntimeError, match="odeint_event cannot be differentiated again"):
        grad.sum().backward()


def test_gradient_of_a_tangential_event_is_finite():
    """dc/dt = 0 at the event: torchdiffeq's 1e-12 is in the denominator."""
    found = []
    for library in LIBRARIES:
        y0 = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
        t0 = torch.tensor(0.0, dtype=F64)
        event_t, _ = library.odeint_event(
            lambda t, y: torch.stack([1 + 0 * y[0], 0 * y[1]]), y0, t0,
            event_fn=lambda t, y: torch.where(t > 1, y[1] - 3, y[1]),
        )  # fmt: skip
        found.append(torch.autograd.grad(event_t, y0))
    assert found[1][0][1].abs() > 1e11
    assert_same_gradients(*found, 1e-12)


@pytest.mark.parametrize("t0", [0.0, None, [0.0]])
def test_start_that_is_no_tensor(t0):
    with pytest.raises(TypeError, match=r"^t0 must be a torch\.Tensor, got "):
        pycnf.odeint_event(lambda t, y: -y, Y0, t0, event_fn=lambda t, y: y - 0.5)


def test_start_of_two_times():
    found = [
        outcome(
            lambda library=library: library.odeint_event(
                lambda t, y: -y, Y0, T, event_fn=lambda t, y: y - 0.5
            )
        )
        for library in LIBRARIES
    ]
    assert found[0] == found[1]
    assert found[0][0] is ValueError


def test_warnings_are_torchdiffeqs():
    """An option that is unknown, once a solve."""
    texts = []
    for library in LIBRARIES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            library.odeint_event(
                lambda t, y: -y, Y0, T[:1], event_fn=lambda t, y: y - 0.5, method="dopri5",
                options={"unheard_of": 3},
            )  # fmt: skip
        texts.append([str(each.message) for each in caught])
    assert texts[0] == texts[1] == ["Dopri5Solver: Unexpected arguments {'unheard_of': 3}"]


SLOPES = {
    "another dtype": lambda t, y: -y.double() * t,
    "another dtype late": lambda t, y: -y.double() if t > 0.5 else -y,
    "a shape that broadcasts": lambda t, y: -y[:1],
    "another dtype at a stage": lambda t, y: -y.double() if t != 0.1 else -y,
    "expanded": lambda t, y: -y[:1].expand(3),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("method", FIXED)
def test_slopes_that_ask_for_promotion_on_a_grid(method, name):
    y0 = torch.tensor([1.0, 2.0, 0.5])
    t = torch.tensor([0.1, 1.0], dtype=F64)
    for interp in ("linear", "cubic"):
        options = {"step_size": 0.07, "interp": interp}
        problem = (SLOPES[name], y0, t, lambda t, y: y[0] - 0.5)
        assert_same_event(*both(problem, method=method, options=options, atol=1e-5), 2e-6)


@pytest.mark.parametrize("method", FIXED)
def test_a_graph_that_comes_up_late_on_a_grid(method):
    """Steps before it are taken without one."""
    found = []
    for library in LIBRARIES:
        rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
        y0, t = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.1, 1.0], dtype=F64)
        _, ys = library.odeint(
            lambda t, y, rate=rate: -y * rate if t > 0.42 else -y, y0, t,
            event_fn=lambda t, y: y[0] - 0.5, method=method, options={"step_size": 0.05},
        )  # fmt: skip
        found.append((ys, *torch.autograd.grad(ys.sum(), rate)))
    assert found[1][1].abs() > 0.1
    assert_close(found[0], found[1], 1e-11, 1e-11)


def test_torch_func_is_refused():
    """Each element of a batch would have an event of its own."""

    def event_t(y0):
        return pycnf.odeint(lambda t, y: -y, y0, T, event_fn=lambda t, y: y - 0.5)[0]

    def adjoint_t(y0):
        return pycnf.odeint_adjoint(
            lambda t, y: -y, y0, T, event_fn=lambda t, y: y - 0.5, adjoint_params=()
        )[0]

    for solve_to_event in (event_t, adjoint_t):
        for transform in (torch.func.vmap, torch.func.grad):
            with pytest.raises(NotImplementedError, match=r"event_fn .* torch\.func"):
                transform(solve_to_event)(torch.ones(2, 1, dtype=F64))
