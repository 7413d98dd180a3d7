"""Wrong arguments and failing solves: torchdiffeq's error types, texts and warnings, word for word.

Each case runs on both; where the text is known it is also spelled out, so that the test does not
depend on the installed release alone.
"""

import re
import warnings

import pytest
import torch
import torchdiffeq
from problems import ADAPTIVE, FIXED, METHODS, MLPField, outcome, raised

import pycnf

F64 = torch.float64
Y0 = torch.ones(2, dtype=F64)
T = torch.tensor([0.0, 1.0], dtype=F64)


def decay(t, y):
    return -y


def pair(t, y):
    return -y[0], -y[1]


def call(library, func=decay, y0=Y0, t=T, **keywords):
    return outcome(lambda: library.odeint(func, y0, t, **keywords))


TIMES = {
    "a list": ([0.0, 1.0], AssertionError, "t must be a torch.Tensor"),
    "a number": (1.0, AssertionError, "t must be a torch.Tensor"),
    "2-D": (torch.zeros(2, 2), AssertionError, "t must be one dimensional"),
    "0-D": (torch.tensor(1.0), None, None),
    "not monotone": (
        torch.tensor([0.0, 2.0, 1.0]),
        AssertionError,
        "t must be strictly increasing or decreasing",
    ),
    "repeated": (
        torch.tensor([0.0, 1.0, 1.0]),
        AssertionError,
        "t must be strictly increasing or decreasing",
    ),
    "all equal": (
        torch.tensor([1.0, 1.0]),
        AssertionError,
        "t must be strictly increasing or decreasing",
    ),
    "descending with a repetition": (
        torch.tensor([2.0, 1.0, 1.0]),
        AssertionError,
        "t must be strictly increasing or decreasing",
    ),
    "starts with NaN": (torch.tensor([float("nan"), 1.0]), None, None),
    "int64": (
        torch.tensor([0, 1]),
        TypeError,
        "`t` must be a floating point Tensor but is a torch.LongTensor",
    ),
    "bool": (
        torch.tensor([False, True]),
        TypeError,
        "`t` must be a floating point Tensor but is a torch.BoolTensor",
    ),
    "complex": (
        torch.tensor([0j, 1j]),
        TypeError,
        "`t` must be a floating point Tensor but is a torch.ComplexFloatTensor",
    ),
}


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("case", TIMES)
def test_bad_times(case, method):
    t, error, text = TIMES[case]
    theirs = call(torchdiffeq, t=t, method=method)
    assert raised(theirs)
    if text is not None:
        assert theirs == (error, text)
    mine = call(pycnf, t=t, method=method)
    assert mine == theirs


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_no_times(method):
    """torchdiffeq fails on indexing; any exception will do, a result will not."""
    assert raised(call(torchdiffeq, t=T[:0], method=method))
    assert raised(call(pycnf, t=T[:0], method=method))


@pytest.mark.parametrize("y0", [[Y0], [1.0, 2.0], 1.0, None, "x"], ids=repr)
def test_bad_state(y0):
    text = "y0 must be either a torch.Tensor or a tuple"
    assert call(torchdiffeq, y0=y0) == call(pycnf, y0=y0) == (AssertionError, text)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("y0", [torch.tensor([1, 2]), torch.tensor([True])], ids=repr)
def test_state_without_fractions(y0, method):
    """torchdiffeq fails somewhere inside, or on a grid cuts every state to integers."""
    text = rf"^`y0` must be a floating point or complex Tensor but is a {y0.type()}$"
    for state in (y0, (y0, y0)):
        with pytest.raises(TypeError, match=text):
            pycnf.odeint(pair if isinstance(state, tuple) else decay, state, T, method=method)


def test_unknown_method():
    """The text lists the methods; ours is longer by those that the release lacks."""
    for method in ("x", "Dopri5", ""):
        error, text = call(pycnf, method=method)
        assert error is ValueError
        listed = re.fullmatch(
            rf'Invalid method "{method}"\. Must be one of {{("\w+"(?:, "\w+")*)}}\.', text
        )
        assert listed
        assert set(METHODS) <= set(re.findall(r'"(\w+)"', listed[1]))
        assert text.startswith(f'Invalid method "{method}". Must be one of {{"dopri8", "dopri5", ')
        assert call(torchdiffeq, method=method)[1].startswith(text[: text.index(", ")])


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_tupled_tolerance_of_another_length(name, method):
    text = f"If using tupled {name} it must have the same length as the tuple y0"
    for tol in ((1e-3,), [1e-3, 1e-3, 1e-3], torch.ones(3), ()):
        keywords = {"func": pair, "y0": (Y0, Y0), name: tol, "method": method}
        assert call(torchdiffeq, **keywords) == call(pycnf, **keywords) == (AssertionError, text)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_tolerance_that_requires_grad(name, method):
    text = f"{name} cannot require gradient"
    for tol in (torch.tensor(1e-3, requires_grad=True), torch.ones(2, requires_grad=True)):
        keywords = {name: tol, "method": method}
        assert call(torchdiffeq, **keywords) == call(pycnf, **keywords) == (AssertionError, text)


def test_tolerance_lists_of_a_tensor_state():
    """One element works (see the options' tests); two of a state of three cannot broadcast."""
    y0 = torch.ones(3, dtype=F64)
    for tol in ([1e-3, 1e-3], torch.ones(2)):
        assert raised(call(torchdiffeq, y0=y0, atol=tol))
        text = "atol must broadcast to the state's shape (3,), got (2,)"
        assert call(pycnf, y0=y0, atol=tol) == (ValueError, text)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_repeated_prescribed_times(method):
    text = "`step_t` and `jump_t` must not have any repeated elements between them."
    for options in (
        {"step_t": torch.tensor([0.5, 0.5])},
        {"jump_t": torch.tensor([0.5, 0.2, 0.5])},
        {"step_t": torch.tensor([0.5]), "jump_t": torch.tensor([0.2, 0.5])},
    ):
        keywords = {"method": method, "options": options}
        assert call(torchdiffeq, **keywords) == call(pycnf, **keywords) == (ValueError, text)
    # Repetitions before the start are dropped first.
    options = {"step_t": torch.tensor([-0.5, -0.5])}
    assert torch.is_tensor(call(pycnf, method=method, options=options, rtol=1e-2, atol=1e-2))


@pytest.mark.parametrize("method", [*METHODS, "implicit_adams", "scipy_solver"])
@pytest.mark.parametrize("name", ["func", "y0", "rtol", "atol"])
def test_arguments_among_the_options(method, name):
    """A tolerance that is put there by mistake must not go unheard."""
    mine, theirs = (
        call(library, method=method, options={name: 1e-3}) for library in (pycnf, torchdiffeq)
    )
    assert mine[0] is theirs[0] is TypeError
    assert mine[1] == theirs[1].split(".")[-1]


@pytest.mark.parametrize("name", ["min_step", "max_step"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_limits_that_are_no_number(method, name):
    keywords = {"method": method, "options": {name: float("nan")}}
    expected = (AssertionError, "underflow in dt nan")
    assert call(torchdiffeq, **keywords) == call(pycnf, **keywords) == expected


@pytest.mark.parametrize("value", [1.0, None, [Y0], (Y0,)], ids=repr)
@pytest.mark.parametrize("method", METHODS)
def test_field_that_returns_no_tensor(method, value):
    text = f"func must return a tensor like its state, got {type(value).__name__}"
    for y0 in (Y0, Y0.clone().requires_grad_()):
        result = call(pycnf, lambda t, y: value, y0=y0, method=method, rtol=1e-2, atol=1e-2)
        assert result == (TypeError, text)


@pytest.mark.parametrize("method", FIXED)
def test_step_size_and_grid_constructor(method):
    text = "step_size and grid_constructor are mutually exclusive arguments."
    options = {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}
    keywords = {"method": method, "options": options}
    assert call(torchdiffeq, **keywords) == call(pycnf, **keywords) == (ValueError, text)


@pytest.mark.parametrize("method", FIXED)
def test_unknown_interpolation(method):
    """Found out lazily, at the first output: after the first step's evaluations."""

    def run(library):
        times = []

        def field(t, y):
            times.append(float(t))
            return -y

        return call(library, field, method=method, options={"interp": "quintic"}), times

    mine, theirs = run(pycnf), run(torchdiffeq)
    assert theirs[0] == (ValueError, "Unknown interpolation method quintic")
    assert mine == theirs
    # With one time there is no output to interpolate, so nothing is wrong.
    options = {"interp": "quintic"}
    assert torch.is_tensor(call(pycnf, t=T[:1], method=method, options=options))


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "grid", [lambda f, y, t: t[1:], lambda f, y, t: t[:-1], lambda f, y, t: t + 0.1], ids="123"
)
def test_grid_that_misses_the_ends(method, grid):
    keywords = {"method": method, "options": {"grid_constructor": grid}}
    theirs = call(torchdiffeq, **keywords)
    assert theirs[0] is AssertionError
    text = "the grid must begin and end as t does"
    assert call(pycnf, **keywords) == (AssertionError, text)


@pytest.mark.parametrize(
    ("grid", "got"), [([0.0, 1.0], "list"), (None, "NoneType"), (T[None], "(1, 2)")], ids="123"
)
@pytest.mark.parametrize("method", FIXED)
def test_grid_that_is_no_vector(method, grid, got):
    keywords = {"method": method, "options": {"grid_constructor": lambda f, y, t: grid}}
    assert raised(call(torchdiffeq, **keywords))
    text = f"grid_constructor must return a tensor of times [T], got {got}"
    assert call(pycnf, **keywords) == (TypeError, text)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_times_on_another_device(method):
    """They are brought to y0's with a warning; what follows on the meta device is no solve."""
    text = "t is not on the same device as y0. Coercing to y0.device."
    for library in (torchdiffeq, pycnf):
        with pytest.warns(UserWarning, match="same device") as caught:
            assert raised(call(library, y0=Y0.to("meta"), method=method))
        assert [str(w.message) for w in caught] == [text]


# --- failing solves ---------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_nan_from_the_field_underflows(method, reverse):
    """The step becomes NaN, is replaced by min_step = 0, and that is the text."""
    t = T.flip(0) if reverse else T
    for bad in (float("nan"), float("inf")):
        theirs = call(torchdiffeq, lambda t, y, bad=bad: bad * y, t=t, method=method)
        assert theirs == (AssertionError, "underflow in dt 0.0")
        assert call(pycnf, lambda t, y, bad=bad: bad * y, t=t, method=method) == theirs


@pytest.mark.parametrize("method", ADAPTIVE)
def test_nan_later_in_the_solve(method):
    """Good at first, NaN beyond t = 0.5: the step shrinks towards it until it underflows."""

    def field(t, y):
        return torch.where(t > 0.5, torch.nan, 1.0) * y

    for y0 in (Y0, (Y0, Y0)):
        func = field if torch.is_tensor(y0) else lambda t, y: (field(t, y[0]), -y[1])
        keywords = {"func": func, "y0": y0, "method": method, "rtol": 1e-3, "atol": 1e-3}
        theirs = call(torchdiffeq, **keywords)
        assert raised(theirs)
        assert call(pycnf, **keywords) == theirs


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_nan_with_min_step(method, dtype):
    """A forced step accepts the NaN, and the next attempt sees the state: printed in the text."""
    y0 = torch.tensor([1.0, -2.0], dtype=dtype)
    keywords = {"y0": y0, "method": method, "options": {"min_step": 0.1}}
    theirs = call(torchdiffeq, lambda t, y: torch.nan * y, **keywords)
    assert theirs == (AssertionError, f"non-finite values in state `y`: {torch.nan * y0}")
    assert call(pycnf, lambda t, y: torch.nan * y, **keywords) == theirs


@pytest.mark.parametrize("method", ADAPTIVE)
def test_non_finite_initial_state(method):
    """Without min_step the NaN reaches the step size first."""
    for bad in (float("nan"), float("inf")):
        y0 = torch.tensor([[1.0], [bad]], dtype=F64)
        for options in ({}, {"first_step": 0.1}, {"min_step": 0.1}):
            keywords = {"y0": y0, "method": method, "options": options}
            theirs = call(torchdiffeq, **keywords)
            assert theirs[0] is AssertionError
            assert call(pycnf, **keywords) == theirs


@pytest.mark.parametrize("method", FIXED)
def test_nan_passes_through_fixed_methods(method):
    ys = call(pycnf, lambda t, y: torch.nan * y, method=method)
    assert ys[0].tolist() == [1.0, 1.0]
    assert torch.isnan(ys[1]).all()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_blow_up(method):
    """y' = y² ends at t = 1: the steps shrink, and the text has the step that underflowed."""
    keywords = {"func": lambda t, y: y * y, "y0": torch.ones(1, dtype=F64), "t": 2 * T}
    keywords |= {"method": method, "rtol": 1e-2, "atol": 1e-2}
    theirs, mine = call(torchdiffeq, **keywords), call(pycnf, **keywords)
    assert theirs[0] is mine[0] is AssertionError
    pattern = r"underflow in dt [0-9.e+-]+|non-finite values in state `y`: tensor\(.*\)"
    assert re.fullmatch(pattern, theirs[1])
    assert re.fullmatch(pattern, mine[1])
    assert mine[1].split(":")[0][:12] == theirs[1].split(":")[0][:12]


@pytest.mark.parametrize("method", ADAPTIVE)
def test_step_below_the_resolution_of_time(method):
    """A given first step that does not move t: the text shows it as Python does."""
    for first in (1e-30, 0.0, 1e-18):
        keywords = {"t": T + 1000, "method": method, "options": {"first_step": first}}
        theirs = call(torchdiffeq, **keywords)
        assert theirs == (AssertionError, f"underflow in dt {first}")
        assert call(pycnf, **keywords) == theirs


@pytest.mark.parametrize("method", ADAPTIVE)
def test_zero_field(method):
    """Nothing moves: the error is 0, the step grows tenfold each time, no division by zero."""
    y0 = torch.tensor([1.0, 0.0], dtype=F64)
    for state in (y0, torch.zeros_like(y0)):
        theirs = call(torchdiffeq, lambda t, y: torch.zeros_like(y), y0=state, method=method)
        mine = call(pycnf, lambda t, y: torch.zeros_like(y), y0=state, method=method)
        assert torch.equal(theirs, state.expand(2, 2))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_zero_tolerances(method):
    """0 / 0 in the error norm of a component that stays 0."""

    def field(t, y):
        return torch.stack([torch.cos(t), 0 * t])

    keywords = {"func": field, "y0": torch.zeros(2, dtype=F64), "method": method}
    keywords |= {"rtol": 1e-3, "atol": 0.0, "options": {"max_num_steps": 500}}
    theirs, mine = call(torchdiffeq, **keywords), call(pycnf, **keywords)
    assert raised(theirs)
    assert mine == theirs


@pytest.mark.parametrize("option", ["max_step", "min_step", "dfactor", "ifactor", "safety"])
def test_nan_in_step_control(option):
    """The step becomes NaN, it is not left out of a comparison."""
    keywords = {"options": {option: float("nan")}, "rtol": 1e-3, "atol": 1e-3}
    keywords["t"] = torch.tensor([0.0, 3.0], dtype=F64)
    # Rejections, and so dfactor.
    keywords["func"] = lambda t, y: 20 * torch.exp(-(((t - 1.3) / 0.15) ** 2)) - y
    theirs = call(torchdiffeq, **keywords)
    assert theirs[0] is AssertionError
    assert theirs[1].startswith("underflow in dt")
    assert call(pycnf, **keywords) == theirs


# --- arguments of odeint_adjoint --------------------------------------------------------------


def test_adjoint_needs_parameters():
    text = (
        "func must be an instance of nn.Module to specify the adjoint parameters; alternatively "
        "they can be specified explicitly via the `adjoint_params` argument. If there are no "
        "parameters then it is allowable to set `adjoint_params=()`."
    )
    for library in (torchdiffeq, pycnf):
        assert outcome(lambda lib=library: lib.odeint_adjoint(decay, Y0, T)) == (ValueError, text)
        ys = library.odeint_adjoint(decay, Y0, T, adjoint_params=())
        assert ys.shape == (2, 2)


def test_adjoint_options_cannot_be_inferred():
    text = (
        "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. So "
        "as `options` has been passed then `adjoint_options` must be passed as well."
    )
    field = MLPField(F64, features=2)
    keywords = {"method": "dopri5", "adjoint_method": "rk4", "options": {"first_step": 0.1}}
    for library in (torchdiffeq, pycnf):
        result = outcome(lambda lib=library: lib.odeint_adjoint(field, Y0, T, **keywords))
        assert result == (ValueError, text)
        ys = library.odeint_adjoint(field, Y0, T, **keywords, adjoint_options={})
        assert ys.shape == (2, 2)


def test_adjoint_warns_of_frozen_parameters_only_with_a_norm():
    text = (
        "An adjoint parameter was passed without requiring gradient. For efficiency this will be "
        "excluded from the adjoint pass, and will not appear as a tensor in the adjoint norm."
    )
    field = MLPField(F64, features=2)
    field.gate.requires_grad_(False)
    cases = ((None, []), ({"norm": "seminorm"}, []), ({"norm": lambda y: y[1].abs().max()}, [text]))
    for library in (torchdiffeq, pycnf):
        for options, expected in cases:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                library.odeint_adjoint(field, Y0, T, rtol=1e-3, atol=1e-3, adjoint_options=options)
            assert [str(w.message) for w in caught] == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"t": [0.0, 1.0]},
        {"t": torch.tensor([0, 1])},
        {"t": torch.tensor([0.0, 2.0, 1.0])},
        {"y0": [Y0]},
        {"rtol": torch.tensor(1e-3, requires_grad=True)},
        {"options": {"max_num_steps": 0}},
    ],
    ids=repr,
)
def test_adjoint_checks_like_odeint(bad):
    field = MLPField(F64, features=2)
    arguments = {"y0": Y0, "t": T, **bad}
    mine = outcome(lambda: pycnf.odeint_adjoint(field, **arguments))
    theirs = outcome(lambda: torchdiffeq.odeint_adjoint(field, **arguments))
    assert raised(theirs)
    assert mine == theirs


@pytest.mark.parametrize("gradient", ["exact", "", None, "Discrete"])
def test_adjoint_unknown_gradient(gradient):
    field = MLPField(F64, features=2)
    with pytest.raises(ValueError, match="gradient"):
        pycnf.odeint_adjoint(field, Y0, T, gradient=gradient)


@pytest.mark.parametrize("tuple_state", [False, True])
def test_tupled_tolerances_fail_in_the_backward_pass(tuple_state):
    """torchdiffeq passes the raw value on to the adjoint, whose state has other parts: it asserts.
    With adjoint tolerances given, both work."""
    field = MLPField(F64, features=2)
    text = "If using tupled rtol it must have the same length as the tuple y0"

    def run(library, **keywords):
        func = Pair(field) if tuple_state else field
        y0 = (Y0[None].clone(), Y0[None].clone()) if tuple_state else Y0[None].clone()
        tol = [1e-4, 1e-5] if tuple_state else [1e-4]
        ys = library.odeint_adjoint(func, y0, T, rtol=tol, atol=tol, **keywords)
        total = sum(part[-1].sum() for part in ys) if tuple_state else ys[-1].sum()
        return torch.autograd.grad(total, field.inner)[0]

    assert outcome(lambda: run(torchdiffeq)) == (AssertionError, text)
    assert outcome(lambda: run(pycnf)) == (AssertionError, text)
    mine = run(pycnf, adjoint_rtol=1e-4, adjoint_atol=1e-4)
    theirs = run(torchdiffeq, adjoint_rtol=1e-4, adjoint_atol=1e-4)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


class Pair(torch.nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, y):
        return self.field(t, y[0]), -y[1]


class _Watched(torch.nn.Module):
    def forward(self, t, y):
        return -y

    def callback_step(self, t, y, dt):
        pass


_STIFF = {"method": "implicit_euler", "options": {"step_size": 1.0, "max_iters": 1}}
WARNED = {
    "an option": lambda: pycnf.odeint(decay, Y0, T, options={"nonsense": 1}),
    "an option of a grid": lambda: pycnf.odeint(decay, Y0, T, method="rk4", options={"no": 1}),
    "a callback": lambda: pycnf.odeint(
        _Watched(), torch.ones(3, dtype=F64), T, method="scipy_solver"
    ),
    "max_order": lambda: pycnf.odeint(
        decay, Y0, T, method="implicit_adams", options={"max_order": 3, "step_size": 0.1}
    ),
    "Adams": lambda: pycnf.odeint(
        lambda t, y: -1e3 * y,
        Y0,
        T,
        method="implicit_adams",
        options={"step_size": 0.1, "max_iters": 1},
    ),
    "an implicit method": lambda: pycnf.odeint(lambda t, y: -y.pow(3), Y0, T, **_STIFF),
    "elements": lambda: torch.func.vmap(lambda y: pycnf.odeint(_Watched(), y, T))(
        torch.ones(2, 3, dtype=F64)
    ),
    "the adjoint": lambda: pycnf.odeint_adjoint(
        MLPField(F64), torch.ones(3, dtype=F64), T, options={"no": 1}
    ),
    "discrete": lambda: pycnf.odeint_adjoint(
        MLPField(F64), torch.ones(3, dtype=F64), T, gradient="discrete", adjoint_rtol=1.0
    ),
    "the backward solve": lambda: (
        pycnf.odeint_adjoint(MLPField(F64), torch.ones(3, dtype=F64), T, adjoint_options={"no": 1})
        .sum()
        .backward()
    ),
    "odeint_dense": lambda: pycnf.odeint_dense(decay, Y0, 0.0, 1.0, options={"no": 1}),
}


@pytest.mark.parametrize("case", WARNED)
def test_warnings_point_at_the_caller(case):
    """Python shows a warning once a line, so a line of pycnf's would hide all but the first."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WARNED[case]()
    assert caught
    assert {w.filename for w in caught} == {__file__}


class _Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, t, y):
        return -self.rate * y


INF = torch.tensor([0.0, float("inf")], dtype=F64)
RUBBISH = {
    "func": (lambda: call(pycnf, func=None), TypeError, "func must be a function, got None"),
    "empty y0": (
        lambda: call(pycnf, y0=()), ValueError, "y0 must have at least one part, got an empty tuple"
    ),
    "y0": (
        lambda: call(pycnf, y0=(Y0, 1.0)),
        TypeError, "y0 must be a tuple of tensors, got 1.0 in place 1",
    ),
    "t": (
        lambda: call(pycnf, t=INF), ValueError, "t must be finite, got times from 0.0 to inf"
    ),
    "options": (
        lambda: call(pycnf, options=["dtype"]), TypeError, "options must be a dict, got list"
    ),
    "method": (lambda: call(pycnf, method=["rk4"]), ValueError, "Invalid method \"['rk4']\""),
    "rtol": (
        lambda: call(pycnf, rtol="a"), TypeError, "rtol must be a number or a tensor, got 'a'"
    ),
    "rtol of a tuple": (
        lambda: call(pycnf, y0=(Y0,), rtol="a"),
        TypeError, "rtol must be a number or a tensor, got 'a'",
    ),
    "atol of Adams": (
        lambda: call(pycnf, atol=None, method="implicit_adams"),
        TypeError, "atol must be a number or a tensor, got None",
    ),
    "norm": (
        lambda: call(pycnf, options={"norm": "l2"}), TypeError, "norm must be a function, got 'l2'"
    ),
    "step_t": (
        lambda: call(pycnf, options={"step_t": "a"}),
        TypeError, "step_t must be a number or a tensor, got 'a'",
    ),
    "first_step": (
        lambda: call(pycnf, options={"first_step": torch.ones(3)}),
        ValueError, "first_step must be one number, got (3,)",
    ),
    "safety": (
        lambda: call(pycnf, options={"safety": torch.ones(2)}),
        TypeError, "safety must be a number, got a tensor of shape (2,)",
    ),
    "max_num_steps": (
        lambda: call(pycnf, options={"max_num_steps": float("inf")}),
        TypeError, "max_num_steps must be a whole number, got inf",
    ),
    "no step_size": (
        lambda: call(pycnf, method="rk4", options={"step_size": 0.0}),
        ValueError, "step_size must be positive, got 0.0",
    ),
    "step_size": (
        lambda: call(pycnf, method="rk4", options={"step_size": "a"}),
        TypeError, "step_size must be a number, got 'a'",
    ),
    "adjoint_options": (
        lambda: outcome(lambda: pycnf.odeint_adjoint(_Linear(), Y0, T, adjoint_options=[1])),
        TypeError, "adjoint_options must be a dict, got list",
    ),
    "adjoint norm": (
        lambda: outcome(
            lambda: pycnf.odeint_adjoint(_Linear(), Y0, T, adjoint_options={"norm": "semi"})
        ),
        TypeError, 'adjoint_options["norm"] must be a function of the adjoint state or "seminorm"',
    ),
    "adjoint_params": (
        lambda: outcome(lambda: pycnf.odeint_adjoint(decay, Y0, T, adjoint_params=3)),
        TypeError, "adjoint_params must be an iterable of tensors, got 3",
    ),
    "an adjoint parameter": (
        lambda: outcome(lambda: pycnf.odeint_adjoint(decay, Y0, T, adjoint_params=[Y0, 3])),
        TypeError, "adjoint_params must be tensors, got 3 in place 1",
    ),
    "t1": (
        lambda: outcome(lambda: pycnf.odeint_dense(decay, Y0, 1.0, 1.0)),
        AssertionError, "t0 and t1 must differ, both are 1.0",
    ),
    "dense times": (
        lambda: outcome(lambda: pycnf.odeint_dense(decay, Y0, 0.0, 1.0)("now")),
        TypeError, "times must be a number or a tensor, got 'now'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUBBISH)
def test_rubbish_is_named(case):
    """Where torchdiffeq fails somewhere inside, or never ends, the argument is named here."""
    outcome_of, error, text = RUBBISH[case]
    got = outcome_of()
    assert raised(got)
    assert got[0] is error
    assert got[1].startswith(text)
