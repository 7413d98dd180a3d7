"""Implicit Runge-Kutta methods against a dense Broyden solver in torchdiffeq's frame (`problems`),
against the methods' order conditions, and against exact solutions.
"""

import math
import warnings

import pytest
import torch
import torchdiffeq
from problems import (
    IMPLICIT,
    PROBLEMS,
    Recorder,
    as_tuple,
    assert_close,
    clone_state,
    outcome,
    record,
)

import pycnf
from pycnf import reference
from pycnf._ops import broyden_step
from pycnf.odeint.implicit_grid import IMPLICIT_TABLEAUX

F32, F64 = torch.float32, torch.float64
NOT_CONVERGED = "Functional iteration did not converge. Solution may be incorrect."


# ---- the methods ---------------------------------------------------------------------------------

# (order of quadrature, order of every stage), Hairer & Wanner II, IV.5: B(p) and C(q).
SIMPLIFYING = {
    "implicit_euler": (1, 1),
    "implicit_midpoint": (2, 1),
    "trapezoid": (2, 2),
    "radauIIA3": (3, 2),
    "radauIIA5": (5, 3),
    "gl6": (6, 3),
    "sdirk2": (2, 1),
    "trbdf2": (2, 2),
}


@pytest.mark.parametrize("method", SIMPLIFYING)
def test_order_conditions(method):
    p, q = SIMPLIFYING[method]
    tableau = IMPLICIT_TABLEAUX[method]
    b, c = (torch.tensor(x, dtype=F64) for x in (tableau.b, tableau.c))
    a = torch.tensor(tableau.a, dtype=F64)
    for power in range(1, p + 1):
        assert abs(b @ c ** (power - 1) - 1 / power) < 1e-14
    assert p == 6 or abs(b @ c**p - 1 / (p + 1)) > 1e-3
    for power in range(1, q + 1):
        torch.testing.assert_close(a @ c ** (power - 1), c**power / power, rtol=0, atol=1e-14)


def test_gl4_is_gauss_but_for_its_second_node():
    tableau = IMPLICIT_TABLEAUX["gl4"]
    b, a = torch.tensor(tableau.b, dtype=F64), torch.tensor(tableau.a, dtype=F64)
    nodes = a.sum(1)
    for power in range(1, 5):
        assert abs(b @ nodes ** (power - 1) - 1 / power) < 1e-14
    assert tableau.c == [nodes[0].item()] * 2


ORDER = {**{name: IMPLICIT_TABLEAUX[name].order for name in SIMPLIFYING}, "gl4": 4}


def pendulum(t, y):
    return torch.stack([y[1], -torch.sin(y[0])])


@pytest.mark.parametrize("method", IMPLICIT)
def test_convergence(method):
    """Autonomous, as gl4's times are wrong."""
    y0, t = torch.tensor([2.0, 0.3], dtype=F64), torch.tensor([0.0, 3.0], dtype=F64)
    exact = pycnf.odeint(pendulum, y0, t, rtol=1e-13, atol=1e-13, method="dopri8")[-1]
    steps = (4, 8) if ORDER[method] > 3 else (32, 64)
    errors = [
        (pycnf.odeint(pendulum, y0, t, method=method, options={"step_size": 3 / n})[-1] - exact)
        .norm()
        .item()
        for n in steps
    ]
    assert errors[1] > 2e-7, "the bound on the residual hides the error"
    assert abs(math.log2(errors[0] / errors[1]) - ORDER[method]) < 0.35


def test_gl4_loses_its_order_where_the_field_depends_on_time():
    """As torchdiffeq's does; gl6 has the right times."""
    t = torch.tensor([0.0, 1.0], dtype=F64)
    errors = {
        method: abs(
            pycnf.odeint(
                lambda t, y: t**3 + 0 * y,
                torch.zeros(1, dtype=F64),
                t,
                method=method,
                options={"step_size": 0.125},
            )[-1].item()
            - 0.25
        )
        for method in ("gl4", "gl6")
    }
    assert errors["gl4"] > 1e-2
    assert errors["gl6"] < 1e-12


@pytest.mark.parametrize("method", ["implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2"])
def test_stiff_decay_dies_out(method):
    """h λ = -50: far outside what an explicit method bears, and L-stable methods forget it."""
    y = pycnf.odeint(
        lambda t, y: -1000 * (y - torch.cos(t)),
        torch.tensor([2.0], dtype=F64),
        torch.tensor([0.0, 1.0], dtype=F64),
        method=method,
        options={"step_size": 0.05},
    )
    assert abs(y[-1].item() - math.cos(1)) < 2e-3


# ---- step for step -------------------------------------------------------------------------------


def both(problem, method, dtype, flip=False, t_dtype=F64, **options):
    field, y0, t = PROBLEMS[problem](dtype)
    t = t.flip(0) if flip else t
    options = {"step_size": abs(float(t[-1] - t[0])) / 30, **options}
    return [
        record(library, field, y0, t.to(t_dtype), method=method, options=options)
        for library in (pycnf, torchdiffeq)
    ]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", IMPLICIT)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_same_evaluations_and_values(problem, method, flip):
    mine, theirs = both(problem, method, F64, flip)
    assert mine.nfe == theirs.nfe
    assert mine.warnings == theirs.warnings
    assert_close(mine.times, theirs.times, 1e-13, 1e-13)
    assert_close(mine.ys, theirs.ys, 1e-8, 1e-8)


@pytest.mark.parametrize("method", IMPLICIT)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_same_effort_in_float32(problem, method):
    """The last iteration of a step is a matter of rounding: within two in the solve, or 3 %. Where
    rounding of the field exceeds the bound on the residual, so is whether a step uses up its 100
    iterations, on either side, and a dense Jacobian made of rounding errors may even blow up.
    """
    mine, theirs = both(problem, method, F32, t_dtype=F32)
    exact, _ = both(problem, method, F64)
    for a, b in zip(as_tuple(mine.ys), as_tuple(exact.ys), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
    if NOT_CONVERGED in mine.warnings + theirs.warnings:
        return
    slack = max(2 * len(IMPLICIT_TABLEAUX[method].b), math.ceil(0.03 * theirs.nfe))
    assert abs(mine.nfe - theirs.nfe) <= slack, (mine.nfe, theirs.nfe)
    assert_close(mine.ys, theirs.ys, 2e-5, 2e-5)


@pytest.mark.parametrize("method", IMPLICIT)
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_options_of_the_grid(method, interp):
    mine, theirs = both("pulse", method, F64, interp=interp, perturb=True, step_size=0.17)
    assert mine.nfe == theirs.nfe
    assert_close(mine.times, theirs.times, 1e-15, 1e-15)
    assert_close(mine.ys, theirs.ys, 1e-8, 1e-8)


@pytest.mark.parametrize("method", ["implicit_euler", "gl4", "trbdf2"])
@pytest.mark.parametrize("max_iters", [0, 1, 2])
def test_iterations_that_are_not_enough(method, max_iters):
    mine, theirs = both("mlp", method, F64, max_iters=max_iters)
    assert mine.nfe == theirs.nfe
    assert mine.warnings == theirs.warnings
    assert NOT_CONVERGED in mine.warnings
    assert_close(mine.ys, theirs.ys, 1e-8, 1e-8)


@pytest.mark.parametrize("method", IMPLICIT)
def test_number_and_complex_states(method):
    """torchdiffeq's main branch leaves out a conjugate in the update of its Jacobian; the solution
    that both look for is the same.
    """
    t = torch.tensor([0.0, 1.0], dtype=F64)
    options = {"step_size": 0.05}
    for y0, rate in ((torch.tensor(1.0, dtype=F64), -1.3), (torch.ones(2) + 0j, -1.3 + 2j)):
        mine, theirs = (
            library.odeint(lambda t, y, rate=rate: rate * y, y0.to(torch.complex128)
                           if y0.is_complex() else y0, t, method=method, options=options)
            for library in (pycnf, torchdiffeq)
        )  # fmt: skip
        assert_close(mine, theirs, 1e-7, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    y = pycnf.odeint(
        lambda t, y: -y,
        torch.ones(3, dtype=dtype),
        torch.tensor([0.0, 0.5]),
        method="implicit_euler",
        options={"step_size": 0.25, "max_iters": 5},
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y[-1].float(), torch.full((3,), 0.64), rtol=2e-2, atol=0)


@pytest.mark.parametrize("method", ["implicit_midpoint", "radauIIA5"])
def test_a_field_without_values_is_given_up(method):
    recorder = Recorder(lambda t, y: y * math.nan)
    with pytest.warns(UserWarning, match="did not converge"):
        y = pycnf.odeint(recorder, torch.ones(2), torch.tensor([0.0, 1.0]), method=method)
    assert y[-1].isnan().all()
    assert recorder.nfe <= 1 + len(IMPLICIT_TABLEAUX[method].b)


def test_a_singular_jacobian_is_given_up():
    """dy/dt = y with h = 1: 1 - h is the derivative of the residual."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = pycnf.odeint(
            lambda t, y: y + 1,
            torch.ones(1, dtype=F64),
            torch.tensor([0.0, 1.0], dtype=F64),
            method="implicit_euler",
        )
    assert [str(w.message) for w in caught] == [NOT_CONVERGED]
    assert y.isfinite().all()


def test_unknown_options_and_wrong_shapes():
    t = torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match=r"RadauIIA5: Unexpected arguments \{'max_order': 3\}"):
        pycnf.odeint(
            lambda t, y: -y, torch.ones(2), t, method="radauIIA5", options={"max_order": 3}
        )
    kind, text = outcome(
        lambda: pycnf.odeint(lambda t, y: y[:1], torch.ones(2), t, method="implicit_euler")
    )
    assert kind is ValueError
    assert "func must return the shape of its state" in text


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", IMPLICIT)
def test_gradients_of_state_parameters_and_times(method, flip):
    found = []
    for library in (pycnf, torchdiffeq):
        field, y0, t = PROBLEMS["mlp"](F64)
        y0 = clone_state(y0).requires_grad_()
        t = (t.double().flip(0) if flip else t.double()).requires_grad_()
        y = library.odeint(field, y0, t, method=method)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape)).sum()
        found.append(torch.autograd.grad(loss, (y0, t, *field.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", IMPLICIT)
def test_discrete_gradient_is_that_of_the_solver(method):
    found = []
    for solve in (pycnf.odeint, pycnf.odeint_adjoint):
        field, y0, t = PROBLEMS["mlp"](F64)
        y0 = clone_state(y0).requires_grad_()
        extra = {} if solve is pycnf.odeint else {"gradient": "discrete"}
        y = solve(field, y0, t.double(), method=method, options={"step_size": 0.1}, **extra)
        found.append(torch.autograd.grad(y.square().sum(), (y0, *field.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["implicit_midpoint", "gl4", "trbdf2"])
def test_second_derivatives(method):
    y0 = torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)

    def solve(y0, rate):
        return pycnf.odeint(lambda t, y: torch.sin(rate * y + t), y0, t, method=method)

    assert torch.autograd.gradcheck(solve, (y0, rate), atol=1e-5)
    assert torch.autograd.gradgradcheck(solve, (y0, rate), atol=1e-5)


@pytest.mark.parametrize("method", ["implicit_euler", "gl6"])
def test_continuous_adjoint(method):
    found = []
    for library in (pycnf, torchdiffeq):
        field, y0, t = PROBLEMS["mlp"](F64)
        y0 = clone_state(y0).requires_grad_()
        y = library.odeint_adjoint(
            field, y0, t.double(), method=method, options={"step_size": 0.05}
        )
        found.append(torch.autograd.grad(y.square().sum(), (y0, *field.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


# ---- Broyden's steps -----------------------------------------------------------------------------


def dense_step(residual, steps):
    """With the Jacobian as a matrix; every step must have been this function's."""
    jacobian = torch.eye(len(residual), dtype=residual.dtype)
    for step, behind in steps:
        jacobian = jacobian + torch.outer(behind, step.conj()) / torch.vdot(step, step)
    return torch.linalg.solve(jacobian, -residual)


@pytest.mark.parametrize("size", [1, 7, 8, 33])
@pytest.mark.parametrize("dtype", [F32, F64, torch.complex128])
def test_steps_are_those_of_the_dense_jacobian(size, dtype):
    generator = torch.Generator().manual_seed(size)
    residual = torch.randn(size, dtype=dtype, generator=generator)
    steps, pairs = [], []
    for _ in range(6):
        expected = dense_step(residual.to(torch.promote_types(dtype, F64)), pairs)
        served = [reference.broyden_step(residual, steps), broyden_step(residual, steps)]
        tolerance = 2e-4 if dtype == F32 else 1e-11
        for step in served:
            assert step.dtype == dtype
            scale = expected.abs().max()
            assert (step - expected).abs().max() < tolerance * scale
        steps.append(served[1])
        following = residual * 0.3 + 0.1 * torch.randn(size, dtype=dtype, generator=generator)
        pairs.append((steps[-1].to(expected.dtype), following.to(expected.dtype)))
        residual = following


def test_steps_carry_a_graph_where_one_is_wanted():
    first = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    residual = torch.tensor([0.1, 0.05], dtype=F64, requires_grad=True)
    second = torch.tensor([0.2, 0.1], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r, *steps: broyden_step(r, steps), (residual, first, second)
    )
    with torch.no_grad():
        plain = broyden_step(residual, [first, second])
    torch.testing.assert_close(plain, broyden_step(residual, [first, second]).detach())


def test_steps_of_another_shape_are_refused():
    with pytest.raises(RuntimeError, match="steps must have"):
        broyden_step(torch.ones(3), [torch.ones(2)])
