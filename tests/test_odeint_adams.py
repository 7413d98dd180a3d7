"""explicit_adams and implicit_adams (fixed_adams) equal torchdiffeq's bit by bit: values, times and
states given to the field, warnings and errors; their gradients to rounding.
"""

import warnings
from fractions import Fraction

import pytest
import torch
import torchdiffeq
from problems import PROBLEMS, MLPField, as_tuple, clone_state, flat, outcome, raised
from torchdiffeq._impl.fixed_adams import _BASHFORTH_DIVISOR, _MOULTON_DIVISOR

import pycnf
from pycnf.odeint.adams import adams_weights

F32, F64 = torch.float32, torch.float64
ADAMS = ("explicit_adams", "implicit_adams")


def decay(t, y):
    return -y * torch.cos(3 * t) + 0.1 * torch.sin(y)


def solved(library, field, y0, t, **keywords):
    """Outputs (or the error), the field's calls, and the texts of warnings."""
    calls = []

    def recorded(t, y):
        calls.append((t.detach().clone(), flat(y).detach().clone()))
        return field(t, y)

    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = outcome(lambda: library.odeint(recorded, clone_state(y0), t, **keywords))
    return result, calls, [str(warning.message) for warning in caught]


def assert_equal(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(), b.nan_to_num()), (a - b).abs().max()


def assert_same(field, y0, t, **keywords):
    """Both libraries gave the same bits; what torchdiffeq gave is returned."""
    mine, theirs = (solved(library, field, y0, t, **keywords) for library in (pycnf, torchdiffeq))
    assert mine[2] == theirs[2]
    assert len(mine[1]) == len(theirs[1])
    for (t1, y1), (t2, y2) in zip(mine[1], theirs[1]):
        assert_equal(t1, t2)
        assert_equal(y1, y2)
    assert raised(mine[0]) == raised(theirs[0]), (mine[0], theirs[0])
    if raised(theirs[0]):
        assert mine[0] == theirs[0]
    else:
        for a, b in zip(as_tuple(mine[0]), as_tuple(theirs[0]), strict=True):
            assert_equal(a, b)
    return theirs


def state(dtype, *shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    return values.to(dtype)


# --- weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", range(1, 13))
def test_weights_integrate_polynomials(terms):
    """∫ over [0, 1] of tᵖ from its values at 0, -1, ... (explicit) or 1, 0, -1, ..., p < terms."""
    for implicit in (False, True):
        weights = [Fraction(w) for w in adams_weights(terms, implicit)]
        for power in range(terms):
            nodes = [int(implicit) - j for j in range(terms)]
            integral = sum(w * node**power for w, node in zip(weights, nodes))
            scale = sum(abs(w * node**power) for w, node in zip(weights, nodes))
            assert abs(integral - Fraction(1, power + 1)) <= scale * Fraction(1, 2**52)


@pytest.mark.parametrize("terms", range(1, 13))
def test_weights_are_those_of_torchdiffeq(terms):
    assert list(adams_weights(terms, False)) == _BASHFORTH_DIVISOR[terms].tolist()
    if terms == 1:  # A slip in a row that no step uses: steps use four weights or more.
        assert adams_weights(1, True) == (1.0,)
        assert _MOULTON_DIVISOR[1].tolist() == [1 / 11]
    else:
        assert list(adams_weights(terms, True)) == _MOULTON_DIVISOR[terms].tolist()


# --- the same bits ----------------------------------------------------------------------------

OPTIONS = {
    "output times": {},
    "step_size": {"step_size": 0.083},
    "perturb": {"perturb": True, "step_size": 0.09},
    "cubic": {"interp": "cubic", "step_size": 0.09},
    "max_order 4": {"max_order": 4},
    "max_order 7": {"max_order": 7.9, "max_iters": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("t_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("method", ADAMS)
def test_same_bits(method, dtype, t_dtype, reverse, options):
    t = torch.linspace(0, 1.3, 18, dtype=t_dtype)
    t = t.flip(0) if reverse else t
    for shape, tolerance in (((), 1e-7), ((1,), 1e-3), ((5, 3), 1e-7), ((64, 2), 1e-3)):
        keywords = {"rtol": tolerance, "atol": tolerance, "options": options}
        _, calls, _ = assert_same(decay, state(dtype, *shape), t, method=method, **keywords)
    steps = len(solved(torchdiffeq, decay, state(F64, 2), t, method="euler", options=options)[1])
    assert len(calls) >= steps


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("method", ADAMS)
def test_problems(method, dtype, name):
    field, y0, t = PROBLEMS[name](dtype)
    step = (t[-1] - t[0]).abs().item() / 40
    options = {"step_size": step}
    assert_same(field, y0, t, method=method, rtol=1e-4, atol=1e-5, options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.complex64, torch.complex128])
@pytest.mark.parametrize("method", ADAMS)
def test_dtypes_without_kernels(method, dtype):
    for shape in ((), (4, 3)):
        for t in (torch.linspace(0, 1, 14), torch.linspace(1, 0, 14, dtype=F64)):
            assert_same(decay, state(dtype, *shape), t, method=method, rtol=1e-3, atol=1e-3)


FIELDS = {
    "wider": lambda t, y: -y.double(),
    "narrower": lambda t, y: -y.bfloat16(),
    "wider from some time on": lambda t, y: -y.double() if t > 0.5 else -y,
    "broadcast": lambda t, y: t * torch.ones(3),
    "broadcast from some time on": lambda t, y: t * torch.ones(3) if t > 0.5 else -y,
    "strided": lambda t, y: -y.T.contiguous().T,
    "zero": lambda t, y: 0 * y,
    "constant": lambda t, y: 0 * y + 1,
    "not finite": lambda t, y: y / 0,
    "explosive": lambda t, y: 1e3 * y**3,
    "stiff": lambda t, y: -60 * y,
    "a view of its state": lambda t, y: y,
}


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("method", ADAMS)
def test_unusual_fields(method, field):
    t = torch.linspace(0, 1, 20)
    assert_same(field, state(F32, 4, 3), t, method=method)
    assert_same(field, state(F32, 4, 3), t.flip(0), method=method, rtol=1e-4, atol=0.0)


def pair(t, y):
    a, b, c = y
    return -a * b, torch.cos(t) + 0 * b, c * b


TOLERANCES = {
    "one": {"rtol": 1e-5, "atol": 1e-6},
    "each part's": {"rtol": [1e-3, 1e-7, 1e-2], "atol": (1e-4, 1e-9, 1.0)},
    "a list of another length": {"rtol": [1e-3, 1e-3]},
}


@pytest.mark.parametrize("tolerances", TOLERANCES.values(), ids=TOLERANCES)
@pytest.mark.parametrize("last", [F32, F64], ids=str)
@pytest.mark.parametrize("method", ADAMS)
def test_tuples(method, last, tolerances):
    y0 = (state(F32, 4, 3), state(F32), state(last, 2, 1))
    for t in (torch.linspace(0, 1, 16), torch.linspace(1, 0, 16, dtype=F64)):
        assert_same(pair, y0, t, method=method, **tolerances)


@pytest.mark.parametrize("tolerance", [[1e-3], torch.full((3,), 1e-3), torch.tensor(1e-3)])
def test_tolerances_of_a_tensor_state(tolerance):
    t = torch.linspace(0, 1, 16)
    keywords = {"method": "implicit_adams", "rtol": tolerance, "atol": tolerance}
    _, loose, _ = assert_same(decay, state(F64, 4, 3), t, **keywords)
    _, tight, _ = assert_same(decay, state(F64, 4, 3), t, method="implicit_adams")
    assert len(loose) < len(tight), "the tolerance does nothing here"


def test_each_value_must_converge():
    """One value that converges slowly among many that do at once: the mean would not see it."""
    slow = torch.zeros(500, dtype=F64)
    slow[137] = 8.0

    def field(t, y):
        return slow * torch.sin(y)

    t = torch.linspace(0, 1, 16)
    keywords = {"method": "implicit_adams", "rtol": 1e-6, "atol": 1e-6}
    _, some, _ = assert_same(field, state(F64, 500), t, **keywords)
    _, none, _ = assert_same(lambda t, y: 0 * y, state(F64, 500), t, **keywords)
    assert len(some) > len(none)


GRIDS = {
    "times that repeat": [0.0, 0.1, 0.25, 0.4, 0.5, 0.5, 0.5, 0.6, 0.9, 1.0],
    "times that return": [0.0, 0.3, 0.2, 0.5, 0.4, 1.0],
    "one step": [0.0, 1.0],
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("method", ADAMS)
def test_grids(method, grid):
    t = torch.tensor([0.0, 0.35, 1.0], dtype=F64)
    options = {"grid_constructor": lambda field, y0, t: torch.tensor(grid, dtype=t.dtype)}
    assert_same(decay, state(F64, 4, 3), t, method=method, options=options)


@pytest.mark.parametrize("method", ADAMS)
@pytest.mark.parametrize("count", [1, 2])
def test_few_times(method, count):
    for y0 in (state(F32, 4, 3), (state(F32, 2), state(F32)), state(F32, 0, 3)):

        def field(t, y):
            return y

        assert_same(field, y0, torch.linspace(0, 1, 5)[:count], method=method)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_large_state(dtype):
    """More than a block and more than a thread's share."""
    t = torch.linspace(0, 1, 13)
    for method in ADAMS:
        keywords = {"rtol": 1e-3, "atol": 1e-3, "method": method}
        assert_same(decay, state(dtype, 101, 401), t, **keywords)


# --- options, warnings, errors ----------------------------------------------------------------


@pytest.mark.parametrize("method", ADAMS)
@pytest.mark.parametrize("max_order", [0, 1, 2, 3, 4, 12, 13])
def test_max_order(method, max_order):
    t = torch.linspace(0, 1, 16)
    options = {"max_order": max_order}
    result, calls, texts = assert_same(decay, state(F32, 3), t, method=method, options=options)
    if max_order > 12:
        assert result == (AssertionError, "max_order must be at most 12")
    elif max_order < 4:
        assert texts == ["max_order is below 4, so the solver reduces to `rk4`."]
    if max_order in (2, 3):
        assert len(calls) == 4 * 15


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": 1, "norm": torch.norm},
        {"step_size": 0.1, "grid_constructor": None},
        {"step_size": 0.1, "grid_constructor": lambda field, y0, t: t},
        {"interp": "quintic"},
        {"max_iters": 1},
        {"max_iters": 9},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("method", [*ADAMS, "fixed_adams"])
def test_options(method, options):
    result, _, texts = assert_same(
        decay, state(F32, 3), torch.linspace(0, 1, 16), method=method, options=options
    )
    if "nonsense" in options:
        name = "AdamsBashforth" if method == "explicit_adams" else "AdamsBashforthMoulton"
        assert f"{name}: Unexpected arguments {{'nonsense': 1}}" in texts
    assert raised(result) == ("interp" in options or options.get("grid_constructor") is not None)


def test_failure_to_converge_forgets_the_oldest_slope():
    """The order stays at three slopes; with patience it grows."""
    t = torch.linspace(0, 1, 20)
    y0 = state(F64, 3)
    keywords = {"method": "implicit_adams", "rtol": 1e-14, "atol": 1e-14}
    result, _, texts = assert_same(decay, y0, t, options={"max_iters": 1}, **keywords)
    assert texts == ["Functional iteration did not converge. Solution may be incorrect."] * 17
    lasting, _, none = assert_same(decay, y0, t, options={"max_iters": 30}, **keywords)
    assert not none
    assert (result - lasting)[-1].abs().max() > 1e-8


def test_no_iterations():
    """torchdiffeq trips over its own variable in the first implicit step."""
    for options in ({"max_iters": 0}, {"max_iters": -1}):
        with pytest.raises(ValueError, match=r"max_iters must be at least 1, got (0|-1)"):
            pycnf.odeint(
                decay, state(F32, 3), torch.arange(9.0), method="implicit_adams", options=options
            )
        assert_same(decay, state(F32, 3), torch.arange(9.0), method=ADAMS[0], options=options)


class Edited:
    """A field whose step callback edits what it is given, every fifth time."""

    def __init__(self, what):
        self.what, self.seen = what, []

    def __call__(self, t, y):
        self.seen += [t.clone(), y.clone()]
        return torch.sin(y) * t

    def callback_step(self, t, y, dt):
        self.seen += [t.clone(), y.clone(), dt.clone()]
        if len(self.seen) % 5 == 0:
            edit = {"y": lambda: y.mul_(1.1), "dt": lambda: dt.mul_(0.5), "t": lambda: t.add_(0.01)}
            edit.get(self.what, lambda: None)()


@pytest.mark.parametrize("what", ["nothing", "y", "dt", "t"])
@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("method", ADAMS)
def test_callbacks(method, reverse, what):
    t = torch.linspace(0, 1, 14)
    t = t.flip(0) if reverse else t

    def run(library):
        field = Edited(what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [library.odeint(field, state(F32, 4, 3), t.clone(), method=method), *field.seen]

    for mine, theirs in zip(run(pycnf), run(torchdiffeq), strict=True):
        assert_equal(mine, theirs)


@pytest.mark.parametrize("method", ADAMS)
def test_a_field_may_use_its_output_again(method):
    """torchdiffeq's slopes would all be the last one."""
    y0, t = state(F64, 4, 3), torch.linspace(0, 1, 20)
    buffer = torch.empty_like(y0)
    keywords = {"method": method, "rtol": 1e-6}
    again = pycnf.odeint(lambda t, y: torch.mul(y, -t, out=buffer), y0, t, **keywords)
    fresh = pycnf.odeint(lambda t, y: torch.mul(y, -t), y0, t, **keywords)
    assert torch.equal(again, fresh)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"step_size": 0.06, "perturb": True}, {"interp": "cubic"}])
@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("with_times", [False, True])
@pytest.mark.parametrize("method", ADAMS)
def test_first_and_second_gradients(method, with_times, reverse, options):
    def run(library):
        field, calls = MLPField(F64), []

        def recorded(t, y):
            calls.append(t)
            a, b = y
            return field(t, a), b * a.sum() / 10

        y0 = (state(F64, 4, 3).requires_grad_(), state(F64).requires_grad_())
        t = torch.linspace(0, 1, 12, dtype=F64)
        t = (t.flip(0) if reverse else t).requires_grad_(with_times)
        a, b = library.odeint(recorded, y0, t, method=method, options=options, rtol=1e-6, atol=1e-6)
        inputs = [*y0, *field.parameters(), *([t] if with_times else [])]
        first = torch.autograd.grad((a**2).sum() + b[-1], inputs, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), inputs)
        return len(calls), a, first, second

    (mine, a, *my_grads), (theirs, b, *their_grads) = run(pycnf), run(torchdiffeq)
    assert mine == theirs
    assert torch.equal(a, b)
    for x, y in zip(sum(my_grads, ()), sum(their_grads, ()), strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * y.abs().max().item())


@pytest.mark.parametrize("since", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("method", ADAMS)
def test_slopes_with_a_graph_and_without(method, since):
    """The state's gradient where the field ignores it, a parameter's from some time on."""

    def run(library):
        y0 = state(F64, 4, 3).requires_grad_()
        weight = torch.ones((), dtype=F64, requires_grad=True)
        y = library.odeint(
            lambda t, y: torch.ones(4, 3, dtype=F64) * (weight if t > since else 1.0) * t,
            y0, torch.linspace(0, 1, 20, dtype=F64), method=method, rtol=1e-6,
        )  # fmt: skip
        inputs = (y0, weight) if since < 1 else (y0,)
        return y, *torch.autograd.grad((y**2).sum(), inputs)

    for mine, theirs in zip(run(pycnf), run(torchdiffeq), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize(
    ("method", "adjoint"),
    [
        ("dopri5", {"adjoint_method": "fixed_adams"}),
        ("explicit_adams", {}),
        ("rk4", {"adjoint_method": "explicit_adams", "adjoint_options": {"step_size": 0.02}}),
        ("implicit_adams", {"options": {"step_size": 0.05}}),
    ],
)
def test_adjoint(method, adjoint, reverse):
    def run(library):
        field, y0 = MLPField(F64), state(F64, 4, 3).requires_grad_()
        t = torch.linspace(0, 1, 6, dtype=F64)
        t = (t.flip(0) if reverse else t).requires_grad_()
        ys = library.odeint_adjoint(field, y0, t, method=method, rtol=1e-5, atol=1e-6, **adjoint)
        (ys**2).sum().backward()
        return ys.detach(), y0.grad, t.grad, *(p.grad for p in field.parameters())

    for mine, theirs in zip(run(pycnf), run(torchdiffeq), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ADAMS)
def test_no_discrete_gradient(method):
    """A walk back through single steps would lose the slopes' own gradients."""
    t = torch.linspace(0, 1, 6)
    with pytest.raises(ValueError, match=f'gradient="discrete".*one-step.*method="{method}"'):
        pycnf.odeint_adjoint(MLPField(F32), state(F32, 4, 3), t, method=method, gradient="discrete")


# --- order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "max_order", "order"), [(ADAMS[0], 4, 3), (ADAMS[1], 4, 4)])
def test_order_of_convergence(method, max_order, order):
    """max_order 4: three slopes, one more with the corrector's."""
    errors = []
    for steps in (40, 80):
        t = torch.linspace(0, 1, steps + 1, dtype=F64)
        options = {"max_order": max_order, "max_iters": 30}
        y = pycnf.odeint(
            lambda t, y: y * torch.cos(t), torch.ones(1, dtype=F64), t, method=method,
            options=options, rtol=1e-14, atol=1e-14,
        )  # fmt: skip
        errors.append((y[-1] - torch.exp(torch.sin(t[-1]))).abs().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("method", ADAMS)
def test_events_are_found_by_the_method_itself(method, reverse):
    """Not by rk4 steps throughout, which are its start alone."""
    t = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0], dtype=F64)

    def found(library, method):
        times = []

        def field(t, y):
            times.append(t.item())
            return torch.sin(y) + t

        event, ys = library.odeint(
            field, state(F64, 3), t, method=method, atol=1e-9, options={"step_size": 0.1},
            event_fn=lambda t, y: (t - 0.5).abs() - 1.23,
        )  # fmt: skip
        return event, ys, torch.tensor(times)

    mine, theirs = found(pycnf, method), found(torchdiffeq, method)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(mine[2]) != len(found(torchdiffeq, "rk4")[2])


@pytest.mark.parametrize("method", [*ADAMS, "euler"])
def test_atol_in_a_list_up_to_an_event(method):
    """Adams methods make a tensor of it, which others on a grid do not."""

    def found(library):
        options, t = {"step_size": 0.1}, torch.tensor([0.0, 1.0], dtype=F64)
        return outcome(
            lambda: library.odeint(
                decay, state(F64, 3), t, method=method, atol=[1e-5], options=options,
                event_fn=lambda t, y: t - 0.55,
            )
        )  # fmt: skip

    mine, theirs = found(pycnf), found(torchdiffeq)
    assert raised(mine) == raised(theirs) == (method == "euler")
    if not raised(theirs):
        assert mine[0] == theirs[0]
