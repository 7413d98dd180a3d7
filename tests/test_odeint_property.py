"""Random solves: whatever is asked, pycnf does what torchdiffeq does.

Compared are values, evaluation counts, the times and states that the field and the callbacks were
given, gradients, warnings, and errors.
"""

import math
import os

import pytest
import torch
import torchdiffeq
from hypothesis import event, given, settings
from hypothesis import strategies as st
from problems import ADAPTIVE, IMPLICIT, STAGES
from solve_cases import (
    BF16,
    C64,
    C128,
    F16,
    F32,
    F64,
    ODD,
    ON_GRID,
    adjoint_cases,
    always_zero,
    cases,
    deliberate,
    event_cases,
    named,
    run,
    wrong_cases,
)

import pycnf

LIMIT = 250  # evaluations an example


def odd_grid(case):
    """Whether a descending solve, or the adjoint's of an ascending one, has no grid_constructor and
    says so.
    """
    given = [case.options] if case.descending else []
    if case.interface == "odeint_adjoint":
        given.append(case.arguments.get("adjoint_options") or case.options)
    return any(options.get("grid_constructor", 0) is None for options in given)


def several(tolerance):
    if torch.is_tensor(tolerance):
        return tolerance.numel() != 1
    return isinstance(tolerance, list | tuple) and len(tolerance) != 1


def broadcast(case):
    return case.vector_field == "broadcasts" and (
        case.tuple_state or case.known_method in ADAPTIVE + IMPLICIT
    )


# Where pycnf means to do other than torchdiffeq: when, and why.
DEVIATIONS = {
    "no grid_constructor, descending": (
        odd_grid,
        "torchdiffeq calls None there; ascending it takes None for no grid_constructor",
    ),
    "empty state in SciPy": (
        lambda case: case.method == "scipy_solver" and case.empty,
        "torchdiffeq cannot reshape SciPy's answer to [-1, *shape]",
    ),
    "one time in SciPy": (
        lambda case: (
            case.method == "scipy_solver" and isinstance(case.t, tuple) and len(case.t) == 1
        ),
        "torchdiffeq returns [1, N] whatever the shape",
    ),
    "SciPy's failures": (
        lambda case: (
            case.method == "scipy_solver"
            and case.vector_field in ("blows_up", "turns_nan", "turns_infinite")
        ),
        "torchdiffeq returns the rows before; here that is an error",
    ),
    "empty state in a corrector": (
        lambda case: case.method in ("implicit_adams", "fixed_adams") and case.empty,
        "torchdiffeq takes the largest of no errors; here none is too large",
    ),
    "no corrector": (
        lambda case: (
            case.method in ("implicit_adams", "fixed_adams")
            and case.options.get("max_iters", 4) in (0, -1, None, "x", 2.5)
        ),
        "torchdiffeq finds out in the first corrector step; here it is refused at once",
    ),
    "complex state that does not move": (
        lambda case: (
            case.known_method in ADAPTIVE
            and case.dtype.is_complex
            and (case.vector_field == "zero" or case.options.get("norm") is always_zero)
        ),
        "torchdiffeq compares complex numbers when it chooses a first step",
    ),
    "times of complex states in the adjoint": (
        lambda case: (
            case.interface == "odeint_adjoint" and case.dtype.is_complex and "t" in case.wants
        ),
        "torchdiffeq leaves out a conjugate; here it is the gradient, see test_odeint_adjoint",
    ),
    "implicit method, field not finite": (
        lambda case: (
            case.method in IMPLICIT
            and case.vector_field in ("turns_nan", "turns_infinite", "blows_up")
        ),
        "torchdiffeq iterates on NaN to the end; here the step is given up at once",
    ),
    "implicit method, event, step_size a number": (
        lambda case: (
            case.method in IMPLICIT
            and case.event is not None
            and not torch.is_tensor(case.options.get("step_size"))
        ),
        "the stand-in for torchdiffeq's main branch wants a tensor",
    ),
    "implicit method, half precision": (
        lambda case: case.method in IMPLICIT and case.dtype in (F16, BF16),
        "a bound of 1e-8 on the residual is met by chance, and float16 has no dense solve",
    ),
    "event, step_size a tensor of another dtype": (
        lambda case: (
            case.event is not None
            and torch.is_tensor(case.options.get("step_size"))
            and case.options["step_size"].dtype != case.dtype.to_real()
        ),
        "torchdiffeq rounds times within a step to its dtype, and 0-dim states drift to it",
    ),
    "event at the start": (
        lambda case: (
            case.interface == "odeint_adjoint"
            and (case.event == "zero_at_start" or (case.event == "at_half" and case.t[0] == 0.25))
        ),
        "torchdiffeq's backward fails on an interval of no length",
    ),
    "implicit method, field in another dtype": (
        lambda case: (
            case.method in IMPLICIT
            and case.vector_field in ("returns_f64", "returns_f32", "returns_bf16")
        ),
        "the stand-in for torchdiffeq's main branch mixes no dtypes",
    ),
    "implicit method, field edits its input": (
        lambda case: case.method in IMPLICIT and case.vector_field == "edits_input",
        "the stand-in for torchdiffeq's main branch gives it views that must not be edited",
    ),
    "implicit method, steps beyond its iteration": (
        lambda case: (
            case.method in IMPLICIT
            and case.longest_step > (0.06 if case.vector_field == "steep" else 0.75)
        ),
        "h times the field's Jacobian passes 1, and rounding decides where the iteration ends",
    ),
    "more steps than an int32": (
        lambda case: case.options.get("max_num_steps") == 2**31,
        "torchdiffeq keeps the limit in an int32",
    ),
    "empty state in the adjoint": (
        lambda case: case.interface == "odeint_adjoint" and case.empty,
        "torchdiffeq's backward asks for a view of storage that is not there",
    ),
    "field edits an expanded state": (
        lambda case: case.vector_field == "edits_input" and case.layout == "expanded",
        "torchdiffeq hands on y0 itself, whose values share their memory; here it is copied",
    ),
    "discontinuity in low precision": (
        lambda case: (
            case.vector_field == "discontinuous"
            and case.dtype not in (F64, C128)
            and case.known_method in ADAPTIVE
        ),
        "steps are halved down to the resolution of time, and rounding decides when they are",
    ),
    "first_step that is clamped": (
        lambda case: (
            getattr(case.options.get("first_step"), "requires_grad", False)
            and bool({"min_step", "max_step"} & set(case.options))
        ),
        "torchdiffeq gives it a gradient of zero, here it has none",
    ),
    "several tolerances for a state that broadcasts": (
        lambda case: (
            not case.tuple_state
            and (1 in case.shapes[0] or case.shapes == ((),))
            and any(several(case.arguments.get(name)) for name in ("rtol", "atol"))
        ),
        "torchdiffeq takes the norm over the tolerances; here they must fit the state",
    ),
    "zero weights": (
        lambda case: (
            (case.vector_field == "turns_infinite" and case.known_method in ("heun3", *ADAPTIVE))
            or (case.vector_field == "blows_up" and case.method == "heun3")
            or (
                case.vector_field == "blows_up"
                and case.known_method in ADAPTIVE
                and bool(case.options.get("min_step") or case.wants)
            )
        ),
        "a slope of weight 0 is left out, where torchdiffeq adds 0 * inf",
    ),
    "slopes of another size": (
        lambda case: case.vector_field == "of_another_size" or broadcast(case),
        "refused at the first call; torchdiffeq stumbles where it happens to",
    ),
}


def compare(case):
    """Runs a case by both, unless it is one of DEVIATIONS."""
    for name, (holds, _) in DEVIATIONS.items():
        if holds(case):
            event(f"deviation: {name}")
            return
    event(f"{case.known_method}, {'gradient' if case.wants else 'no gradient'}")
    mine, theirs = run(pycnf, case, LIMIT), run(torchdiffeq, case, LIMIT)
    if case.interface == "odeint_adjoint":
        # torchdiffeq checks the arguments twice, and warns twice of callbacks.
        for each in (mine, theirs):
            each.warnings = [
                text
                for i, text in enumerate(each.warnings)
                if "does not support callbacks" not in text[1] or text not in each.warnings[:i]
            ]
    assert_same(case, mine, theirs)


def assert_same_error(mine, theirs, what):
    assert (mine is None) == (theirs is None), f"{what}: {mine!r} {theirs!r}"
    if theirs is not None and deliberate(theirs):
        assert type(mine) is type(theirs), f"{what}: {mine!r} {theirs!r}"
        # Some of torchdiffeq's assertions have no text.
        if str(theirs):
            assert named(str(mine)) == named(str(theirs)), f"{what}: {mine!r} {theirs!r}"


def close(a, b, bound, what):
    """Of lists of tensors: to a bound relative to each number and to the largest of each tensor,
    but to rounding for those in float32, like the gradients of such times.
    """
    assert len(a) == len(b), (what, len(a), len(b))
    for x, y in zip(a, b):
        assert (x is None) == (y is None), what
        if x is None:
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape), (what, x, y)
        scale = y.abs().double().nan_to_num(0, 0, 0).max().item() if y.numel() else 0.0
        each = max(bound, 2e-5) if y.dtype in (F32, C64) else bound
        torch.testing.assert_close(
            x,
            y,
            rtol=each,
            atol=each * max(scale, 1.0),
            equal_nan=True,
            msg=lambda text: f"{what}: {text}",
        )


def rounding_decides(case):
    """Whether the number of steps is a matter of rounding."""
    backward = case.arguments.get("adjoint_method") or case.known_method
    if case.known_method == "dopri8" and case.vector_field == "constant":
        return True  # its estimates are nothing else
    return case.dtype not in (F64, C128) and bool(
        {case.known_method, backward} & set(ADAPTIVE + IMPLICIT)
    )


def bounds(case, endless):
    """How close the field's arguments, the results and the gradients are."""
    backward = case.arguments.get("adjoint_method") or case.known_method
    methods = {case.known_method, backward}
    # Without an end LIMIT evaluations lead far away, and rounding grows with the solution.
    far = (100 if case.vector_field == "steep" else 10) if endless else 1
    if case.dtype in (F16, BF16):
        # A few roundings a step, in up to 20 steps; each scales with the last.
        eps = torch.finfo(case.dtype).eps
        return 16 * eps, 16 * eps, 64 * eps
    if case.dtype in (F32, C64):
        # Where steps are chosen, equal counts do not make equal steps: the tolerances' measure.
        small = far * (1e-3 if methods & set(ADAPTIVE) else 2e-5)
        return small, small, 20 * small
    if case.vector_field in ("returns_f32", "returns_bf16") and methods & set(ON_GRID):
        # Slopes that stay in their dtype are added in it, in another order.
        small = 2e-6 if case.vector_field == "returns_f32" else 2e-2
        return small, small, 10 * small
    if "dopri8" in methods:
        # The estimates of its first, tiny steps are rounding errors themselves.
        return 2e-3, 2e-6, 1e-4
    if methods & set(ADAPTIVE):
        # Sizes of steps amplify the rounding of estimates, and a discontinuity that of sizes.
        # Without error control steps grow until their stages are large and cancel.
        rough = case.vector_field == "discontinuous" or case.options.get("norm") is always_zero
        return far * 1e-6, 1e-7 if rough else 1e-9, 1e-6
    if methods & set(IMPLICIT):
        # Iterations end at a residual of 1e-8.
        return 1e-7, 1e-7, 1e-6
    return far * 1e-10, far * 1e-10, far * 1e-9


def near(times, of):
    """How many of some times come before the first that is 3 away from where a solve starts."""
    distances = [abs(float(t) - float(of[0])) for t in times]
    return next((i for i, distance in enumerate(distances) if not distance < 3), len(times))


def assert_same(case, mine, theirs):
    if theirs.error is not None and not deliberate(theirs.error):
        assert mine.error is not None, f"theirs {theirs.error!r}"
        return
    uncertain = rounding_decides(case)
    if uncertain:
        stages = {**STAGES, **dict.fromkeys(IMPLICIT, 3)}.get(case.known_method, 13)
        allowed = max(2 * stages, math.ceil(0.03 * theirs.nfe))
        assert abs(mine.nfe - theirs.nfe) <= allowed, f"effort {mine.nfe} {theirs.nfe}"
        if mine.nfe != theirs.nfe:
            return
    assert_same_error(mine.error, theirs.error, "forward")
    assert mine.warnings == theirs.warnings, f"warnings {mine.warnings} {theirs.warnings}"
    assert mine.is_tuple == theirs.is_tuple
    assert mine.requires_grad == theirs.requires_grad, (
        f"requires_grad {mine.requires_grad} {theirs.requires_grad}"
    )
    assert mine.forward == theirs.forward, f"nfe {mine.forward} {theirs.forward}"
    assert mine.nfe == theirs.nfe, f"nfe total {mine.nfe} {theirs.nfe}"
    endless = theirs.nfe >= LIMIT
    seen, values, slopes = bounds(case, endless)
    compared, noted = theirs.nfe, len(theirs.notes)
    if uncertain:
        compared, noted = 2, 0  # before any estimate of an error
    elif endless and case.known_method in ADAPTIVE:
        # Farther on, stability limits the steps, or nothing does, and both amplify rounding.
        compared = min(near(theirs.times, theirs.times), LIMIT // 3)
        noted = min(near([note[1] for note in theirs.notes], theirs.times), LIMIT // 30)
    close(mine.times[:compared], theirs.times[:compared], seen, "times")
    close(mine.states[:compared], theirs.states[:compared], seen, "states")
    close(mine.results, theirs.results, values, "results")
    if not (uncertain or endless):
        assert len(mine.notes) == len(theirs.notes), "callbacks"
    for a, b in zip(mine.notes[:noted], theirs.notes[:noted]):
        assert a[0] == b[0], "callbacks"
        close(a[1:], b[1:], seen, f"arguments of {a[0]}")
    assert_same_error(mine.backward_error, theirs.backward_error, "backward")
    if theirs.grads is not None:
        close(mine.grads, theirs.grads, slopes, "gradients")


# ---- the tests: every method has examples of its own, drawn anew for each -----------------------

METHODS = (None, *ADAPTIVE, *ON_GRID, "scipy_solver")
ADJOINTS = tuple(method for method in METHODS if method != "scipy_solver")
WANTS = st.sampled_from([("y0",), ("parameters",), ("t",), ("y0", "t", "parameters")])
ODD_NAMES = [each.__name__ for each in ODD]

# Outside of CI, for longer searches: PYCNF_EXAMPLES=100 pytest ... --hypothesis-seed=7
SCALE = int(os.environ.get("PYCNF_EXAMPLES", "1"))
settings.register_profile("solves", deadline=None, database=None, derandomize=SCALE == 1)


def examples(count):
    return settings(settings.get_profile("solves"), max_examples=count * SCALE)


@pytest.mark.parametrize("method", METHODS)
@examples(8)
@given(data=st.data())
def test_solve(method, data):
    compare(data.draw(cases(method, dtypes=(F64, F64, C128))))


@pytest.mark.parametrize("method", METHODS)
@examples(8)
@given(data=st.data())
def test_gradient(method, data):
    """Of odeint, by backpropagation."""
    wants = data.draw(WANTS)
    compare(data.draw(cases(method, wants=wants, dtypes=(F64, F64, C128))))


@pytest.mark.parametrize("method", ADJOINTS)
@examples(7)
@given(data=st.data())
def test_adjoint(method, data):
    compare(data.draw(adjoint_cases(method, dtypes=(F64, F64, C128, F32))))


@pytest.mark.parametrize("method", METHODS)
@examples(7)
@given(data=st.data())
def test_event(method, data):
    compare(data.draw(event_cases(method, dtypes=(F64, F64, C128, F32))))


@pytest.mark.parametrize("method", METHODS)
@examples(7)
@given(data=st.data())
def test_odd_fields(method, data):
    """Fields that fail, change their dtype, edit or return their input, or have no graph."""
    wants = data.draw(st.one_of(st.just(()), WANTS))
    compare(data.draw(cases(method, wants=wants, field_names=ODD_NAMES, dtypes=(F64, F64, C128))))


@pytest.mark.parametrize("method", METHODS)
@examples(7)
@given(data=st.data())
def test_lower_precision(method, data):
    """float32 by its own measure; half precision by its rounding."""
    wants = data.draw(st.one_of(st.just(()), WANTS))
    compare(data.draw(cases(method, wants=wants, dtypes=(F32, F32, C64, BF16, F16))))


@pytest.mark.parametrize("method", METHODS)
@examples(10)
@given(data=st.data())
def test_wrong_arguments(method, data):
    """The same error, where torchdiffeq means it; an error, where it stumbles."""
    compare(data.draw(wrong_cases(method)))
