"""One step: compiled rows and the differentiable step give the same numbers; times of a step."""

import math
from types import SimpleNamespace

import pytest
import torch

from pycnf import reference
from pycnf.odeint import rounding
from pycnf.odeint.step_times import StepTimes
from pycnf.odeint.stepper import Rows, combine, differentiable_quartic, differentiable_step
from pycnf.odeint.tableau import TABLEAUX

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
ADAPTIVE = [name for name, tableau in TABLEAUX.items() if tableau.adaptive]
FIXED = [name for name, tableau in TABLEAUX.items() if not tableau.adaptive]
TOLERANCE = torch.tensor(1e-3, dtype=F64)
POINTS = [0.0, 0.1, 0.5, 0.83, 1.0]
H = 0.23


def normal(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, dtype=F64, generator=generator).to(dtype)


def field(tableau, y, stage):
    """A vector field whose time dependence is the stage's node."""
    return torch.sin(y.flip(-1)) * (1.5 + tableau.c[stage]) - 0.3 * y


def real(dtype):
    return dtype.to_real() if dtype.is_complex else dtype


def rows_for(tableau, y0):
    return Rows(tableau, y0, [0, y0.numel()], TOLERANCE, TOLERANCE)


def compiled_step(rows, y0, h):
    """Stages, solution and norm with `rows`, whose first row is stored; others come as fresh."""
    tableau = rows.tableau
    fresh, states = [], []
    y = y0
    for stage in range(1, tableau.stages):
        y = rows.stage(y0, stage, fresh, h)
        states.append(y)
        fresh = [field(tableau, y, stage)]
    y1, result = rows.finish(y0, y, fresh, h)
    return states, y1, result


def differentiable_states(tableau, y0, h):
    """The same with the graph's functions: states of the stages, derivatives, solution."""
    states, k = [], [field(tableau, y0, 0)]

    def evaluate(stage, y):
        states.append(y)
        return field(tableau, y, stage)

    y1 = differentiable_step(tableau, evaluate, y0, k, h)
    return states, k, y1


# ---- the two steps -------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 40)])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_both_steps_give_the_same_numbers(name, shape, dtype):
    """Bit by bit, so that asking for gradients does not change which steps are taken."""
    tableau = TABLEAUX[name]
    y0 = normal(*shape, dtype=dtype)
    rows = rows_for(tableau, y0)
    rows.store(0, [field(tableau, y0, 0)])
    states, y1, result = compiled_step(rows, y0, H)
    expected, k, expected_y1 = differentiable_states(tableau, y0, H)
    assert len(states) == tableau.stages - 1
    for a, b in zip(states, expected, strict=True):
        assert torch.equal(a, b)
    for stage in range(tableau.stages):
        assert torch.equal(rows.row(stage), k[stage].reshape(-1))
    assert torch.equal(y1, expected_y1)
    assert y1.shape == y0.shape
    assert (y1 is states[-1]) == tableau.solution_is_last_stage
    assert result[1] == 1.0
    out = torch.empty(len(POINTS), *y0.shape, dtype=dtype)
    rows.interpolate(y0, y1, H, POINTS, out)
    quartic = differentiable_quartic(tableau, y0, y1, k, H)
    for x, value in zip(POINTS, out):
        assert torch.equal(value, reference.evaluate_quartic(quartic, torch.tensor(x, dtype=dtype)))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_step_is_the_tableau_s(name):
    """By the definition in the class, in a loop of its own."""
    tableau = TABLEAUX[name]
    y0 = normal(5)
    k = [field(tableau, y0, 0)]
    for stage in range(1, tableau.stages):
        y = y0 + H * sum(a * row for a, row in zip(tableau.a[stage], k))
        k.append(field(tableau, y, stage))
    expected = y0 + H * sum(b * row for b, row in zip(tableau.b, k))
    error = H * sum(e * row for e, row in zip(tableau.e, k))
    size = torch.max(y0.abs(), expected.abs())
    ratio = error / (TOLERANCE + TOLERANCE * size)
    middle = y0 + H * sum(m * row for m, row in zip(tableau.m, k))

    rows = rows_for(tableau, y0)
    rows.store(0, [k[0]])
    _, y1, result = compiled_step(rows, y0, H)
    torch.testing.assert_close(y1, expected, rtol=1e-13, atol=1e-14)
    assert result[0].item() == pytest.approx(ratio.square().mean().sqrt().item(), rel=1e-8)
    out = torch.empty(3, 5, dtype=F64)
    rows.interpolate(y0, y1, H, [0.0, 0.5, 1.0], out)
    torch.testing.assert_close(out, torch.stack([y0, middle, y1]), rtol=1e-12, atol=1e-13)


@DTYPES
@pytest.mark.parametrize("name", ADAPTIVE)
def test_advance(name, dtype):
    """The last derivative of a step is the first of the next, for as many steps as one likes."""
    tableau = TABLEAUX[name]
    y = normal(300, dtype=dtype)
    rows = rows_for(tableau, y)
    rows.store(0, [field(tableau, y, 0)])
    first = rows.row(0).clone()
    for step in range(5):
        anew = rows_for(tableau, y)
        anew.store(0, [first])
        states, y1, result = compiled_step(rows, y, H)
        expected, expected_y1, expected_result = compiled_step(anew, y, H)
        for a, b in zip(states, expected):
            assert torch.equal(a, b)
        assert torch.equal(y1, expected_y1)
        assert torch.equal(result, expected_result)
        out, expected_out = (torch.empty(2, 300, dtype=dtype) for _ in range(2))
        rows.interpolate(y, y1, H, [0.3, 0.7], out)
        anew.interpolate(y, y1, H, [0.3, 0.7], expected_out)
        assert torch.equal(out, expected_out)
        first = rows.row(tableau.stages - 1).clone()
        storage = rows.k.data_ptr()
        rows.advance()
        assert rows.flip == (step % 2 == 0)
        assert torch.equal(rows.row(0), first)
        assert rows.k.data_ptr() == storage
        y = y1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_error_norm_is_finish_s(name, flip):
    tableau = TABLEAUX[name]
    y0, last = normal(40), normal(40, seed=1)
    rows = rows_for(tableau, y0)
    rows.flip = flip
    for stage in range(tableau.stages):
        rows.store(stage, [normal(40, seed=stage + 2)])
    ratio, again = torch.empty_like(y0), torch.empty_like(y0)
    y1, result = rows.finish(y0, last, [], H, ratio)
    assert torch.equal(rows.error_norm(y0, y1, H, again), result)
    assert torch.equal(ratio, again)
    assert result[0].item() == pytest.approx(ratio.square().mean().sqrt().item(), rel=1e-13)
    fresh = rows_for(tableau, y0)
    fresh.k.copy_(rows.k)
    fresh.flip = flip
    fresh.row(tableau.stages - 1).fill_(math.nan)
    newest = rows.row(tableau.stages - 1).clone()
    again, with_fresh = fresh.finish(y0, last, [newest], H)
    assert torch.equal(again, y1)
    assert torch.equal(with_fresh, result)


def test_segments_and_tolerances_reach_the_norm():
    y0 = torch.zeros(6, dtype=F64)
    tableau = TABLEAUX["adaptive_heun"]
    each = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], dtype=F64)
    zero = torch.zeros((), dtype=F64)
    rows = Rows(tableau, y0, [0, 3, 3, 6], zero, each)
    rows.store(0, [torch.tensor([2.0, 2.0, 2.0, 6.0, 6.0, 6.0], dtype=F64)])
    rows.store(1, [torch.zeros(6, dtype=F64)])
    _, result = rows.finish(y0, y0, [], 1.0)
    assert result.tolist() == [1.5, 1.0]
    f = torch.arange(6.0, dtype=F64)
    assert rows.initial_norms(y0, f) == pytest.approx([0.0, math.sqrt((9 + 16 + 25) / 12)])
    assert rows.initial_norms(y0, 0 * f, f) == pytest.approx([math.sqrt(50 / 12)] * 2)


@pytest.mark.parametrize("flip", [False, True])
def test_store_takes_parts(flip):
    rows = Rows(TABLEAUX["bosh3"], torch.zeros(9, dtype=F64))
    rows.flip = flip
    rows.k.fill_(-1.0)
    values = normal(9)
    parts = [values[:4].view(2, 2).t().contiguous().t(), values[4].view(()), values[5:].float()]
    for stage in range(4):
        rows.store(stage, [part.requires_grad_() for part in map(torch.clone, parts)])
        expected = torch.cat([values[:5], values[5:].float().double()])
        assert torch.equal(rows.row(stage), expected)
        assert not rows.k.requires_grad
        rows.row(stage).fill_(-1.0)
    assert (rows.k == -1.0).all()
    places = [rows.row(stage).data_ptr() for stage in range(4)]
    order = [3, 1, 2, 0] if flip else [0, 1, 2, 3]
    assert places == [rows.k[place].data_ptr() for place in order]


@DTYPES
@pytest.mark.parametrize("name", FIXED)
def test_fixed_methods(name, dtype):
    tableau = TABLEAUX[name]
    y0 = normal(4, 5, dtype=dtype)
    rows = Rows(tableau, y0)
    fresh = [field(tableau, y0, 0)]
    for stage in range(1, tableau.stages):
        y = rows.stage(y0, stage, fresh, H)
        fresh = [field(tableau, y, stage)]
    y1 = rows.solve(y0, fresh, H)
    _, k, expected = differentiable_states(tableau, y0, H)
    assert len(k) == tableau.stages
    assert torch.equal(y1, expected)


def test_a_step_continues_from_the_stages_it_is_given():
    tableau = TABLEAUX["dopri5"]
    y0 = normal(6)
    _, k, y1 = differentiable_states(tableau, y0, H)
    for done in range(1, 7):
        seen = []
        some = k[:done]

        def evaluate(stage, y, seen=seen):
            seen.append(stage)
            return field(tableau, y, stage)

        assert torch.equal(differentiable_step(tableau, evaluate, y0, some, H), y1)
        assert seen == list(range(done, 7))
        assert len(some) == 7


@pytest.mark.parametrize("dtype", [F16, BF16, C64, C128])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_dtypes_without_a_kernel(name, dtype):
    """Served by the reference; its two steps agree as well, to rounding."""
    tableau = TABLEAUX[name]
    imaginary = 1j if dtype.is_complex else 0.0
    wide = C128 if dtype.is_complex else F64
    y0 = (normal(6) + imaginary * normal(6, seed=1)).to(dtype)
    coarse = torch.tensor(0.1, dtype=F64)
    rows = Rows(tableau, y0, [0, 6], coarse, coarse)
    assert rows.ops is reference
    rows.store(0, [field(tableau, y0, 0)])
    _, y1, result = compiled_step(rows, y0, H)
    _, k, expected = differentiable_states(tableau, y0, H)
    eps = torch.finfo(real(dtype)).eps
    torch.testing.assert_close(y1, expected, rtol=20 * eps, atol=20 * eps)
    _, _, exact = differentiable_states(tableau, y0.to(wide), H)
    torch.testing.assert_close(y1.to(wide), exact, rtol=100 * eps, atol=100 * eps)
    assert result.dtype == F64
    assert result[1] == 1.0
    out = torch.empty(3, 6, dtype=dtype)
    rows.interpolate(y0, y1, H, [0.0, 0.4, 1.0], out)
    quartic = differentiable_quartic(tableau, y0, y1, k, H)
    points = torch.tensor([0.0, 0.4, 1.0], dtype=real(dtype))
    at = torch.stack([reference.evaluate_quartic(quartic, x) for x in points])
    torch.testing.assert_close(out, at, rtol=100 * eps, atol=100 * eps)


# ---- gradients -----------------------------------------------------------------------------------


def weighted_field(stage, y, w):
    return torch.tanh(y @ w) * (1 + 0.1 * stage)


def inputs_of_a_step():
    y0, w = normal(2, 3).requires_grad_(), normal(3, 3, seed=1).requires_grad_()
    return y0, w, torch.tensor(H, dtype=F64, requires_grad=True)


def step_function(tableau):
    """(y0, w, h) -> solution, with the number h following its tensor."""

    def step(y0, w, h):
        k = [weighted_field(0, y0, w)]
        return differentiable_step(
            tableau, lambda stage, y: weighted_field(stage, y, w), y0, k, h.item(), h
        )

    return step


@pytest.mark.parametrize("name", TABLEAUX)
def test_gradients_of_a_step(name):
    """To the state, the field's parameters and the step size."""
    assert torch.autograd.gradcheck(step_function(TABLEAUX[name]), inputs_of_a_step())


@pytest.mark.parametrize("name", ["dopri5", "tsit5", "rk4"])
def test_second_gradients_of_a_step(name):
    assert torch.autograd.gradgradcheck(step_function(TABLEAUX[name]), inputs_of_a_step())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_h_without_a_graph_is_a_constant(name):
    tableau = TABLEAUX[name]
    y0, w, _ = inputs_of_a_step()

    def step(y0, w):
        k = [weighted_field(0, y0, w)]
        return differentiable_step(tableau, lambda stage, y: weighted_field(stage, y, w), y0, k, H)

    assert torch.autograd.gradcheck(step, (y0, w))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_gradients_of_the_quartic(name):
    """To both states, every derivative, the step size and the point."""
    tableau = TABLEAUX[name]
    y0, y1 = normal(2).requires_grad_(), normal(2, seed=1).requires_grad_()
    k = [normal(2, seed=stage + 2).requires_grad_() for stage in range(tableau.stages)]
    h = torch.tensor(H, dtype=F64, requires_grad=True)
    x = torch.tensor(0.37, dtype=F64, requires_grad=True)

    def interpolate(x, h, y0, y1, *k):
        quartic = differentiable_quartic(tableau, y0, y1, k, h.item(), h)
        return reference.evaluate_quartic(quartic, x)

    assert torch.autograd.gradcheck(interpolate, (x, h, y0, y1, *k))
    ends = [interpolate(torch.tensor(end, dtype=F64), h, y0, y1, *k) for end in (0.0, 1.0)]
    to_k = torch.autograd.grad(ends[0].sum(), k, allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in to_k)
    torch.testing.assert_close(torch.autograd.grad(ends[1].sum(), y1)[0], torch.ones_like(y1))


def test_combine_is_differentiable_in_every_dtype():
    """Also where the reference serves."""
    y, k = normal(3).to(C128).requires_grad_(), (1j * normal(3, seed=1)).requires_grad_()
    h = torch.tensor(H, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y, k, h: combine(y, [k, y], [0.5, 2.0], h.item(), h), (y, k, h)
    )


# ---- times of a step -----------------------------------------------------------------------------

STATES = pytest.mark.parametrize("dtype", [F16, BF16, F32, F64, C64, C128], ids=str)


def problem(dtype=F64, sign=1):
    return SimpleNamespace(sign=sign, y0=torch.zeros(2, dtype=dtype))


@STATES
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_stage_times(name, sign, dtype):
    """As 0-dim tensors of the state's dtype would be: t0 + c dt, or just before t1 for c = 1."""
    nodes = TABLEAUX[name].c
    for start, size in [(0.3, 0.1), (-2.7, 1e-3), (999.9, 0.07), (0.0, 1 / 3)]:
        end = start + size
        times = StepTimes(problem(dtype, sign), nodes, start, end, size)
        t0, dt, t1 = (torch.tensor(x, dtype=real(dtype)) for x in (start, size, end))
        stages = times.stages()
        assert len(stages) == len(nodes) - 1
        for t, c in zip(stages, nodes[1:]):
            node = torch.tensor(c, dtype=real(dtype))
            expected = torch.nextafter(t1, t1 - 1) if c == 1 else t0 + node * dt
            assert t.dtype == real(dtype)
            assert t.shape == ()
            assert not t.requires_grad
            assert torch.equal(t, sign * expected), (c, start, size)
        assert times.h == sign * dt.item()
        assert times.h_graph is None
        assert times.end_graph is None
        assert torch.equal(times.at(end), sign * t1)


def test_the_end_is_approached_from_within():
    """Whichever way time runs; the stage before the end and the end itself differ in one bit."""
    nodes = TABLEAUX["dopri5"].c
    for sign in (1, -1):
        times = StepTimes(problem(F64, sign), nodes, 1.0, 2.0, 1.0)
        last = times.stages()[-1].item()
        assert last == sign * math.nextafter(2.0, 1.0)
        assert times.at(2.0).item() == sign * 2.0


def step_with_graph(sign=1, start=True, size=True, fixed_end=False, dtype=F64):
    """A step from 0.25 to 1 with the tensors that carry its graph."""
    start = torch.tensor(0.25, dtype=F64, requires_grad=True) if start else None
    size = torch.tensor(0.75, dtype=F64, requires_grad=True) if size else None
    nodes = TABLEAUX["dopri5"].c
    times = StepTimes(problem(dtype, sign), nodes, 0.25, 1.0, 0.75, start, size, fixed_end)
    return times, start, size


def gradients(value, *to):
    return [
        0.0 if g is None else g.item()
        for g in torch.autograd.grad(value, to, allow_unused=True, retain_graph=True)
    ]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("sign", [1, -1])
def test_graph_of_the_stage_times(sign, dtype):
    """d t / d start = sign, d t / d size = sign c; values are those without a graph."""
    times, start, size = step_with_graph(sign, dtype=dtype)
    plain = StepTimes(problem(dtype, sign), times.nodes, 0.25, 1.0, 0.75)
    assert times.has_graph
    assert not plain.has_graph
    for t, expected, c in zip(times.stages(), plain.stages(), times.nodes[1:], strict=True):
        assert torch.equal(t, expected)
        assert gradients(t, start, size) == pytest.approx([sign, sign * c])
    assert gradients(times.at(0.6, 0.5), start, size) == [sign, sign * 0.5]
    assert gradients(times.h_graph, start, size) == [0.0, sign]
    assert times.h_graph.item() == times.h
    assert times.h_graph.dtype == dtype
    assert gradients(times.end_graph, start, size) == [1.0, 1.0]
    assert times.end_graph.item() == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_graph_of_the_start_alone(sign):
    times, start, _ = step_with_graph(sign, size=False)
    for t in times.stages():
        assert gradients(t, start) == [sign]
    assert times.h_graph is None
    assert gradients(times.end_graph, start) == [1.0]
    assert times.end_graph.item() == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_graph_of_the_size_alone(sign):
    times, _, size = step_with_graph(sign, start=False)
    for t, c in zip(times.stages(), times.nodes[1:]):
        assert gradients(t, size) == pytest.approx([sign * c])
    assert gradients(times.h_graph, size) == [sign]
    assert gradients(times.end_graph, size) == [1.0]
    assert times.end_graph.item() == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_graph_with_a_fixed_end(sign):
    """The size is the end minus the start: stages move by 1 - c, the end stays."""
    times, start, _ = step_with_graph(sign, size=False, fixed_end=True)
    for t, c in zip(times.stages(), times.nodes[1:]):
        assert gradients(t, start) == pytest.approx([sign * (1 - c)])
    assert gradients(times.h_graph, start) == [-sign]
    assert times.h_graph.item() == sign * 0.75
    assert times.end_graph is None


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_graph_of_a_prescribed_end(sign, with_start):
    """Stages move with c of the end and 1 - c of the start."""
    times, start, _ = step_with_graph(sign, start=with_start, size=False, fixed_end=True)
    end = torch.tensor(1.0, dtype=F64, requires_grad=True)
    times.prescribe_end(end)
    assert times.has_graph
    leaves = [end, start] if with_start else [end]
    for t, c in zip(times.stages(), times.nodes[1:]):
        assert gradients(t, *leaves) == pytest.approx([sign * c, sign * (1 - c)][: len(leaves)])
    assert gradients(times.h_graph, *leaves) == [sign, -sign][: len(leaves)]
    assert times.h_graph.item() == times.h == sign * 0.75
    assert times.end_graph is end
    (x,) = times.points(torch.tensor([0.4], dtype=F64))
    assert x.item() == pytest.approx(0.2)
    # x = (s - start) / (end - start)
    expected = [-0.15 / 0.75**2, -0.6 / 0.75**2][: len(leaves)]
    assert gradients(x, *leaves) == pytest.approx(expected)


def test_a_fixed_end_without_a_graph_has_none():
    times, _, _ = step_with_graph(start=False, size=False, fixed_end=True)
    assert not times.has_graph
    assert times.h_graph is None
    assert times.end_graph is None


def test_second_derivatives_of_stage_times():
    """The times' gradient is constant, what depends on them is not."""
    times, start, size = step_with_graph()
    first = torch.autograd.grad(sum(t**3 for t in times.stages()), [start, size], create_graph=True)
    second = gradients(first[0] + first[1], start, size)
    values = [(t.item(), c) for t, c in zip(times.stages(), times.nodes[1:])]
    expected = [
        sum(6 * t * (1 + c) for t, c in values),
        sum(6 * t * (c + c * c) for t, c in values),
    ]
    assert second == pytest.approx(expected)


@pytest.mark.parametrize("fixed_end", [False, True])
@pytest.mark.parametrize("with_size", [False, True])
def test_points_and_their_gradients(with_size, fixed_end):
    outputs = torch.tensor([0.25, 0.4, 0.9, 1.0], dtype=F64, requires_grad=True)
    times, start, size = step_with_graph(size=with_size, fixed_end=fixed_end)
    points = times.points(outputs)
    expected = [times.point(s) for s in outputs.tolist()]
    assert [x.item() for x in points] == pytest.approx(expected, rel=1e-15)
    assert expected[0] == 0.0
    assert expected[-1] == 1.0

    def function(outputs, start, size):
        # x = (s - start) / size, but where the end is fixed.
        nodes = times.nodes
        step = StepTimes(
            problem(), nodes, start.item(), 1.0 if fixed_end else (start + size).item(),
            (1.0 - start if fixed_end else size).item(), start, size if with_size else None,
            fixed_end,
        )  # fmt: skip
        return step.points(outputs)

    size = torch.tensor(0.75, dtype=F64, requires_grad=with_size) if size is None else size
    assert torch.autograd.gradcheck(function, (outputs, start, size))


def test_points_are_in_the_dtype_of_time():
    times, _, _ = step_with_graph(dtype=C64)
    x = times.points(torch.tensor([0.7], dtype=F64))
    assert (x.dtype, x.shape) == (F64, (1,))


def test_an_output_outside_of_the_step_is_refused():
    times, _, _ = step_with_graph()
    assert times.point(0.25) == 0.0
    for s in (0.2, 1.1):
        with pytest.raises(AssertionError, match="invalid interpolation"):
            times.point(s)


def test_resize():
    """What is still to come sees the new size; the times of the stages were those of the old."""
    times = StepTimes(problem(F32, -1), TABLEAUX["bosh3"].c, 0.25, 1.0, 0.75)
    assert times.resize(0.1) == 0.1
    assert times.size == 0.1
    assert times.h == -torch.tensor(0.1).item()


# ---- rounding ------------------------------------------------------------------------------------

REAL = pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
NUMBERS = [
    0.0, 1.0, -1.0, 0.1, 1 / 3, -2.7, 1e-3, 999.9, 12345.678, 6e-8, -6e-8, 1e-300, 4096.0, 65504.0,
    1e6, 1e9, 3e38, 1 + 2**-24, 1 + 2**-24 + 2**-50, 1 + 2**-8, 0.5, 2.0, 2**24 + 1.0,
]  # fmt: skip


@REAL
def test_rounding(dtype):
    round_ = rounding.rounding(dtype)
    for x in [*NUMBERS, math.inf, -math.inf]:
        y = round_(x)
        assert type(y) is float
        assert y == torch.tensor(x, dtype=F64).to(dtype).item()
    assert math.isnan(round_(math.nan))


def test_f32_arithmetic_is_rounded_f64_arithmetic():
    """What step control relies on: +, -, *, / of f32 numbers, rounded, are the f32 results."""
    a, b = (normal(20_000, seed=seed, dtype=F32).abs() * 10 for seed in (1, 2))
    b = b * torch.logspace(-6, 6, 20_000)
    round_ = rounding.rounding(F32)
    for operation in (torch.add, torch.sub, torch.mul, torch.div):
        exact = operation(a.double(), b.double())
        assert torch.equal(exact.float(), operation(a, b))
        assert [round_(x) for x in exact[:500].tolist()] == operation(a, b)[:500].tolist()


@REAL
def test_before_and_after(dtype):
    """torchdiffeq's perturbed times, nextafter(t, t - 1) and nextafter(t, t + 1)."""
    moved = 0
    for number in NUMBERS:
        t = torch.tensor(number, dtype=F64).to(dtype)
        if not t.isfinite():
            continue
        x = t.item()
        assert rounding.before(x, dtype) == torch.nextafter(t, t - 1).item()
        assert rounding.after(x, dtype) == torch.nextafter(t, t + 1).item()
        moved += rounding.before(x, dtype) < x < rounding.after(x, dtype)
    assert moved >= 10


@REAL
def test_next_after(dtype):
    one = torch.ones((), dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert rounding.next_after(1.0, 2.0, dtype) == 1 + eps
    assert rounding.next_after(1.0, -5.0, dtype) == 1 - eps / 2
    assert rounding.next_after(1.0, 1.0, dtype) == 1.0
    tiny = torch.nextafter(0 * one, one).item()
    assert rounding.next_after(0.0, 1.0, dtype) == tiny > 0
    assert type(rounding.next_after(1.0, 2.0, dtype)) is float


def test_times_too_large_to_move():
    """Where t - 1 rounds to t there is no direction, and t stays, as in torch."""
    large = 2.0**60
    assert rounding.before(large, F64) == rounding.after(large, F64) == large
    assert rounding.before(2.0**30, F32) == 2.0**30


def test_real_dtype():
    assert [rounding.real_dtype(dtype) for dtype in (C64, C128, F16, F32)] == [F32, F64, F16, F32]
