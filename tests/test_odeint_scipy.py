"""scipy_solver equals torchdiffeq's to the last digit, but for solves that SciPy gives up."""

import builtins
import warnings

import pytest
import torch
import torchdiffeq
from problems import MLPField, as_tuple, clone_state, flat, outcome, raised

import pycnf

F32, F64 = torch.float32, torch.float64
SCIPY = ("LSODA", "RK45", "Radau", "BDF", "DOP853", "RK23")


def driven(t, y):
    return -y * torch.cos(t) + 0.1 * torch.sin(5 * t)


def state(dtype, *shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    return values.to(dtype)


def solved(library, field, y0, t, **keywords):
    calls = []

    def recorded(t, y):
        assert not torch.is_grad_enabled()
        calls.append((t.clone(), flat(y).clone()))
        return field(t, y)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = outcome(
            lambda: library.odeint(recorded, clone_state(y0), t, method="scipy_solver", **keywords)
        )
    return result, calls, [str(warning.message) for warning in caught]


def assert_equal(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert torch.equal(a, b)


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


@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("t_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, torch.half, torch.complex64, torch.complex128])
@pytest.mark.parametrize("solver", SCIPY)
def test_same_bits(solver, dtype, t_dtype, reverse):
    """Complex states too, where the solver takes them; its error where it does not."""
    t = torch.linspace(0, 1, 9, dtype=t_dtype)
    t = t.flip(0) if reverse else t
    keywords = {"rtol": 1e-5, "atol": 1e-6, "options": {"solver": solver}}
    for y0 in (state(dtype, 4, 3), state(dtype)):
        result, calls, texts = assert_same(driven, y0, t, **keywords)
    refused = dtype.is_complex and solver in ("LSODA", "Radau")
    assert raised(result) == refused
    assert refused or len(calls) > 9
    assert any("min_step" in text for text in texts) == (solver != "LSODA")


def test_times_pass_through_the_default_dtype():
    """LSODA gives Python floats, of which torch makes float32; an f64 field sees those."""
    t = torch.linspace(0, 1, 5, dtype=F64)
    _, calls, _ = assert_same(driven, state(F64, 3), t)
    assert all(time.dtype == F64 and time == time.float() for time, _ in calls)
    _, calls, _ = assert_same(driven, state(F64, 3), t, options={"solver": "RK45"})
    assert not all(time == time.float() for time, _ in calls)


def pair(t, y):
    a, b, c = y
    return -a * b, torch.cos(t) + 0 * b, c * b


@pytest.mark.parametrize("solver", ["LSODA", "RK45"])
@pytest.mark.parametrize("tolerances", [{}, {"rtol": [1e-3, 1e-7, 1e-2], "atol": (1e-4, 1e-9, 1)}])
def test_tuples(tolerances, solver):
    y0 = (state(F32, 4, 3), state(F32), state(F64, 2, 1))
    for t in (torch.linspace(0, 1, 6), torch.linspace(1, 0, 6, dtype=F64), torch.zeros(1)):
        assert_same(pair, y0, t, options={"solver": solver}, **tolerances)


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
@pytest.mark.parametrize("dtype", [F32, F64, torch.complex64])
def test_one_time(dtype, shape):
    """[1, *shape] as everywhere; torchdiffeq's is [1, N] whatever the shape."""
    y0 = state(dtype, *shape)
    (mine, *_), (theirs, *_) = (
        solved(library, driven, y0, torch.ones(1)) for library in (pycnf, torchdiffeq)
    )
    assert_equal(mine, y0[None])
    assert_equal(mine.reshape(1, -1), theirs)
    mine.add_(1)
    assert torch.equal(y0, state(dtype, *shape)), "the result must be no view of y0"


FIELDS = {
    "wider": lambda t, y: -y.double(),
    "broadcast": lambda t, y: t * torch.ones(1),
    "strided": lambda t, y: -y.T.contiguous().T,
    "of another size": lambda t, y: torch.ones(2),
    "bfloat16": lambda t, y: -y.bfloat16(),
}


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_unusual_fields(field):
    for solver in ("LSODA", "RK45"):
        assert_same(field, state(F32, 4, 3), torch.linspace(0, 1, 5), options={"solver": solver})


OPTIONS = {
    "silent": {"eps": 1, "grid_points": 2, "norm": torch.norm},
    "unknown": {"step_size": 0.1, "eps": 1},
    "min_step": {"min_step": 0.01, "max_step": 0.02},
    "max_step": {"solver": "RK45", "max_step": 0.01},
    "no such solver": {"solver": "RK99"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    options = OPTIONS[name]
    t = torch.linspace(0, 1, 5)
    result, calls, texts = assert_same(driven, state(F32, 3), t, options=options)
    if name == "silent":
        assert not texts
    elif name == "unknown":
        assert texts == ["ScipyWrapperODESolver: Unexpected arguments {'step_size': 0.1}"]
    elif "step" in name:
        assert len(calls) > 100 or name == "min_step"
    else:
        assert raised(result)


def test_tolerances():
    t = torch.linspace(0, 1, 5)
    counts = []
    for tolerance in (1e-3, 1e-9, [1e-3], torch.tensor(1e-3), torch.full((12,), 1e-3)):
        keywords = {"rtol": tolerance, "atol": tolerance}
        counts.append(len(assert_same(driven, state(F64, 4, 3), t, **keywords)[1]))
    assert counts[0] < counts[1]


def test_callbacks_are_not_supported():
    class Field:
        def __call__(self, t, y):
            return -y

        def callback_step(self, t, y, dt):
            raise AssertionError("called")

    texts = []
    for library in (pycnf, torchdiffeq):
        with pytest.warns(UserWarning, match="does not support callbacks") as caught:
            library.odeint(Field(), state(F32, 3), torch.linspace(0, 1, 3), method="scipy_solver")
        texts.append([str(warning.message) for warning in caught])
    assert texts[0] == texts[1]


def test_the_result_has_no_graph():
    y0 = state(F64, 3).requires_grad_()
    for library in (pycnf, torchdiffeq):
        ys = library.odeint(driven, y0, torch.linspace(0, 1, 3), method="scipy_solver")
        assert not ys.requires_grad


@pytest.mark.parametrize("solver", ["RK45", "BDF"])
def test_a_solve_that_ends_early_is_an_error(solver):
    """y' = y² has a pole at t = 1; torchdiffeq returns the rows before it."""
    t, y0 = torch.linspace(0, 3, 7), torch.ones(2)
    keywords = {"method": "scipy_solver", "options": {"solver": solver}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = torchdiffeq.odeint(lambda t, y: y**2, y0, t, **keywords)
        assert 0 < len(short) < len(t)
        text = f"scipy_solver: {solver} failed: Required step size is less than spacing"
        with pytest.raises(RuntimeError, match=text):
            pycnf.odeint(lambda t, y: y**2, y0, t, **keywords)


def test_without_scipy(monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("scipy"):
            raise ImportError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'method="scipy_solver" needs SciPy.*pip install scipy'):
        pycnf.odeint(driven, state(F32, 3), torch.linspace(0, 1, 3), method="scipy_solver")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize(
    ("method", "adjoint"),
    [
        ("scipy_solver", {"adjoint_method": "euler", "adjoint_options": {"step_size": 0.01}}),
        ("scipy_solver", {"options": {"solver": "RK45"}}),
        ("euler", {"adjoint_method": "scipy_solver"}),
    ],
)
def test_adjoint(method, adjoint, reverse, dtype):
    def run(library):
        field, y0 = MLPField(dtype), state(dtype, 4, 3).requires_grad_()
        t = torch.linspace(0, 1, 4, dtype=F64)
        t = (t.flip(0) if reverse else t).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ys = library.odeint_adjoint(
                field, y0, t, method=method, rtol=1e-5, atol=1e-6, **adjoint
            )
            (ys**2).sum().backward()
        return ys.detach(), y0.grad, t.grad, *(p.grad for p in field.parameters())

    tolerance = 1e-10 if dtype == F64 else 1e-5
    for mine, theirs in zip(run(pycnf), run(torchdiffeq), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_no_discrete_gradient():
    with pytest.raises(ValueError, match=r'gradient="discrete" needs.*method="scipy_solver"'):
        pycnf.odeint_adjoint(
            MLPField(F32), state(F32, 4, 3), torch.linspace(0, 1, 3), method="scipy_solver",
            gradient="discrete",
        )  # fmt: skip
