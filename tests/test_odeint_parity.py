"""pycnf.odeint gives torchdiffeq's numbers at torchdiffeq's cost.

Most tests compare the complete record of the field's evaluations (times and states), which pins the
initial step, every attempt, every rejection, the reuse of the last stage and the overshoot.
"""

import functools
import math

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    ADAPTIVE,
    FIXED,
    FIXED_STAGES,
    METHODS,
    PROBLEMS,
    STAGES,
    TOLERANCE,
    MLPField,
    assert_close,
    assert_same_calls,
    assert_same_outcome,
    assert_same_run,
    assert_similar_effort,
    clone_state,
    flat,
    mlp,
    outcome,
    raised,
    record,
    solve,
    value_tolerance,
)

import pycnf

F32, F64 = torch.float32, torch.float64


def both(*arguments, **keywords):
    return solve(pycnf, *arguments, **keywords), solve(torchdiffeq, *arguments, **keywords)


def both_record(*arguments, **keywords):
    return record(pycnf, *arguments, **keywords), record(torchdiffeq, *arguments, **keywords)


def decay(t, y):
    return -0.7 * y * (1 + t)


# --- results and counts on the shared problems ------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_f64_takes_the_same_steps(method, problem):
    tol = TOLERANCE[F64][method]
    mine, theirs = both(problem, method, rtol=tol, atol=tol)
    assert theirs.nfe == 2 + STAGES[method] * theirs.attempts, "the reference is not what we think"
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_f32_agrees_to_rounding(method, problem):
    """Rounding alone moves an attempt or two; the values still agree where the counts do."""
    tol = TOLERANCE[F32][method]
    if problem is PROBLEMS["late_start"]:
        tol = max(tol, 1e-3)  # f32 resolves times to 6e-5 there; below this, rounding alone rejects
    mine, theirs = both(problem, method, F32, rtol=tol, atol=tol)
    assert_similar_effort(mine, theirs, method)
    assert {t.dtype for t in mine.times} == {F32}
    if mine.nfe == theirs.nfe:
        atol = {"dopri8": 50, "dopri5": 5, "tsit5": 5}.get(method, 1) * tol
        assert_close(mine.ys, theirs.ys, rtol=0.0, atol=atol)


def equal_steps(problem):
    """A step size that splits the problem's times into 30 and a bit."""
    t = problem(F64)[2]
    return float((t[-1] - t[0]).abs()) / 30.5


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_f32_arithmetic(method, problem):
    """With the step size forced, no error estimate is in play and f32 agrees to its rounding."""
    h = equal_steps(problem)
    options = {"first_step": h, "min_step": h, "max_step": h}
    mine, theirs = both(problem, method, F32, rtol=1e-4, atol=1e-4, options=options)
    assert theirs.rejected == 0
    scale = max(float(state.abs().max()) for state in theirs.states)
    assert torch.equal(torch.stack(mine.times), torch.stack(theirs.times))
    assert_same_calls(mine, theirs, rtol=0.0, atol=2e-5 * scale)
    assert_close(mine.ys, theirs.ys, rtol=0.0, atol=2e-5 * scale)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_f64_arithmetic(method, problem):
    """Forced steps again: in f64 stages, ends of steps and interpolation agree to 1e-12."""
    h = equal_steps(problem)
    options = {"first_step": h, "min_step": h, "max_step": h}
    mine, theirs = both(problem, method, rtol=1e-4, atol=1e-4, options=options)
    assert torch.equal(torch.stack(mine.times), torch.stack(theirs.times))
    assert_same_calls(mine, theirs, rtol=1e-12, atol=1e-12)
    assert_close(mine.ys, theirs.ys, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_rejections_are_rejections(method):
    """The problem named for rejections has them, and they happen at the same attempts."""
    tol = TOLERANCE[F64][method]
    mine, theirs = both(PROBLEMS["pulse"], method, rtol=tol, atol=tol)
    assert theirs.rejected >= 4
    assert mine.rejected == theirs.rejected
    assert mine.accepted == theirs.accepted


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_takes_the_same_steps(method, problem, dtype):
    mine, theirs = both(problem, method, dtype)
    assert theirs.nfe == FIXED_STAGES[method] * (len(problem(dtype)[2]) - 1)
    rtol, atol = (1e-11, 1e-11) if dtype == F64 else (2e-5, 2e-5)
    assert_same_calls(mine, theirs, rtol, atol)
    assert_close(mine.ys, theirs.ys, rtol, atol)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_default_tolerances(method):
    """rtol=1e-7, atol=1e-9 by default, whatever the method; dopri5 without a method."""

    def field(t, y):
        return torch.cos(3 * t) - y

    y0, t = torch.tensor([0.5, 1.5], dtype=F64), torch.tensor([0.0, 0.1], dtype=F64)
    mine, theirs = both_record(field, y0, t, method=method)
    explicit = record(torchdiffeq, field, y0, t, method=method, rtol=1e-7, atol=1e-9)
    assert theirs.nfe == explicit.nfe
    assert_same_run(mine, theirs, method)


def test_default_method_is_dopri5():
    mine, theirs = both(mlp, None)
    dopri5 = solve(torchdiffeq, mlp, "dopri5")
    assert theirs.nfe == dopri5.nfe
    assert_same_run(mine, theirs, "dopri5")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_steps_limited_by_stability(method, dtype):
    """At the edge of stability rounding is amplified: within two attempts or 3 %."""

    def field(t, y):
        return -20 * (y - torch.cos(t))

    y0, t = torch.zeros(4, dtype=dtype), torch.linspace(0, 3, 5)
    mine, theirs = both_record(field, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert_similar_effort(mine, theirs, method)
    assert theirs.rejected >= 2
    assert_close(mine.ys, theirs.ys, rtol=0.0, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5"])
def test_long_times(method):
    """A thousand steps and outputs; the difference stays at rounding, the counts stay equal."""

    def field(t, y):
        x, v = y.unbind()
        return torch.stack([v, -torch.sin(x) + 0.01 * torch.cos(t)])

    y0, t = torch.tensor([1.0, 0.0], dtype=F64), torch.linspace(0, 100, 1001, dtype=F64)
    tol = TOLERANCE[F64][method]
    mine, theirs = both_record(field, y0, t, method=method, rtol=tol, atol=tol)
    assert theirs.attempts > 100
    assert_same_run(mine, theirs, method)


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 10**6),
    size=st.integers(1, 5),
    span=st.floats(0.1, 3.0),
    start=st.floats(-5, 5),
    backwards=st.booleans(),
    outputs=st.integers(2, 6),
    digits=st.integers(2, 5),
)
def test_random_problems(method, seed, size, span, start, backwards, outputs, digits):
    """Random smooth fields: nothing depends on the chosen examples above."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=F64)
    y0 = torch.randn(3, size, generator=generator, dtype=F64)

    def field(t, y):
        return torch.tanh(y @ matrix) - 0.3 * y + torch.sin(t)

    t = start + torch.linspace(0, -span if backwards else span, outputs, dtype=F64)
    mine, theirs = both_record(field, y0, t, method=method, rtol=10.0**-digits, atol=10.0**-digits)
    assert_same_run(mine, theirs, method)


# --- output times -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
def test_output_times_do_not_move_the_steps(method):
    """Outputs are interpolated: 400 of them cost what two do; both read the same curve."""
    field, y0, _ = PROBLEMS["pulse"](F64)
    tol = TOLERANCE[F64][method]
    few = record(pycnf, field, y0, torch.tensor([0.0, 3.0]), method=method, rtol=tol, atol=tol)
    t = torch.linspace(0, 3, 400, dtype=F64)
    mine, theirs = both_record(field, y0, t, method=method, rtol=tol, atol=tol)
    assert mine.nfe == few.nfe == theirs.nfe
    assert torch.equal(torch.stack(mine.times), torch.stack(few.times))
    assert_close(mine.ys, theirs.ys, *value_tolerance(method))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_overshoots_and_interpolates(method):
    """The last step is not clipped to t[-1]: the field is evaluated beyond it."""
    field, y0 = decay, torch.ones(2, dtype=F64)
    t = torch.tensor([0.0, 0.3], dtype=F64)
    mine, theirs = both_record(field, y0, t, method=method, rtol=1e-2, atol=1e-2)
    assert max(theirs.times) > 0.3
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("method", METHODS)
def test_one_output_time(method):
    """One time: y0 comes back; an adaptive method still pays two evaluations, a fixed one none."""
    y0 = torch.tensor([1.0, 2.0], dtype=F64)
    mine, theirs = both_record(decay, y0, torch.tensor([0.5], dtype=F64), method=method)
    assert theirs.nfe == (2 if method in ADAPTIVE else 0)
    assert_same_calls(mine, theirs)
    assert torch.equal(mine.ys, y0[None])


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_first_output_is_a_copy_of_y0(method):
    y0 = torch.tensor([1.0, 2.0], dtype=F64)
    ys = pycnf.odeint(decay, y0, torch.tensor([0.0, 0.1]), method=method, rtol=1e-3, atol=1e-3)
    ys[0] += 1
    assert y0.tolist() == [1.0, 2.0]
    assert ys.is_contiguous()


@pytest.mark.parametrize("y_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("t_dtype", [torch.float16, torch.bfloat16, F32, F64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_time_dtype(method, t_dtype, y_dtype):
    """The field always gets a 0-dim time in the state's real dtype, whatever dtype t has."""
    t = torch.tensor([0.0, 0.3, 0.9, 1.1]).to(t_dtype)
    y0 = torch.linspace(-1, 1, 5, dtype=y_dtype)

    def field(t, y):
        return torch.sin(5 * t) * y + t

    mine, theirs = both_record(field, y0, t, method=method, rtol=1e-3, atol=1e-3)
    assert {time.dtype for time in mine.times} == {y_dtype}
    assert {time.shape for time in mine.times} == {torch.Size([])}
    if y_dtype == F64:
        assert_same_run(mine, theirs, method)
    else:
        assert_similar_effort(mine, theirs, method)
        assert_close(mine.ys, theirs.ys, 1e-3, 1e-3 if method != "dopri8" else 1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_strided_output_times(method):
    """t may be a strided view; a kernel that reads it as contiguous would see the wrong times."""
    t = torch.stack([torch.linspace(0, 1, 5), torch.full((5,), 9.0)], 1).double()[:, 0]
    assert not t.is_contiguous()
    y0 = torch.ones(2, dtype=F64)
    mine, theirs = both_record(decay, y0, t, method=method, rtol=1e-3, atol=1e-3)
    assert_same_run(mine, theirs, method)


# --- shapes of the state ----------------------------------------------------------------------

SHAPES = {
    "scalar": lambda: torch.tensor(0.8, dtype=F64),
    "one": lambda: torch.tensor([0.8], dtype=F64),
    "empty": lambda: torch.ones(0, 3, dtype=F64),
    "3d": lambda: torch.linspace(-1, 1, 2 * 3 * 5, dtype=F64).reshape(2, 3, 5),
    "transposed": lambda: torch.linspace(-1, 1, 35, dtype=F64).reshape(5, 7).T,
    "every other": lambda: torch.linspace(-1, 1, 40, dtype=F64)[::2],
    "offset view": lambda: torch.linspace(-1, 1, 40, dtype=F64)[3:],
    "expanded": lambda: torch.tensor([0.5, -0.5], dtype=F64).expand(4, 2),
    "channels last": lambda: (
        torch.linspace(-1, 1, 48, dtype=F64)
        .reshape(2, 3, 2, 4)
        .to(memory_format=torch.channels_last)
    ),
    "odd tail": lambda: torch.linspace(-1, 1, 1031, dtype=F64),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_shapes(method, shape):
    """Any shape and any strides; where torchdiffeq refuses (an empty adaptive state), so do we."""

    def field(t, y):
        return torch.sin(3 * y) + torch.cos(2 * t) * y

    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    keywords = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    mine = outcome(lambda: pycnf.odeint(field, SHAPES[shape](), t, **keywords))
    theirs = outcome(lambda: torchdiffeq.odeint(field, SHAPES[shape](), t, **keywords))
    assert_same_outcome(mine, theirs, *value_tolerance(method))
    if torch.is_tensor(theirs):
        assert_same_run(*both_record(field, SHAPES[shape](), t, **keywords), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shapes", [[(2,)], [(), (3, 2)], [(2,), (0, 3), (1,)], [(2, 1), (), (), (4,)]], ids=str
)
def test_tuple_shapes(shapes, method):
    """Tuples of one, of 0-dim, and with an empty member; each part keeps its shape, in a tuple."""
    y0 = tuple(torch.full(shape, 0.3 + i, dtype=F64) for i, shape in enumerate(shapes))
    seen = set()

    def field(t, state):
        seen.add((type(state), tuple(part.shape for part in state)))
        return tuple(-(i + 1) * part * (1 + t) for i, part in enumerate(state))

    keywords = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    mine = outcome(lambda: pycnf.odeint(field, y0, t, **keywords))
    assert seen == {(tuple, tuple(part.shape for part in y0))}
    theirs = outcome(lambda: torchdiffeq.odeint(field, y0, t, **keywords))
    assert_same_outcome(mine, theirs, *value_tolerance(method))


@pytest.mark.parametrize("method", METHODS)
def test_tuple_of_strided_parts(method):
    square = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3).T
    y0 = (square, torch.ones(3, dtype=F64).expand(2, 3))

    def field(t, state):
        return state[0] * torch.cos(t), -state[1] * state[0].T

    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    mine, theirs = both_record(field, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("method", METHODS)
def test_field_may_return_a_list(method):
    y0 = (torch.ones(2, dtype=F64), torch.zeros(3, dtype=F64))
    t = torch.tensor([0.0, 1.0], dtype=F64)

    def field(t, state):
        return [-state[0], torch.cos(t) + 0 * state[1]]

    mine, theirs = both_record(field, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert_same_run(mine, theirs, method)


# --- other dtypes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_dtypes(method, dtype):
    """Half precision has no kernel and runs the same operations as torchdiffeq: the same bits."""

    def field(t, y):
        assert t.dtype == y.dtype == dtype
        return torch.sin(y) * (1 + t) - 0.3 * y

    y0, t = torch.tensor([1.0, 0.5, 0.2]).to(dtype), torch.linspace(0, 1, 4)
    mine, theirs = both_record(field, y0, t, method=method, rtol=1e-2, atol=1e-2)
    assert_similar_effort(mine, theirs, method)
    assert mine.ys.dtype == dtype
    if mine.nfe == theirs.nfe:
        assert_close(mine.ys, theirs.ys, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_complex_dtypes(method, reverse, dtype):
    """Complex states: real times, norms of absolute values."""
    real = torch.empty((), dtype=dtype).real.dtype

    def field(t, y):
        assert t.dtype == real
        return 1j * (1 + t) * y - 0.2 * y * y.abs()

    y0 = torch.tensor([1 + 0.5j, -0.3 + 1j, 0.1j], dtype=dtype)
    t = torch.linspace(0, 2, 4, dtype=F64)
    t = t.flip(0) if reverse else t
    tol = 1e-4 if method in ("adaptive_heun", "fehlberg2") else 1e-5
    mine, theirs = both_record(field, y0, t, method=method, rtol=tol, atol=tol)
    if dtype == torch.complex128:
        assert_same_run(mine, theirs, method)
    else:
        assert_similar_effort(mine, theirs, method)
        assert mine.ys.dtype == dtype
        if mine.nfe == theirs.nfe:
            assert_close(mine.ys, theirs.ys, 1e-4, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_complex_and_real_parts_in_a_tuple(method):
    """The state is one vector in the promoted dtype, so the real part comes back complex."""
    y0 = (torch.tensor([1 + 1j], dtype=torch.complex128), torch.tensor([0.5], dtype=F64))

    def field(t, state):
        return 1j * state[0], -state[1]

    t = torch.linspace(0, 1, 3, dtype=F64)
    mine, theirs = both_record(field, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert mine.ys[1].dtype == torch.complex128
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_tuple_dtypes_promote(method):
    """f32 beside f64: both come back in f64, and the field sees f64 for both."""
    y0 = (torch.tensor([1.0, 2.0]), torch.tensor([0.5], dtype=F64))
    seen = set()

    def field(t, state):
        seen.add((t.dtype, *(part.dtype for part in state)))
        return -state[0], -0.5 * state[1]

    t = torch.linspace(0, 1, 3)
    mine = record(pycnf, field, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert seen == {(F64, F64, F64)}
    theirs = record(torchdiffeq, field, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert [part.dtype for part in mine.ys] == [F64, F64]
    assert_same_run(mine, theirs, method)


@pytest.mark.parametrize("f_dtype", [torch.bfloat16, torch.float16, F32, F64], ids=str)
@pytest.mark.parametrize("y_dtype", [torch.bfloat16, F32, F64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_field_returns_another_dtype(method, y_dtype, f_dtype):
    """Adaptive: stages are stored in y's dtype. Fixed: the state drifts to the promoted dtype."""

    def run(library):
        seen = []

        def field(t, y):
            seen.append((t.dtype, y.dtype))
            return (-0.7 * y * (1 + t)).to(f_dtype)

        y0, t = torch.tensor([1.0, -0.5]).to(y_dtype), torch.linspace(0, 1, 4)
        call = functools.partial(library.odeint, method=method, rtol=1e-2, atol=1e-2)
        return outcome(lambda: call(field, y0, t)), seen

    (mine, my_dtypes), (theirs, their_dtypes) = run(pycnf), run(torchdiffeq)
    small = 5e-2 if {torch.bfloat16, torch.float16} & {y_dtype, f_dtype} else 1e-2
    if method in FIXED:
        small = 2e-2 if small == 5e-2 else 1e-5
    elif y_dtype == F64 and f_dtype == F64:
        small = 2e-6
    assert_same_outcome(mine, theirs, small, small)
    if len(my_dtypes) == len(their_dtypes):
        assert my_dtypes == their_dtypes
    else:
        assert set(my_dtypes) == set(their_dtypes)
        assert abs(len(my_dtypes) - len(their_dtypes)) <= 2 * {**STAGES, **FIXED_STAGES}[method]


def test_default_dtype_does_not_matter():
    """A user who sets f64 as torch's default keeps an f32 solve."""
    y0, t = torch.tensor([1.0, 2.0], dtype=F32), torch.tensor([0.0, 1.0], dtype=F32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        mine, theirs = both_record(decay, y0, t, method="dopri5", rtol=1e-4, atol=1e-4)
    finally:
        torch.set_default_dtype(before)
    assert mine.ys.dtype == F32
    assert_similar_effort(mine, theirs, "dopri5")
    assert_close(mine.ys, theirs.ys, 1e-4, 1e-4)


# --- quirks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_last_stages_are_evaluated_just_before_the_end(method, reverse, dtype):
    """Stages with alpha == 1 get nextafter(t1, t1 - 1): forced steps make the times exact."""
    h, start = 0.1, 0.0 if not reverse else 1.0
    t = torch.tensor([start, start + 0.35 * (-1 if reverse else 1)], dtype=F64)
    options = {"first_step": h, "min_step": h, "max_step": h}
    y0 = torch.ones(2, dtype=dtype)
    mine, theirs = both_record(decay, y0, t, method=method, options=options)
    assert torch.equal(torch.stack(mine.times), torch.stack(theirs.times))
    end = torch.tensor((-1.0 if reverse else 0.0) + h, dtype=F64).to(dtype)
    before = torch.nextafter(end, end - 1)
    assert (-before if reverse else before) in mine.times
    assert (-end if reverse else end) not in mine.times


@pytest.mark.parametrize("method", ADAPTIVE)
def test_last_stage_is_reused_even_where_it_is_not_f_of_y1(method):
    """f(t1, y1) is never evaluated anew. For three methods f0 is then another number."""
    h = 0.25
    y0, t = torch.ones(1, dtype=F64), torch.tensor([0.0, 3 * h - 0.01], dtype=F64)
    options = {"first_step": h, "min_step": h, "max_step": h}
    mine = record(pycnf, decay, y0, t, method=method, options=options)
    theirs = record(torchdiffeq, decay, y0, t, method=method, options=options)
    assert theirs.nfe == 1 + 3 * STAGES[method]
    assert_same_calls(mine, theirs, 1e-13, 1e-13)
    # Is the state at the first accepted end, read from the outputs, what the last stage saw?
    t = torch.tensor([0.0, h, 2 * h], dtype=F64)
    ys = pycnf.odeint(decay, y0, t, method=method, options=options)
    last_stage = mine.states[STAGES[method]]
    true_fsal = method in ("dopri5", "dopri8", "bosh3")
    assert math.isclose(float(ys[1]), float(last_stage), rel_tol=1e-13) == true_fsal


@pytest.mark.parametrize("method", METHODS)
def test_scalar_f32_state_with_f64_times(method):
    """0-dim states promote with 0-dim times: a fixed-grid state drifts to f64 after one step."""

    def run(library):
        seen = []

        def field(t, y):
            seen.append((t.dtype, y.dtype, y.shape))
            return -y * torch.cos(t)

        y0 = torch.tensor(1.0, dtype=F32)
        t = torch.linspace(0, 1, 4, dtype=F64)
        return library.odeint(field, y0, t, method=method, rtol=1e-3, atol=1e-3), seen

    (mine, my_dtypes), (theirs, their_dtypes) = run(pycnf), run(torchdiffeq)
    assert my_dtypes == their_dtypes
    if method in FIXED:
        assert their_dtypes[0][1] == F32
        assert their_dtypes[-1][1] == F64
    assert_close(mine, theirs, 1e-5, 1e-6)


# --- fields of every kind ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "tuple", "reversed"])
@pytest.mark.parametrize("method", METHODS)
def test_field_edits_its_input_in_place(method, kind):
    """The state that f gets is live: an edit changes the step (and y0 itself) as in torchdiffeq."""

    def run(library):
        def field(t, y):
            if kind == "tuple":
                y[0].mul_(0.999)
                return -y[0] * (1 + t), y[0].sum() - y[1]
            y.mul_(0.999)
            return -y * (1 + t)

        y0 = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
        state = (y0, torch.zeros((), dtype=F64)) if kind == "tuple" else y0
        t = torch.linspace(0, 1, 4, dtype=F64)
        t = t.flip(0) if kind == "reversed" else t
        with torch.no_grad():
            ys = library.odeint(field, state, t, method=method, rtol=1e-3, atol=1e-3)
        return ys, y0

    (mine, my_y0), (theirs, their_y0) = run(pycnf), run(torchdiffeq)
    assert_close(mine, theirs, *value_tolerance(method))
    assert_close(my_y0, their_y0, *value_tolerance(method))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_field_returns_its_own_input(method, reverse):
    """f(t, y) = y, the same tensor object: stages must be copied before the state moves on."""
    y0, t = torch.tensor([1.0, -2.0], dtype=F64), torch.linspace(0, 1, 4, dtype=F64)
    t = t.flip(0) if reverse else t
    mine, theirs = both_record(lambda t, y: y, y0, t, method=method, rtol=1e-4, atol=1e-4)
    assert_same_run(mine, theirs, method)
    assert y0.tolist() == [1.0, -2.0]


def buffered(y0):
    """A field that returns one persistent buffer, overwritten at every call."""
    buffer = torch.empty_like(y0)

    def field(t, y):
        return buffer.copy_(torch.cos(2 * t) * y)

    return field


@pytest.mark.parametrize("method", ADAPTIVE)
def test_field_returns_a_persistent_buffer(method):
    """torchdiffeq copies each stage at once, so (with first_step given) a reused buffer works."""
    y0, t = torch.tensor([1.0, -2.0], dtype=F64), torch.linspace(0, 3, 5, dtype=F64)
    keywords = {"method": method, "rtol": 1e-3, "atol": 1e-3, "options": {"first_step": 0.05}}
    fresh = record(torchdiffeq, lambda t, y: torch.cos(2 * t) * y, y0, t, **keywords)
    mine, theirs = (
        record(library, buffered(y0), y0, t, **keywords) for library in (pycnf, torchdiffeq)
    )
    assert_close(theirs.ys, fresh.ys, 0.0, 0.0)
    assert_same_run(mine, fresh, method)


@pytest.mark.parametrize("method", METHODS)
def test_persistent_buffer_where_torchdiffeq_keeps_a_reference(method):
    """Without first_step, and in fixed methods, torchdiffeq reads f0 after it was overwritten.

    That is the caller's bug; we may share it or be right, but must not be a third thing.
    """
    y0, t = torch.tensor([1.0, -2.0], dtype=F64), torch.linspace(0, 3, 5, dtype=F64)
    keywords = {"method": method, "rtol": 1e-3, "atol": 1e-3}
    fresh = record(torchdiffeq, lambda t, y: torch.cos(2 * t) * y, y0, t, **keywords)
    mine, theirs = (
        record(library, buffered(y0), y0, t, **keywords) for library in (pycnf, torchdiffeq)
    )
    assert any(torch.allclose(mine.ys, r.ys, *value_tolerance(method)) for r in (fresh, theirs))


@pytest.mark.parametrize("method", METHODS)
def test_field_keeps_every_state_it_was_given(method):
    """A recorded (t, y) must not be overwritten by later work: no buffer reuse behind the user."""
    for y0 in (torch.ones(5, dtype=F64), (torch.ones(2, dtype=F64), torch.zeros(3, dtype=F64))):
        kept, copies = [], []

        def field(t, y, kept=kept, copies=copies):
            kept.append((t, y))
            copies.append((t.clone(), clone_state(y)))
            return -y * (1 + t) if torch.is_tensor(y) else (-y[0], torch.cos(t) + 0 * y[1])

        with torch.no_grad():
            t = torch.linspace(0, 1, 4, dtype=F64)
            pycnf.odeint(field, clone_state(y0), t, method=method, rtol=1e-3, atol=1e-3)
        assert len(kept) >= 3
        for (t, y), (t_copy, y_copy) in zip(kept, copies, strict=True):
            assert torch.equal(t, t_copy)
            assert torch.equal(flat(y), flat(y_copy))


@pytest.mark.parametrize("method", METHODS)
def test_field_keeps_and_returns_results(method):
    """f's results belong to the user too: the solver must not write into them."""
    kept, copies = [], []

    def field(t, y):
        kept.append(-y * (1 + t))
        copies.append(kept[-1].clone())
        return kept[-1]

    with torch.no_grad():
        t = torch.linspace(0, 1, 4, dtype=F64).flip(0)
        pycnf.odeint(field, torch.ones(5, dtype=F64), t, method=method, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


class CallOverride(torch.nn.Module):
    """torchcde's way: a Module whose __call__ is its own."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))
        self.scale = scale

    def __call__(self, t, y):
        return -self.rate * self.scale * y * (1 + t)

    def forward(self, t, y):
        raise AssertionError("the solver must call the module, not its forward")


class Hooked(torch.nn.Module):
    def forward(self, t, y):
        return -y


def with_hook():
    module = Hooked()
    module.register_forward_hook(lambda module, inputs, output: output * (1 + inputs[0]))
    return module


FIELDS = {
    "partial": lambda: functools.partial(lambda rate, t, y: -rate * y * (1 + t), 0.7),
    "module overriding __call__": CallOverride,
    "module with a forward hook": with_hook,
    "callable object": lambda: type("F", (), {"__call__": lambda self, t, y: -y * (1 + t)})(),
    "bound method": lambda: MLPFieldMethod().go,
    "no_grad inside": lambda: torch.no_grad()(lambda t, y: -y * (1 + t)),
    "expanded output": lambda: lambda t, y: torch.cos(t).double().expand(y.shape),
    "transposed output": lambda: lambda t, y: (torch.cos(t) * y.T.contiguous()).T,
    "strided output": lambda: lambda t, y: torch.cat([y, y], -1)[..., ::2] * (1 + t),
    "uses t.item()": lambda: lambda t, y: -y * (1 + t.item()),
    "scripted": lambda: torch.jit.script(scriptable),
}


class MLPFieldMethod:
    def go(self, t, y):
        return -y * (1 + t)


def scriptable(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y * (1 + t)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "adaptive_heun", "euler", "rk4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_fields_of_every_kind(method, kind, reverse):
    y0 = torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4)
    t = torch.linspace(0, 1, 4, dtype=F64)
    t = t.flip(0) if reverse else t
    mine, theirs = (
        library.odeint(FIELDS[kind](), y0, t, method=method, rtol=1e-3, atol=1e-3)
        for library in (pycnf, torchdiffeq)
    )
    assert mine.requires_grad == theirs.requires_grad
    assert_close(mine.detach(), theirs.detach(), *value_tolerance(method))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (4, 3), (3, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("tuple_state", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", "euler", "heun3", "rk4"])
def test_field_returns_another_shape(method, tuple_state, shape):
    """A kernel that trusts f's size would read past its end. Where torchdiffeq broadcasts, so do
    we; where it raises, we raise (with whatever text)."""

    def run(library):
        y0 = torch.tensor([1.0, 2.0, 3.0], dtype=F64)

        def field(t, y):
            value = torch.full(shape, 0.5, dtype=F64) * (1 + t)
            return (value, y[1]) if tuple_state else value

        state = (y0, torch.ones(2, dtype=F64)) if tuple_state else y0
        t = torch.linspace(0, 1, 4, dtype=F64)
        return outcome(lambda: library.odeint(field, state, t, method=method, rtol=1e-3, atol=1e-3))

    mine, theirs = run(pycnf), run(torchdiffeq)
    if raised(theirs):
        assert raised(mine)
    else:
        assert_close(mine, theirs, 1e-9, 1e-10)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "euler", "rk4"])
def test_keyword_arguments(method):
    """torchcde passes func, y0 and t by name."""
    y0, t = torch.ones(2, dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
    mine, theirs = (
        library.odeint(func=decay, y0=y0, t=t, method=method) for library in (pycnf, torchdiffeq)
    )
    assert_close(mine, theirs, 1e-9, 1e-11)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_inference_mode(method):
    y0, t = torch.ones(2, dtype=F64), torch.linspace(0, 1, 3, dtype=F64)
    field = MLPField(F64, features=2)
    with torch.inference_mode():
        mine, theirs = (
            library.odeint(field, y0, t, method=method, rtol=1e-3, atol=1e-3)
            for library in (pycnf, torchdiffeq)
        )
        assert mine.is_inference() == theirs.is_inference()
        assert_close(mine, theirs, 1e-9, 1e-10)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_solve_inside_a_field(method):
    """A field may solve an equation of its own: no global state in the solver."""

    def run(library):
        def inner(t, y):
            return -y

        def field(t, y):
            times = torch.stack([torch.zeros_like(t), 0.1 + t.abs()])
            return library.odeint(inner, y, times, method=method, rtol=1e-3, atol=1e-3)[-1]

        y0, t = torch.ones(2, dtype=F64), torch.linspace(0, 0.5, 2, dtype=F64)
        return library.odeint(field, y0, t, method=method, rtol=1e-2, atol=1e-2)

    assert_close(run(pycnf), run(torchdiffeq), 1e-9, 1e-10)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_field_calls_requires_grad_in_place(method):
    """flow_matching's likelihood: f calls y.requires_grad_() on the state view it was given."""

    def run(library):
        def field(t, state):
            x = state[0]
            with torch.enable_grad():
                x.requires_grad_()
                velocity = torch.sin(x) * (1 + t)
                divergence = torch.autograd.grad(velocity.sum(), x)[0].sum(-1)
            return velocity.detach(), divergence.detach()

        y0 = (torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2), torch.zeros(3, dtype=F64))
        t = torch.tensor([1.0, 0.0], dtype=F64)
        with torch.no_grad():
            return library.odeint(field, y0, t, method=method, rtol=1e-4, atol=1e-4)

    assert_close(run(pycnf), run(torchdiffeq), 1e-9, 1e-10)


def test_exceptions_of_the_field_pass_through():
    class Stop(Exception):
        pass

    def field(t, y):
        if t > 0.2:
            raise Stop("at 0.2")
        return -y

    for method in METHODS:
        with pytest.raises(Stop, match=r"at 0\.2"):
            pycnf.odeint(field, torch.ones(2), torch.linspace(0, 1, 11), method=method)
